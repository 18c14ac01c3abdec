"""One PyTorch thread for a small checkpoint, and the caller's number afterwards."""

import pytest
import torch

from fixmin_cpp.convert.observed.torch_threads import SMALL, torch_threads


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("n_bytes", "inside"), [([10], 1), ([SMALL - 1], 1), ([SMALL], 2), ([SMALL // 2] * 2, 2)])
def test_by_size_and_restored(tmp_path, two_threads, n_bytes, inside):
    for i, n in enumerate(n_bytes):
        with (tmp_path / f"{i}.safetensors").open("wb") as file:
            file.truncate(n)
    with torch_threads(tmp_path):
        assert torch.get_num_threads() == inside
    assert torch.get_num_threads() == 2


def test_restored_after_an_error(tmp_path, two_threads):
    with pytest.raises(RuntimeError, match="broken"), torch_threads(tmp_path):
        raise RuntimeError("broken")
    assert torch.get_num_threads() == 2
