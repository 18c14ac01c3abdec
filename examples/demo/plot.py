"""Draw docs/benchmarks/demo.png and print the table beside it from the logs that train.py keeps in `runs/`."""

import json
from pathlib import Path
from typing import Annotated

import matplotlib as mpl
import typer

mpl.use("Agg")
import matplotlib.pyplot as plt  # after the backend is chosen

HERE = Path(__file__).resolve().parent
# Colours that also differ for colour-blind readers and in grey, with a marker each.
VARIANTS = {"learned": ("#7f7f7f", "s"), "fixed": ("#0072b2", "o"), "affine": ("#d55e00", "^")}


def main(
    runs: Annotated[Path, typer.Option(help="folder that train.py wrote to")] = HERE / "runs",
    out: Annotated[Path, typer.Option(help="the picture")] = HERE.parents[1] / "docs/benchmarks/demo.png",
) -> None:
    """Compare the three runs."""
    logs = {name: json.loads((runs / name / "log.json").read_text(encoding="utf-8"))["log"] for name in VARIANTS}
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for name, (colour, marker) in VARIANTS.items():
        tokens = [entry["tokens"] / 1e6 for entry in logs[name]]
        axes.plot(tokens, [entry["perplexity"] for entry in logs[name]], color=colour, marker=marker, ms=4, label=name)
    axes.set(xlabel="training tokens (millions)", ylabel="held-out perplexity", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(which="both", alpha=0.3)
    axes.legend(title="input of the first block")
    figure.savefig(out, dpi=120)

    typer.echo("| step | tokens | learned | fixed | affine |\n|---:|---:|---:|---:|---:|")
    for rows in zip(*(logs[name] for name in VARIANTS), strict=True):
        if len({entry["step"] for entry in rows}) != 1:
            raise typer.BadParameter("the runs were not evaluated at the same steps", param_hint="--runs")
        values = " | ".join(f"{entry['perplexity']:.3f}" for entry in rows)
        typer.echo(f"| {rows[0]['step']:,} | {rows[0]['tokens']:,} | {values} |")


if __name__ == "__main__":
    typer.run(main)
