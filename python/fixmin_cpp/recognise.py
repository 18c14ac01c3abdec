"""What a path is that is not what was asked for: the common mix-ups, each with what to do about it."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from .errors import GGUFError

__all__ = [
    "describe_content",
    "describe_no_file",
    "describe_path",
    "describe_wrong_model",
    "folder_and_type",
    "hub_id",
    "refuse_wrong_model",
]

_LFS = b"version https://git-lfs.github.com/spec/"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SHORT = 4096  # bytes; an error message that was saved in the place of a file is shorter
_PACKED = "a file packed with {}: unpack it first"
_FORMATS = (
    ("gguf", b"GGUF", "a GGUF file in spite of its name"),
    ("torch", b"PK\x03\x04", "a zip archive: PyTorch's weights if it is named pytorch_model.bin, else to be unpacked"),
    ("torch", b"\x80\x02", "a pickle: PyTorch's weights if it is named pytorch_model.bin"),
    ("other", b"\x1f\x8b", _PACKED.format("gzip")),
    ("other", b"BZh", _PACKED.format("bzip2")),
    ("other", b"\xfd7zXZ\0", _PACKED.format("xz")),
    ("other", b"\x28\xb5\x2f\xfd", _PACKED.format("zstd")),
    ("other", b"7z\xbc\xaf\x27\x1c", _PACKED.format("7-Zip")),
    ("other", b"\x89HDF\r\n", "an HDF5 file: weights of Keras or TensorFlow, which cannot be converted"),
    ("other", b"\x93NUMPY", "an array of NumPy"),
    ("other", b"\x7fELF", "a program, not data"),
)


def describe_content(path: Path, wanted: str = "") -> str | None:
    """What the file holds in place of its content: a pointer, a page, a message, nothing, another format than `wanted`
    ("gguf", "torch", "safetensors"). None if no such thing."""
    with open(path, "rb") as file:
        head = file.read(_SHORT + 1)
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:15].lower()
    if head.startswith(_LFS):
        return "a Git LFS pointer, not the file itself: run `git lfs pull` in its folder, or use `hf download`"
    if start.startswith((b"<!doctype html", b"<html")):
        return "an HTML page, not the file itself: the server answered the download with a page; use `hf download`"
    if not head:
        return "the file is empty (0 bytes): download it again"
    for kind, magic, what in _FORMATS:
        if head.startswith(magic):
            return what if kind != wanted else None
    if head[8:10] == b'{"' and wanted != "safetensors":
        return "a safetensors file in spite of its name"
    return _describe_message(head)


def _describe_message(head: bytes) -> str | None:
    """What a server said in place of the file, if the file is as short as such a message, and text."""
    if len(head) > _SHORT:
        return None
    try:
        text = " ".join(head.decode("utf-8-sig").split())
    except UnicodeDecodeError:
        return None
    is_json = text.startswith(("{", "["))
    if not text or not text.isprintable() or (is_json and not re.match(r'\{ ?"(error|message|detail)"', text)):
        return None
    return f"holds the message {text[:100]!r} in place of the file: the download failed"


def describe_no_file(path: Path) -> str | None:
    """What has the name of a file and is none: a link to nothing, a folder, a pipe. None for a file, or nothing."""
    if path.is_file() or not os.path.lexists(path):
        return None
    if path.is_dir():
        return "a folder, not a file"
    if path.is_symlink() and not path.exists():
        return f"a link to {os.readlink(path)}, which is not there (an incomplete copy of a cache?)"
    return "a pipe or device, not a file"


def folder_and_type(text: str) -> tuple[str, str] | None:
    """(FOLDER, TYPE) of FOLDER:TYPE, if there is that folder and nothing of the whole name."""
    parts = re.fullmatch(r"(.+):([^:/]+)", text)
    if parts is None or os.path.exists(text) or not os.path.isdir(parts[1]):
        return None
    return parts[1], parts[2]


def describe_path(path: Path) -> str:
    """Why `path` is no checkpoint folder, and what to do."""
    if path.is_file():
        if path.suffix == ".gguf":
            return "a GGUF file, which needs no converting (fixmin generate -m runs it, fixmin quantize shrinks it)"
        if path.suffix in (".safetensors", ".bin", ".json", ".py"):
            return f"a file: give the folder that holds it with config.json, {path.parent}"
        return "a file, not a folder with a checkpoint"
    if (name := hub_id(str(path))) is not None:
        fetch = f"hf download {name} --local-dir {name.split('/')[1]}"
        return f"there is no such folder; if this is a model of the Hugging Face hub: {fetch}"
    return "there is no such checkpoint directory"


def describe_wrong_model(path: str | os.PathLike[str]) -> str | None:
    """Why `path` cannot be loaded as a GGUF file, for the mix-ups that are known; None for all else."""
    path = Path(path)
    if path.is_dir():
        inside = sorted(p.name for p in path.glob("*.gguf"))
        if inside:
            return f"a folder; give a file in it: {', '.join(inside[:4])}"
        if (path / "config.json").is_file():
            return f"a checkpoint folder; convert it first: fixmin convert {path} -o model.gguf --trust-remote-code"
        return "a folder, not a GGUF file"
    if path.is_file():
        with open(path, "rb") as file:
            if file.read(4) == b"GGUF":
                return None
        if path.suffix in (".safetensors", ".bin", ".pt", ".pth"):
            return f"weights of a checkpoint, not a GGUF file; convert its folder: fixmin convert {path.parent}"
        return describe_content(path, "gguf")
    if not path.exists() and (name := hub_id(str(path))) is not None:
        return f"there is no such file; a model of the Hugging Face hub? Model.from_pretrained, or fixmin run {name}"
    return None


def refuse_wrong_model(path: str | os.PathLike[str]) -> None:
    """Raises what describe_wrong_model() says: FileNotFoundError, IsADirectoryError or GGUFError."""
    if (reason := describe_wrong_model(path)) is not None:
        if os.path.isdir(path):
            raise IsADirectoryError(errno.EISDIR, reason, os.fspath(path))
        if not os.path.exists(path):
            raise FileNotFoundError(errno.ENOENT, reason, os.fspath(path))
        raise GGUFError(f"{os.fspath(path)}: {reason}")


def hub_id(text: str) -> str | None:
    """OWNER/NAME of the Hugging Face hub, from that, hf.co/OWNER/NAME or the address; None if it looks like a path."""
    text = text.rstrip("/")
    name = re.sub(r"^(https?:/+)?(www\.)?(huggingface\.co|hf\.co)/", "", text)
    if not _HUB_ID.fullmatch(name) or name.endswith((".gguf", ".safetensors")):
        return None
    return None if name == text and Path(text).parent.is_dir() else name
