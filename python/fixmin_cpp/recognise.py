"""What a path is that is not what was asked for: the common mix-ups, each with what to do about it."""

from __future__ import annotations

import os
import re
from pathlib import Path

__all__ = ["describe_content", "describe_path", "describe_wrong_model"]

_LFS = b"version https://git-lfs.github.com/spec/"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SHORT = 4096  # bytes; an error message that was saved in the place of a file is shorter


def describe_content(path: Path) -> str | None:
    """What the file holds in place of its content: a pointer, a page, a message, nothing. None if no such thing."""
    with open(path, "rb") as file:
        head = file.read(_SHORT + 1)
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:15].lower()
    if head.startswith(_LFS):
        return "a Git LFS pointer, not the file itself: run `git lfs pull` in its folder, or use `hf download`"
    if start.startswith((b"<!doctype html", b"<html")):
        return "an HTML page, not the file itself: the server answered the download with a page; use `hf download`"
    if not head:
        return "the file is empty (0 bytes): download it again"
    if head.startswith(b"GGUF"):
        return "a GGUF file in spite of its name"
    if len(head) <= _SHORT and not head.lstrip().startswith((b"{", b"[")):
        try:
            text = head.decode("utf-8").strip()
        except UnicodeDecodeError:
            return None
        if text.isprintable() and text:
            return f"holds the message {text[:100]!r} in place of the file: the download failed"
    return None


def describe_path(path: Path) -> str:
    """Why `path` is no checkpoint folder, and what to do."""
    if path.is_file():
        if path.suffix == ".gguf":
            return "a GGUF file, which needs no converting (fixmin generate -m runs it, fixmin quantize shrinks it)"
        if path.suffix in (".safetensors", ".bin", ".json", ".py"):
            return f"a file: give the folder that holds it with config.json, {path.parent}"
        return "a file, not a folder with a checkpoint"
    if (hint := _download(path)) is not None:
        return f"there is no such folder; if this is a model of the Hugging Face hub: {hint}"
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
        if path.suffix in (".safetensors", ".bin", ".pt", ".pth"):
            return f"weights of a checkpoint, not a GGUF file; convert its folder: fixmin convert {path.parent}"
        with open(path, "rb") as file:
            is_gguf = file.read(4) == b"GGUF"
        return None if is_gguf else describe_content(path)
    if not path.exists() and (hint := _download(path)) is not None:
        return f"there is no such file; if this is a model of the Hugging Face hub: {hint}, then convert it"
    return None


def _download(path: Path) -> str | None:
    """How to fetch what looks like OWNER/NAME of the hub, or an address of it; None if it does not."""
    text = re.sub(r"^https?:/+(www\.)?(huggingface\.co|hf\.co)/", "", str(path)).removeprefix("hf.co/")
    named = _HUB_ID.fullmatch(text) and not path.parent.is_dir() and path.suffix not in (".gguf", ".safetensors")
    return f"hf download {text} --local-dir {text.split('/')[1]}" if named else None
