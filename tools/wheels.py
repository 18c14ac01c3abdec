"""Builds what a release consists of: the sdist, and from its files alone wheels for Linux on x86-64 and aarch64.

    python tools/wheels.py dist --pythons python3.10 python3.11 python3.12 python3.13

zig c++ (the package ziglang) brings the headers and symbols of an older glibc for both processors, and links libc++
statically; the kernels, which need no library, are compiled by g++ and Debian's g++-aarch64-linux-gnu. Those for GPUs
are compiled once, where nvcc is found, and stand in all wheels: --cuda ON makes their absence an error, --cuda OFF
leaves them out. auditwheel gives the wheels their names and says what they need of a system. The same commit and tools
give the same bytes, in whatever folder: docs/wheels.md.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: What PyTorch and NumPy ask for by now, so that an older one would serve nobody.
GLIBC = "2.28"
PROCESSORS = ("x86_64", "aarch64")
#: The backend is called as pip calls it, with the Python that the wheel is for.
BUILD = """
import json, sys
from scikit_build_core import build
hook, folder, settings = sys.argv[1:]
getattr(build, "build_" + hook)(folder, json.loads(settings))
"""


def zig() -> Path:
    import ziglang  # by far the largest of the tools: imported where it is needed

    return Path(ziglang.__file__).parent / "zig"


def run(*command: object, **options: object) -> None:
    print("+", *command, flush=True)
    subprocess.run([str(part) for part in command], check=True, **options)  # type: ignore[call-overload]


def described(python: str) -> tuple[str, str] | None:
    """(path, "cpython-312") of the interpreter that this name starts; None if it starts none."""
    program = "import sys; print(sys.executable, sys.implementation.cache_tag, sep='|')"
    try:
        done = subprocess.run([python, "-c", program], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    if done.returncode != 0:  # a shim of pyenv for a version that is not chosen
        return None
    path, _, tag = done.stdout.strip().partition("|")
    return path, tag


def environment() -> dict[str, str]:
    """The time of the commit is what archives say of their files."""
    env = dict(os.environ)
    if "SOURCE_DATE_EPOCH" not in env:
        git = subprocess.run(["git", "log", "-1", "--format=%ct"], cwd=ROOT, capture_output=True, text=True)
        if git.returncode != 0:
            raise SystemExit("outside of a git repository SOURCE_DATE_EPOCH must say what time files have")
        env["SOURCE_DATE_EPOCH"] = git.stdout.strip()
    env.setdefault("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
    # What a user has set for compilers of his own must not get in.
    own = ("CXX", "CXXFLAGS", "CPPFLAGS", "LDFLAGS", "CMAKE_ARGS")
    return {name: value for name, value in env.items() if name not in own}


def builder(python: str, work: Path) -> Path:
    """The Python of an environment with the locked build tools, and with nothing else."""
    folder = work / "tools"
    if not (folder / "done").exists():
        run(python, "-m", "venv", "--clear", folder)
        run(folder / "bin/python", "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps",
            "--require-hashes", "--no-build-isolation", "-r", ROOT / "requirements/build.txt")  # fmt: skip
        (folder / "done").touch()
    return folder / "bin/python"


def build(hook: str, python: Path, source: Path, out: Path, settings: dict[str, str], env: dict[str, str]) -> Path:
    """The one file that the backend writes into `out`."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    env = env | {"PATH": f"{python.parent}{os.pathsep}{env['PATH']}"}
    run(python, "-c", BUILD, hook, out, json.dumps(settings), cwd=source, env=env)
    (file,) = out.iterdir()
    return file


def exported(work: Path) -> Path:
    """What is or would be committed, alone: a backend that looks through .venv and build takes minutes."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        return ROOT  # an unpacked sdist
    tree = work / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    return tree


def unpacked(sdist: Path, work: Path) -> Path:
    source = work / "source"
    shutil.rmtree(source, ignore_errors=True)
    with tarfile.open(sdist) as archive:
        archive.extractall(source, filter="data")
    (folder,) = source.iterdir()
    return folder


def parts(
    python: Path, processor: str, source: Path, work: Path, cuda: str, env: dict[str, str]
) -> tuple[Path, Path | None]:
    """What is compiled once for all wheels of a processor: its kernels, by g++, and if nvcc is there those for GPUs.

    GCC's are faster than clang's (docs/wheels.md), and need no more of a system than memcpy and fmaf.
    """
    folder, cmake = work / f"kernels-{processor}", python.parent / "cmake"
    run(cmake, "-S", source, "-B", folder, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={python.parent / 'ninja'}",
        "-DCMAKE_SYSTEM_NAME=Linux", f"-DCMAKE_SYSTEM_PROCESSOR={processor}",
        f"-DCMAKE_CXX_COMPILER={processor}-linux-gnu-g++", f"-DCMAKE_CXX_FLAGS=-ffile-prefix-map={source}=.",
        "-DCMAKE_BUILD_TYPE=Release", "-DFIXMIN_PYTHON=OFF", f"-DFIXMIN_CUDA={cuda}", env=env)  # fmt: skip
    listed = subprocess.run([cmake, "--build", folder, "--target", "help"], capture_output=True, text=True).stdout
    targets = [name for name in ("fixmin_kernels", "kernels.fatbin") if name in listed]
    run(cmake, "--build", folder, "--target", *targets, env=env)
    return folder, folder / "kernels.fatbin" if "kernels.fatbin" in targets else None


def unwinder(processor: str) -> str:
    """libgcc_s, which every glibc needs for pthread_exit. By that CPython up to 3.13 ends a thread that comes back from
    native code too late; the unwinder that zig would link cannot read what this one has written: SIGSEGV."""
    command = [f"{processor}-linux-gnu-g++", "-print-file-name=libgcc_s.so.1"]
    return str(Path(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()).resolve())


def wheel(
    python: Path,
    tag: str,
    processor: str,
    source: Path,
    work: Path,
    kernels: Path,
    fatbin: Path | None,
    env: dict[str, str],
) -> Path:
    # One for all Pythons, configured anew for each; what is not theirs stays compiled. The backend would delete that
    # too, did it know that it served another one last.
    folder = work / f"build-{processor}"
    for name in (".skbuild-info.json", "CMakeCache.txt"):
        (folder / name).unlink(missing_ok=True)
    link = f"-s -Wl,--version-script={source}/cmake/exports.map {unwinder(processor)}"
    settings = {
        "build-dir": str(folder),
        "wheel.reproducible": "true",
        "install.strip": "false",  # the linker does: strip knows this machine's processor only
        "cmake.define.CMAKE_MODULE_LINKER_FLAGS": link,
        "cmake.define.CMAKE_TOOLCHAIN_FILE": str(source / "cmake/zig.cmake"),
        "cmake.define.CMAKE_CXX_FLAGS": f"-ffile-prefix-map={source}=.",
        "cmake.define.FIXMIN_ZIG": str(zig()),
        "cmake.define.FIXMIN_TARGET": f"{processor}-linux-gnu.{GLIBC}",
        "cmake.define.FIXMIN_KERNELS": str(kernels),
        "cmake.define.FIXMIN_CUDA": "ON" if fatbin else "OFF",
        "cmake.define.FIXMIN_CUDA_FATBIN": str(fatbin or ""),
    }
    # How Python itself and setuptools are told that they compile for another machine; the backend reads the same.
    target = {
        "_PYTHON_HOST_PLATFORM": f"linux-{processor}",
        "SETUPTOOLS_EXT_SUFFIX": f".{tag}-{processor}-linux-gnu.so",
    }
    raw = build("wheel", python, source, work / f"wheel-{tag}-{processor}", settings, env | target)
    repaired = work / f"repaired-{tag}-{processor}"
    shutil.rmtree(repaired, ignore_errors=True)
    # With the oldest name that is true of it; asked for one, auditwheel knows those of this machine's processor only.
    search = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    command = [sys.executable, "-m", "auditwheel", "repair", "--only-plat", "--wheel-dir", repaired, raw]
    run(*command, env=env | {"PATH": search})
    (file,) = repaired.iterdir()
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder to write to")
    parser.add_argument("--pythons", nargs="+", default=[f"python3.{minor}" for minor in range(10, 14)])
    parser.add_argument("--processors", nargs="+", choices=PROCESSORS, default=PROCESSORS)
    parser.add_argument("--cuda", choices=("AUTO", "ON", "OFF"), default="AUTO", help="kernels for GPUs")
    parser.add_argument("--work", type=Path, default=ROOT / "build/wheels", help="where to compile")
    options = parser.parse_args()

    found = {python: described(python) for python in options.pythons}
    if missing := [python for python in found if found[python] is None]:
        raise SystemExit(
            f"these start no Python: {', '.join(missing)}. Name others (PYTHONS=... of make; paths will do)"
        )
    pythons = [description for description in found.values() if description is not None]
    out, work, env = options.out.resolve(), options.work.resolve(), environment()
    out.mkdir(parents=True, exist_ok=True)

    tools = {tag: builder(path, work / tag) for path, tag in pythons}
    any_python = tools[pythons[0][1]]
    sdist = build("sdist", any_python, exported(work), work / "sdist", {}, env)
    files = [sdist]
    source = unpacked(sdist, work)
    fatbin = None
    for processor in options.processors:
        # The first time the kernels for GPUs too: they do not depend on the processor.
        kernels, made = parts(any_python, processor, source, work, "OFF" if fatbin else options.cuda, env)
        fatbin = fatbin or made
        shutil.rmtree(work / f"build-{processor}", ignore_errors=True)
        for tag, python in tools.items():
            files.append(wheel(python, tag, processor, source, work, kernels, fatbin, env))
    for file in files:
        shutil.copy(file, out / file.name)
        run(sys.executable, "-m", "auditwheel", "show", out / file.name) if file.suffix == ".whl" else None
    print("Kernels for GPUs:", "in every wheel" if fatbin else "in none: nvcc is not found, or --cuda OFF")
    for file in files:
        print(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.stat().st_size:>9}  {file.name}")


if __name__ == "__main__":
    main()
