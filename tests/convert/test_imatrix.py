"""`fixmin imatrix`: the inputs of every product, against PyTorch's own hooks and the float64 oracle."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_runs import score
from fixmin_cli import fixmin
from gguf import GGUFReader
from gguf_factory import make_model
from oracle import Oracle
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM

import fixmin_cpp
from fixmin_cpp import _core
from fixmin_cpp.convert.convert import convert
from fixmin_cpp.convert.imatrix import collect, read_imatrix, write_imatrix
from fixmin_cpp.errors import ArgumentError, GGUFError

DEMO = Path(__file__).parents[2] / "examples" / "demo"
FOLDED = {f"blk.0.attn_{part}.weight" for part in "qkv"}


def test_demo_against_hooks_of_pytorch(tmp_path):
    path = tmp_path / "demo.gguf"
    convert(DEMO / "fixed", path, "f32", trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(DEMO / "fixed", trust_remote_code=True, dtype=torch.float32).eval()
    sums = {}

    def record(name):
        def hook(module, inputs):
            sums[name] = (inputs[0].double() ** 2).flatten(0, -2)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(record(name))
    with fixmin_cpp.Model(path, kv_type="f32", n_threads=2) as loaded:
        ids = loaded.encode((DEMO / "heldout.txt").read_text(encoding="utf-8")[:600])[:100]
        with loaded.native() as engine:
            squares = _core.InputSquares(engine)
            squares.add(engine, np.array(ids, dtype=np.uint32))
        found = squares.sums
    with torch.no_grad():
        model(torch.tensor([ids]))
    expected = {}
    for name, values in sums.items():
        number = next((part for part in name.split(".") if part.isdigit()), None)
        tensor = "output.weight" if number is None else f"blk.{number}.{name.rpartition('.')[2]}.weight"
        # The last token's logits predict nothing in the text and are not computed.
        expected[tensor] = values[: len(ids) - (number is None)].sum(0).numpy()
    assert expected.keys() - FOLDED == found.keys()
    assert len(found) == 6 * 6 - 3 + 1
    for name, (values, count) in found.items():
        assert count == len(ids) - (name == "output.weight")
        np.testing.assert_allclose(values, expected[name], rtol=1e-3, atol=1e-5 * expected[name].max())


class Recorder(Oracle):
    """Adds up the squares of what every product is given."""

    def __init__(self, path):
        super().__init__(path)
        self.squares = {}

    def linear(self, x, name):
        rows = x[: self.rows] if name == "output" else x
        self.squares[name + ".weight"] = self.squares.get(name + ".weight", 0.0) + (rows**2).sum(0)
        return super().linear(x, name)

    def read(self, ids):
        self.rows = len(ids) - 1
        x = self.embed(np.asarray(ids, dtype=np.int64))
        for n in range(self.key("block_count")):
            x = x + self.attention(self.norm(x, f"blk.{n}.attn_norm"), f"blk.{n}.")
            x = x + self.feed_forward(self.norm(x, f"blk.{n}.ffn_norm"), f"blk.{n}.")
        self.linear(self.norm(x, "output_norm"), "output")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation": "swiglu", "norm": "rmsnorm", "weight_type": "F16"},
        {"code_kind": "learned", "head_count_kv": 2},
        {"weight_type": "Q8_0"},
    ],
    ids=str,
)
def test_file_against_the_oracle(tmp_path, options):
    path, out = make_model(tmp_path / "m.gguf", **options), tmp_path / "imatrix.gguf"
    ids = np.random.default_rng(1).integers(0, 100, 21)
    recorder = Recorder(path)
    for begin in (0, 10):  # the last chunk has a single token and is left out
        recorder.read(ids[begin : begin + 10])
    seen = []
    with fixmin_cpp.Model(path, kv_type="f32", n_batch=4) as model:
        report = collect(model, ids, out, ctx=10, dataset="numbers", progress=lambda *step: seen.append(step))
    assert (report.n_tokens, report.n_chunks, report.chunk_size) == (20, 2, 10)
    assert seen == [(1, 2), (2, 2)]

    reader = GGUFReader(out)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    assert keys["general.type"] == "imatrix"
    assert keys["imatrix.datasets"] == ["numbers"]
    assert (keys["imatrix.chunk_count"], keys["imatrix.chunk_size"]) == (2, 10)
    tensors = {t.name: t for t in reader.tensors}
    names = set(recorder.squares) - (set() if options.get("code_kind") == "learned" else FOLDED)
    assert set(tensors) == {n + end for n in names for end in (".in_sum2", ".counts")}
    tolerance = 3e-2 if "weight_type" in options else 1e-4
    means = read_imatrix(out)
    for name in names:
        sums, counts = tensors[name + ".in_sum2"], tensors[name + ".counts"]
        count = 18 if name == "output.weight" else 20
        assert (sums.data.shape, counts.data.shape) == ((1, len(recorder.squares[name])), (1, 1))
        assert counts.data[0, 0] == count
        largest = recorder.squares[name].max()
        np.testing.assert_allclose(sums.data[0], recorder.squares[name], rtol=tolerance, atol=tolerance * largest)
        np.testing.assert_array_equal(means[name], sums.data[0] / np.float32(count))


def test_same_bits_for_any_threads_batch_and_isa(tmp_path, monkeypatch):
    monkeypatch.setenv("FIXMIN_TEAM", "fixed")
    path = make_model(tmp_path / "m.gguf", weight_type="Q8_0", activation="swiglu")
    ids = np.random.default_rng(2).integers(0, 100, 40).astype(np.uint32)
    results = []
    for isa in _core.system_info()["isas_supported"]:
        for n_threads, n_batch in ((1, 512), (3, 512), (2, 1), (2, 7)):
            engine = _core.Engine(str(path), n_threads=n_threads, n_batch=n_batch, isa=isa)
            squares = _core.InputSquares(engine)
            logprobs = squares.add(engine, ids)
            assert np.array_equal(logprobs, score(engine, ids))
            results.append(squares.sums)
    for other in results[1:]:
        assert other.keys() == results[0].keys()
        assert all(np.array_equal(other[name][0], values) for name, (values, _) in results[0].items())


def test_sums_belong_to_their_engine(tmp_path):
    path = make_model(tmp_path / "m.gguf")
    first, second = _core.Engine(str(path)), _core.Engine(str(path))
    with pytest.raises(ArgumentError, match="another engine"):
        _core.InputSquares(first).add(second, np.arange(4, dtype=np.uint32))


def test_wrong_arguments(tmp_path):
    path, out = make_model(tmp_path / "m.gguf"), tmp_path / "out.gguf"
    with pytest.raises(ArgumentError, match="at least 2 tokens"):
        collect(path, [1], out)
    with pytest.raises(ArgumentError, match="ctx must be between 2 and 64"):
        collect(path, [1, 2], out, ctx=65)
    assert not out.exists()


def test_files_that_are_no_importance_matrix(tmp_path):
    path = tmp_path / "imatrix.gguf"
    for values, count, message in (
        (np.array([1.0, -1.0]), 3, "negative or not finite"),
        (np.array([1.0, np.nan]), 3, "negative or not finite"),
        (np.array([1.0, 1.0]), 0, "no importance of any tensor"),
    ):
        write_imatrix(path, {"a.weight": (values, count)}, [], 1, 1)
        with pytest.raises(GGUFError, match=message):
            read_imatrix(path)
    write_imatrix(path, {"a.weight": (np.ones(2), 1)}, [], 1, 1)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"a.weight.counts", b"b.weight.counts"))
    with pytest.raises(GGUFError, match=r"a\.weight\.counts' is missing"):
        read_imatrix(path)


def test_command(tmp_path):
    vocab = {letter: i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz \n")}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[])).to_str()
    model = make_model(tmp_path / "letters.gguf", vocab_size=len(vocab), tokenizer_json=tokenizer)
    text = tmp_path / "text.txt"
    text.write_text("the cat abc\n" * 20)
    out = tmp_path / "imatrix.gguf"
    result = fixmin("imatrix", "-m", model, "-f", text, "-o", out, "--ctx", 16, "--json")
    assert (result.returncode, result.stderr) == (0, b"")
    report = json.loads(result.stdout)
    assert report["n_tensors"] == len(read_imatrix(out))
    quantized = fixmin("quantize", model, tmp_path / "q.gguf", "q4_0", "--imatrix", out, "--json")
    tensors = json.loads(quantized.stdout)["tensors"]
    assert {t["name"] for t in tensors if t["has_importance"]} == set(read_imatrix(out))
