"""Medians, ratios and shares of bench/report.py against values that were worked out by hand."""

import pytest
import report

ENGINES = {
    "fixmin-q8_0": {"label": "fixmin q8_0", "against": "fixmin-q8_0", "product": "int8_vector_ops"},
    "llama-q8_0": {"label": "llama.cpp q8_0", "against": "fixmin-q8_0", "product": "int8_vector_ops"},
    "torch-bfloat16": {"label": "PyTorch", "against": "fixmin-f16", "product": "bfloat16_product_ops"},
}
LOADED = {
    "version": "1.2",
    "load_s": 0.5,
    "rss_bytes": 3_000_000,
    "rss_after_bytes": 4_000_000,
    "file_bytes": 5_000_000,
}
REQUEST = {"part": "table", "threads": 2, "prompt": 100, "depth": 16, "decode": 10}


def record(engine: str, turn: int, prefill_s: float, decode_s: float, **more) -> dict:
    return REQUEST | {"engine": engine, "round": turn, "prefill_s": prefill_s, "decode_s": decode_s} | more


def own(turn: int, prefill_s: float, decode_s: float) -> dict:
    """fixmin: 2000 bytes for a token, 5000 operations for the prompt of 100."""
    return record("fixmin-q8_0", turn, prefill_s, decode_s, decode_bytes=2000, prefill_operations=5000)


def limits(turn: int, read: float, ops: float) -> dict:
    return REQUEST | {"engine": "ceilings", "round": turn, "read_bytes_s": read, "int8_vector_ops": ops}


RECORDS = [
    # fixmin decodes 10, 20, 5 tok/s; llama.cpp 5, 5, 4: ratios 1/2, 1/4, 4/5.
    limits(0, 40_000, 10_000), own(0, 1.0, 1.0), record("llama-q8_0", 0, 2.0, 2.0),
    limits(1, 50_000, 10_000), own(1, 0.5, 0.5), record("llama-q8_0", 1, 2.5, 2.0),
    limits(2, 20_000, 20_000), own(2, 2.0, 2.0), record("llama-q8_0", 2, 4.0, 2.5),
    record("torch-bfloat16", 0, 1.0, 4.0),
]  # fmt: skip


def test_decode():
    found = report.speeds(RECORDS, ENGINES, "decode")
    # Ceilings of decode: 20, 25 and 10 tok/s. fixmin has 10/20, 20/25, 5/10 of them.
    assert found["fixmin-q8_0"] == report.Speed(10.0, 5.0, 20.0, 1.5, 1.0, 0.5, 3)
    # llama.cpp has 5/20, 5/25, 4/10.
    assert found["llama-q8_0"] == report.Speed(5.0, 4.0, 5.0, 0.2, 0.5, 0.25, 3)
    # Nothing of the same bits was measured: a speed, and no ratio.
    assert found["torch-bfloat16"] == report.Speed(2.5, 2.5, 2.5, 0.0, None, None, 1)


def test_prefill():
    found = report.speeds(RECORDS, ENGINES, "prefill")
    # 100, 200 and 50 tok/s of 10000 / 50 = 200, 200 and 400.
    assert found["fixmin-q8_0"] == report.Speed(100.0, 50.0, 200.0, 1.5, 1.0, 0.5, 3)
    # 50, 40, 25: ratios 1/2, 1/5, 1/2; shares 1/4, 1/5, 1/16.
    assert found["llama-q8_0"] == report.Speed(40.0, 25.0, 50.0, 0.625, 0.5, 0.2, 3)


def test_a_round_without_the_reference_gives_no_ratio():
    records = [record("llama-q8_0", 0, 2.0, 2.0), own(1, 1.0, 1.0), record("llama-q8_0", 1, 1.0, 4.0)]
    speed = report.speeds(records, ENGINES, "decode")["llama-q8_0"]
    assert (speed.median, speed.ratio, speed.share, speed.rounds) == (3.75, 0.25, None, 2)


def test_points_of_sweeps_are_kept_apart():
    sweep = [own(0, 1.0, 1.0) | {"part": "threads", "threads": n, "decode_s": 1 / n} for n in (1, 4)]
    found = report.summary({"records": [*RECORDS, *sweep], "engines": ENGINES})
    assert found["decode"]["threads"][1]["fixmin-q8_0"]["median"] == 10
    assert found["decode"]["threads"][4]["fixmin-q8_0"]["median"] == 40
    assert found["decode"]["table"][0]["fixmin-q8_0"]["median"] == 10


@pytest.fixture
def result() -> dict:
    sweep = [own(0, 1.0, 1.0) | {"part": "threads", "threads": n, "decode_s": 1 / n} for n in (1, 4)]
    return {
        "date": "today",
        "command": "bench/compare.py",
        "machine": {"CPU": "a CPU"},
        "settings": {"rounds": 3, "sweep_rounds": 1, "threads": 2, "prompt": 100, "depth": 16, "decode": 10},
        "engines": {name: facts | LOADED for name, facts in ENGINES.items()},
        "skipped": {"ik-q8_0": "ended with signal 4: no message"},
        "records": [*RECORDS, *sweep],
    }


def test_markdown(result):
    text = report.markdown(result)
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    assert ["llama.cpp q8_0", "5.0", "4.0 - 5.0", "20 %", "0.50", "0.25"] in rows
    assert ["llama.cpp q8_0", "40.0", "25.0 - 50.0", "62 %", "0.50", "0.20"] in rows
    assert ["llama.cpp q8_0", "1.2", "0.50", "3", "4", "5"] in rows
    assert ["fixmin q8_0", "10.0", "40.0"] in rows  # decode with 1 and 4 threads
    assert ["ik-q8_0", "ended with signal 4: no message"] in rows
    assert ["reading from memory", "0.00 GB/s"] in rows
    assert ["CPU", "a CPU"] in rows


@pytest.mark.external
def test_plot(result, tmp_path):
    report.plot(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.external
def test_bars_and_ceilings_are_where_the_figures_say(result):
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    report.bars(axes, report.summary(result)["decode"]["table"][0], result["engines"], "title")
    assert [bar.get_width() for bar in axes.patches] == [10.0, 5.0, 2.5]
    ceilings = [line.get_xdata() for line in axes.lines if line.get_linewidth() == 1.6]
    assert [list(x) for x in ceilings] == [[20.0, 20.0], [20.0, 20.0]]
