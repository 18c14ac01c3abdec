"""Which compiler CMake takes for the kernels, and what it is asked for: with compilers that only say what they are."""

import os
import subprocess
from pathlib import Path

import pytest
from emulation import ROOT, SEARCH_PATH

pytestmark = pytest.mark.slow  # each configures the project


def fake_nvcc(folder: Path, release: str, architectures: str) -> Path:
    folder.mkdir(parents=True)
    path = folder / "nvcc"
    codes = " ".join(f"sm_{a}" for a in architectures.split())
    path.write_text(
        f'#!/bin/sh\ncase "$1" in --version) echo "Cuda compilation tools, release {release}, V{release}.1";;\n'
        f"--list-gpu-code) printf '%s\\n' {codes};; *) exit 1;; esac\n"
    )
    path.chmod(0o755)
    return path


def configured(folder: Path, *options: str, **environment: str) -> tuple[int, str, str]:
    """Status and messages of cmake, and what it would run."""
    command = ["cmake", "-S", ROOT, "-B", folder / "build", "-GNinja", "-DFIXMIN_PYTHON=OFF"]
    command += ["-DFIXMIN_ONLY_ISAS=scalar", *options]
    env = {key: value for key, value in os.environ.items() if key not in ("CUDA_HOME", "CUDA_PATH")}
    env |= {"PATH": SEARCH_PATH} | environment
    done = subprocess.run([str(c) for c in command], env=env, capture_output=True, text=True, check=False)
    ninja = folder / "build" / "build.ninja"
    return done.returncode, done.stdout + done.stderr, ninja.read_text() if ninja.exists() else ""


def compiled(ninja: str) -> list[str]:
    """The architectures of -gencode and -arch options."""
    command = next(line for line in ninja.split("\n") if "--fatbin" in line and "COMMAND" in line)
    words = [word for word in command.split() if "code=" in word or "-arch=" in word]
    return [word.partition("code=")[2] or word.removeprefix("-arch=") for word in words]


def test_architectures_that_an_old_one_does_not_know_are_left_out(tmp_path):
    nvcc = fake_nvcc(tmp_path / "bin", "12.4", "70 75 80 86 89 90")
    status, said, ninja = configured(tmp_path, CUDA_HOME=str(tmp_path))
    assert status == 0, said
    assert str(nvcc) in said
    assert "does not know the architectures 100;120" in said
    assert compiled(ninja) == ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "compute_90"]
    assert "--compress-mode" not in ninja


def test_a_new_one_compiles_all_and_packs_them_tightly(tmp_path):
    fake_nvcc(tmp_path / "bin", "13.0", "75 80 86 89 90 100 110 120")
    status, said, ninja = configured(tmp_path, CUDA_HOME=str(tmp_path))
    assert status == 0, said
    assert compiled(ninja) == [*(f"sm_{a}" for a in (75, 80, 86, 89, 90, 100, 120)), "compute_90"]
    assert "--compress-mode=size" in ninja


@pytest.mark.parametrize(("chosen", "expected"), [("90", ["sm_90", "compute_90"]), ("native", ["native"])])
def test_fewer_architectures(tmp_path, chosen, expected):
    nvcc = fake_nvcc(tmp_path / "bin", "13.0", "75 80 90")
    options = (f"-DFIXMIN_CUDA_ARCHITECTURES={chosen}", f"-DFIXMIN_NVCC={nvcc}")
    status, said, ninja = configured(tmp_path, *options)
    assert status == 0, said
    assert compiled(ninja) == expected


@pytest.mark.parametrize(
    ("release", "codes", "reason"),
    [("11.8", "75 80", "12.0 or later is needed"), ("13.9", "140", "knows none of the architectures")],
)
def test_one_that_cannot_is_not_used(tmp_path, release, codes, reason):
    nvcc = fake_nvcc(tmp_path / "bin", release, codes)
    status, said, ninja = configured(tmp_path, f"-DFIXMIN_NVCC={nvcc}")
    assert status == 0, said
    assert "Without kernels for GPUs" in said
    assert reason in " ".join(said.split())
    assert "--fatbin" not in ninja
    status, said, _ = configured(tmp_path / "on", f"-DFIXMIN_NVCC={nvcc}", "-DFIXMIN_CUDA=ON")
    assert status != 0
    assert reason in " ".join(said.split())


def test_one_that_does_not_run(tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho broken >&2; exit 3\n")
    nvcc.chmod(0o755)
    status, said, _ = configured(tmp_path, f"-DFIXMIN_NVCC={nvcc}")
    assert status == 0, said
    assert "does not run: broken" in " ".join(said.split())


def test_the_package_from_pip_is_found(tmp_path):
    """nvidia-cuda-nvcc puts it into the namespace package nvidia of the Python that builds."""
    nvcc = fake_nvcc(tmp_path / "site" / "nvidia" / "cu13" / "bin", "13.0", "75 80 90")
    status, said, _ = configured(tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert status == 0, said
    assert f"Kernels for GPUs: {nvcc}" in said
