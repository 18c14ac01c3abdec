"""What lies in a checkpoint's folder: configuration, tensors and which of them is which, codes, tokenizer, code."""
