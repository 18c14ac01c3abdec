"""Instruction sets of other CPUs, run for real under qemu-user: the bits of this machine's scalar kernels.

kernels_main and logits_main are cross-compiled for aarch64 and compiled for this machine. Their folders under build/
stay, so that a second run compiles only what has changed. A CPU that qemu plays stops on an instruction that it lacks:
older x86-64 CPUs show that none leaks from one translation unit into another, in these programs and in the Python
module.
"""

import fcntl
import functools
import os
import platform
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf_factory import ALL_BIASES, EVERY_TYPE, make_model

from fixmin_cpp import _core

pytestmark = pytest.mark.external

ROOT = Path(__file__).resolve().parents[2]
#: With the folder of this interpreter in front: a virtual environment has cmake and ninja there.
SEARCH_PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])

CORTEX_A53 = ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu", "-cpu", "cortex-a53"]  # armv8.0: no dot product
CORTEX_A76 = ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu", "-cpu", "cortex-a76"]
NEHALEM = ["qemu-x86_64", "-cpu", "Nehalem"]  # no AVX
HASWELL = ["qemu-x86_64", "-cpu", "Haswell"]  # no AVX-512

TYPES = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "W8A8"]
MODELS = {
    "layernorm gelu biases": dict(biases=ALL_BIASES, head_count=2),
    "rmsnorm swiglu grouped interleaved": dict(
        norm="rmsnorm",
        activation="swiglu",
        rope_style="interleaved",
        head_count_kv=2,
        lift="interleave",
        vocab_size=200,
    ),
}
#: Sizes that are no multiple of anything, a table of codes, part of a head rotated: float types only.
ODD_MODEL = dict(
    embedding_length=60,
    head_count=3,
    feed_forward_length=50,
    vocab_size=77,
    activation="gelu_tanh",
    rope_dim=8,
    code_kind="table",
)
IDS = np.random.default_rng(0).integers(0, 77, 36).astype(np.uint32)  # kernels_main has more than a block of the cache
#: Each value once: on a busy machine many barriers of many threads take minutes. tests/engine has all pairs, natively.
THREADS_AND_CHUNKS = [(1, 1), (2, 7), (5, 512)]


# --- programs ----------------------------------------------------------------------------------------------------


def need(program: str, package: str) -> None:
    if shutil.which(program, path=SEARCH_PATH) is None:
        pytest.skip(f"{program} is not installed; on Debian: apt-get install {package} (all of them: make emulators)")


@functools.cache
def build(target: str) -> Path:
    """The folder with the programs for "aarch64" or for this machine, "native"."""
    options = ["-DCMAKE_BUILD_TYPE=Release", "-DFIXMIN_PYTHON=OFF", "-DFIXMIN_NATIVE_TESTS=ON", "-DFIXMIN_CUDA=OFF"]
    if target == "aarch64":
        options.append(f"-DCMAKE_TOOLCHAIN_FILE={ROOT / 'cmake' / 'aarch64-linux-gnu.cmake'}")
    if shutil.which("ninja", path=SEARCH_PATH):
        options.append("-GNinja")
    folder = ROOT / "build" / "tests" / target
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (["cmake", "-S", ROOT, "-B", folder, *options], ["cmake", "--build", folder, "--parallel", "2"]):
            done = run(command)
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    return folder


def run(command: list, stdin: str = "", **environment: str) -> subprocess.CompletedProcess:
    env = {key: value for key, value in os.environ.items() if key != "FIXMIN_ISA"}
    return subprocess.run(
        [str(part) for part in command],
        input=stdin,
        env=env | {"PATH": SEARCH_PATH} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def aarch64() -> Path:
    need("qemu-aarch64", "qemu-user")
    need("aarch64-linux-gnu-g++", "g++-aarch64-linux-gnu")
    need("cmake", "cmake")
    return build("aarch64")


@pytest.fixture(scope="module")
def native() -> Path:
    need("cmake", "cmake")
    need("c++", "g++")
    return build("native")


@pytest.fixture(scope="module")
def x86_64(native: Path) -> Path:
    if platform.machine() != "x86_64":
        pytest.skip("this machine is not an x86-64 one")
    need("qemu-x86_64", "qemu-user")
    return native


# --- what is compared --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    wanted: dict[str, dict] = {"odd sizes": ODD_MODEL, "every type": EVERY_TYPE}
    for i, kind in enumerate(TYPES):
        for j, (name, options) in enumerate(MODELS.items()):
            if kind in ("F32", "Q8_0") or i % 2 == j:  # every type, and every architecture with both kinds of product
                wanted[f"{kind} {name}"] = dict(options, weight_type=kind)
    return {name: make_model(folder / f"{i}.gguf", seed=i, **wanted[name]) for i, name in enumerate(wanted)}


@pytest.fixture(scope="module")
def expected_logits(models: dict[str, Path]) -> dict[tuple[str, str], bytes]:
    """(model, type of the cache) -> bytes, by the scalar kernels of this machine."""
    return {
        (name, kv): _core.Engine(str(path), isa="scalar", kv_type=kv, n_threads=1).logits(IDS).tobytes()
        for name, path in models.items()
        for kv in ("f16", "f32", "q8_0")
    }


def logits_that_differ(
    command: list, models: dict[str, Path], expected: dict, folder: Path, threads_and_chunks: list
) -> list[str]:
    """Runs every model with these numbers of threads and chunks; names those whose bytes are not the expected ones."""
    runs = {}
    for name, kv in expected:
        for threads, chunk in threads_and_chunks:
            title = f"{name}, {kv}, {threads} threads, chunks of {chunk}"
            runs[title] = (name, kv, f"- {threads} {chunk} {kv} {models[name]} {folder / str(len(runs))}")
    ids = " ".join(map(str, IDS))
    done = run(command, "".join(f"{line} {ids}\n" for _, _, line in runs.values()))
    assert done.returncode == 0, done.stderr
    return [
        title
        for i, (title, (name, kv, _)) in enumerate(runs.items())
        if (folder / str(i)).read_bytes() != expected[name, kv]
    ]


def kernel_hashes(command: list) -> dict[str, str]:
    """Case -> hash. Afterwards the cases are compared, so that a difference names the kernel and its sizes."""
    done = run(command)
    assert done.returncode == 0, done.stderr
    return dict(line.rsplit(" ", 1) for line in done.stdout.splitlines())


def isas(command: list, **environment: str) -> tuple[dict[str, str], str]:
    """({instruction set: "usable" or "missing"}, the default one)"""
    done = run([*command, "isas"], **environment)
    assert done.returncode == 0, done.stderr
    listing = dict(line.split() for line in done.stdout.splitlines())
    default = listing.pop("isa")
    return listing, default


# --- aarch64 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cpu", "default", "dotprod"),
    [(CORTEX_A53, "neon", "missing"), (CORTEX_A76, "neon_dotprod", "usable")],
    ids=["cortex-a53", "cortex-a76"],
)
def test_choice_on_aarch64(aarch64: Path, cpu: list[str], default: str, dotprod: str) -> None:
    program = [*cpu, aarch64 / "logits_main"]
    assert isas(program) == ({"scalar": "usable", "neon": "usable", "neon_dotprod": dotprod}, default)
    assert isas(program, FIXMIN_ISA="scalar")[1] == "scalar"
    refused = run([*program, "isas"], FIXMIN_ISA="avx2")
    assert refused.returncode == 1
    assert "unknown instruction set 'avx2'; this build has scalar, neon, neon_dotprod" in refused.stderr


def test_isa_that_the_cpu_lacks_is_refused(aarch64: Path) -> None:
    done = run([*CORTEX_A53, aarch64 / "logits_main", "isas"], FIXMIN_ISA="neon_dotprod")
    assert done.returncode == 1
    assert "lacks the instruction set 'neon_dotprod'" in done.stderr


@pytest.mark.parametrize(
    ("cpu", "isa"),
    [(CORTEX_A53, "scalar"), (CORTEX_A53, "neon"), (CORTEX_A76, "neon_dotprod")],
    ids=["scalar", "neon", "neon_dotprod"],
)
def test_kernels_on_aarch64(aarch64: Path, native: Path, cpu: list[str], isa: str) -> None:
    """Every kernel, with extreme inputs too, against the scalar kernels compiled for this machine."""
    assert kernel_hashes([*cpu, aarch64 / "kernels_main", isa]) == kernel_hashes([native / "kernels_main", "scalar"])


@pytest.mark.parametrize("cpu", [CORTEX_A53, CORTEX_A76], ids=["neon", "neon_dotprod"])
def test_logits_on_aarch64(aarch64: Path, cpu: list[str], models, expected_logits, tmp_path: Path) -> None:
    command = [*cpu, aarch64 / "logits_main", "logits"]
    assert logits_that_differ(command, models, expected_logits, tmp_path, THREADS_AND_CHUNKS) == []


# --- older x86-64 ------------------------------------------------------------------------------------------------

on_older_x86 = pytest.mark.parametrize(
    ("cpu", "isa"), [(NEHALEM, "scalar"), (HASWELL, "avx2")], ids=["nehalem", "haswell"]
)


@on_older_x86
def test_choice_on_older_x86(x86_64: Path, cpu: list[str], isa: str) -> None:
    listing, default = isas([*cpu, x86_64 / "logits_main"])
    assert default == isa
    assert {name for name, state in listing.items() if state == "usable"} == {"scalar", isa}
    refused = run([*cpu, x86_64 / "logits_main", "isas"], FIXMIN_ISA="avx512")
    assert refused.returncode == 1
    assert "lacks the instruction set 'avx512'" in refused.stderr


@on_older_x86
def test_kernels_on_older_x86(x86_64: Path, cpu: list[str], isa: str) -> None:
    expected = kernel_hashes([x86_64 / "kernels_main", "scalar"])
    got = kernel_hashes([*cpu, x86_64 / "kernels_main", isa])
    # What an 8-bit activation is for NaN and infinity is not promised: the logits are NaN or infinite anyway.
    del expected["quantize not finite"], got["quantize not finite"]
    assert got == expected


@on_older_x86
def test_logits_on_older_x86(x86_64: Path, cpu: list[str], isa: str, models, expected_logits, tmp_path: Path) -> None:
    """What matters here is that no instruction is one that the CPU lacks; tests/engine has the threads and chunks."""
    command = [*cpu, x86_64 / "logits_main", "logits"]
    assert logits_that_differ(command, models, expected_logits, tmp_path, [(1, 7)]) == []


PYTHON_PROGRAM = """
import sys
import fixmin_cpp
print(fixmin_cpp.system_info()["isa"])
for path in sys.argv[1:]:
    with fixmin_cpp.Model(path, n_threads=1) as model:
        print(*model.generate(list(range(1, 9)), max_new_tokens=24).token_ids)
"""


@on_older_x86
def test_python_on_older_x86(x86_64: Path, cpu: list[str], isa: str, models: dict[str, Path]) -> None:
    """The module that users install, not a program beside it."""
    command = [sys.executable, "-c", PYTHON_PROGRAM, *models.values()]
    here, there = run(command, FIXMIN_ISA="scalar"), run([*cpu, *command])
    assert here.returncode == 0, here.stderr
    assert there.returncode == 0, there.stderr
    assert there.stdout.splitlines() == [isa, *here.stdout.splitlines()[1:]]


# --- the emulator itself -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("compiler", "package", "instruction", "cpu"),
    [
        ("c++", "g++", "vpaddd %ymm0, %ymm0, %ymm0", NEHALEM),
        ("c++", "g++", "vpaddd %zmm0, %zmm0, %zmm0", HASWELL),
        (
            "aarch64-linux-gnu-g++",
            "g++-aarch64-linux-gnu",
            ".arch armv8.2-a+dotprod; sdot v0.4s, v0.16b, v0.16b",
            CORTEX_A53,
        ),
    ],
    ids=["avx2", "avx512", "dotprod"],
)
def test_the_emulator_stops_on_what_a_cpu_lacks(
    compiler: str, package: str, instruction: str, cpu: list[str], tmp_path: Path
) -> None:
    """Otherwise the tests above could not fail."""
    if compiler == "c++" and platform.machine() != "x86_64":
        pytest.skip("this machine is not an x86-64 one")
    need(compiler, package)
    need(cpu[0], "qemu-user")
    source, program = tmp_path / "main.cpp", tmp_path / "main"
    source.write_text(f'int main() {{ __asm__ volatile("{instruction}"); }}\n')
    built = run([compiler, source, "-o", program])
    assert built.returncode == 0, built.stderr
    assert run([*cpu, program]).returncode == -signal.SIGILL
