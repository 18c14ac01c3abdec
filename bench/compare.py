"""Speed of fixmin beside PyTorch, llama.cpp, ik_llama.cpp, OpenVINO and CTranslate2, in alternating runs.

    python bench/compare.py [--data out/bench] [--rounds 5] [--parts table,threads,prompt,depth] \
        [--engines NAME,...] [--json FILE] [--markdown FILE] [--plot FILE] [--resume]

Every engine is a process of its own that loads once and then waits for its turn (A B C A B C ...), so that a slow
phase of a noisy machine hits all of them; the first round warms up and is not recorded. The ceilings of the machine
take their turn like an engine. What cannot take part is left out of the tables, and why is in the report.

With --resume the rounds that the JSON file already has are not run again. It is written after every round.
"""

import argparse
import contextlib
import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from engines import BENCH, ENGINES, SWEPT, Engine
from prepare import failure, python_of
from report import CEILINGS, METRICS, SWEEPS, markdown, plot

from fixmin_cpp import system_info
from fixmin_cpp.benchmark import default_read_buffer, spare_memory

TIMEOUT = 300  # seconds for one answer: more than the slowest engine needs to load
PAUSE = 0.2  # seconds between turns: threads of the engine before stop spinning
PARTS = ("table", *SWEEPS)
SIDE = 2048  # of the matrices whose product gives a ceiling
FEATURES = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp", "i8mm")


class WorkerError(Exception):
    """A worker ended or did not answer; the text says how."""


class Worker:
    """The process of one engine (bench/peers/worker.py)."""

    def __init__(self, engine: Engine, data: Path, shape: dict[str, int], threads: int) -> None:
        options = {"model": str(data / engine.model), "threads": threads, **shape, **engine.options}
        command = [str(python_of(data, engine.environment)), str(BENCH / "peers" / "worker.py")]
        # Settings of the user's shell would bind all of them, and some of them more than others.
        environment = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")} | engine.variables
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the worker
        self.process = subprocess.Popen(
            [*command, engine.kind, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=environment,
            text=True,
        )
        try:
            self.loaded = self._answer()
        except WorkerError:
            self.close()
            raise

    def ask(self, request: dict[str, int]) -> dict[str, Any]:
        """The answer to one request. WorkerError if there is none."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        timer = threading.Timer(TIMEOUT, self.process.kill)
        timer.start()
        line = self.process.stdout.readline()
        late = not timer.is_alive()
        timer.cancel()
        if line:
            return json.loads(line)
        raise WorkerError(f"no answer within {TIMEOUT} s" if late else self._ending())

    def _ending(self) -> str:
        status = self.process.wait()
        self.errors.seek(0)
        said = [line for line in self.errors.read().decode(errors="replace").splitlines() if line.strip()]
        how = f"signal {-status}" if status < 0 else f"status {status}"
        return f"ended with {how}: {said[-1][:300] if said else 'no message'}"

    def close(self) -> None:
        """Ends the process."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.errors.close()


class Comparison:
    """The engines that take part, and the result that grows with every round.

    result: date, command, machine, settings, engines (name -> facts), skipped (name -> why), records (report.py).
    """

    def __init__(self, data: Path, settings: dict[str, Any], result: dict[str, Any], save, say=print) -> None:
        self.data, self.settings, self.result, self.save, self.say = data, settings, result, save, say
        config = json.loads((data / "full" / "config.json").read_text(encoding="utf-8"))
        self.shape = {"vocab_size": config["vocab_size"], "context": config["max_position_embeddings"]}
        self.workers: dict[str, Worker] = {}
        self.given_up: set[str] = set()  # in this session; what an earlier one left out is tried again

    def start(self, engines: Sequence[Engine]) -> None:
        """Loads engines that are not loaded yet; what cannot be loaded is noted as skipped."""
        for engine in engines:
            if engine.name in self.workers or engine.name in self.given_up:
                continue
            reason = self.obstacle(engine)
            try:
                if reason is None:
                    self.say(f"loading {engine.label}")
                    self.load(engine)
            except WorkerError as error:
                reason = str(error)
            if reason is not None:
                self.skip(engine.name, engine.label, reason)

    def obstacle(self, engine: Engine) -> str | None:
        """Why the engine cannot even be tried."""
        parts = [self.data / engine.model]
        if engine.environment:
            parts.append(self.data / "peers" / engine.environment)
        for part in reversed(parts):
            if reason := failure(part):
                return reason
        # Loading can hold the file and its repacked form, or twice the type of the file, for a moment.
        needed = 2 * sum(file.stat().st_size for file in engine.files(self.data))
        if needed > spare_memory():
            return f"not enough memory: {needed / 1e9:.1f} GB may be needed, {spare_memory() / 1e9:.1f} GB are free"
        return None

    def load(self, engine: Engine) -> None:
        files = engine.files(self.data)
        for file in files:  # into the page cache, so that loading is not the disk's time
            with file.open("rb", buffering=0) as raw:
                while raw.read(1 << 24):
                    pass
        worker = Worker(engine, self.data, self.shape, self.settings["threads"])
        self.workers[engine.name] = worker
        self.result["skipped"].pop(engine.name, None)
        if engine.name == CEILINGS:
            return
        facts = self.result["engines"].setdefault(engine.name, {"label": engine.label})
        facts |= {"against": engine.against, "product": engine.product, **worker.loaded}
        facts["file_bytes"] = sum(file.stat().st_size for file in files)

    def skip(self, name: str, label: str, reason: str) -> None:
        """Leaves an engine out from here on, and what it said before too."""
        self.say(f"{label} is left out: {reason}")
        self.given_up.add(name)
        self.result["skipped"][name] = reason
        self.result["engines"].pop(name, None)
        self.result["records"] = [r for r in self.result["records"] if r["engine"] != name]
        if name in self.workers:
            self.workers.pop(name).close()

    def run(self, part: str, engines: Sequence[Engine], points: Sequence[dict[str, int]], rounds: int) -> None:
        """A warm-up and then rounds of all points, as many as the result lacks."""
        done = 1 + max((r["round"] for r in self.result["records"] if r["part"] == part), default=-1)
        if done >= rounds:
            return
        self.start(engines)
        for turn in (None, *range(done, rounds)):
            self.say(f"{part}: {'warm-up' if turn is None else f'round {turn + 1} of {rounds}'}")
            for request in points:
                self.turn(part, engines, request, turn)
            self.save(self.result)

    def turn(self, part: str, engines: Sequence[Engine], request: dict[str, int], turn: int | None) -> None:
        for engine in engines:
            if engine.name not in self.workers:
                continue
            mine = request | {"decode": min(request["decode"], engine.most_decoded)}
            if engine.name == CEILINGS:
                mine |= {"prompt": 0, "decode": 0}
            time.sleep(PAUSE)
            try:
                answer = self.workers[engine.name].ask(mine)
            except WorkerError as error:
                self.skip(engine.name, engine.label, str(error))
                continue
            shown = [f"{name} {answer[f'{name}_s']:.3f} s" for name in METRICS if f"{name}_s" in answer]
            self.say(f"  {engine.label}: {', '.join(shown) or 'measured'}")
            if turn is None:
                if engine.name in self.result["engines"]:
                    self.result["engines"][engine.name].setdefault("rss_after_bytes", answer["rss_bytes"])
            else:
                asked = {"part": part, "engine": engine.name, "round": turn, **mine}
                # A point of a sweep is known by what was asked of all, also in the records of the ceilings.
                asked |= {key: request[key] for key in SWEEPS if key == part}
                self.result["records"].append(asked | answer)

    def stop(self, keep: Sequence[str] = ()) -> None:
        """Ends all workers but those named."""
        for name in [name for name in self.workers if name not in keep]:
            self.workers.pop(name).close()


def ceilings_engine() -> Engine:
    """The smallest file will do: its weights are not used."""
    options = {"buffer": default_read_buffer(), "side": SIDE}
    return Engine(CEILINGS, "ceilings", CEILINGS, "full-q4_0.gguf", "", options=options)


def points(part: str, settings: dict[str, Any]) -> Iterator[dict[str, int]]:
    """What is asked of every engine in one round."""
    usual = {key: settings[key] for key in ("threads", "prompt", "depth", "decode")}
    if part == "table":
        yield usual
        return
    # Short requests: a sweep has many of them.
    brief = {"threads": {"prompt": 128, "decode": 16}, "prompt": {"decode": 0}, "depth": {"prompt": 0, "decode": 16}}
    for value in settings[f"{part}_points"]:
        yield usual | brief[part] | {part: value}


def machine() -> dict[str, str]:
    """Facts about this computer for the report."""
    info = system_info()
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "CPU": f"{info['cpu']}, {info['usable_cpus']} usable",
        "features": " ".join(name for name in FEATURES if name in flags),
        "memory": f"{pages / 1e9:.1f} GB",
        "system": f"{platform.system()} {platform.release()}",
        "Python": platform.python_version(),
        "fixmin": f"{info['fixmin_cpp']} ({info['isa']})",
        "load average at the start": f"{os.getloadavg()[0]:.1f}",
    }


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def chosen(text: str | None) -> list[Engine]:
    """Engines of comma-separated names; what is no name stands for all that begin with it. None: all of them."""
    if text is None:
        return list(ENGINES)
    names = set()
    for part in text.split(","):
        found = [e.name for e in ENGINES if e.name == part] or [e.name for e in ENGINES if e.name.startswith(part)]
        if not found:
            raise ValueError(f"no engine is called {part!r}; there are {', '.join(e.name for e in ENGINES)}")
        names.update(found)
    return [engine for engine in ENGINES if engine.name in names]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, default=Path("out/bench"), help="what bench/prepare.py has made")
    add("--engines", help="comma-separated names, or beginnings of names (default: all)")
    add("--sweep-engines", default=",".join(SWEPT))
    add("--parts", default=",".join(PARTS), help="comma-separated, of: " + ", ".join(PARTS))
    add("--rounds", type=int, default=5)
    add("--sweep-rounds", type=int, help="default: as --rounds")
    add("--threads", type=int, default=system_info()["default_threads"])
    add("--prompt", type=int, default=512, help="tokens of a prefill")
    add("--decode", type=int, default=48, help="tokens decoded; slow engines do fewer (bench/engines.py)")
    add("--depth", type=int, default=16, help="tokens in the context before the first decoded one")
    add("--threads-points", type=numbers, default=[1, 2, 4, 8])
    add("--prompt-points", type=numbers, default=[16, 64, 256, 1024])
    add("--depth-points", type=numbers, default=[0, 256, 896])
    add("--json", type=Path, help="all figures; written after every round")
    add("--markdown", type=Path, help="the report (default: printed)")
    add("--plot", type=Path, help="a PNG")
    add("--resume", action="store_true", help="go on with the rounds that the JSON file lacks")
    add("--report-only", action="store_true", help="measure nothing, report what the JSON file has")
    found = parser.parse_args(arguments)
    found.parts = found.parts.split(",")
    if unknown := set(found.parts) - set(PARTS):
        parser.error(f"--parts: {', '.join(sorted(unknown))} is not one of {', '.join(PARTS)}")
    for name in ("engines", "sweep_engines"):
        try:
            setattr(found, name, chosen(getattr(found, name)))
        except ValueError as error:
            parser.error(f"--{name.replace('_', '-')}: {error}")
    if min(found.rounds, found.threads, found.prompt, found.decode) < 1:
        parser.error("rounds, threads, prompt and decode must be at least 1")
    if (found.resume or found.report_only) and not found.json:
        parser.error("--resume and --report-only need --json")
    found.sweep_rounds = found.sweep_rounds or found.rounds
    return found


def measure(arguments: argparse.Namespace, result: dict[str, Any], save) -> None:
    say = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
    comparison = Comparison(arguments.data, result["settings"], result, save, say)
    context = comparison.shape["context"]
    for part in arguments.parts:
        for asked in points(part, result["settings"]):
            if max(asked["prompt"], asked["depth"] + asked["decode"] + 1) > context:
                raise SystemExit(f"{part}: {asked} does not fit the model's context of {context} tokens")
    limits = ceilings_engine()
    swept = [engine for engine in arguments.sweep_engines if engine in arguments.engines]
    try:
        for part in arguments.parts:
            # The fixmin engine of the same bits belongs to whatever is compared with it.
            taking = arguments.engines if part == "table" else swept
            rounds = arguments.rounds if part == "table" else arguments.sweep_rounds
            if part != "table":
                comparison.stop(keep=[CEILINGS, *(engine.name for engine in taking)])
            comparison.run(part, [limits, *taking], list(points(part, result["settings"])), rounds)
    finally:
        comparison.stop()


def main(words: Sequence[str] | None = None) -> None:
    arguments = parse(words)
    names = ("rounds", "sweep_rounds", "threads", "prompt", "decode", "depth")
    settings = {name: getattr(arguments, name) for name in names}
    settings |= {f"{part}_points": getattr(arguments, f"{part}_points") for part in SWEEPS}
    result = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join(["bench/compare.py", *(words if words is not None else sys.argv[1:])]),
        "machine": machine(),
        "settings": settings,
        "engines": {},
        "skipped": {},
        "records": [],
    }
    if arguments.resume or arguments.report_only:
        if arguments.json.exists():
            before = json.loads(arguments.json.read_text(encoding="utf-8"))
            changed = [name for name in settings if "rounds" not in name and before["settings"][name] != settings[name]]
            if changed and not arguments.report_only:
                raise SystemExit(f"{arguments.json} was measured with other settings: {', '.join(changed)}")
            result = before if arguments.report_only else before | {"settings": settings}
        elif arguments.report_only:
            raise SystemExit(f"{arguments.json} does not exist")

    def save(found: dict[str, Any]) -> None:
        if arguments.json:
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    if not arguments.report_only:
        measure(arguments, result, save)
        save(result)
    text = markdown(result)
    if arguments.markdown:
        arguments.markdown.parent.mkdir(parents=True, exist_ok=True)
        arguments.markdown.write_text(text, encoding="utf-8")
    else:
        print(text)
    if arguments.plot:
        arguments.plot.parent.mkdir(parents=True, exist_ok=True)
        plot(result, arguments.plot)


if __name__ == "__main__":
    main()
