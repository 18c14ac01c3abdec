"""What is in a GGUF file: hyper-parameters, the code and its matrix, certificate, tensors (`fixmin inspect`).

A file may come from anywhere. Strings out of it are shown with every control character escaped and are never read as
rich markup, so that a model's name cannot move the cursor, colour the screen or fake a line of this report.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import _core
from .errors import ArgumentError, GGUFError, naming
from .recognise import refuse_wrong_model
from .tokenizer import TextTokenizer, as_piece

__all__ = ["describe", "describe_code", "printable", "render"]

CERTIFICATE_PREFIX = "fixmin.convert.certificate."
_PROVENANCE_PREFIX = "fixmin.convert."
_QUANTIZE_PREFIX = "fixmin.quantize."
_MAX_DRAWN_BITS = 64  # a wider matrix does not fit a terminal at two columns a bit
_MAX_TEXT = 200  # characters shown of a string
_MAX_ITEMS = 8  # elements shown of an array


def describe(path: str | os.PathLike[str], tokens: Sequence[str] = ()) -> dict[str, Any]:
    """Everything `render` shows, as plain Python values that `json` can write.

    Args:
        path: a GGUF file; of another architecture only metadata and tensors are described.
        tokens: ids, or texts that the tokenizer in the file splits; several in one string are separated by commas
            ("0,1,hello"; quote a text that holds a comma as in CSV). Their codes are in "tokens".

    Raises:
        GGUFError: the file is malformed. ArgumentError: an id out of range, or text without a tokenizer or code.
        OSError: the file cannot be opened.
    """
    path = Path(path)
    with naming(path):
        refuse_wrong_model(path)
        file = _core.GgufFile(str(path))
        metadata = file.metadata
        tensors = [
            {"name": t.name, "shape": list(t.shape), "type": t.type, "bytes": t.n_bytes, "offset": t.offset}
            for t in file.tensors
        ]
        description = {
            "file": {
                "path": str(path),
                "bytes": path.stat().st_size,
                "gguf_version": file.version,
                "alignment": file.alignment,
                **_totals(tensors),
            },
            "metadata": _plain_metadata(
                metadata, excluded=(_PROVENANCE_PREFIX, _QUANTIZE_PREFIX, "fixmin.code.", "tokenizer.")
            ),
            "provenance": _plain_metadata(metadata, only=_PROVENANCE_PREFIX, excluded=(CERTIFICATE_PREFIX,)),
            "certificate": _plain_metadata(metadata, only=CERTIFICATE_PREFIX),
            "quantized": _plain_metadata(metadata, only=_QUANTIZE_PREFIX),
            "tokenizer": _describe_tokenizer(metadata),
            "code": describe_code(metadata),
            "tensors": tensors,
        }
        if tokens:
            description["tokens"] = _describe_tokens(file, metadata, tokens)
        return description


def render(
    path: str | os.PathLike[str],
    tokens: Sequence[str] = (),
    *,
    as_json: bool = False,
    all_tensors: bool = False,
    console: Console | None = None,
) -> None:
    """Print a file's description: tables on a terminal, plain ASCII in a pipe, one JSON object with as_json.

    Arguments and errors as for `describe`. Tensors that differ only in the number of their block are one line, unless
    all_tensors is true.
    """
    description = describe(path, tokens)
    console = console or Console(highlight=False, emoji=False)
    if as_json:
        console.out(json.dumps(description, indent=2, allow_nan=False), highlight=False)
        return
    screen = _Screen(console)
    screen.facts("File", _file_facts(description["file"]))
    screen.facts("Model", description["metadata"])
    if description["code"]:
        screen.code(description["code"])
    if description.get("tokens"):
        screen.tokens(description["tokens"])
    screen.facts("Tokenizer", description["tokenizer"])
    screen.facts("Converted from", description["provenance"])
    screen.certificate(description["certificate"])
    screen.facts("Quantised from", description["quantized"])
    screen.tensors(description["tensors"] if all_tensors else summarise(description["tensors"]), all_tensors)
    screen.totals(description["file"])


def printable(text: str, limit: int | None = None) -> str:
    """Text that is safe to write to a terminal and stays on its line.

    Control, formatting (bidirectional overrides, zero-width) and unassigned characters, line separators and lone
    surrogates are written as escapes. Longer than `limit` characters: cut, with the length.
    """
    shown = text if limit is None else text[:limit]
    parts = [c if _is_plain(c) else c.encode("unicode_escape").decode("ascii") for c in shown]
    cut = f"... ({len(text):,} characters)" if len(shown) < len(text) else ""
    return "".join(parts) + cut


def _is_plain(char: str) -> bool:
    return char == " " or unicodedata.category(char)[0] not in "CZ"


# --- what is in the file ----------------------------------------------------------------------------------------


def _totals(tensors: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Weights and bytes of all tensors and by type. Bits per weight count matrices only, with what scales of rows take:
    other vectors are always F32. Scales are no weights."""
    types: dict[str, dict[str, int]] = {}
    for tensor in tensors:
        entry = types.setdefault(tensor["type"], {"tensors": 0, "weights": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["weights"] += 0 if _is_scale(tensor) else math.prod(tensor["shape"])
        entry["bytes"] += tensor["bytes"]
    matrices = [t for t in tensors if len(t["shape"]) > 1]
    weights = sum(math.prod(t["shape"]) for t in matrices)
    n_bytes = sum(t["bytes"] for t in tensors if len(t["shape"]) > 1 or _is_scale(t))
    return {
        "weights": sum(entry["weights"] for entry in types.values()),
        "bits_per_weight": 8 * n_bytes / weights if weights else None,
        "types": types,
    }


def _is_scale(tensor: Mapping[str, Any]) -> bool:
    """Whether a tensor holds the scales of a W8A8 matrix."""
    return bool(tensor["name"].endswith(".weight_scale"))


def summarise(tensors: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for tensors of the same shape and type whose names differ only in a number, such as that of the block.

    Rows are in the order of the first of each; "name" has * for the number, "count" says how many there are, "bytes" is
    the sum.
    """
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for tensor in tensors:
        name = re.sub(r"(?<![^.])\d+(?![^.])", "*", tensor["name"])
        row = rows.setdefault(
            (name, *tensor["shape"], tensor["type"]), {**tensor, "name": name, "count": 0, "bytes": 0}
        )
        row["count"] += 1
        row["bytes"] += tensor["bytes"]
        if row["count"] == 1:
            row["first"] = tensor["name"]
    return [{**row, "name": row["first"] if row["count"] == 1 else row["name"]} for row in rows.values()]


def _plain_metadata(metadata: Mapping[str, Any], only: str = "", excluded: Sequence[str] = ()) -> dict[str, Any]:
    """The keys that start with `only` and with none of `excluded`, without the prefix `only`."""
    return {
        key.removeprefix(only): _plain(value)
        for key, value in metadata.items()
        if key.startswith(only) and not key.startswith(tuple(excluded))
    }


def _plain(value: Any) -> Any:
    """A value that JSON can hold. NaN and infinity have no JSON and become text."""
    if isinstance(value, np.ndarray):
        return [_plain(v) for v in value.tolist()]
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _describe_tokenizer(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Tokenizer keys; lists and tokenizer.json only by their length."""
    result = {}
    for key, value in metadata.items():
        if key.startswith("tokenizer."):
            is_long = isinstance(value, (list, np.ndarray)) or (isinstance(value, str) and len(value) > _MAX_TEXT)
            unit = "characters" if isinstance(value, str) else "entries"
            result[key.removeprefix("tokenizer.")] = f"{len(value)} {unit}" if is_long else _plain(value)
    return result


def describe_code(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """kind, width, lift, values, and for an affine code its matrix, shift and what kind of map it is."""
    prefix = "fixmin.code."
    code = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    matrix, shift, width = code.pop("affine_matrix", None), code.pop("affine_shift", None), code.get("width")
    result = {key: _plain(value) for key, value in code.items()}
    if matrix is not None or shift is not None:
        try:
            a, b = _affine(matrix, shift, width)
        except GGUFError as error:
            result["defect"] = str(error)
        else:
            result.update(matrix=a.tolist(), shift=b.tolist(), map=_name_map(a, b))
    return result


def _affine(matrix: Any, shift: Any, width: Any) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """A [K, K] and b [K] of 0/1, or GGUFError."""
    if not isinstance(width, int) or not 1 <= width <= 1 << 12:
        raise GGUFError(f"fixmin.code.width is {width!a}")
    for name, bits, length in (("affine_matrix", matrix, width * width), ("affine_shift", shift, width)):
        if not isinstance(bits, np.ndarray) or bits.shape != (length,) or not np.isin(bits, (0, 1)).all():
            raise GGUFError(f"fixmin.code.{name} is not an array of {length} bits")
    return matrix.astype(np.uint8).reshape(width, width), shift.astype(np.uint8)


def _name_map(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> str:
    """A and b in words."""
    width = len(a)
    rank = gf2_rank(a)
    if np.array_equal(a, np.eye(width)):
        name = "identity: the bits of the id"
    elif np.array_equal(a, np.eye(width)[::-1]):
        name = "reversal: the bits of the id, most significant first"
    elif (a.sum(axis=0) == 1).all() and (a.sum(axis=1) == 1).all():
        name = "permutation of the bits"
    else:
        name = f"{int(a.sum())} ones, rank {rank} of {width}" + ("" if rank == width else ": NOT invertible")
    return name + ("" if not b.any() else f", {int(b.sum())} bits inverted")


def gf2_rank(rows: Iterable[NDArray[np.uint8]]) -> int:
    """Rank over GF(2) of rows of 0 and 1, which are taken as integers."""
    basis: list[int] = []
    for row in rows:
        value = int("".join(map(str, row.tolist())), 2)
        for pivot in basis:
            value = min(value, value ^ pivot)
        if value:
            basis.append(value)
    return len(basis)


def _describe_tokens(file: _core.GgufFile, metadata: Mapping[str, Any], tokens: Sequence[str]) -> list[dict[str, Any]]:
    """id, text (U+FFFD for a part of a character), bytes and code of every token asked for."""
    tokenizer = TextTokenizer.from_metadata(metadata)
    ids = list(_token_ids(tokens, tokenizer))
    vocab_size = metadata.get("fixmin.vocab_size")
    if not isinstance(vocab_size, int) or isinstance(vocab_size, bool) or vocab_size < 1:
        raise GGUFError(f"fixmin.vocab_size is {vocab_size!a}: the file has no codes")
    for i in ids:
        if i >= vocab_size:
            raise ArgumentError(f"token id {i} is not below the vocabulary size {vocab_size}")
    codes = _codes(file, metadata, np.array(ids, dtype=np.uint32))
    data = [None if tokenizer is None else tokenizer.token_bytes(i) for i in ids]
    return [
        {
            "id": i,
            "text": None if (found := data[n]) is None else found.decode(errors="replace"),
            "bytes": None if found is None else list(found),
            "code": None if codes is None else codes[n].tolist(),
        }
        for n, i in enumerate(ids)
    ]


def _token_ids(tokens: Iterable[str], tokenizer: TextTokenizer | None) -> Iterable[int]:
    for field in (field for row in csv.reader(tokens, skipinitialspace=True) for field in row):
        if field.isascii() and field.strip().isdigit():
            yield int(field)
        elif tokenizer is None:
            raise ArgumentError(f"{printable(field)!r} is not a token id, and the file has no tokenizer to split text")
        else:
            yield from tokenizer.encode(field)


def _codes(file: _core.GgufFile, metadata: Mapping[str, Any], ids: NDArray[np.uint32]) -> NDArray[np.uint8] | None:
    """Codes [T, K], or None for a learned embedding."""
    kind, width, vocab_size = (metadata.get(f"fixmin.{key}") for key in ("code.kind", "code.width", "vocab_size"))
    if not isinstance(kind, str):
        raise GGUFError(f"fixmin.code.kind is {kind!a}: the file has no codes")
    if kind == "learned":
        return None
    if not isinstance(width, int) or not isinstance(vocab_size, int):
        raise GGUFError("fixmin.vocab_size or fixmin.code.width is missing or no number")
    if kind == "affine":
        a, b = _affine(metadata.get("fixmin.code.affine_matrix"), metadata.get("fixmin.code.affine_shift"), width)
        try:
            code = _core.CodeMap.affine(vocab_size, a, b)
        except ArgumentError as error:
            raise GGUFError(f"fixmin.code is impossible: {error}") from None
        return code.codes(ids)
    if kind == "table":
        packed = file.tensor_data("token_code.weight")
        if packed.size != vocab_size * ((width + 7) // 8):
            raise GGUFError("token_code.weight does not hold one row of fixmin.code.width bits for each token")
        rows: NDArray[np.uint8] = packed.reshape(vocab_size, -1)[ids]
        return np.unpackbits(rows, axis=1, bitorder="little")[:, :width]
    raise GGUFError(f"fixmin.code.kind is {kind!a}: the file has no codes")


# --- on the screen ----------------------------------------------------------------------------------------------


def _file_facts(file: Mapping[str, Any]) -> dict[str, Any]:
    bits = file["bits_per_weight"]
    return {
        "path": file["path"],
        "size": f"{file['bytes']:,} bytes, GGUF version {file['gguf_version']}, alignment {file['alignment']}",
        "weights": f"{file['weights']:,}" + ("" if bits is None else f", {bits:.3g} bits each (matrices)"),
    }


def _show(value: Any) -> str:
    """One line for any metadata value."""
    if isinstance(value, str):
        return printable(value, _MAX_TEXT)
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        more = f", ... ({len(value):,} entries)" if len(value) > _MAX_ITEMS else ""
        return ", ".join(_show(v) for v in value[:_MAX_ITEMS]) + more
    return str(value)


class _Screen:
    """Writes the sections. On a terminal with colour and Unicode blocks, otherwise in plain ASCII."""

    def __init__(self, console: Console) -> None:
        self._console = console
        # Nothing is cut to the columns of a terminal, or to the 80 that rich assumes in a pipe.
        console.width = max(console.width, 10_000)
        fancy = console.is_terminal and console.encoding.lower().startswith("utf")
        self._one, self._zero = ("██", "··") if fancy else ("##", "..")
        self._bar = " │ " if fancy else " | "
        self._box = box.SIMPLE_HEAD if fancy else box.ASCII2

    def _title(self, title: str) -> None:
        self._console.print()
        self._console.print(Text(title, style="bold"))

    def _line(self, text: str, style: str = "") -> None:
        # A Text is no markup; soft_wrap: a pipe gets whole lines whatever its width.
        self._console.print(Text(text, style=style), soft_wrap=True)

    def facts(self, title: str, facts: Mapping[str, Any]) -> None:
        """Names and values, one a line; a list of texts is indented below its name."""
        if not facts:
            return
        self._title(title)
        width = max(len(printable(name)) for name in facts)
        for name, value in facts.items():
            if isinstance(value, list) and value and isinstance(value[0], str):
                self._line(f"  {printable(name)}")
                for item in value:
                    self._line(f"    {_show(item)}")
            else:
                self._line(f"  {printable(name):{width}}  {_show(value)}")

    def code(self, code: Mapping[str, Any]) -> None:
        """Kind and lift of the code, and A and b as a bit matrix: row i is output bit i, column j bit j of the id."""
        self.facts("Code", {k: v for k, v in code.items() if k not in ("matrix", "shift")})
        if code.get("lift") in ("tile", "interleave"):
            index = "n mod K" if code["lift"] == "tile" else "n // (D / K)"
            self._line(f"  x[n] = value of bit {index} of the code")
        if "matrix" not in code:
            return
        if len(code["shift"]) > _MAX_DRAWN_BITS:
            self._line(f"  ({len(code['shift'])} bits: too wide to draw; --json has the matrix)")
            return
        self._line("")
        margin = len(str(len(code["shift"]) - 1))
        heads = "".join(f"{j:2}" if j % 2 == 0 else "  " for j in range(len(code["shift"])))
        self._line(f"  {'A':>{margin}}  {heads}{' ' * len(self._bar)}b", "dim")
        for i, (row, bit) in enumerate(zip(code["matrix"], code["shift"], strict=True)):
            self._line(f"  {i:{margin}}  {self._bits(row)}{self._bar}{self._bits([bit])}")

    def _bits(self, bits: Sequence[int]) -> str:
        return "".join(self._one if bit else self._zero for bit in bits)

    def tokens(self, tokens: Sequence[Mapping[str, Any]]) -> None:
        """Each token with its code, bit 0 first."""
        table = self._table("Token codes (bit 0 first)", ("id", "right"), ("text", "left"), ("code", "left"))
        for token in tokens:
            data = token["bytes"]
            text = "" if data is None else printable(repr(as_piece(bytes(data))), _MAX_TEXT)
            code = "(learned)" if token["code"] is None else "".join(map(str, token["code"]))
            table.add_row(str(token["id"]), Text(text), code)
        self._print(table)

    def certificate(self, certificate: Mapping[str, Any]) -> None:
        if not certificate:
            self._title("Certificate")
            self._line("  none: nobody has compared this file with a checkpoint")
            return
        self.facts("Certificate", certificate)
        if certificate.get("passed") is not True:
            self._line("  NOT PASSED", "bold red")

    def tensors(self, tensors: Sequence[Mapping[str, Any]], each: bool) -> None:
        """A row for each tensor, or for each of the rows of `summarise`."""
        title = "Tensors" if each else "Tensors (--all: each one)"
        number: list[tuple[str, Literal["left", "right"]]] = [] if each else [("number", "right")]
        columns = [("name", "left"), *number, ("shape", "left"), ("type", "left"), ("bytes", "right")]
        table = self._table(title, *columns)  # type: ignore[arg-type]
        for tensor in tensors:
            shape = " x ".join(map(str, tensor["shape"]))
            cells = [] if each else [str(tensor["count"])]
            table.add_row(Text(printable(tensor["name"])), *cells, shape, tensor["type"], f"{tensor['bytes']:,}")
        self._print(table)

    def totals(self, file: Mapping[str, Any]) -> None:
        table = self._table("Types", ("type", "left"), ("tensors", "right"), ("weights", "right"), ("bytes", "right"))
        for name, entry in sorted(file["types"].items()):
            table.add_row(name, str(entry["tensors"]), f"{entry['weights']:,}", f"{entry['bytes']:,}")
        self._print(table)

    def _table(self, title: str, *columns: tuple[str, Literal["left", "right"]]) -> Table:
        self._title(title)
        table = Table(box=self._box, show_edge=False, pad_edge=True)
        for name, justify in columns:
            table.add_column(name, justify=justify, no_wrap=True)
        return table

    def _print(self, table: Table) -> None:
        self._console.print(table, crop=False)
