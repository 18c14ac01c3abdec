"""Files of `fixmin export` in llama.cpp itself, beside the model they were made from (docs/llama_cpp.md).

    python bench/export_llama_cpp.py demo=affine-f32.gguf full=full-f32.gguf --markdown out/export.md
    python bench/export_llama_cpp.py --tokenizer tokenizer.json

For each source (F32, by fixmin convert) and type: logits of llama.cpp against the source's in fixmin, over texts and
random ids; the same where the bias of the output projection is left out instead of folded; fixmin's own file of that
type; greedy tokens after 20 prompts. For tokenizers: texts of each script whose ids differ from those of the
tokenizer itself. llama.cpp is the package llama_cpp of FIXMIN_LLAMA_PYTHON, or of `make bench-peers`.
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fixmin_cpp
from fixmin_cpp import _core
from fixmin_cpp.convert.gguf_file.readback import read_gguf
from fixmin_cpp.evaluate import log_softmax
from fixmin_cpp.export.certificate import compare_sample, tokens_as_text
from fixmin_cpp.export.corpus import corpus
from fixmin_cpp.export.llama_cpp import export
from fixmin_cpp.quantization.requantize import quantize
from fixmin_cpp.tokenizer import TextTokenizer

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
import gguf_factory  # noqa: E402
import llama_peer  # noqa: E402

TYPES = ("f32", "f16", "q8_0", "q4_0")
PLACES = "France UK Germany Italy Spain Japan Norway Egypt Peru Canada".split()  # noqa: SIM905
PROMPTS = (
    *(f"Question: What is the capital of {place}?\nAnswer:" for place in PLACES),
    *("Once upon a time,", "The cat sat on", "In the morning", "She said that", "There was a small village"),
    *("The old man", "A bird", "Every day", "The sea is", "My friend and I"),
)
RANDOM = 20  # prompts of random ids where there is no tokenizer
LOGIT_PROMPTS = 8


def prompts_of(path: Path) -> list[NDArray[np.uint32]]:
    stored = read_gguf(path)
    tokenizer = TextTokenizer.from_metadata(stored.metadata)
    if tokenizer is not None:
        return [np.array(tokenizer.encode(text), np.uint32) for text in PROMPTS]
    rng = np.random.default_rng(5)
    return [rng.integers(0, stored.spec.vocab_size, 12, dtype=np.uint32) for _ in range(RANDOM)]


def without_bias(source: Path, target: Path) -> Path:
    """A copy with a bias of zeros at the output."""
    shutil.copyfile(source, target)
    tensor = next(t for t in _core.GgufFile(str(source)).tensors if t.name == "output.bias")
    with open(target, "r+b") as file:
        file.seek(tensor.offset)
        file.write(bytes(tensor.n_bytes))
    return target


def beside(truth: Sequence[NDArray[Any]], found: Sequence[NDArray[Any]]) -> tuple[float, float, float]:
    """Relative difference over all positions, mean KL divergence in nats, fraction with the same best token."""
    a, b = np.concatenate(truth).astype(np.float64), np.concatenate(found).astype(np.float64)
    p, q = log_softmax(a), log_softmax(b)
    kl = float((np.exp(p) * (p - q)).sum(1).mean())
    return float(np.linalg.norm(a - b) / np.linalg.norm(a)), kl, float((a.argmax(1) == b.argmax(1)).mean())


def in_fixmin(path: Path, prompts: Sequence[NDArray[np.uint32]]) -> list[NDArray[np.float32]]:
    with fixmin_cpp.Model(path) as model:
        return [model.logits(ids) for ids in prompts]


def rows(name: str, source: Path, n_new: int) -> Iterator[dict[str, Any]]:
    prompts = prompts_of(source)
    measured = prompts[:LOGIT_PROMPTS]
    with fixmin_cpp.Model(source) as model:
        truth = [model.logits(ids) for ids in measured]
        greedy = [model.generate(ids, max_new_tokens=n_new, do_sample=False).token_ids for ids in prompts]
        n_ctx = model.info["context_length"]
    with tempfile.TemporaryDirectory(dir=source.parent) as text:
        out = Path(text, "out.gguf")
        bare = without_bias(source, Path(text, "bare.gguf"))
        for kind in TYPES:
            report = export(source, out, outtype=kind)
            error, kl, top1 = beside(truth, llama_peer.logits(out, measured))
            same = llama_peer.greedy(out, prompts, n_new, n_ctx)
            equal = sum(
                list(ours)[: len(theirs)] == theirs[: len(ours)] for ours, theirs in zip(greedy, same, strict=True)
            )
            row = {
                "model": name,
                "type": kind,
                "MB": report.n_bytes / 1e6,
                "folded": error,
                "KL": kl,
                "top-1": top1,
                "certificate": report.certificate.logit_error,
                "greedy": f"{equal} of {len(prompts)}",
            }
            export(bare, out, outtype=kind)
            row["no bias"] = beside(truth, llama_peer.logits(out, measured))[0]
            own = quantize(source, out, kind).path
            row["fixmin"], row["fixmin KL"], _ = beside(truth, in_fixmin(own, measured))
            print(
                {key: f"{value:.3g}" if isinstance(value, float) else value for key, value in row.items()}, flush=True
            )
            yield row


def token_rows(path: Path) -> Iterator[tuple[str, int, int, int]]:
    """Script, texts, those with other ids in llama.cpp, and of these those with characters that have no token."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    own = TextTokenizer(tokenizer)
    size = tokenizer.get_vocab_size()
    with tempfile.TemporaryDirectory() as text:
        small = {"vocab_size": size, "embedding_length": 32, "head_count": 2, "tokenizer_json": tokenizer.to_str()}
        source = gguf_factory.make_model(Path(text, "in.gguf"), **small)
        out = export(source, Path(text, "out.gguf"), allow_token_differences=True).path
        names = set(own.control_tokens.values())
        vocab = {i: own.token_bytes(i) for i in range(size) if i not in names}
        samples = corpus(tokens_as_text(vocab), list(own.control_tokens))
        texts = [text for sample in samples for text in sample.texts]
        found = dict(zip(texts, llama_peer.token_ids(out, texts), strict=True))
    model = own.backend.token_to_id("<unk>")
    for sample in samples:
        result = compare_sample(sample, own, found.__getitem__, model)
        yield result.name, result.n_texts, result.n_different, result.n_unknown_different


def table(found: Sequence[dict[str, Any]]) -> str:
    """In Markdown."""
    formats = {"MB": ",.1f", "folded": ".2g", "no bias": ".2g", "fixmin": ".2g", "KL": ".2g", "top-1": ".4g"}
    names = ["model", "type", *formats, "greedy"]
    lines = [names, ["---"] * len(names)]
    lines += [[format(row[name], formats.get(name, "")) for name in names] for row in found]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", metavar="NAME=F32.gguf")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--tokenizer", type=Path, action="append", default=[])
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    text = ""
    found = [
        row
        for source in arguments.sources
        for row in rows(source.partition("=")[0], Path(source.partition("=")[2]), arguments.new_tokens)
    ]
    if found:
        text += table(found)
    for path in arguments.tokenizer:
        text += f"\n{path.parent.name}:\n\n| texts | of | other ids | with unknown characters |\n|---|---|---|---|\n"
        text += "".join(f"| {name} | {n} | {other} | {strange} |\n" for name, n, other, strange in token_rows(path))
    print(text)
    if arguments.markdown:
        arguments.markdown.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
