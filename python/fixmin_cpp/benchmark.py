"""What `fixmin bench` measures: speed of prefill and decode, and how much of the machine that is."""

import contextlib
import math
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from . import _core
from .arguments import MAX_INT32, as_int
from .errors import ArgumentError
from .load_options import LoadArguments
from .model import Model

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in typing from Python 3.11

__all__ = ["BenchReport", "bench"]

_MIB = 1 << 20


@dataclass(frozen=True)
class BenchReport:
    """Speeds are medians of `*_runs`; GB are 10^9 bytes; a multiply-add of 8-bit integers is two operations."""

    file: str
    device: str  # "cpu", "cuda", "cuda:1"
    device_name: str
    isa: str
    threads: int
    kv_type: str
    n_prompt: int  # tokens of a prefill
    n_generate: int  # tokens of a decode
    depth: int  # tokens in the context when a decode begins
    repeat: int
    load_s: float  # opening the file until the model is ready
    rss_bytes: int  # resident memory of the process after the runs
    model_bytes: int  # weights, KV cache and buffers, on the device
    prefill_tok_s: float
    prefill_tok_s_runs: list[float]
    decode_tok_s: float
    decode_tok_s_runs: list[float]
    decode_bytes_per_token: int  # weights and, at the mean depth of the runs, cached keys and values
    decode_gb_s: float  # decode_tok_s * decode_bytes_per_token
    read_ceiling_gb_s: float  # median of the runs
    read_ceiling_gb_s_runs: list[float]  # before the first turn and after each: the mean over a few passes
    read_ceiling_best_gb_s: float  # the fastest pass of all
    read_buffer_bytes: int  # what those reads go over
    last_level_cache_bytes: int  # 0: unknown
    # decoded bytes per second / mean read ceiling before and after the turn: median of the turns
    decode_roofline: float
    cached_read_gb_s: float  # the same loop over only as many bytes as a decoded token reads
    cached_read_gb_s_runs: list[float]
    decode_cached_roofline: float
    int8_peak_tops: float  # 10^12 operations per second, of vector instructions
    int8_peak_tops_runs: list[float]
    prefill_operations_per_token: float  # products and attention
    # operations per second / mean int8 peak before and after the turn: median of the turns
    prefill_peak_fraction: float
    int8_tile_peak_tops: float | None  # likewise of AMX tiles, where the kernels multiply on them
    int8_tile_peak_tops_runs: list[float]
    prefill_tile_peak_fraction: float | None
    # microseconds from one part of a step to the next without any work: of the threads, or of kernels in a CUDA graph
    launch_us: float
    launch_us_runs: list[float]

    def summary(self) -> list[str]:
        """The figures that most readers want, a line each; units and ceilings are in it."""
        cached = self.decode_roofline > 1.0
        read = self.cached_read_gb_s if cached else self.read_ceiling_gb_s
        roofline = self.decode_cached_roofline if cached else self.decode_roofline
        depth = f" after {self.depth:,}" if self.depth else ""
        on_gpu = self.device != "cpu"
        where = f"{self.device_name}, {self.isa}" if on_gpu else self.isa
        tiles = ""
        if self.int8_tile_peak_tops is not None and self.prefill_tile_peak_fraction is not None:
            tiles = f", {100 * self.prefill_tile_peak_fraction:.0f} % of {self.int8_tile_peak_tops:.2f} TOPS of tiles"
        held = f", {self.model_bytes / 1e6:,.0f} MB on the GPU" if on_gpu else ""
        return [
            f"{self.file}: {where}, {self.threads} thread{'s' * (self.threads > 1)}, KV cache {self.kv_type}, "
            f"median of {self.repeat} run{'s' * (self.repeat > 1)}",
            f"prefill {self.prefill_tok_s:10,.1f} tok/s {_spread(self.prefill_tok_s_runs)}, {self.n_prompt:,} tokens: "
            f"{100 * self.prefill_peak_fraction:.0f} % of {self.int8_peak_tops:.2f} TOPS (8-bit integers){tiles}",
            f"decode  {self.decode_tok_s:10,.1f} tok/s {_spread(self.decode_tok_s_runs)}, "
            f"{self.n_generate:,} tokens{depth}: {100 * roofline:.0f} % of {read:.1f} GB/s "
            f"({'cache' if cached else 'memory'}), "
            f"{self.decode_bytes_per_token / 1e6:,.1f} MB each",
            f"loaded in {self.load_s:.2f} s, {self.rss_bytes / 1e6:,.0f} MB resident{held} "
            "(--all and --json: every figure)",
        ]


def _spread(runs: Sequence[float]) -> str:
    """The slowest and the fastest run."""
    return f"({min(runs):,.1f} to {max(runs):,.1f})"


def bench(
    path: str | os.PathLike[str],
    *,
    n_prompt: int | None = None,
    n_generate: int | None = None,
    depth: int = 0,
    repeat: int = 5,
    read_buffer_bytes: int | None = None,
    progress: Callable[[str], None] | None = None,
    **options: "Unpack[LoadArguments]",
) -> BenchReport:
    """Measures a model: prefill, decode and the ceilings take turns `repeat` times.

    A share of a ceiling is taken within a turn, so that a slow phase of the machine hits both.

    Token ids are random (always the same ones); tokenisation is not part of any figure, greedy sampling is part of
    decode.

    Args:
        path: a GGUF file.
        n_prompt: tokens of a prefill, from an empty context to the last token's logits; None: 512 or what fits.
        n_generate: tokens decoded one by one; None: 64 or what fits.
        depth: tokens in the context before the first decoded one (at least one is always there).
        repeat: how often both are measured, after a run that warms up and does not count.
        read_buffer_bytes: memory that the read ceiling goes over; None: four times the last-level cache, between
            256 MiB and 1 GiB, but no more than a quarter of the memory that is free, nor than four times the file (at
            least 16 MiB): how fast weights in a cache can be read is not told by a gigabyte that does not fit there.
        progress: called with what is being done.
        **options: those of Model; the threads are those of the ceilings too.

    Returns:
        A BenchReport.

    Raises:
        ArgumentError: a number is out of range or does not fit the model's context. What Model raises.
    """
    repeat = as_int("repeat", repeat, 1, 10_000)
    depth = as_int("depth", depth, 0, MAX_INT32)
    cache = last_level_cache_bytes()
    if read_buffer_bytes is not None:
        read_buffer_bytes = as_int("read_buffer_bytes", read_buffer_bytes, _MIB, 1 << 40)
    tell = progress or (lambda text: None)

    tell("loading")
    start = time.perf_counter()
    with Model(path, **options) as model, model.native() as engine:
        load_s = time.perf_counter() - start
        info = model.info
        buffer = read_buffer_bytes or default_read_buffer(info["bytes"]["file"])
        context = info["n_ctx"]
        first = max(depth, 1)
        n_prompt = min(512, context) if n_prompt is None else as_int("n_prompt", n_prompt, 1, context)
        room = context - first - 1  # the last token generated is never fed back
        if room < 1:
            raise ArgumentError(f"depth {depth} leaves no room to decode in the context of {context} tokens")
        n_generate = min(64, room) if n_generate is None else as_int("n_generate", n_generate, 1, MAX_INT32)
        if n_generate > room:
            raise ArgumentError(
                f"depth {depth} and {n_generate} tokens to generate do not fit the context of {context}: "
                f"at most {room} can be generated"
            )
        bytes_per_token = decode_bytes(info, first, n_generate)
        ids = np.random.default_rng(0).integers(0, info["vocab_size"], max(n_prompt, first)).astype(np.uint32)

        fastest = 0.0

        def ceilings() -> tuple[float, float, float, float, float]:
            nonlocal fastest
            cached = max(bytes_per_token, 4096 * info["n_threads"])
            reads = engine.read_ceiling(buffer, 5)
            fastest = max(fastest, *reads)
            # Means, as the speeds are: a hiccup of the machine is in both.
            cached_reads, peaks, tiles = engine.read_ceiling(cached, 5), engine.int8_ceiling(), engine.tile_ceiling()
            rates = [mean_rate(passes) if passes else 0.0 for passes in (reads, cached_reads, peaks, tiles)]
            return rates[0], rates[1], rates[2], rates[3], float(np.mean(engine.launch_ceiling()))

        tell("ceilings")
        bounds: list[tuple[float, float, float, float, float]] = []
        prefills: list[float] = []
        decodes: list[float] = []
        for turn in range(repeat + 1):
            tell(f"run {turn} of {repeat}" if turn else "warm-up")
            prefill, decode = timed_turn(engine, ids[:n_prompt], ids[:first], n_generate)
            if turn:
                prefills.append(prefill)
                decodes.append(decode)
            rss = resident_bytes()
            bounds.append(ceilings())

    reads, cached_reads, peaks, tiles, launches = zip(*bounds, strict=True)
    has_tiles = min(tiles) > 0
    operations = prefill_operations(info, n_prompt) / n_prompt
    prefill_tok_s, decode_tok_s = float(np.median(prefills)), float(np.median(decodes))
    return BenchReport(
        file=Path(path).name,
        device=info["device"],
        device_name=info["device_name"],
        isa=info["isa"],
        threads=info["n_threads"],
        kv_type=info["kv_type"],
        n_prompt=n_prompt,
        n_generate=n_generate,
        depth=depth,
        repeat=repeat,
        load_s=load_s,
        rss_bytes=rss,
        model_bytes=info["bytes"]["memory"],
        prefill_tok_s=prefill_tok_s,
        prefill_tok_s_runs=prefills,
        decode_tok_s=decode_tok_s,
        decode_tok_s_runs=decodes,
        decode_bytes_per_token=bytes_per_token,
        decode_gb_s=decode_tok_s * bytes_per_token / 1e9,
        read_ceiling_gb_s=float(np.median(reads)) / 1e9,
        read_ceiling_gb_s_runs=_scaled(reads, 1e9),
        read_ceiling_best_gb_s=fastest / 1e9,
        read_buffer_bytes=buffer,
        last_level_cache_bytes=cache,
        decode_roofline=share_of(decodes, reads) * bytes_per_token,
        cached_read_gb_s=float(np.median(cached_reads)) / 1e9,
        cached_read_gb_s_runs=_scaled(cached_reads, 1e9),
        decode_cached_roofline=share_of(decodes, cached_reads) * bytes_per_token,
        int8_peak_tops=float(np.median(peaks)) / 1e12,
        int8_peak_tops_runs=_scaled(peaks, 1e12),
        prefill_operations_per_token=operations,
        prefill_peak_fraction=share_of(prefills, peaks) * operations,
        int8_tile_peak_tops=float(np.median(tiles)) / 1e12 if has_tiles else None,
        int8_tile_peak_tops_runs=_scaled(tiles, 1e12) if has_tiles else [],
        prefill_tile_peak_fraction=share_of(prefills, tiles) * operations if has_tiles else None,
        launch_us=float(np.median(launches)) * 1e6,
        launch_us_runs=_scaled(launches, 1e-6),
    )


def timed_turn(
    engine: _core.Engine, prompt: NDArray[np.uint32], before: NDArray[np.uint32], n_generate: int
) -> tuple[float, float]:
    """Tokens per second of a prefill of `prompt`, and of n_generate tokens decoded greedily one by one after `before`.

    The prefill is from an empty context to the last token's logits.
    """
    start = time.perf_counter()
    engine.logits(prompt, last=True, prefix_cache=False)
    prefill = len(prompt) / (time.perf_counter() - start)
    request = engine.submit(before, _core.SamplingParams(max_new_tokens=n_generate + 1))
    request.wait(1 << 62, math.inf)
    return prefill, n_generate / request.result()["decode_s"]


def mean_rate(rates: Sequence[float]) -> float:
    """Of equal amounts of work, each done at its own rate: all the work over all the time."""
    return len(rates) / sum(1 / rate for rate in rates)


def share_of(speeds: Sequence[float], bounds: Sequence[float]) -> float:
    """Median over the turns of a speed divided by the mean of its bound before and after the turn.

    Args:
        speeds: one per turn.
        bounds: one before the first turn and one after each.
    """
    around = np.asarray(bounds)
    return float(np.median(np.asarray(speeds) / ((around[:-1] + around[1:]) / 2)))


def decode_bytes(info: dict[str, Any], depth: int, n_generate: int) -> int:
    """Bytes read to decode one token: weights, and the cache at the mean depth of n_generate tokens from `depth` on.

    Each token reads every cached position, its own included: depth + 1, depth + 2, ...
    """
    positions = depth + (n_generate + 1) / 2
    return round(info["bytes_per_token"] + positions * info["kv_bytes_per_position"])


def prefill_operations(info: dict[str, Any], n_tokens: int) -> int:
    """Multiplications and additions to read a prompt from an empty context to the logits of its last token.

    2 for each weight of the blocks' products and each token, those of the output once; for each head and layer,
    q.k and the weighted values: 4 d for every pair of a query and a key that it sees.
    """
    products = info["block_product_weights"] * n_tokens + info["vocab_size"] * info["embedding_length"]
    pairs = n_tokens * (n_tokens + 1) // 2
    return 2 * products + 4 * info["head_dim"] * info["head_count"] * info["block_count"] * pairs


def default_read_buffer(file_bytes: int | None = None) -> int:
    """Bytes that the read ceiling goes over: too many for the caches, and no more than the machine can spare.

    With file_bytes no more than four times that: a small file's weights stay in a cache, and so may the buffer.
    """
    most = 1024 * _MIB if file_bytes is None else max(4 * file_bytes, 16 * _MIB)
    return min(max(4 * last_level_cache_bytes(), 256 * _MIB), 1024 * _MIB, most, max(spare_memory() // 4, 16 * _MIB))


def last_level_cache_bytes() -> int:
    """Size of the largest cache that the first CPU has, 0 if the system does not tell."""
    largest = 0
    for size in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        try:
            text = size.read_text().strip()
            factor = {"K": 1 << 10, "M": _MIB, "G": 1 << 30}.get(text[-1:], 1)
            largest = max(largest, int(text.rstrip("KMG")) * factor)
        except (OSError, ValueError):
            continue
    return largest


def spare_memory() -> int:
    """Bytes that this process could still take: what the system calls available, less if its cgroup allows less."""
    available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    spare = int(available[1]) * 1024 if available else 1024 * _MIB
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
        spare = min(spare, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return spare


def resident_bytes() -> int:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _scaled(values: Sequence[float], unit: float) -> list[float]:
    return [value / unit for value in values]
