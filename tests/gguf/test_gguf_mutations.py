"""Random damage to a sound file: it is either read or refused with GGUFError, and never anything else.

tests/fuzz does the same with far more cases under the address sanitizer; this suite needs no compiler.
"""

import random
import struct

import pytest
from gguf_bytes import sample

from fixmin_cpp import _core

INTERESTING = [0, 1, 2, 8, 9, 12, 13, 31, 32, 33, 2**8 - 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1]


def read_everything(data: bytes) -> bool:
    """Whether the file is accepted; if so, everything in it is touched."""
    try:
        file = _core.GgufFile.from_bytes(data)
    except _core.GGUFError:
        return False
    assert isinstance(file.metadata, dict)
    for tensor in file.tensors:
        view = file.tensor_data(tensor.name)
        assert len(view) == tensor.n_bytes
        assert view.tobytes() == data[tensor.offset : tensor.offset + tensor.n_bytes]
    return True


@pytest.mark.parametrize("seed", range(3))
def test_random_bytes_changed(seed: int) -> None:
    rng = random.Random(seed)
    sound = sample()
    assert read_everything(sound)
    accepted = 0
    for case in range(1000):
        data = bytearray(sound)
        for _ in range(1 if case % 2 else rng.randint(2, 16)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        accepted += read_everything(bytes(data))
    assert 0 < accepted < 1000  # damage in tensor data is invisible, damage in the header mostly is not


def test_interesting_numbers_everywhere() -> None:
    sound = sample()
    refused = 0
    for at in range(0, len(sound) - 8):
        for number in INTERESTING[at % 3 :: 3]:
            data = sound[:at] + struct.pack("<Q", number) + sound[at + 8 :]
            refused += not read_everything(data)
    assert refused > 1000


def test_bytes_inserted_removed_and_doubled() -> None:
    rng = random.Random(3)
    sound = sample()
    for _ in range(500):
        a, b = sorted(rng.randrange(len(sound)) for _ in range(2))
        for data in (sound[:a] + sound[b:], sound[:b] + sound[a:], sound[:a] + rng.randbytes(8) + sound[a:]):
            read_everything(data)
