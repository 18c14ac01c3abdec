"""PyTorch's threads by the size of a checkpoint."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

#: Weights of fewer bytes are computed by one thread: products of small matrices take less time than PyTorch's threads
#: take to meet, and far less where another process keeps one of them from running (the demo on two shared CPUs: 34 s
#: with two threads, 11 with one).
SMALL = 256 << 20


@contextlib.contextmanager
def torch_threads(checkpoint_dir: Path) -> Iterator[None]:
    """One thread for a small checkpoint, else as many as PyTorch has; afterwards as before, whatever happened."""
    files = (path for pattern in ("*.safetensors", "*.bin", "*.pt", "*.pth") for path in checkpoint_dir.glob(pattern))
    if sum(path.stat().st_size for path in files if path.is_file()) >= SMALL:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
