"""NVIDIA's driver in every bad state that it may have: a fake libcuda.so.1 that fails as it is told.

For a package that was built with a compiler for CUDA; no GPU is needed.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from gguf_factory import make_model

import fixmin_cpp

pytestmark = [
    pytest.mark.skipif(not fixmin_cpp.system_info()["cuda_built"], reason="this package was built without nvcc"),
]

FAKE = Path(__file__).with_name("fake_driver.c")
FORKS = Path(__file__).with_name("forks.py")


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the fakes of the driver and of its management library."""
    folder = tmp_path_factory.mktemp("driver")
    for name in ("libcuda.so.1", "libnvidia-ml.so.1"):
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", folder / name, FAKE], check=True)
    return folder


def load(path: Path, folder: Path | None, device: str = "cuda", **fails: str) -> dict[str, str]:
    """What comes of loading a model: {"error": type and text} or {"device": what it runs on}."""
    program = (
        "import json, sys, fixmin_cpp\n"
        "try:\n"
        "    with fixmin_cpp.Model(sys.argv[1], device=sys.argv[2]) as model:\n"
        "        found = {'device': model.info['device']}\n"
        "        found['text'] = str(model.generate([1, 2], max_new_tokens=6).token_ids)\n"
        "except Exception as error:\n"
        "    found = {'error': f'{type(error).__name__}: {error}'}\n"
        "with fixmin_cpp.Model(sys.argv[1], device='cpu') as model:\n"
        "    found['cpu'] = str(model.generate([1, 2], max_new_tokens=2).token_ids)\n"
        "print(json.dumps(found))\n"
    )
    env = os.environ | {name if name.isupper() else "FAKE_" + name.upper(): value for name, value in fails.items()}
    if folder is not None:
        env["LD_LIBRARY_PATH"] = str(folder)
    done = subprocess.run(
        [sys.executable, "-c", program, path, device], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["cpu"].startswith("[")  # the process and other models live on
    return found


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "model.gguf", weight_type="Q8_0")


@pytest.mark.parametrize(
    ("fails", "says"),
    [
        ({"version": "11080"}, "the NVIDIA driver is too old: it supports CUDA 11.8, needed is 12.0"),
        ({"init": "100"}, "the NVIDIA driver finds no usable GPU: failure 100 of the fake (CUDA error 100)"),
        ({"devices": "0"}, "there is no GPU cuda:0: the driver shows 0"),
        ({"capability": "70"}, "Fake GPU is too old: it has compute capability 7.0, needed is 7.5"),
        ({"module": "209"}, "Fake GPU gives no kernels: failure 209 of the fake (CUDA error 209)"),
        ({"context": "46"}, "Fake GPU gives no context: failure 46 of the fake (CUDA error 46)"),
    ],
)
def test_a_gpu_that_cannot_be_used(driver, model_path, fails, says):
    found = load(model_path, driver, **fails)
    assert found["error"] == f"UnsupportedError: {model_path}: device 'cuda': {says}"
    assert load(model_path, driver, device="auto", **fails)["device"] == "cpu"


def test_errors_name_the_environment(driver, model_path):
    program = "import sys, fixmin_cpp; fixmin_cpp.Model(sys.argv[1])"
    for device, says in {
        "cuda:3": "FIXMIN_DEVICE 'cuda:3': there is no GPU cuda:3: the driver shows 1",
        "gpu": "FIXMIN_DEVICE is 'gpu'; known: auto, cpu, cuda, cuda:N",
    }.items():
        env = os.environ | {"LD_LIBRARY_PATH": str(driver), "FIXMIN_DEVICE": device}
        done = subprocess.run(
            [sys.executable, "-c", program, model_path], env=env, capture_output=True, text=True, check=False
        )
        assert done.stderr.rstrip().endswith(says)


def test_a_driver_that_cannot_be_loaded(model_path, tmp_path):
    (tmp_path / "libcuda.so.1").write_text("no library")
    found = load(model_path, tmp_path)
    assert "device 'cuda': the NVIDIA driver cannot be loaded: " in found["error"]
    assert "libcuda.so.1" in found["error"]


def test_a_batch_job_ends_where_the_device_fails(driver, model_path, tmp_path):
    """And can be taken up: its lines are not to blame."""
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": [1, 2], "max_new_tokens": 2}\n' * 5)

    def run(device: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "fixmin_cpp", "batch", source, out, "-m", model_path, "--device", device]
        env = os.environ | {"LD_LIBRARY_PATH": str(driver)} | environment
        return subprocess.run([*command, "--token-ids"], env=env, capture_output=True, text=True, check=False)

    failed = run("cuda", FAKE_LAUNCH="719")
    assert failed.returncode == 1
    assert "Fake GPU has failed: failure 719 of the fake" in failed.stderr
    assert not out.exists()
    again = run("cpu")
    assert again.returncode == 0, again.stderr
    assert [json.loads(line)["error"] for line in out.read_text().splitlines()] == [None] * 5


def test_without_a_driver(model_path):
    if any(Path(folder, "libcuda.so.1").exists() for folder in ("/usr/lib/x86_64-linux-gnu", "/usr/lib64")):
        pytest.skip("this machine has a driver")
    found = load(model_path, None)
    assert found["error"].endswith("no NVIDIA driver is installed (libcuda.so.1 is not found)")
    assert load(model_path, None, device="auto")["device"] == "cpu"


def test_out_of_memory_names_the_bytes(driver, model_path):
    found = load(model_path, driver, memory="300000")
    assert found["error"].startswith(f"MemoryError: {model_path}: not enough memory: the GPU has no ")
    assert " bytes for a model: weights, " in found["error"]
    assert "of 300000 are free" in found["error"]


@pytest.mark.parametrize("what", ["launch", "graph"])
def test_a_device_that_fails_while_it_computes(driver, model_path, what):
    found = load(model_path, driver, **{what: "719"})
    assert found["error"] == "DeviceError: Fake GPU has failed: failure 719 of the fake (CUDA error 719)"


def test_everything_is_given_back(driver, model_path, tmp_path):
    log = tmp_path / "log"
    load(model_path, driver, log=str(log))
    lines = log.read_text().split("\n")
    assert lines.count("alloc") == lines.count("free") == 1
    # A step that comes again is recorded once.
    for what in ("graph", "destroy graph", "instantiate", "destroy instance"):
        assert lines.count(what) == 1
    assert lines.count("retain") == lines.count("release") == 1
    assert lines.count("load") == lines.count("unload") == 1


@pytest.mark.parametrize(
    ("resident", "capability", "graphs"), [("1", "90", 0), ("0", "90", 1), ("1", "89", 1), ("1", "80", 0)]
)
def test_one_kernel_for_a_step_where_its_blocks_fit(driver, model_path, tmp_path, resident, capability, graphs):
    log = tmp_path / "log"
    load(
        model_path,
        driver,
        log=str(log),
        resident=resident,
        capability=capability,
        FIXMIN_CUDA_STEP="persistent",
    )
    lines = log.read_text().split("\n")
    assert lines.count("instantiate") == lines.count("destroy instance") == graphs
    assert (lines.count("persistent") > 1) == (graphs == 0)
    assert lines.count("alloc") == lines.count("free")


def test_an_unknown_kind_of_step(driver, model_path):
    found = load(model_path, driver, FIXMIN_CUDA_STEP="fast")
    assert found["error"] == "ArgumentError: FIXMIN_CUDA_STEP is 'fast'; it must be graph or persistent"


def test_fork(driver, model_path):
    """What children say; the parent's model goes on. The fake computes nothing, so that nothing is compared."""
    env = os.environ | {"LD_LIBRARY_PATH": str(driver)}
    command = [sys.executable, "-W", "ignore", FORKS, model_path]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    reason = 'this process was forked from one that has used a GPU, and CUDA does not work in it: start it by "spawn"'
    assert done.stdout.splitlines() == [
        f"DeviceError {reason}",
        f"UnsupportedError {model_path}: device 'cuda': {reason}",
        "parent",
    ]


def test_what_info_shows(driver, tmp_path):
    def info(**fails: str) -> dict[str, object]:
        env = os.environ | {"LD_LIBRARY_PATH": str(driver)} | {"FAKE_" + k.upper(): v for k, v in fails.items()}
        command = [sys.executable, "-m", "fixmin_cpp.cli", "info", "--json"]
        return json.loads(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout)

    gpu = {"name": "Fake GPU", "architecture": "sm_90", "memory_bytes": 1 << 30}
    found = info(version="12040")
    assert (found["cuda_driver"], found["gpus"]) == ("CUDA 12.4 (driver 580.65.06)", [gpu])
    for fails in {"nvml": "9"}, {"release": "999"}:  # what NVML returns
        assert info(**fails)["cuda_driver"] == "CUDA 13.0"
    assert info(devices="2")["gpus"] == [gpu, gpu]
    log = tmp_path / "log"
    info(log=str(log))
    assert log.read_text() == "nvml init\nnvml shutdown\n"  # and no context
    found = info(version="11080")
    assert found["cuda_driver"] == "none: the NVIDIA driver is too old: it supports CUDA 11.8, needed is 12.0"
    assert found["gpus"] == []


def test_auto_and_numbers_say_which(driver, model_path):
    assert load(model_path, driver, device="auto")["device"] == "cuda"
    assert load(model_path, driver, device="cuda:1", devices="2")["device"] == "cuda:1"
    found = load(model_path, driver, device="cuda:2", devices="2")
    assert (
        found["error"] == f"UnsupportedError: {model_path}: device 'cuda:2': there is no GPU cuda:2: the driver shows 2"
    )
