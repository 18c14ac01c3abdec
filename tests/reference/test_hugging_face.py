"""Saving, loading and generating through transformers, as the model cards tell their readers to."""

import filecmp
import importlib.util
import json
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline

from fixmin_cpp.reference import configuration_fixmin, modeling_fixmin
from fixmin_cpp.reference.configuration_fixmin import FixMinConfig

ROOT = Path(__file__).parents[2]
PROMPT = "Question: What is the capital of France?\nAnswer:"


@pytest.fixture(scope="module")
def make_checkpoint():
    spec = importlib.util.spec_from_file_location("make_checkpoint", ROOT / "bench" / "make_checkpoint.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["</s>"], show_progress=False
    )
    tokenizer.train_from_iterator([PROMPT + " Paris", "What is the opposite of hot? cold"] * 3, trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.mark.parametrize("kind", ["fixed", "affine", "table", "learned"])
def test_round_trip(make_model, tmp_path, kind):
    model = make_model(code_kind=kind, num_key_value_heads=1, attn_scale=0.3, code_values=[-1.0, 1.0])
    for name, buffer in model.named_buffers():
        if not name.endswith("matrix"):
            buffer.random_(0, 2, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values())
    assert type(loaded).__module__.startswith("transformers_modules")  # the copied code, not the installed one
    assert {name for name, _ in loaded.named_buffers()} == {name for name, _ in model.named_buffers()}
    ids = torch.tensor([[3, 299, 0, 17]])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert AutoConfig.from_pretrained(tmp_path, trust_remote_code=True).to_dict() == loaded.config.to_dict()


def test_bfloat16_keeps_the_code(make_model, tmp_path):
    model = make_model(code_kind="affine").to(torch.bfloat16)
    model.model.code.shift.fill_(1)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert loaded.dtype == torch.bfloat16
    assert loaded.model.code.shift.dtype == torch.uint8
    ids = torch.tensor([[3, 299, 0, 17]])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_greedy_generation_with_and_without_cache(make_model):
    model = make_model()
    ids = torch.tensor([[3, 299, 0, 17], [1, 2, 3, 4]])
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    cached = model.generate(ids, use_cache=True, **arguments)
    assert cached.shape == (2, 16)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **arguments))
    expected = ids
    for _ in range(12):
        with torch.no_grad():
            expected = torch.cat((expected, model(expected).logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(cached, expected)


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"no_repeat_ngram_size": 2},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=str,
)
def test_every_way_to_decode_with_and_without_cache(make_model, arguments):
    """Random weights, a padded batch: the tokens of transformers' loop over whole sequences."""
    model = make_model()
    ids, mask = torch.tensor([[5, 6, 7, 5, 6], [0, 0, 9, 8, 7]]), torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])
    if "prompt_lookup_num_tokens" in arguments:  # transformers does that for one row only
        ids, mask = ids[:1], mask[:1]
    # Up to 5.12 at least, transformers looks for an end of text while it guesses, whether there is one or not.
    on = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": 1}
    without = {k: v for k, v in arguments.items() if not k.startswith(("cache", "prompt"))}
    expected = model.generate(ids, use_cache=False, **on, **without)
    got = model.generate(ids, use_cache=True, **on, **arguments)
    if "prompt_lookup_num_tokens" in arguments and Version(transformers.__version__) < Version("5.23"):
        assert got.shape[1] <= expected.shape[1] + 1  # they may go a token further than asked for
        got = got[:, : expected.shape[1]]
    assert torch.equal(got, expected)


def test_made_checkpoint_answers_the_way_the_cards_ask(make_checkpoint, tokenizer_file, tmp_path):
    make_checkpoint.main(
        tmp_path, variant="affine", layers=2, width=32, heads=2, vocab_size=300, tokenizer=tokenizer_file
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    ids = tokenizer.encode(PROMPT)
    assert ids == Tokenizer.from_file(str(tokenizer_file)).encode(PROMPT).ids  # no token is added
    input_ids = torch.tensor([ids])
    output_ids = model.generate(input_ids, max_new_tokens=3, do_sample=False)
    assert output_ids.shape == (1, len(ids) + 3)
    text = tokenizer.decode(output_ids[0].tolist())
    assert text.startswith(PROMPT)
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    assert generate(PROMPT, max_new_tokens=3, do_sample=False)[0]["generated_text"] == text


@pytest.mark.parametrize("variant", ["fixed", "affine", "table", "learned"])
def test_make_checkpoint_shards_and_seeds(make_checkpoint, tmp_path, variant):
    options = {
        "num_hidden_layers": 3,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "vocab_size": 200,
        "code_kind": variant,
    }
    config = FixMinConfig(**options, activation="swiglu", num_key_value_heads=1)
    size = make_checkpoint.write_checkpoint(tmp_path / "one", config, seed=4)
    assert make_checkpoint.write_checkpoint(tmp_path / "many", config, shard_bytes=20_000, seed=4) == size
    make_checkpoint.write_checkpoint(tmp_path / "other", config, seed=5)
    shards = sorted((tmp_path / "many").glob("model-*.safetensors"))
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert len(shards) > 3
    assert {path.name for path in shards} == set(index["weight_map"].values())
    one, many, other = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, trust_remote_code=True)
        for name in ("one", "many", "other")
    )
    for (name, a), b, c in zip(
        one.state_dict().items(), many.state_dict().values(), other.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
        assert not torch.equal(a, c), name
    with torch.no_grad():
        out = one(torch.arange(64)[None], output_hidden_states=True)
    assert 0.5 < out.logits.std() < 8
    assert all(0.1 < state.std() < 10 for state in out.hidden_states)


def test_make_checkpoint_types(make_checkpoint, tmp_path):
    config = FixMinConfig(
        num_hidden_layers=1, hidden_size=32, num_attention_heads=2, vocab_size=200, code_kind="affine"
    )
    make_checkpoint.write_checkpoint(tmp_path, config, dtype="bfloat16")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        types = {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118 - not a dict
    codes = {name for name in types if name.startswith("model.code.")}
    assert codes == {"model.code.matrix", "model.code.shift"}
    assert {types[name] for name in codes} == {torch.uint8}
    assert {types[name] for name in types.keys() - codes} == {torch.bfloat16}


@pytest.mark.parametrize("width", [1, 2, 12, 16, 20])
def test_random_invertible(make_checkpoint, width):
    matrix = make_checkpoint.random_invertible(width, torch.Generator().manual_seed(width)).numpy().astype(int)
    rows = [int("".join(map(str, row)), 2) for row in matrix]
    rank = 0
    while rows:  # Gaussian elimination on integers
        pivot = rows.pop()
        if pivot:
            rank += 1
            low = pivot & -pivot
            rows = [row ^ pivot if row & low else row for row in rows]
    assert rank == width


def test_installed_reference_is_the_one_of_this_tree():
    for module in (configuration_fixmin, modeling_fixmin):
        name = Path(module.__file__).name
        assert filecmp.cmp(module.__file__, ROOT / "reference" / name, shallow=False)
