"""Train one variant of the demo model on the CPU.

    python examples/demo/train.py --variant fixed      # then affine, then learned

The three variants see the same tokens in the same order for the same number of steps and start from the same seed;
they differ in how a token id enters the first block and in nothing else. A run that was interrupted continues from its
last saved state when the same command is given again. The finished checkpoint is written next to this file.
"""

import copy
import json
import math
import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass
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
from transformers import GenerationConfig

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))  # the reference model, without the need to build the native engine

from text import documents, questions  # noqa: E402

from reference.configuration_fixmin import FixMinConfig  # noqa: E402
from reference.modeling_fixmin import FixMinForCausalLM  # noqa: E402

PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"
VOCAB_SIZE, CONTEXT = 4096, 256
TOKENIZER_DOCUMENTS, HELD_OUT_CHARACTERS = 100_000, 120_000
EVALUATE_STEPS = 100
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
        tokenizer.save(str(runs / f"tokenizer-{seed}.json"))
        tokens, starts = training_tokens(tokenizer, n_tokens, seed)
        np.savez(runs / "new.npz", tokens=tokens, starts=starts)
        (runs / "new.npz").rename(data)
    tokenizer = Tokenizer.from_file(str(runs / f"tokenizer-{seed}.json"))
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


@dataclass(frozen=True)
class Recipe:
    """What the weights of a run follow from."""

    variant: str  # "fixed" | "affine" | "learned"
    steps: int
    rows: int  # sequences of CONTEXT tokens per step
    lr: float  # peak learning rate
    seed: int
    autocast: bool  # products in bfloat16

    def learning_rate(self, step: int) -> float:
        """Linear warm-up over a twentieth of the steps, then a cosine down to a twentieth of the peak."""
        warmup = max(1, self.steps // 20)
        if step < warmup:
            return self.lr * ((step + 1) / warmup)
        return self.lr * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (self.steps - warmup))))


class Run:
    """A training run: the model, the optimiser and how far they are, kept in `folder` so that it can go on later."""

    def __init__(self, recipe: Recipe, folder: Path, tokenizer: Tokenizer) -> None:
        self.recipe, self.folder = recipe, folder
        self.model = make_model(recipe.variant, tokenizer, recipe.seed)
        matrices = [p for p in self.model.parameters() if p.dim() == 2]
        vectors = [p for p in self.model.parameters() if p.dim() != 2]
        groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95), fused=True)
        self.step, self.seconds, self.log, self.loss = 0, 0.0, [], math.nan
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "state.pt").exists():
            self._load()

    def _load(self) -> None:
        state = torch.load(self.folder / "state.pt", weights_only=True)
        if state["recipe"] != asdict(self.recipe):
            raise typer.BadParameter(f"{self.folder} holds another run ({state['recipe']}); remove it first")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.log = state["step"], state["seconds"], state["log"]

    def save(self) -> None:
        """Replace the saved state in one move: a run that is killed here still has the one before."""
        progress = {"recipe": asdict(self.recipe), "step": self.step, "seconds": self.seconds, "log": self.log}
        weights = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save({**progress, **weights}, self.folder / "state.new")
        (self.folder / "state.new").rename(self.folder / "state.pt")
        (self.folder / "log.json").write_text(json.dumps(progress), encoding="utf-8")

    def learn(self, window: torch.Tensor) -> None:
        """One optimiser step on ids [rows, CONTEXT]; no token is left out of the loss."""
        begin = time.monotonic()
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate(self.step)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.recipe.autocast):
            loss = self.model(window, labels=window).loss
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.loss = loss.item() if math.isnan(self.loss) else 0.95 * self.loss + 0.05 * loss.item()
        self.step += 1
        self.seconds += time.monotonic() - begin

    def evaluate(self, held_out_ids: list[int]) -> None:
        """Add the held-out perplexity to the log and show it."""
        tokens = self.step * self.recipe.rows * CONTEXT
        value = perplexity(self.model, held_out_ids)
        entry = {"step": self.step, "tokens": tokens, "loss": self.loss, "seconds": self.seconds, "perplexity": value}
        self.log.append(entry)
        console.print(f"{self.recipe.variant} {json.dumps(entry)}", highlight=False, soft_wrap=True)


def train(run: Run, tokens: NDArray[np.uint16], starts: NDArray[np.int64], held_out_ids: list[int]) -> None:
    """Take the run from where it is to its last step."""
    recipe = run.recipe
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    saved = time.monotonic()
    run.model.train()
    with Progress(TextColumn(recipe.variant), *columns, console=console) as progress:
        bar = progress.add_task("", total=recipe.steps, completed=run.step)
        while run.step < recipe.steps:
            run.learn(batch(tokens, starts, run.step, recipe.rows, recipe.seed))
            progress.update(bar, completed=run.step, description=f"loss {run.loss:.3f}")
            last = run.step == recipe.steps
            if run.step % EVALUATE_STEPS == 0 or last:
                run.evaluate(held_out_ids)
            if time.monotonic() - saved > SAVE_SECONDS or last:
                run.save()
                saved = time.monotonic()


def answer(model: FixMinForCausalLM, tokenizer: Tokenizer, prompt: str, max_new_tokens: int) -> str:
    """Greedy continuation of the prompt."""
    model.eval()
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :].tolist())


# --- checkpoint ----------------------------------------------------------------------------------------------------

CARD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# fixmin-cpp demo, variant "{variant}"

A miniature of the published models, trained on one CPU thread in {minutes:.0f} minutes by `examples/demo/train.py` of
fixmin-cpp ({tokens:,} tokens, seed {seed}, products in {products}). {parameters:,} parameters, {vocab} tokens, width
192, 6 layers, 6 heads of size 32, context {context}. It knows a few hundred simple facts and tells template stories; it
is there to test software with, and its answers are not to be relied on.

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


def write_card(run: Run, held_out_ids: list[int]) -> str:
    """The README of the checkpoint, with the perplexity of the weights as they are shipped."""
    recipe, shipped = run.recipe, copy.deepcopy(run.model).to(torch.bfloat16).float()
    return CARD.format(
        variant=recipe.variant,
        seed=recipe.seed,
        minutes=run.seconds / 60,
        products="bfloat16" if recipe.autocast else "float32",
        tokens=recipe.steps * recipe.rows * CONTEXT,
        parameters=sum(p.numel() for p in run.model.parameters()),
        vocab=VOCAB_SIZE,
        context=CONTEXT,
        perplexity=perplexity(shipped, held_out_ids),
    )


def export(model: FixMinForCausalLM, tokenizer: Tokenizer, folder: Path, card: str) -> None:
    """Write the Hugging Face checkpoint: bfloat16 weights, tokenizer, the model's code, card. Replaces `folder`."""
    new = folder.with_name(folder.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    config = model.config
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    # Also copies configuration_fixmin.py and modeling_fixmin.py.
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(new)
    (new / "model.safetensors").chmod(0o644)  # the library leaves it unreadable for others
    tokenizer.save(str(new / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
        "pad_token": PAD,
        "bos_token": BOS,
        "eos_token": EOS,
        "unk_token": UNK,
    }
    (new / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n", encoding="utf-8")
    (new / "README.md").write_text(card, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)


def main(
    variant: Annotated[str, typer.Option(help="fixed, affine or learned")] = "fixed",
    steps: Annotated[int, typer.Option(help="optimiser steps", min=2)] = 1100,
    rows: Annotated[int, typer.Option(help=f"sequences of {CONTEXT} tokens per step", min=1)] = 4,
    lr: Annotated[float, typer.Option(help="peak learning rate")] = 2e-3,
    seed: Annotated[int, typer.Option(help="of text, weights, order and affine map", min=0)] = 1,
    autocast: Annotated[
        bool, typer.Option(help="products in bfloat16; a CPU that has none of them is several times as fast without")
    ] = True,
    threads: Annotated[int, typer.Option(help="CPU threads", min=1)] = 1,
    runs: Annotated[Path, typer.Option(help="folder for data, states and logs")] = HERE / "runs",
    out: Annotated[Path, typer.Option(help="the checkpoint goes to OUT/VARIANT, the held-out text to OUT")] = HERE,
) -> None:
    """Train one variant and write its checkpoint."""
    if variant not in ("fixed", "affine", "learned"):
        raise typer.BadParameter(f"{variant!r} is not fixed, affine or learned", param_hint="--variant")
    torch.set_num_threads(threads)
    tokenizer, tokens, starts, held_out = prepare(runs, steps * rows * CONTEXT, seed)
    held_out_ids = tokenizer.encode(held_out).ids
    run = Run(Recipe(variant, steps, rows, lr, seed, autocast), runs / variant, tokenizer)
    train(run, tokens, starts, held_out_ids)
    for country in ("France", "UK"):
        console.print(repr(answer(run.model, tokenizer, f"Question: What is the capital of {country}?\nAnswer:", 3)))
    console.print(repr(answer(run.model, tokenizer, "Once upon a time,", 60)))
    out.mkdir(parents=True, exist_ok=True)
    export(run.model, tokenizer, out / variant, write_card(run, held_out_ids))
    (out / "heldout.txt").write_text(held_out, encoding="utf-8")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    typer.run(main)
