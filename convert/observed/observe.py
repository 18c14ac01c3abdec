"""Resolve a checkpoint by running its own code and reading the conventions off what it computes."""

import os
import re
from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from ...errors import CheckpointError
from ..checkpoint.codes import check_stated_code, check_tokenwise, recover_code
from ..checkpoint.recipes import Ref, constant, gather
from ..checkpoint.roles import Map, leftovers_error, mapped_recipes, read_map
from ..checkpoint.source import Source, context_length, hyper, is_no_weight
from ..overrides import OVERRIDES, option
from ..spec import Activation, CodeSpec, ModelSpec, Resolved, TensorRecipe, check_shapes
from .attention import Hints
from .confirm import confirm
from .conventions import Block, Interpretation, Norm, Reader
from .locate import Locator
from .memory import give_back
from .probe import OwnModel, load_own_model
from .tape import Product, Weight, model_tensors

Log = Callable[[str], None]

_PROMPTS, _PROMPT_TOKENS = 4, 16
_ID_CHUNK = 1024  # ids per sequence when the codes of all ids are read


def resolve_by_code(
    source: Source, stated: Mapping[str, Any], map_file: str | os.PathLike[str] | None, tell: Log
) -> Resolved:
    """See `resolve.resolve`. Every convention comes from what the code was seen to compute."""
    own = load_own_model(source, tell)
    source.on_close.append(own.close)
    return _Observation(own, source, stated, tell).resolve(map_file)


class _Observation:
    def __init__(self, own: OwnModel, source: Source, stated: Mapping[str, Any], tell: Log) -> None:
        self.own, self.source, self.stated, self.tell = own, source, stated, tell
        self.facts = own_config(own) | source.config
        self.conventions: dict[str, tuple[Any, str]] = {}
        self.code: CodeSpec | None = None
        self.embedding: Ref | None = None

    def resolve(self, map_file: str | os.PathLike[str] | None) -> Resolved:
        own, source = self.own, self.source
        context, origin = self.context_length()
        self.conventions["context_length"] = (context, origin)
        self.length = min(_PROMPT_TOKENS, context)
        if self.length < 2:
            raise CheckpointError(
                f"context_length: {context} ({origin}), but attention shows nothing of itself with fewer than two "
                "tokens; state another --context-length, or convert without --trust-remote-code"
            )
        first = own.logits(np.arange(min(4, context)))
        if not np.isfinite(first).all():
            at = tuple(int(i) for i in np.argwhere(~np.isfinite(first))[0])
            raise CheckpointError(
                f"the checkpoint's code gives a logit that is no finite number: {first[at]} for token {at[1]}, behind "
                f"the tokens 0 to {at[0]}"
            )
        if not np.array_equal(first, own.logits(np.arange(min(4, context)))):
            raise CheckpointError(
                "the checkpoint's code gives different logits each time it is run (random numbers, dropout in "
                "evaluation mode?): there is no function to convert"
            )
        vocab_size = own.vocab_size
        rng = np.random.default_rng(0)
        prompts = [rng.integers(0, vocab_size, self.length) for _ in range(_PROMPTS)]
        for i, prompt in enumerate(prompts):
            prompt[0] = i * max(vocab_size - 1, 1) // (_PROMPTS - 1)  # the first and the last id, two between
        tapes, logits = zip(*(own.trace(p) for p in prompts), strict=True)
        used = tapes[0].used
        reader = Reader(tapes, logits, *self.declared())
        del tapes
        give_back()
        # The name of a value in `stated` is checked against what was found, never forced on it: the code decides.
        found = reader.interpret(lambda order, rows: self.read_code(prompts[0], order, rows, vocab_size, context))
        mapping = read_map(source, map_file)
        spec = self.spec(found, vocab_size, context, mapping)
        self.contradictions(spec)
        self.leftovers(spec, used, mapping)
        numbers = found.input_numbers()
        del reader, found
        give_back()  # the recordings, some hundred MB
        error, tokens = confirm(spec, own, numbers)
        give_back()
        self.tell(f"reference model against the checkpoint's code, {tokens} tokens: relative difference {error:.2g}")
        return Resolved(spec, source, own.logits, self.input_rows)

    # --- what is declared ----------------------------------------------------------------------------------------

    def declared(self) -> tuple[list[float], Hints]:
        """(eps of norms, hints for attention) from the configuration, the user and the modules."""
        facts, stated = self.facts, self.stated

        def numbers(key: str, override: str) -> list[float]:
            return [float(v) for v in (stated.get(override), hyper(facts, key)) if v is not None and v > 0]

        heads = stated.get("n_head") or hyper(facts, "head_count")
        width = hyper(facts, "embedding_length")
        head_dim = hyper(facts, "head_dim") or (width / heads if width and heads else None)
        fraction = hyper(facts, "rope_fraction")
        dims = [int(v) for v in numbers("rope_dim", "rope_dim")]
        dims += [int(head_dim * fraction)] if head_dim and fraction else []
        attributes = [
            (key, value)
            for module in self.own.model.modules()
            for key, value in vars(module).items()
            if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
        ]
        eps = [value for key, value in attributes if "eps" in key.lower() and value < 0.1]
        numeric = {float(v) for key, v in attributes if re.search(r"scale|factor|multiplier|base|theta", key)}
        hints = Hints(
            head_count=int(heads) if heads else None,
            bases=[*numbers("rope_base", "rope_base"), *(v for v in sorted(numeric) if v > 4)],
            rope_dims=dims,
            numbers=[*numbers("attention_scale", "attention_scale"), *sorted(numeric)],
            frequencies={n: t for n, t in model_tensors(self.own.model) if t.ndim == 1 and t.is_floating_point()},
        )
        return [*numbers("norm_eps", "norm_eps"), *dict.fromkeys(eps)], hints

    def context_length(self) -> tuple[int, str]:
        stated = self.stated.get("context_length")
        if stated is not None:
            return int(stated), "given"
        found = context_length(self.facts)
        if found is not None:
            return found[0], f"configuration, {found[1]}"
        squares = {
            t.shape[-1]
            for _, t in model_tensors(self.own.model)
            if t.ndim >= 2 and t.shape[-1] == t.shape[-2] and is_no_weight("", t.numpy())
        }
        if len(squares) == 1:
            return squares.pop(), "size of the causal mask"
        raise CheckpointError("the configuration does not say how long a context the model has: give --context-length")

    # --- codes -----------------------------------------------------------------------------------------------------

    def input_rows(self, ids: NDArray[Any]) -> NDArray[np.float32]:
        """What the checkpoint's code feeds block 0 for each id, [T] -> [T, D]; T may exceed the context."""
        ids = np.asarray(ids, dtype=np.int64)
        size = min(_ID_CHUNK, self.conventions["context_length"][0])
        return np.concatenate([self.own.input_rows(ids[i : i + size]) for i in range(0, len(ids), size)])

    def read_code(self, prompt: NDArray[Any], order: int, rows: Any, vocab_size: int, context: int) -> None:
        """Recover the code of all ids, or find the table of a learned embedding."""
        self.own.tap(prompt, rows, order)
        check_tokenwise(self.own.input_rows, vocab_size, self.length)
        size = min(_ID_CHUNK, context)
        self.code = recover_code(self.own.input_rows, vocab_size, size)
        if self.code is not None:
            origin = f"inputs of block 0 for all {vocab_size} ids"
            self.conventions["code"] = (f"{self.code.kind}, {self.code.width} bits", origin)
            self.conventions["lift"] = (self.code.lift, origin)
            self.conventions["values"] = (self.code.values, origin)
            return
        self.code = CodeSpec("learned")
        self.embedding, factor = self.embedding_table(vocab_size, rows.shape[1])
        self.embedding_factor = factor
        name = self.embedding.sources[0]
        origin = f"inputs of block 0 for all {vocab_size} ids are its rows" + (
            f" times {factor}" if factor != 1 else ""
        )
        self.conventions["code"] = (f"learned embedding {name}", origin)

    def embedding_table(self, vocab_size: int, width: int) -> tuple[Ref, float]:
        """The stored table whose rows enter block 0, and a constant factor on them."""
        locator = Locator(self.own)
        probe_ids = np.arange(min(vocab_size, self.length))
        rows = self.own.input_rows(probe_ids)
        for name, tensor in model_tensors(self.own.model):
            if name not in self.own.file_name or tensor.ndim != 2 or min(tensor.shape) < 2:
                continue
            table = tensor if tensor.shape[1] == width else tensor.T
            if table.shape[1] != width or table.shape[0] < vocab_size:
                continue
            part = table[: len(probe_ids)].float().numpy()
            factor = float(np.float32((rows * part).sum() / max((part * part).sum(), 1e-30)))
            factor = float(f"{factor:.6g}") if np.array_equal(rows, part * np.float32(f"{factor:.6g}")) else factor
            if not np.allclose(rows, part * np.float32(factor), rtol=1e-6, atol=0):
                continue
            size = min(_ID_CHUNK, self.conventions["context_length"][0])
            for start in range(0, vocab_size, size):
                ids = np.arange(start, min(start + size, vocab_size))
                wanted = table[start : start + size].float().numpy()[: len(ids)] * np.float32(factor)
                if not np.allclose(self.own.input_rows(ids), wanted, rtol=1e-6, atol=0):
                    break
            else:
                return locator.locate(Weight(table, (name,))), factor
        raise CheckpointError(
            "embedding: what enters block 0 is neither a lifted code (two values, tiled or interleaved, at most 32 "
            "bits) nor the rows of a stored embedding table; a projected, normed or otherwise computed embedding "
            "cannot be converted"
        )

    # --- the spec --------------------------------------------------------------------------------------------------

    def spec(self, found: Interpretation, vocab_size: int, context: int, mapping: Map) -> ModelSpec:
        assert self.code is not None
        tensors, computed = self.tensors(found, vocab_size)
        tensors |= mapped_recipes(self.source, mapping)
        for name in computed:
            self.tell(f"{name}: values as the checkpoint's code computes them from the files")
        origins = found.sources
        width = found.head.x.shape[1]
        check_shapes(tensors, len(found.blocks), vocab_size, width)
        count = len(found.attention.heads.q)
        self.conventions |= {
            "embedding_length": (width, "shapes"),
            "block_count": (len(found.blocks), "blocks seen"),
            "feed_forward_length": (len(found.up), "shapes"),
            "head_count": (count, "attention of block 0"),
            "head_count_kv": (len(found.attention.heads.k), "attention of block 0"),
            "norm": (found.norm, _reproduced(origins["norm"], found.errors["norm"])),
            "norm_eps": (found.eps, origins["norm_eps"]),
            "rope_style": (found.attention.style, _reproduced(origins["rope_style"], found.errors["attention"])),
            "rope_dim": (found.attention.dim, origins["rope_dim"]),
            "rope_base": (found.attention.base, origins["rope_base"]),
            "attention_scale": (found.attention.scale, origins["attention_scale"]),
            "activation": (found.activation, _reproduced(origins["activation"], found.errors["activation"])),
        }
        if "output factor" in origins:
            self.conventions["output factor"] = (found.head_factor, origins["output factor"])
        for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
            recipe = tensors.get(f"blk.0.{name}.weight")
            if recipe is not None:
                self.conventions[name] = (" + ".join(recipe.sources) or "computed", "operations of block 0")
        return ModelSpec(
            vocab_size=vocab_size,
            context_length=context,
            embedding_length=width,
            block_count=len(found.blocks),
            feed_forward_length=len(found.up),
            head_count=count,
            head_count_kv=len(found.attention.heads.k),
            attention_scale=found.attention.scale,
            norm="layernorm" if found.norm == "layernorm" else "rmsnorm",
            norm_eps=found.eps,
            rope_dim=found.attention.dim,
            rope_base=found.attention.base,
            rope_style="half" if found.attention.style == "half" else "interleaved",
            activation=cast(Activation, found.activation),  # others were refused
            code=self.code,
            tensors=tensors,
            conventions=self.conventions,
            name=self.source.directory.resolve().name,
            **self.source.special_ids(vocab_size),
            tokenizer_json=self.source.tokenizer_json(),
            weights_sha256=self.source.sha256,
        )

    def tensors(self, found: Interpretation, vocab_size: int) -> tuple[dict[str, TensorRecipe], list[str]]:
        """GGUF name -> recipe, and names of weights that no file holds in the form they are used in."""
        locator = Locator(self.own)
        out: dict[str, TensorRecipe] = {}
        width = found.head.x.shape[1]
        if self.embedding is not None:
            out["token_embd.weight"] = gather([self.embedding], np.arange(vocab_size), factor=self.embedding_factor)
        for i, block in enumerate(found.blocks):
            self._block(out, f"blk.{i}.", block, found, found.attention.factors[i], locator)
        self._norm(out, "output_norm", found.final_norm, width, locator)
        self._rows(out, "output", [found.head], np.arange(vocab_size), locator, factor=found.head_factor)
        return out, locator.computed

    def _block(
        self, out: dict[str, TensorRecipe], prefix: str, block: Block, found: Interpretation, q_factor: float,
        locator: Locator,
    ) -> None:  # fmt: skip
        width, heads = found.head.x.shape[1], found.attention.heads
        self._norm(out, prefix + "attn_norm", block.attn_norm, width, locator)
        for role, rows in (("attn_q", heads.q), ("attn_k", heads.k), ("attn_v", heads.v)):
            factor = q_factor if role == "attn_q" else 1.0
            self._rows(out, prefix + role, block.qkv, rows.reshape(-1), locator, factor)
        for role, branch, columns in (("attn_output", block.attention, heads.columns), ("ffn_down", block.mlp, None)):
            if role == "ffn_down":
                self._norm(out, prefix + "ffn_norm", block.ffn_norm, width, locator)
                if found.gate is not None:
                    self._rows(out, prefix + "ffn_gate", block.up, found.gate, locator)
                self._rows(out, prefix + "ffn_up", block.up, found.up, locator)
            weight = locator.locate(branch.out.weight)
            out[f"{prefix}{role}.weight"] = gather([weight], columns=columns, factor=branch.factor)
            if branch.bias is not None:
                # a bias added after the factor is not scaled by it
                factor = branch.factor if branch.bias is branch.out.bias else 1.0
                out[f"{prefix}{role}.bias"] = gather([locator.locate(branch.bias)], factor=factor)

    @staticmethod
    def _norm(out: dict[str, TensorRecipe], name: str, norm: Norm, width: int, locator: Locator) -> None:
        for part, weight in (("weight", norm.weight), ("bias", norm.bias)):
            if weight is not None:
                flat = Weight(weight.value.flatten(), weight.names)
                out[f"{name}.{part}"] = gather([locator.locate(flat)])
            elif part == "weight":
                out[f"{name}.weight"] = constant((width,), 1.0)

    @staticmethod
    def _rows(
        out: dict[str, TensorRecipe], name: str, products: list[Product], rows: NDArray[np.int64],
        locator: Locator, factor: float = 1.0,
    ) -> None:  # fmt: skip
        """Weight and bias of one GGUF tensor as rows of the products' weights laid one below the other."""
        starts = np.cumsum([0, *(p.y.shape[1] for p in products)])
        used = [p for p, a, b in zip(products, starts, starts[1:], strict=False) if ((rows >= a) & (rows < b)).any()]
        out[f"{name}.weight"] = gather([locator.locate(p.weight) for p in products], rows, factor=factor)
        if any(p.bias is not None for p in used):
            parts = [locator.locate(p.bias) if p.bias is not None else _zeros(p.y.shape[1]) for p in products]
            out[f"{name}.bias"] = gather(parts, rows, factor=factor)

    # --- nothing forgotten -----------------------------------------------------------------------------------------

    def contradictions(self, spec: ModelSpec) -> None:
        """Refuse what the user states if the code shows otherwise."""
        for name, value in self.stated.items():
            if (spec_field := OVERRIDES[name].spec_field) is None:
                continue
            seen = attrgetter(spec_field)(spec)
            if not (value == seen if isinstance(value, str) else abs(value / seen - 1) < 1e-5):
                raise CheckpointError(f"{option(name)} {value} is stated, but the checkpoint's code computes {seen}")
        check_stated_code(self.stated, spec.code, spec.vocab_size)

    def leftovers(self, spec: ModelSpec, used: set[str], mapping: Map) -> None:
        """Every stored tensor is part of the result, unused by the code, or no weight; or it is an error."""
        consumed = {s for recipe in spec.tensors.values() for s in recipe.sources}
        open_names = []
        ignorable = [
            re.compile(p) for p in getattr(self.own.model, "_keys_to_ignore_on_load_unexpected", None) or []
        ]  # what the code itself says it does not read
        for name in self.source.tensors:
            in_model = [m for m, stored in self.own.file_name.items() if stored == name]
            if name in consumed or name in mapping.ignored:
                continue
            if not in_model and self.source.allow_unexpected(name):
                self.source.warn(
                    f"tensor {name}: left out, the checkpoint's code does not know it (--allow-unexpected)"
                )
                continue
            if not in_model:
                if is_no_weight(name) or any(p.search(name) for p in ignorable):
                    self.tell(f"tensor {name} {self.source.tensors[name].shape}: ignored, the code does not know it")
                else:
                    open_names.append(name)
                continue
            reason = (
                "not needed: the logits are reproduced without it" if used & set(in_model)
                else "not used by the checkpoint's code"
            )  # fmt: skip
            self.tell(f"tensor {name} {self.source.tensors[name].shape}: {reason}")
        if open_names:
            raise leftovers_error(self.source, open_names, "the checkpoint's code does not know them")


def own_config(own: OwnModel) -> dict[str, Any]:
    """What the configuration object of the code adds to config.json: the defaults of its class."""
    from transformers import PretrainedConfig

    config = getattr(own.model, "config", None)
    if config is None:
        return {}
    usual = vars(PretrainedConfig())
    return {k: v for k, v in vars(config).items() if k not in usual and not k.startswith("_")}


def _reproduced(origin: str, error: float) -> str:
    return f"{origin}; reproduced within {error:.1g}"


def _zeros(size: int) -> Ref:
    zeros = np.zeros(size, np.float32)
    return Ref((size,), (), lambda index: zeros[index])
