"""Importance matrices: for every weight tensor the mean square of what each of its columns is multiplied with.

The file is the GGUF form of llama.cpp's imatrix tool: general.type "imatrix", and for each tensor NAME the F32 tensors
`NAME.in_sum2` [1, n] (sums of squares) and `NAME.counts` [1, 1] (how many inputs); keys imatrix.datasets (strings),
imatrix.chunk_count and imatrix.chunk_size (u32). Facts from llama.cpp's tools/imatrix and common/imatrix-loader.h.
"""

import contextlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGUFWriter
from numpy.typing import NDArray

from .. import _core
from ..arguments import Prompt, as_int
from ..atomic_file import AtomicFile, naming, refuse_inputs
from ..errors import ArgumentError, GGUFError
from ..model import Model
from ..recognise import refuse_wrong_model

_SUMS, _COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True)
class ImatrixReport:
    """What `collect` did."""

    path: Path
    n_tokens: int  # tokens of the text that were read
    n_chunks: int
    chunk_size: int  # tokens
    n_tensors: int
    perplexity: float  # of the text, every token of a chunk but its first


def collect(
    model: Model | str | os.PathLike[str],
    text: Prompt,
    out: str | os.PathLike[str],
    *,
    ctx: int | None = None,
    dataset: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> ImatrixReport:
    """Runs a text through a model and writes the importance matrix of its weights.

    Each sum is made in double over the tokens in order, so the file does not depend on the number of threads. The
    queries, keys and values of layer 0 are folded into the code and multiplied with nothing: they have no entry.

    Args:
        model: a Model, or a GGUF file; an F32 or F16 one gives the truest inputs.
        text: text or token ids, at least 2 tokens.
        out: the file to write; it appears when it is complete.
        ctx: tokens of a chunk, each read from an empty context; None: 512 or the model's context if that is shorter.
        dataset: name of the text, for imatrix.datasets.
        progress: called with chunks done and chunks in all.

    Raises:
        ArgumentError: ctx out of range, text too short. What Model raises. OSError: the file cannot be written.
    """
    if not isinstance(model, Model):
        with Model(model) as loaded:
            return collect(loaded, text, out, ctx=ctx, dataset=dataset, progress=progress)
    n_ctx = model.info["n_ctx"]
    size = min(512, n_ctx) if ctx is None else as_int("ctx", ctx, 2, n_ctx)
    ids = model.token_ids(text)
    chunks = [chunk for i in range(0, len(ids), size) if len(chunk := ids[i : i + size]) > 1]
    if not chunks:
        raise ArgumentError("text must have at least 2 tokens, got 1")
    refuse_inputs(out, model.path)
    with AtomicFile(out) as file, model.native() as engine:
        squares = _core.InputSquares(engine)
        logprobs = []
        for done, chunk in enumerate(chunks):
            logprobs.append(squares.add(engine, chunk))
            if progress is not None:
                progress(done + 1, len(chunks))
        sums = squares.sums
        with naming(file.target):
            write_imatrix(file.path, sums, [dataset] if dataset else [], len(chunks), size)
        file.commit()
    nll = -float(np.concatenate(logprobs).mean(dtype=np.float64))
    return ImatrixReport(
        path=Path(out),
        n_tokens=sum(map(len, chunks)),
        n_chunks=len(chunks),
        chunk_size=size,
        n_tensors=len(sums),
        perplexity=math.exp(nll) if nll < 700 else math.inf,
    )


def write_imatrix(
    path: Path,
    sums: dict[str, tuple[NDArray[np.float64], int]],
    datasets: Sequence[str],
    chunk_count: int,
    chunk_size: int,
) -> None:
    """sums: tensor name -> (sums of squares [n], number of inputs)."""
    with naming(path), contextlib.closing(GGUFWriter(path, "imatrix")) as writer:
        writer.add_type("imatrix")
        if datasets:
            writer.add_array("imatrix.datasets", list(datasets))
        writer.add_uint32("imatrix.chunk_count", chunk_count)
        writer.add_uint32("imatrix.chunk_size", chunk_size)
        for name, (values, count) in sums.items():
            writer.add_tensor(name + _SUMS, values.astype(np.float32)[None])
            writer.add_tensor(name + _COUNTS, np.full((1, 1), count, dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def read_imatrix(path: str | os.PathLike[str]) -> dict[str, NDArray[np.float32]]:
    """Tensor name -> mean squares, float32 [n]; tensors without a single input are left out.

    Raises GGUFError for a file that is malformed, is no importance matrix or holds impossible values; OSError.
    """
    refuse_wrong_model(path)
    file = _core.GgufFile(str(path))
    if file.metadata.get("general.type") != "imatrix":
        raise GGUFError(f"{path}: general.type is {file.metadata.get('general.type')!a}, expected 'imatrix'")
    tensors = {tensor.name: tensor for tensor in file.tensors}

    def values(name: str) -> NDArray[np.float32]:
        if name not in tensors:
            raise GGUFError(f"{path}: tensor {name!a} is missing")
        if tensors[name].type != "F32":
            raise GGUFError(f"{path}: tensor {name!a} has type {tensors[name].type}, expected F32")
        return file.tensor_data(name).reshape(-1).view("<f4")

    found = {}
    for name in tensors:
        if name.endswith(_SUMS):
            base = name.removesuffix(_SUMS)
            sums, counts = values(name), values(base + _COUNTS)
            if counts.size != 1:
                raise GGUFError(
                    f"{path}: {base!a} is an importance matrix of {counts.size} experts, which no model has"
                )
            if not (np.isfinite(sums).all() and (sums >= 0).all() and np.isfinite(counts).all() and counts[0] >= 0):
                raise GGUFError(f"{path}: {base!a} holds values that are negative or not finite")
            if counts[0] > 0:
                found[base] = (sums / counts[0]).astype(np.float32)
    if not found:
        raise GGUFError(f"{path}: holds no importance of any tensor")
    return found
