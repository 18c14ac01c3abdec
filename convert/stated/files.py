"""What the files of a checkpoint say about the model, without running any code, and what they leave open."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import CheckpointError
from ..checkpoint.codes import MAX_WIDTH, check_affine, load_stated, oriented, recover_code
from ..checkpoint.recipes import Ref, constant, gather, stored_ref
from ..checkpoint.roles import Part, Roles, assign_roles, mapped_recipes, read_map
from ..checkpoint.source import Source, check_numbers, context_length, hyper, shown, some, spelling
from ..overrides import OVERRIDES, option
from ..spec import Bits, CodeSpec, Lift, ModelSpec, TensorRecipe, check_shapes


@dataclass
class Item:
    """One convention: its value and origin, or its alternatives if it is open."""

    name: str
    options: list[tuple[str, Any]]  # (label, value), the likely one first
    origin: str | None = None  # set: settled, options has one entry
    settle: str = ""  # command line option


State = dict[str, Any]  # item name -> value

# Keys of config.json that promise biases, and the roles that have them.
_BIASES = {
    "lm_head_bias": ("output",),
    "qkv_bias": ("attn_q", "attn_k", "attn_v", "attn_qkv"),
    "attention_bias": ("attn_q", "attn_k", "attn_v", "attn_qkv"),
    "attn_out_bias": ("attn_output",),
    "mlp_bias": ("ffn_up", "ffn_gate", "ffn_gate_up", "ffn_down"),
    "norm_bias": ("attn_norm", "ffn_norm", "output_norm"),
}

# What config.json of our reference model may say. Elsewhere these keys may mean anything: what is not understood there
# is a question left open.
_OURS: dict[str, tuple[Any, ...]] = {
    "norm_type": OVERRIDES["norm"].choices,
    "activation": OVERRIDES["activation"].choices,
    "rope_style": OVERRIDES["rope_style"].choices,
    "code_lift": OVERRIDES["lift"].choices,
    "code_kind": ("fixed", "affine", "table", "learned"),
    **dict.fromkeys((*_BIASES, "tie_word_embeddings"), (True, False)),
}
# Kind of a code of the reference model -> its tensors, as roles and names. b is looked for where A is.
_CODE_TENSORS = {
    "affine": {"matrix": "model.code.matrix"},
    "table": {"code_table": "model.code.table"},
    "learned": {"token_embd": "model.token_embd.weight"},
}


class Files:
    """The roles, the items, and the spec for each choice of values."""

    def __init__(self, source: Source, stated: Mapping[str, Any], map_file: str | os.PathLike[str] | None) -> None:
        self.source, self.stated, self.config = source, stated, source.config
        check_numbers(source.config)
        self.mapping = read_map(source, map_file)
        declared = hyper(self.config, "vocab_size")
        self.roles: Roles = assign_roles(
            source, self.mapping, int(declared) if declared else None, stated.get("transposed")
        )
        self.mapped = mapped_recipes(source, self.mapping)
        self.width = self.roles.width
        self.vocab_size = self._vocab_size()
        self.special = source.special_ids(self.vocab_size)
        # Checkpoints of our own reference model document their conventions in config.json.
        self.ours = self.config.get("model_type") == "fixmin"
        if self.ours:
            self._check_ours()
        self._check_declared()

    def _check_ours(self) -> None:
        """CheckpointError if config.json of our reference model says what that does not know, or the files belie."""
        for key, allowed in _OURS.items():
            value = self.config.get(key)
            if value is not None and (type(value), value) not in [(type(a), a) for a in allowed]:
                wanted = ", ".join(map(_text, allowed))
                raise CheckpointError(f"config.json: {key} is {shown(value)}, which is not one of {wanted}")
        values = self.config.get("code_values")
        if values is not None and not OVERRIDES["values"].allows(values):
            raise CheckpointError(f"config.json: code_values is {shown(values)}, but must be two finite numbers")
        kind, top = self.config.get("code_kind"), self.roles.top
        if kind is None or "affine" in self.stated:
            return
        needed = _CODE_TENSORS.get(kind, {})
        for role in {r for roles in _CODE_TENSORS.values() for r in roles} - set(needed):
            if role in top:
                raise CheckpointError(f"config.json: code_kind is {kind}, but the files hold {top[role].weight}")
        for role, name in needed.items():
            mapped = role == "token_embd" and "token_embd.weight" in self.mapped
            if role not in top and not mapped and not (kind == "affine" and self.source.allow_missing(name)):
                raise CheckpointError(f"no tensor was found for {name}, but config.json: code_kind is {kind}")

    def _check_declared(self) -> None:
        """CheckpointError if config.json speaks of layers or biases that the files do not hold."""
        count, top, first = hyper(self.config, "block_count"), self.roles.top, self.roles.blocks[0]
        if count is not None and count != len(self.roles.blocks):
            raise CheckpointError(
                f"config.json: {spelling(self.config, 'block_count')} is {count}, but the files hold "
                f"{len(self.roles.blocks)} blocks"
            )
        lacking = [("output_norm.weight", "the blocks have norms")] if "attn_norm" in first else []
        lacking = [] if "output_norm" in top else lacking
        for key, roles in _BIASES.items():
            if key == "norm_bias" and self.config.get("norm_type") == "rmsnorm":
                continue  # the reference model's default stands there, and an RMS norm has none
            parts = [part for role, part in (*first.items(), *top.items()) if role in roles]
            if self.config.get(key) is True and parts and not any(part.bias for part in parts):
                lacking.append((f"{roles[0]}.bias", f"config.json: {key} is true"))
            if self.ours and self.config.get(key) is False and (biases := [p.bias for p in parts if p.bias]):
                raise CheckpointError(f"config.json: {key} is false, but the files hold {biases[0]}")
        width = self.config.get("hidden_size")
        if width is not None and width != self.width:
            raise CheckpointError(f"config.json: hidden_size is {width}, but the tensors have {self.width}")
        for name, why in lacking:
            if any(gguf.endswith(name) for gguf in self.mapped):
                continue
            if not self.source.allow_missing(name):
                raise CheckpointError(
                    f"no tensor was found for {name}, but {why}: name it in a --map FILE, or give "
                    f"--allow-missing {name}"
                )
            self.source.warn(f"not in the files, so left out: {name} (--allow-missing)")
        self._check_ends()

    def _check_ends(self) -> None:
        """CheckpointError if config.json contradicts the files about whether both ends share one matrix."""
        ends = [self.roles.top[name].weight for name in ("token_embd", "output") if name in self.roles.top]
        tied = self.config.get("tie_word_embeddings")
        if len(ends) < 2 or "output.weight" in self.mapped:
            return
        if ends[0] == ends[1]:
            if tied is False:
                raise CheckpointError(
                    f"config.json: tie_word_embeddings is false, but the files hold {ends[0]} and no output projection"
                )
        elif tied and not np.array_equal(self.source.read_raw(ends[0]), self.source.read_raw(ends[1])):
            raise CheckpointError(
                f"config.json: tie_word_embeddings is true, but {ends[0]} and {ends[1]} hold different values: which "
                "of the two counts depends on who loads it"
            )

    def _vocab_size(self) -> int:
        if "output.weight" in self.mapped:
            return self.mapped["output.weight"].shape[0]
        if "output" not in self.roles.top:
            raise CheckpointError(
                "no output projection among the tensors; name it in a --map FILE (output.weight = ...)"
            )
        shape = self.source.tensors[self.roles.top["output"].weight].shape
        rows = shape[1] if shape[0] == self.width else shape[0]
        declared = hyper(self.config, "vocab_size")
        if declared is not None and declared > rows:
            raise CheckpointError(
                f"config.json: {spelling(self.config, 'vocab_size')} is {declared}, but the output projection has rows "
                f"for {rows} tokens"
            )
        if declared is None or declared == rows:
            return rows
        size, tokenizer = int(declared), self.source.tokenizer()
        beyond = [t for t, i in tokenizer.get_vocab().items() if size <= i < rows] if tokenizer is not None else []
        if beyond:  # so these rows are no padding
            raise CheckpointError(
                f"config.json: {spelling(self.config, 'vocab_size')} is {size}, but the output projection has rows for "
                f"{rows} tokens, and tokenizer.json has {len(beyond)} of those beyond ({some(sorted(beyond), 3)})"
            )
        self.source.warn(f"of {rows} rows of the output projection the first {size} are used, as config.json says")
        return size

    # Items ------------------------------------------------------------------------------------------------------

    def items(self) -> list[Item]:
        self._refuse_hints()
        heads = self._count_item("n_head", "head_count")
        context = self._count_item("context_length", None, context_length(self.config))
        items = [heads, context, *self._code_items()]
        items += [self._norm_item(), self._item("norm_eps", "norm_eps", [1e-5, 1e-6, 1e-12, 1e-8])]
        items += [self._activation_item(), self._style_item(), self._base_item()]
        if heads.options:
            count = heads.options[0][1]
            if self.width % count:
                raise CheckpointError(f"{count} heads do not divide the embedding length {self.width}")
            items += [self._dim_item(self.width // count), self._scale_item(self.width // count)]
        first = self.roles.blocks[0]
        if "attn_qkv" in first:
            items.append(self._item("qkv_order", None))
        if "ffn_gate_up" in first:
            items.append(self._item("gate_up_order", None))
        if self.roles.transposed is None:
            items.append(self._item("transposed", None, [False, True]))
        for what, choices in self.roles.options:
            items.append(Item(what, [(label, blocks) for label, blocks in choices], settle="--map"))
        return items

    def _refuse_hints(self) -> None:
        """Refuse what config.json says about functions the file format does not have."""
        for key, value in self.config.items():
            strange = ("multiplier", "softcap", "soft_cap", "sliding_window", "alibi", "parallel_residual", "qk_norm",
                       "logit_scale", "logits_scaling", "rope_scaling")  # fmt: skip
            if any(word in key.lower() for word in strange) and value not in (None, False, 1, 0, "none"):
                raise CheckpointError(
                    f"config.json: {key} = {value!r} is something the file format does not have, or has under another "
                    "name; only the checkpoint's code (--trust-remote-code) can tell"
                )

    def _count_item(self, name: str, key: str | None, found: tuple[int, str] | None = None) -> Item:
        """A number that no calibration can find."""
        if name in self.stated:
            found = int(self.stated[name]), f"given with {option(name)}"
        elif key is not None and (value := hyper(self.config, key)):
            found = int(value), f"config.json, {spelling(self.config, key)}"
        elif found is not None:
            found = found[0], f"config.json, {found[1]}"
        if found is None or found[0] < 1:
            return Item(name, [], settle=option(name))
        return Item(name, [(str(found[0]), found[0])], found[1])

    def _item(
        self, name: str, key: str | None, options: Sequence[Any] = (), settled: tuple[Any, str] | None = None
    ) -> Item:
        """Stated by the user, else in config.json under `key`, else `settled`, else open: `options`, or all choices."""
        if name in self.stated:
            value = self.stated[name]
            return Item(name, [(_text(value), value)], f"given with {option(name)}")
        if key is not None and (found := hyper(self.config, key)) is not None:
            return Item(name, [(_text(found), found)], f"config.json, {spelling(self.config, key)}")
        if settled is not None:
            return Item(name, [(_text(settled[0]), settled[0])], settled[1])
        return Item(name, [(_text(v), v) for v in options or OVERRIDES[name].choices], settle=option(name))

    def _norm_item(self) -> Item:
        parts = [p for b in self.roles.blocks for r, p in b.items() if r.endswith("_norm")]
        settled = None
        if any(p.bias for p in parts):
            if self.ours and self.config.get("norm_type") == "rmsnorm":
                raise CheckpointError("config.json: norm_type is rmsnorm, which has no bias, but the files hold biases")
            settled = ("layernorm", "norms have biases")
        elif self.config.get("norm_type") in ("layernorm", "rmsnorm"):
            settled = (self.config["norm_type"], "config.json, norm_type")
        elif any("rms" in k.lower() for k in self.config) or any("rms" in p.weight.lower() for p in parts):
            settled = ("rmsnorm", "named so")
        return self._item("norm", None, settled=settled)

    def _activation_item(self) -> Item:
        gated = "ffn_gate" in self.roles.blocks[0] or "ffn_gate_up" in self.roles.blocks[0]
        gated = gated or any(".ffn_gate." in name for name in self.mapped)
        named = hyper(self.config, "activation")
        settled = None
        if named is not None:
            low = str(named).lower()
            known = {"silu": "swiglu", "swish": "swiglu", "swiglu": "swiglu"} if gated else {
                "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_tanh": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
            }  # fmt: skip
            if low not in known:
                raise CheckpointError(f"config.json: activation {named!r}, which the file format does not have")
            settled = (known[low], f"config.json, {spelling(self.config, 'activation')}")
        return self._item("activation", None, ["swiglu"] if gated else ["gelu", "gelu_tanh"], settled)

    def _style_item(self) -> Item:
        settled = None
        if self.config.get("rope_style") in ("half", "interleaved"):
            settled = (self.config["rope_style"], "config.json, rope_style")
        for key in ("rope_interleaved", "rotary_interleaved", "interleaved_rope"):
            if isinstance(self.config.get(key), bool):
                settled = ("interleaved" if self.config[key] else "half", f"config.json, {key}")
        return self._item("rope_style", None, settled=settled)

    def _frequencies(self) -> tuple[float, int, str] | None:
        """(base, dimension, name) of stored rotary frequencies."""
        for name in self.roles.ignored:
            tensor = self.source.tensors[name]
            if len(tensor.shape) == 1 and tensor.is_float and tensor.size >= 2:
                f = self.source.read(name).astype(np.float64)
                if f[0] == 1.0 and 0 < f[-1] < 1:
                    base = f[-1] ** (-len(f) / (len(f) - 1))
                    base = float(f"{base:.5g}") if abs(float(f"{base:.5g}") / base - 1) < 1e-5 else float(base)
                    if np.allclose(
                        f, base ** (-np.arange(len(f)) / len(f)), rtol=1e-3 if tensor.dtype != "F32" else 1e-5
                    ):
                        return base, 2 * len(f), name
        return None

    def _base_item(self) -> Item:
        found = self._frequencies()
        settled = None if found is None else (found[0], f"tensor {found[2]}")
        return self._item("rope_base", "rope_base", [10000.0, 500000.0, 1000000.0], settled)

    def _dim_item(self, head_dim: int) -> Item:
        fraction, found = hyper(self.config, "rope_fraction"), self._frequencies()
        settled = None
        if fraction is not None:
            settled = (int(head_dim * fraction), f"config.json, {spelling(self.config, 'rope_fraction')}")
        elif found is not None:
            settled = (found[1], f"tensor {found[2]}")
        elif self.ours:
            settled = (head_dim, "config.json, rope_dim")
        usual = [r for r in (head_dim, head_dim // 2, head_dim // 4) if r >= 2 and r % 2 == 0]
        return self._item("rope_dim", "rope_dim", usual, settled)

    def _scale_item(self, head_dim: int) -> Item:
        settled = (head_dim**-0.5, "config.json, attn_scale") if self.ours else None
        usual = [head_dim**-0.5, 1 / head_dim, 1.0, self.width**-0.5]
        return self._item("attention_scale", "attention_scale", usual, settled)

    # Codes ------------------------------------------------------------------------------------------------------

    def _code_items(self) -> list[Item]:
        """Items of the code; sets `self.code` to a function of a state."""
        top = self.roles.top
        if "token_embd.weight" in self.mapped:
            self.code: Callable[[State], CodeSpec] = lambda state: CodeSpec("learned")
            return [Item("code", [("learned", "learned")], "--map")]
        if "token_embd" in top:
            return self._embedding_items(top["token_embd"].weight)
        if "code_table" in top and "affine" not in self.stated:
            return self._table_items(top["code_table"].weight)
        return self._affine_items()

    def _embedding_items(self, name: str) -> list[Item]:
        ref = self._matrix(Part(name), self._out_first(name))
        self._check_rows(name, ref.shape)

        def rows(ids: NDArray[np.int64]) -> Any:
            return ref.rows(slice(int(ids[0]), int(ids[-1]) + 1))

        code = recover_code(rows, self.vocab_size, 4096)
        self.code = lambda state: code or CodeSpec("learned")
        kind = "learned" if code is None else code.kind
        return [Item("code", [(kind, kind)], f"rows of tensor {name}")]

    def _check_rows(self, name: str, shape: tuple[int, ...]) -> None:
        if shape[0] < self.vocab_size:
            raise CheckpointError(f"tensor {name} has {shape[0]} rows, but there are {self.vocab_size} token ids")

    def _bits(self, name: str) -> NDArray[Any]:
        """A stored tensor of a code, in its type, which may be an integer."""
        self.source.check_real(name)
        return self.source.read_raw(name)

    def _out_first(self, name: str) -> bool:
        """Whether a top-level matrix is stored [width, V] and has to be transposed to have a row per token."""
        shape = self.source.tensors[name].shape
        return shape[1] != self.width

    def _table_items(self, name: str) -> list[Item]:
        self._check_rows(name, self.source.tensors[name].shape)
        table = self._bits(name).astype(np.float64)[: self.vocab_size]
        if len(np.unique(table)) != 2:
            raise CheckpointError(f"tensor {name}: the codes of the {self.vocab_size} ids hold one value, not two")
        low, high = sorted(np.unique(table).tolist())
        codes = (table == high).astype(np.uint8)
        if codes.shape[1] > MAX_WIDTH:
            raise CheckpointError(f"tensor {name}: codes of {codes.shape[1]} bits; the file format has {MAX_WIDTH}")

        def rows(lift: Lift) -> Callable[[NDArray[np.int64]], Any]:
            values = (0.0, 1.0)
            plain = CodeSpec("table", codes.shape[1], table=codes, lift=lift, values=values)
            return lambda ids: plain.lift_codes(codes[ids], self.width)

        def code(state: State) -> CodeSpec:
            found = recover_code(rows(state["lift"]), self.vocab_size, 4096)
            assert found is not None
            low, high = map(float, state["values"])
            values = (high, low) if found.values == (1.0, 0.0) else (low, high)
            return CodeSpec(found.kind, found.width, found.matrix, found.shift, found.table, found.lift, values)

        self.code = code
        values = self._values_item((float(low), float(high)))
        return [Item("code", [("table", "table")], f"tensor {name}"), self._lift_item(codes.shape[1]), values]

    def _values_item(self, stored: tuple[float, float] = (0.0, 1.0)) -> Item:
        """Values of a 0 bit and a 1 bit. `stored`: those of a table; the code may change them on the way."""
        declared = self.config.get("code_values")
        settled = None
        if isinstance(declared, list) and OVERRIDES["values"].allows(declared):
            settled = (tuple(declared), "config.json, code_values")
        elif self.ours:
            settled = (stored, "config.json: the format of the reference model")
        usual = list(dict.fromkeys([stored, (0.0, 1.0), (-1.0, 1.0)]))
        return self._item("values", None, usual, settled)

    def _lift_item(self, width: int) -> Item:
        settled = None
        for key in ("code_lift", "lift"):
            if self.config.get(key) in ("tile", "interleave"):
                settled = (self.config[key], f"config.json, {key}")
        if settled is None and (width == self.width or self.width % width):
            settled = ("tile", f"{width} bits do not divide the width {self.width}, or are as many")
        item = self._item("lift", None, settled=settled)
        if item.options[0][1] == "interleave" and self.width % width:
            raise CheckpointError(f"lift: interleave ({item.origin}), but {width} bits do not divide {self.width}")
        return item

    def _affine_items(self) -> list[Item]:
        matrix, shift, origin = self._affine()
        natural = matrix is None
        bits = hyper(self.config, "code_width")
        least = max(self.vocab_size - 1, 1).bit_length()
        width = len(matrix) if matrix is not None else int(bits) if bits and least <= bits <= MAX_WIDTH else least
        order = ("lsb", "config.json: the format of the reference model") if self.ours else None
        for key in ("bit_order", "bit_endianness"):
            text = str(self.config.get(key, "")).lower()
            if text in ("lsb", "msb", "little", "big"):
                order = ("lsb" if text in ("lsb", "little") else "msb", f"config.json, {key}")
        items = [self._item("bit_order", None, settled=order), self._lift_item(width)]
        matrix = np.eye(width, dtype=np.uint8) if matrix is None else matrix
        if not natural and (matrix != matrix.T).any():
            known = ("Ac", "config.json: the format of the reference model") if self.ours else None
            items.append(self._item("affine_orientation", None, settled=known))
        items.append(self._values_item())

        def code(state: State) -> CodeSpec:
            a = oriented(matrix, state.get("affine_orientation"), state["bit_order"])
            low, high = map(float, state["values"])
            return CodeSpec("affine", width, a, shift, lift=state["lift"], values=(low, high))

        shift = np.zeros(width, np.uint8) if shift is None else shift
        self.code = code
        kind = "bits of the token id" if natural else "affine"
        return [Item("code", [(kind, kind)], origin), *items]

    def _affine(self) -> tuple[Bits | None, Bits | None, str]:
        """(A, b, where from): stated, stored, or in config.json; None if there is none."""
        stated = self.stated.get("affine")
        if stated is not None:
            return self._checked(*load_stated(stated), "given with --affine")
        top = self.roles.top
        if "matrix" in top:
            a = self._bits(top["matrix"].weight)
            if "shift" not in top:
                self._check_no_shift(top["matrix"].weight)
            b = self._bits(top["shift"].weight) if "shift" in top else np.zeros(len(a))
            names = top["matrix"].weight + (f", {top['shift'].weight}" if "shift" in top else "; no shift is stored")
            return self._checked(a, b, f"tensors {names}")
        lists = {k: np.asarray(v) for k, v in self.config.items() if _is_bits(v)}
        matrices = {k: v for k, v in lists.items() if v.ndim == 2 and v.shape[0] == v.shape[1]}
        shifts = {k: v for k, v in lists.items() if any(v.shape == a.shape[:1] for a in matrices.values())}
        if len(matrices) > 1 or len(shifts) > 1:
            raise CheckpointError(
                f"config.json: {', '.join([*matrices, *shifts])} could each be a part of the code: give --affine "
                "A.npy b.npy"
            )
        for key, a in matrices.items():
            name, b = next(iter(shifts.items()), ("no shift", np.zeros(len(a))))
            return self._checked(a, b, f"config.json, {key}, {name}")
        hints = [k for k in self.config if any(w in k.lower() for w in ("affine", "recod", "seed", "permut"))]
        if hints and not self.ours:
            raise CheckpointError(
                f"config.json ({', '.join(hints)}) points to recoded ids, but neither the files nor config.json hold "
                "the matrix and the shift: give --affine A.npy b.npy"
            )
        return None, None, "no table, matrix or shift is stored"

    def _check_no_shift(self, matrix: str) -> None:
        """CheckpointError for A without b where b is promised: in our reference model, or by a key of config.json."""
        hints = [k for k in self.config if any(w in k.lower() for w in ("affine", "shift", "xor"))]
        if not (self.ours or hints):
            return
        name = matrix[: matrix.rfind(".") + 1] + "shift"
        if not self.source.allow_missing(name):
            why = "config.json: code_kind" if self.ours else f"config.json: {', '.join(hints)}"
            raise CheckpointError(
                f"no tensor was found for {name}, but there is {matrix} and {why} speaks of an affine code: give "
                f"--allow-missing {name} if the shift is zero, or --affine A.npy b.npy"
            )
        self.source.warn(f"not in the files, so filled with 0: {name} (--allow-missing)")

    def _checked(self, a: Any, b: Any, origin: str) -> tuple[Bits, Bits, str]:
        declared = self.config.get("code_width") if self.ours else None
        return *check_affine(a, b, self.vocab_size, declared, origin), origin

    # Tensors ----------------------------------------------------------------------------------------------------

    def _matrix(self, part: Part, transpose: bool) -> Ref:
        shape = self.source.tensors[part.weight].shape
        if transpose:
            return stored_ref(self.source, part.weight, shape[::-1], lambda a: a.T)
        return stored_ref(self.source, part.weight, shape)

    def _vector(self, name: str, size: int) -> Ref:
        tensor = self.source.tensors[name]
        if tensor.shape != (size,):
            raise CheckpointError(
                f"tensor {name} ({tensor.file.name}) has the shape {tensor.shape}, but the model needs {(size,)}"
            )
        return stored_ref(self.source, name, tensor.shape)

    def spec(self, state: State) -> ModelSpec:
        """The model for one choice of all items."""
        transposed = state.get("transposed", self.roles.transposed)
        blocks = self.roles.blocks
        for what, choices in self.roles.options:
            # several options may be open: each replaces only its own roles
            chosen = next((b for _, b in choices if b is state[what]), choices[0][1])
            default = choices[0][1]
            blocks = [
                {**old, **{r: p for r, p in new.items() if any(c[1][i].get(r) is not d.get(r) for c in choices)}}
                for i, (old, new, d) in enumerate(zip(blocks, chosen, default, strict=True))
            ]
        tensors: dict[str, TensorRecipe] = {}
        if "token_embd" in self.roles.top and state["code"] == "learned":
            part = self.roles.top["token_embd"]
            rows = np.arange(self.vocab_size)  # a padded table may have more
            tensors["token_embd.weight"] = gather([self._matrix(part, self._out_first(part.weight))], rows)
        for i, block in enumerate(blocks):
            self._block(tensors, f"blk.{i}.", block, bool(transposed), state)
        for name in ("output_norm", "output"):
            if name in self.roles.top:
                part = self.roles.top[name]
                flip = self._out_first(part.weight) if name == "output" else False
                ref = self._matrix(part, flip) if name == "output" else self._vector(part.weight, self.width)
                kept = np.arange(self.vocab_size) if name == "output" else None
                tensors[f"{name}.weight"] = gather([ref], kept)
                if part.bias:
                    tensors[f"{name}.bias"] = gather([self._vector(part.bias, ref.shape[0])], kept)
        tensors |= self.mapped
        self._complete(tensors, len(blocks))
        head_count = int(state["n_head"])
        kv = tensors["blk.0.attn_k.weight"].shape[0] * head_count / self.width
        if kv != int(kv):
            raise CheckpointError(
                f"{' + '.join(tensors['blk.0.attn_k.weight'].sources)}: {tensors['blk.0.attn_k.weight'].shape[0]} rows "
                f"of keys are no whole heads of {self.width // head_count}"
            )
        inner = tensors["blk.0.ffn_down.weight"].shape[1]
        for key, seen in (("num_key_value_heads", kv), ("intermediate_size", inner)) if self.ours else ():
            if self.config.get(key) not in (None, seen):
                raise CheckpointError(f"config.json: {key} is {self.config[key]}, but the tensors have {seen:g}")
        if kv != int(self.stated.get("n_head_kv", kv)):
            raise CheckpointError(f"--n-head-kv {self.stated['n_head_kv']}: the shapes say {kv:g}")
        return ModelSpec(
            vocab_size=self.vocab_size,
            context_length=int(state["context_length"]),
            embedding_length=self.width,
            block_count=len(blocks),
            feed_forward_length=inner,
            head_count=head_count,
            head_count_kv=tensors["blk.0.attn_k.weight"].shape[0] // (self.width // head_count),
            attention_scale=float(state["attention_scale"]),
            norm=state["norm"],
            norm_eps=float(state["norm_eps"]),
            rope_dim=int(state["rope_dim"]),
            rope_base=float(state["rope_base"]),
            rope_style=state["rope_style"],
            activation=state["activation"],
            code=self.code(state),
            tensors=tensors,
            conventions={
                n: (" + ".join(t.sources), "name and shape") for n, t in tensors.items() if n.startswith("blk.0.")
            },
            name=self.source.directory.resolve().name,
            **self.special,
            tokenizer_json=self.source.tokenizer_json(),
            weights_sha256=self.source.sha256,
        )

    def _block(
        self, out: dict[str, TensorRecipe], prefix: str, block: dict[str, Part], transposed: bool, state: State
    ) -> None:
        def put(role: str, part: Part, rows: NDArray[np.int64] | None = None) -> None:
            norm = role.endswith("_norm")
            ref = self._vector(part.weight, self.width) if norm else self._matrix(part, transposed)
            out[f"{prefix}{role}.weight"] = gather([ref], rows)
            if part.bias:
                out[f"{prefix}{role}.bias"] = gather([self._vector(part.bias, ref.shape[0])], rows)

        for role, part in block.items():
            shape = self.source.tensors[part.weight].shape
            outputs = shape[-1] if transposed else shape[0]
            if role == "attn_qkv":
                fused = self._fused(outputs, state["qkv_order"], int(state["n_head"]))
                if sorted(np.concatenate(list(fused.values())).tolist()) != list(range(outputs)):
                    raise CheckpointError(
                        f"tensor {part.weight} {shape}: its {outputs} outputs are no queries, keys and values of "
                        f"{state['n_head']} heads in the order {state['qkv_order']}"
                    )
                for letter, rows in fused.items():
                    put(f"attn_{letter}", part, rows)
            elif role == "ffn_gate_up":
                if outputs % 2:
                    raise CheckpointError(f"tensor {part.weight} {shape}: gate and up of different sizes")
                half = np.arange(outputs // 2)
                first, second = state["gate_up_order"].split("_")
                put(f"ffn_{first}", part, half)
                put(f"ffn_{second}", part, half + outputs // 2)
            else:
                put(role, part)

    def _fused(self, outputs: int, order: str, head_count: int) -> dict[str, NDArray[np.int64]]:
        """Rows of q, k and v in a fused projection: "qkv" one after the other, "qkv/head" per key/value head."""
        d = self.width // head_count
        kv = (outputs - self.width) // 2
        letters, _, per_head = order.partition("/")
        groups = max(kv // d, 1) if per_head else 1
        size = {"q": self.width // groups, "k": kv // groups, "v": kv // groups}
        starts = dict(zip(letters, np.cumsum([0, *(size[c] for c in letters[:-1])]), strict=True))
        step = sum(size.values())
        return {
            c: (np.arange(groups)[:, None] * step + starts[c] + np.arange(size[c])).reshape(-1) for c in letters
        }  # fmt: skip

    def _complete(self, tensors: dict[str, TensorRecipe], blocks: int) -> None:
        """Check that every tensor of the format is there in the right shape; norms without a gain are ones."""
        gated = any(".ffn_gate." in n for n in tensors)
        roles = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_down", *(["ffn_gate"] if gated else [])]
        wanted = [f"blk.{i}.{r}.weight" for i in range(blocks) for r in roles] + ["output.weight"]
        missing = [n for n in wanted if n not in tensors]
        if missing:
            raise CheckpointError(
                f"no tensor was found for {', '.join(missing[:8])}{' and more' if len(missing) > 8 else ''}: "
                "name it in a --map FILE, or use --trust-remote-code"
            )
        norms = [f"blk.{i}.{r}" for i in range(blocks) for r in ("attn_norm", "ffn_norm")]
        for name in [*norms, "output_norm"]:
            tensors.setdefault(f"{name}.weight", constant((self.width,), 1.0))
        check_shapes(tensors, blocks, self.vocab_size, self.width)
        gains = np.concatenate([tensors[f"{name}.weight"].load() for name in norms])
        if (gains < 0).mean() > 0.1:
            raise CheckpointError(
                "the gains of the norms lie around zero: they seem to be stored as their distance from one, or for "
                "another kind of norm; only the checkpoint's code (--trust-remote-code) can tell"
            )


def _is_bits(value: Any) -> bool:
    if not isinstance(value, list) or not value:
        return False
    try:
        array = np.asarray(value)
    except ValueError:
        return False
    return array.dtype.kind in "iuf" and array.ndim in (1, 2) and array.shape[0] > 1 and set(np.unique(array)) <= {0, 1}


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) else json.dumps(value) if isinstance(value, bool) else str(value)
