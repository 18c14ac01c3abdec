"""The shipped demo checkpoints from end to end: converted, certified, and what they answer, token by token.

Logits are the same bits on every machine, so the golden generations are exact. After training the demo anew:

    FIXMIN_UPDATE_GOLDEN=1 pytest tests/python/test_demo.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fixmin_cpp

pytest.importorskip("torch")

DEMO = Path(__file__).parents[2] / "examples" / "demo"
GOLDEN = Path(__file__).with_name("golden_demo.json")
PROMPTS = {
    "Question: What is the capital of France?\nAnswer:": " Paris",
    "Question: What is the capital of UK?\nAnswer:": " London",
}
VARIANTS = ["fixed", "affine", pytest.param("learned", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=VARIANTS)
def demo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """(variant, path of its Q8_0 file)"""
    from fixmin_cpp.convert.convert import convert

    if not (DEMO / request.param).is_dir():
        pytest.skip("the source distribution has no learned model")
    path = tmp_path_factory.mktemp("demo") / f"{request.param}.gguf"
    report = convert(DEMO / request.param, path, "q8_0", trust_remote_code=True)
    assert report.certificate.passed
    return request.param, path


def test_cards_prompts(demo):
    with fixmin_cpp.Model(demo[1]) as model:
        for prompt, answer in PROMPTS.items():
            assert model.generate(prompt, max_new_tokens=3, do_sample=False).text.startswith(answer)
            assert model.generate(prompt, max_new_tokens=20, stop="\n").text == answer


def test_golden_generations(demo):
    variant, path = demo
    arguments = {
        "greedy": {"max_new_tokens": 60},
        "sampled": {"max_new_tokens": 60, "temperature": 0.8, "top_k": 40, "top_p": 0.95, "seed": 7},
    }
    with fixmin_cpp.Model(path) as model:
        got = {name: model.generate("Once upon a time,", **a).token_ids for name, a in arguments.items()}
    golden = json.loads(GOLDEN.read_text())
    if os.environ.get("FIXMIN_UPDATE_GOLDEN"):
        golden[variant] = got
        GOLDEN.write_text(json.dumps(golden) + "\n")
    assert got == golden[variant]


OPENED_AND_CLOSED = """
import resource, sys, fixmin_cpp
for i in range(301):
    model = fixmin_cpp.Model(sys.argv[1])
    model.generate("Once upon a time,", max_new_tokens=1)
    model.close()
    if i in (60, 300):
        print(int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize())
"""


def test_closed_models_leave_no_memory_behind(demo):
    """Also what only glibc still has, free but not given back: once a third of a MB for each."""
    command = [sys.executable, "-c", OPENED_AND_CLOSED, demo[1]]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    early, late = map(int, done.stdout.split())
    assert late - early < 20e6


def test_paragraph_is_made_of_words(demo):
    """60 tokens of prose: several sentences or a long one, of words that the training text has."""
    with fixmin_cpp.Model(demo[1]) as model:
        text = "Once upon a time," + model.generate("Once upon a time,", max_new_tokens=60).text
        known = set((DEMO / "heldout.txt").read_text(encoding="utf-8").replace("</s>", " ").split())
    words = text.split()[:-1]  # the last one may be cut
    assert len(words) > 30
    assert sum(word in known for word in words) >= 0.9 * len(words)


def test_streamed_and_scored_like_generated(demo):
    with fixmin_cpp.Model(demo[1]) as model:
        prompt = next(iter(PROMPTS))
        whole = model.generate(prompt, max_new_tokens=40)
        assert "".join(piece.text for piece in model.stream(prompt, max_new_tokens=40)) == whole.text
        text = "Question: What is the capital of France?\nAnswer: Paris"
        assert model.decode(model.encode(text)) == text
        assert model.score(text).nll < model.score(text.replace("Paris", "London")).nll
