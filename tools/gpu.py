"""Everything that only a GPU can show, in one run of at most nine minutes: a report as JSON and Markdown.

    tools/gpu.sh [OUT]             (or: make gpu)
    tools/gpu.sh --emulated [OUT]  a trial without a GPU: small models, kernels on the emulator

Needs nvcc, python3 with PyTorch and transformers, and, where there is no network, the wheels that
`tools/gpu.sh --wheels` fetched into build/gpu/wheels. What is asked first is done first: build; the same bits on CPU
and GPU for every weight type, option and cache, twice; files of the published size: bits for every chunk and number of
requests, speed beside PyTorch (which has compiled meanwhile); NVIDIA's sanitizers; mixed requests; a profile. A step
that fails or has no time left says so in the report, which is written after each, and the others go on. Ends with 1 if
a bit differed or a step failed.
"""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_report import hottest, last_json, markdown, nanoseconds, ncu_rows, sanitizer_summary

ROOT = Path(__file__).resolve().parents[1]
BUDGET_S = 525.0  # of the nine minutes: a report has to be written, too
TRIAL_SLACK = 10.0  # times as long may everything take in a trial: on a busy machine of few cores
#: What the build and the tests' models need; taken from the machine where it is there.
NEEDED = {
    "scikit_build_core": "scikit-build-core",
    "pybind11": "pybind11",
    "cmake": "cmake",
    "ninja": "ninja",
    "typer": "typer",
    "rich": "rich",
    "tokenizers": "tokenizers",
    "gguf": "gguf",
    "ggml": "ggml-python",
}
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
STEPS = ("graph", "persistent")  # FIXMIN_CUDA_STEP, the default first
METRICS = (
    "gpu__time_duration.sum",
    "launch__registers_per_thread",
    "launch__grid_size",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "dram__bytes_read.sum",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
)


@dataclass(frozen=True)
class Sizes:
    """The model and what is run of it. model: fields of FixMinConfig."""

    model: dict[str, Any]
    depth: int  # tokens before the decoded ones
    new: int
    prefill: tuple[int, ...]
    sequences: int
    context: int
    repeat: int
    most: int  # tokens of a chunk, requests at once, whose bits are compared
    mixed: int  # requests
    bench_on_cpu: bool = False  # an emulated GPU takes minutes for its ceilings


PUBLISHED = Sizes(
    {"code_kind": "affine", "max_position_embeddings": 4096}, 250, 64, (64, 512, 2048), 64, 256, 5, 64, 100
)
SMALL = Sizes(
    {
        "code_kind": "affine",
        "max_position_embeddings": 128,
        "vocab_size": 256,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    },
    *(16, 4, (8, 32), 3, 32, 1, 9, 6, True),
)


class Report:
    def __init__(self, out: Path, sizes: Sizes, trial: bool) -> None:
        self.out, self.sizes, self.trial = out, dataclasses.asdict(sizes), trial
        self.begin, self.slack = time.monotonic(), TRIAL_SLACK if trial else 1.0
        self.steps: dict[str, dict[str, Any]] = {}

    def left(self) -> float:
        return BUDGET_S * self.slack - (time.monotonic() - self.begin)

    def step(self, name: str, what: Callable[[], Any], needs_s: float = 5.0) -> Any:
        """What it found; None if it failed or there is no time for it."""
        began, found = time.monotonic(), None
        if self.left() < needs_s:
            self.steps[name] = {"skipped": f"{self.left():.0f} s left"}
            return None
        try:
            found = what()
            self.steps[name] = {"found": found}
            if isinstance(found, dict) and found.get("differ"):
                self.steps[name]["failed"] = f"bits differ from the CPU's: {found['differ']}"
        except NotThere as error:
            self.steps[name] = {"skipped": str(error)}
        except Exception as error:
            self.steps[name] = {"failed": f"{type(error).__name__}: {str(error)[-3000:]}"}
        self.steps[name]["seconds"] = round(time.monotonic() - began, 1)
        print(f"{time.monotonic() - self.begin:5.0f} s", name, json.dumps(self.steps[name])[:300], flush=True)
        self.write()
        return found

    def write(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "gpu.json").write_text(json.dumps({"sizes": self.sizes, "steps": self.steps}, indent=1) + "\n")
        (self.out / "gpu.md").write_text(markdown(self.steps, self.sizes, self.trial))


class NotThere(Exception):
    """What a step needs is not on this machine."""


class Machine:
    def __init__(self, report: Report, work: Path, device: str) -> None:
        self.report, self.work, self.device, self.trial = report, work, device, report.trial
        self.site = work / "site"  # a virtual environment would hide packages of another one, such as PyTorch
        self.sizes = json.dumps(report.sizes)
        self.running: set[subprocess.Popen[str]] = set()
        self.lock = threading.Lock()

    # --- processes ---------------------------------------------------------------------------------------------------

    def start(self, *command: object, env: dict[str, str] | None = None, **where: Any) -> "subprocess.Popen[str]":
        """A process in a group of its own, which sees the package that was built."""
        paths = os.pathsep.join(filter(None, [str(self.site), os.environ.get("PYTHONPATH")]))
        path = f"{self.site / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/local/cuda/bin"
        base = {k: v for k, v in os.environ.items() if not k.startswith("FIXMIN_")}
        process = subprocess.Popen(
            [str(part) for part in command],
            cwd=ROOT,
            env=base | {"PYTHONPATH": paths, "PATH": path, "PYTHONUNBUFFERED": "1"} | (env or {}),
            text=True,
            start_new_session=True,
            **where,
        )
        with self.lock:
            self.running.add(process)
        return process

    def stop(self, process: "subprocess.Popen[str]") -> None:
        """With everything that it has started; no harm if it has ended."""
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        with self.lock:
            self.running.discard(process)

    def stop_all(self) -> None:
        with self.lock:
            running = list(self.running)
        for process in running:
            self.stop(process)

    def run(self, *command: object, limit_s: float = 120.0, env: dict[str, str] | None = None) -> str:
        """What it printed. RuntimeError if it failed, or was stopped after limit_s or when no time was left."""
        limit_s = max(1.0, min(limit_s * self.report.slack, self.report.left()))
        process = self.start(*command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        why = ""
        try:
            out, err = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            why = f"stopped after {limit_s:.0f} s"
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
        finally:
            self.stop(process)
        if why or process.returncode != 0:
            raise RuntimeError(f"{why or f'ended with {process.returncode}'}: {out[-1500:]}\n{err[-1500:]}")
        return out

    def python(self, *arguments: object, **more: Any) -> str:
        return self.run(sys.executable, *arguments, **more)

    def measured(self, verb: str, path: Path, step: str = STEPS[0], **more: Any) -> Any:
        """What tools/gpu_measure.py finds, with this kind of repeated steps."""
        command = ("tools/gpu_measure.py", verb, path, self.device, self.sizes)
        return last_json(self.python(*command, env={"FIXMIN_CUDA_STEP": step}, **more))

    # --- steps -------------------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, str]:
        def first(*command: str) -> str:
            try:
                return self.run(*command, limit_s=20).strip().split("\n")[-1]
            except (OSError, RuntimeError) as error:
                return f"not there: {str(error)[:100]}"

        query = "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit"
        return {
            "GPU": first("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"),
            "nvcc": first("nvcc", "--version"),
            "PyTorch": first(sys.executable, "-c", "import torch; print(torch.__version__, torch.version.cuda)"),
            "CPU": f"{len(os.sched_getaffinity(0))} usable cores",
            "Python": sys.version.split()[0],
            "commit": first("git", "rev-parse", "--short", "HEAD"),
        }

    def build(self) -> dict[str, Any]:
        pip = (sys.executable, "-m", "pip", "install", "--quiet", "--target", self.site, "--upgrade", "--no-deps")
        missing = [p for m, p in NEEDED.items() if importlib.util.find_spec(m) is None and not shutil.which(m)]
        wheels = sorted((ROOT / "build" / "gpu" / "wheels").glob("*.whl"))
        if missing:
            if not wheels:
                raise RuntimeError(f"{missing} are missing, and there are no wheels: make gpu-wheels")
            wanted = [path for path in wheels if not self.there(path)]
            self.run(*pip, "--no-index", "--no-compile", *wanted)
        options = {"FIXMIN_CUDA": "ON", "FIXMIN_CUDA_ARCHITECTURES": "native"}
        if self.trial:
            options = {"FIXMIN_CUDA": "EMULATED", "FIXMIN_ONLY_ISAS": "scalar"}
        settings = [part for name, value in options.items() for part in ("-C", f"cmake.define.{name}={value}")]
        start = time.monotonic()
        folder = ("-C", f"build-dir={self.work / 'build'}")
        self.run(*pip, "--no-build-isolation", "--no-compile", *settings, *folder, ".", limit_s=300)
        built = time.monotonic() - start
        if any("Redirecting" in type(finder).__name__ for finder in sys.meta_path):
            # This Python has the package as an editable installation, which comes before every path.
            drop = "sys.meta_path[:] = [f for f in sys.meta_path if 'Redirecting' not in type(f).__name__]"
            (self.site / "sitecustomize.py").write_text(f"import sys\n\n{drop}\n")
        info = json.loads(self.python("-m", "fixmin_cpp", "info", "--json"))
        return {"missing": missing, "options": options, "built_s": round(built, 1), "info": info}

    @staticmethod
    def there(wheel: Path) -> bool:
        """Whether the machine has what a wheel brings: never two versions of one package."""
        name = wheel.name.split("-")[0].replace("_", "-")
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return False
        return True

    def small_bits(self) -> dict[str, Any]:
        """Every case on both devices, in two processes at once."""
        folders = [self.work / f"bits{n}" for n in range(2)]
        for folder in folders:
            folder.mkdir(exist_ok=True)
        few = ["Q8_0", "grouped"] if self.trial else []  # an emulated GPU takes minutes for all
        env = {"PYTHONPATH": os.pathsep.join([str(self.site), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])}
        with ThreadPoolExecutor(2) as pool:
            runs = [pool.submit(self.python, "tests/cuda/bits.py", f, *few, env=env) for f in folders]
            first, again = (last_json(run.result())["models"] for run in runs)
        differ = [f"{n}, {how}" for n, one in first.items() for how, b in one["cuda"].items() if b != one["cpu"]]
        if first != again:
            differ.append("a second run")
        computed = sum(len(one["cuda"]) for one in first.values())
        return {"cases": len(first), "computed on the GPU, twice": computed, "differ": differ}

    def sanitizer(self, tool: str, step: str) -> str:
        if not shutil.which("compute-sanitizer", path=os.environ["PATH"] + ":/usr/local/cuda/bin"):
            raise NotThere("compute-sanitizer is not installed")
        checker = ("compute-sanitizer", "--tool", tool, "--target-processes", "all", "--print-limit", "20")
        command = ("tools/gpu_measure.py", "checked", self.work, self.device, self.sizes)
        out = self.run(*checker, sys.executable, *command, limit_s=60, env={"FIXMIN_CUDA_STEP": step})
        n_errors, words = sanitizer_summary(out)
        if n_errors:
            raise RuntimeError(f"{words}\n{out[:2500]}")
        return words

    def checkpoint(self) -> Path:
        """Of the size to be measured, made while something else runs."""
        path, named = self.work / "checkpoint", {"code_kind": "--variant", "max_position_embeddings": "--context"}
        named |= {"vocab_size": "--vocab-size", "hidden_size": "--width", "num_hidden_layers": "--layers"}
        named |= {"num_attention_heads": "--heads"}
        options = [part for key, value in self.report.sizes["model"].items() for part in (named[key], value)]
        self.python("bench/make_checkpoint.py", path, *options, limit_s=200)
        return path

    def convert(self, checkpoint: "Future[Path]", kinds: list[str]) -> str:
        folder = checkpoint.result(timeout=self.report.left())

        def one(kind: str) -> None:
            out = self.work / f"{kind}.gguf"
            self.python("-m", "fixmin_cpp", "convert", folder, "-o", out, "--outtype", kind)

        with ThreadPoolExecutor(len(kinds)) as pool:
            list(pool.map(one, kinds))
        return ", ".join(f"{kind} {(self.work / f'{kind}.gguf').stat().st_size / 1e6:.1f} MB" for kind in kinds)

    def profile(self, path: Path) -> dict[str, Any]:
        """The kernels that take the most time of a prompt and a few steps, and what ncu counts of them."""
        if not shutil.which("ncu", path=os.environ["PATH"] + ":/usr/local/cuda/bin"):
            raise NotThere("ncu is not installed")
        ncu = ("ncu", "--csv", "--print-units", "base", "--clock-control", "none", "--target-processes", "all")
        command = (sys.executable, "tools/gpu_measure.py", "hot", path, self.device, self.sizes)
        rows = ncu_rows(self.run(*ncu, "--metrics", METRICS[0], *command, limit_s=100))
        found = hottest(rows, 3)
        names = "|".join(name for name, _, _ in found)
        few = ("--kernel-name", f"regex:^({names})$", "--launch-count", 12, "--launch-skip", 30)
        try:
            details = ncu_rows(self.run(*ncu, *few, "--metrics", ",".join(METRICS), *command, limit_s=60))
        except (RuntimeError, ValueError) as error:
            details = [{"ID": "", "Kernel Name": f"no details: {str(error)[:300]}"}]
        total = sum(map(nanoseconds, rows))
        return {"hottest": found, "total_ns": total, "launches": len(rows), "details": details}


class PyTorch:
    """tools/gpu_pytorch.py, which prepares in the background until it is to measure."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.out, self.go, self.log = (machine.work / f"pytorch.{end}" for end in ("jsonl", "go", "log"))
        for path in (self.out, self.go):
            path.unlink(missing_ok=True)
        device = "cpu" if machine.trial else machine.device
        arguments = ("--sizes", machine.sizes, "--out", self.out, "--go", self.go, "--device", device)
        with self.log.open("w") as log:
            command = (sys.executable, "tools/gpu_pytorch.py", *arguments)
            self.process = machine.start(*command, stdout=log, stderr=subprocess.STDOUT)

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.read_text().splitlines()] if self.out.exists() else []

    def wait(self, limit_s: float) -> str:
        """Until it has prepared, so that it does not disturb what is measured."""
        end = time.monotonic() + min(limit_s * self.machine.report.slack, self.machine.report.left())
        while time.monotonic() < end and self.process.poll() is None:
            if any("ready" in record for record in self.records()):
                return "prepared"
            time.sleep(0.2)
        if self.process.poll() is not None:
            raise RuntimeError(f"it ended with {self.process.returncode}: {self.log.read_text()[-2000:]}")
        return "still preparing: it may disturb what is measured now"

    def measure(self) -> dict[str, Any]:
        self.go.touch()
        try:
            self.process.wait(timeout=max(1.0, min(90.0 * self.machine.report.slack, self.machine.report.left())))
        except subprocess.TimeoutExpired:
            pass  # what it has measured by then counts
        finally:
            self.machine.stop(self.process)
        records = self.records()
        if not any("tok_s" in record for record in records):
            raise RuntimeError(f"it measured nothing: {records} {self.log.read_text()[-2000:]}")
        return {"records": records}


def measure(machine: Machine, kind: str, pytorch: PyTorch | None = None) -> None:
    """Bits and speed of a file, and of PyTorch where it is given."""
    step, path = machine.report.step, machine.work / f"{kind}.gguf"
    for how in STEPS:
        named = kind if how == STEPS[0] else f"{kind}, {how}"
        step(f"same bits {named}", lambda how=how: machine.measured("bits", path, how), needs_s=30)
        if pytorch and how == STEPS[0]:
            step("PyTorch has compiled", lambda: pytorch.wait(60.0))
        step(f"speed {named}", lambda how=how: machine.measured("speed", path, how), needs_s=30)
    step(f"load {kind}", lambda: machine.measured("load", path))
    if pytorch:
        step("PyTorch", pytorch.measure, needs_s=20)


def sanitize(machine: Machine, how: str) -> None:
    for tool in SANITIZERS:
        named = tool if how == STEPS[0] else f"{tool}, {how}"
        machine.report.step(named, lambda tool=tool: machine.sanitizer(tool, how), needs_s=20)


def run_all(machine: Machine, kinds: list[str]) -> None:
    machine.report.step("machine", machine.describe)
    with ThreadPoolExecutor(1) as background:
        try:
            pytorch = PyTorch(machine)
            checkpoint = background.submit(machine.checkpoint)
            run_steps(machine, kinds, pytorch, checkpoint)
        finally:
            machine.stop_all()  # or this would wait for the checkpoint
    machine.report.write()


def run_steps(machine: Machine, kinds: list[str], pytorch: PyTorch, checkpoint: "Future[Path]") -> None:
    step, work = machine.report.step, machine.work
    if step("build", machine.build) is None:
        return
    step("same bits, small models", machine.small_bits)
    if step("files", lambda: machine.convert(checkpoint, kinds), needs_s=60) is None:
        kinds = []
    for kind in kinds[:1]:
        measure(machine, kind, pytorch)
    step("small files", lambda: machine.measured("small", work))
    sanitize(machine, STEPS[0])
    if kinds:
        step("mixed requests", lambda: machine.measured("mixed", work / f"{kinds[0]}.gguf"), needs_s=20)
        step("hottest kernels", lambda: machine.profile(work / f"{kinds[0]}.gguf"), needs_s=30)
    for kind in kinds[1:]:
        measure(machine, kind)
    sanitize(machine, STEPS[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=Path(os.environ.get("OUT", ROOT / "out" / "gpu")))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "gpu" / "work")
    parser.add_argument("--emulated", action="store_true", help="a trial without a GPU")
    arguments = parser.parse_args()
    out, work = arguments.out.resolve(), arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    report = Report(out, SMALL if arguments.emulated else PUBLISHED, arguments.emulated)
    machine = Machine(report, work, arguments.device)
    # Whoever stops this gets what there is: the report is written after each step.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    run_all(machine, ["q8_0"] if arguments.emulated else ["q8_0", "w8a8", "q4_0"])
    print((out / "gpu.md").read_text())
    return int(any("failed" in one for one in report.steps.values()))


if __name__ == "__main__":
    sys.exit(main())
