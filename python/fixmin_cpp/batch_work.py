"""The work of a batch job: lines answered by a model, in whatever process or on whatever machine."""

import contextlib
import functools
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import asdict, dataclass
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _core
from .arguments import split_prompts
from .batch_lines import Line, NativeEntry, OpenAIEntry, Settings, parse_line, write_record
from .errors import ArgumentError, DeviceError, FixminError, naming
from .generation import Completion, TokenLogprob
from .load_options import LoadOptions
from .model import Model
from .openai_api.answer import ANSWERS
from .openai_api.request import ChatRequest, CompletionRequest, GenerationRequest
from .recognise import refuse_wrong_model
from .state import file_sha256

__all__ = ["ModelFile", "Result", "run_lines"]


@dataclass(frozen=True)
class Result:
    """What becomes of one line."""

    line: int
    record: bytes  # the line of output
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str | None = None  # what was wrong with it, if the record says so


@dataclass(frozen=True)
class ModelFile:
    """A file and how to load it, on whatever machine."""

    path: str
    sha256: str
    options: LoadOptions

    @classmethod
    def of(cls, path: str | os.PathLike[str], options: LoadOptions) -> "ModelFile":
        """Reads the file for its hash."""
        refuse_wrong_model(path)
        if not os.path.isfile(path):
            os.stat(path)  # raises the error that says what is missing
            raise ArgumentError(f"{os.fspath(path)}: not a regular file")  # reading a pipe could wait for ever
        return cls(os.path.abspath(path), file_sha256(path), options)

    def load(self, n_threads: int | None = None) -> Model:
        """The model; `n_threads` counts where the job names none.

        Raises FixminError if the file of that name is another one here, or by now.
        """
        with contextlib.ExitStack() as stack:
            model = stack.enter_context(Model(self.path, **{"n_threads": n_threads, **self.options.given()}))
            if model.file_sha256() != self.sha256:
                raise FixminError(f"{self.path} on {os.uname().nodename} is another file than when the job was started")
            stack.pop_all()
        return model

    def vocab_size(self) -> int:
        """From the header; beyond any token id if it does not say: loading it tells what is wrong with the file."""
        with naming(self.path):
            size = _core.GgufFile(self.path).metadata.get("fixmin.vocab_size")
        return size if isinstance(size, int) and size > 1 else 2**32


# Finished results may wait for a slow line before them; so many lines per place are begun at the most.
_AHEAD = 4


def run_lines(
    model: Model, settings: Settings, lines: Iterable[Line], n_parallel: int
) -> Generator[Result, None, None]:
    """Answers lines, n_parallel at a time, and gives the results in their order.

    Reads `lines` only as far ahead as it works on them. Errors other than those of a line end it. The model stays the
    caller's; closing it cancels what runs.
    """
    window: deque[SimpleQueue[Result | BaseException]] = deque()
    # Not concurrent.futures: Ctrl-C can leave one of its locks taken, for which a thread then waits for ever.
    jobs: SimpleQueue[tuple[Line, SimpleQueue[Result | BaseException]] | None] = SimpleQueue()
    # Their requests meet in the model's scheduler, where each of these threads sleeps until its answer is complete.
    threads: list[Thread] = []
    try:
        for line in lines:
            if len(threads) < n_parallel:
                threads.append(Thread(target=_work, args=(model, settings, jobs), name=f"fixmin-batch_{len(threads)}"))
                threads[-1].start()
            window.append(SimpleQueue())
            jobs.put((line, window[-1]))
            while window and (not window[0].empty() or len(window) >= _AHEAD * n_parallel):
                yield _taken(window.popleft())
        while window:
            yield _taken(window.popleft())
    finally:
        with contextlib.suppress(Empty):
            while True:
                jobs.get_nowait()
        for _ in threads:
            jobs.put(None)


def _work(model: Model, settings: Settings, jobs: SimpleQueue[Any]) -> None:
    while (job := jobs.get()) is not None:
        line, place = job
        try:
            place.put(answer(model, settings, line))
        except BaseException as error:
            place.put(error)


def _taken(place: SimpleQueue[Result | BaseException]) -> Result:
    result = place.get()
    if isinstance(result, BaseException):
        raise result
    return result


def answer(model: Model, settings: Settings, line: Line) -> Result:
    """The record for a line: its answer, or what is wrong with the line."""
    entry: Any = NativeEntry(line.number, {})  # in whose form a line is answered that cannot be read
    try:
        entry = parse_line(line)
        if entry.problem is not None:
            raise entry.problem
        body = (_openai if isinstance(entry, OpenAIEntry) else _OUTPUTS[settings.task])(model, settings, entry)
    except FixminError as error:
        if model.closed or isinstance(error, DeviceError):
            raise  # the line is not to blame
        record, reason = entry.failure(error)
        return Result(line.number, write_record(record), error=reason)
    usage = body["usage"]
    return Result(line.number, write_record(entry.answer(body)), usage["prompt_tokens"], usage["completion_tokens"])


def _openai(model: Model, settings: Settings, entry: OpenAIEntry) -> dict[str, Any]:
    request = entry.read(settings)
    prompt, stop = _prompt(model, request)
    prompts, many = split_prompts(prompt)
    seeds = [settings.seed_of(entry.line, i) for i in range(len(prompts))]
    arguments = request.resolved({"seed": seeds if many else seeds[0], **settings.options}, stop)
    answer = ANSWERS[type(request)](request, model, prompt, arguments)
    answer.generations.run()
    completions = answer.completions()
    _refuse_cancelled(completions)
    return {
        **answer.head(answer.object, str(entry.line), int(time.time()), request.fields.get("model")),
        "choices": [answer.choice(i, one) for i, one in enumerate(completions)],
        "usage": answer.usage(),
    }


def _prompt(model: Model, request: GenerationRequest) -> tuple[Any, Sequence[str]]:
    """What the model reads, and what ends a text besides the request's own stop strings."""
    if isinstance(request, ChatRequest):
        template = _plain_template()
        return template.prompt_of(request, model.require_tokenizer()), template.stop
    assert isinstance(request, CompletionRequest)
    return request.prompt, ()


@functools.cache
def _plain_template() -> Any:
    """That of the server when its operator has given none."""
    try:
        from .openai_api.chat import ChatTemplate
    except ImportError as error:
        raise ImportError(f"lines with chats need pip install 'fixmin-cpp[serve]': {error}") from error
    return ChatTemplate()


def _refuse_cancelled(completions: Sequence[Completion]) -> None:
    if any(one.finish_reason == "cancelled" for one in completions):
        raise FixminError("the model was closed")


def _generate(model: Model, settings: Settings, entry: NativeEntry) -> dict[str, Any]:
    prompt, arguments = entry.read(settings)
    completion = model.generate(prompt, **arguments)
    _refuse_cancelled([completion])
    timings = completion.timings
    return {
        "text": completion.text,
        **({"token_ids": completion.token_ids} if settings.token_ids else {}),
        "finish_reason": completion.finish_reason,
        **_logprobs(logprobs=completion.logprobs, prompt_logprobs=completion.prompt_logprobs),
        "usage": _usage(timings.n_prompt, completion.n_drawn),
        "seed": completion.seed,
        "timings": {"prefill_s": round(timings.prefill_s, 6), "decode_s": round(timings.decode_s, 6)},
    }


def _score(model: Model, settings: Settings, entry: NativeEntry) -> dict[str, Any]:
    score = model.score(entry.read(settings)[0])
    return {
        "token_ids": score.token_ids,
        "logprobs": _floats(score.logprobs),
        "nll": score.nll,
        "perplexity": score.perplexity if score.perplexity < float("inf") else None,
        "usage": _usage(len(score.token_ids), 0),
    }


def _embed(model: Model, settings: Settings, entry: NativeEntry) -> dict[str, Any]:
    states = model.hidden_states(entry.read(settings)[0], model.info["block_count"])  # [T, D], before the last norm
    mean = states.mean(axis=0, dtype=np.float64).astype(np.float32)
    return {"embedding": _floats(mean), "usage": _usage(len(states), 0)}


_OUTPUTS: dict[str, Callable[[Model, Settings, NativeEntry], dict[str, Any]]] = {
    "generate": _generate,
    "score": _score,
    "embed": _embed,
}


def _logprobs(**fields: list[TokenLogprob] | None) -> dict[str, Any]:
    return {name: [asdict(token) for token in tokens] for name, tokens in fields.items() if tokens is not None}


def _usage(n_prompt: int, n_completion: int) -> dict[str, int]:
    return {"prompt_tokens": n_prompt, "completion_tokens": n_completion, "total_tokens": n_prompt + n_completion}


def _floats(values: NDArray[np.float32]) -> list[float]:
    """float32 as the doubles with the shortest decimals that read back as the same float32."""
    return [float(str(value)) for value in values]
