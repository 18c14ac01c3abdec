"""`fixmin run` without a prompt: a text on the terminal that one writes in turns with the model."""

import json
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import Completer, WordCompleter
from prompt_toolkit.history import FileHistory, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.shortcuts import CompleteStyle

from . import cli_output as output
from .cli_options import unescape
from .errors import ArgumentError, ContextLengthError, FixminError
from .inspect import printable
from .sampling_fields import FIELDS, Breakers, Choices, Text, Texts

__all__ = ["Session", "shown"]

_N_PROBS = 10  # tokens that /probs shows
_SETTINGS = tuple(name for name in FIELDS if name not in ("logprobs", "prompt_logprobs"))  # which nothing would show
_TEXTS = (Text, Texts, Choices, Breakers, Any)  # types of settings whose values are taken as they are typed
_HELP = """\
A base model continues text: what you type is added to the text on a line of its own, or, if it begins with a space, on
the line that is there, and the model goes on.
Enter sends; Alt-Enter, or Escape and Enter, begins a new line; an empty line lets the model go on.
Ctrl-C stops the model; Ctrl-D, or /bye, ends the session.

/set NAME VALUE   a setting of generation, such as /set temperature 0.8; /set shows them, /set NAME its default
/codes TEXT       the tokens of a text and their codes
/probs [TEXT]     the most probable next tokens, of the text so far or of another one
/text             the text so far
/reset            an empty text
/info             the model
"""


class Session:
    """A text that grows by what is typed and by what the model adds; as token ids, so that nothing is read twice."""

    def __init__(self, model: Any, arguments: Mapping[str, Any], *, color: bool, escape: bool, quiet: bool) -> None:
        self._model = model
        self._arguments = dict(arguments)
        self._color, self._escape, self._quiet = color, escape, quiet
        self._ids: list[int] = []
        self._commands: dict[str, Callable[[str], object]] = {
            "/set": self._set,
            "/codes": self._codes,
            "/probs": self._probs,
            "/text": lambda rest: self._say(self._model.decode(self._ids) if self._ids else "(empty)"),
            "/reset": lambda rest: self._ids.clear(),
            "/info": lambda rest: self._info(),
            "/help": lambda rest: self._say(_HELP),
        }

    # --- the terminal ---------------------------------------------------------------------------------------------

    def run(self, history: Path | None = None, first: str | None = None) -> None:
        """Reads lines until Ctrl-D. history: a file of what was typed. first: a prompt to begin with."""
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # any number of times
        self._say("A base model: it continues what you type. /help says more.")
        try:
            asking: PromptSession[str] = PromptSession(
                history=_history(history),
                completer=self._completer(),
                complete_while_typing=False,
                complete_style=CompleteStyle.READLINE_LIKE,  # needs no room below the line
                key_bindings=_keys(),
            )
            if first is not None:
                self._turn(first)
            while True:
                try:
                    line = asking.prompt("> ")
                except KeyboardInterrupt:
                    self._say("(Ctrl-D, or /bye, ends the session)")
                    continue
                except EOFError:
                    return
                if line.strip() in ("/bye", "/exit", "/quit"):
                    return
                self._turn(line)
        finally:
            signal.signal(signal.SIGINT, before)

    def _turn(self, line: str) -> None:
        """One input: nothing that is wrong with it ends the session."""
        try:
            self.take(line)
        except KeyboardInterrupt:
            self._say("")
        except ContextLengthError as error:
            output.note(f"error: {error}; /reset begins a new text", "bold red")
        except (FixminError, ValueError, TypeError, MemoryError) as error:
            output.note(f"error: {printable(' '.join(str(error).split()))}", "bold red")

    def _completer(self) -> Completer:
        names = [f"/set {name}" for name in _SETTINGS]
        words = [*self._commands, "/bye", *names]
        return WordCompleter(words, sentence=True)

    def _say(self, text: str) -> None:
        output.write(text.rstrip("\n") + "\n")

    # --- what lines do --------------------------------------------------------------------------------------------

    def take(self, line: str) -> None:
        """A line: a command, or text to continue. FixminError, ValueError: what is wrong with it."""
        name, _, rest = line.strip().partition(" ")
        name = name.lower()
        if re.fullmatch(r"/[a-z]+", name):
            if name not in self._commands:
                raise ArgumentError(f"there is no command {name}: /help lists them")
            self._commands[name](rest.strip())
        else:
            self._continue(unescape(line) if self._escape else line)

    def _continue(self, text: str) -> None:
        if not text and not self._ids:
            return
        if text and self._ids and text[0] != " " and not self._model.decode(self._ids).endswith("\n"):
            text = "\n" + text
        new = self._model.encode(text, parse_special=self._arguments.get("parse_special", True)) if text else []
        ids = self._ids + new
        with self._model.stream(ids, **self._arguments) as pieces:
            try:
                for piece in pieces:
                    output.write(output.painted(shown(piece.text), self._color))
            except KeyboardInterrupt:
                pieces.close()
            finally:
                completion = pieces.completion
                if completion is not None:  # also of what Ctrl-C has stopped
                    self._ids = ids + completion.token_ids
        self._say("")
        if completion is not None and not self._quiet:
            ends = {"length": "the limit of new tokens: an empty line goes on", "cancelled": "stopped"}
            timings = completion.timings
            how = ends.get(completion.finish_reason, completion.finish_reason)
            if completion.finish_reason == "length" and len(self._ids) >= self._model.n_ctx:
                how = "the context is full: /reset begins a new text"
            n = timings.n_generated
            output.note(f"[{n} token{'s' * (n != 1)}, {timings.decode_tok_s:,.1f}/s; {how}]")

    def _set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        name = name.lstrip("-").replace("-", "_")
        name = {"temp": "temperature", "n": "max_new_tokens"}.get(name, name)
        if not name:
            given = [f"{key} = {value!r}" for key, value in self._arguments.items()]
            self._say("\n".join(given) or "nothing is set: docs/sampling.md has the defaults")
            return
        if name not in _SETTINGS:
            raise ArgumentError(f"there is no setting {name!r}: one of {', '.join(_SETTINGS)}")
        if not value.strip():
            self._arguments.pop(name, None)
            self._say(f"{name} is what it is by default, {FIELDS[name].default!r}")
            return
        read: Any = unescape(value.strip()) if self._escape else value.strip()
        if FIELDS[name].kind not in _TEXTS or read.startswith("["):
            read = _value(read)
        trial = {**self._arguments, name: read}
        self._model.prepare(self._ids or [0], trial)  # it is refused here, and not with the next text
        self._arguments = trial
        self._say(f"{name} = {read!r}")

    def _codes(self, text: str) -> None:
        ids = self._model.encode(unescape(text) if self._escape else text)
        if not ids:
            raise ArgumentError("give a text: /codes Paris")
        rows = self._model.codes(ids)
        lines = [f"    id  {'code (bit 0 first)':{max(rows.shape[1], 18)}}  token"]
        for i, row in zip(ids, rows, strict=True):
            lines.append(f"{i:6}  {''.join(map(str, row)):18}  {self._token(i)}")
        self._say("\n".join(lines))

    def _probs(self, text: str) -> None:
        ids = self._model.encode(unescape(text) if self._escape else text) if text else self._ids
        if not ids:
            raise ArgumentError("the text is empty: type one, or /probs TEXT")
        p = _softmax(self._model.logits(ids, last=True))
        best = np.argsort(-p, kind="stable")[:_N_PROBS]
        self._say("\n".join(f"{p[i]:8.2%} {int(i):6}  {self._token(int(i))}" for i in best))

    def _token(self, token_id: int) -> str:
        return printable(repr(self._model.require_tokenizer().token_piece(token_id)))

    def _info(self) -> None:
        info = self._model.info
        used = f"{len(self._ids)} of {self._model.n_ctx} positions hold text"
        self._say("\n".join(f"{key}: {printable(str(value))}" for key, value in info.items()) + f"\n{used}")


def shown(text: str) -> str:
    """Text of a model as a terminal may have it: control characters but line ends and tabs as escapes."""
    return "".join(c if c in "\n\t" or c.isprintable() else printable(c) for c in text)


def _softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    e = np.exp(logits.astype(np.float64) - logits.max())
    return np.asarray(e / e.sum())


def _value(text: str) -> Any:
    """As JSON, or the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(text, text)


def _history(path: Path | None) -> FileHistory | InMemoryHistory:
    """Readable by its owner alone."""
    if path is None:
        return InMemoryHistory()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600))
    except OSError as error:
        print(f"no history is kept: {error}", file=sys.stderr)
        return InMemoryHistory()
    return FileHistory(str(path))


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    return keys
