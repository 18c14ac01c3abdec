"""docs/grafana-dashboard.json against what a server exports."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from servers import Server

FILE = Path(__file__).parents[2] / "docs" / "grafana-dashboard.json"
SAMPLE = re.compile(r"([a-z_]+:[a-z0-9_]+)(?:\{([^}]*)\})?")


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(FILE.read_text())
    return found


def expressions(dashboard: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(title of the panel, expression)"""
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]


@pytest.fixture(scope="module")
def samples(server: Server) -> dict[str, tuple[str, set[str]]]:
    """Kind and labels of every sample, one of each way to end among them."""
    server.post("/v1/completions", {"prompt": "the", "max_tokens": 3})
    server.get("/nowhere")
    found: dict[str, tuple[str, set[str]]] = {}
    for family in text_string_to_metric_families(server.get("/metrics").text):
        for sample in family.samples:
            found.setdefault(sample.name, (family.type, set()))[1].update(sample.labels)
    return found


def test_every_metric_is_exported(dashboard: dict[str, Any], samples: dict[str, tuple[str, set[str]]]) -> None:
    n_checked = 0
    for title, expression in expressions(dashboard):
        for name, selector in SAMPLE.findall(expression):
            assert name in samples, title
            kind, labels = samples[name]
            selected = set(re.findall(r"(\w+)(?:=~|!~|!=|=)\"", selector))
            grouped = {label.strip() for by in re.findall(r"by \(([^)]*)\)", expression) for label in by.split(",")}
            assert selected | grouped <= labels, title
            assert 'model_name=~"$model_name"' in selector, title
            # Counters and histograms grow, and only they do.
            assert (re.search(rf"(rate|increase)\({name}\{{", expression) is not None) == (kind != "gauge"), title
            n_checked += 1
    assert n_checked > 30


def test_histograms_are_read_as_such(dashboard: dict[str, Any], samples: dict[str, tuple[str, set[str]]]) -> None:
    read = set()
    for title, expression in expressions(dashboard):
        for quantile, inner in re.findall(r"histogram_quantile\(([\d.]+), (.*)\)$", expression):
            assert 0 < float(quantile) < 1
            assert re.match(r"sum by \(le", inner), title
            names = [name for name, _ in SAMPLE.findall(inner)]
            assert names
            assert all(name.endswith("_bucket") and samples[name][0] == "histogram" for name in names), title
            read.update(name.removesuffix("_bucket") for name in names)
        assert ("_bucket" in expression) == ("le" in re.findall(r"\w+", expression)), title
    assert read >= {"vllm:time_to_first_token_seconds", "vllm:inter_token_latency_seconds"}


def test_grafana_can_import_it(dashboard: dict[str, Any]) -> None:
    """No data source of one installation, every panel with a place and an own number, as in schema 38 (Grafana 10)."""
    assert dashboard["id"] is None
    assert dashboard["schemaVersion"] <= 38
    variables = {one["name"]: one for one in dashboard["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["model_name"]["definition"].startswith("label_values(")
    numbers = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(numbers)) == len(numbers)
    taken = set()
    for panel in dashboard["panels"]:
        assert panel["type"] in ("row", "stat", "timeseries", "heatmap")
        if panel["type"] != "row":
            assert {target["datasource"]["uid"] for target in (panel, *panel["targets"])} == {"${datasource}"}
        place = panel["gridPos"]
        xs, ys = (range(place[key], place[key] + place[size]) for key, size in (("x", "w"), ("y", "h")))
        cells = {(x, y) for x in xs for y in ys}
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells


def test_label_of_the_models(dashboard: dict[str, Any], server: Server) -> None:
    """The list of models comes from a metric that is there before any request."""
    name = re.search(r"label_values\((.*), model_name\)", dashboard["templating"]["list"][1]["definition"])
    assert name is not None
    assert httpx.get(f"{server.url}/metrics").text.count(f"\n{name[1]}{{")
