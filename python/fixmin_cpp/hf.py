"""The native engine where transformers expects one of its models (needs fixmin-cpp[hf]).

>>> from fixmin_cpp.hf import FixMinForCausalLM, load_tokenizer
>>> model = FixMinForCausalLM.from_gguf("model.gguf")
>>> generate = transformers.pipeline("text-generation", model=model, tokenizer=load_tokenizer(model))

`forward` computes logits, so that everything in transformers that calls a model works. `generate` leaves the
preparation of its arguments to transformers and then runs the engine's own decoding loop wherever that gives what
transformers' loop would (`FixMinForCausalLM.generate` says where; `last_decoding` says which one ran).
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, fields
from typing import Any, NoReturn, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.generation import (
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    GenerationMode,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    StoppingCriteriaList,
    StopStringCriteria,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import CausalLMOutputWithPast

from .arguments import as_int
from .errors import ArgumentError, ArgumentTypeError, ContextLengthError, FixminError, UnsupportedError
from .generation import Completion
from .model import Model
from .tokenizer import read_tokenizer

__all__ = ["Decoding", "FixMinForCausalLM", "FixMinGgufConfig", "TokenCache", "load_tokenizer"]

_log = logging.getLogger(__name__)

# transformers calls the cache "cache" from 5.24 on and "past_key_values" before, where it passes and where it reads it.
_CACHE = next(f.name for f in fields(CausalLMOutputWithPast) if f.name in ("cache", "past_key_values"))

# What generate(native=...) asks for, as _sample() sees it: transformers passes on no arguments that it does not know.
_wish: ContextVar[bool | None] = ContextVar("fixmin_native", default=None)


class FixMinGgufConfig(PretrainedConfig):
    """The sizes of a loaded GGUF file under the names of transformers; max_position_embeddings is the model's n_ctx."""

    model_type = "fixmin_gguf"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012 - the base class declares it as a plain attribute

    @classmethod
    def of(cls, model: Model) -> "FixMinGgufConfig":
        """The configuration of a loaded model."""
        info = model.info
        sizes: dict[str, Any] = {
            "vocab_size": info["vocab_size"],
            "hidden_size": info["embedding_length"],
            "num_hidden_layers": info["block_count"],
            "num_attention_heads": info["head_count"],
            "num_key_value_heads": info["head_count_kv"],
            "intermediate_size": info["feed_forward_length"],
            "max_position_embeddings": info["n_ctx"],
            "tie_word_embeddings": False,
            "name_or_path": model.path,
        }
        sizes |= _special_ids(model.metadata)
        if len(info["eos_token_ids"]) > 1:
            sizes["eos_token_id"] = info["eos_token_ids"]
        return cls(**sizes)


def load_tokenizer(source: "str | os.PathLike[str] | Model | FixMinForCausalLM") -> PreTrainedTokenizerFast:
    """The tokenizer that a GGUF file carries, as transformers uses it.

    It pads on the left, as decoders need it, with the file's padding token or else its end-of-text token; adds to a
    text what the file's tokenizer.json says (the published ones: nothing); model_max_length is the context.

    Args:
        source: a GGUF file, or a model loaded from one.

    Raises:
        UnsupportedError: the file holds no tokenizer. GGUFError, OSError: as Model.
    """
    model = source.engine if isinstance(source, FixMinForCausalLM) else source
    n_ctx: int | None
    if isinstance(model, Model):
        metadata, n_ctx = model.metadata, model.n_ctx
        backend = model.require_tokenizer().copy()  # transformers changes the one that it is given
    else:
        metadata, tokenizer = read_tokenizer(model)
        backend = tokenizer.backend
        n_ctx = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    ids = {name: token_id for name, token_id in _special_ids(metadata).items() if token_id is not None}
    if "eos_token_id" in ids:
        ids.setdefault("pad_token_id", ids["eos_token_id"])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        padding_side="left",
        model_max_length=n_ctx,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **{name.removesuffix("_id"): backend.id_to_token(token_id) for name, token_id in ids.items()},
    )


def _special_ids(metadata: Mapping[str, Any]) -> dict[str, Any]:
    names = {"bos": "bos", "eos": "eos", "pad": "padding"}
    return {f"{name}_token_id": metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in names.items()}


class TokenCache:
    """The tokens that forward() has read, in the place of a cache of keys and values.

    Each call asks for the whole sequence, these tokens and the new ones; what has been computed of it the engine finds
    in its prefix cache. What transformers does to a cache (reorder its rows, crop its end) is done to the tokens.
    """

    is_compileable = False  # transformers asks before it would compile a forward pass
    is_croppable = True
    is_linear = is_sliding = (False,)  # one kind of layer, which remembers everything

    def __init__(self) -> None:
        self.ids: Tensor | None = None  # [B, S] int64
        self.mask: Tensor | None = None  # [B, S] bool, False where the token is padding

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """S, padding included; the same for every layer."""
        return 0 if self.ids is None else self.ids.shape[1]

    def replace(self, ids: Tensor, mask: Tensor) -> None:
        """Holds these tokens from now on: ids [B, S], mask [B, S]."""
        self.ids, self.mask = ids, mask

    def crop(self, max_length: int) -> None:
        """Keeps the first max_length tokens of each row; a negative number drops so many at the end, 0 none."""
        if self.ids is None or self.mask is None or max_length == 0:
            return
        self.ids, self.mask = self.ids[:, :max_length], self.mask[:, :max_length]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was."""
        if self.ids is not None and self.mask is not None:
            self.ids, self.mask = self.ids[beam_idx], self.mask[beam_idx]

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: it grows."""
        return -1

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row becomes so many."""
        if self.ids is not None and self.mask is not None:
            self.replace(self.ids.repeat_interleave(repeats, dim=0), self.mask.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these rows."""
        self.reorder_cache(indices)

    def activate_past_recording(self) -> None:
        """Nothing to do: tokens can always be dropped again."""


@dataclass(frozen=True)
class Decoding:
    """Which loop a generate() ran in."""

    native: bool  # the engine's; False: transformers' own
    reason: str  # what asked for transformers' loop; "" if the loop was native


class _NotNativeError(Exception):
    """What the engine's loop cannot do as transformers' would; the message names it."""


class FixMinForCausalLM(PreTrainedModel, GenerationMixin):
    """A GGUF file, run by the native engine, as a model of transformers.

    It has no parameters of PyTorch and lives on the CPU: it cannot be trained, moved, cast or saved. Safe to use from
    several threads, as `Model` is (`last_decoding` then belongs to whichever call came last).

    Args:
        engine: a loaded model; `from_gguf` loads one. It may be used directly at the same time.
    """

    config_class = FixMinGgufConfig
    main_input_name = "input_ids"

    def __init__(self, engine: Model) -> None:
        if not isinstance(engine, Model):
            raise ArgumentTypeError(f"engine must be a fixmin_cpp.Model, got {type(engine).__name__}: see from_gguf()")
        super().__init__(FixMinGgufConfig.of(engine))
        self.engine = engine
        self.last_decoding: Decoding | None = None
        super().train(False)

    @classmethod
    def from_gguf(cls, path: str | os.PathLike[str], **arguments: Any) -> "FixMinForCausalLM":
        """Loads a GGUF file; `arguments` (n_threads, n_ctx, kv_type, ...) and errors are those of Model."""
        return cls(Model(path, **arguments))

    # --- logits ----------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: TokenCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        cache: TokenCache | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits of the next token at every position, computed by the engine.

        Padding is dropped before anything is computed: each row is a sequence of its own that begins at position 0 with
        its first token, so a padded batch gives the same bits as its rows alone.

        Args:
            input_ids: [B, T] integers below V, on the CPU.
            attention_mask: [B, S] of 0 (padding) and 1, S counting the tokens of the cache too. Padding may stand on
                the left or on the right of a row, but not between its tokens. None: no new token is padding.
            past_key_values, cache: what an earlier call returned: the tokens before; extended in place. Two names for
                one thing, as releases of transformers differ.
            labels: [B, T], the ids themselves (they are shifted here); -100 is left out of the loss, and so is a token
                that follows padding: nothing predicts it.
            use_cache: whether to return a cache (None: True).
            logits_to_keep: how many of the last positions to compute logits for (0: all), or which, [n] indices into T.
            return_dict: False for a plain tuple.
            num_items_in_batch: what Trainer passes: the loss is the sum divided by this number instead of the mean.

        Returns:
            loss (mean, nats per token; None without labels), logits float32 [B, n, V] (0 at padding) and the cache,
            under the name that this release of transformers has for it.

        Raises:
            ArgumentError, ArgumentTypeError, ContextLengthError, UnsupportedError (all ValueErrors).
        """
        # No argument of its own: transformers warns of models that have one.
        places = others.pop("cache_position", None)
        _refuse_unknown(others)
        if labels is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ArgumentError("labels need the logits of all positions: leave out logits_to_keep")
        cache = _one_cache(cache, past_key_values)
        new = self._checked_ids(input_ids)
        ids, mask = _extend(cache, new, attention_mask)
        past = ids.shape[1] - new.shape[1]
        if places is not None and places.tolist() != list(range(past, ids.shape[1])):
            raise ArgumentError(
                f"cache_position must be {past} to {ids.shape[1] - 1}, the places behind the cache, got "
                f"{places.tolist()}"
            )
        logits = self._logits(ids, mask, [past + i for i in _kept(new.shape[1], logits_to_keep)])
        loss = None if labels is None else _loss(logits, labels, mask[:, past:], num_items_in_batch)
        use_cache = True if use_cache is None else use_cache
        if use_cache:
            cache = TokenCache() if cache is None else cache
            cache.replace(ids, mask)
        returned: dict[str, Any] = {_CACHE: cache if use_cache else None}
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **returned)
        return output if return_dict is not False else output.to_tuple()

    def _checked_ids(self, input_ids: Any) -> Tensor:
        """[B, T] int64."""
        _check_matrix("input_ids", input_ids)
        if input_ids.is_floating_point() or input_ids.dtype == torch.bool:
            raise ArgumentTypeError(f"input_ids must be integers, got dtype {input_ids.dtype}")
        wrong = (input_ids < 0) | (input_ids >= self.config.vocab_size)
        if wrong.any():
            row, column = wrong.nonzero()[0].tolist()
            raise ArgumentError(
                f"input_ids[{row}, {column}] is {int(input_ids[row, column])}, but token ids run from 0 to "
                f"{self.config.vocab_size - 1}"
            )
        return input_ids.long()

    def _logits(self, ids: Tensor, mask: Tensor, positions: Sequence[int]) -> Tensor:
        """Logits at these columns of ids [B, S]: float32 [B, len(positions), V], 0 where a row has padding."""
        out = torch.zeros(len(ids), len(positions), self.config.vocab_size)
        for row, (begin, end) in enumerate(_spans(mask)):
            kept = [i for i, position in enumerate(positions) if begin <= position < end]
            if kept:
                wanted = [positions[i] - begin for i in kept]
                out[row, kept] = torch.from_numpy(self.engine.logits(ids[row, begin:end].numpy(), rows=wanted))
        return out

    # --- generation ------------------------------------------------------------------------------------------------

    def generate(self, *args: Any, native: bool | None = None, **kwargs: Any) -> Any:
        """transformers' generate(), with the decoding loop of the engine where that is possible.

        The native loop does greedy decoding and sampling with temperature, top_k, min_p, top_p or typical_p (the last
        two not with a temperature other than 1: transformers applies the temperature first, the engine last), the
        file's end-of-text tokens, repetition_penalty, min_length and min_new_tokens, biases and bans of single tokens,
        stop_strings, max_length and max_new_tokens, num_return_sequences, batches padded on the
        left, streamers. Everything else (beams, other logits processors and stopping criteria, output_scores,
        assistants, ...) runs in transformers' own loop, which is right too but calls forward() for every token. Both
        stop when the context is full.

        A sampled text depends on PyTorch's seed (`transformers.set_seed`) and on the loop: the two draw different
        random numbers.

        Args:
            native: True: UnsupportedError instead of transformers' loop; False: always transformers' loop.

        The other arguments, and what is returned, are those of transformers.GenerationMixin.generate.
        `last_decoding` says which loop ran and why; so does the logger "fixmin_cpp.hf" (level INFO).
        """
        token = _wish.set(native)
        self.last_decoding = None  # and so it stays with custom_generate
        try:
            return super().generate(*args, **kwargs)  # type: ignore[misc]
        finally:
            _wish.reset(token)

    def _prepare_cache_for_generation(  # type: ignore[override]
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """transformers' hook between the preparation of the arguments and the choice of criteria and loop."""
        if generation_config.cache_implementation is not None:
            raise UnsupportedError(
                f"cache_implementation={generation_config.cache_implementation!r}: the engine has a cache of its own"
            )
        if generation_mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            self._note_transformers(generation_mode.value)
        # The context ends where it ends; Model.generate() stops there too.
        generation_config.max_length = min(generation_config.max_length, self.config.max_position_embeddings)
        given = _one_cache(model_kwargs.get("cache"), model_kwargs.get("past_key_values"))
        if given is None and generation_config.use_cache:
            model_kwargs[_CACHE] = TokenCache()

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: BaseStreamer | None = None,
        **model_kwargs: Any,
    ) -> Any:
        """transformers' loop for greedy decoding and sampling: where generate() arrives with everything prepared."""
        mask = model_kwargs.get("attention_mask")
        if mask is not None and not mask[:, -1].all():
            row = int((mask[:, -1] == 0).nonzero()[0])
            raise ArgumentError(
                f"row {row} of input_ids is padded on the right, where generation goes on: pad on the left "
                '(tokenizer.padding_side = "left")'
            )
        width, n_ctx = input_ids.shape[1], self.config.max_position_embeddings
        if width >= generation_config.max_length:
            raise ContextLengthError(
                f"input_ids has {width} tokens, but the context holds {n_ctx}, the answer included"
            )
        try:
            plan = self._plan(input_ids, logits_processor, stopping_criteria, generation_config, streamer, model_kwargs)
        except _NotNativeError as reason:
            self._note_transformers(str(reason))
            rest = (logits_processor, stopping_criteria, generation_config, synced_gpus, streamer)
            return super()._sample(input_ids, *rest, **model_kwargs)  # type: ignore[misc, arg-type]
        _, mask = _extend(None, self._checked_ids(input_ids), mask)
        rows = [ids[begin:] for ids, (begin, _) in zip(input_ids.tolist(), _spans(mask), strict=True)]
        self.last_decoding = Decoding(True, "")
        answers = self._answers(input_ids, rows, plan, streamer)
        if streamer is not None:
            streamer.end()
        sequences: Any = _append(input_ids, answers, generation_config._pad_token_tensor)
        if not generation_config.return_dict_in_generate:
            return sequences
        cache = TokenCache()
        cache.replace(sequences[:, :-1], F.pad(mask, (0, sequences.shape[1] - 1 - mask.shape[1]), value=True))
        returned: dict[str, Any] = {_CACHE: cache}
        return GenerateDecoderOnlyOutput(sequences=sequences, **returned)

    def _note_transformers(self, reason: str) -> None:
        if _wish.get():
            raise UnsupportedError(f"generate(native=True): the engine's loop does not do this: {reason}")
        _log.info("generate() runs in transformers' loop: %s", reason)
        self.last_decoding = Decoding(False, reason)

    def _plan(
        self,
        input_ids: Tensor,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
        streamer: BaseStreamer | None,
        model_kwargs: dict[str, Any],
    ) -> "_Plan":
        """What to ask of Model.generate(); raises _NotNativeError."""
        if _wish.get() is False:
            raise _NotNativeError("native=False")
        for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
            if getattr(config, name):
                raise _NotNativeError(name)
        cache = model_kwargs.get(_CACHE)
        if cache is not None and cache.get_seq_length():
            raise _NotNativeError("a cache with tokens")
        if streamer is not None and len(input_ids) > 1:
            raise _NotNativeError("a streamer and several rows")
        mask = model_kwargs.get("attention_mask")
        eos_ids = self.engine.info["eos_token_ids"]
        begins = [0] * len(input_ids) if mask is None else mask.int().argmax(dim=1).tolist()
        setting = _Setting(input_ids.shape[1], begins, eos_ids)
        plan = _Plan(_sampling(processors, config.do_sample, setting), sampled=config.do_sample)
        plan.read_criteria(criteria, input_ids.shape[1], eos_ids)
        if plan.criteria and not eos_ids and len(input_ids) > 1:
            raise _NotNativeError("stop_strings and several rows without an end-of-text token")
        return plan

    def _answers(
        self, prompts: Tensor, rows: list[list[int]], plan: "_Plan", streamer: BaseStreamer | None
    ) -> list[list[int]]:
        """The answers to all rows, the end-of-text token included; `prompts` [B, T] are the rows with their padding."""
        options = dict(plan.options)
        if plan.sampled:  # from PyTorch's generator, so that its seed decides about the text
            options["seed"] = [int(torch.randint(2**63 - 1, ())) for _ in rows]
        if streamer is None and not plan.criteria:
            return [plan.answer(completion) for completion in self.engine.generate(rows, **options)]
        sequences: list[Tensor] = list(prompts.split(1))
        answers: list[list[int]] = [[] for _ in rows]

        def goes_on(row: int, token_id: int) -> bool:
            """Shows a token to the streamer and the criteria."""
            answers[row].append(token_id)
            token = torch.tensor([token_id])
            if streamer is not None:
                streamer.put(token)
            sequences[row] = torch.cat((sequences[row], token[None]), dim=1)
            return not any(bool(criterion(sequences[row], None).all()) for criterion in plan.criteria)

        completions = self.engine.generate(rows, on_token=lambda piece: goes_on(piece.index, piece.token_id), **options)
        for row, completion in enumerate(completions):
            for token_id in plan.answer(completion)[len(answers[row]) :]:  # the end-of-text token
                goes_on(row, token_id)
        return answers

    # --- what a model of transformers can do and this one cannot ------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where tensors must be: the CPU, wherever the engine runs."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Of the logits; the weights have the types of the file."""
        return torch.float32

    def get_input_embeddings(self) -> None:  # type: ignore[override]
        """None: there is no embedding table."""

    def get_output_embeddings(self) -> None:
        """None: the output projection is inside the engine."""

    def train(self, mode: bool = True) -> "FixMinForCausalLM":
        """train(False) and eval() do nothing; UnsupportedError for train()."""
        if mode:
            raise UnsupportedError("the native engine computes no gradients: train the PyTorch checkpoint")
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> "FixMinForCausalLM":
        """What to(), cuda(), half() ... of a module call for each of its tensors, of which there are none here."""
        moved = fn(torch.zeros(0))
        if moved.device != self.device or moved.dtype != self.dtype:
            raise UnsupportedError(
                "the native engine takes tensors of the CPU, wherever it runs (device= of from_gguf), and gives "
                f'float32; it cannot become {moved.dtype} on {moved.device}; pipelines take device="cpu"'
            )
        return self

    def save_pretrained(self, *args: Any, **kwargs: Any) -> NoReturn:
        """UnsupportedError: the model is its file."""
        raise UnsupportedError(f"there is nothing to save but the file itself: copy {self.engine.path}")

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> NoReturn:
        """UnsupportedError: see from_gguf."""
        raise UnsupportedError("load a GGUF file with from_gguf(path); `fixmin convert` makes one of a checkpoint")

    def close(self) -> None:
        """Frees the model's memory, as Model.close()."""
        self.engine.close()


# A pipeline says of classes that are not registered that they are "not supported", and goes on.
AutoModelForCausalLM.register(FixMinGgufConfig, FixMinForCausalLM, exist_ok=True)


@dataclass
class _Plan:
    """One generate() in the terms of Model.generate()."""

    options: dict[str, Any]
    sampled: bool
    criteria: list[StopStringCriteria] = field(default_factory=list)  # asked after every token

    def read_criteria(self, criteria: StoppingCriteriaList, n_prompt: int, file_eos_ids: Sequence[int]) -> None:
        """Adds where to stop: n_prompt is the width of the batch, padding included."""
        max_length: int | None = None
        eos_ids: set[int] = set()
        for criterion in criteria:
            if type(criterion) is MaxLengthCriteria:
                max_length = criterion.max_length if max_length is None else min(max_length, criterion.max_length)
            elif type(criterion) is EosTokenCriteria:
                eos_ids.update(criterion.eos_token_id.flatten().tolist())
            elif type(criterion) is StopStringCriteria:
                self.criteria.append(criterion)
            else:
                raise _NotNativeError(type(criterion).__name__)
        if max_length is None:
            raise _NotNativeError("no max_length")
        if file_eos_ids and not eos_ids:
            # The engine's ignore_eos never draws it; transformers draws it and goes on.
            raise _NotNativeError("no eos_token_id")
        if eos_ids != set(file_eos_ids):
            raise _NotNativeError(f"eos_token_id {sorted(eos_ids)}: that of the file is {list(file_eos_ids)}")
        n = self.options["max_new_tokens"] = max_length - n_prompt
        self.options["min_new_tokens"] = min(n, self.options["min_new_tokens"])

    def answer(self, completion: Completion) -> list[int]:
        """The tokens of a completion as transformers counts them, the end-of-text token included."""
        if completion.finish_reason == "cancelled":
            raise FixminError("the model was closed while it generated")
        return completion.token_ids + ([] if completion.stop_id is None else [completion.stop_id])


@dataclass(frozen=True)
class _Setting:
    """What else a logits processor means depends on."""

    width: int  # of the batch, padding included
    begins: list[int]  # the column of each row's first token
    eos_ids: list[int]  # the file's


_Options: TypeAlias = dict[str, Any]  # arguments of Model.generate()


def _sampling(processors: LogitsProcessorList, do_sample: bool, setting: _Setting) -> _Options:
    """Arguments of Model.generate() that draw from the same distribution; raises _NotNativeError.

    The engine has an order of its own (docs/sampling.md), and the temperature stands at its end. A temperature changes
    no order of tokens, so it may stand on either side of top_k; for min_p its effect can be computed; on the other side
    of top_p and typical_p, whose sums it changes, it may not.
    """
    options: _Options = {"temperature": 1.0 if do_sample else 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    options |= {"min_new_tokens": 0, "banned_ids": []}
    seen: list[type] = []
    last = 0
    for processor in processors:
        kind = type(processor)
        if kind not in _READERS or (kind in seen and kind not in _REPEATABLE):
            raise _NotNativeError(kind.__name__)
        place, read = _READERS[kind]
        if place < last and kind is not TemperatureLogitsWarper:
            raise _NotNativeError(f"{kind.__name__} after {seen[-1].__name__}")
        seen.append(kind)
        last = max(last, place)
        if place < _FIRST_WARPER or do_sample:  # warpers leave the most probable token what it is
            read(processor, options, setting)
    return options


def _read_bias(processor: Any, options: _Options, setting: _Setting) -> None:
    _refuse_sequences(processor)
    options["logit_bias"] = {sequence[0]: float(bias) for sequence, bias in processor.sequence_bias.items()}


def _read_bad_words(processor: Any, options: _Options, setting: _Setting) -> None:
    _refuse_sequences(processor)
    options["banned_ids"] += [sequence[0] for sequence in processor.sequence_bias]


def _refuse_sequences(processor: Any) -> None:
    if any(len(sequence) != 1 for sequence in processor.sequence_bias):
        raise _NotNativeError(f"{type(processor).__name__} of several tokens")


def _read_suppressed(processor: Any, options: _Options, setting: _Setting) -> None:
    options["banned_ids"] += processor.suppress_tokens.tolist()


def _read_repetition_penalty(processor: Any, options: _Options, setting: _Setting) -> None:
    # The engine counts all tokens of a row and no padding, as generate() asks for with these lengths.
    ignored = processor.prompt_ignore_length
    ignored = ignored.tolist() if isinstance(ignored, Tensor) else [ignored or 0] * len(setting.begins)
    if ignored != setting.begins:
        raise _NotNativeError("prompt_ignore_length")
    options |= {"repeat_penalty": float(processor.penalty), "repeat_last_n": -1}


def _read_min_length(processor: Any, options: _Options, setting: _Setting) -> None:
    if set(processor.eos_token_id.flatten().tolist()) != set(setting.eos_ids):
        raise _NotNativeError(f"{type(processor).__name__} with another end-of-text token")
    n = processor.min_length - setting.width if hasattr(processor, "min_length") else processor.min_new_tokens
    options["min_new_tokens"] = max(n, options["min_new_tokens"])


def _read_temperature(processor: Any, options: _Options, setting: _Setting) -> None:
    options["temperature"] = float(processor.temperature)


def _read_top_k(processor: Any, options: _Options, setting: _Setting) -> None:
    _refuse_filter_value(processor)
    options["top_k"] = int(processor.top_k)


def _read_typical_p(processor: Any, options: _Options, setting: _Setting) -> None:
    options["typical_p"] = _share("typical_p", processor.mass, processor, options)


def _read_top_p(processor: Any, options: _Options, setting: _Setting) -> None:
    options["top_p"] = _share("top_p", processor.top_p, processor, options)


def _read_min_p(processor: Any, options: _Options, setting: _Setting) -> None:
    _refuse_filter_value(processor)
    if processor.min_tokens_to_keep != 1:
        raise _NotNativeError("min_p with min_tokens_to_keep")
    # (p / max p) at temperature T is its T-th root at temperature 1.
    options["min_p"] = float(processor.min_p) ** options["temperature"]


def _share(name: str, value: float, processor: Any, options: _Options) -> float:
    _refuse_filter_value(processor)
    if options["temperature"] != 1.0:
        raise _NotNativeError(f"{name} after a temperature")
    if processor.min_tokens_to_keep != 1 or value <= 0:
        raise _NotNativeError(f"{name} with min_tokens_to_keep")
    return float(value)


def _refuse_filter_value(processor: Any) -> None:
    if processor.filter_value != -np.inf:
        raise _NotNativeError(f"{type(processor).__name__} with a filter_value")


# Where each stands in the engine's order; what only bans tokens may stand on either side of the penalty.
_READERS: dict[type, tuple[int, Callable[[Any, _Options, _Setting], None]]] = {
    SequenceBiasLogitsProcessor: (0, _read_bias),
    RepetitionPenaltyLogitsProcessor: (1, _read_repetition_penalty),
    NoBadWordsLogitsProcessor: (1, _read_bad_words),
    SuppressTokensLogitsProcessor: (1, _read_suppressed),
    MinLengthLogitsProcessor: (1, _read_min_length),
    MinNewTokensLengthLogitsProcessor: (1, _read_min_length),
    TemperatureLogitsWarper: (2, _read_temperature),
    TopKLogitsWarper: (3, _read_top_k),
    TypicalLogitsWarper: (4, _read_typical_p),
    TopPLogitsWarper: (5, _read_top_p),
    MinPLogitsWarper: (6, _read_min_p),
}
_FIRST_WARPER = 2
_REPEATABLE = (NoBadWordsLogitsProcessor, SuppressTokensLogitsProcessor)


def _append(prompts: Tensor, answers: list[list[int]], pad: Tensor | None) -> Tensor:
    """[B, T] and B answers -> [B, T + longest answer], shorter ones padded on the right."""
    rows = [torch.tensor(answer, dtype=prompts.dtype) for answer in answers]
    # Without a padding token there is no end-of-text token either, and all answers are as long.
    filler = 0 if pad is None else int(pad)
    return torch.cat((prompts, pad_sequence(rows, batch_first=True, padding_value=filler)), dim=1)


# --- checks -------------------------------------------------------------------------------------------------------


def _refuse_unknown(arguments: dict[str, Any]) -> None:
    """Arguments that transformers passes along to every model are ignored only where they ask for nothing."""
    ignored = {"tokenizer", "assistant_tokenizer"}  # of generate(), which leaves them in what it passes on
    reasons = {
        "inputs_embeds": "there is no embedding table",
        "position_ids": "positions are counted from the first token of a row that is not padding",
    }
    for name, value in arguments.items():
        if name not in ignored and value is not None and value is not False:
            reason = f": {reasons[name]}" if name in reasons else ""
            raise UnsupportedError(f"forward() of the native engine does not take {name}{reason}")


def _one_cache(cache: Any, past_key_values: Any) -> TokenCache | None:
    """The cache under whichever of its two names it came."""
    if cache is not None and past_key_values is not None:
        raise ArgumentError("cache and past_key_values are two names of one argument: give one of them")
    name, given = ("cache", cache) if cache is not None else ("past_key_values", past_key_values)
    if given is not None and not isinstance(given, TokenCache):
        raise ArgumentTypeError(
            f"{name} must be what an earlier call returned (a TokenCache), got {type(given).__name__}"
        )
    return given


def _check_matrix(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise ArgumentTypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.device.type != "cpu":
        raise ArgumentError(
            f'{name} is on {value.device}, but the native engine takes tensors of the CPU: {name}.to("cpu")'
        )
    if value.ndim != 2 or 0 in value.shape:
        raise ArgumentError(f"{name} must have the shape [rows, tokens], got {list(value.shape)}")


def _extend(cache: TokenCache | None, new: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The ids [B, S] of cache and call together, and what of them is no padding, bool [B, S]."""
    ids, mask = new, torch.ones(new.shape, dtype=torch.bool)
    if cache is not None and cache.ids is not None and cache.mask is not None:
        if len(cache.ids) != len(new):
            raise ArgumentError(f"input_ids has {len(new)} rows, but the cache {len(cache.ids)}")
        ids, mask = torch.cat((cache.ids, new), dim=1), torch.cat((cache.mask, mask), dim=1)
    if attention_mask is None:
        return ids, mask
    _check_matrix("attention_mask", attention_mask)
    if attention_mask.shape != ids.shape:
        raise ArgumentError(
            f"attention_mask has the shape {list(attention_mask.shape)}, but there are {list(ids.shape)} tokens"
            + (", those of the cache included" if ids is not new else "")
        )
    if not ((attention_mask == 0) | (attention_mask == 1)).all():
        raise ArgumentError("attention_mask must hold 1 for a token and 0 for padding, and nothing else")
    return ids, attention_mask == 1


def _spans(mask: Tensor) -> list[tuple[int, int]]:
    """First token and one past the last token of each row of a mask [B, S]."""
    spans = []
    for row, real in enumerate(mask.tolist()):
        if True not in real:
            raise ArgumentError(f"row {row} of attention_mask hides every token")
        begin, end = real.index(True), len(real) - real[::-1].index(True)
        if not all(real[begin:end]):
            hole = real.index(False, begin)
            raise ArgumentError(
                f"attention_mask[{row}, {hole}] is 0 between tokens: padding may stand on the left or on the right of "
                "a row only"
            )
        spans.append((begin, end))
    return spans


def _kept(length: int, logits_to_keep: Any) -> list[int]:
    """Which of `length` positions logits are wanted for."""
    if isinstance(logits_to_keep, Tensor):
        if logits_to_keep.ndim != 1 or logits_to_keep.is_floating_point():
            raise ArgumentError(f"logits_to_keep must be a number or indices [n], got {logits_to_keep!r}")
        wanted = logits_to_keep.tolist()
    else:
        n = as_int("logits_to_keep", logits_to_keep, 0)
        wanted = list(range(max(0, length - n) if n else 0, length))
    if any(not -length <= i < length for i in wanted):
        raise ArgumentError(f"logits_to_keep names positions outside of the {length} there are: {wanted}")
    return [i % length for i in wanted]


# --- loss ---------------------------------------------------------------------------------------------------------


class _WithoutGradient(torch.autograd.Function):
    """Passes a loss through, and says why when someone asks for its gradient."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, anchor: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> NoReturn:
        raise UnsupportedError("the native engine computes no gradients: train the PyTorch checkpoint")


def _loss(logits: Tensor, labels: Tensor, mask: Tensor, n_items: Tensor | int | None) -> Tensor:
    """Mean over logits [B, T, V] and labels [B, T], or their sum divided by n_items.

    mask [B, T] is False at padding, which has no logits.
    """
    _check_matrix("labels", labels)
    if labels.shape != logits.shape[:2]:
        raise ArgumentError(f"labels has the shape {list(labels.shape)}, but input_ids {list(logits.shape[:2])}")
    targets = labels.masked_fill(~F.pad(mask[:, :-1], (1, 0)), -100)[:, 1:]
    reduction = "mean" if n_items is None else "sum"
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), reduction=reduction)
    if n_items is not None:
        loss = loss / n_items
    return _WithoutGradient.apply(loss, torch.zeros((), requires_grad=True))
