"""A Comparison as Markdown, CSV, LaTeX, JSON and a plot."""

import csv
import io
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .results import PAPER, PAPER_SEED_VARIATION, Comparison, Figure, Row, TaskScore
from .store import write_text

__all__ = ["REPORT_FILES", "csv_table", "latex", "markdown", "plot", "write_report"]

_PAPER_CAPTION = (
    "“Paper's model”: of another model than the row's unless that is the published one, and on another text. Mean "
    "held-out validation perplexity of the published models after some 17 billion tokens, three seeds (arXiv "
    f"2605.09751): fixed {PAPER['fixed']:.2f}, affine {PAPER['affine']:.2f} (a slightly shorter run), learned "
    f"{PAPER['learned']:.2f}. Perplexities vary by {PAPER_SEED_VARIATION} % from seed to seed there."
)


_TEXTS = ("compare.md", "compare.csv", "compare.tex", "compare-table.tex", "compare.json")
_PICTURES = ("compare.png", "compare.svg")
REPORT_FILES = (*_TEXTS, *_PICTURES)  # what write_report replaces in its folder


def write_report(comparison: Comparison, out: Path) -> list[Path]:
    """Writes compare.{md,csv,json,tex,png,svg} and compare-table.tex; without matplotlib no picture. What was written.

    compare.tex is a document of its own, compare-table.tex the table in it, for \\input in another one.
    """
    contents = (
        markdown(comparison),
        csv_table(comparison),
        latex(comparison),
        latex(comparison, whole=False),
        json.dumps(_plain(asdict(comparison)), indent=1, allow_nan=False) + "\n",
    )
    for name, content in zip(_TEXTS, contents, strict=True):
        write_text(out / name, content)
    pictures = [out / name for name in _PICTURES]
    try:
        plot(comparison, pictures)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        for picture in pictures:  # of an earlier run
            picture.unlink(missing_ok=True)
        pictures = []
    return [*(out / name for name in _TEXTS), *pictures]


# --- the table -----------------------------------------------------------------------------------------------------


def _cells(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of text, with ± in them; columns that nothing is known for are left out."""
    columns: dict[str, Callable[[Row], str]] = {
        "model": lambda row: row.facts.name,
        "variant": lambda row: row.facts.variant,
        "weights": lambda row: row.facts.types,
        "parameters": lambda row: f"{row.facts.n_parameters:,}",
        "of the input": lambda row: f"{row.facts.n_input_parameters:,}",
        "MB": lambda row: f"{row.facts.file_bytes / 1e6:,.1f}",
        "perplexity": lambda row: _show(row.perplexity),
        "paper's model": lambda row: "" if row.paper_perplexity is None else f"{row.paper_perplexity:.2f}",
        "bits per byte": lambda row: _show(row.bits_per_byte),
        "from the first": lambda row: "" if row.against_first is None else _show(row.against_first.percent, "%"),
        "prefill tok/s": lambda row: "" if row.speed is None else f"{row.speed.prefill_tok_s:,.0f}",
        "decode tok/s": lambda row: "" if row.speed is None else f"{row.speed.decode_tok_s:,.1f}",
    }
    cells = {head: [show(row) for row in comparison.rows] for head, show in columns.items()}
    kept = {head: column for head, column in cells.items() if any(column)}
    return list(kept), [list(row) for row in zip(*kept.values(), strict=True)]


def _task_cells(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """A row for each metric of a task, a column for each model."""
    names = list(dict.fromkeys(_label(score) for row in comparison.rows for score in row.tasks))
    found = [{_label(score): score.figure for score in row.tasks} for row in comparison.rows]
    rows = [[name, *("" if name not in one else _show(one[name]) for one in found)] for name in names]
    return ["task", *(row.facts.name for row in comparison.rows)], rows


def _label(score: TaskScore) -> str:
    return f"{score.task} {score.metric}" + ("" if score.filter == "none" else f" ({score.filter})")


def _show(figure: Figure, unit: str = "") -> str:
    """The error with two digits, the value with as many places: 2.137 ± 0.018."""
    sign, tail = "+" if unit else "", f" {unit}" if unit else ""
    if not math.isfinite(figure.value):
        return "inf"
    if not figure.error or not math.isfinite(figure.error):
        return f"{figure.value:{sign}.4g}{tail}".replace("-", "−")
    places = max(0, 1 - math.floor(math.log10(figure.error)))
    return f"{figure.value:{sign}.{places}f} ± {figure.error:.{places}f}{tail}".replace("-", "−")


def _caption(comparison: Comparison) -> list[str]:
    """What the figures are, a paragraph each."""
    row, text, machine = comparison.rows[0], comparison.text, comparison.machine
    windows = len(row.text.window_nll)
    lines = [
        f"Text: {text.name}, {text.n_bytes:,} bytes, SHA-256 {text.sha256[:12]}…; {windows} windows of "
        f"{comparison.settings['ctx']} tokens, each read from an empty context, every token but the first scored "
        f"({sum(row.text.window_tokens):,} for {row.facts.name}).",
        "± is one standard error with windows as the samples. “From the first”: by how many per cent the perplexity "
        "differs from the first model's. The losses of both are subtracted window by window before the error is "
        "taken, so that it tells models apart that the errors of the perplexities do not. All errors are about this "
        "text alone: what another seed in training would change is not in them.",
    ]
    if any(row.paper_perplexity for row in comparison.rows):
        lines.append(_PAPER_CAPTION)
    if any(row.speed for row in comparison.rows):
        speed = next(row.speed for row in comparison.rows if row.speed)
        lines.append(
            f"Speed: median of the turns in which the models alternated ({len(speed.decode_tok_s_runs)}); a prefill of "
            f"{speed.n_prompt} tokens, {speed.n_generate} tokens decoded one by one. {machine['cpu']}, "
            f"{machine['isa']}, device {machine['device']}, threads: {machine['threads']}."
        )
    if any(row.tasks for row in comparison.rows):
        limit = comparison.settings["limit"]
        lines.append(
            "Tasks: lm-evaluation-harness, ± its standard error" + (f"; the first {limit} documents." if limit else ".")
        )
    return [*lines, *(f"Note: {note}" for note in comparison.notes)]


def markdown(comparison: Comparison) -> str:
    """Tables and captions."""
    parts = [_markdown_table(*_cells(comparison))]
    if any(row.tasks for row in comparison.rows):
        parts.append(_markdown_table(*_task_cells(comparison)))
    return "\n\n".join([*parts, *(_escape_markdown(line) for line in _caption(comparison))]) + "\n"


def _markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [[_escape_markdown(cell) for cell in line] for line in [heads, *rows]]
    lines.insert(1, ["---", *["---:"] * (len(heads) - 1)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _escape_markdown(text: str) -> str:
    return re.sub(r"([\\|*_`<\[])", r"\\\1", _one_line(text))


def csv_table(comparison: Comparison) -> str:
    """A line for each model; numbers unrounded, errors in columns of their own, empty where nothing is known."""
    rows = []
    for row in comparison.rows:
        facts, speed, far = row.facts, row.speed, row.against_first
        line: dict[str, Any] = {
            **{name: getattr(facts, name) for name in ("name", "variant", "types", "n_parameters")},
            **{name: getattr(facts, name) for name in ("n_input_parameters", "code_bits", "file_bytes", "sha256")},
            **_pair("nll", row.nll),
            **_pair("perplexity", row.perplexity),
            "paper_perplexity": row.paper_perplexity,
            **_pair("bits_per_byte", row.bits_per_byte),
            **_pair("nll_from_first", None if far is None else far.nll),
            **_pair("percent_from_first", None if far is None else far.percent),
            "prefill_tok_s": speed and speed.prefill_tok_s,
            "decode_tok_s": speed and speed.decode_tok_s,
        }
        for score in row.tasks:
            line |= _pair(_label(score), score.figure)
        rows.append(line)
    heads = list(dict.fromkeys(head for row in rows for head in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, heads, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _pair(name: str, figure: Figure | None) -> dict[str, float | None]:
    return (
        {name: None, f"{name}_error": None} if figure is None else {name: figure.value, f"{name}_error": figure.error}
    )


_LATEX = {letter: f"\\{letter}" for letter in "&%$#_{}"} | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}"}
_LATEX |= {"^": r"\textasciicircum{}", "±": r"$\pm$", "…": r"\dots{}", "“": "``", "”": "''", "−": "$-$"}
_LATEX |= {letter: f"${letter}$" for letter in "<>|"}
_LATEX_DOCUMENT = r"""\documentclass{article}
\usepackage[utf8]{inputenc}
\usepackage[a4paper,landscape,margin=15mm]{geometry}
\pagestyle{empty}
\setlength{\parindent}{0pt}
\begin{document}
{\scriptsize
%s}

\medskip

%s
\end{document}
"""


def latex(comparison: Comparison, whole: bool = True) -> str:
    """The tables with plain rules, which need no package; `whole`: as a document, with the captions."""
    tables = [_latex_table(*_cells(comparison))]
    if any(row.tasks for row in comparison.rows):
        tables.append(_latex_table(*_task_cells(comparison)))
    body = "\n\n\\medskip\n\n".join(tables)
    captions = "\n\n".join(_escape_latex(line) for line in _caption(comparison))
    return _LATEX_DOCUMENT % (body, captions) if whole else body + "\n"


def _latex_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [" & ".join(map(_escape_latex, row)) + r" \\" for row in [heads, *rows]]
    lines = [r"\hline", lines[0], r"\hline", *lines[1:], r"\hline"]
    return "\n".join([f"\\begin{{tabular}}{{l{'r' * (len(heads) - 1)}}}", *lines, r"\end{tabular}"])


def _escape_latex(text: str) -> str:
    """Letters that LaTeX may not have, of other scripts, become question marks."""
    return "".join(_LATEX.get(letter, letter if letter <= "\xff" else "?") for letter in _one_line(text))


def _one_line(text: str) -> str:
    """Without control characters: names come from files."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _plain(value: Any) -> Any:
    """As JSON can hold it: infinity becomes text."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


# --- the plot ------------------------------------------------------------------------------------------------------

# Colours that also differ for colour-blind readers and in grey, with a marker each.
_STYLE = {"fixed": ("#0072b2", "o"), "affine": ("#d55e00", "^"), "learned": ("#7f7f7f", "s"), "table": ("#009e73", "D")}


def plot(comparison: Comparison, targets: Sequence[Path]) -> None:
    """Panels beside each other: perplexity, difference from the first, parameters, speed, tasks, the paper's models.

    Those that there is something for. ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure as Canvas  # without pyplot: nothing of the process is changed

    rows = comparison.rows
    wanted = {
        _draw_perplexity: True,
        _draw_difference: any(row.against_first for row in rows),
        _draw_parameters: True,
        _draw_speed: any(row.speed for row in rows),
        _draw_tasks: any(row.tasks for row in rows),
        _draw_paper: any(row.paper_perplexity for row in rows),
    }
    panels = [draw for draw, there in wanted.items() if there]
    figure = Canvas(figsize=(2.6 * len(panels), 3.2), layout="constrained")
    for axes, draw in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        names = [_short(row.facts.name) for row in rows]
        axes.set_xticks(range(len(rows)), names, rotation=0 if max(map(len, names)) < 9 else 30)
        axes.set_xlim(-0.6, len(rows) - 0.4)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
        draw(axes, rows)
    for target in targets:
        figure.savefig(target, dpi=100)


def _short(name: str) -> str:
    text = _one_line(name)
    return (text if len(text) <= 20 else text[:19] + "…").replace("$", r"\$")


def _style(row: Row) -> dict[str, Any]:
    colour, marker = _STYLE.get(row.facts.variant, ("black", "o"))
    return {"color": colour, "marker": marker}


def _title(axes: Any, title: str, below: str = "") -> None:
    axes.set_title(title + (f"\n{below}" if below else ""), fontsize=9)


def _points(axes: Any, rows: Sequence[Row], figures: Sequence[Figure | None]) -> None:
    for i, (row, figure) in enumerate(zip(rows, figures, strict=True)):
        if figure is not None:
            axes.errorbar(i, figure.value, figure.error, capsize=4, ls="", **_style(row))


def _draw_perplexity(axes: Any, rows: Sequence[Row]) -> None:
    _points(axes, rows, [row.perplexity for row in rows])
    _title(axes, "held-out perplexity", "± standard error")


def _draw_difference(axes: Any, rows: Sequence[Row]) -> None:
    """In grey: what only another seed changes, by the paper, where the models are of its kinds."""
    _points(axes, rows, [None if row.against_first is None else row.against_first.percent for row in rows])
    axes.axhline(0, color="black", lw=0.8)
    below = "paired, ± standard error"
    if rows[0].paper_perplexity:
        axes.axhspan(-PAPER_SEED_VARIATION, PAPER_SEED_VARIATION, color="#ececec", zorder=0)
        below = f"grey: ±{PAPER_SEED_VARIATION} %, other seeds in the paper"
    _title(axes, f"difference from {_short(rows[0].facts.name)}, %", below)


def _draw_parameters(axes: Any, rows: Sequence[Row]) -> None:
    """In millions, those of the input on top."""
    for i, row in enumerate(rows):
        inputs, total = row.facts.n_input_parameters / 1e6, row.facts.n_parameters / 1e6
        axes.bar(i, total - inputs, 0.6, color=_style(row)["color"])
        axes.bar(i, inputs, 0.6, total - inputs, color="white", edgecolor=_style(row)["color"], hatch="///")
        axes.annotate(f"{total:,.3g}", (i, total), ha="center", va="bottom", fontsize=8)
    axes.set_ylim(0, 1.15 * max(row.facts.n_parameters for row in rows) / 1e6)
    _title(axes, "parameters, millions", "hatched: of the input")


def _draw_speed(axes: Any, rows: Sequence[Row]) -> None:
    """Decoding, with the fastest and the slowest turn."""
    for i, row in enumerate(rows):
        if row.speed is not None:
            value, runs = row.speed.decode_tok_s, row.speed.decode_tok_s_runs
            axes.errorbar(i, value, [[value - min(runs)], [max(runs) - value]], capsize=4, ls="", **_style(row))
    axes.set_ylim(bottom=0)
    _title(axes, "decode, tokens per second", "bars: slowest and fastest turn")


def _draw_tasks(axes: Any, rows: Sequence[Row]) -> None:
    """Accuracies: of each task the normalised one where there is one."""
    metrics: dict[str, str] = {}
    for score in (score for row in rows for score in row.tasks):
        if score.metric == "acc_norm" or (score.metric in ("acc", "exact_match") and score.task not in metrics):
            metrics[score.task] = score.metric
    for i, row in enumerate(rows):
        for score in row.tasks:
            if metrics.get(score.task) == score.metric:
                x = list(metrics).index(score.task) + 0.15 * (i - (len(rows) - 1) / 2)
                axes.errorbar(x, score.figure.value, score.figure.error, capsize=3, ls="", **_style(row))
    names = [f"{_short(task)}\n{metric}" for task, metric in metrics.items()]
    axes.set_xticks(range(len(metrics)), names, fontsize=8, rotation=0)
    axes.set_xlim(-0.6, len(metrics) - 0.4)
    axes.set_ylim(0, 1)
    _title(axes, "tasks", "colours as beside, ± standard error")


def _draw_paper(axes: Any, rows: Sequence[Row]) -> None:
    """The published figures by themselves, hollow: they are of other models than the rows, and of another text."""
    for i, row in enumerate(rows):
        if row.paper_perplexity is not None:
            axes.plot(i, row.paper_perplexity, ls="", mfc="none", **_style(row))
    axes.set_ylim(2.2, 2.6)
    _title(axes, "in the paper: its models, its text", "mean perplexity of three seeds")
