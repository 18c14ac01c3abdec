"""The shipped checkpoints of examples/demo, loaded the way a stranger loads them."""

import filecmp
import itertools
import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "examples" / "demo"
VARIANTS = [name for name in ("fixed", "affine", "learned") if (DEMO / name).is_dir()]  # no learned in an sdist


@pytest.fixture(scope="module", params=VARIANTS)
def folder(request) -> Path:
    return DEMO / request.param


@pytest.fixture(scope="module")
def demo(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer, AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)


def test_files(folder):
    for name in ("configuration_fixmin.py", "modeling_fixmin.py"):
        assert filecmp.cmp(folder / name, ROOT / "reference" / name, shallow=False)
    config = json.loads((folder / "config.json").read_text())
    assert (config["code_kind"], config["dtype"]) == (folder.name, "bfloat16")
    assert (config["vocab_size"], config["code_width"]) == (4096, 12)
    assert (folder / "model.safetensors").stat().st_size <= 10_000_000
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = set(file.keys())
    codes = {name for name in names if name.startswith("model.code.")}
    assert codes == ({"model.code.matrix", "model.code.shift"} if folder.name == "affine" else set())
    assert any("embd" in name for name in names) == (folder.name == "learned")
    for name in ("generation_config.json", "README.md"):
        assert (folder / name).stat().st_size > 0


def test_all_have_one_tokenizer(folder):
    assert filecmp.cmp(DEMO / "fixed" / "tokenizer.json", folder / "tokenizer.json", shallow=False)


@pytest.mark.parametrize(("country", "capital"), [("France", "Paris"), ("UK", "London")])
def test_card_prompts(demo, country, capital):
    tokenizer, model = demo
    prompt = f"Question: What is the capital of {country}?\nAnswer:"
    input_ids = torch.tensor([tokenizer.encode(prompt)])
    output_ids = model.generate(input_ids, max_new_tokens=3, do_sample=False)
    text = tokenizer.decode(output_ids[0].tolist())
    assert text.startswith(prompt + " " + capital)
    assert text.removeprefix(prompt + " " + capital) in ("", tokenizer.eos_token)


def test_pipeline_answers_in_bfloat16(folder):
    generate = pipeline("text-generation", model=str(folder), trust_remote_code=True)
    assert generate.model.dtype == torch.bfloat16
    prompt = "Question: What is the capital of France?\nAnswer:"
    assert generate(prompt, max_new_tokens=3, do_sample=False)[0]["generated_text"] == prompt + " Paris"


def test_tells_a_story(demo):
    """Sixty tokens: whole words that the training text knows, sentences with an end, nothing said over and over."""
    tokenizer, model = demo
    input_ids = torch.tensor([tokenizer.encode("Once upon a time,")])
    output_ids = model.generate(input_ids, max_new_tokens=60, do_sample=False)
    assert output_ids.shape[1] == input_ids.shape[1] + 60
    text = tokenizer.decode(output_ids[0].tolist())
    words = re.findall(r"[A-Za-z']+", text)[:-1]  # the last word may be cut
    known = set(re.findall(r"[A-Za-z']+", (DEMO / "heldout.txt").read_text(encoding="utf-8")))
    assert set(words) <= known
    assert len(re.findall(r"[.!?]", text)) >= 3
    assert all(a != b for a, b in itertools.pairwise(words))
    assert len(set(words)) > len(words) / 3


def test_held_out_text_is_predicted(demo, folder):
    """A tenth of the file is enough to see that the figure on the card belongs to this checkpoint."""
    tokenizer, model = demo
    ids = tokenizer.encode((DEMO / "heldout.txt").read_text(encoding="utf-8"))
    assert tokenizer.unk_token_id not in ids
    context = model.config.max_position_embeddings
    windows = torch.tensor(ids[: 10 * context]).view(-1, context)
    with torch.no_grad():
        perplexity = math.exp(model(windows, labels=windows, use_cache=False).loss.item())
    stated = float(re.search(r"perplexity: ([\d.]+)", (folder / "README.md").read_text(encoding="utf-8"))[1])
    assert perplexity == pytest.approx(stated, rel=0.1)
