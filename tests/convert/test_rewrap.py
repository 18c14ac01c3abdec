"""Checkpoints by many authors, written once more with the reference model as their code: the same function."""

import errno
import json
import logging
import re
import resource
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import zoo  # noqa: E402
from fixmin_cli import fixmin  # noqa: E402
from safetensors import safe_open  # noqa: E402
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402

from fixmin_cpp.convert import rewrap as module  # noqa: E402
from fixmin_cpp.convert.rewrap import rewrap  # noqa: E402
from fixmin_cpp.errors import CheckpointError  # noqa: E402
from fixmin_cpp.reference import modeling_fixmin as modeling  # noqa: E402

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo"
HEAD_BIAS = (("config.vocab_size, bias=False", "config.vocab_size, bias=True"),)
# Unlike each other in code, norm, activation, rotation, heads, biases, layout of files and type.
STYLES = (
    "bochkov_tile",
    "bochkov_scrambled",
    "bochkov_signs",
    "bochkov_learned_tied",
    "bochkov_fp16_sharded_bin",
    "gpt2",
    "llama_gqa",
    "llama_q_bias_only",
    "neox",
    "seeded",
)


def own(folder: Path, **options):
    """As a user loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32, **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", STYLES)
def test_same_function(name, tmp_path, caplog):
    style = zoo.STYLES[name]
    zoo.make_checkpoint(style, tmp_path / "original")
    original = zoo.Original.load(tmp_path / "original", style)
    with caplog.at_level(logging.WARNING):
        report = rewrap(tmp_path / "original", tmp_path / "rewrapped", trust_remote_code=True)
        assert report.logit_error <= 1e-5
        assert report.against == "the checkpoint's own code"
        model = own(tmp_path / "rewrapped")
        ids = zoo.prompt(original)
        with torch.inference_mode():
            got = model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0].numpy()
        expected = original.logits(ids)
        got = got[:, : expected.shape[1]]
        assert np.linalg.norm(got - expected) <= 1e-5 * np.linalg.norm(expected)
        start = torch.from_numpy(ids[:5].astype(np.int64))[None]
        settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        some = {"attention_mask": torch.ones_like(start), **settings}
        cached, plain = (model.generate(start, use_cache=c, **some) for c in (True, False))
        assert torch.equal(cached, plain)
    assert [r.getMessage() for r in caplog.records if r.name.startswith("transformers")] == []


@pytest.fixture(scope="module")
def rewrapped(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("rewrapped") / "affine"
    done = fixmin("rewrap", DEMO / "affine", "-o", out, "--trust-remote-code")
    assert done.returncode == 0, done.stderr
    assert b"generates the same 8 with and without a cache" in done.stdout
    return out


@pytest.mark.slow
def test_demo_is_itself(rewrapped):
    """A checkpoint of the reference model has the same weights, bit for bit, and the same settings."""
    with (
        safe_open(DEMO / "affine" / "model.safetensors", "pt") as a,
        safe_open(rewrapped / "model.safetensors", "pt") as b,
    ):
        assert sorted(a.keys()) == sorted(b.keys())
        assert all(torch.equal(a.get_tensor(name), b.get_tensor(name)) for name in a.keys())  # noqa: SIM118
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (DEMO / "affine", rewrapped))
    assert after.pop("rewrapped_from")["checkpoint"] == "affine"
    for config in (before, after):
        for key in ("auto_map", "transformers_version", "attn_scale"):
            config.pop(key)
    assert after == before
    assert json.loads((rewrapped / "config.json").read_text())["auto_map"]["AutoModel"] == "modeling_fixmin.FixMinModel"
    assert len({path.stat().st_mode for path in rewrapped.iterdir()}) == 1


@pytest.mark.slow
def test_as_the_cards_say(rewrapped):
    tokenizer, model = AutoTokenizer.from_pretrained(rewrapped), own(rewrapped)
    ids = torch.tensor([tokenizer.encode("Question: What is the capital of UK?\nAnswer:")])
    answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    assert "Answer: London" in tokenizer.decode(answer[0].tolist())


@pytest.mark.slow
def test_torch_compile(rewrapped):
    model = own(rewrapped, attn_implementation="sdpa")
    compiled = torch.compile(model, backend="eager")  # the graph is captured; no compiler is needed to run it
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        assert torch.allclose(compiled(ids).logits, model(ids).logits, atol=1e-4)


@pytest.mark.slow
def test_no_bias_at_the_output(tmp_path):
    report = rewrap(DEMO / "affine", tmp_path / "out", fold_bias=True, trust_remote_code=True)
    assert report.logit_error <= 1e-5
    assert report.dtype == "float32"
    model = own(tmp_path / "out")
    assert model.lm_head.bias is None
    ids = torch.arange(100, 160)[None]
    with torch.inference_mode():
        got, expected = model(ids).logits, own(DEMO / "affine").eval()(ids).logits
    assert torch.norm(got - expected) <= 1e-5 * torch.norm(expected)
    zoo.make_checkpoint(zoo.Style(zoo.STYLES["llama"].author, {}, edits=HEAD_BIAS), tmp_path / "rms")
    with pytest.raises(CheckpointError, match="into a LayerNorm only"):
        rewrap(tmp_path / "rms", tmp_path / "no", fold_bias=True, trust_remote_code=True)


@pytest.mark.slow
def test_what_sglang_asks(rewrapped):
    """The steps of its Transformers back end that touch the model: attention of its own, told by module and arguments;
    a table in the place of the input embedding."""
    seen = []

    def attention(module, query, key, value, attention_mask, scaling=None, attention_instances=None, **others):
        seen.append((module.layer_idx, attention_instances, others["forward_batch"]))
        return modeling.eager_attention(
            module, query, key, value, modeling.causal_mask(query.shape[2], 0, None, query), scaling
        )

    model = AutoModel.from_pretrained(rewrapped, trust_remote_code=True, dtype=torch.float32)
    assert model._supports_attention_backend
    ids = torch.arange(100, 120)[None]
    with torch.inference_mode():
        expected = model(ids).last_hidden_state
        ALL_ATTENTION_FUNCTIONS["of_a_test"] = attention
        model.config._attn_implementation = "of_a_test"
        embedding = model.get_input_embeddings()
        model.set_input_embeddings(torch.nn.Embedding(embedding.num_embeddings, embedding.embedding_dim))
        got = model(
            input_ids=ids,
            inputs_embeds=None,
            use_cache=False,
            position_ids=torch.arange(20)[None],
            return_dict=False,
            forward_batch="batch",
            attention_instances={0: "a"},
        )[0]
    assert torch.allclose(got, expected, atol=1e-5)
    assert seen == [(layer, {0: "a"}, "batch") for layer in range(6)]
    with pytest.raises(ValueError, match="no input embedding to replace or to resize"):
        model.set_input_embeddings(torch.nn.Embedding(7, embedding.embedding_dim))


@pytest.mark.slow
def test_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_SHARD", 1_000_000)
    report = rewrap(DEMO / "fixed", tmp_path / "out", trust_remote_code=True)
    assert report.dtype == "bfloat16"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == files
    assert len(files) > 3
    assert index["metadata"]["total_size"] == sum(  # of the headers nothing is counted
        t.numel() * t.element_size() for t in own(tmp_path / "out").bfloat16().state_dict().values()
    )


def test_refusals(tmp_path, monkeypatch):
    for out, message in ((DEMO, "exists; name a folder that does not"), (tmp_path / "no" / "out", "no such folder")):
        with pytest.raises(CheckpointError, match=message):
            rewrap(DEMO / "fixed", out)
    for inside in (DEMO / "fixed" / "new", DEMO / "fixed" / ".." / "fixed" / "new"):
        with pytest.raises(CheckpointError, match="lies in the checkpoint's folder"):
            rewrap(DEMO / "fixed", inside)
    with pytest.raises(CheckpointError, match="no such checkpoint directory"):
        rewrap(tmp_path / "nothing", tmp_path / "out")
    assert fixmin("rewrap", DEMO / "fixed").returncode == 2


@pytest.mark.slow
def test_what_differs_is_not_kept(tmp_path, monkeypatch):
    """A checkpoint whose code does what the reference model does not, found by the comparison alone."""
    shutil.copytree(DEMO / "fixed", tmp_path / "checkpoint")
    write = module._write_weights

    def wrong(folder, resolved, config):
        config.norm_eps = 1e-3
        return write(folder, resolved, config)

    monkeypatch.setattr(module, "_write_weights", wrong)
    with pytest.raises(CheckpointError, match=r"differs from the checkpoint's own code by .*nothing is kept"):
        rewrap(tmp_path / "checkpoint", tmp_path / "out", trust_remote_code=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint"]


@pytest.mark.slow
def test_a_disk_that_takes_no_more_names_the_folder(tmp_path, monkeypatch):
    """What safetensors says of it is an error of its own class, with the system's number in its text."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # it would be cut off, and damaged from then on
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        with pytest.raises(OSError, match=re.escape(str(tmp_path / "out"))) as found:
            rewrap(DEMO / "fixed", tmp_path / "out", trust_remote_code=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (found.value.errno, found.value.filename) == (errno.EFBIG, str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []
