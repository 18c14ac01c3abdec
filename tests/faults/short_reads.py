"""Reads that give fewer bytes than asked for: python short_reads.py FOLDER, with the shim loaded.

A model, a saved state, the input and output of a batch job: the same results as without. Prints how many reads were
cut.
"""

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "python")]

import numpy as np  # noqa: E402
from batch_jobs import mixed_lines, records, run_job, write_lines  # noqa: E402
from injected import Faults, Kind  # noqa: E402
from toy_models import concatenating, write_model  # noqa: E402

import fixmin_cpp  # noqa: E402


def main() -> None:
    folder, faults = Path(sys.argv[1]), Faults()
    faults.watch(folder)
    path = write_model(folder / "toy.gguf", concatenating(), context_length=128)
    learned = write_model(folder / "learned.gguf", concatenating(), context_length=128, code_kind="learned")
    source = write_lines(folder / "in.jsonl", mixed_lines(20))
    text = "the abc " * 12

    def work(name: str) -> tuple:
        logits = []
        for file in (path, learned):
            with fixmin_cpp.Model(file, n_threads=1) as model:
                logits.append(model.logits(text))
                if not (folder / f"{file.stem}.state").exists():
                    model.save_state(folder / f"{file.stem}.state", text)
                model.clear_prefix_cache()
                assert len(model.load_state(folder / f"{file.stem}.state"))
                logits.append(model.logits(text))
        run_job(path, source, folder / f"{name}.jsonl")
        return logits, records(folder / f"{name}.jsonl")

    want_logits, want_records = work("whole")
    n_cut = 0
    for most in (1, 1000):
        with faults.at(Kind.READING, most):
            logits, lines = work(f"cut{most}")
        n_cut += faults.calls(Kind.READING)
        assert all(np.array_equal(a, b) for a, b in zip(logits, want_logits, strict=True))
        assert lines == want_records
    print(n_cut)


if __name__ == "__main__":
    main()
