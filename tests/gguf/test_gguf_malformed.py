"""Every class of defect that GGUF readers have had: each must raise GGUFError with a message that says where."""

import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from gguf_bytes import (
    ARRAY,
    BOOL,
    F32,
    I32,
    STRING,
    T_F32,
    T_Q4_K,
    T_Q8_0,
    U8,
    U16,
    U32,
    U64,
    array,
    build,
    kv,
    raw_kv,
    sample,
    string,
    tensor,
    u32,
    u64,
)

from fixmin_cpp import _core

BIG = [2**40, 2**60, 2**63, 2**64 - 1]
KEY = kv("k.first", U32, 1)
ROW = tensor("t.first", [8], T_F32, 0)  # 32 bytes: with 32 bytes of data a sound tensor
DATA = bytes(32)


def with_alignment(content: int, type_id: int = U32) -> bytes:
    return build([kv("general.alignment", type_id, content)], [ROW], DATA)


def tensor_type(type_id: int) -> bytes:
    return build([], [tensor("t.typed", [256], type_id, 0)], bytes(4096))


# id -> (file, pattern of the message)
CASES: dict[str, tuple[bytes, str]] = {
    # header
    "empty": (b"", r"header at byte 0"),
    "magic": (build(magic=b"GGML"), r"header at byte 0: not a GGUF file"),
    "magic only": (b"GGUF", r"header at byte 4: version needs 4 bytes, 0 are left"),
    "version 0": (build(version=0), r"byte 4: version 0 "),
    "version 1": (build(version=1), r"byte 4: version 1 "),
    "version 4": (build(version=4), r"byte 4: version 4 "),
    "byte-swapped version": (build(version=3 << 24), r"byte 4: .*big-endian"),
    "one key too many": (build([KEY], n_kv=2), r"header at byte 16: key count is 2, but the 23 bytes"),
    "keys beyond the file": (
        build([KEY, KEY], n_kv=3),
        r"key number 2 at byte 70: key length needs 8 bytes, 0 are left",
    ),
    "tensors beyond the file": (build([], [ROW], n_tensors=2), r"header at byte 8: tensor count is 2, but the"),
    # strings
    "key longer than the file": (build([string("k", length=1000) + bytes(20)]), r"key number 0 at byte 24: key length"),
    "key of 65536 bytes": (build([kv(b"k" * 65536, U32, 1)]), r"byte 24: key length is 65536, more than 65535"),
    "empty key": (build([kv("", U32, 1)]), r"key number 0 at byte 24: .*empty"),
    "key with NUL": (build([kv(b"a\0b", U32, 1)]), r"'a\\x00b' is not printable ASCII"),
    "key not UTF-8": (build([kv(b"a\xff", U32, 1)]), r"'a\\xff' is not printable ASCII"),
    "duplicate key": (build([KEY, kv("z", U8, 0), KEY]), r"key 'k.first' appears twice: at byte 24 and at byte \d+"),
    "truncated string": (
        build([raw_kv("k.s", STRING, u64(5) + b"abcd")]),
        r"key 'k.s' at byte \d+: string length is 5",
    ),
    # values
    "value type 13": (build([raw_kv("k.v", 13, bytes(8))]), r"key 'k.v' at byte 35: value type 13 does not exist"),
    "value type 2^32-1": (build([raw_kv("k.v", 2**32 - 1, bytes(8))]), r"key 'k.v' at byte 35: value type 4294967295"),
    "bool 2": (build([kv("k.b", BOOL, 2)]), r"key 'k.b' at byte \d+: bool is 2"),
    "bool 255 in array": (
        build([raw_kv("k.b", ARRAY, array(BOOL, [0, 1, 255]))]),
        r"key 'k.b' at byte \d+: bool is 255",
    ),
    "value missing": (build([string("k.v") + u32(U64) + bytes(7)]), r"key 'k.v' at byte \d+: u64 needs 8 bytes, 7 are"),
    # arrays
    "array of arrays": (
        build([raw_kv("k.a", ARRAY, u32(ARRAY) + u64(1) + array(U8, [1]))]),
        r"key 'k.a' at byte \d+: arrays of arrays",
    ),
    "array element type 13": (
        build([raw_kv("k.a", ARRAY, u32(13) + u64(0))]),
        r"'k.a' at byte \d+: array element type 13",
    ),
    "array short by one": (
        build([raw_kv("k.a", ARRAY, array(U16, [1, 2], count=3))]),
        r"'k.a' at byte \d+: array length is 3",
    ),
    "array whose bytes wrap": (
        build([raw_kv("k.a", ARRAY, array(U64, [1, 2], count=2**61 + 1))]),
        r"'k.a' at byte \d+: array length is 2305843009213693953",
    ),
    "string array, element too long": (
        build([raw_kv("k.a", ARRAY, u32(STRING) + u64(2) + string("x") + string("y", length=2**64 - 1))]),
        r"'k.a' at byte \d+: string length is 18446744073709551615",
    ),
    # alignment
    "alignment 0": (with_alignment(0), r"'general.alignment' at byte 24: 0 is not"),
    "alignment 1": (with_alignment(1), r"'general.alignment' at byte 24: 1 is not"),
    "alignment 3": (with_alignment(3), r"'general.alignment' at byte 24: 3 is not"),
    "alignment 48": (with_alignment(48), r"'general.alignment' at byte 24: 48 is not"),
    "alignment 2^31": (with_alignment(2**31), r"'general.alignment' at byte 24: 2147483648 is not"),
    "alignment u64": (with_alignment(32, U64), r"'general.alignment' at byte 24: expected u32, found u64"),
    "alignment i32": (with_alignment(32, I32), r"'general.alignment' at byte 24: expected u32, found i32"),
    "alignment f32": (with_alignment(32, F32), r"'general.alignment' at byte 24: expected u32, found f32"),
    "alignment string": (
        build([kv("general.alignment", STRING, "32")], [ROW], DATA),
        r"'general.alignment' at byte 24: expected u32, found string",
    ),
    # tensor entries
    "empty tensor name": (build([], [tensor("", [8], T_F32, 0)], DATA), r"tensor number 0 at byte 24: .*empty"),
    "tensor name of 65 bytes": (
        build([], [tensor("n" * 65, [8], T_F32, 0)], DATA),
        r"tensor name length is 65, more than 64",
    ),
    "tensor name not UTF-8": (build([], [tensor(b"t\xfe", [8], T_F32, 0)], DATA), r"'t\\xfe' is not printable ASCII"),
    "duplicate tensor": (
        build([], [ROW, tensor("t.first", [8], T_F32, 32)], DATA * 2),
        r"tensor 't.first' appears twice: at byte \d+ and at byte \d+",
    ),
    "n_dims 5": (build([], [tensor("t.d", [1] * 5, T_F32, 0)], DATA), r"tensor 't.d' at byte 35: n_dims is 5"),
    "n_dims 2^32-1": (
        build([], [tensor("t.d", [1], T_F32, 0, n_dims=2**32 - 1)], DATA),
        r"tensor 't.d' at byte 35: n_dims is 4294967295",
    ),
    "dimension 0": (build([], [tensor("t.d", [8, 0], T_F32, 0)], DATA), r"tensor 't.d' at byte 47: dimension 1 is 0"),
    "2^32 x 2^32": (
        build([], [tensor("t.d", [2**32] * 2, T_F32, 0)], DATA),
        r"'t.d' at byte 47: .*overflows at dimension 1",
    ),
    "2^63": (build([], [tensor("t.d", [2**63], T_F32, 0)], DATA), r"'t.d' at byte 39: .*overflows at dimension 0"),
    "product that wraps to a small number": (
        build([], [tensor("t.d", [2**33, 2**31 + 1], T_F32, 0)], DATA),
        r"'t.d' at byte 47: .*overflows",
    ),
    "bytes that overflow": (build([], [tensor("t.d", [2**62], T_F32, 0)], DATA), r"'t.d' .*size in bytes overflows"),
    "quantised bytes beyond the file": (
        build([], [tensor("t.d", [2**40, 2**20], T_Q8_0, 0)], DATA),
        r"'t.d' .* 1224979098644774912 bytes end beyond the file's",
    ),
    "row not a multiple of 32": (
        build([], [tensor("t.d", [33], T_Q8_0, 0)], DATA * 9),
        r"33 is not a multiple .* 32 of Q8_0",
    ),
    "row not a multiple of 256": (
        build([], [tensor("t.d", [128, 2], T_Q4_K, 0)], DATA * 9),
        r"128 is not .* 256 of Q4_K",
    ),
    "scalar of a quantised type": (
        build([], [tensor("t.d", [], T_Q8_0, 0)], DATA * 9),
        r"row length 1 is not a multiple",
    ),
    "entry truncated": (
        build([tensor("t.d", [8], T_F32, 0)[:-1]], n_kv=0, n_tensors=1),
        r"'t.d' at byte 51: tensor offset needs 8 bytes, 7",
    ),
    # data
    "no data": (build([], [ROW]), r"tensor 't.first' with data at byte \d+ \+ 0: its 32 bytes end beyond"),
    "data short by one": (
        build([], [ROW], DATA[1:]),
        r"tensor 't.first' .* its 32 bytes end beyond the file's \d+ bytes",
    ),
    "no data section": (
        build([ROW], n_kv=0, n_tensors=1),
        r"'t.first' with data at byte 64 \+ 0: its 32 bytes end beyond",
    ),
    "offset not aligned": (
        build([], [tensor("t.o", [8], T_F32, 4)], DATA * 2),
        r"'t.o' .* \+ 4: not a multiple of the align",
    ),
    "offset beyond the file": (
        build([], [tensor("t.o", [8], T_F32, 2**40)], DATA),
        r"'t.o' .* \+ 1099511627776: leaves a gap",
    ),
    "offset that wraps": (
        build([], [tensor("t.o", [8], T_F32, 2**64 - 32)], DATA),
        r"'t.o' .* \+ 18446744073709551584",
    ),
    "gap": (
        build([], [ROW, tensor("t.o", [8], T_F32, 64)], DATA * 3),
        r"'t.o' .* \+ 64: leaves a gap: expected \+ 32",
    ),
    "same offset": (
        build([], [ROW, tensor("t.o", [8], T_F32, 0)], DATA * 2),
        r"'t.o' .* \+ 0: overlaps another tensor: expected \+ 32",
    ),
    "overlap by one block": (
        build([], [tensor("t.long", [16], T_F32, 0), tensor("t.o", [8], T_F32, 32)], DATA * 3),
        r"'t.o' .* \+ 32: overlaps another tensor: expected \+ 64",
    ),
    "decreasing offsets": (
        build([], [tensor("t.hi", [8], T_F32, 32), tensor("t.lo", [8], T_F32, 0)], DATA * 2),
        r"'t.hi' .* \+ 32: leaves a gap: expected \+ 0",
    ),
    "many tensors whose sum wraps": (
        build([], [tensor(f"t.{i}", [2**59], T_F32, i << 61) for i in range(8)], DATA),
        r"tensor 't.0' .* bytes end beyond",
    ),
}
CASES |= {f"n_kv {n}": (build([KEY], n_kv=n), rf"header at byte 16: key count is {n}, but") for n in BIG}
CASES |= {f"n_tensors {n}": (build([KEY], [ROW], DATA, n_tensors=n), rf"byte 8: tensor count is {n}, but") for n in BIG}
CASES |= {
    f"key length {n}": (build([string("k", length=n) + bytes(40)]), rf"byte 24: key length is {n}, but") for n in BIG
}
CASES |= {
    f"string length {n}": (
        build([raw_kv("k.s", STRING, string("abc", length=n))]),
        rf"'k.s' at byte 39: string length is {n}, but",
    )
    for n in BIG
}
CASES |= {
    f"name length {n}": (build([], [string("t", length=n) + bytes(40)]), rf"byte 24: tensor name length is {n}, but")
    for n in BIG
}
CASES |= {
    f"array length {n} of type {element}": (
        build([raw_kv("k.a", ARRAY, u32(element) + u64(n) + bytes(64))]),
        rf"key 'k.a' at byte \d+: array length is {n}, but",
    )
    for n in BIG
    for element in (U8, F32, BOOL, STRING, U64)
}
CASES |= {
    f"tensor type {t}": (tensor_type(t), rf"tensor 't.typed' at byte \d+: tensor type {t} does not exist")
    for t in (4, 5, 31, 32, 33, 36, 37, 38, 43, 255, 2**31, 2**32 - 1)
}


@pytest.mark.parametrize("name", CASES)
def test_is_refused_and_the_place_named(name: str, tmp_path: Path) -> None:
    data, message = CASES[name]
    with pytest.raises(_core.GGUFError, match=message):
        _core.GgufFile.from_bytes(data)
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(_core.GGUFError, match=message):
        _core.GgufFile(str(path))


def test_the_sound_parts_of_the_cases_are_accepted() -> None:
    """The cases above fail for their defect and not for something that they all share."""
    _core.GgufFile.from_bytes(build([KEY, kv("z", U8, 0)]))
    _core.GgufFile.from_bytes(build([], [ROW, tensor("t.o", [8], T_F32, 32)], DATA * 2))
    _core.GgufFile.from_bytes(build([], [tensor("n" * 64, [8], T_F32, 0)], DATA))
    _core.GgufFile.from_bytes(build([kv(b"k" * 65535, U32, 1)]))
    assert _core.GgufFile.from_bytes(with_alignment(32)).alignment == 32
    assert _core.GgufFile.from_bytes(tensor_type(T_Q8_0)).tensors[0].type == "Q8_0"


def test_truncated_at_every_byte() -> None:
    data = sample()
    _core.GgufFile.from_bytes(data)
    for size in range(len(data)):
        with pytest.raises(_core.GGUFError, match=r"at byte \d+"):
            _core.GgufFile.from_bytes(data[:size])


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (u32(STRING) + u64(2**30 + 1), r"string length is 1073741825, more than 1073741824"),
        (u32(ARRAY) + u32(U8) + u64(2**30 + 1), r"array length is 1073741825, more than 1073741824"),
    ],
)
def test_limits_of_ggml(tmp_path: Path, payload: bytes, message: str) -> None:
    """What ggml refuses for its size is refused even where the file is long enough; the file is sparse."""
    path = tmp_path / "sparse.gguf"
    with path.open("wb") as file:
        file.write(build([string("k.big") + payload]))
        file.truncate(2**30 + 4096)
    with pytest.raises(_core.GGUFError, match="'k.big' at byte .*" + message):
        _core.GgufFile(str(path))


def test_a_duplicate_among_many_keys() -> None:
    keys = [kv(f"key.{'x' * 40}.{i}", U8, 0) for i in range(50_000)]
    assert len(_core.GgufFile.from_bytes(build(keys)).metadata) == len(keys)
    with pytest.raises(_core.GGUFError, match="appears twice"):
        _core.GgufFile.from_bytes(build([*keys, keys[777]]))


HOSTILE = """
import resource, sys
import numpy  # imported before the limit: only the reader's allocations count
from fixmin_cpp import _core
files = [bytes.fromhex(line) for line in sys.stdin]
in_use = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (in_use + (64 << 20), resource.RLIM_INFINITY))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for data in files:
    try:
        _core.GgufFile.from_bytes(data)
    except _core.GGUFError:  # a MemoryError would end the process
        continue
    raise SystemExit("accepted: " + data.hex())
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_small_files_that_claim_much_allocate_little() -> None:
    """Files of about a hundred bytes with counts of 2^40 and more, in a process that may not grow by 64 MiB.

    The time limit only ends a reader that would loop over the claimed count.
    """
    files = [data for data, _ in CASES.values() if len(data) < 1000]
    files += [data for name, (data, _) in CASES.items() if re.search(r"length|n_kv|n_tensors", name)]
    run = subprocess.run(
        [sys.executable, "-c", HOSTILE],
        input="\n".join(data.hex() for data in files),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 8 * 1024, f"peak memory grew by {run.stdout} KiB"
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY  # the limit was the child's only
