"""Keys and values of a text in a file, so that a later process need not read it again.

A file holds the token ids and the keys and values of as many of them as fill whole blocks of the cache (32 tokens);
the rest is computed again, with the same bits. It belongs to one model file and one type of cache:

    8 bytes  "FIXMINKV"
    u32      version, 1
    u32      length of the header
    header   JSON: model (sha256 of the GGUF file), kv_type, block_tokens, block_bytes, n_tokens, n_blocks, data
             (sha256)
    u32[n_tokens]                  token ids
    u8[n_blocks][block_bytes]      keys and values

Numbers are little-endian; `data` is the hash of everything behind the header.
"""

import hashlib
import json
import os
import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .atomic_file import AtomicFile
from .errors import ArgumentError

__all__ = ["file_sha256", "read_state", "write_state"]

_MAGIC = b"FIXMINKV"
_VERSION = 1
_LONGEST_HEADER = 1 << 16


def write_state(
    path: str | os.PathLike[str],
    model: str,
    info: dict[str, Any],
    ids: NDArray[np.uint32],
    blocks: NDArray[np.uint8],
) -> None:
    """Writes a file; it appears when it is complete."""
    data = [ids.astype("<u4").tobytes(), blocks.tobytes()]
    digest = hashlib.sha256()
    for part in data:
        digest.update(part)
    header = json.dumps(
        {
            "model": model,
            "kv_type": info["kv_type"],
            "block_tokens": info["kv_block_tokens"],
            "block_bytes": info["kv_block_bytes"],
            "n_tokens": len(ids),
            "n_blocks": len(blocks) // info["kv_block_bytes"],
            "data": digest.hexdigest(),
        }
    ).encode()
    with AtomicFile(path) as target:
        target.write(_MAGIC + struct.pack("<II", _VERSION, len(header)) + header)
        for part in data:
            target.write(part)
        target.commit()


def read_state(
    path: str | os.PathLike[str], model: str, info: dict[str, Any]
) -> tuple[NDArray[np.uint32], NDArray[np.uint8]]:
    """Token ids [T] and the blocks, uint8 [n * block_bytes], of the first of them.

    Raises:
        ArgumentError: the file is no such file, is damaged, or belongs to another model or cache type.
    """
    name = os.fspath(path)
    if os.path.exists(path) and not os.path.isfile(path):  # opening a pipe would wait for its writer
        raise ArgumentError(f"{name} is not a saved state: it is no file")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(16)
        if len(start) < 16 or start[:8] != _MAGIC:
            raise ArgumentError(f"{name} is not a saved state")
        version, length = struct.unpack("<II", start[8:])
        if version != _VERSION:
            raise ArgumentError(f"{name} is a saved state of version {version}; this build reads version {_VERSION}")
        if length > min(_LONGEST_HEADER, size):
            raise ArgumentError(f"{name} is damaged: its header would have {length} bytes")
        header = _header(name, file.read(length))
        for key, here in (
            ("model", model),
            ("kv_type", info["kv_type"]),
            ("block_tokens", info["kv_block_tokens"]),
            ("block_bytes", info["kv_block_bytes"]),
        ):
            if header[key] != here:
                raise ArgumentError(
                    f"{name} was saved by another model or cache: {key} {header[key]!r} is not {here!r}"
                )
        n_tokens, n_blocks = header["n_tokens"], header["n_blocks"]
        expected = 16 + length + 4 * n_tokens + n_blocks * header["block_bytes"]
        if not 0 <= n_blocks * header["block_tokens"] <= n_tokens <= info["n_ctx"] or size != expected:
            raise ArgumentError(
                f"{name} does not fit: {size} bytes, {n_tokens} tokens, {n_blocks} blocks, context of {info['n_ctx']}"
            )
        data = file.read()
    if hashlib.sha256(data).hexdigest() != header["data"]:
        raise ArgumentError(f"{name} is damaged: the hash of its data is another one")
    ids = np.frombuffer(data, "<u4", n_tokens).astype(np.uint32)
    return ids, np.frombuffer(data, np.uint8, offset=4 * n_tokens)


def _header(name: str, raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw)
        kinds: dict[str, type] = dict.fromkeys(("block_tokens", "block_bytes", "n_tokens", "n_blocks"), int)
        kinds |= dict.fromkeys(("model", "kv_type", "data"), str)
        for key, kind in kinds.items():
            if type(header[key]) is not kind:
                raise TypeError(key)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArgumentError(f"{name} is damaged: its header cannot be read ({error!r})") from None
    return header


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's contents, hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
