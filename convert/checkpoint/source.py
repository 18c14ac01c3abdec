"""Read checkpoints: safetensors (single, sharded, several files) and pytorch_model.bin, tensor by tensor, row by row.

Every read maps its file anew and lets the mapping go: the pages of a mapping that stays count as resident memory, and a
conversion must stay far below the size of the checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import re
import reprlib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ...errors import CheckpointError
from ...inspect import printable
from ...recognise import describe_content, describe_no_file, describe_path
from .tokenizer_files import build_tokenizer

F32 = NDArray[np.float32]

# safetensors dtype -> NumPy dtype of the stored bytes. BF16 has none in NumPy and is widened by hand.
_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1", "BOOL": "|b1", "C64": "<c8",
}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")
_MAX_DIMS = 32  # dimensions of an array in NumPy 1
_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library itself
_CHUNK = 1 << 22  # elements of a tensor looked at together

# Weight files in the order in which transformers looks for them: the first one that is there counts.
_STANDARD = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
# Without any of those, every *.safetensors or pytorch_model*.bin is read, but for these: the weights once more in
# another layout, and what is no model.
_WEIGHTS = re.compile(r"\.safetensors$|^pytorch_model.*\.bin$")
_OTHER_LAYOUT = re.compile(r"consolidated|adapter_model|optimizer|scheduler|training_args|rng_state", re.IGNORECASE)

# One fact, many spellings. The first one present in config.json counts.
_HYPER = {
    "vocab_size": ("vocab_size", "n_vocab", "padded_vocab_size"),
    "embedding_length": ("n_embd", "d_model", "hidden_size", "n_embed", "dim", "model_dim", "embed_dim", "width"),
    "block_count": ("n_layer", "num_hidden_layers", "n_layers", "num_layers", "depth", "num_blocks", "n_blocks"),
    "head_count": ("n_head", "num_attention_heads", "n_heads", "num_heads", "heads", "nhead"),
    "head_count_kv": ("num_key_value_heads", "n_kv_head", "n_kv_heads", "num_kv_heads", "n_head_kv", "kv_heads"),
    "feed_forward_length": (
        "intermediate_size", "n_inner", "d_ff", "ffn_dim", "ff_dim", "hidden_dim", "ffn_hidden_size", "mlp_dim",
        "dim_feedforward", "n_ff",
    ),
    "context_length": (
        "block_size", "n_ctx", "max_position_embeddings", "n_positions", "max_seq_len", "context_length",
        "max_seq_length", "seq_len", "max_len", "max_length", "ctx_len", "context_size", "max_context",
    ),
    "norm_eps": (
        "norm_eps", "layer_norm_eps", "rms_norm_eps", "layer_norm_epsilon", "layernorm_epsilon", "norm_epsilon",
        "ln_eps", "rms_eps", "eps",
    ),
    "rope_base": ("rope_theta", "rope_base", "rotary_base", "rotary_emb_base", "rope_freq_base", "theta"),
    "rope_dim": ("rotary_dim", "rope_dim", "rotary_ndims", "rope_dims"),
    "rope_fraction": ("partial_rotary_factor", "rotary_pct", "rotary_percent", "rope_fraction"),
    "head_dim": ("head_dim", "d_head", "head_size", "d_k"),
    "activation": ("activation", "activation_function", "hidden_act", "hidden_activation", "act", "act_fn", "mlp_act"),
    "code_width": ("code_width", "n_bits", "code_bits", "num_bits", "n_embed", "code_dim", "bits", "K"),
    "attention_scale": ("attention_scale", "attn_scale", "attention_multiplier", "query_scale", "softmax_scale"),
}  # fmt: skip


def hyper(config: Mapping[str, Any], key: str) -> Any | None:
    """The value of a hyper-parameter under any of its spellings, or None. Values of the wrong type are skipped."""
    for spelling in _HYPER[key]:
        value = config.get(spelling)
        if key == "activation":
            if isinstance(value, str):
                return value
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            return value
    if key == "rope_base" and isinstance(config.get("rope_parameters"), Mapping):
        return hyper(config["rope_parameters"], key)
    return None


def spelling(config: Mapping[str, Any], key: str) -> str:
    """The config.json key that `hyper` used, for messages."""
    value = hyper(config, key)
    return next((s for s in _HYPER[key] if s in config and config[s] is value), _HYPER[key][0])


_COUNTS = (
    *("vocab_size", "embedding_length", "block_count", "head_count", "head_count_kv", "feed_forward_length"),
    *("context_length", "code_width", "head_dim", "rope_dim"),
)
_MEASURES = ("norm_eps", "rope_base", "rope_fraction", "attention_scale")


def check_numbers(config: Mapping[str, Any]) -> None:
    """CheckpointError for a hyper-parameter that no model could have, where the configuration alone is to be trusted.

    Of a count, a whole number from 1 on (of rope_dim, from 0); of the others, a positive one. None is the same as not
    given.
    """
    for key in (*_COUNTS, *_MEASURES):
        value = hyper(config, key)
        if value is None:
            wrong = [s for s in _HYPER[key] if config.get(s) is not None]
            if wrong:
                raise CheckpointError(f"config.json: {wrong[0]} is {shown(config[wrong[0]])}, which is no number")
            continue
        whole = key not in _COUNTS or value == value // 1
        above = value > 0 or (value == 0 and key in ("norm_eps", "rope_dim"))
        if not (above and value < 1 << 31 and whole):  # NaN fails too
            wanted = "a positive number" if key in _MEASURES else f"a whole number from {int(key != 'rope_dim')} on"
            raise CheckpointError(f"config.json: {spelling(config, key)} is {shown(value)}, but must be {wanted}")


def shown(value: Any) -> str:
    """A value of a file, short, for messages."""
    text = reprlib.repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def context_length(config: Mapping[str, Any]) -> tuple[int, str] | None:
    """(longest prompt in tokens, the key that says so) of a configuration, or None."""
    value = hyper(config, "context_length")
    if value is not None and value >= 1:
        return int(value), spelling(config, "context_length")
    return next(((value, key) for key, value in context_lengths(config).items()), None)


def context_lengths(config: Mapping[str, Any]) -> dict[str, int]:
    """Every number under a key that may speak of the length of the context."""
    return {
        key: value
        for key, value in config.items()
        if type(value) is int
        and value > 1
        and (key in (*_HYPER["context_length"], "T") or _CONTEXT_KEY.search(key) is not None)
    }


_CONTEXT_KEY = re.compile(r"ctx|context|seq|pos|block_?size|window", re.IGNORECASE)
_NO_WEIGHT = re.compile(
    r"(^|[._])(inv_freqs?|freqs?(_cis)?|rotary|rope|(cos|sin)(_(cached?|table|emb))?|masked_bias|mask|causal_mask|"
    r"attn_mask|tril|triu|position_ids|positions|num_batches_tracked)([._]|$)"
)


def is_no_weight(name: str, values: NDArray[Any] | None = None) -> bool:
    """Whether a tensor is a mask, a table of positions or the like, by its name or (if given) its values."""
    if _NO_WEIGHT.search(name):
        return True
    if values is None or values.ndim < 2 or values.shape[-1] < 2 or values.size != values.shape[-1] ** 2:
        return False
    square = values.reshape(values.shape[-1], -1)
    below, above = np.tril(np.ones(square.shape, bool)), np.triu(np.ones(square.shape, bool), 1)
    inside, outside = np.unique(square[below]), np.unique(square[above])
    return len(inside) == len(outside) == 1 and bool(inside[0] == inside[0] != outside[0])


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies. `offset` is from the start of the file; -1 for tensors of a .bin file."""

    name: str
    dtype: str  # safetensors spelling
    shape: tuple[int, ...]
    file: Path
    offset: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        return self.size * np.dtype(_DTYPES[self.dtype]).itemsize

    @property
    def is_float(self) -> bool:
        return self.dtype in FLOATS


@dataclass
class Allowance:
    """Names, or patterns with * and ?, that the user gave to an option, and which of them named something."""

    option: str
    patterns: tuple[str, ...] = ()
    remembered: tuple[str, ...] = ()  # more of them, which may name nothing
    used: set[str] = field(default_factory=set)

    def __call__(self, name: str) -> bool:
        """Whether `name` is allowed."""
        fitting = [p for p in (*self.patterns, *self.remembered) if fnmatchcase(name, p)]
        self.used.update(fitting)
        return bool(fitting)

    def check_used(self) -> None:
        """CheckpointError for a pattern that named nothing: a misspelt one must not look like one that worked."""
        for pattern in self.patterns:
            if pattern not in self.used:
                what = self.option.removeprefix("--allow-")
                raise CheckpointError(f"{self.option} {pattern}: no {what} tensor has such a name")


def check_directory(directory: Path) -> None:
    """CheckpointError, with what it is instead, for a path that is no directory."""
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: {describe_path(directory)}")


class Source:
    """A checkpoint directory: `config`, `tensors` (name -> StoredTensor) and their values. A context manager.

    `warnings`: what whoever converts should know of it, filled while it is read.
    """

    def __init__(
        self, directory: Path | str, *, allow_missing: Sequence[str] = (), allow_unexpected: Sequence[str] = ()
    ) -> None:
        """Read config.json and the headers of the weight files.

        allow_missing, allow_unexpected: names or patterns of tensors, for whoever reads the model, see `Allowance`.

        Raises CheckpointError for anything missing, truncated or contradictory.
        """
        self.directory = Path(directory)
        check_directory(self.directory)
        self.allow_missing = Allowance("--allow-missing", _as_names("allow_missing", allow_missing))
        self.allow_unexpected = Allowance("--allow-unexpected", _as_names("allow_unexpected", allow_unexpected))
        self.warnings: list[str] = []
        self.config: dict[str, Any] = self._json("config.json", {})
        self.tensors: dict[str, StoredTensor] = {}
        self.on_close: list[Callable[[], None]] = []
        self._bin: dict[str, Any] = {}  # tensors of .bin files, torch tensors over a mapping
        self._filled: dict[str, F32] = {}  # tensors that no file holds, see `fill`
        self._tokenizer: Path | None = None
        self._tokenizer_known = False
        self._parsed: Any = None  # a tokenizers.Tokenizer
        self.files = self._find_files()
        for path, expected in self.files.items():
            self._read_header(path, expected)
        if not self.tensors:
            raise CheckpointError(f"{self.directory}: {some([p.name for p in self.files], 3)} hold no tensor")

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the files, and what was registered in `on_close`."""
        while self.on_close:
            self.on_close.pop()()
        self._bin.clear()

    def warn(self, text: str) -> None:
        """Something that whoever converts should know."""
        if text not in self.warnings:
            self.warnings.append(text)

    def fill(self, name: str, shape: tuple[int, ...], value: float) -> None:
        """Add a tensor that no file holds, all its elements the same."""
        self.tensors[name] = StoredTensor(name, "F32", shape, self.directory, -1)
        self._filled[name] = np.full(shape, value, np.float32)

    def read_raw(self, name: str, view: Callable[[NDArray[Any]], NDArray[Any]] = lambda a: a) -> NDArray[Any]:
        """A copy of `view(tensor)` in the stored type (BF16 as float32).

        `view` gets the tensor as a mapped array of its shape and returns the elements that are wanted, for example
        `lambda a: a.T[8:16]`; only the pages it touches are read.
        """
        tensor = self.tensors[name]
        part = np.array(view(self._mapped(tensor)), order="C")
        if tensor.dtype != "BF16":
            return part
        return np.left_shift(part.astype("<u4"), np.uint32(16), out=np.empty(part.shape, "<u4")).view("<f4")

    def read(self, name: str, view: Callable[[NDArray[Any]], NDArray[Any]] = lambda a: a) -> F32:
        """The same as float32. CheckpointError if a weight is NaN, infinite or complex."""
        self.check_real(name)
        with np.errstate(over="ignore"):  # float64 beyond float32
            part = self.read_raw(name, view).astype(np.float32, copy=False)
        if not np.isfinite(part).all():
            self.check_finite(name)
            raise CheckpointError(f"tensor {name} holds NaN or infinity")
        return part

    def check_real(self, name: str) -> None:
        """CheckpointError for a tensor of complex numbers, of which a conversion would leave the real parts."""
        tensor = self.tensors[name]
        if tensor.dtype == "C64":
            raise CheckpointError(
                f"tensor {name} {tensor.shape} ({tensor.file.name}) has type C64: complex weights are not read"
            )

    def check_finite(self, name: str) -> None:
        """CheckpointError that names the first element of a tensor that is no finite float32."""
        tensor = self.tensors[name]
        if not tensor.is_float or not tensor.size:
            return
        for start in range(0, tensor.size, _CHUNK):
            part = self.read_raw(name, partial(_piece, start))
            # min and max propagate NaN and need no temporary array.
            if max(-float(part.min()), float(part.max())) < 2.0**128 * (1 - 2.0**-25):
                continue
            with np.errstate(over="ignore"):
                bad = np.flatnonzero(~np.isfinite(part.astype(np.float32)))
            if len(bad):
                value = float(part[bad[0]])
                index = [int(i) for i in np.unravel_index(start + int(bad[0]), tensor.shape)]
                what = "NaN" if value != value else "infinity" if np.isinf(value) else f"{value:g}, beyond float32"
                where = f" at {index}" if index else ""
                raise CheckpointError(
                    f"tensor {name} {tensor.shape} ({tensor.file.name}) holds {what}{where}: the checkpoint is damaged "
                    "(a training that diverged, a broken download?)"
                )

    def sha256(self) -> str:
        """SHA-256 of the weight files, one after the other in order of their names, hexadecimal."""
        digest = hashlib.sha256()
        for path in sorted(self.files):
            with path.open("rb") as file:
                while chunk := file.read(1 << 22):
                    digest.update(chunk)
        return digest.hexdigest()

    def tokenizer_json(self) -> Path | None:
        """tokenizer.json of the checkpoint, or one that is built of its vocab.json and merges.txt (until `close`)."""
        if not self._tokenizer_known:
            self._tokenizer_known = True
            path = self.directory / "tokenizer.json"
            if _is_there(path):
                if (what := describe_content(path)) is not None:
                    raise CheckpointError(f"{path}: {what}")
                self._tokenizer = path
            else:
                self._tokenizer = build_tokenizer(
                    self.directory, self._json("tokenizer_config.json", {}), self.warn, self.on_close
                )
        return self._tokenizer

    def tokenizer(self) -> Any | None:
        """`tokenizer_json` as a tokenizers.Tokenizer. CheckpointError for a file that is none."""
        path = self.tokenizer_json()
        if path is not None and self._parsed is None:
            from tokenizers import Tokenizer

            try:
                self._parsed = Tokenizer.from_file(str(path))
            except Exception as error:  # tokenizers raises plain Exception
                raise CheckpointError(f"{path}: not a tokenizer.json of the tokenizers library: {error}") from error
            self._parsed.no_truncation()  # as where the file is used; what tokenizer.json says of it may even panic
            self._parsed.no_padding()
        return self._parsed

    def special_ids(self, vocab_size: int) -> dict[str, Any]:
        """Ids of the tokens that begin, end and pad a text, each below vocab_size, as fields of a ModelSpec.

        As in transformers, generation_config.json counts where it names one; then config.json; then the text of the
        token in the tokenizer's configuration. CheckpointError for an id that the model does not have.
        """
        bos, pad = self._token_ids("bos", vocab_size), self._token_ids("pad", vocab_size)
        for kind, ids in (("bos", bos), ("pad", pad)):
            if len(ids) > 1:
                raise CheckpointError(f"{kind}_token_id is {list(ids)}, but one id was expected")
        eos = self._token_ids("eos", vocab_size)
        return {"bos_token_id": next(iter(bos), None), "eos_token_ids": eos, "pad_token_id": next(iter(pad), None)}

    def _token_ids(self, kind: str, vocab_size: int) -> tuple[int, ...]:
        stated: list[tuple[str, tuple[int, ...]]] = []
        for file in ("generation_config.json", "config.json"):
            config = self.config if file == "config.json" else self._json(file, {})
            for key in (f"{kind}_token_id", f"{kind}_id"):
                ids = self._checked_ids(f"{self.directory / file}: {key}", config.get(key), vocab_size)
                if ids:
                    stated.append((file, ids))
        if stated:
            if any(set(ids) != set(stated[0][1]) for _, ids in stated):
                said = ", ".join(f"{list(ids)} in {file}" for file, ids in stated)
                self.warn(f"{kind}_token_id is {said}: the first counts, as in transformers")
            return stated[0][1]
        for file in ("config.json", "tokenizer_config.json", "special_tokens_map.json"):
            config = self.config if file == "config.json" else self._json(file, {})
            text = config.get(f"{kind}_token")
            text = text.get("content") if isinstance(text, dict) else text
            if isinstance(text, str) and (tokenizer := self.tokenizer()) is not None:
                found = tokenizer.token_to_id(text)
                if found is not None and found >= vocab_size:
                    self.warn(
                        f"{kind}_token {text!r} ({file}) is id {found}, which the model of {vocab_size} ids lacks"
                    )
                    found = None
                return () if found is None else (found,)
        return ()

    def _checked_ids(self, where: str, value: Any, vocab_size: int) -> tuple[int, ...]:
        """The ids in a value of a configuration; none for null, [] and the -1 with which some files say "none"."""
        if value is None:
            return ()
        ids = value if isinstance(value, list) else [value]
        for one in ids:
            if not isinstance(one, int) or isinstance(one, bool):
                raise CheckpointError(f"{where} is {value!r}: a token id must be a whole number")
            if one == -1 and len(ids) == 1:
                self.warn(f"{where} is -1: taken as none")
                return ()
            if not 0 <= one < vocab_size:
                raise CheckpointError(
                    f"{where} is {value!r}, but the ids of this model run from 0 to {vocab_size - 1}: correct the file"
                )
        return tuple(dict.fromkeys(ids))

    # --- files -----------------------------------------------------------------------------------------------------

    def _json(self, name: str, default: Any) -> Any:
        path = self.directory / name
        if not _is_there(path):
            return default
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: {describe_content(path) or f'not valid JSON: {error}'}") from None
        if not isinstance(value, dict):
            raise CheckpointError(f"{path}: expected a JSON object")
        return value

    def _find_files(self) -> dict[Path, set[str] | None]:
        """Weight files, each with the names that an index promises for it (None: no index)."""
        # "._x" is what macOS writes beside x on foreign disks.
        present = sorted(p for p in self.directory.iterdir() if not p.name.startswith(".") and p.is_file())
        weights = [p for p in present if _WEIGHTS.search(p.name)]
        chosen = self._standard_files() or self._other_files(present, weights)
        if not chosen:
            raise CheckpointError(f"{self.directory}: {self._why_no_weights(present)}")
        kind = next(iter(chosen)).suffix
        unread = [p.name for p in weights if p not in chosen and p.suffix == kind]
        if unread:
            self.warn(f"weights are read from {some([p.name for p in chosen], 3)}, not from {some(unread)}")
        if (self.directory / "adapter_config.json").is_file():
            self.warn("adapter_config.json: there is an adapter beside the weights, which is not applied")
        return chosen

    def _standard_files(self) -> dict[Path, set[str] | None]:
        for name in _STANDARD:
            path = self.directory / name
            if _is_there(path):
                return self._indexed(path) if name.endswith(".json") else {path: None}
        return {}

    def _other_files(self, present: list[Path], weights: list[Path]) -> dict[Path, set[str] | None]:
        """Files that are named in another way than transformers does."""
        for suffix in (".safetensors", ".bin"):
            indexes = [p for p in present if p.name.endswith(f"{suffix}.index.json")]
            if len(indexes) > 1:
                raise CheckpointError(f"more than one index: {', '.join(p.name for p in indexes)}")
            if indexes:
                return self._indexed(indexes[0])
            files = [p for p in weights if p.suffix == suffix]
            files = [p for p in files if not _OTHER_LAYOUT.match(p.name)] or [
                p for p in files if p.name.startswith("consolidated")
            ]
            if files:
                _check_numbering(files)
                return dict.fromkeys(files)
        return {}

    def _why_no_weights(self, present: list[Path]) -> str:
        names = {p.name for p in present}
        if not any(self.directory.iterdir()):
            return "the folder is empty"
        for path in sorted(self.directory.iterdir()):
            if _WEIGHTS.search(path.name) and (what := describe_no_file(path)) is not None:
                return f"no weights: {path.name} is {what}"
        if "adapter_config.json" in names:
            base = self._json("adapter_config.json", {}).get("base_model_name_or_path")
            return (
                f"an adapter (of {base}), not a model: merge it first (peft: merge_and_unload, then save_pretrained) "
                "and convert the result"
            )
        found = [n for n in sorted(names) if n.endswith((".gguf", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx"))]
        text = "no weights: neither *.safetensors nor pytorch_model*.bin (with or without an index)"
        if found:
            return f"{text}; {some(found)} cannot be converted"
        folders = [p.parent for pattern in ("*/config.json", "snapshots/*/config.json") for p in
                   sorted(self.directory.glob(pattern))]  # fmt: skip
        return f"{text}; is {folders[0]} meant?" if folders else text

    def _indexed(self, index: Path) -> dict[Path, set[str] | None]:
        weight_map = self._json(index.name, {}).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise CheckpointError(f"{index}: no weight_map of tensor names to files")
        files: dict[Path, set[str] | None] = {}
        for name, file in weight_map.items():
            if Path(file).name != file or file in ("", ".", ".."):
                raise CheckpointError(f"{index}: {file!r} is not a file beside the index")
            names = files.setdefault(self.directory / file, set())
            assert names is not None
            names.add(name)
        try:
            missing = sorted(path.name for path in files if not _is_there(path))
        except OSError as error:  # names that no file can have
            name = Path(error.filename).name
            names = next((names for path, names in files.items() if path.name == name), None)
            raise CheckpointError(
                f"{index}: the file of {some(sorted(names or ()), 3)}, {shown(name)}: {error.strerror}"
            ) from None
        if missing:
            raise CheckpointError(f"{index.name} names files that are not there: {some(missing)}")
        if not files:
            raise CheckpointError(f"{index}: its weight_map is empty")
        return files

    def _read_header(self, path: Path, expected: set[str] | None) -> None:
        tensors = self._bin_header(path) if path.suffix == ".bin" else self._safetensors_header(path)
        names = set(tensors)
        for name, tensor in tensors.items():
            if len(tensor.shape) > _MAX_DIMS:
                raise CheckpointError(f"{path.name}: tensor {name} has {len(tensor.shape)} dimensions")
            # An array without elements has strides too, which must be numbers of 64 bits.
            if math.prod(max(n, 1) for n in tensor.shape) >= 1 << 59:
                raise CheckpointError(f"{path.name}: tensor {name} has shape {tensor.shape}")
        if expected is not None and not expected <= names:
            raise CheckpointError(f"{path.name} lacks tensors its index names: {some(sorted(expected - names))}")
        twice = sorted(names & set(self.tensors))
        if twice:
            raise CheckpointError(
                f"tensors stored in both {self.tensors[twice[0]].file.name} and {path.name}: {some(twice)}"
            )
        self.tensors.update(tensors)

    def _safetensors_header(self, path: Path) -> dict[str, StoredTensor]:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, _MAX_HEADER):
                what = describe_content(path, "safetensors") or f"truncated or not a safetensors file ({size} bytes)"
                raise CheckpointError(f"{path.name}: {what}")
            text = file.read(length)
        try:
            header = json.loads(text, object_pairs_hook=_no_duplicates)
            header.pop("__metadata__", None)
            entries = [(n, e["dtype"], e["shape"], *_pair(e["data_offsets"])) for n, e in header.items()]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            what = describe_content(path, "safetensors") or f"malformed safetensors header: {_first_line(error)}"
            raise CheckpointError(f"{path.name}: {what}") from None
        tensors = {}
        for name, dtype, shape, start, stop in entries:
            if not isinstance(dtype, str) or dtype not in _DTYPES:
                raise CheckpointError(f"{path.name}: tensor {name} has type {dtype}, which is not supported")
            if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 1 << 63 for n in shape):
                raise CheckpointError(f"{path.name}: tensor {name} has shape {shape}")
            tensor = StoredTensor(name, dtype, tuple(shape), path, 8 + length + start)
            if stop - start != tensor.n_bytes or start < 0:
                raise CheckpointError(f"{path.name}: tensor {name}: {stop - start} bytes for {dtype} {tensor.shape}")
            if 8 + length + stop > size:
                raise CheckpointError(
                    f"{path.name}: truncated: tensor {name} ends at byte {8 + length + stop}, the file has {size}"
                )
            tensors[name] = tensor
        self._check_gaps(path, tensors.values(), 8 + length, size)
        return tensors

    @staticmethod
    def _check_gaps(path: Path, tensors: Iterable[StoredTensor], begin: int, size: int) -> None:
        """CheckpointError unless the tensors fill the file one after the other, as the format demands."""
        for tensor in sorted(tensors, key=lambda t: (t.offset, t.n_bytes)):
            if tensor.offset != begin:
                raise CheckpointError(
                    f"{path.name}: tensor {tensor.name} begins at byte {tensor.offset}, but what is before it ends at "
                    f"{begin}: tensors must not overlap and leave no gap"
                )
            begin += tensor.n_bytes
        if begin != size:
            raise CheckpointError(f"{path.name}: {size - begin} bytes follow the last tensor: a damaged or wrong file")

    def _bin_header(self, path: Path) -> dict[str, StoredTensor]:
        import torch

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what torch has to say of a file that it then refuses
                try:
                    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                except RuntimeError:  # files of torch < 1.6 are no zip archives and cannot be mapped
                    state = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            reason = re.search(r"Unsupported (global|class)[^\n]*|WeightsUnpickler error[^\n]*", str(error))
            what = describe_content(path, "torch") or (
                "holds other objects than tensors, and reading those could run code"
                + (f" ({printable(reason[0])[:160]})" if reason else "")
                + ": save its state dictionary alone, best with safetensors"
            )
            raise CheckpointError(f"{path.name}: {what}") from None
        except Exception as error:
            what = describe_content(path, "torch") or f"torch could not read it: {_first_line(error)}"
            raise CheckpointError(f"{path.name}: {what}") from None
        for wrapper in ("state_dict", "model", "module"):
            if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
                state = state[wrapper]
        state = {n: t for n, t in state.items() if isinstance(t, torch.Tensor)} if isinstance(state, dict) else {}
        if not state:
            raise CheckpointError(f"{path.name}: holds no state dictionary of tensors")
        names = {
            torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
            torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
            torch.bool: "BOOL", torch.complex64: "C64",
        }  # fmt: skip
        size = path.stat().st_size
        for name, tensor in state.items():
            if not isinstance(name, str):
                raise CheckpointError(f"{path.name}: a tensor's name is {shown(name)}, which is no text")
            if tensor.dtype not in names:
                raise CheckpointError(f"{path.name}: tensor {name} has type {tensor.dtype}, which is not supported")
            if tensor.is_nested or tensor.layout != torch.strided:
                layout = "nested" if tensor.is_nested else str(tensor.layout)
                raise CheckpointError(f"{path.name}: tensor {name} is stored as {layout}, which is not supported")
            if tensor.device.type != "cpu":
                raise CheckpointError(f"{path.name}: tensor {name} was saved without its values ({tensor.device})")
            n_bytes = tensor.numel() * tensor.element_size()
            if n_bytes > max(size, tensor.untyped_storage().nbytes()):
                raise CheckpointError(
                    f"{path.name}: tensor {name} {tuple(tensor.shape)} has {n_bytes} bytes, more than the file, which "
                    f"has {size}: a view of few numbers (expand)? Save its .contiguous()"
                )
            state[name] = tensor.detach().resolve_conj().resolve_neg()
        self._bin.update(state)
        return {n: StoredTensor(n, names[t.dtype], tuple(t.shape), path, -1) for n, t in state.items()}

    def _mapped(self, tensor: StoredTensor) -> NDArray[Any]:
        """The tensor in its stored type (BF16 as uint16), read-only; its pages are released with the array."""
        if tensor.name in self._filled:
            return self._filled[tensor.name]
        if tensor.offset < 0:
            import torch

            value = self._bin[tensor.name]
            return value.view(torch.int16).numpy().view("<u2") if tensor.dtype == "BF16" else value.numpy()
        dtype = np.dtype(_DTYPES[tensor.dtype])
        if tensor.size == 0:
            return np.empty(tensor.shape, dtype)
        return self._map(tensor, "r")

    def map_private(self, name: str) -> NDArray[Any]:
        """A tensor of a safetensors file (not BF16), mapped; what is written to it stays in this process."""
        return self._map(self.tensors[name], "c")

    @staticmethod
    def _map(tensor: StoredTensor, mode: Literal["r", "c"]) -> NDArray[Any]:
        dtype = np.dtype(_DTYPES[tensor.dtype])
        end = tensor.offset + tensor.n_bytes
        if tensor.file.stat().st_size < end:  # it shrank since the header was read; touching the map would be SIGBUS
            raise CheckpointError(f"{tensor.file.name}: ends inside tensor {tensor.name}")
        return np.memmap(tensor.file, dtype, mode, tensor.offset, tensor.shape)


def _piece(start: int, array: NDArray[Any]) -> NDArray[Any]:
    return array.reshape(-1)[start : start + _CHUNK]


def _is_there(path: Path) -> bool:
    """Whether there is a file of this name. CheckpointError for a name that is there and stands for no file."""
    if (what := describe_no_file(path)) is not None:
        raise CheckpointError(f"{path}: {what}")
    return path.is_file()


def _as_names(option: str, value: Any) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else tuple(value)
    if not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{option} must be names of tensors, or patterns, got {value!r}")
    return names


def _pair(value: Any) -> tuple[int, int]:
    if not (isinstance(value, list) and len(value) == 2 and all(type(n) is int for n in value)):
        raise ValueError(f"data_offsets {value!r} are no two whole numbers")
    return value[0], value[1]


def _no_duplicates(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"{key!r} appears twice")
        result[key] = value
    return result


def _check_numbering(files: list[Path]) -> None:
    """CheckpointError for shards "-00001-of-00003" of which some are not there."""
    for path in files:
        if match := re.search(r"-(\d+)-of-(\d+)\.", path.name):
            numbers = {int(m[1]) for p in files if (m := re.search(r"-(\d+)-of-" + match[2] + r"\.", p.name))}
            missing = [str(n) for n in range(1, int(match[2]) + 1) if n not in numbers]
            if missing:
                raise CheckpointError(f"{path.name}: of {int(match[2])} files these are missing: {some(missing)}")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def some(names: list[str], limit: int = 8) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
