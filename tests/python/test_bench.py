"""`fixmin bench`: which figures there are, their signs, and that they fit each other. No speed is judged."""

import dataclasses
import json

import numpy as np
import pytest
from fixmin_cli import fixmin
from gguf_factory import make_model

from fixmin_cpp import _core
from fixmin_cpp.benchmark import bench, decode_bytes, default_read_buffer, prefill_operations
from fixmin_cpp.errors import ArgumentError, ArgumentTypeError

SMALL = {"n_prompt": 7, "n_generate": 3, "repeat": 2, "read_buffer_bytes": 1 << 20, "n_threads": 2}
ISAS = _core.system_info()["isas_supported"]


def by_hand(speeds, bounds):
    """Of two turns between three measurements of the bound; the median of two is their mean."""
    (a, b), (x, y, z) = speeds, bounds
    return (a / ((x + y) / 2) + b / ((y + z) / 2)) / 2


@pytest.mark.parametrize("kv_type", ["f32", "q8_0"])
def test_figures_fit_each_other(bare_model_path, kv_type):
    said = []
    report = bench(bare_model_path, depth=5, kv_type=kv_type, progress=said.append, **SMALL)
    assert report.kv_type == kv_type
    for name, value in dataclasses.asdict(report).items():
        if isinstance(value, float | list):
            assert np.all(np.array(value) > 0), name
    assert (report.threads, report.n_prompt, report.n_generate, report.depth, report.repeat) == (2, 7, 3, 5, 2)
    assert report.isa == _core.system_info()["isa"]
    assert len(report.prefill_tok_s_runs) == len(report.decode_tok_s_runs) == 2
    assert report.decode_tok_s == pytest.approx(np.mean(report.decode_tok_s_runs))  # the median of two
    assert len(report.read_ceiling_gb_s_runs) == len(report.int8_peak_tops_runs) == 3
    assert report.read_ceiling_gb_s == sorted(report.read_ceiling_gb_s_runs)[1]
    assert report.int8_peak_tops == sorted(report.int8_peak_tops_runs)[1]
    assert report.launch_us == pytest.approx(sorted(report.launch_us_runs)[1])
    bound = by_hand(report.decode_tok_s_runs, report.read_ceiling_gb_s_runs)
    assert report.decode_roofline == pytest.approx(bound * report.decode_bytes_per_token / 1e9)
    bound = by_hand(report.decode_tok_s_runs, report.cached_read_gb_s_runs)
    assert report.decode_cached_roofline == pytest.approx(bound * report.decode_bytes_per_token / 1e9)
    bound = by_hand(report.prefill_tok_s_runs, report.int8_peak_tops_runs)
    assert report.prefill_peak_fraction == pytest.approx(bound * report.prefill_operations_per_token / 1e12)
    assert said[0] == "loading"
    assert "run 2 of 2" in said


@pytest.mark.parametrize("weight_type", ["F32", "F16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("code_kind", ["affine", "learned"])
def test_bytes_and_operations_counted_by_hand(tmp_path, weight_type, code_kind):
    """From the shapes alone; sizes are multiples of 64, so that panels have no padding."""
    d, f, v, heads, kv_heads, layers, k = 64, 128, 128, 4, 2, 3, 7
    kv = kv_heads * d // heads
    path = make_model(
        tmp_path / "m.gguf",
        weight_type=weight_type,
        code_kind=code_kind,
        vocab_size=v,
        embedding_length=d,
        feed_forward_length=f,
        head_count=heads,
        head_count_kv=kv_heads,
        block_count=layers,
        biases=frozenset(),
        norm_bias=False,
    )
    # The factory keeps queries, keys and values of layer 0 at Q8_0 or more.
    bits = {"F32": 32, "F16": 16, "Q8_0": 8.5, "Q4_0": 4.5}[weight_type]
    qkv = d * (d + 2 * kv)
    blocks = layers * (d * d + 2 * d * f) + (layers - (code_kind == "affine")) * qkv
    more = qkv * (8.5 - 4.5) / 8 if weight_type == "Q4_0" and code_kind == "learned" else 0
    norms = 1 + 2 * layers - (code_kind == "affine")
    first = (k + 2) * (d + 2 * kv) * 4 if code_kind == "affine" else d * bits / 8
    info = _core.Engine(str(path), n_threads=1, kv_type="f16").info
    assert info["bytes_per_token"] == (blocks + d * v) * bits / 8 + more + norms * d * 4 + first
    assert info["block_product_weights"] == blocks
    # 10 cached positions, then 3 tokens that read 11, 12 and 13: keys and values in two bytes.
    assert decode_bytes(info, 10, 3) == info["bytes_per_token"] + 12 * layers * 2 * kv * 2
    pairs = 1 + 2 + 3 + 4 + 5
    assert prefill_operations(info, 5) == 2 * (5 * blocks + d * v) + layers * d * 4 * pairs


@pytest.mark.parametrize("isa", ISAS)
def test_ceilings_of_every_isa(bare_model_path, isa):
    engine = _core.Engine(str(bare_model_path), n_threads=2, isa=isa)
    for n_bytes in (8192, 12288, 1 << 20):
        assert [rate > 0 for rate in engine.read_ceiling(n_bytes, 2)] == [True] * 2
    assert [rate > 0 for rate in engine.int8_ceiling(1)] == [True]
    assert [rate > 0 for rate in engine.tile_ceiling(1)] == [True] * (isa == "amx")
    assert [0 < seconds < 1 for seconds in engine.launch_ceiling(2)] == [True] * 2
    with pytest.raises(ArgumentError, match="4096 bytes for each thread"):
        engine.read_ceiling(4096)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"repeat": 0}, ArgumentError, "repeat must be"),
        ({"depth": -1}, ArgumentError, "depth must be"),
        ({"depth": 63}, ArgumentError, "leaves no room"),
        ({"n_prompt": 65}, ArgumentError, "n_prompt must be between 1 and 64"),
        ({"depth": 60, "n_generate": 10}, ArgumentError, "at most 3 can be generated"),
        ({"n_generate": 1.5}, ArgumentTypeError, "n_generate must be an integer"),
        ({"kv_type": "q1"}, ArgumentError, "kv_type"),
    ],
)
def test_wrong_arguments(bare_model_path, arguments, error, message):
    with pytest.raises(error, match=message):
        bench(bare_model_path, **arguments)


def test_command(bare_model_path):
    options = ["-m", bare_model_path, "--prompt", 5, "--generate", 2, "--repeat", 1, "--threads", 1]
    result = fixmin("bench", *options, "--json")
    assert (result.returncode, result.stderr) == (0, b"")
    report = json.loads(result.stdout)
    required = (
        "prefill_tok_s decode_tok_s read_ceiling_gb_s decode_bytes_per_token decode_roofline int8_peak_tops "
        "prefill_peak_fraction launch_us load_s rss_bytes isa threads"
    )
    assert set(required.split()) <= report.keys()
    helped = fixmin("bench", "--help").stdout
    assert all(name.encode() in helped for name in required.split()[:-2])
    assert fixmin("bench", *options, "--depth", 1000).stderr.startswith(b"error: depth 1000 leaves no room")


def test_no_gigabyte_for_a_small_file(bare_model_path):
    mib = 1 << 20
    options = SMALL | {"read_buffer_bytes": None, "repeat": 1}
    assert bench(bare_model_path, **options).read_buffer_bytes == 16 * mib
    assert default_read_buffer(10 * mib) <= 40 * mib
    assert default_read_buffer(1 << 40) == pytest.approx(default_read_buffer(), rel=0.2)  # memory comes and goes
