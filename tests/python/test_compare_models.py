"""fixmin_cpp.compare: figures against NumPy, what is kept and what is measured again, the files that it writes."""

import csv
import io
import json
import math
import re
import sys
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixmin_cli import fixmin
from gguf_factory import make_model
from numpy.typing import NDArray
from toy_models import byte_level, concatenating, write_model

import fixmin_cpp
from fixmin_cpp import ArgumentError, FixminError, Model
from fixmin_cpp.compare import (
    Comparison,
    Figure,
    Mixture,
    TaskScore,
    compare,
    comparison,
    corpus,
    csv_table,
    latex,
    markdown,
    report,
    write_report,
)
from fixmin_cpp.compare.models import distinct_names
from fixmin_cpp.compare.results import ratio
from fixmin_cpp.compare.store import Store

TEXT = "the cat and the hat, 日本 at the baths</s>" * 12
EYE = np.eye(9, dtype=np.uint8)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A fixed, an affine and a learned one with the same tokenizer."""
    folder, tokenizer = tmp_path_factory.mktemp("compared"), byte_level()
    width = (tokenizer.get_vocab_size() - 1).bit_length()
    assert width == len(EYE)
    return [
        write_model(folder / "fixed.gguf", tokenizer, matrix=EYE, shift=EYE[0] * 0),
        write_model(folder / "affine.gguf", tokenizer, seed=1),
        write_model(folder / "learned.gguf", tokenizer, seed=2, code_kind="learned"),
    ]


@pytest.fixture(scope="module")
def found(paths: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return compare(paths, TEXT, tmp_path_factory.mktemp("out"), ctx=48, repeat=2, n_prompt=8, n_generate=4)


def losses(path: Path, text: str, ctx: int) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.uint32]]:
    """Sum of -log p of each window and how many tokens that is, from logits in float64; and the ids."""
    with Model(path, n_threads=1) as model:
        ids = model.token_ids(text)
        sums, counts = [], []
        for begin in range(0, len(ids) - 1, ctx):
            window = ids[begin : begin + ctx]
            logits = model.logits(window)[:-1].astype(np.float64)
            logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
            sums.append(-logprobs[np.arange(len(window) - 1), window[1:]].sum())
            counts.append(len(window) - 1)
    return np.array(sums), np.array(counts, np.float64), ids


def error_of_ratio(sums: NDArray[np.float64], counts: NDArray[np.float64]) -> float:
    """The jackknife's: leave out a window, again and again."""
    n = len(sums)
    left = np.array([np.delete(sums, i).sum() / np.delete(counts, i).sum() for i in range(n)])
    return math.sqrt((n - 1) / n * ((left - left.mean()) ** 2).sum())


# --- figures ---------------------------------------------------------------------------------------------------------


def test_perplexity_and_its_error(paths, found):
    for path, row in zip(paths, found.rows, strict=True):
        sums, counts, ids = losses(path, TEXT, 48)
        assert row.text.window_nll == pytest.approx(sums.tolist(), rel=1e-5)
        assert row.text.window_tokens == counts.tolist()
        assert row.text.n_tokens == len(ids)
        nll = sums.sum() / counts.sum()
        assert row.nll.value == pytest.approx(nll, rel=1e-5)
        assert row.nll.error == pytest.approx(error_of_ratio(sums, counts), rel=0.1)
        assert row.perplexity.value == pytest.approx(math.exp(nll), rel=1e-5)
        assert row.perplexity.error == pytest.approx(math.exp(nll) * row.nll.error, rel=1e-5)
        assert row.perplexity.value == pytest.approx(fixmin_cpp.perplexity(path, TEXT, ctx=48).perplexity, rel=1e-6)


def test_errors_of_known_samples():
    sums = [3.0, 5.0, 4.0, 8.0]
    plain = ratio(sums, [1, 1, 1, 1])
    assert plain.value == 5.0
    assert plain.error == pytest.approx(np.std(sums, ddof=1) / 2)
    assert ratio([3.0], [2]) == Figure(1.5, None)
    # A window of few tokens counts for little.
    assert ratio([*sums, 0.09], [100, 100, 100, 100, 1]).value == pytest.approx(20.09 / 401)
    # Windows whose tokens are all alike: more tokens in each are no more samples.
    assert ratio([30.0, 50.0, 40.0, 80.0], [10] * 4).error == pytest.approx(plain.error)


def test_differences_are_paired(paths, found):
    assert found.rows[0].against_first is None
    first, counts, _ = losses(paths[0], TEXT, 48)
    for path, row in zip(paths[1:], found.rows[1:], strict=True):
        other = losses(path, TEXT, 48)[0]
        nll = (other - first).sum() / counts.sum()
        assert row.against_first.nll.value == pytest.approx(nll, rel=1e-3, abs=1e-6)
        assert row.against_first.nll.error == pytest.approx(error_of_ratio(other - first, counts), rel=0.1)
        assert row.against_first.percent.value == pytest.approx(
            100 * (row.perplexity.value / found.rows[0].perplexity.value - 1), rel=1e-6
        )
        assert row.against_first.percent.error == pytest.approx(
            row.against_first.nll.error * (100 + row.against_first.percent.value), rel=1e-6
        )


def test_bits_per_byte_count_the_bytes_of_scored_tokens(paths, found):
    with Model(paths[0]) as model:
        ids = model.token_ids(TEXT)
        tokenizer = model.require_tokenizer()
        sizes = [len(tokenizer.token_bytes(i)) for i in ids.tolist()]
    assert sum(sizes) == len(TEXT.encode())
    scored = sum(size for i, size in enumerate(sizes) if i % 48)
    for row in found.rows:
        assert sum(row.text.window_bytes) == pytest.approx(scored)
        assert row.bits_per_byte.value == pytest.approx(sum(row.text.window_nll) / math.log(2) / scored)


def test_facts_of_the_files(paths, found):
    fixed, affine, learned = (row.facts for row in found.rows)
    assert [one.variant for one in (fixed, affine, learned)] == ["fixed", "affine", "learned"]
    assert [one.n_input_parameters for one in (fixed, affine, learned)] == [0, 0, learned.vocab_size * 64]
    assert fixed.n_parameters == affine.n_parameters == learned.n_parameters - learned.n_input_parameters
    assert [one.code_bits for one in (fixed, affine, learned)] == [0, 90, 0]
    assert [one.types for one in (fixed, affine, learned)] == ["F32"] * 3
    assert [one.file_bytes for one in (fixed, affine, learned)] == [path.stat().st_size for path in paths]
    assert [row.paper_perplexity for row in found.rows] == [2.36, 2.39, 2.44]
    assert found.notes == []


def test_a_table_of_codes_and_weight_types(tmp_path):
    table = write_model(tmp_path / "table.gguf", byte_level(), code_kind="table", weight_type="Q8_0")
    w8a8 = write_model(tmp_path / "w8a8.gguf", byte_level(), weight_type="W8A8")
    plain = write_model(tmp_path / "plain.gguf", byte_level())
    found = compare([table, w8a8, plain], TEXT, tmp_path / "out", speed=False)
    facts = [row.facts for row in found.rows]
    assert (facts[0].variant, facts[0].code_bits, facts[0].types) == ("table", 9 * facts[0].vocab_size, "Q8_0")
    assert found.rows[0].paper_perplexity is None
    assert len({one.n_parameters for one in facts}) == 1, "neither packed codes nor scales of rows are parameters"
    assert "weight types" in found.notes[0]


def test_speeds_are_medians_of_turns(found):
    for row in found.rows:
        assert len(row.speed.prefill_tok_s_runs) == len(row.speed.decode_tok_s_runs) == 2
        assert row.speed.decode_tok_s == np.median(row.speed.decode_tok_s_runs)
        assert (row.speed.n_prompt, row.speed.n_generate) == (8, 4)


def test_other_tokenizers_are_compared_by_bytes(paths, tmp_path):
    other = write_model(tmp_path / "letters.gguf", concatenating())
    found = compare([paths[0], other], TEXT, tmp_path / "out", ctx=16, speed=False)
    assert found.rows[1].against_first is None
    assert "letters: the text has other tokens than for fixed" in found.notes[0]
    assert found.rows[1].bits_per_byte.value > 0
    assert "Note: letters" in markdown(found)


def test_names_are_distinct():
    assert distinct_names([Path("a/x.gguf"), Path("b/x.gguf"), Path("c/y.gguf")]) == ["x (1)", "x (2)", "y"]


# --- what is kept ----------------------------------------------------------------------------------------------------


class Loads:
    """Counts what is computed, and can end a run in the middle."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, end_after: int | None = None) -> None:
        self.windows = self.turns = 0
        score, timed = Model.score, comparison.measure_speed

        def counted(model: Model, texts: list[Any]) -> Any:
            if end_after is not None and self.windows >= end_after:
                raise KeyboardInterrupt
            self.windows += len(texts)
            return score(model, texts)

        def counted_speed(*arguments: Any, **options: Any) -> Any:
            self.turns += 1
            return timed(*arguments, **options)

        monkeypatch.setattr(Model, "score", counted)
        monkeypatch.setattr(comparison, "measure_speed", counted_speed)


def test_a_second_run_computes_nothing(paths, tmp_path, monkeypatch):
    options = {"ctx": 48, "repeat": 1, "n_prompt": 4, "n_generate": 2}
    first = compare(paths, TEXT, tmp_path, **options)
    with monkeypatch.context() as patch:
        loads = Loads(patch)
        assert compare(paths, TEXT, tmp_path, **options) == first
        assert (loads.windows, loads.turns) == (0, 0)


def test_a_run_that_was_ended_goes_on(paths, tmp_path, monkeypatch):
    expected = compare(paths, TEXT, tmp_path / "whole", ctx=16, speed=False)
    n_windows = len(expected.rows[0].text.window_nll)
    assert n_windows > 12
    monkeypatch.setattr("fixmin_cpp.compare.measure._SAVE_SECONDS", 0.0)
    with monkeypatch.context() as patch:
        Loads(patch, end_after=n_windows + 8)
        with pytest.raises(KeyboardInterrupt):
            compare(paths, TEXT, tmp_path / "out", ctx=16, speed=False)
    with monkeypatch.context() as patch:
        loads = Loads(patch)
        found = compare(paths, TEXT, tmp_path / "out", ctx=16, speed=False)
        assert loads.windows == 2 * n_windows - 8
    assert found.rows == expected.rows, "the same bits, in whatever pieces"


def test_what_has_changed_is_measured_again(paths, tmp_path, monkeypatch):
    models = [tmp_path / "a.gguf", tmp_path / "b.gguf"]
    for source, target in zip(paths, models, strict=False):
        target.write_bytes(source.read_bytes())
    options: dict[str, Any] = {"ctx": 48, "speed": False}
    before = compare(models, TEXT, tmp_path / "out", **options)
    n_windows = len(before.rows[0].text.window_nll)

    def windows(text: str = TEXT, **changed: Any) -> tuple[int, Comparison]:
        with monkeypatch.context() as patch:
            loads = Loads(patch)
            found = compare(models, text, tmp_path / "out", **{**options, **changed})
            return loads.windows, found

    assert windows()[0] == 0
    assert windows(TEXT.replace("cat", "tac"))[0] == 2 * n_windows
    assert windows(max_windows=2)[0] == 4
    assert windows(kv_type="f32")[0] == 2 * n_windows
    models[1].write_bytes(paths[2].read_bytes())  # another model under the old name
    again, found = windows()
    assert again == n_windows
    assert found.rows[0] == before.rows[0]
    assert found.rows[1].nll != before.rows[1].nll
    for part in (tmp_path / "out" / "parts").iterdir():
        part.write_bytes(part.read_bytes()[:-9])  # damaged
    assert windows()[0] == 2 * n_windows


def test_a_part_is_of_its_whole_key(tmp_path):
    store = Store(tmp_path)
    store.save("text", {"model": "a", "windows": (1, 2)}, [1.5])
    assert store.load("text", {"windows": [1, 2], "model": "a"}) == [1.5]
    for kind, key in (("text", {"model": "a"}), ("speed", {"model": "a", "windows": [1, 2]})):
        assert store.load(kind, key) is None


# --- files that it writes --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tried(found) -> Comparison:
    """With tasks, and a name that means something to every format."""
    name = "50%_a&b|c#$x^~{y}\\z\n*w*"
    rows = [
        replace(row, tasks=[TaskScore("quiz_1", "acc", "none", Figure(0.25 + i / 8, 0.02), 9)])
        for i, row in enumerate(found.rows)
    ]
    rows[0] = replace(rows[0], facts=replace(rows[0].facts, name=name))
    return replace(found, rows=rows)


def test_markdown(tried):
    lines = markdown(tried).splitlines()
    table = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines if line.startswith("|")]
    assert len(table) == 5 + 3, "no name ends a line"
    assert len({len(row) for row in table[:5]}) == len({len(row) for row in table[5:]}) == 1
    row = dict(zip([cell.strip() for cell in table[0]], [cell.strip() for cell in table[3]], strict=True))
    affine = tried.rows[1]
    value, error = map(float, row["perplexity"].split(" ± "))
    assert value == pytest.approx(affine.perplexity.value, abs=affine.perplexity.error)
    assert error == pytest.approx(affine.perplexity.error, rel=0.06)
    assert row["paper's model"] == "2.39"
    assert "0.375 ± 0.020" in lines[next(i for i, line in enumerate(lines) if "quiz" in line)]


def test_figures_are_shown_with_two_digits_of_the_error():
    cases = {(2.13163, 0.0497): "2.132 ± 0.050", (1234.5, 56.7): "1234 ± 57", (0.5, 0.0): "0.5", (2.0, None): "2"}
    for (value, error), shown in cases.items():
        assert report._show(Figure(value, error)) == shown
    assert report._show(Figure(-1.5, 0.21), "%") == "−1.50 ± 0.21 %"
    assert report._show(Figure(math.inf, None)) == "inf"


def test_csv(tried):
    rows = list(csv.DictReader(io.StringIO(csv_table(tried))))
    assert [row["name"] for row in rows] == [row.facts.name for row in tried.rows]
    for line, row in zip(rows, tried.rows, strict=True):
        assert float(line["perplexity"]) == row.perplexity.value
        assert float(line["perplexity_error"]) == row.perplexity.error
        assert float(line["quiz_1 acc"]) == row.tasks[0].figure.value
        assert int(line["n_parameters"]) == row.facts.n_parameters
    assert rows[0]["percent_from_first"] == ""


def test_latex(tried):
    for whole in (True, False):
        text = latex(tried, whole)
        assert r"50\%\_a\&b$|$c\#\$x\textasciicircum{}\textasciitilde{}\{y\}\textbackslash{}z *w*" in text
        assert text.isascii()
        plain = re.sub(r"\\[&%$#_{}\\]", "", text)  # what is left means something to LaTeX
        depth = 0
        for letter in plain:
            depth += (letter == "{") - (letter == "}")
            assert depth >= 0
        assert depth == 0
        assert plain.count("$") % 2 == 0
        assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 2
        for table in re.findall(r"\\begin\{tabular\}\{(.*?)\}\n(.*?)\\end", text, re.S):
            rows = [line for line in table[1].splitlines() if line.endswith(r"\\")]
            assert {len(re.findall(r"(?<!\\)&", row)) + 1 for row in rows} == {len(table[0])}
    assert latex(tried).startswith(r"\documentclass")


def test_all_files_and_the_plot(tried, tmp_path):
    pytest.importorskip("matplotlib")
    written = write_report(tried, tmp_path)
    assert {path.name for path in written} == {path.name for path in tmp_path.iterdir()}
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "compare.svg").stat().st_size > 10_000
    facts = json.loads((tmp_path / "compare.json").read_text())
    assert facts["rows"][1]["perplexity"]["value"] == tried.rows[1].perplexity.value
    assert facts["rows"][1]["text"]["window_nll"] == tried.rows[1].text.window_nll


def test_without_matplotlib_there_is_a_table(found, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert {path.suffix for path in write_report(found, tmp_path)} == {".md", ".csv", ".tex", ".json"}


# --- a streamed text -------------------------------------------------------------------------------------------------


@pytest.fixture
def local_sources(tmp_path, monkeypatch) -> None:
    """Two data sets of ours in the place of the hub's, through the same `datasets`."""
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    sources = {}
    for name in ("pages", "stories"):
        lines = [json.dumps({"text": f" {name} {i}: the cat {i * 7 % 5} "}) for i in range(50)]
        file = tmp_path / f"{name}.jsonl"
        file.write_text("\n".join([json.dumps({"text": " "}), *lines]))
        sources[name] = corpus.Source("json", None, data_files=str(file))
    monkeypatch.setattr(corpus, "SOURCES", sources)


@pytest.mark.external
@pytest.mark.filterwarnings("ignore")
def test_a_mixture_is_streamed_and_repeatable(paths, local_sources, tmp_path, monkeypatch):
    def run(folder: str, **changed: Any) -> tuple[Comparison, str]:
        mixture = Mixture.parse("pages+stories", **{"n_tokens": 300, **changed})
        found = compare(paths[:1], mixture, tmp_path / folder, speed=False)
        return found, (tmp_path / folder / "heldout.txt").read_text()

    found, text = run("a")
    documents = text.split("</s>")
    assert [document.split()[0] for document in documents[:4]] == ["pages", "stories"] * 2
    assert len(set(documents)) == len(documents)
    assert all(document == document.strip() != "" for document in documents)
    assert found.text.source["documents"] == {"pages": len(documents) // 2, "stories": len(documents) // 2}
    assert 300 <= found.rows[0].text.n_tokens < 340
    assert "trained on some of the streamed documents" in found.notes[0]
    assert run("b")[1] == text
    assert run("b", seed=1)[1] != text
    assert set(run("b", skip=10)[1].split("</s>")) != set(documents)
    with monkeypatch.context() as patch:  # what is there is not fetched again
        patch.setattr(corpus, "_documents", None)
        assert run("a")[1] == text
    with pytest.raises(FixminError, match="pages ended after 50 documents"):
        run("c", n_tokens=100_000)
    monkeypatch.setitem(corpus.SOURCES, "pages", corpus.Source("json", None, data_files=str(tmp_path / "none.jsonl")))
    with pytest.raises(FixminError, match=r"cannot be read .* give --text"):
        run("d")


def test_mixtures_that_are_refused():
    for arguments, message in (
        (("fineweb", 10), "no data set 'fineweb' is known: fineweb-edu and cosmopedia are"),
        (("fineweb-edu", 0), "n_tokens"),
        (("fineweb-edu", 1, -1), "seed"),
    ):
        with pytest.raises(ArgumentError, match=message):
            Mixture.parse(*arguments)


# --- tasks -----------------------------------------------------------------------------------------------------------

TASK = """
task: quiz
dataset_path: json
dataset_kwargs: {data_files: {test: %s}, cache_dir: %s}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""


@pytest.mark.external
@pytest.mark.filterwarnings("ignore")
def test_tasks_of_the_harness(paths, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"):
        monkeypatch.setenv(name, "1")
    from lm_eval.tasks import TaskManager

    # Without a look at the harness' thousands of own tasks.
    monkeypatch.setattr(TaskManager, "__init__", partialmethod(TaskManager.__init__, include_defaults=False))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    lines = [{"question": f"the cat {i}", "choices": [" a", " the", "日本"], "answer": i % 3} for i in range(12)]

    def write(lines: list[dict[str, Any]]) -> None:
        (tasks / "quiz.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    write(lines)
    (tasks / "quiz.yaml").write_text(TASK % (tasks / "quiz.jsonl", tmp_path / "cache"))

    def run(**options: Any) -> Comparison:
        return compare(paths[:2], TEXT, tmp_path / "out", speed=False, tasks=["quiz"], include_path=tasks, **options)

    found = run()
    for path, row in zip(paths, found.rows, strict=False):
        scores = {score.metric: score for score in row.tasks}
        right = []
        with Model(path, n_threads=1) as model:
            for line in lines:
                context = model.encode(line["question"])
                totals = [
                    model.score(context + model.encode(choice), start=len(context)).logprobs.sum()
                    for choice in line["choices"]
                ]
                right.append(int(np.argmax(totals)) == line["answer"])
        assert scores["acc"].figure.value == pytest.approx(np.mean(right))
        assert scores["acc"].figure.error == pytest.approx(np.std(right, ddof=1) / math.sqrt(len(right)))
        assert scores["acc"].n_samples == len(lines)
        assert "acc_norm" in scores
    assert "quiz acc" in markdown(found)
    with monkeypatch.context() as patch:
        patch.setattr("fixmin_cpp.compare.tasks._evaluate", None)
        assert run() == found, "nothing runs again"
        with pytest.raises(TypeError):
            run(limit=3)
        write([{**line, "answer": 0} for line in lines])
        with pytest.raises(TypeError):  # the same name, other documents
            run()
    code = "SHIFT = {}\ndef target(doc):\n    return (doc['answer'] + SHIFT) % 3\n"
    (tasks / "code.py").write_text(code.format(0))
    coded = TASK.replace("task: quiz", "task: coded").replace('"{{answer}}"', "!function code.target")
    (tasks / "coded.yaml").write_text(coded % (tasks / "quiz.jsonl", tmp_path / "cache"))
    options = {"speed": False, "tasks": ["coded"], "include_path": tasks}
    compare(paths[:1], TEXT, tmp_path / "out", **options)
    with monkeypatch.context() as patch:
        patch.setattr("fixmin_cpp.compare.tasks._evaluate", None)
        compare(paths[:1], TEXT, tmp_path / "out", **options)
        (tasks / "code.py").write_text(code.format(1))
        with pytest.raises(TypeError):  # the same function, which uses something else
            compare(paths[:1], TEXT, tmp_path / "out", **options)
    with pytest.raises(ArgumentError, match="knows no task 'quizz'"):
        compare(paths[:1], TEXT, tmp_path / "out", speed=False, tasks=["quizz"], include_path=tasks)


@pytest.mark.external
@pytest.mark.filterwarnings("ignore")
def test_the_questions_of_the_demo(monkeypatch):
    pytest.importorskip("datasets")
    folder = Path(__file__).parents[2] / "examples" / "demo" / "tasks"
    monkeypatch.syspath_prepend(folder)
    import capitals

    documents = list(capitals.dataset()["test"])
    assert len(documents) > 150
    assert documents == list(capitals.dataset()["test"])
    answers = {one["country"]: one["choices"][one["answer"]] for one in documents}
    assert (answers["France"], answers["Kenya"]) == (" Paris", " Nairobi")
    assert all(len(set(one["choices"])) == 4 for one in documents)


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_checkpoint_is_converted_once(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    demo = Path(__file__).parents[2] / "examples" / "demo"
    checkpoint = tmp_path / "fixed"
    checkpoint.mkdir()
    for file in (demo / "fixed").iterdir():
        (checkpoint / file.name).write_bytes(file.read_bytes())
    text = (demo / "heldout.txt").read_text(encoding="utf-8")
    options: dict[str, Any] = {"speed": False, "max_windows": 3, "trust_remote_code": True, "outtype": "q8_0"}
    monkeypatch.setenv("FIXMIN_CACHE", str(tmp_path / "cache"))
    found = compare([checkpoint], text, tmp_path / "out", **options)
    (file,) = (tmp_path / "cache").rglob("*.gguf")
    facts = found.rows[0].facts
    assert (facts.name, facts.source, facts.path) == ("fixed", str(checkpoint), str(file))
    assert (facts.variant, facts.types, facts.n_parameters) == ("fixed", "Q8_0", 3_455_488)
    assert found.rows[0].perplexity.value == pytest.approx(2.1, abs=0.3)
    with monkeypatch.context() as patch:
        patch.setattr("fixmin_cpp.hub._CONVERT", "raise SystemExit('error: it would convert again')")
        assert compare([checkpoint], text, tmp_path / "out", **options) == found
        config = checkpoint / "config.json"
        config.write_text(config.read_text() + "\n")
        with pytest.raises(FixminError, match="it would convert again"):
            compare([checkpoint], text, tmp_path / "out", **options)


# --- what is refused, and the command --------------------------------------------------------------------------------


def test_refused(paths, tmp_path):
    bare = make_model(tmp_path / "bare.gguf")
    (tmp_path / "text.gguf").write_text("no model")
    for number, (models, text, options, error, message) in enumerate(
        (
            ([], TEXT, {}, ArgumentError, "at least one"),
            ([tmp_path / "none.gguf"], TEXT, {}, OSError, "none.gguf"),
            ([tmp_path / "text.gguf"], TEXT, {}, FixminError, "text.gguf"),
            ([bare], TEXT, {}, FixminError, "holds no tokenizer"),
            (paths, " \n", {}, ArgumentError, "is empty"),
            (paths, "the cat", {}, ArgumentError, "at least two windows of 64"),
            (paths, TEXT, {"ctx": 65}, ArgumentError, "ctx must be between 2 and 64"),
            (paths, TEXT, {"max_windows": 0}, ArgumentError, "max_windows"),
            (paths, TEXT, {"repeat": 0}, ArgumentError, "repeat"),
            (paths, TEXT, {"n_prompt": 65}, ArgumentError, "do not fit the context of 64"),
            (paths, TEXT, {"limit": 0}, ArgumentError, "limit"),
            (paths, TEXT, {"n_ctx": 32}, ArgumentError, "ctx says how long"),
            (paths, TEXT, {"kv_type": "f8"}, ArgumentError, "kv_type"),
        )
    ):
        out = tmp_path / f"out{number}"
        with pytest.raises(error, match=message):
            compare(models, text, out, **options)
        assert out.exists() == ("n_prompt" in options)  # seen to be wrong after the texts, whose scores are kept
    with pytest.raises(NotADirectoryError, match=r"text\.gguf"):
        compare(paths, TEXT, tmp_path / "text.gguf")


def test_command(paths, tmp_path):
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text(TEXT, encoding="utf-8")
    command = ["compare", *paths, "--text", text, "-o", out, "-c", 48, "-p", 8, "-n", 4, "-r", 1]
    result = fixmin(*command)
    assert result.returncode == 0, result.stderr.decode()
    assert result.stdout.decode() == (out / "compare.md").read_text(encoding="utf-8")
    assert result.stdout.startswith(b"| model | variant |")
    assert b"compare.tex" in result.stderr
    again = fixmin(*command, "--json")
    assert [row["facts"]["variant"] for row in json.loads(again.stdout)["rows"]] == ["fixed", "affine", "learned"]
    assert again.stderr == b""
    table = (out / "compare.md").read_bytes()
    (out / "linked").symlink_to(out / "compare.csv")
    for wrong, code, message in (
        ([*command[:5], out / "compare.md", *command[6:]], 1, b"compare.md is an input: give the output another name"),
        ([*command[:5], out / "linked", *command[6:]], 1, b"compare.csv is an input"),
        (["compare", *paths], 2, b"give --text FILE or --dataset NAMES"),
        ([*command, "--dataset", "cosmopedia"], 2, b"give --text FILE or --dataset NAMES"),
        (["compare", "--text", text], 2, b"MODEL"),
        (["compare", *paths, "--text", tmp_path / "none", "-o", out], 1, b"none: No such file"),
        (["compare", tmp_path / "none.gguf", "--text", text, "-o", out], 1, b"none.gguf: No such file"),
        (["compare", *paths, "--dataset", "pile", "-o", out], 1, b"no data set 'pile'"),
    ):
        failed = fixmin(*wrong)
        assert (failed.returncode, message in failed.stderr) == (code, True), failed.stderr
        assert b"Traceback" not in failed.stderr
    assert (out / "compare.md").read_bytes() == table
