"""Every write, fsync, rename and truncation of a piece of work fails in turn, or is the last before SIGKILL.

    python files.py WORK FOLDER [STEP]     with the shim loaded; every STEP-th call only (1: all)

WORK is quantize, convert, state, batch, imatrix, export or rewrap. After each fault: an error that says what, or
death; under the name of the output the old file, the whole new one or nothing; and the same work done again gives the
right output. The process that has imported everything is forked for each of them. Prints what was done as JSON.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "python"), str(TESTS / "convert")]

from injected import Action, Faults, Kind  # noqa: E402
from toy_models import concatenating, write_model  # noqa: E402

import fixmin_cpp  # noqa: E402
from fixmin_cpp import _core  # noqa: E402

CLEAR = (OSError, MemoryError, fixmin_cpp.FixminError)
#: What a call that fails says.
ERRORS = {"disk full": (Action.FAIL_ON, errno.ENOSPC), "I/O error": (Action.FAIL_ONCE, errno.EIO)}
DEATHS = {"killed before": Action.DIE_BEFORE, "killed within": Action.DIE_WITHIN, "killed after": Action.DIE_AFTER}

DONE, REFUSED, WRONG = 0, 3, 4


@dataclass
class Work:
    """Something that writes files below a folder."""

    run: Callable[[Path], object]
    outputs: tuple[str, ...]  # what is there when it is done
    fingerprint: Callable[[Path], Any]  # of the outputs, when it is done; the same every time
    check_after: Callable[[Path, Any], None]  # what is there after a fault, given the fingerprint of what is right


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def files_of(folder: Path, *names: str) -> Any:
    """Contents of files and folders below `folder`, those that are there."""
    found = {}
    for name in names:
        path = folder / name
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                found[str(file.relative_to(folder))] = sha256(file)
    return found


def whole_or_nothing(*names: str) -> Callable[[Path, Any], None]:
    """Each output is right, or not there."""

    def check(folder: Path, right: Any) -> None:
        there = files_of(folder, *names)
        assert not there or there == right, (sorted(there), sorted(right))

    return check


def in_child(work: Callable[[], object], prepare: Callable[[], None]) -> int:
    """Exit status of a forked process that does the work: DONE, REFUSED with a clear error, WRONG, or -SIGKILL."""
    child = os.fork()
    if child == 0:
        status = WRONG
        try:
            prepare()
            work()
            status = DONE
        except CLEAR as error:
            status = REFUSED if str(error) else WRONG
            with open(os.environ["FAULT_LOG"], "a") as log:
                print(f"{type(error).__name__}: {error}", file=log)
        except BaseException as error:
            import traceback

            traceback.print_exception(error)
        finally:
            os._exit(status)
    deadline = time.monotonic() + 120
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGABRT)
            raise AssertionError("a fault makes it hang")
        time.sleep(0.002)
    return os.waitstatus_to_exitcode(ended[1])


def sweep(work: Work, root: Path, faults: Faults, step: int) -> dict[str, Any]:
    """All faults of one piece of work."""
    counts: dict[str, Any] = {}
    right_folder = root / "right"
    right_folder.mkdir()
    assert in_child(lambda: work.run(right_folder), lambda: None) == DONE
    right = work.fingerprint(right_folder)
    assert right, right_folder
    for name, (action, error) in [*ERRORS.items(), *((name, (action, 0)) for name, action in DEATHS.items())]:
        n, n_faults = 1, 0
        while True:
            folder = root / "work"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            counter = root / "counter"

            def prepare(at: int = n, action: Action = action, error: int = error, folder: Path = folder) -> None:
                faults.watch(folder)
                faults.arm(Kind.FILE, at, action, error)

            def run(folder: Path = folder, counter: Path = counter) -> None:
                try:
                    work.run(folder)
                finally:
                    calls = faults.calls(Kind.FILE)
                    faults.arm(Kind.FILE, 0)
                    counter.write_text(str(calls))

            counter.unlink(missing_ok=True)
            status = in_child(run, prepare)
            died = status == -signal.SIGKILL
            assert status in (DONE, REFUSED) or (died and name in DEATHS), (name, n, status)
            hit = died or int(counter.read_text()) >= n
            if hit and not died and name == "disk full":
                assert status == REFUSED, f"{name}, call {n}: done without a word"
            work.check_after(folder, right)
            if hit:
                n_faults += 1
            # Once more without a fault, on what is there now.
            assert in_child(lambda: work.run(folder), lambda: None) == DONE, (name, n)  # noqa: B023
            assert work.fingerprint(folder) == right, (name, n)
            left = {path.name for path in folder.iterdir()} - set(work.outputs)
            assert not left, (name, n, left)
            if not hit:
                break
            n += step
        counts[name] = n_faults
    return counts


# --- what is done ----------------------------------------------------------------------------------------------------


def quantize(root: Path) -> Work:
    from fixmin_cpp.quantization.requantize import quantize

    source = write_model(root / "f32.gguf", concatenating(), context_length=64)
    names = ("q8_0.gguf",)
    run = lambda folder: quantize(source, folder / "q8_0.gguf", "q8_0", n_threads=1)  # noqa: E731
    return Work(run, names, lambda folder: files_of(folder, *names), whole_or_nothing(*names))


def convert(root: Path) -> Work:
    from spec_factory import make_reference, save_checkpoint

    from fixmin_cpp.convert.convert import convert

    checkpoint = save_checkpoint(make_reference(), root / "checkpoint")
    names = ("q8_0.gguf",)

    def run(folder: Path) -> None:
        import torch

        torch.set_num_threads(1)
        convert(checkpoint, folder / "q8_0.gguf", "q8_0", n_threads=1)

    return Work(run, names, lambda folder: _without_date(folder / "q8_0.gguf"), _converted)


def _without_date(path: Path) -> Any:
    """Tensors of a GGUF file: its metadata say when it was made."""
    if not path.exists():
        return None
    file = _core.GgufFile(path)
    return {one.name: hashlib.sha256(file.tensor_data(one.name).tobytes()).hexdigest() for one in file.tensors}


def _converted(folder: Path, right: Any) -> None:
    assert _without_date(folder / "q8_0.gguf") in (None, right)


def state(root: Path) -> Work:
    path = write_model(root / "toy.gguf", concatenating(), context_length=128)
    names = ("state",)

    def run(folder: Path) -> None:
        with fixmin_cpp.Model(path, n_threads=1) as model:
            model.save_state(folder / "state", "the abc " * 10)

    return Work(run, names, lambda folder: files_of(folder, *names), whole_or_nothing(*names))


def imatrix(root: Path) -> Work:
    from fixmin_cpp.quantization.imatrix import collect

    path = write_model(root / "toy.gguf", concatenating(), context_length=64)
    names = ("imatrix.gguf",)

    def run(folder: Path) -> None:
        with fixmin_cpp.Model(path, n_threads=1) as model:
            collect(model, "the abc Paris " * 20, folder / "imatrix.gguf")

    return Work(run, names, lambda folder: files_of(folder, *names), whole_or_nothing(*names))


def batch(root: Path) -> Work:
    from batch_jobs import mixed_lines, records, run_job, write_lines

    path = write_model(root / "toy.gguf", concatenating(), context_length=64)
    source = write_lines(root / "in.jsonl", mixed_lines(12))
    names = ("out.jsonl", "out.jsonl.done")

    def whole_records(folder: Path) -> list[Any]:
        """Lines that are complete."""
        out = folder / "out.jsonl"
        whole = out.read_bytes().rpartition(b"\n")[0] if out.exists() else b""
        (folder / "whole").write_bytes(whole + b"\n" if whole else b"")
        try:
            return records(folder / "whole")
        finally:
            (folder / "whole").unlink()

    def check(folder: Path, right: Any) -> None:
        there = whole_records(folder)
        assert there == right[: len(there)]
        if (folder / "out.jsonl.done").exists():
            assert there == right

    return Work(lambda folder: run_job(path, source, folder / "out.jsonl"), names, whole_records, check)


def rewrap(root: Path) -> Work:
    from spec_factory import make_reference, save_checkpoint

    from fixmin_cpp.convert.rewrap import rewrap

    checkpoint = save_checkpoint(make_reference(), root / "checkpoint")

    def run(folder: Path) -> None:
        import torch

        torch.set_num_threads(1)
        for left in folder.glob(".new.*"):  # of a process that was killed
            shutil.rmtree(left)
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(folder / "new")
        rewrap(checkpoint, folder / "new")

    return Work(run, ("new",), lambda folder: files_of(folder, "new"), whole_or_nothing("new"))


def export(root: Path) -> Work:
    from fixmin_cpp.export.llama_cpp import export

    source = write_model(root / "f32.gguf", concatenating(), context_length=64)
    names = ("llama.gguf",)

    def run(folder: Path) -> None:
        export(source, folder / "llama.gguf")

    return Work(run, names, lambda folder: files_of(folder, *names), whole_or_nothing(*names))


WORKS = {
    "quantize": quantize,
    "convert": convert,
    "state": state,
    "imatrix": imatrix,
    "batch": batch,
    "rewrap": rewrap,
    "export": export,
}


def main() -> None:
    name, root, step = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 1
    os.environ.setdefault("FAULT_LOG", str(root / "errors"))
    inputs = root / "inputs"
    inputs.mkdir()
    print(json.dumps({name: sweep(WORKS[name](inputs), root, Faults(), step)}))


if __name__ == "__main__":
    main()
