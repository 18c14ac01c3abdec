"""The model in PyTorch, as a Hugging Face remote-code package: the oracle that the native engine is compared with.

The two files next to this one are copied, unchanged, beside every checkpoint; nothing here is imported by the engine.
"""
