"""The checkpoint's own code, run and watched: what it computes decides. PyTorch is imported here."""
