"""The kept inputs of every fuzzer, and defects planted to see that these would find them.

What is fuzzed here is bounded; README.md says how to run the fuzzers for longer.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from make_gguf_seeds import FOLDER, seeds
from planted import PLANTED
from run import FUZZERS, HERE, NATIVE, PYTHON, unpack
from sanitized import FLAGS, ROOT, compile_sanitized, why_not

pytestmark = pytest.mark.external

RUNS = 10_000  # per seed
SOURCES = ["tests/fuzz/gguf_fuzz.cpp", "tests/fuzz/replay_main.cpp", "csrc/gguf/gguf_file.cpp"]
BUILD = ROOT / "build" / "fuzz-replay"


@pytest.fixture(scope="module")
def replays() -> Path:
    """The folder of the programs that run inputs of every native fuzzer under the sanitizers of g++."""
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    tools = Path(sys.executable).parent
    if not (tools / "cmake").exists() or not (tools / "ninja").exists():
        pytest.skip("no cmake and ninja beside this Python")
    options = {
        "CMAKE_MAKE_PROGRAM": tools / "ninja",
        "CMAKE_CXX_COMPILER": "g++",
        "CMAKE_BUILD_TYPE": "Debug",
        "FIXMIN_PYTHON": "OFF",
        "FIXMIN_CUDA": "OFF",
        "FIXMIN_FUZZERS": "ON",
        "FIXMIN_ONLY_ISAS": "scalar;avx2",
        "FIXMIN_SANITIZE": "address,undefined",
    }
    configure = [tools / "cmake", "-S", ROOT, "-B", BUILD, "-G", "Ninja", *(f"-D{k}={v}" for k, v in options.items())]
    for command in (configure, [tools / "cmake", "--build", BUILD]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return BUILD


def replay(program: Path, files: list[Path], folder: Path, runs: int = 0) -> subprocess.CompletedProcess:
    """Runs inputs, each once, and its beginnings and so many mutations. What a program dies of lies in crash.bin."""
    command = [program, str(runs), "0", *sorted(files)]
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}  # of models that live as long as the process
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, timeout=900, env=environment, errors="replace"
    )


def kept(name: str, folder: Path) -> list[Path]:
    """All inputs of a fuzzer."""
    unpack(name, folder)
    for more in (HERE / "seeds" / name, HERE / "finds" / name):
        for file in more.glob("*"):
            shutil.copy(file, folder / f"{more.parent.name}-{file.name}")
    files = list(folder.iterdir())
    assert len(files) >= 10, f"{name}: {len(files)} inputs"
    return files


@pytest.mark.parametrize("name", NATIVE)
def test_kept_inputs(name: str, replays: Path, tmp_path: Path) -> None:
    """Finds among them, which are defects that have been mended."""
    done = replay(replays / f"{name}_fuzz", kept(name, tmp_path / "inputs"), tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("name", PYTHON)
def test_kept_inputs_of_python(name: str, tmp_path: Path) -> None:
    module = __import__(f"{name}_fuzz")
    fuzzer = module.Fuzzer()
    try:
        for file in kept(name, tmp_path / "inputs"):
            fuzzer(file.read_bytes())
    finally:
        fuzzer.close()


def test_every_fuzzer_has_a_dictionary_and_a_corpus() -> None:
    for name in FUZZERS:
        words = (HERE / "dictionaries" / f"{name}.dict").read_text().splitlines()
        assert all(re.fullmatch(r'|#.*|(\w+=)?"([^"\\]|\\["\\]|\\x[0-9a-f]{2})+"', word) for word in words), name
        assert (HERE / "corpus" / f"{name}.zip").stat().st_size < 2_000_000


@pytest.mark.parametrize("name", PLANTED)
def test_planted_defects_are_found(name: str, replays: Path, tmp_path: Path) -> None:
    """A mistake in the code that a fuzzer watches, and its kept inputs find it."""
    file, right, wrong = PLANTED[name]
    source = (ROOT / "csrc" / file).read_text()
    assert source.count(right) == 1, f"{file} has changed: plant another defect"
    (tmp_path / "planted.cpp").write_text(source.replace(right, wrong))
    program = tmp_path / "planted"
    flags = [*FLAGS, "-fno-omit-frame-pointer", "-DFIXMIN_ISAS=", f"-I{ROOT / 'csrc'}"]
    built = subprocess.run(["g++", *flags, "-c", tmp_path / "planted.cpp", "-o", tmp_path / "planted.o"], check=True)
    assert built.returncode == 0
    # The linker takes what the changed file has from it, and the rest from the library.
    (own,) = (BUILD / "CMakeFiles" / f"{name}_fuzz.dir").rglob(f"{name}_fuzz.cpp.o")
    (main,) = (BUILD / "CMakeFiles" / f"{name}_fuzz.dir").rglob("replay_main.cpp.o")
    parts = [own, main, tmp_path / "planted.o", BUILD / "libfixmin_engine.a"]
    subprocess.run(["g++", *FLAGS, *parts, "-lpthread", "-o", program], check=True)
    # A file that is cut by one byte is a rare one, and no other code is reached by it.
    done = replay(program, kept(name, tmp_path / "inputs"), tmp_path, runs=20 if name == "gguf" else 0)
    assert done.returncode != 0, "no kept input finds it"
    assert re.search("broken promise|AddressSanitizer|runtime error", done.stderr), done.stderr[-2000:]


# --- the GGUF reader, also with mutations ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_sanitized(SOURCES, tmp_path_factory.mktemp("fuzz") / "gguf_fuzz")


def run(driver: Path, *arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [driver, *map(str, arguments)], cwd=driver.parent, capture_output=True, text=True, check=False, timeout=600
    )


def test_seed_files_are_those_that_the_script_writes() -> None:
    assert {path.name: path.read_bytes() for path in FOLDER.iterdir()} == seeds()


def test_seeds_are_accepted(driver: Path) -> None:
    done = run(driver, 0, 0, *sorted(FOLDER.iterdir()))
    assert done.stdout == f"accepted {len(seeds())} refused 0\n", done.stderr


def test_mutations_and_truncations(driver: Path) -> None:
    done = run(driver, RUNS, 1, *sorted(FOLDER.iterdir()))
    assert done.returncode == 0, done.stderr
    accepted, refused = map(int, re.fullmatch(r"accepted (\d+) refused (\d+)\n", done.stdout).groups())
    assert accepted + refused == len(seeds()) * (RUNS + 1) + sum(map(len, seeds().values()))
    assert accepted > RUNS // 10  # enough cases get past the header
    assert refused > RUNS
