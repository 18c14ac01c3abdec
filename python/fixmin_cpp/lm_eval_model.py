"""The model "fixmin" of EleutherAI's lm-evaluation-harness (needs fixmin-cpp[eval]).

    python -m fixmin_cpp.lm_eval run --model fixmin --model_args pretrained=model.gguf --tasks hellaswag

A harness that knows plugins (after 0.4.13) finds the model by itself: `lm_eval run --model fixmin ...`.
"""

import json
import logging
import math
import os
import random
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm
from typing_extensions import Unpack  # in typing from Python 3.11

from .arguments import as_int
from .errors import ArgumentError, UnsupportedError
from .load_options import LoadArguments
from .model import Model

__all__ = ["FixMinLM"]

_log = logging.getLogger(__name__)

# What TemplateLM hands over: texts of context and continuation (the key for the harness' cache), and their ids.
_Request: TypeAlias = tuple[tuple[str, str] | None, list[int], list[int]]

_BATCH = 64  # requests handed to the engine at a time, unless batch_size says otherwise

# Arguments of generation that the engine does not have, and the values with which they ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "early_stopping": (None, False),
    "repetition_penalty": (None, 1),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "min_p": (None, 0),
    "typical_p": (None, 1),
    "use_cache": (None, True, False),
}


@register_model("fixmin")
class FixMinLM(TemplateLM):
    """A GGUF file that answers the harness' three questions.

    Texts become tokens as in the harness' own HFLM. Neither logits nor answers depend on what is computed together, so
    results do not depend on batch_size.

    Args:
        pretrained: the GGUF file or another name of a model (fixmin_cpp.hub.find), or a loaded Model.
        max_length: tokens that the model sees at most; what is longer loses its beginning. None: n_ctx.
        max_gen_toks: tokens to generate where a task does not say. None: 256, or half of max_length if that is less.
        add_bos_token: whether a text gets the special tokens that the tokenizer knows of; None: what it says itself.
        prefix_token_id: stands before a text without context. None: the file's start token, or its end-of-text token.
        batch_size: requests handed to the engine at a time; None or "auto": 64.
        max_batch_size: not used; the harness passes it to every model.
        **options: those of Model, for a file: n_ctx, n_threads, kv_type, ... As its `device` the harness' command line
            passes "cuda:0" where the user says nothing, so that this means None here; "cuda" is a GPU.

    Raises:
        ArgumentError, UnsupportedError, GGUFError, OSError: as Model; UnsupportedError also for a file without a
            tokenizer or without an end-of-text token.
    """

    def __init__(
        self,
        pretrained: str | os.PathLike[str] | Model,
        *,
        max_length: int | None = None,
        max_gen_toks: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **options: Unpack[LoadArguments],
    ) -> None:
        super().__init__()
        device = options.get("device")
        if device == "cuda:0":
            options["device"] = None
            device = os.environ.get("FIXMIN_DEVICE") or "cpu"
            _log.info("device=cuda:0 is what the harness passes by default: %s is used; cuda is a GPU", device)
        elif device is not None and device.partition(":")[0] not in ("auto", "cpu", "cuda"):
            raise UnsupportedError(f"device={device!r}: the native engine runs on the CPU or with CUDA")
        self.model = pretrained if isinstance(pretrained, Model) else Model.from_pretrained(pretrained, **options)
        info = self.model.info
        if not info["tokenizer"] or info["eos_token_id"] is None:
            lacks = "end-of-text token" if info["tokenizer"] else "tokenizer"
            raise UnsupportedError(f"{self.model.path} holds no {lacks}, which the harness needs")
        self._eot_token_id: int = info["eos_token_id"]
        if prefix_token_id is None:
            bos_id = self.model.bos_token_id
            prefix_token_id = self._eot_token_id if bos_id is None else bos_id
        self._prefix_token_id = as_int("prefix_token_id", prefix_token_id, 0, info["vocab_size"] - 1)
        self._prefix_text = self.model.decode(self._prefix_token_id)
        self.add_bos_token = add_bos_token
        self.max_length = as_int("max_length", info["n_ctx"] if max_length is None else max_length, 2, info["n_ctx"])
        default = min(256, self.max_length // 2)
        self.max_gen_toks = as_int("max_gen_toks", default if max_gen_toks is None else max_gen_toks, 1)
        self.batch_size = _BATCH
        if batch_size is not None and not str(batch_size).startswith("auto"):
            self.batch_size = as_int("batch_size", int(batch_size), 1)

    # --- what TemplateLM asks for -----------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return self._eot_token_id

    @property
    def prefix_token_id(self) -> int:
        """The id that stands before a text without context."""
        return self._prefix_token_id

    @property
    def tokenizer_name(self) -> str:
        """What the harness names its cache of requests after."""
        return os.path.abspath(self.model.path)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; add_special_tokens None: as add_bos_token says, but no second start token."""
        if add_special_tokens is None:
            add_special_tokens = self.add_bos_token is not False and not has_bos_prefix(string, self._prefix_text)
        return self.model.encode(string, add_special_tokens=add_special_tokens)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of both; where a token reaches across the border and nothing is left, the continuation's own ids."""
        context_ids, continuation_ids = super()._encode_pair(context, continuation)
        if not continuation_ids:
            continuation_ids = self.model.encode(continuation, add_special_tokens=False)
        return context_ids, continuation_ids

    # --- log-likelihoods --------------------------------------------------------------------------------------------

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts (nats), each read from its own beginning in windows of max_length tokens."""
        texts = [request.args[0] for request in requests]
        windows: list[_Request] = []
        owners: list[int] = []
        for i, text in enumerate(texts):
            for window in get_rolling_token_windows(
                self.tok_encode(text), prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            ):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(i)
        totals = [0.0] * len(texts)
        for i, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm), strict=True):
            totals[i] += logprob
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[_Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """For each request the log-probability of the continuation (nats), and whether greedy decoding gives it."""
        answers = {i: answer for i, request in enumerate(requests) if (answer := self._without_model(*request))}
        # Requests with the same beginning next to each other: what was computed for one serves the next.
        rest = (i for i in range(len(requests)) if i not in answers)
        order = sorted(rest, key=lambda i: requests[i][1] + requests[i][2])
        with tqdm(total=len(order), desc="Running loglikelihood requests", disable=disable_tqdm) as bar:
            for chunk in _chunks(order, self.batch_size):
                fitted = [self._fitted(*requests[i][1:]) for i in chunk]
                scores = self.model.score([ids for ids, _ in fitted], start=[len(ids) - n for ids, n in fitted])
                for i, score in zip(chunk, scores, strict=True):
                    answers[i] = float(score.logprobs.astype(np.float64).sum()), bool((score.ranks == 1).all())
                    if requests[i][0] is not None:  # the windows of a longer text have no entry of their own
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], answers[i])
                bar.update(len(chunk))
        return [answers[i] for i in range(len(requests))]

    def _without_model(
        self, texts: tuple[str, str] | None, context: list[int], continuation: list[int]
    ) -> tuple[float, bool] | None:
        """The answer to a request that cannot be scored, which must not end a task of thousands; else None."""
        if not continuation:
            _log.warning("a continuation has no tokens, its log-probability is 0: %r", texts)
            return 0.0, True
        if len(continuation) > self.max_length:
            _log.warning(
                "a continuation has %d tokens, but max_length is %d: nothing predicts its first ones, so its "
                "log-probability is given as -inf: %.200r",
                len(continuation),
                self.max_length,
                texts,
            )
            return -math.inf, False
        return None

    def _fitted(self, context: list[int], continuation: list[int]) -> tuple[list[int], int]:
        """What is left of context and continuation, cut from the left, and how many tokens of it are to be scored."""
        # One more than the model sees: the last token is predicted, not read.
        return (context + continuation)[-(self.max_length + 1) :], len(continuation)

    # --- generation -------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continues each context until one of its stop strings, the end of the text, or max_gen_toks tokens."""
        arguments = [request.args for request in requests]
        answers: dict[int, str] = {}
        groups: dict[str, list[int]] = {}
        for i, (_, options) in enumerate(arguments):
            groups.setdefault(json.dumps(options, sort_keys=True, default=str), []).append(i)
        with tqdm(total=len(requests), desc="Running generate_until requests", disable=disable_tqdm) as bar:
            for group in groups.values():
                options = self._generation_options(arguments[group[0]][1])
                room = self.max_length - options["max_new_tokens"]
                for chunk in _chunks(group, self.batch_size):
                    # An empty context gets what a log-likelihood would start from.
                    prompts = [(self.tok_encode(arguments[i][0]) or [self.prefix_token_id])[-room:] for i in chunk]
                    # Every answer its own seed, from the generator that the harness seeds.
                    seeds = [random.getrandbits(63) for _ in prompts] if options["temperature"] else None
                    for i, completion in zip(chunk, self.model.generate(prompts, seed=seeds, **options), strict=True):
                        answers[i] = completion.text
                        self.cache_hook.add_partial("generate_until", arguments[i], completion.text)
                    bar.update(len(chunk))
        return [answers[i] for i in range(len(requests))]

    def _generation_options(self, gen_kwargs: dict[str, Any]) -> dict[str, Any]:
        """A task's generation_kwargs as arguments of Model.generate()."""
        given: dict[str, Any] = dict(normalize_gen_kwargs(gen_kwargs, self.max_gen_toks))
        options: dict[str, Any] = {"max_new_tokens": given.pop("max_gen_toks")}
        if options["max_new_tokens"] >= self.max_length:
            n = options["max_new_tokens"]
            raise ArgumentError(f"max_gen_toks={n} leaves no room for a context: max_length is {self.max_length}")
        stops = handle_stop_sequences(given.pop("until"), eos=None)  # the engine knows the end-of-text token
        options["stop"] = [stop for stop in stops if stop]
        sampled, temperature = given.pop("do_sample"), given.pop("temperature", None)
        options["temperature"] = (1.0 if temperature is None else float(temperature)) if sampled else 0.0
        options["top_k"] = max(0, int(given.pop("top_k", None) or 0))
        options["top_p"] = float(given.pop("top_p", None) or 1.0)
        options["min_p"] = 0.0
        wrong = {name: value for name, value in given.items() if value not in _NEUTRAL.get(name, ())}
        if wrong:
            raise UnsupportedError(f"generation_kwargs that the engine does not have: {wrong}")
        return options


def _chunks(indices: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (indices[begin : begin + size] for begin in range(0, len(indices), size))
