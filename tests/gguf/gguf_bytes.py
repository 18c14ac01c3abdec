"""Writes GGUF files byte by byte, sound or broken, independently of the reader under test and of the gguf package.

Layout (ggml docs/gguf.md): "GGUF", u32 version, u64 tensor count, u64 key count, the keys, the tensor entries,
zeros up to the alignment, the tensors' data. Everything is little-endian.
"""

import struct

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_FORMATS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "B", U64: "Q", I64: "q", F64: "d"}

# ids of ggml tensor types
T_F32, T_F16, T_Q4_0, T_Q8_0, T_Q4_K, T_I8, T_BF16 = 0, 1, 2, 8, 12, 24, 30


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def string(text: bytes | str, *, length: int | None = None) -> bytes:
    """A length and the bytes; `length` lies about it."""
    data = text.encode() if isinstance(text, str) else text
    return u64(len(data) if length is None else length) + data


def value(type_id: int, content) -> bytes:
    """The payload of a value of a scalar type or string."""
    return string(content) if type_id == STRING else struct.pack("<" + _FORMATS[type_id], content)


def array(element_type: int, elements, *, count: int | None = None) -> bytes:
    """The payload of an array value; `count` lies about its length."""
    head = u32(element_type) + u64(len(elements) if count is None else count)
    return head + b"".join(value(element_type, e) for e in elements)


def raw_kv(key: bytes | str, type_id: int, payload: bytes) -> bytes:
    return string(key) + u32(type_id) + payload


def kv(key: bytes | str, type_id: int, content) -> bytes:
    return raw_kv(key, type_id, value(type_id, content))


def tensor(name: bytes | str, dims: list[int], type_id: int, offset: int, *, n_dims: int | None = None) -> bytes:
    """A tensor entry. `dims` is in file order (row length first), `offset` relative to the data section."""
    count = len(dims) if n_dims is None else n_dims
    return string(name) + u32(count) + b"".join(u64(d) for d in dims) + u32(type_id) + u64(offset)


def build(
    kvs: list[bytes] = (),
    tensors: list[bytes] = (),
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_tensors: int | None = None,
    n_kv: int | None = None,
    alignment: int = 32,
) -> bytes:
    """The whole file. `data` follows the padding, so it begins at the data section."""
    head = magic + u32(version)
    head += u64(len(tensors) if n_tensors is None else n_tensors) + u64(len(kvs) if n_kv is None else n_kv)
    head += b"".join(kvs) + b"".join(tensors)
    padding = b"\0" * (-len(head) % alignment) if tensors else b""
    return head + padding + data


def sample() -> bytes:
    """A sound file with every value type and four tensors, that ends with the last tensor's last byte."""
    scalars = {U8: 200, I8: -5, U16: 60000, I16: -300, U32: 7, I32: -70000, F32: 0.5, BOOL: 1}
    scalars |= {U64: 2**40, I64: -(2**40), F64: 1e300}
    kvs = [kv("general.architecture", STRING, "fixmin")]
    kvs += [kv(f"test.scalar{type_id}", type_id, content) for type_id, content in scalars.items()]
    kvs += [
        raw_kv(f"test.array{type_id}", ARRAY, array(type_id, [content] * 3)) for type_id, content in scalars.items()
    ]
    kvs += [
        raw_kv("test.strings", ARRAY, array(STRING, ["", "one", "zwei Wörter"])),
        raw_kv("test.empty", ARRAY, array(F32, [])),
        kv("test.empty_string", STRING, ""),
    ]
    tensors = [
        tensor("token_code.weight", [2, 3], T_I8, 0),
        tensor("blk.0.attn_q.weight", [32, 2], T_Q8_0, 32),
        tensor("blk.0.attn_norm.weight", [3], T_F32, 128),
        tensor("output.weight", [4, 2, 2, 2], T_F16, 160),
    ]
    data = bytes(i % 251 for i in range(160 + 64))
    return build(kvs, tensors, data)
