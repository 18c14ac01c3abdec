"""Train one variant of the demo model on the CPU.

    python examples/demo/train.py --variant fixed      # then affine, then learned

The three variants see the same tokens in the same order for the same number of steps and start from the same seed;
they differ in how a token id enters the first block and in nothing else. A run that was interrupted continues from its
last saved state when the same command is given again. The finished checkpoint is written next to this file.
"""

import json
import math
import os
import random
import shutil
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))  # the reference model, without the need to build the native engine

from text import documents, questions  # noqa: E402

from reference.configuration_fixmin import FixMinConfig  # noqa: E402
from reference.modeling_fixmin import FixMinForCausalLM  # noqa: E402

PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"
VOCAB_SIZE, CONTEXT = 4096, 256
TOKENIZER_DOCUMENTS, HELD_OUT_CHARACTERS = 100_000, 120_000
SAVE_SECONDS = 120.0

console = Console()


# --- text ----------------------------------------------------------------------------------------------------------


def make_tokenizer(seed: int) -> Tokenizer:
    """Byte-level BPE with exactly VOCAB_SIZE entries, the four special tokens first."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, BOS, EOS, UNK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=1,
        show_progress=False,
    )
    # The sampled documents give the frequencies; the list of questions makes sure that every name occurs.
    texts = [*islice(documents(seed, held_out=False), TOKENIZER_DOCUMENTS)]
    texts += [f"Question: {question}\nAnswer: {answer}" for question, answer in questions(False)]
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise RuntimeError(f"the text supports only {tokenizer.get_vocab_size()} of {VOCAB_SIZE} tokens")
    return tokenizer


def held_out_text(seed: int) -> str:
    """Documents that the training stream does not contain, each followed by the end-of-text token."""
    parts, size = [], 0
    for document in documents(seed, held_out=True):
        parts.append(document + EOS)
        size += len(parts[-1])
        if size >= HELD_OUT_CHARACTERS:
            return "".join(parts)
    raise AssertionError("the stream of documents is endless")


def training_tokens(tokenizer: Tokenizer, n_tokens: int, seed: int) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
    """The stream of at least n_tokens ids, and the index at which each document starts."""
    eos = tokenizer.token_to_id(EOS)
    stream, chunks, starts, size = documents(seed, held_out=False), [], [], 0
    while size < n_tokens:
        for encoding in tokenizer.encode_batch(list(islice(stream, 5000))):
            starts.append(size)
            chunks.append(np.array([*encoding.ids, eos], dtype=np.uint16))
            size += len(chunks[-1])
    return np.concatenate(chunks), np.array(starts)


def prepare(runs: Path, n_tokens: int, seed: int) -> tuple[Tokenizer, NDArray[np.uint16], NDArray[np.int64], str]:
    """Tokenizer, training ids, document starts and held-out text; made once, then read from `runs`."""
    runs.mkdir(parents=True, exist_ok=True)
    data = runs / f"data-{n_tokens}-{seed}.npz"
    if not data.exists():
        console.print("making the text, the tokenizer and the training tokens")
        tokenizer = make_tokenizer(seed)
        tokenizer.save(str(runs / "tokenizer.json"))
        tokens, starts = training_tokens(tokenizer, n_tokens, seed)
        np.savez(runs / "new.npz", tokens=tokens, starts=starts)
        (runs / "new.npz").rename(data)
    tokenizer = Tokenizer.from_file(str(runs / "tokenizer.json"))
    with np.load(data) as arrays:
        return tokenizer, arrays["tokens"], arrays["starts"], held_out_text(seed)


def batch(
    tokens: NDArray[np.uint16], starts: NDArray[np.int64], step: int, rows: int, seed: int
) -> torch.Tensor:  # [rows, CONTEXT]
    """Windows of the stream that begin where a document begins.

    A function of (seed, step) and not of what was drawn before, so that a run can resume.
    """
    rng = np.random.default_rng((seed, step))
    usable = starts[starts + CONTEXT <= len(tokens)]
    begin = rng.choice(usable, size=rows)
    window = tokens[begin[:, None] + np.arange(CONTEXT)]
    return torch.from_numpy(window.astype(np.int64))


# --- model ---------------------------------------------------------------------------------------------------------


def random_affine_map(width: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """A uniformly random invertible matrix A [K, K] over GF(2) and a random shift b [K]."""
    rng = np.random.default_rng(seed)
    while True:
        matrix = rng.integers(0, 2, (width, width), dtype=np.uint8)
        if round(abs(np.linalg.det(matrix.astype(np.float64)))) % 2:  # odd determinant: invertible modulo 2
            return matrix, rng.integers(0, 2, width, dtype=np.uint8)


def make_model(variant: str, tokenizer: Tokenizer, seed: int) -> FixMinForCausalLM:
    torch.manual_seed(seed)
    config = FixMinConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        num_hidden_layers=6,
        num_attention_heads=6,
        max_position_embeddings=CONTEXT,
        code_kind=variant,
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=tokenizer.token_to_id(EOS),
        pad_token_id=tokenizer.token_to_id(PAD),
        architectures=["FixMinForCausalLM"],
    )
    model = FixMinForCausalLM(config)
    if variant == "affine":
        matrix, shift = random_affine_map(config.code_width, seed)
        model.model.code.matrix.copy_(torch.from_numpy(matrix))
        model.model.code.shift.copy_(torch.from_numpy(shift))
    return model


def perplexity(model: FixMinForCausalLM, ids: list[int]) -> float:
    """exp(mean nats per token) over consecutive windows of CONTEXT tokens, in float32."""
    model.eval()
    windows = torch.tensor(ids[: len(ids) // CONTEXT * CONTEXT]).view(-1, CONTEXT)
    with torch.no_grad():
        losses = [model(rows, labels=rows, use_cache=False).loss.item() * len(rows) for rows in windows.split(16)]
    model.train()
    return math.exp(sum(losses) / len(windows))


def answer(model: FixMinForCausalLM, tokenizer: Tokenizer, prompt: str, max_new_tokens: int) -> str:
    """Greedy continuation of the prompt."""
    model.eval()
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False)
    model.train()
    return tokenizer.decode(out[0, ids.shape[1] :].tolist())


# --- checkpoint ----------------------------------------------------------------------------------------------------

CARD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# fixmin-cpp demo, variant "{variant}"

A miniature of the published models, trained on one CPU for {minutes:.0f} minutes by `examples/demo/train.py` of
fixmin-cpp ({tokens:,} tokens, seed {seed}). {parameters:,} parameters, {vocab} tokens, width 192, 6 layers, 6 heads of
size 32, context {context}. It knows a few hundred simple facts and tells template stories; it is there to test software
with, and its answers are not to be relied on.

Held-out perplexity: {perplexity:.3f} (`examples/demo/heldout.txt`).

```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True)
input_ids = torch.tensor([tokenizer.encode("Question: What is the capital of France?\\nAnswer:")])
output_ids = model.generate(input_ids, max_new_tokens=3, do_sample=False)
print(tokenizer.decode(output_ids[0].tolist()))
```
"""


def export(model: FixMinForCausalLM, tokenizer: Tokenizer, folder: Path, card: str) -> None:
    """Write the Hugging Face checkpoint: bfloat16 weights, tokenizer, the model's code, card. Replaces `folder`."""
    new = folder.with_name(folder.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(new)  # also copies configuration_fixmin.py and modeling_fixmin.py
    tokenizer.save(str(new / "tokenizer.json"))
    special = {"pad_token": PAD, "bos_token": BOS, "eos_token": EOS, "unk_token": UNK}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
        **special,
    }
    (new / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n", encoding="utf-8")
    (new / "README.md").write_text(card, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)


def main(
    variant: Annotated[str, typer.Option(help="fixed, affine or learned")] = "fixed",
    steps: Annotated[int, typer.Option(help="optimiser steps")] = 1100,
    rows: Annotated[int, typer.Option(help=f"sequences of {CONTEXT} tokens per step")] = 4,
    lr: Annotated[float, typer.Option(help="peak learning rate")] = 2e-3,
    seed: Annotated[int, typer.Option(help="of text, weights, order and affine map")] = 1,
    threads: Annotated[int, typer.Option(help="CPU threads")] = 1,
    runs: Annotated[Path, typer.Option(help="folder for data, states and logs")] = HERE / "runs",
    out: Annotated[Path | None, typer.Option(help="where the finished checkpoint goes")] = None,
) -> None:
    """Train one variant and write its checkpoint."""
    if variant not in ("fixed", "affine", "learned"):
        raise typer.BadParameter(f"{variant!r} is not fixed, affine or learned", param_hint="--variant")
    torch.set_num_threads(threads)
    random.seed(seed)
    tokenizer, tokens, starts, held_out = prepare(runs, steps * rows * CONTEXT, seed)
    held_out_ids = tokenizer.encode(held_out).ids
    model = make_model(variant, tokenizer, seed)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)
    warmup = max(1, steps // 20)

    def schedule(step: int) -> float:
        """Linear warm-up, then a cosine down to a twentieth of the peak."""
        if step < warmup:
            return (step + 1) / warmup
        return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))

    folder = runs / variant
    folder.mkdir(parents=True, exist_ok=True)
    state_file = folder / "state.pt"
    recipe = {"variant": variant, "steps": steps, "rows": rows, "lr": lr, "seed": seed}
    first, seconds, log = 0, 0.0, []
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        if state["recipe"] != recipe:
            raise typer.BadParameter(f"{state_file} belongs to another run ({state['recipe']}); remove it first")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, seconds, log = state["step"], state["seconds"], state["log"]

    def save(step: int) -> None:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "recipe": recipe}
        torch.save({**state, "step": step, "seconds": seconds, "log": log}, folder / "state.new")
        (folder / "state.new").rename(state_file)
        (folder / "log.json").write_text(
            json.dumps({"recipe": recipe, "seconds": seconds, "log": log}), encoding="utf-8"
        )

    columns = (
        TextColumn(variant),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    smoothed, saved, last = float("nan"), time.monotonic(), time.monotonic()
    model.train()
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=steps, completed=first)
        for step in range(first, steps):
            for group in optimizer.param_groups:
                group["lr"] = lr * schedule(step)
            window = batch(tokens, starts, step, rows, seed)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(window, labels=window).loss
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            smoothed = loss.item() if math.isnan(smoothed) else 0.95 * smoothed + 0.05 * loss.item()
            now = time.monotonic()
            seconds, last = seconds + now - last, now
            done = step + 1
            progress.update(bar, completed=done, description=f"loss {smoothed:.3f}")
            if done % 100 == 0 or done == steps:
                entry = {"step": done, "tokens": done * rows * CONTEXT, "loss": smoothed, "seconds": seconds}
                entry["perplexity"] = perplexity(model, held_out_ids)
                log.append(entry)
                console.print(f"{variant} step {done}: {json.dumps(entry)}", highlight=False, soft_wrap=True)
                last = time.monotonic()  # the evaluation is not training time
            if now - saved > SAVE_SECONDS or done == steps:
                save(done)
                saved = now
    for prompt in (
        "Question: What is the capital of France?\nAnswer:",
        "Question: What is the capital of UK?\nAnswer:",
    ):
        console.print(repr(answer(model, tokenizer, prompt, 3)))
    console.print(repr(answer(model, tokenizer, "Once upon a time,", 60)))
    card = CARD.format(
        variant=variant, minutes=seconds / 60, tokens=steps * rows * CONTEXT, seed=seed, vocab=VOCAB_SIZE,
        parameters=sum(p.numel() for p in model.parameters()), context=CONTEXT, perplexity=log[-1]["perplexity"],
    )  # fmt: skip
    export(model, tokenizer, out or HERE / variant, card)
    (HERE / "heldout.txt").write_text(held_out, encoding="utf-8")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    typer.run(main)
