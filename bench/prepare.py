"""Make what bench/compare.py needs: checkpoint, model files, and one virtual environment per peer.

    python bench/prepare.py [--data out/bench] [--peers] [--torch 'torch==2.13.0']

What is there is kept: every part has a stamp with the recipe that made it. A part that fails is left out; why is
kept in NAME.failed beside it, which compare.py puts into its report. All output goes to NAME.log.
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

from engines import BENCH, ENVIRONMENTS, OWN_STEPS, PEER_STEPS, Step

OWN = Path(sys.executable)


def sibling(target: Path, end: str) -> Path:
    return target.with_name(target.name + end)


def python_of(data: Path, environment: str) -> Path:
    """The Python that runs an engine or a step."""
    return data / "peers" / environment / "bin" / "python" if environment else OWN


def failure(target: Path) -> str | None:
    """Why `target` cannot be used, None if it can."""
    if sibling(target, ".done").exists() and target.exists():
        return None
    failed = sibling(target, ".failed")
    if failed.exists():
        return failed.read_text(encoding="utf-8").strip()
    return f"{target.name} is not there (make bench-peers)"


def make(target: Path, commands: list[list[str]], recipe: str) -> bool:
    """Runs commands that make `target`, unless the same recipe has made it; says whether it is there."""
    done, failed, log = (sibling(target, end) for end in (".done", ".failed", ".log"))
    if target.exists() and done.exists() and done.read_text(encoding="utf-8") == recipe:
        return True
    target.parent.mkdir(parents=True, exist_ok=True)
    for stale in (done, failed):
        stale.unlink(missing_ok=True)
    print(f"making {target}", flush=True)
    with log.open("w", encoding="utf-8") as out:
        for command in commands:
            print(f"$ {shlex.join(command)}", file=out, flush=True)
            status = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL).returncode
            if status:
                break
    if status:
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        failed.write_text(f"{Path(commands[0][0]).name} ended with status {status}: {lines[-1][:300]}\n", "utf-8")
        print(f"  failed, see {log}", flush=True)
        return False
    done.write_text(recipe, encoding="utf-8")
    return True


def environment(data: Path, name: str, torch: str) -> bool:
    target = data / "peers" / name
    pip = [str(python_of(data, name)), "-m", "pip", "--disable-pip-version-check", "install"]
    files = [BENCH / "peers" / f"{name}.txt", BENCH / "peers" / f"{name}.no-deps.txt"]
    commands = [[str(OWN), "-m", "venv", "--clear", str(target)]]
    if ENVIRONMENTS[name]:
        commands.append([*pip, *shlex.split(torch)])
    # Never from pip's cache: a wheel there may have been compiled for another CPU or with other options.
    commands.append([*pip, "--no-cache-dir", "-r", str(files[0])])
    if files[1].exists():
        commands.append([*pip, "--no-deps", "-r", str(files[1])])
    recipe = "".join(file.read_text(encoding="utf-8") for file in files if file.exists())
    return make(target, commands, recipe + sys.version)


def step(data: Path, step: Step) -> bool:
    target = data / step.target
    needed = [data / name for name in step.needs]
    if step.environment:
        needed.append(data / "peers" / step.environment)
    for part in needed:
        if reason := failure(part):
            sibling(target, ".failed").write_text(f"{part.name}: {reason}\n", encoding="utf-8")
            return False
    arguments = [text.format(data=data, bench=BENCH) for text in step.command]
    return make(target, [[str(python_of(data, step.environment)), *arguments]], shlex.join(step.command))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("out/bench"))
    parser.add_argument("--peers", action="store_true", help="also the peers and their files")
    parser.add_argument("--torch", default="torch", help="what pip is told to install where a peer needs PyTorch")
    arguments = parser.parse_args()
    data = arguments.data.absolute()
    if not all([step(data, each) for each in OWN_STEPS]):
        return 1
    if arguments.peers:
        made = [environment(data, name, arguments.torch) for name in ENVIRONMENTS]
        made += [step(data, each) for each in PEER_STEPS]
        print(f"{sum(made)} of {len(made)} parts are there; compare.py says what it leaves out, and why")
    return 0


if __name__ == "__main__":
    sys.exit(main())
