"""A tokenizer.json for checkpoints that have none, where the files say exactly what it must do.

vocab.json and merges.txt hold the pieces of a BPE, but not how text is cut before it: GPT-2's classes map bytes to
characters and cut with one regular expression, others do not. So only where tokenizer_config.json names GPT-2's class
is a tokenizer built, and it is compared with the one that transformers makes of the same files.
"""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...errors import CheckpointError

_GPT2 = ("GPT2Tokenizer", "GPT2TokenizerFast")
_OTHERS = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.txt", "tekken.json", "vocab.json")
_ADVICE = (
    "the file will have no tokenizer and takes token ids only. Make a tokenizer.json where the checkpoint works: "
    "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER), and convert again"
)
_TEXTS = (
    "Question: What is the capital of France?\nAnswer:", "  two  spaces, \ttabs\r\n\n and lines ", "don't we'll I'M",
    "naïve Straße 東京 Москва 🙂🙂 ﬁ", "x=12345678;y[3]+=-1.5e-7//*", "<s>a</s> b", "\x00\x7f\u200b\u00a0.",
)  # fmt: skip


def build_tokenizer(
    folder: Path, config: Mapping[str, Any], warn: Callable[[str], None], on_close: list[Callable[[], None]]
) -> Path | None:
    """A tokenizer.json in a temporary folder, which goes with `on_close`; None, with a warning, if none can be made.

    Raises CheckpointError if what is built cuts text differently than transformers does.
    """
    present = [name for name in _OTHERS if (folder / name).is_file()]
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    name = config.get("tokenizer_class")
    if not (vocab.is_file() and merges.is_file()):
        found = f"there is no tokenizer.json, only {', '.join(present)}" if present else "there is no tokenizer.json"
        warn(f"{found}: {_ADVICE}")
        return None
    if name not in _GPT2:
        says = f"names {name}" if isinstance(name, str) else "names no class"
        warn(
            f"there is no tokenizer.json, and vocab.json and merges.txt do not say how text is cut "
            f"(tokenizer_config.json {says}; of {_GPT2[0]} it is known): {_ADVICE}"
        )
        return None
    try:
        tokenizer = _gpt2(vocab, merges, config)
        theirs = _by_transformers(folder)
        wrong = [t for t in _TEXTS if tokenizer.encode(t).ids != theirs.encode(t, add_special_tokens=False).ids]
        their_ids = theirs.get_vocab()
        wrong += [t for t, i in tokenizer.get_vocab().items() if their_ids.get(t) != i]
    except Exception as error:  # tokenizers raises plain Exception
        raise CheckpointError(f"{vocab}, {merges}: no tokenizer can be made of them: {error}") from error
    if wrong:
        raise CheckpointError(
            f"{folder}: the tokenizer made of vocab.json and merges.txt cuts {wrong[0]!r} differently than "
            "transformers: make a tokenizer.json with AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    place = tempfile.TemporaryDirectory(prefix="fixmin-tokenizer-")
    on_close.append(place.cleanup)
    path = Path(place.name, "tokenizer.json")
    tokenizer.save(str(path))
    warn(
        f"there is no tokenizer.json: one was built of vocab.json and merges.txt as {name} does; it cuts {len(_TEXTS)} "
        "texts as transformers does"
    )
    return path


def _gpt2(vocab: Path, merges: Path, config: Mapping[str, Any]) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(config.get("add_prefix_space", False)))
    tokenizer.decoder = decoders.ByteLevel()
    added = config.get("added_tokens_decoder")
    entries = [added[i] for i in sorted(added, key=int)] if isinstance(added, dict) else []
    special = [config.get(f"{kind}_token") for kind in ("bos", "eos", "unk", "pad")]
    texts = [t.get("content") if isinstance(t, dict) else t for t in special]
    known = {e["content"] for e in entries}
    for e in entries:
        flags = {k: bool(e.get(k, False)) for k in ("single_word", "lstrip", "rstrip", "normalized", "special")}
        tokenizer.add_tokens([AddedToken(e["content"], **flags)])
    tokenizer.add_special_tokens([t for t in dict.fromkeys(texts) if isinstance(t, str) and t not in known])
    return tokenizer


def _by_transformers(folder: Path) -> Any:
    from transformers import GPT2TokenizerFast  # type: ignore[attr-defined]  # a name made at run time

    return GPT2TokenizerFast.from_pretrained(folder, local_files_only=True).backend_tokenizer
