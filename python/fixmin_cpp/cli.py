"""The command `fixmin`. Text goes to stdout, everything about it to stderr; rich on a terminal, plain in a pipe.

Exit codes: 0 success, 1 an error (one line on stderr; --debug adds the traceback), 2 wrong usage, 130 Ctrl-C,
141 the reader of stdout went away.
"""

import dataclasses
import json
import logging
import math
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from . import _core, cli_compare, cli_export, cli_hub  # noqa: F401 - they register their commands
from . import cli_output as output
from ._core import __version__
from .atomic_file import refuse_inputs, terminate_cleanly
from .cli_app import (
    CLUSTER,
    FORWARD,
    INPUT,
    JOB,
    MAKE,
    MEASURE,
    MODEL_HELP,
    RUN,
    All,
    Debug,
    Escape,
    File,
    Json,
    Model,
    Prompt,
    Text,
    app,
)
from .cli_options import (
    MACHINE,
    from_argv,
    load_options,
    read_options,
    read_prompt,
    read_text,
    with_environment,
    with_load_options,
    with_options,
    with_serve_options,
)
from .errors import ArgumentError
from .inspect import printable
from .logs import LogFormat, LogLevel, configure
from .serve_options import SERVE_FIELDS

__all__ = ["app", "main"]


def main() -> None:
    """The command, once it has been imported (fixmin_command)."""
    output.guarded(app)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        print(f"fixmin {__version__}")
        raise typer.Exit


@app.command(**FORWARD, rich_help_panel=MAKE)
def convert(context: typer.Context) -> None:
    """Convert a Hugging Face checkpoint to GGUF and certify the result (needs fixmin-cpp[convert])."""
    _forward(context, "main")


@app.command(**FORWARD, rich_help_panel=MAKE)
def verify(context: typer.Context) -> None:
    """Certify a GGUF file against its checkpoint again (needs fixmin-cpp[convert])."""
    _forward(context, "verify_main")


@app.command(**FORWARD, rich_help_panel=MAKE)
def rewrap(context: typer.Context) -> None:
    """Write a checkpoint with PyTorch code that has a KV cache and runs in vLLM (needs fixmin-cpp[convert])."""
    _forward(context, "rewrap_main")


@app.command(rich_help_panel=MEASURE)
def tokenize(
    model: Annotated[
        Path,
        typer.Option("-m", "--model", metavar="MODEL", help="File with the tokenizer. Nothing else of it is read."),
    ],
    prompt: Prompt = None,
    file: File = None,
    escape: Escape = True,
    ids: Annotated[bool, typer.Option("--ids", help="Print the ids alone, in one line.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show the tokens of a text: a line for each, with its id and the text that it stands for.

    A token that is not whole characters is shown by its bytes, as b'\\xe6\\x97'. With --json "pieces" has U+FFFD
    there, and "bytes" the bytes of every token.
    """
    from .tokenizer import read_tokenizer

    with output.errors(debug):
        text = read_prompt(prompt, file, escape)
        _, tokenizer = read_tokenizer(output.locate(model, quiet=ids or as_json).path)
        token_ids = tokenizer.encode(text)
        pieces = [tokenizer.token_piece(i) for i in token_ids]
        if as_json:
            facts = {"text": text, "n_tokens": len(token_ids), "token_ids": token_ids, **output.json_pieces(pieces)}
            output.write(json.dumps(facts, ensure_ascii=False) + "\n")
        elif ids:
            output.write(" ".join(map(str, token_ids)) + "\n")
        else:
            output.write(
                "".join(f"{i:6}  {printable(repr(piece))}\n" for i, piece in zip(token_ids, pieces, strict=True))
            )
            output.note(f"{len(token_ids):,} tokens")


@app.command(rich_help_panel=MEASURE)
@with_load_options(before="quiet")
def score(
    model: Model,
    prompt: Prompt = None,
    file: File = None,
    escape: Escape = True,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No table of the tokens.")] = False,
    as_json: Json = False,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Show how probable the model finds a text: its perplexity, and each token's probability and rank.

    The rank is 1 where the token was the most probable one; the first token is not predicted. A text longer than the
    context is for `fixmin perplexity`.
    """
    with output.errors(debug):
        text = read_prompt(prompt, file, escape)
        with output.load(model, quiet=quiet or as_json, **load_options(options)) as loaded:
            found = loaded.score(text)
            pieces = [loaded.require_tokenizer().token_piece(i) for i in found.token_ids]
        if as_json:
            facts = dataclasses.asdict(found)
            facts |= {"logprobs": found.logprobs.tolist(), "ranks": found.ranks.tolist()}
            facts["perplexity"] = found.perplexity if math.isfinite(found.perplexity) else None
            facts = {"text": text, **output.json_pieces(pieces), **facts}
            output.write(json.dumps(facts, ensure_ascii=False, allow_nan=False) + "\n")
            return
        if not quiet:
            output.write(f"    id  {'logprob':>8} {'p':>8} {'rank':>6}  token\n")
            output.write(f"{found.token_ids[0]:6}  {'':8} {'':8} {'':6}  {printable(repr(pieces[0]))}\n")
            scored = zip(found.token_ids[1:], found.logprobs, found.ranks, pieces[1:], strict=True)
            for i, logprob, rank, piece in scored:
                output.write(f"{i:6}  {logprob:8.3f} {math.exp(logprob):8.2%} {rank:6}  {printable(repr(piece))}\n")
        output.write(
            f"{len(found.token_ids):,} tokens, perplexity {found.perplexity:.6g}, "
            f"{found.nll:.6g} nats per token over {len(found.logprobs):,}\n"
        )


@app.command(rich_help_panel=MEASURE)
def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE.gguf", help="File of any architecture.")],
    tokens: Annotated[
        list[str] | None,
        typer.Option(
            "-t",
            "--token",
            metavar="TEXT",
            help="Show the code of these ids or of the tokens of this text; repeatable.",
        ),
    ] = None,
    everything: All = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show a GGUF file: hyper-parameters, the code and its matrix, certificate, tensors.

    Tensors that all blocks have are one line, with --all each has its own.
    """
    from .inspect import render

    with output.errors(debug):
        console = output.Stdout(highlight=False, emoji=False)
        found = output.locate(file, quiet=as_json).path
        render(
            found, [from_argv(text) for text in tokens or []], as_json=as_json, all_tensors=everything, console=console
        )


@app.command(rich_help_panel=RUN)
@with_load_options(before="debug")
@with_options(before="debug")
def generate(
    model: Model,
    prompt: Prompt = None,
    file: File = None,
    escape: Escape = True,
    stream: Annotated[
        bool, typer.Option("--stream/--no-stream", help="Print text as it is generated.", rich_help_panel=INPUT)
    ] = True,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No timings on stderr.", rich_help_panel=INPUT)] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.", rich_help_panel=INPUT)] = False,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Continue a prompt. The text goes to stdout, timings to stderr.

    Options of sampling have llama.cpp's names and defaults, but for --temp: it is 0 here, and then the others that
    narrow the choice have no effect. docs/sampling.md explains each.
    """
    with output.errors(debug):
        text = read_prompt(prompt, file, escape)
        load = load_options(options)
        arguments = read_options(options, escape)
        if not as_json and {"logprobs", "prompt_logprobs"} & arguments.keys():
            raise typer.BadParameter("--logprobs and --prompt-logprobs need --json")
        one = arguments.get("n", 1) == 1 and "best_of" not in arguments
        with output.load(model, quiet=quiet or as_json, **load) as loaded:
            if one:
                arguments.pop("n", None)
                completion = _stream(loaded, text, arguments, show=stream and not as_json)
            else:
                completion = loaded.generate(text, **arguments)
            if as_json:
                output.write(json.dumps({"prompt": text, **dataclasses.asdict(completion)}, ensure_ascii=False) + "\n")
                return
            answers = completion.candidates or [completion]
            for i, each in enumerate(answers):
                if len(answers) > 1:  # a line that tells where one ends and the next begins
                    output.write(f"--- {i + 1} of {len(answers)}, seed {each.seed} ---\n")
                output.write("\n" if one and stream else each.text + "\n")
                if not quiet:
                    output.note(output.summary(each, sampled=arguments.get("temperature", 0.0) > 0))
            if not quiet:
                output.tell_without_effect(arguments)


def _stream(model: Any, text: str, arguments: dict[str, Any], *, show: bool) -> Any:
    """The completion of a text. Through a stream in any case, so that Ctrl-C keeps what was written so far."""
    with model.stream(text, **arguments) as pieces:
        for piece in pieces:
            if show:
                output.write(piece.text)
    return pieces.completion


@app.command(rich_help_panel=RUN)
@with_load_options(before="quiet", without=["n_parallel"], rare=True)
@with_options(before="debug", without=["n", "best_of"])
def batch(
    source: Annotated[Path, typer.Argument(metavar="IN.jsonl", help="One JSON object per line.")],
    target: Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="One record per line of input, in its order.")],
    model: Model,
    task: Annotated[
        str, typer.Option(help="generate, score (log-probabilities) or embed (mean state).", rich_help_panel=JOB)
    ] = "generate",
    token_ids: Annotated[
        bool, typer.Option("--token-ids", help="Write the ids of generated tokens too.", rich_help_panel=JOB)
    ] = False,
    n_parallel: Annotated[
        int, typer.Option("--parallel", help="Lines that a model works on at a time.", rich_help_panel=JOB)
    ] = 64,
    fail_fast: Annotated[
        bool, typer.Option("--fail-fast", help="End at the first bad line.", rich_help_panel=JOB)
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start again, whatever OUT.jsonl holds.", rich_help_panel=JOB)
    ] = False,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS", help="Run on a Ray cluster: auto, HOST:PORT, or local.", rich_help_panel=CLUSTER
        ),
    ] = None,
    ray_actors: Annotated[
        int | None, typer.Option(help="Models in the cluster. Default: one per node, or GPU.", rich_help_panel=CLUSTER)
    ] = None,
    ray_lines: Annotated[
        int | None, typer.Option(help="Lines of a Ray task. Default: 4 times --parallel.", rich_help_panel=CLUSTER)
    ] = None,
    ray_gpus: Annotated[
        float | None, typer.Option(help="GPUs of each model. Default: 1 with --device cuda.", rich_help_panel=CLUSTER)
    ] = None,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Neither progress nor a summary.")] = False,
    as_json: Json = False,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Answer every line of a file by a line of another one. A job that was ended goes on when it is started again.

    A line is {"prompt": text or ids}, with an "id" and arguments of Model.generate if wanted, or a request of OpenAI's
    batch format: completions and chats. Options here count for lines that do not say otherwise; lines get their seeds
    from --seed (default: 0) and their number. What is wrong with a line stands in its record. docs/batch.md has the
    formats.
    """
    from .batch import run_batch
    from .batch_output import OutputFile

    with output.errors(debug):
        if str(target) == "-":
            raise ArgumentError("OUT.jsonl must be a file, not stdout: a job goes on from what it holds")
        for written in OutputFile.names(target):
            refuse_inputs(written, options.get("json_schema_file"), options.get("grammar_file"))
        model = output.locate(model, quiet=quiet or as_json).path
        load = load_options(options)
        arguments = read_options(options, escape=True)
        seed = arguments.pop("seed", 0)
        with _batch_progress(quiet or as_json) as update:
            report = run_batch(
                model,
                source,
                target,
                task=task,
                options=arguments,
                seed=seed,
                token_ids=token_ids,
                n_parallel=n_parallel,
                fail_fast=fail_fast,
                overwrite=overwrite,
                **load,
                ray_address=ray,
                ray_actors=ray_actors,
                ray_lines=ray_lines,
                ray_gpus=ray_gpus,
                progress=update,
            )
        if report.n_resumed == report.n_lines > 0 and not as_json and not quiet:
            output.note(f"already done: {target} has all {report.n_lines} lines")
        if as_json or not quiet:
            output.report(dataclasses.asdict(report), as_json)


@app.command(rich_help_panel=RUN)
@with_environment("quiet", "debug")
@with_serve_options(before="api_key_file")
def serve(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    api_key_file: Annotated[Path | None, typer.Option(help="Keys, one a line; empty lines do not count.")] = None,
    chat_template: Annotated[
        Path | None, typer.Option(help="Jinja file. Default: Question/Answer, for base models.")
    ] = None,
    log_level: Annotated[
        LogLevel | None, typer.Option(case_sensitive=False, help="Least level of lines. Default: info.")
    ] = None,
    log_format: Annotated[
        LogFormat, typer.Option(case_sensitive=False, help="json: an object per line.")
    ] = LogFormat.text,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="The same as --log-level warning.")] = False,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Serve a model to OpenAI's clients and to a browser (needs fixmin-cpp[serve]). docs/serving.md describes it.

    Every option but --quiet and --debug can be an environment variable: --max-queue is FIXMIN_MAX_QUEUE. Ctrl-C, or
    SIGTERM, lets running requests finish.
    """
    configure(log_level or (LogLevel.warning if quiet else LogLevel.info), log_format)

    def tell(line: str) -> None:
        logging.getLogger(__name__).critical(line, exc_info=debug)

    with output.errors(debug, tell if log_format is LogFormat.json else None):
        if quiet and log_level is not None:
            raise ArgumentError("--quiet is the same as --log-level warning: give one")
        package = output.extra("serve", "serve")
        for name in ("FIXMIN_API_KEY", "FIXMIN_API_KEY_FILE"):  # a secret that was not filled in
            if os.environ.get(name, "x").strip() == "":
                raise ArgumentError(f"{name} is empty: unset it for a server without keys")
        options |= {name: tuple(options[name] or ()) for name, row in SERVE_FIELDS.items() if row.default == ()}
        options["api_keys"] += _keys_of(api_key_file)
        template = None if chat_template is None else read_text(chat_template)
        settings = package.ServeSettings(model=str(model), chat_template=template, **options)
        settings = dataclasses.replace(settings, model=str(output.locate(model, quiet=quiet).path))
        package.run(settings)
        if any(thread.name.startswith("fixmin-") and thread.daemon for thread in threading.enumerate()):
            # Threads that cannot be interrupted must not meet an interpreter that is being taken down.
            logging.shutdown()
            os._exit(0)


def _keys_of(path: Path | None) -> tuple[str, ...]:
    """The keys in a file; at least one, so that an empty file does not open the server."""
    if path is None:
        return ()
    keys = tuple(line.strip() for line in read_text(path).splitlines() if line.strip())
    if not keys:
        raise ArgumentError(f"{path} holds no API key")
    return keys


@app.command(rich_help_panel=MEASURE)
@with_load_options(before="everything", without=["n_ctx"])
def bench(
    model: Model,
    prompt: Annotated[
        int | None, typer.Option("-p", "--prompt", help="Tokens of a prefill. Default: 512, or what fits the context.")
    ] = None,
    generate: Annotated[
        int | None, typer.Option("-n", "--generate", help="Tokens decoded one by one. Default: 64, or what fits.")
    ] = None,
    depth: Annotated[int, typer.Option("-d", "--depth", help="Tokens in the context before decoding begins.")] = 0,
    repeat: Annotated[int, typer.Option("-r", "--repeat", help="How often prefill and decode take turns.")] = 5,
    everything: All = False,
    as_json: Json = False,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Measure prefill and decode, and how much of the machine that is.

    What --all and --json have:

    prefill_tok_s: tokens of a prompt read per second, from an empty context to the last token's logits.

    decode_tok_s: tokens generated one after the other per second, greedy. Both are medians of runs that take turns;
    *_runs are the single ones.

    decode_bytes_per_token: what one decoded token has to read: weights as they lie in memory (of a learned embedding
    one row; queries, keys and values of layer 0 are folded into the code) and the cached keys and values.

    read_ceiling_gb_s: what the same threads read of memory when they do nothing else, with the widest loads of the
    instruction set, from a buffer larger than the last-level cache; the mean over a few passes, measured before the
    first turn and after each. read_ceiling_best_gb_s: the fastest single pass.

    decode_roofline: decode_tok_s * decode_bytes_per_token / read_ceiling_gb_s, within a turn. Above 1 the weights came
    from the cache: cached_read_gb_s is the same loop over a buffer of decode_bytes_per_token.

    int8_peak_tops: 8-bit multiplications and additions per second (10^12) of the same threads on registers alone, with
    the vector instructions of the matrix products (AMX tiles can do more); measured between the turns too.

    prefill_peak_fraction: prefill_tok_s * operations per token / int8_peak_tops, attention included (which runs in
    float32, as do the products of F32, F16 and BF16 files: those cannot come near 1).

    launch_us: microseconds from one part of a step to the next if neither has any work: until the threads have waited
    for each other; on a GPU of kernels in a CUDA graph. A decoded token has some eight parts a layer.

    load_s: from opening the file until the model is ready. rss_bytes: resident memory after the runs.
    """
    from .benchmark import bench as measure

    with output.errors(debug):
        model = output.locate(model, quiet=as_json).path
        with output.status(as_json) as tell:
            report = measure(
                model,
                n_prompt=prompt,
                n_generate=generate,
                depth=depth,
                repeat=repeat,
                progress=tell,
                **load_options(options),
            )
        if as_json or everything:
            output.report(dataclasses.asdict(report), as_json)
        else:
            output.write("".join(line + "\n" for line in report.summary()))


@app.command(rich_help_panel=MAKE)
def quantize(
    source: Annotated[Path, typer.Argument(metavar="IN.gguf", help="F32, F16 or BF16 file of the model.")],
    target: Annotated[Path, typer.Argument(metavar="OUT.gguf", help="File to write; appears when it is complete.")],
    type: Annotated[
        str,
        typer.Argument(
            metavar="TYPE",
            help="For every matrix: f32 f16 bf16 q8_0 q4_0 q4_1 q5_0 q5_1 q2_k q3_k q4_k q5_k q6_k iq4_nl iq4_xs w8a8. "
            "Mixed as llama.cpp does: q3_k_s q3_k_m q3_k_l q4_k_s q4_k_m q5_k_s q5_k_m.",
        ),
    ],
    imatrix: Annotated[Path | None, typer.Option(help="Importance matrix (GGUF), see `fixmin imatrix`.")] = None,
    tensor_type: Annotated[
        list[str] | None,
        typer.Option(
            metavar="REGEX=TYPE", help="Type of the matrices whose names match; repeatable, the first counts."
        ),
    ] = None,
    output_tensor_type: Annotated[str | None, typer.Option(help="Type of output.weight.")] = None,
    allow_requantize: Annotated[
        bool, typer.Option("--allow-requantize", help="Take a quantised source too; its errors add to the new ones.")
    ] = False,
    smooth: Annotated[
        Path | None,
        typer.Option(
            metavar="TEXT",
            help="With w8a8: move powers of two from channels to weights, as this text (or importance matrix) tells.",
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option("-t", "--threads", help="Default, 0 or -1: the CPUs of this process.")
    ] = None,
    everything: All = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a model in another number format (needs fixmin-cpp[quantize]).

    Metadata is kept; the certificate in it remains that of the source file. Norms and biases are F32.
    """
    with output.errors(debug):
        quantizer = output.extra("quantization.requantize", "quantize")
        with terminate_cleanly(), output.bar("quantizing", as_json) as update:
            report = quantizer.quantize(
                source,
                target,
                type,
                imatrix=imatrix,
                tensor_types=_tensor_types(tensor_type or []),
                output_tensor_type=output_tensor_type,
                allow_requantize=allow_requantize,
                smooth=None if smooth is None else output.extra("quantization.smooth", "quantize").smooth_by(smooth),
                n_threads=threads,
                progress=update,
            )
        if as_json:
            output.report({**dataclasses.asdict(report), "path": str(report.path)}, as_json)
            return
        if everything:
            lines = [f"{tensor.name}: {_change(tensor)}" for tensor in report.tensors]
        else:  # how many became what; the one with the most first
            lines = [f"{n} x {change}" for change, n in Counter(map(_change, report.tensors)).most_common()]
        output.write("".join(line + "\n" for line in lines))
        output.write(
            f"{report.path}: {report.source_bytes / 1e6:,.1f} -> {report.n_bytes / 1e6:,.1f} MB, "
            f"{report.bits_per_weight:.2f} bits per weight, {report.seconds:.1f} s. "
            "The certificate in it is that of the source file.\n"
        )
        if report.smooth is not None:
            output.write(f"{report.smooth.summary()}\n")


def _change(tensor: Any) -> str:
    note = f"  ({tensor.note})" if tensor.note else ""
    change = tensor.type if tensor.type == tensor.source_type else f"{tensor.source_type} -> {tensor.type}"
    return change + note


@app.command(rich_help_panel=MAKE)
@with_load_options(before="as_json", without=["n_ctx", "kv_type"])
def imatrix(
    model: Annotated[
        Path, typer.Option("-m", "--model", metavar="FILE.gguf", help="File of the model, best in F32 or F16.")
    ],
    file: Text,
    out: Annotated[
        Path,
        typer.Option("-o", "--out", metavar="OUT.gguf", help="File to write, for `fixmin quantize --imatrix`."),
    ],
    ctx: Annotated[int | None, typer.Option("-c", "--ctx", help="Tokens of a chunk. Default: 512 at most.")] = None,
    as_json: Json = False,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Collect how large the inputs of every matrix are over a text (needs fixmin-cpp[quantize]).

    The file is in llama.cpp's form: sums of squares per input channel, and how many tokens they are from.
    """
    with output.errors(debug):
        collector = output.extra("quantization.imatrix", "quantize")
        refuse_inputs(out, model, file)
        text = read_text(file)
        with (
            output.load(model, quiet=as_json, **load_options(options)) as loaded,
            output.bar("reading", as_json) as update,
        ):
            report = collector.collect(loaded, text, out, ctx=ctx or None, dataset=file.name, progress=update)
        output.report({**dataclasses.asdict(report), "path": str(report.path)}, as_json)


@app.command(rich_help_panel=MEASURE)
@with_load_options(before="base_kv_type", without=["n_ctx"])
def perplexity(
    model: Model,
    file: Text,
    ctx: Annotated[int | None, typer.Option("-c", "--ctx", help="Tokens of a window. Default: the model's.")] = None,
    stride: Annotated[
        int | None, typer.Option(help="Tokens from one window to the next. Default: ctx, without overlap.")
    ] = None,
    max_windows: Annotated[int | None, typer.Option(help="Stop after so many. Default: the whole text.")] = None,
    base_model: Annotated[Path | None, typer.Option(help="GGUF file to compare with, run side by side.")] = None,
    save_logits: Annotated[
        Path | None, typer.Option(help="Write the logits: 4 bytes per token and vocabulary.")
    ] = None,
    kl: Annotated[Path | None, typer.Option(help="Compare with logits saved before, of another model.")] = None,
    base_kv_type: Annotated[
        str | None, typer.Option(help="The base model's. Default: the same.", rich_help_panel=MACHINE)
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Perplexity of a text, and the divergence from another model's predictions.

    Every window is read from an empty context; its tokens are scored but for the first, or with a stride below ctx,
    those that no earlier window has scored. With --base-model (or --kl): KL(base || model) in nats per token, the
    change of the probability of the right token, and how often the most probable token is the same.
    """
    from .evaluate import perplexity as measure

    with output.errors(debug), ExitStack() as stack:
        if base_model is not None and kl is not None:
            raise typer.BadParameter("give --base-model or --kl, not both")
        if save_logits is not None:
            refuse_inputs(save_logits, model, file, base_model, kl)
        text = read_text(file)
        load = load_options(options)
        loaded = stack.enter_context(output.load(model, quiet=as_json, **load))
        base = None
        if base_model is not None:
            load["kv_type"] = base_kv_type or load["kv_type"]
            base = stack.enter_context(output.load(base_model, quiet=as_json, **load))
        with output.bar("reading", as_json) as update:
            report = measure(
                loaded,
                text,
                ctx=ctx or None,
                stride=stride,
                max_windows=max_windows,
                base=base,
                save_logits=save_logits,
                base_logits=kl,
                progress=update,
            )
        facts = dataclasses.asdict(report)
        if not as_json:
            facts.update(facts.pop("divergence") or {})
        output.report(facts, as_json)


@app.command(rich_help_panel=MEASURE)
def info(as_json: Json = False, debug: Debug = False) -> None:
    """Show the CPU, the instruction sets, the GPUs and the versions that this installation uses."""
    from .api import system_info

    with output.errors(debug):
        gpus = _core.gpus()
        shown = [f"{gpu['name']}, {gpu['architecture']}, {gpu['memory_bytes'] / 1e9:.1f} GB" for gpu in gpus]
        found = {**system_info(), "cuda_driver": _core.cuda_driver(), "gpus": gpus if as_json else shown}
        output.report(found, as_json)


def _forward(context: typer.Context, name: str) -> None:
    """Runs a command of fixmin_cpp.convert.command_line, which parses its own arguments."""
    arguments = list(context.args)
    debug = "--debug" in arguments
    if debug:
        arguments.remove("--debug")
    with output.errors(debug), output.status(bool({"-h", "--help"} & set(arguments))) as tell:
        if sys.stderr.isatty():
            output.note("starting the converter ...")
        else:
            tell("starting the converter: PyTorch and transformers take some seconds")
        code = getattr(output.extra("convert.command_line", "convert"), name)(arguments)
    raise typer.Exit(code or 0)


def _tensor_types(options: list[str]) -> dict[str, str]:
    """REGEX=TYPE, split at the last "="."""
    rules: dict[str, str] = {}
    for option in options:
        expression, separator, wanted = option.rpartition("=")
        if not (expression and separator):
            raise typer.BadParameter(f"--tensor-type must be REGEX=TYPE, got {option!r}")
        rules.setdefault(expression, wanted)
    return rules


@contextmanager
def _batch_progress(silent: bool) -> Iterator[Callable[..., None]]:
    """How far a job is, on stderr: a bar on a terminal, a line every ten seconds in a pipe."""
    if silent:
        yield lambda report: None
        return
    if not sys.stderr.isatty():
        due = 10.0  # seconds since the start

        def tell(report: Any) -> None:
            nonlocal due
            if report.seconds >= due:
                due = report.seconds + 10.0
                output.note(f"{report.n_done} of {report.n_lines} lines, {_pace(report)}")

        yield tell
        return
    columns = (BarColumn(), TextColumn("{task.completed} of {task.total} lines, {task.fields[pace]}", markup=False))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None, pace="starting")
        yield lambda report: progress.update(task, completed=report.n_done, total=report.n_lines, pace=_pace(report))


def _pace(report: Any) -> str:
    """Speed, errors and the time left of a BatchReport, by the lines of this run."""
    left = (report.n_lines - report.n_done) * report.seconds / max(report.n_done - report.n_resumed, 1)
    minutes, seconds = divmod(round(left), 60)
    hours, minutes = divmod(minutes, 60)
    errors = f"{report.n_errors} errors, " if report.n_errors else ""
    return f"{report.tok_s:,.0f} tok/s, {errors}{hours}:{minutes:02}:{seconds:02} left"


if __name__ == "__main__":
    main()
