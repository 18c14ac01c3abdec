"""The session on the terminal that `fixmin run` holds without a prompt."""

import os
import pty
import re
import select
import sys
import time

import numpy as np
import pytest

import fixmin_cpp
from fixmin_cpp.cli_session import Session, shown

TIMEOUT = 120


def session(model, arguments=None, **how) -> Session:
    return Session(model, arguments or {"max_new_tokens": 4}, **{"color": False, "escape": True, "quiet": True, **how})


def test_the_text_grows(letters_model, capsysbinary):
    """What is typed goes below what is there, as text that is read whole would be; an empty line goes on."""
    one = session(letters_model)
    one.take("ab")
    first = capsysbinary.readouterr().out.decode()
    answer = letters_model.generate("ab", max_new_tokens=4)
    assert first == shown(answer.text) + "\n"
    one.take("")
    on = letters_model.generate(letters_model.encode("ab") + answer.token_ids, max_new_tokens=4)
    assert capsysbinary.readouterr().out.decode() == shown(on.text) + "\n"
    one.take("c\\td")
    capsysbinary.readouterr()
    one.take("/text")
    before = letters_model.decode(letters_model.encode("ab") + answer.token_ids + on.token_ids)
    text = capsysbinary.readouterr().out.decode()
    assert text.startswith(before + letters_model.decode(letters_model.encode("\nc\td")))
    one.take("/reset")
    one.take("/text")
    assert capsysbinary.readouterr().out == b"(empty)\n"
    one.take("ab")
    one.take(" cd")  # which goes on in the line
    one.take("/text")
    assert b"\n" not in capsysbinary.readouterr().out.splitlines(keepends=True)[-1][:-1]


def test_a_full_context_is_said(letters_model, capfd):
    one = session(letters_model, {"max_new_tokens": -1, "ignore_eos": True}, quiet=False)
    one.take("ab")
    assert "the context is full: /reset begins a new text" in capfd.readouterr().err


def test_settings(letters_model, capsysbinary):
    one = session(letters_model, {"temperature": 0.5})
    one.take("/set seed 7")
    one.take("/set top-k 3")
    one.take("/set stop \\n")
    one.take("/set")
    assert capsysbinary.readouterr().out.decode().splitlines()[-4:] == [
        "temperature = 0.5",
        "seed = 7",
        "top_k = 3",
        r"stop = '\n'",
    ]
    one.take("/set temperature")
    assert b"temperature is what it is by default, 0.0" in capsysbinary.readouterr().out
    for line, message in {
        "/set nothing 3": "there is no setting 'nothing'",
        "/set top_k x": "top_k must be an integer",
        "/set temperature -1": "temperature must be",
        "/set logprobs 3": "there is no setting 'logprobs'",
        "/sett x": "there is no command /sett",
    }.items():
        with pytest.raises(fixmin_cpp.FixminError, match=message):
            one.take(line)
    one.take("/set stop 5")  # a text, whatever it looks like
    assert b"stop = '5'" in capsysbinary.readouterr().out
    one.take("/set stop \\n")
    one.take("/set regex [a-e]+")
    with pytest.raises(fixmin_cpp.FixminError, match="only one of"):
        one.take("/set grammar x")  # which is then not set
    one.take("/set regex")
    capsysbinary.readouterr()
    one.take("ab")  # they count
    wanted = letters_model.generate("ab", seed=7, top_k=3, stop="\n")
    assert capsysbinary.readouterr().out.decode() == shown(wanted.text) + "\n"


def test_codes_and_probabilities(letters_model, capsysbinary):
    one = session(letters_model)
    one.take("/codes ab")
    lines = capsysbinary.readouterr().out.decode().splitlines()[1:]
    ids = letters_model.encode("ab")
    assert [int(line.split()[0]) for line in lines] == ids
    assert [line.split()[1] for line in lines] == ["".join(map(str, row)) for row in letters_model.codes(ids)]
    one.take("/probs ab")
    logits = letters_model.logits("ab", last=True).astype(np.float64)
    p = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    rows = [line.split(maxsplit=2) for line in capsysbinary.readouterr().out.decode().splitlines()]
    assert [int(row[1]) for row in rows] == np.argsort(-p, kind="stable")[:10].tolist()
    assert [float(row[0].rstrip("%")) for row in rows] == pytest.approx(np.sort(p)[::-1][:10] * 100, abs=0.006)
    for empty in ("/probs", "/codes"):
        with pytest.raises(fixmin_cpp.ArgumentError):
            one.take(empty)


def test_what_a_terminal_does_not_get():
    assert shown("a\x1b[2J\tb\n\u202ec\x07é文") == "a\\x1b[2J\tb\n\\u202ec\\x07é文"


def test_colour(letters_model, capsysbinary):
    some = {"max_new_tokens": 4, "allowed_ids": letters_model.encode("abcde")}
    session(letters_model, some, color=True).take("ab")
    text = letters_model.generate("ab", **some).text
    out = capsysbinary.readouterr().out.decode()
    assert out.startswith("\x1b[32m")
    assert re.sub(r"\x1b\[\d+m", "", out) == shown(text) + "\n"


class Terminal:
    """`fixmin run` on a terminal."""

    def __init__(self, *arguments: object, **variables: str) -> None:
        self.pid, self._screen = pty.fork()
        if self.pid == 0:
            variables = {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", **variables}
            command = [sys.executable, "-m", "fixmin_cpp.cli", "run", *map(str, arguments)]
            os.execve(command[0], command, {**os.environ, **variables})
        self.shown = ""

    def until(self, text: str) -> str:
        """What is shown until there is a text; from the next call on, what comes after."""
        deadline = time.monotonic() + TIMEOUT
        while text not in self.shown:
            assert time.monotonic() < deadline, self.shown
            try:
                if select.select([self._screen], [], [], 1)[0]:
                    self.shown += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", os.read(self._screen, 4096).decode())
            except OSError:  # Linux: the program has ended
                break
        before, _, self.shown = self.shown.partition(text)
        return before

    def type(self, text: str) -> None:
        os.write(self._screen, text.encode())

    def end(self) -> int:
        self.until("never shown")
        os.close(self._screen)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.mark.slow
def test_on_a_terminal(long_model_path, model_path, tmp_path):
    cache = tmp_path / "cache"
    terminal = Terminal(long_model_path, "-n", "-1", "--no-color", FIXMIN_CACHE=str(cache))
    assert "it continues what you type" in terminal.until("more.")
    terminal.until(">")
    terminal.type("abc\r")
    terminal.until("abc\r")
    time.sleep(1)
    terminal.type("\x03")  # an answer without end
    terminal.until("; stopped]")
    terminal.until(">")
    terminal.type("/set nothing 1\r")
    terminal.until("there is no setting 'nothing'")
    terminal.until("\n>")
    terminal.type("\x03")
    terminal.until("(Ctrl-D, or /bye, ends the session)")
    terminal.type("\x1b[A\x1b[A\r")  # the history: "abc" again
    terminal.until("abc\r")
    time.sleep(0.5)
    terminal.type("\x03")
    terminal.until("; stopped]")
    terminal.until(">")
    terminal.type("\x04")
    assert terminal.end() == 0
    assert "+abc" in (cache / "history").read_text().splitlines()
    assert (cache / "history").stat().st_mode & 0o077 == 0

    first = Terminal(model_path, "ab", "-i", "-n", "3", FIXMIN_CACHE=str(cache))
    first.until("the limit of new tokens: an empty line goes on]")
    first.type("/bye\r")
    assert first.end() == 0


def test_run_without_a_terminal(model_path):
    from fixmin_cli import fixmin

    wanted = fixmin("generate", "-m", model_path, "-p", "ab", "-n", "4", "-q")
    for arguments, stdin in ((["ab"], b""), ([], b"ab\n"), (["-"], b"ab"), (["-f", "-"], b"ab")):
        done = fixmin("run", model_path, *arguments, "-n", "4", "-q", stdin=stdin)
        assert (done.returncode, done.stdout, done.stderr) == (0, wanted.stdout, b"")
    assert fixmin("run", model_path, "ab", "-i").returncode == 2
    painted = fixmin("run", model_path, "ab", "-n", "4", "-q", "--color").stdout
    assert painted.startswith(b"\x1b[32m")
    assert fixmin("run", model_path, "ab", "--n", "2").returncode == 2
    told = fixmin("run", model_path, "ab", "-n", "4").stderr.decode()
    assert re.search(r"^\S+\.gguf: (look [\d.]+ s, )?load [\d.]+ s", told)
