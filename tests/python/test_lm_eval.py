"""The harness' model "fixmin" beside the harness' own HFLM on the PyTorch model of the same checkpoint.

All tasks are YAML files over local data, made here: nothing is fetched.
"""

import json
import math
import os
import runpy
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partialmethod
from pathlib import Path

import pytest
from toy_models import byte_level, write_model

import fixmin_cpp
from fixmin_cpp import ArgumentError, UnsupportedError

# Before the first import of datasets and evaluate, which read them once.
for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"):
    os.environ.setdefault(name, "1")

torch = pytest.importorskip("torch")
lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from fixmin_cpp.lm_eval_model import FixMinLM  # noqa: E402

# Warnings: those of the harness and what it imports.
pytestmark = [pytest.mark.external, pytest.mark.filterwarnings("ignore")]

DEMO = Path(__file__).parents[2] / "examples" / "demo"
CAPITALS = {"France": "Paris", "UK": "London", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Kenya": "Nairobi"}
TASKS = {
    "choices": """
task: choices
dataset_path: json
dataset_kwargs: {data_files: {test: %s}, cache_dir: %s}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "prose": """
task: prose
dataset_path: json
dataset_kwargs: {data_files: {test: %s}, cache_dir: %s}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
    "answers": """
task: answers
dataset_path: json
dataset_kwargs: {data_files: {test: %s}, cache_dir: %s}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: " {{text}}"
generation_kwargs: {until: ["\\n", "."], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


@dataclass
class Bench:
    """The harness' models and tasks."""

    path: Path  # the GGUF file
    native: FixMinLM
    torch: HFLM
    tasks: TaskManager

    def run(self, model, **arguments) -> dict:
        return lm_eval.simple_evaluate(
            model=model, tasks=list(TASKS), task_manager=self.tasks, bootstrap_iters=0, log_samples=True, **arguments
        )


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    from fixmin_cpp.convert.convert import convert

    folder, threads = tmp_path_factory.mktemp("lm_eval"), torch.get_num_threads()
    torch.set_num_threads(1)
    path = folder / "fixed.gguf"
    convert(DEMO / "fixed", path, "f32", trust_remote_code=True, n_threads=1)
    reference = AutoModelForCausalLM.from_pretrained(DEMO / "fixed", trust_remote_code=True, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "fixed")
    hflm = HFLM(pretrained=reference.eval(), tokenizer=tokenizer, backend="causal", device="cpu", batch_size=4)
    native = FixMinLM(path, kv_type="f32", n_threads=1)
    yield Bench(path, native, hflm, write_tasks(folder / "tasks"))
    native.model.close()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def results(bench) -> dict:
    """Of all tasks, with the native model."""
    return bench.run(bench.native)


def write_tasks(folder: Path) -> TaskManager:
    heldout = (DEMO / "heldout.txt").read_text(encoding="utf-8").split("</s>")
    questions = [f"Question: What is the capital of {country}?\nAnswer:" for country in CAPITALS]
    towns = [f" {town}" for town in CAPITALS.values()]
    data = {
        "choices": [{"question": question, "choices": towns, "answer": i} for i, question in enumerate(questions)]
        + [  # several tokens, context that ends in a space, no context, and one that is longer than n_ctx
            {"question": "The cat ", "choices": ["sleeps on the mat.", "green the of"], "answer": 0},
            {"question": "", "choices": ["The wolf howls.", "wolf the. The howls"], "answer": 0},
            {"question": " ".join(heldout)[:2500], "choices": [" The", " zebra"], "answer": 0},
        ],
        # Shorter and longer than the context of 256 tokens, and of several windows.
        "prose": [{"text": text} for text in (heldout[0].strip(), " ".join(heldout)[:1200], " ".join(heldout)[:2500])],
        "answers": [{"question": q, "text": town} for q, town in zip(questions, CAPITALS.values(), strict=True)]
        + [{"question": " ".join(heldout)[:2500] + "\n" + questions[0], "text": "Lyon"}],
    }
    folder.mkdir()
    for name, rows in data.items():
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        (folder / f"{name}.yaml").write_text(TASKS[name] % (file, folder / "cache"), encoding="utf-8")
    return TaskManager(include_path=str(folder), include_defaults=False)


def loglikelihoods(model, pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    return model.loglikelihood(requests, disable_tqdm=True)


def continuations(model, contexts: list[str], **options) -> list[str]:
    requests = [Instance("generate_until", {}, (context, options), i) for i, context in enumerate(contexts)]
    return model.generate_until(requests, disable_tqdm=True)


# --- beside the harness' own model ----------------------------------------------------------------------------------


def test_tasks_give_what_they_give_in_pytorch(bench, results):
    got, expected = results, bench.run(bench.torch)
    for task, figures in expected["results"].items():
        numbers = {name: value for name, value in figures.items() if isinstance(value, float | int)}
        assert numbers
        assert {name: got["results"][task][name] for name in numbers} == pytest.approx(numbers, rel=1e-5), task
        for mine, other in zip(got["samples"][task], expected["samples"][task], strict=True):
            assert mine["doc"] == other["doc"]
            compare_responses(mine["filtered_resps"], other["filtered_resps"])
    assert 0.3 < got["results"]["choices"]["acc,none"] < 1
    assert 0.3 < got["results"]["answers"]["exact_match,none"] < 1


def compare_responses(got: list, expected: list) -> None:
    """Log-likelihoods are close; is_greedy and texts are equal."""
    assert len(got) == len(expected)
    for mine, other in zip(got, expected, strict=True):
        if isinstance(other, str):
            assert mine == other
        elif isinstance(other, float):
            assert mine == pytest.approx(other, rel=1e-5)
        else:
            assert float(mine[0]) == pytest.approx(float(other[0]), rel=1e-4, abs=1e-4)
            assert str(mine[1]) == str(other[1])


def test_batch_size_changes_nothing(bench, results):
    got = bench.run(FixMinLM(bench.native.model, batch_size=3))
    for task in TASKS:
        responses = [[sample["filtered_resps"] for sample in run["samples"][task]] for run in (got, results)]
        assert responses[0] == responses[1]


def test_log_likelihoods_by_hand(bench):
    """Every case of context and continuation against a log-softmax of the engine's logits in float64."""
    model = bench.native.model
    pairs = [
        ("The cat", " sleeps"),
        ("The cat ", "sleeps"),
        ("", "The cat"),
        ("The cat", " sat on a mat"),
        ("a", "\n\n"),
    ]
    tokens = [model.encode(context + continuation) for context, continuation in pairs]
    n_scored = [len(ids) - len(model.encode(pair[0].rstrip())) for ids, pair in zip(tokens, pairs, strict=True)]
    tokens[2], n_scored[2] = [bench.native.prefix_token_id, *tokens[2]], len(tokens[2])
    assert bench.native.prefix_token_id == 1, "the start token of the file, not its end-of-text token"
    for (logprob, greedy), ids, n in zip(loglikelihoods(bench.native, pairs), tokens, n_scored, strict=True):
        rows = torch.from_numpy(model.logits(ids)).double()[-n - 1 : -1]
        expected = torch.log_softmax(rows, -1)[range(n), ids[-n:]].sum()
        assert logprob == pytest.approx(float(expected), rel=1e-6)  # each is a float32
        assert greedy == (rows.argmax(-1).tolist() == ids[-n:])


def test_greedy_answers_are_greedy(bench):
    context = "Once upon a time,"
    answer = bench.native.model.generate(context, max_new_tokens=6).text
    assert bench.native.tok_encode(context + answer)[:-6] == bench.native.tok_encode(context)
    assert [greedy for _, greedy in loglikelihoods(bench.native, [(context, answer), (context, answer + "zz")])] == [
        True,
        False,
    ]


def test_long_requests_lose_their_beginning(bench, caplog):
    """With max_length 8 the model sees the last 8 tokens before each predicted one, at most."""
    short = FixMinLM(bench.native.model, max_length=8)
    context, continuation = "Once upon a time, there was a young girl called", " Olivia"
    ids = short.tok_encode(context + continuation)
    n = len(ids) - len(short.tok_encode(context))
    score = bench.native.model.score(ids[-9:])
    assert loglikelihoods(short, [(context, continuation)])[0][0] == pytest.approx(
        float(score.logprobs[-n:].sum()), rel=1e-5
    )
    # One request that cannot be scored says so and leaves the others what they are.
    plain = loglikelihoods(short, [("a", " b")])
    with caplog.at_level("WARNING", logger="fixmin_cpp.lm_eval_model"):
        assert loglikelihoods(short, [("a", context), ("a", " b"), ("a", "")]) == [
            (-math.inf, False),
            *plain,
            (0.0, True),
        ]
    assert "max_length is 8" in caplog.text
    assert "no tokens" in caplog.text
    text = bench.native.model.generate(short.tok_encode(context)[-5:], max_new_tokens=3).text
    assert continuations(short, [context], max_gen_toks=3) == [text]


# --- generation -----------------------------------------------------------------------------------------------------


def test_until(bench):
    text = bench.native.model.generate("Once upon a time,", max_new_tokens=20).text
    for until in ("girl", ["zebra", " white", "girl"], [], ["", "house"], None):
        stops = [until] if isinstance(until, str) else [stop for stop in until or [] if stop]
        expected = text[: min([text.find(stop) for stop in stops if stop in text], default=None)]
        got = continuations(bench.native, ["Once upon a time,"], until=until or [], max_gen_toks=20)
        assert got == [expected]
    aliases = [continuations(bench.native, ["The"], **{name: 4}) for name in ("max_gen_toks", "max_new_tokens")]
    assert aliases[0] == aliases[1] == [bench.native.model.generate("The", max_new_tokens=4).text]
    assert len(bench.native.tok_encode(continuations(bench.native, ["Once upon a time,"])[0])) > 20, "the default"


def test_sampling(bench):
    import random

    def draw(seed: int) -> list[str]:
        random.seed(seed)
        return continuations(bench.native, ["The"] * 3, do_sample=True, temperature=2.0, top_k=50, max_gen_toks=8)

    assert draw(1) == draw(1) != draw(2)
    assert len(set(draw(1))) == 3, "equal contexts get answers of their own"
    greedy = continuations(bench.native, ["The"], max_gen_toks=8)
    assert continuations(bench.native, ["The"], do_sample=False, temperature=0.9, max_gen_toks=8) == greedy
    assert continuations(bench.native, ["The"], do_sample=True, top_k=1, max_gen_toks=8) == greedy
    assert continuations(bench.native, ["The"], num_beams=1, repetition_penalty=1.0, max_gen_toks=8) == greedy


def test_groups_of_options_keep_their_order(bench):
    requests = [Instance("generate_until", {}, ("The", {"max_gen_toks": 2 + i % 2}), i) for i in range(5)]
    got = bench.native.generate_until(requests, disable_tqdm=True)
    assert got == [bench.native.model.generate("The", max_new_tokens=2 + i % 2).text for i in range(5)]


# --- how it is found ------------------------------------------------------------------------------------------------


def test_registered_and_made_from_model_args(bench):
    assert get_model("fixmin") is FixMinLM
    arguments = f"pretrained={bench.path},kv_type=q8_0,n_ctx=100,max_gen_toks=8"
    made = get_model("fixmin").create_from_arg_string(arguments, {"batch_size": "auto", "device": "cpu"})
    assert (made.max_length, made.max_gen_toks, made.batch_size) == (100, 8, 64)
    assert made.model.info["kv_type"] == "q8_0"
    assert made.tokenizer_name == str(bench.path)
    made.model.close()


def test_entry_point_names_the_class():
    from importlib.metadata import entry_points

    (found,) = entry_points(group="lm_eval.models", name="fixmin")
    assert found.load() is FixMinLM


def test_command_line(bench, results, tmp_path, monkeypatch, capsys):
    """As `python -m fixmin_cpp.lm_eval`, in this process and without a look at the harness' thousands of own tasks."""
    monkeypatch.setattr(TaskManager, "__init__", partialmethod(TaskManager.__init__, include_defaults=False))
    folder = Path(bench.path).parent / "tasks"
    options = ["run", "--model", "fixmin", "--model_args", f"pretrained={bench.path},kv_type=f32", "--tasks", "choices"]
    options += ["--include_path", str(folder), "--output_path", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *options])
    runpy.run_module("fixmin_cpp.lm_eval", run_name="__main__")
    assert "|choices|" in capsys.readouterr().out
    (file,) = tmp_path.rglob("results_*.json")
    figures = json.loads(file.read_text())["results"]["choices"]
    assert figures["acc,none"] == results["results"]["choices"]["acc,none"]


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"device": "mps"}, UnsupportedError, "runs on the CPU"),
        ({"max_length": 257}, ArgumentError, "max_length must be between 2 and 256, got 257"),
        ({"max_length": 1}, ArgumentError, "max_length"),
        ({"max_gen_toks": 0}, ArgumentError, "max_gen_toks"),
        ({"batch_size": 0}, ArgumentError, "batch_size"),
        ({"prefix_token_id": 4096}, ArgumentError, "prefix_token_id"),
    ],
)
def test_refused_arguments(bench, arguments, error, message):
    with pytest.raises(error, match=message):
        FixMinLM(bench.native.model, **arguments)


def test_refused_options(bench):
    for options, error, message in (
        ({"max_gen_toks": 256}, ArgumentError, "leaves no room"),
        ({"num_beams": 4}, UnsupportedError, "num_beams"),
        ({"repetition_penalty": 1.2}, UnsupportedError, "repetition_penalty"),
    ):
        with pytest.raises(error, match=message):
            continuations(bench.native, ["The"], **options)


def test_refused_files(bare_model_path, tmp_path):
    with pytest.raises(UnsupportedError, match="holds no tokenizer"):
        FixMinLM(bare_model_path)
    with pytest.raises(OSError, match="nowhere"):
        FixMinLM(tmp_path / "nowhere.gguf")
    model = FixMinLM(write_model(tmp_path / "toy.gguf", byte_level()))
    assert model.prefix_token_id == model.eot_token_id == model.model.info["eos_token_id"], "there is no start token"
    assert model.max_gen_toks == model.max_length // 2
    assert math.isfinite(loglikelihoods(model, [("", "the cat")])[0][0])
    model.model.close()
    with pytest.raises(fixmin_cpp.FixminError, match="closed"):
        loglikelihoods(model, [("a", "b")])


def test_a_token_across_context_and_continuation(tmp_path):
    """ "th" is one token: nothing is left of the continuation, which is then encoded alone after the whole context."""
    with fixmin_cpp.Model(write_model(tmp_path / "model.gguf", byte_level())) as model:
        lm = FixMinLM(model)
        assert len(lm.tok_encode("t")) == len(lm.tok_encode("th")) == 1
        score = model.score([*lm.tok_encode("t"), *lm.tok_encode("h")], start=1)
        got = loglikelihoods(lm, [("t", "h"), ("a", "b c")])
        assert got[0][0] == pytest.approx(float(score.logprobs.sum()), rel=1e-5)
        assert got[1] == loglikelihoods(lm, [("a", "b c")])[0]
