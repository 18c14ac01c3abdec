"""The command `fixmin export`."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from . import cli_output as output
from .atomic_file import terminate_cleanly
from .cli_app import MAKE, All, Debug, Json, app

__all__ = ["export"]


@app.command(rich_help_panel=MAKE)
def export(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL", help="GGUF file, best in F32 or F16; or a checkpoint folder or a repository of the hub."
        ),
    ],
    out: Annotated[
        Path, typer.Option("-o", "--out", metavar="OUT.gguf", help="File to write; appears when it is complete.")
    ],
    to: Annotated[str, typer.Option(help="For which program: llama.cpp.")] = "llama.cpp",
    outtype: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="For every matrix: those of `fixmin quantize` but w8a8. Default: the types that the model has.",
        ),
    ] = None,
    ollama: Annotated[bool, typer.Option("--ollama", help="Write a Modelfile beside the file.")] = False,
    modelfile: Annotated[Path | None, typer.Option(help="Write a Modelfile there.")] = None,
    tokenizer: Annotated[
        bool, typer.Option("--tokenizer/--no-tokenizer", help="Without one programs take token ids alone.")
    ] = True,
    allow_token_differences: Annotated[
        bool,
        typer.Option("--allow-token-differences", help="Also a file whose tokenizer gives ordinary text other ids."),
    ] = False,
    threads: Annotated[
        int | None, typer.Option("-t", "--threads", help="Default, 0 or -1: the CPUs of this process.")
    ] = None,
    everything: All = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a model as a GGUF file that llama.cpp, Ollama and LM Studio run (needs fixmin-cpp[quantize]).

    Logits and token ids are compared with the model's own; what differs is printed, and stands in the file.
    """
    with output.errors(debug):
        exporter = output.extra("export.llama_cpp", "quantize")
        if not model.is_file():  # float32: what is folded is then rounded once
            model = output.locate(model, quiet=as_json, dtype="f32").path
        if ollama and modelfile is None:
            modelfile = out.parent / "Modelfile"
        # A damaged file may hold numbers that are none: the certificate says so.
        with terminate_cleanly(), output.status(as_json) as tell, np.errstate(all="ignore"):
            told = -1

            def update(done: int, total: int, tensor: str) -> None:
                nonlocal told
                if (tenth := 10 * done // max(total, 1)) != told:
                    told = tenth
                    tell(f"writing {10 * tenth} %")

            report = exporter.export(
                model,
                out,
                to=to,
                outtype=outtype,
                tokenizer=tokenizer,
                allow_token_differences=allow_token_differences,
                modelfile_path=modelfile,
                n_threads=threads,
                progress=update,
                step=tell,
            )
        if as_json:
            facts = dataclasses.asdict(report)
            beside = None if report.modelfile is None else str(report.modelfile)
            output.report({**facts, "path": str(report.path), "modelfile": beside}, as_json)
            return
        output.write("".join(f"{line}\n" for line in _lines(report, everything)))


def _lines(report: Any, everything: bool) -> list[str]:
    types = ", ".join(f"{n} x {kind}" for kind, n in report.types.items())
    figures = report.certificate
    lines = [
        f"{report.path}: {report.architecture}, {report.n_bytes / 1e6:,.1f} MB, {types}, {report.seconds:.1f} s",
        "compared with the model's own, relative errors of logits:",
        f"  {figures.function_error:.2g} by what is computed (limit {figures.function_tolerance:g})",
    ]
    if figures.gelu_error is not None:
        lines.append(f"  {figures.gelu_error:.2g} by the formula of GELU that llama.cpp has")
    lines.append(
        f"  {figures.logit_error:.2g} in all (limit {figures.logit_tolerance:.2g}); KL divergence "
        f"{figures.kl_divergence:.2g}, same most likely token at {100 * figures.top1_agreement:.4g} % of "
        f"{figures.positions} positions"
    )
    if report.tokens is not None:
        n, different = sum(r.n_texts for r in report.tokens), sum(r.n_different for r in report.tokens)
        lines.append(f"token ids: other ones in {different} of {n} texts of {len(report.tokens)} kinds")
        shown = [r for r in report.tokens if everything or r.n_different]
        for r in shown:
            strange = f"; {r.n_unknown_different} of them with unknown characters" if r.n_unknown_different else ""
            example = f", such as {r.example[:12]!a}" if r.example else ""
            lines.append(f"  {r.name}: {r.n_different} of {r.n_texts}{strange}{example}")
    if report.folded:
        lines.append("the bias of the output projection is folded into the last norm and the matrix")
    lines += [f"note: {note}" for note in report.notes]
    return lines + [f"{program}: {command}" for program, command in report.commands.items()]
