"""A batch job on Ray, each of whose actors has a GPU from Ray."""

import json
from pathlib import Path

import pytest
from gguf_factory import make_model

pytest.importorskip("ray", reason="needs fixmin-cpp[ray]")

pytestmark = [pytest.mark.slow, pytest.mark.external]

JOB = """
import os, sys, ray
from fixmin_cpp.batch import run_batch
model, source, target = sys.argv[1:]
os.environ["EMULATED_LOG"] = target + ".log"
ray.init(num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
options = {"max_new_tokens": 4, "temperature": 1.0}
run_batch(model, source, target + ".cpu", options=options, device="cpu", token_ids=True)
report = run_batch(model, source, target + ".gpu", options=options, device="cuda", token_ids=True,
                   ray_address="auto", ray_lines=2)
assert report.n_errors == 0
"""


def test_every_actor_has_the_gpu_that_ray_gave_it(emulated, tmp_path):
    model = make_model(tmp_path / "model.gguf", vocab_size=100, embedding_length=32, head_count=2, weight_type="Q8_0")
    source, target = tmp_path / "in.jsonl", tmp_path / "out"
    source.write_text("".join(json.dumps({"prompt": [1 + i, 2, 3]}) + "\n" for i in range(12)))
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}
    done = emulated("-W", "ignore", "-c", JOB, model, source, target, **quiet)
    assert done.returncode == 0, done.stderr[-3000:]
    cpu, gpu = (list(map(json.loads, Path(f"{target}.{name}").read_text().splitlines())) for name in ("cpu", "gpu"))
    assert [one["token_ids"] for one in gpu] == [one["token_ids"] for one in cpu]
    assert len(gpu) == 12
    assert sorted(Path(f"{target}.log").read_text().split()) == ["0", "1"]
