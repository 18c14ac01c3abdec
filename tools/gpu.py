"""Everything that only a GPU can show, in one run of at most nine minutes: a report as JSON and Markdown.

    tools/gpu.sh [OUT]          (or: make gpu)

Builds the package in an environment of its own from the wheels in build/gpu/wheels (`tools/gpu.sh --wheels` fetches
them where there is a network), then, in this order: the same bits on CPU and GPU for every weight type, option and
cache, twice; NVIDIA's sanitizers on a small model; a hundred mixed requests; files of the published size: bits,
`fixmin bench`, PyTorch beside it; a profile. A step that fails or has no time left says so in the report, and the
others go on. Ends with 1 if a bit differed or a step failed.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BUDGET_S = 525.0  # of the nine minutes: a report has to be written, too

SMALL = """
import sys
sys.path.insert(0, "tests")
from gguf_factory import make_model
import fixmin_cpp
path = make_model(sys.argv[1], vocab_size=100, weight_type="Q8_0")
with fixmin_cpp.Model(path, device="cuda", n_threads=1) as model:
    print(model.generate([1, 2, 3], max_new_tokens=20).token_ids, model.logits(list(range(40))).sum())
"""

MIXED = """
import json, sys, random
sys.path.insert(0, "tests")
from concurrent.futures import ThreadPoolExecutor
import fixmin_cpp
def requests(vocab_size):
    rng = random.Random(4)
    for i in range(100):
        prompt = [rng.randrange(vocab_size) for _ in range(rng.choice([1, 3, 30, 200]))]
        yield prompt, dict(max_new_tokens=rng.choice([1, 8, 40]), temperature=rng.choice([0, 0.7, 1.3]), seed=i,
                           top_k=rng.choice([0, 40]), prompt_lookup_num_tokens=rng.choice([0, 4]), logprobs=2)
def answers(device):
    with fixmin_cpp.Model(sys.argv[1], device=device, n_kv=20000) as model, ThreadPoolExecutor(32) as pool:
        done = [pool.submit(model.generate, p, **o) for p, o in requests(model.vocab_size)]
        return [(c.result().token_ids, [t.logprob for t in c.result().logprobs]) for c in done]
gpu = answers("cuda")
print(json.dumps({"requests": len(gpu), "equal": gpu == answers("cpu")}))
"""

PYTORCH = """
import json, sys, time, torch
sys.path.insert(0, ".")
from transformers import AutoModelForCausalLM, StaticCache
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.bfloat16).cuda().eval()
def timed(step, n):
    step(); torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(n):
        step()
    torch.cuda.synchronize()
    return n / (time.perf_counter() - begin)
ids = torch.randint(0, 65536, (1, 512), device="cuda")
found = {}
with torch.inference_mode():
    found["prefill_tok_s"] = 512 * timed(lambda: model(ids), 10)
    cache = model(ids[:, :16], use_cache=True).past_key_values
    found["decode_tok_s"] = timed(lambda: model(ids[:, :1], past_key_values=cache, use_cache=True), 60)
print(json.dumps(found))
"""


class Report:
    def __init__(self, out: Path) -> None:
        self.out = out
        self.begin = time.monotonic()
        self.steps: dict[str, dict[str, Any]] = {}

    def left(self) -> float:
        return BUDGET_S - (time.monotonic() - self.begin)

    def step(self, name: str, what: Callable[[], Any], needs_s: float = 5.0) -> Any:
        """What it found; None if it failed or there is no time for it."""
        began, found = time.monotonic(), None
        if self.left() < needs_s:
            self.steps[name] = {"skipped": f"{self.left():.0f} s left"}
            return None
        try:
            found = what()
            self.steps[name] = {"found": found}
        except Exception as error:
            self.steps[name] = {"failed": f"{type(error).__name__}: {str(error)[-3000:]}"}
        self.steps[name]["seconds"] = round(time.monotonic() - began, 1)
        print(name, json.dumps(self.steps[name])[:300], flush=True)
        self.write()
        return found

    def write(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "gpu.json").write_text(json.dumps(self.steps, indent=1) + "\n")
        lines = ["# What a GPU showed", "", f"Made by `make gpu`, {time.strftime('%d %B %Y')}.", ""]
        for name, step in self.steps.items():
            lines += [f"## {name}", "", "```", json.dumps(step, indent=1), "```", ""]
        (self.out / "gpu.md").write_text("\n".join(lines))


class Machine:
    def __init__(self, report: Report, work: Path, device: str) -> None:
        self.report, self.work, self.device = report, work, device
        self.python = work / "venv" / "bin" / "python"

    def run(self, *command: object, limit_s: float = 300.0, env: dict[str, str] | None = None) -> str:
        done = subprocess.run(
            [str(part) for part in command],
            cwd=ROOT,
            env=os.environ | {"FIXMIN_DEVICE": self.device} | (env or {}),
            capture_output=True,
            text=True,
            timeout=max(1.0, min(limit_s, self.report.left())),
        )
        if done.returncode != 0:
            raise RuntimeError(f"ended with {done.returncode}: {done.stdout[-1500:]}\n{done.stderr[-1500:]}")
        return done.stdout

    def json(self, *command: object, **more: Any) -> Any:
        return json.loads(self.run(self.python, *command, **more).strip().split("\n")[-1])

    def build(self) -> str:
        self.run(sys.executable, "-m", "venv", "--system-site-packages", "--clear", self.work / "venv")
        pip = (self.python, "-m", "pip", "install", "--quiet", "--no-index", "--find-links", ROOT / "build/gpu/wheels")
        self.run(*pip, "scikit-build-core", "pybind11", "cmake", "ninja", "gguf", "ggml-python", "typer", "rich")
        bin_first = {"PATH": f"{self.python.parent}:{os.environ['PATH']}"}
        self.run(*pip, "--no-build-isolation", "--no-deps", "-C", "cmake.define.FIXMIN_CUDA=ON", ".", env=bin_first)
        return self.run(self.python, "-m", "fixmin_cpp", "info", "--json")

    def bits(self) -> dict[str, Any]:
        """Every case on both devices, in two processes."""
        folder = self.work / "bits"
        folder.mkdir(exist_ok=True)
        first, again = (
            self.json("tests/cuda/bits.py", folder, env={"PYTHONPATH": str(ROOT / "tests")}) for _ in range(2)
        )
        differ = [f"{n}, {how}" for n, one in first.items() for how, b in one["cuda"].items() if b != one["cpu"]]
        if differ or first != again:
            raise RuntimeError(f"bits differ from the CPU's: {differ}; twice the same: {first == again}")
        return {"cases": len(first), "computed on the GPU": sum(len(one["cuda"]) for one in first.values())}

    def sanitizer(self, tool: str) -> str:
        program = self.work / "small.py"
        program.write_text(SMALL)
        checker = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--target-processes", "all")
        out = self.run(*checker, self.python, program, self.work / "small.gguf", limit_s=90)
        return next(line for line in out.split("\n")[::-1] if "ERROR SUMMARY" in line)

    def mixed(self) -> dict[str, Any]:
        found = self.json("-c", MIXED, self.work / "full-q8_0.gguf")
        if not found["equal"]:
            raise RuntimeError("answers differ from the CPU's")
        return found

    def full_size(self, *kinds: str) -> list[str]:
        checkpoint = self.work / "full"
        self.run(self.python, "bench/make_checkpoint.py", checkpoint, "--variant", "affine")
        for kind in kinds:
            command = ("-m", "fixmin_cpp", "convert", checkpoint, "-o", self.work / f"full-{kind}.gguf")
            self.run(self.python, *command, "--outtype", kind, env={"FIXMIN_DEVICE": "cpu"})
        return list(kinds)

    def full_bits(self, kind: str) -> dict[str, Any]:
        program = (
            "import hashlib, json, sys, fixmin_cpp, random\n"
            "ids = [random.Random(1).randrange(65536) for _ in range(40)]\n"
            "found = {}\n"
            "for device in ('cpu', sys.argv[2]):\n"
            "    with fixmin_cpp.Model(sys.argv[1], device=device, n_ctx=64) as model:\n"
            "        found[device] = hashlib.sha256(model.logits(ids).tobytes()).hexdigest()[:16]\n"
            "print(json.dumps(found))\n"
        )
        found = self.json("-c", program, self.work / f"full-{kind}.gguf", self.device)
        if len(set(found.values())) != 1:
            raise RuntimeError(f"bits differ: {found}")
        return found

    def bench(self, kind: str) -> Any:
        command = ("-m", "fixmin_cpp", "bench", "-m", self.work / f"full-{kind}.gguf", "--json", "-r", "3")
        return json.loads(self.run(self.python, *command))

    def profile(self) -> str:
        command = ("nsys", "profile", "--stats=true", "--force-overwrite=true", "-o", self.work / "profile")
        bench = ("-m", "fixmin_cpp", "bench", "-m", self.work / "full-q8_0.gguf", "-r", "1")
        out = self.run(*command, self.python, *bench, limit_s=60)
        at = out.find("cuda_gpu_kern_sum")
        return out[at : at + 4000] if at >= 0 else out[-4000:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=Path(os.environ.get("OUT", "out/gpu")))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "gpu" / "work")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    report = Report(arguments.out)
    machine = Machine(report, arguments.work, arguments.device)
    step = report.step
    if step("build", machine.build) is None:
        return 1
    step("same bits, small models", machine.bits)
    if shutil.which("compute-sanitizer"):
        for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
            step(tool, lambda tool=tool: machine.sanitizer(tool), needs_s=60)
    kinds = step("files of the published size", lambda: machine.full_size("q8_0", "q4_0"), needs_s=90) or []
    for kind in kinds:
        step(f"same bits, published size, {kind}", lambda kind=kind: machine.full_bits(kind), needs_s=30)
    for kind in kinds:
        step(f"fixmin bench, {kind}", lambda kind=kind: machine.bench(kind), needs_s=30)
    if kinds:
        step("100 mixed requests, q8_0", machine.mixed, needs_s=60)
        step("PyTorch, bfloat16, eager", lambda: machine.json("-c", PYTORCH, machine.work / "full"), needs_s=60)
        if shutil.which("nsys"):
            step("profile, q8_0", machine.profile, needs_s=60)
    report.write()
    return int(any("failed" in one for one in report.steps.values()))


if __name__ == "__main__":
    sys.exit(main())
