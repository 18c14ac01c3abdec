"""A README.md for a repository of GGUF files on the Hugging Face hub, with the figures of their certificates.

Nothing in it is claimed that the files do not say: who wants to know more about the model is sent to its own card.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import ArgumentError
from .inspect import describe, printable
from .recognise import hub_id

__all__ = ["card"]

_FRAGMENT = re.compile(r"[\w.+-]+")
_EXPORTS = ("gptneox", "starcoder2", "stablelm", "qwen2", "llama")  # architectures that `fixmin export` writes
_PROJECT = "fixmin-cpp"


def card(
    paths: Sequence[str | Path],
    *,
    repository: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
) -> str:
    """The text of the README.md, Markdown with the hub's YAML header.

    Args:
        paths: GGUF files of one model, as `fixmin convert`, `quantize` and `export` write them; at least one of
            architecture "fixmin", whose certificate the card shows.
        repository: OWNER/NAME that the files will lie in. None: a placeholder.
        base_model: OWNER/NAME of the checkpoint on the hub, or None.
        license: of the weights, by the hub's names ("apache-2.0"); None: what the files say, else none is stated.

    Raises:
        ArgumentError: no file of this architecture, or files of different models. GGUFError, OSError.
    """
    for name, value in (("repository", repository), ("base_model", base_model)):
        if value is not None and hub_id(value) != value:
            raise ArgumentError(f"{name} must be OWNER/NAME, got {value!r}")
    if license is not None and not _FRAGMENT.fullmatch(license):
        raise ArgumentError(f"license must be a name of the hub such as apache-2.0, got {license!r}")
    described = [describe(path) for path in paths]
    own = [d for d in described if d["metadata"].get("general.architecture") == "fixmin"]
    others = [d for d in described if d not in own]
    if not own:
        raise ArgumentError("none of the files is a model of this program: give what `fixmin convert` wrote")
    for d in others:
        if d["metadata"].get("general.architecture") not in _EXPORTS:
            name = printable(str(d["metadata"].get("general.architecture")))
            raise ArgumentError(f"{d['file']['path']}: its architecture is {name}, which no command here writes")
    first = own[0]["metadata"]
    for d in own[1:]:
        for key in ("vocab_size", "context_length", "embedding_length", "block_count"):
            if d["metadata"].get(f"fixmin.{key}") != first.get(f"fixmin.{key}"):
                raise ArgumentError(f"{d['file']['path']} is another model: its fixmin.{key} differs")
    license = license or first.get("general.license")
    return (
        "\n\n".join(
            [
                _header(license, base_model, others != []),
                f"# {_plain(first.get('general.name', 'model'))}: GGUF",
                _what(own[0], base_model),
                "## Files\n\n" + _files(own, others),
                "## Certificate\n\n" + _certificate(own),
                "## Use\n\n" + _use(own[0], repository or "OWNER/NAME", others),
            ]
        )
        + "\n"
    )


def _header(license: str | None, base_model: str | None, exported: bool) -> str:
    lines = ["---", "pipeline_tag: text-generation", f"library_name: {_PROJECT}"]
    if license:
        lines.append(f"license: {_plain(license)}")
    if base_model:
        lines += [f"base_model: {base_model}", "base_model_relation: quantized"]
    tags = ["gguf", _PROJECT, "no-input-embedding-table", *(["llama.cpp"] if exported else [])]
    return "\n".join([*lines, "tags:", *(f"- {tag}" for tag in tags), "---"])


def _plain(text: Any) -> str:
    """A value of a file as text that is no Markdown, YAML or HTML."""
    return re.sub(r"[`*_|<>\[\]{}#:&\\]", " ", printable(str(text), 100)).strip()


def _file_name(d: dict[str, Any]) -> str:
    """As it can stand between backticks, in a table."""
    return re.sub("[`|]", " ", printable(Path(d["file"]["path"]).name))


def _what(d: dict[str, Any], base_model: str | None) -> str:
    m, code = d["metadata"], d["code"]
    kind = code.get("kind")
    if kind == "learned":
        about = "Its input is an ordinary learned embedding table."
    else:
        how = {"affine": "A·bin(t) ⊕ b over GF(2)", "table": "a stored table of bits"}.get(str(kind), str(kind))
        about = (
            f"It has **no input embedding table**: the {code.get('width')}-bit code of a token id t is computed "
            f"({how}), repeated to the width of the model ({code.get('lift')}) and left to the transformer."
        )
    origin = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else "a checkpoint"
    shape = (
        f"{m.get('fixmin.block_count')} layers, width {m.get('fixmin.embedding_length'):,}, vocabulary "
        f"{m.get('fixmin.vocab_size'):,}, context {m.get('fixmin.context_length'):,} tokens"
    )
    return (
        f"A base language model ({shape}), converted from {origin} by {_PROJECT}. {about} Method: A. Bochkov, "
        "*Language Models Without a Trainable Input Embedding Table*, [arXiv 2605.09751]"
        "(https://arxiv.org/abs/2605.09751)."
    )


def _type(d: dict[str, Any]) -> str:
    """Of most weights."""
    types = d["file"]["types"]
    return str(max(types, key=lambda name: types[name]["weights"]))


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _files(own: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> str:
    rows = [_row(("file", "weights", "size", "bits per weight", "for")), _row(["---"] * 5)]
    for d, program in [*((d, _PROJECT) for d in own), *((d, "llama.cpp, Ollama, LM Studio") for d in others)]:
        bits = d["file"]["bits_per_weight"]
        cells = (f"`{_file_name(d)}`", _type(d), f"{d['file']['bytes'] / 1e6:,.1f} MB")
        rows.append(_row((*cells, "" if bits is None else f"{bits:.2f}", program)))
    return "\n".join(rows)


_FIGURES = (
    ("logit_error", "relative difference of logits"),
    ("kl_divergence", "KL divergence, nats"),
    ("top1_agreement", "same most probable token"),
    ("engine_error", "engine, a block with the same weights"),
)


def _certificate(own: Sequence[dict[str, Any]]) -> str:
    named = [(_file_name(d), d["certificate"], d["quantized"]) for d in own]
    rows = [_row(("file", *(title for _, title in _FIGURES), "tokens")), _row(["---"] * (len(_FIGURES) + 2))]
    notes = []
    for name, certificate, quantized in named:
        if certificate.get("passed") is not True:
            notes.append(f"`{name}` has no certificate that it passed.")
            continue
        if quantized:
            notes.append(f"`{name}` was quantised afterwards; its certificate is that of the file it was made from.")
            continue
        figures = [_shown(certificate.get(key, "")) for key, _ in _FIGURES]
        rows.append(_row((f"`{name}`", *figures, str(certificate.get("tokens", "")))))
    certified = [c for _, c, q in named if c.get("passed") is True and not q]
    if not certified:
        return "\n".join(notes)
    c = certified[0]
    codes = ""
    if "code_ids" in c:
        codes = f" Codes are equal for all {c['code_ids']:,} token ids ({c.get('code_mismatches', '?')} mismatches)."
    return (
        f"Each file was compared with {_plain(c.get('against', 'the checkpoint'))} before it got its name, and the "
        f"figures are in it (`fixmin inspect`); `fixmin verify` repeats the comparison.{codes}\n\n"
        + "\n".join(rows)
        + "".join(f"\n\n{note}" for note in notes)
    )


def _shown(figure: float | str) -> str:
    """What is not finite comes as text."""
    return figure if isinstance(figure, str) else f"{figure:.3g}"


def _use(d: dict[str, Any], repository: str, others: Sequence[dict[str, Any]]) -> str:
    kind = _type(d).lower().replace("i8", "w8a8")
    text = (
        f"This is a base model: it continues text.\n\n```\npip install '{_PROJECT}[run]'"
        "  # or '.[run]' in its source folder\n"
        f'fixmin run {repository}:{kind} "Once upon a time,"\n```\n\n```python\nimport fixmin_cpp\n\n'
        f'model = fixmin_cpp.Model.from_pretrained("{repository}", "{kind}")\n'
        'print(model.generate("Once upon a time,", max_new_tokens=64, temperature=0.5).text)\n```\n\n'
        f"`fixmin serve {repository}:{kind}` answers OpenAI's clients."
    )
    if others:
        name = Path(others[0]["file"]["path"]).name
        text += (
            f" Other programs run the exported files: `llama-server -hf {repository} --hf-file {name}`, "
            f"`ollama run hf.co/{repository}`."
        )
    return text
