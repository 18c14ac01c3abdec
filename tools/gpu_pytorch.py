"""PyTorch at its best on the machine's GPU: what tools/gpu.py sets beside fixmin.

    python tools/gpu_pytorch.py --sizes JSON --out FILE --go FILE [--device cuda] [--prepare-s 200]

The reference model at the size of a configuration, with random weights: eager, with its growing cache, and compiled by
torch.compile(mode="reduce-overhead"), where decoding has a cache of fixed length and a step is one CUDA graph.
Compiling takes minutes of a CPU, so this starts before anything else and prepares until --go exists or its time is
over; then it measures what it has prepared. FILE gets one JSON object a line: {"variant", "what", "tok_s"} or
{"variant", "what", "failed"}, and {"ready"} when preparing has ended.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from reference.configuration_fixmin import FixMinConfig
from reference.modeling_fixmin import CACHE_FIELD, FixMinForCausalLM, rotate


class StaticStep(torch.nn.Module):
    """One greedy step of every sequence with keys and values [B, G, length, d] in fixed places: one graph."""

    def __init__(self, model: FixMinForCausalLM, batch: int, length: int) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        config, like = model.config, model.lm_head.weight
        shape = (batch, config.num_key_value_heads, length, config.head_dim)
        for layer in range(config.num_hidden_layers):
            for name in ("keys", "values"):
                # Written in place: the recorded graph may be run again only where such memory is known to stay.
                cache = torch.zeros(shape, dtype=like.dtype, device=like.device)
                torch._dynamo.mark_static_address(cache)
                self.register_buffer(f"{name}{layer}", cache)
        two_i = torch.arange(0, config.rope_dim, 2, dtype=torch.float64, device=like.device)
        positions = torch.arange(length, dtype=torch.float64, device=like.device)
        angles = positions[:, None] * config.rope_theta ** (-two_i / config.rope_dim)
        self.register_buffer("cos", angles.cos().float())  # [length, rope_dim / 2]
        self.register_buffer("sin", angles.sin().float())
        self.register_buffer("places", torch.arange(length, device=like.device))

    def forward(self, ids: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Ids [B, 1] at position [1] -> the most probable next ids [B, 1]."""
        config = self.config
        cos, sin = self.cos[position][None, None], self.sin[position][None, None]
        seen = (self.places <= position)[None, None, None]
        x = self.model.get_input_embeddings()(ids).to(self.model.dtype)
        for layer, block in enumerate(self.model.model.layers):
            h = block.attn_norm(x)
            heads = (*h.shape[:2], -1, config.head_dim)
            q, k, v = (f(h).view(heads).transpose(1, 2) for f in (block.attn_q, block.attn_k, block.attn_v))
            keys, values = getattr(self, f"keys{layer}"), getattr(self, f"values{layer}")
            keys.index_copy_(2, position, rotate(k, cos, sin, config))
            values.index_copy_(2, position, v)
            grouped = config.num_key_value_heads != config.num_attention_heads
            q = rotate(q, cos, sin, config)
            y = F.scaled_dot_product_attention(q, keys, values, seen, scale=config.scale, enable_gqa=grouped)
            x = x + block.attn_output(y.transpose(1, 2).flatten(2))
            x = x + block.feed_forward(block.ffn_norm(x))
        return self.model.lm_head(self.model.model.output_norm(x)).argmax(-1)


def make_model(fields: dict[str, Any], dtype: torch.dtype, device: str) -> FixMinForCausalLM:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return FixMinForCausalLM(FixMinConfig(**fields)).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def compiled(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    """As one CUDA graph; without a GPU only traced as one, which shows that it can be."""
    if device == "cpu":
        return torch.compile(function, backend="eager", fullgraph=True, dynamic=False)
    return torch.compile(function, mode="reduce-overhead", fullgraph=True, dynamic=False)


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def decode_graph(model: FixMinForCausalLM, batch: int, depth: int, new: int, device: str) -> Callable[[], None]:
    step = compiled(StaticStep(model, batch, depth + new), device)
    first = torch.randint(model.config.vocab_size, (batch, 1), device=device)
    position = torch.zeros(1, dtype=torch.long, device=device)

    def run() -> None:
        ids = first
        position.fill_(depth)
        for _ in range(new):
            ids = step(ids, position).clone()  # the next run of the graph writes where this one has written
            position.add_(1)

    return run


def decode_eager(model: FixMinForCausalLM, batch: int, depth: int, new: int, device: str) -> Callable[[], None]:
    prompt = torch.randint(model.config.vocab_size, (batch, depth), device=device)
    first = torch.randint(model.config.vocab_size, (batch, 1), device=device)
    cache = getattr(model(prompt, use_cache=True, logits_to_keep=1), CACHE_FIELD)

    @torch.inference_mode()  # less to do in each call; compiled, it makes no difference
    def run() -> None:
        ids, kept = first, copy.deepcopy(cache)  # releases differ in how one is made shorter; this is 1 ms
        for _ in range(new):
            out = model(ids, past_key_values=kept, use_cache=True)
            ids, kept = out.logits[:, -1:].argmax(-1), getattr(out, CACHE_FIELD)

    return run


def prefill(model: FixMinForCausalLM, length: int, device: str, graph: bool) -> Callable[[], None]:
    ids = torch.randint(model.config.vocab_size, (1, length), device=device)

    def forward(ids: torch.Tensor) -> torch.Tensor:
        return model(ids, use_cache=False, logits_to_keep=1).logits

    read = compiled(forward, device) if graph else torch.inference_mode()(forward)
    return lambda: read(ids)


class Bench:
    def __init__(self, out: Path, device: str) -> None:
        self.out, self.device = out, device
        self.ready: list[tuple[dict[str, Any], int, Callable[[], None]]] = []

    def write(self, record: dict[str, Any]) -> None:
        with self.out.open("a", encoding="utf-8") as file:
            print(json.dumps(record), file=file)

    def prepare(self, variant: str, what: str, n_tokens: int, make: Callable[[], Callable[[], None]]) -> None:
        name, start = {"variant": variant, "what": what}, time.perf_counter()
        try:
            run = make()
            for _ in range(3):  # compiled, recorded, run from the record
                run()
            synchronize(self.device)
        except Exception as error:  # the others may work
            self.write({**name, "failed": f"{type(error).__name__}: {str(error)[:500]}"})
        else:
            self.ready.append(({**name, "prepared_s": round(time.perf_counter() - start, 1)}, n_tokens, run))

    def measure(self, repeat: int) -> None:
        for name, n_tokens, run in self.ready:
            times = []
            for _ in range(repeat + 1):
                synchronize(self.device)
                start = time.perf_counter()
                run()
                synchronize(self.device)
                times.append(time.perf_counter() - start)
            self.write({**name, "tok_s": n_tokens / statistics.median(times[1:])})


def plans(sizes: dict[str, Any], device: str) -> list[tuple[str, str, int, Callable[[], Callable[[], None]]]]:
    """What is measured, the most important first."""
    models: dict[str, FixMinForCausalLM] = {}

    def model(dtype: str) -> FixMinForCausalLM:
        if dtype not in models:
            models[dtype] = make_model(sizes["model"], getattr(torch, dtype), device)
        return models[dtype]

    depth, new, batch = sizes["depth"], sizes["new"], sizes["sequences"]
    found: list[Any] = []
    decoders = {"CUDA graph": decode_graph, "eager": decode_eager}
    for dtype in ("bfloat16", "float16"):
        for mode, decode in decoders.items():
            make = lambda d=dtype, f=decode: f(model(d), 1, depth, new, device)  # noqa: E731
            found.append((f"{dtype}, {mode}", "decode", new, make))
        for n in sizes["prefill"]:
            make = lambda d=dtype, n=n: prefill(model(d), n, device, False)  # noqa: E731
            found.append((f"{dtype}, eager", f"prefill {n}", n, make))
    for dtype in ("bfloat16", "float16"):
        for mode, decode in decoders.items():
            make = lambda d=dtype, f=decode: f(model(d), batch, sizes["context"] - new, new, device)  # noqa: E731
            found.append((f"{dtype}, {mode}", "batch", batch * new, make))
        for n in sorted(sizes["prefill"], key=lambda n: abs(n - 512)):
            make = lambda d=dtype, n=n: prefill(model(d), n, device, True)  # noqa: E731
            found.append((f"{dtype}, CUDA graph", f"prefill {n}", n, make))
    return found


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=json.loads, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--go", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--prepare-s", type=float, default=200.0)
    arguments = parser.parse_args()
    bench, begin = Bench(arguments.out, arguments.device), time.monotonic()
    for variant, what, n_tokens, make in plans(arguments.sizes, arguments.device):
        if time.monotonic() - begin > arguments.prepare_s or arguments.go.exists():
            bench.write({"variant": variant, "what": what, "failed": "no time was left to prepare it"})
        else:
            bench.prepare(variant, what, n_tokens, make)
    device = torch.cuda.get_device_name() if arguments.device != "cpu" else "the CPU, traced but not compiled"
    bench.write({"ready": time.monotonic() - begin, "torch": torch.__version__, "device": device})
    while not arguments.go.exists():
        time.sleep(0.05)
    bench.measure(arguments.sizes["repeat"])


if __name__ == "__main__":
    main()
