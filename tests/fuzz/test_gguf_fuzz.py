"""A bounded run of the GGUF fuzzer under the sanitizers; gguf_fuzz.cpp says how to run it for longer."""

import re
import subprocess
from pathlib import Path

import pytest
from make_gguf_seeds import FOLDER, seeds
from sanitized import ROOT, compile_sanitized

pytestmark = pytest.mark.external

RUNS = 10_000  # per seed
SOURCES = ["tests/fuzz/gguf_fuzz.cpp", "tests/fuzz/gguf_fuzz_main.cpp", "csrc/gguf/gguf_file.cpp"]


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


def test_the_driver_sees_a_defect(tmp_path: Path) -> None:
    """A reader that looks one byte too far is caught and its input saved: the run above could have failed."""
    broken = tmp_path / "broken.cpp"
    broken.write_text(
        "#include <cstddef>\n#include <cstdint>\n"
        'extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {\n'
        "    volatile uint8_t last = size > 30 ? data[size] : 0;\n    return last;\n}\n"
    )
    program = compile_sanitized([str(broken), "tests/fuzz/gguf_fuzz_main.cpp"], tmp_path / "broken")
    done = run(program, 0, 0, ROOT / "tests/fuzz/seeds/gguf/model")
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
    assert (tmp_path / "crash.bin").read_bytes() == seeds()["model"]
