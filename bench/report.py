"""From the records of bench/compare.py to its report: medians, ratios, shares of a ceiling; Markdown and a plot.

A record is a dict: "part" (table, threads, prompt or depth), "engine", "round", the request (threads, prompt, depth,
decode) and the worker's answer. A round is one turn of every engine, so what happened in the same round was measured
within a minute or two, and ratios are taken there before their median is.
"""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

CEILINGS = "ceilings"
SWEEPS = {"threads": "threads", "prompt": "tokens of the prompt", "depth": "tokens in the context"}
METRICS = ("prefill", "decode")

Record = dict[str, Any]


@dataclass(frozen=True)
class Speed:
    """Tokens per second of one engine over the rounds."""

    median: float
    low: float
    high: float
    spread: float  # (high - low) / median
    ratio: float | None  # median of the ratios to the fixmin engine of the same bits in the same round
    share: float | None  # median of the shares of the ceiling of the same round
    rounds: int


def tokens_per_second(record: Record, metric: str) -> float | None:
    """None if the record has no such figure."""
    tokens = {"prefill": "prompt", "decode": "decode"}[metric]
    seconds = record.get(f"{metric}_s")
    return record[tokens] / seconds if seconds else None


def ceiling(metric: str, own: Record, limits: Record, product: str) -> float | None:
    """Most tokens per second that the machine allows a model of these bits: `own` is the record of the fixmin engine
    that has them (its bytes and operations), `limits` that of the ceilings of the same round."""
    if metric == "decode":
        needed, possible = own.get("decode_bytes"), limits.get("read_bytes_s")
        tokens = 1
    else:
        needed, possible, tokens = own.get("prefill_operations"), limits.get(product), own.get("prompt")
    return possible * tokens / needed if needed and possible else None


def point(record: Record) -> tuple[str, int]:
    """Which place of which sweep a record belongs to; one place for the whole table."""
    part = record["part"]
    return part, record[part] if part in SWEEPS else 0


def speeds(records: Sequence[Record], engines: dict[str, dict[str, Any]], metric: str) -> dict[str, Speed]:
    """Engine -> Speed, of records of the same point. `engines` has "against" and "product" of each."""
    rounds: dict[int, dict[str, Record]] = {}
    for record in records:
        rounds.setdefault(record["round"], {})[record["engine"]] = record
    found = {}
    for name, facts in engines.items():
        values, ratios, shares = [], [], []
        for turn in rounds.values():
            mine = turn.get(name)
            value = tokens_per_second(mine, metric) if mine else None
            if value is None:
                continue
            values.append(value)
            own = turn.get(facts["against"])
            reference = tokens_per_second(own, metric) if own else None
            if reference:
                ratios.append(value / reference)
                limit = ceiling(metric, own, turn.get(CEILINGS, {}), facts["product"])
                shares.extend([value / limit] if limit else [])
        if values:
            middle = statistics.median(values)
            found[name] = Speed(
                middle,
                min(values),
                max(values),
                (max(values) - min(values)) / middle,
                statistics.median(ratios) if ratios else None,
                statistics.median(shares) if shares else None,
                len(values),
            )
    return found


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """metric -> part -> value of the sweep (0 for the table) -> engine -> Speed as a dict."""
    points: dict[tuple[str, int], list[Record]] = {}
    for record in result["records"]:
        points.setdefault(point(record), []).append(record)
    found: dict[str, Any] = {metric: {} for metric in METRICS}
    for (part, value), records in sorted(points.items()):
        for metric in METRICS:
            here = speeds(records, result["engines"], metric)
            if here:
                found[metric].setdefault(part, {})[value] = {name: asdict(speed) for name, speed in here.items()}
    return found


def machine_limits(records: Iterable[Record]) -> dict[str, float]:
    """Median of each ceiling over the rounds of the table."""
    rows = [r for r in records if r["engine"] == CEILINGS and r["part"] == "table"]
    names = sorted({name for row in rows for name in row if name.endswith(("_ops", "_bytes_s"))})
    return {name: statistics.median(row[name] for row in rows if name in row) for name in names}


# --- Markdown --------------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines] + [""]


def number(value: float | None, form: str = ".2f") -> str:
    return "" if value is None else format(value, form)


def speed_rows(found: dict[str, dict[str, Any]], engines: dict[str, dict[str, Any]]) -> list[list[str]]:
    return [
        [
            engines[name]["label"],
            number(speed["median"], ".1f"),
            f"{speed['low']:.1f} - {speed['high']:.1f}",
            f"{100 * speed['spread']:.0f} %",
            number(speed["ratio"]),
            number(speed["share"]),
        ]
        for name, speed in found.items()
    ]


def load_rows(engines: dict[str, dict[str, Any]]) -> list[list[str]]:
    return [
        [
            facts["label"],
            facts["version"],
            number(facts["load_s"]),
            f"{facts['rss_bytes'] / 1e6:.0f}",
            f"{facts['rss_after_bytes'] / 1e6:.0f}" if "rss_after_bytes" in facts else "",
            f"{facts['file_bytes'] / 1e6:.0f}",
        ]
        for facts in engines.values()
    ]


def markdown(result: dict[str, Any]) -> str:
    """The whole report."""
    settings, machine, engines = result["settings"], result["machine"], result["engines"]
    found = summary(result)
    lines = ["# Speed beside other engines", ""]
    lines += [f"{result['date']}, `{result['command']}`", ""]
    lines += table(["machine", ""], [[name, value] for name, value in machine.items()])
    limits = machine_limits(result["records"])
    if limits:
        lines += ["Ceilings, medians over the rounds:", ""]
        names = {
            "read_bytes_s": ("reading from memory", 1e9, "GB/s"),
            "int8_vector_ops": ("8-bit vector products (`fixmin bench`: int8_peak)", 1e12, "TOPS"),
            "int8_tile_ops": ("8-bit products of tiles (`fixmin bench`: int8_tile_peak)", 1e12, "TOPS"),
            "int8_product_ops": ("8-bit matrix product of PyTorch", 1e12, "TOPS"),
            "bfloat16_product_ops": ("bfloat16 matrix product of PyTorch", 1e12, "TOPS"),
            "float32_product_ops": ("float32 matrix product of PyTorch", 1e12, "TOPS"),
        }
        rows = [(text, f"{limits[name] / unit:.2f} {units}") for name, (text, unit, units) in names.items()
                if name in limits]  # fmt: skip
        lines += table(["ceiling", ""], rows)
    head = ["engine", "tok/s", "min - max", "spread", "ratio to fixmin", "share of ceiling"]
    titles = {
        "decode": f"## Decode: {settings['decode']} tokens after a prompt of {settings['depth']}",
        "prefill": f"## Prefill: a prompt of {settings['prompt']} tokens",
    }
    for metric in ("decode", "prefill"):
        here = found[metric].get("table", {}).get(0)
        if here:
            lines += [titles[metric], "", *table(head, speed_rows(here, engines))]
    lines += ["## Loading and memory", ""]
    lines += table(
        ["engine", "version", "load s", "resident MB after loading", "after a run", "files MB"], load_rows(engines)
    )
    for part, axis in SWEEPS.items():
        for metric in METRICS:
            points = found[metric].get(part)
            if points:
                names = [name for name in engines if any(name in here for here in points.values())]
                rows = [
                    [engines[name]["label"], *(number(points[v].get(name, {}).get("median"), ".1f") for v in points)]
                    for name in names
                ]
                lines += [f"## {metric.capitalize()} tok/s by {axis}", "", *table(["engine", *points], rows)]
    if result["skipped"]:
        lines += ["## Left out", "", *table(["engine", "why"], result["skipped"].items())]
    lines += [
        f"Medians of {settings['rounds']} rounds after one that warms up (sweeps: {settings['sweep_rounds']}); "
        f"in a round every engine, each a process of its own, takes one turn after the other, with "
        f"{settings['threads']} threads. Ratio: median over the rounds of the ratio to the fixmin engine of the same "
        "bits per weight in the same round. Share: of the ceiling of that round, for the bytes and operations of that "
        "fixmin file; prefill against 8-bit vector products for quantised weights, PyTorch's matrix product of the "
        "type for others (AMX tiles can pass the former). Loading: from the page cache, imports not counted.",
        "",
    ]
    return "\n".join(lines)


# --- plot ------------------------------------------------------------------------------------------------------------

FAMILIES = {  # of the start of an engine's name
    "fixmin": "#0072b2",
    "llama": "#d55e00",
    "ik": "#e69f00",
    "openvino": "#009e73",
    "ctranslate2": "#cc79a7",
    "torch": "#7f7f7f",
}


def color(name: str) -> str:
    return FAMILIES[name.partition("-")[0]]


def bars(axes: Any, found: dict[str, dict[str, Any]], engines: dict[str, dict[str, Any]], title: str) -> None:
    """One bar per engine with its range, a tick where its ceiling is."""
    names = list(found)
    places = range(len(names))
    middle = [found[name]["median"] for name in names]
    reach = [
        [m - found[name]["low"] for m, name in zip(middle, names, strict=True)],
        [found[name]["high"] - m for m, name in zip(middle, names, strict=True)],
    ]
    axes.barh(places, middle, xerr=reach, color=[color(name) for name in names], height=0.72,
              error_kw={"elinewidth": 0.8, "ecolor": "#333333"})  # fmt: skip
    for place, name in zip(places, names, strict=True):
        speed = found[name]
        if speed["share"]:
            limit = speed["median"] / speed["share"]
            axes.plot([limit, limit], [place - 0.42, place + 0.42], color="black", linewidth=1.6)
    # The figure stands beside the name: in the plot it would meet the range or the ceiling.
    names_and_figures = [f"{engines[name]['label']}   {found[name]['median']:.0f}" for name in names]
    axes.set_yticks(list(places), names_and_figures, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("tokens per second (black tick: ceiling for these bits)", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)


def lines(axes: Any, points: dict[int, dict[str, Any]], engines: dict[str, dict[str, Any]], title: str, axis: str):
    names = [name for name in engines if any(name in here for here in points.values())]
    values = list(points)
    for name in names:
        at = [i for i, value in enumerate(values) if name in points[value]]
        axes.plot(at, [points[values[i]][name]["median"] for i in at], marker="o", markersize=4, color=color(name),
                  label=engines[name]["label"])  # fmt: skip
    axes.set_xticks(range(len(values)), [str(value) for value in values], fontsize=8)
    axes.set_ylim(bottom=0)
    axes.tick_params(axis="y", labelsize=8)
    axes.set_xlabel(axis, fontsize=8)
    axes.set_title(title, fontsize=10)
    axes.grid(axis="y", linewidth=0.4, alpha=0.6)


def plot(result: dict[str, Any], path: Path) -> None:
    """Bars of the table above, lines of the sweeps below."""
    from matplotlib.figure import Figure

    found, engines, settings = summary(result), result["engines"], result["settings"]
    sweeps = [(part, metric) for part, metric in (("threads", "decode"), ("threads", "prefill"), ("prompt", "prefill"),
              ("depth", "decode")) if found[metric].get(part)]  # fmt: skip
    height = 1.0 + 0.24 * len(engines)
    figure = Figure(figsize=(12, height + (3.2 if sweeps else 0)), layout="constrained")
    upper, *lower = figure.subfigures(2, 1, height_ratios=[height, 3.2]) if sweeps else [figure]
    left, right = upper.subplots(1, 2)
    titles = {
        "decode": f"Decode: {settings['decode']} tokens after {settings['depth']}, {settings['threads']} threads",
        "prefill": f"Prefill: {settings['prompt']} tokens, {settings['threads']} threads",
    }
    for axes, metric in ((left, "decode"), (right, "prefill")):
        bars(axes, found[metric].get("table", {}).get(0, {}), engines, titles[metric])
    if sweeps:
        places = lower[0].subplots(1, len(sweeps), squeeze=False)[0]
        for axes, (part, metric) in zip(places, sweeps, strict=True):
            lines(axes, found[metric][part], engines, f"{metric.capitalize()} tok/s", SWEEPS[part])
        handles, labels = places[0].get_legend_handles_labels()
        lower[0].legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
