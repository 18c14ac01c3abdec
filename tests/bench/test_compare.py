"""bench/compare.py end to end with a model of a few kilobytes, and what it does with engines that cannot take part."""

import json
import sys

import compare
import prepare
import pytest
from engines import ENGINES, Engine
from make_checkpoint import write_checkpoint

from fixmin_cpp.convert.convert import convert
from fixmin_cpp.reference.configuration_fixmin import FixMinConfig

BY_NAME = {engine.name: engine for engine in ENGINES}


def stamp(target) -> None:
    prepare.sibling(target, ".done").write_text("by a test")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder as bench/prepare.py makes it, without any peer."""
    folder = tmp_path_factory.mktemp("bench")
    config = FixMinConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        code_kind="affine",
    )
    write_checkpoint(folder / "full", config)
    stamp(folder / "full")
    for form in ("q8_0", "w8a8", "q4_0"):
        convert(folder / "full", folder / f"full-{form}.gguf", form, n_threads=1)
        stamp(folder / f"full-{form}.gguf")
    return folder


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch):
    monkeypatch.setattr(compare, "SIDE", 64)
    monkeypatch.setattr(compare, "default_read_buffer", lambda: 1 << 20)
    monkeypatch.setattr(compare, "PAUSE", 0.0)


@pytest.mark.external  # matplotlib
def test_end_to_end(data, tmp_path, capsys):
    report, figures, picture = tmp_path / "r.md", tmp_path / "r.json", tmp_path / "r.png"
    common = ["--data", data, "--engines", "fixmin-q8_0,torch-int8,torch-published,llama-q8_0", "--threads", 1]
    common += ["--sweep-engines", "fixmin-q8_0", "--prompt", 9, "--decode", 5, "--depth", 4, "--json", figures]
    common += ["--threads-points", "1,2", "--parts", "table,threads,prompt,depth"]
    common += ["--prompt-points", "3,7", "--depth-points", "0,20"]
    # 128 and 16 tokens, which a thread sweep asks for, do not fit this model.
    with pytest.raises(SystemExit, match=r"threads: .* does not fit the model's context of 64"):
        compare.main(list(map(str, common)))
    common[common.index("table,threads,prompt,depth")] = "table,prompt,depth"
    compare.main([*map(str, common), "--rounds", "2", "--markdown", str(report), "--plot", str(picture)])

    result = json.loads(figures.read_text())
    assert result["skipped"] == {"llama-q8_0": "llama is not there (make bench-peers)"}
    assert set(result["engines"]) == {"fixmin-q8_0", "torch-int8", "torch-published"}
    turns = [(r["engine"], r["round"]) for r in result["records"] if r["part"] == "table"]
    names = ["ceilings", "fixmin-q8_0", "torch-int8", "torch-published"]
    assert turns == [(name, turn) for turn in (0, 1) for name in names]  # they alternate
    table = [r for r in result["records"] if r["part"] == "table" and r["engine"] != "ceilings"]
    assert all(r["prefill_s"] > 0 and r["decode_s"] > 0 and r["rss_bytes"] > 1 << 20 for r in table)
    depths = [r["depth"] for r in result["records"] if r["part"] == "depth" and r["engine"] == "fixmin-q8_0"]
    assert depths == [0, 20, 0, 20]
    assert all("prefill_s" not in r for r in result["records"] if r["part"] == "depth")
    assert "| llama-q8_0 | llama is not there (make bench-peers) |" in report.read_text()
    assert picture.exists()

    # A third round is added to the two; what was measured stays as it was.
    compare.main([*map(str, common), "--rounds", "3", "--resume"])
    again = json.loads(figures.read_text())
    of_table = [r for r in again["records"] if r["part"] == "table"]
    assert of_table[:8] == [r for r in result["records"] if r["part"] == "table"]
    assert [r["round"] for r in of_table[8:]] == [2] * 4
    with pytest.raises(SystemExit, match="other settings: decode"):
        compare.main([*map(str, common), "--decode", "4", "--resume"])
    # With nothing left to do, what was left out is still in the report.
    compare.main([*map(str, common), "--rounds", "3", "--resume", "--markdown", str(report)])
    assert "| llama-q8_0 | llama is not there (make bench-peers) |" in report.read_text()
    capsys.readouterr()
    compare.main(["--json", str(figures), "--report-only"])
    assert "| fixmin q8_0 |" in capsys.readouterr().out


def comparison(data) -> compare.Comparison:
    result = {"engines": {}, "skipped": {}, "records": []}
    return compare.Comparison(data, {"threads": 1}, result, lambda found: None, lambda text: None)


REQUEST = {"threads": 1, "prompt": 4, "depth": 4, "decode": 2}


def test_an_engine_that_does_not_load_is_skipped_with_what_it_said(data):
    (data / "broken.gguf").write_bytes(b"no model")
    stamp(data / "broken.gguf")
    engine = Engine("broken", "Broken", "fixmin", "broken.gguf", "broken")
    compared = comparison(data)
    compared.start([engine])
    assert not compared.workers
    assert compared.result["skipped"]["broken"].startswith("ended with status 1: ")
    assert "GGUFError" in compared.result["skipped"]["broken"]


@pytest.mark.slow
def test_an_engine_that_dies_is_left_out_with_its_records(data):
    fixmin, torch = BY_NAME["fixmin-q8_0"], BY_NAME["torch-int8"]
    compared = comparison(data)
    try:
        compared.start([fixmin, torch])
        compared.turn("table", [fixmin, torch], REQUEST, 0)
        compared.workers["torch-int8"].process.kill()
        compared.turn("table", [fixmin, torch], REQUEST, 1)
    finally:
        compared.stop()
    assert compared.result["skipped"]["torch-int8"].startswith("ended with signal 9")
    assert [(r["engine"], r["round"]) for r in compared.result["records"]] == [("fixmin-q8_0", 0), ("fixmin-q8_0", 1)]
    assert set(compared.result["engines"]) == {"fixmin-q8_0"}


def test_an_engine_that_does_not_answer_is_ended(data, monkeypatch):
    compared = comparison(data)
    fixmin = BY_NAME["fixmin-q8_0"]
    try:
        compared.start([fixmin])
        monkeypatch.setattr(compare, "TIMEOUT", 0.2)
        # Without the end of the line the worker goes on waiting.
        monkeypatch.setattr(compare.json, "dumps", lambda value: "" if value == REQUEST else "{}")
        monkeypatch.setattr(compared.workers["fixmin-q8_0"].process.stdin, "write", lambda text: None)
        compared.turn("table", [fixmin], REQUEST, 0)
    finally:
        compared.stop()
    assert compared.result["skipped"]["fixmin-q8_0"] == "no answer within 0.2 s"


def test_an_engine_that_does_not_fit_is_not_tried(data, monkeypatch):
    monkeypatch.setattr(compare, "spare_memory", lambda: 1000)
    compared = comparison(data)
    compared.start([BY_NAME["fixmin-q8_0"]])
    assert compared.result["skipped"]["fixmin-q8_0"].startswith("not enough memory: ")


def test_a_name_that_is_none_stands_for_all_that_begin_with_it():
    assert [engine.name for engine in compare.chosen("ik,fixmin-q8_0")] == ["fixmin-q8_0", "ik-q8_0", "ik-q4_0"]
    assert compare.chosen(None) == list(ENGINES)
    with pytest.raises(ValueError, match="no engine is called 'gpt'"):
        compare.chosen("ik,gpt")


def test_every_engine_has_its_reference_and_its_parts():
    made = {step.target for step in (*prepare.OWN_STEPS, *prepare.PEER_STEPS)}
    for engine in ENGINES:
        assert BY_NAME[engine.against].against == engine.against
        assert engine.model in made
        assert not engine.environment or (prepare.BENCH / "peers" / f"{engine.environment}.txt").exists()
    for engine in compare.chosen(",".join(compare.SWEPT)):
        assert engine.name in compare.SWEPT


@pytest.mark.parametrize(
    ("code", "reason"),
    [("raise SystemExit('no network')", "ended with status 1: no network"), ("import os; os.abort()", "status -6")],
)
def test_a_part_that_cannot_be_made_says_why(tmp_path, code, reason):
    target = tmp_path / "peers" / "x"
    assert not prepare.make(target, [[sys.executable, "-c", "print('fine')"], [sys.executable, "-c", code]], "recipe")
    assert reason in prepare.failure(target)


def test_a_part_is_made_once_for_each_recipe(tmp_path):
    target, count = tmp_path / "x", tmp_path / "count"
    code = f"open({str(count)!r}, 'a').write('.'); open({str(target)!r}, 'w').close()"
    for recipe in ("one", "one", "two"):
        assert prepare.make(target, [[sys.executable, "-c", code]], recipe)
        assert prepare.failure(target) is None
    assert count.read_text() == ".."


def test_a_model_of_a_missing_peer_says_so(tmp_path):
    (tmp_path / "hf").mkdir()
    stamp(tmp_path / "hf")
    step = prepare.Step("out", ("hf",), ("-c", ""), "somepeer")
    (tmp_path / "peers").mkdir()
    prepare.sibling(tmp_path / "peers" / "somepeer", ".failed").write_text("pip ended with status 1: no network")
    assert not prepare.step(tmp_path, step)
    assert prepare.failure(tmp_path / "out") == "somepeer: pip ended with status 1: no network"
