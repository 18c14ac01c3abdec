"""Types of the native module. The public interface is `fixmin_cpp`; this one may change between versions."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__version__: str

class FixminError(RuntimeError): ...
class GGUFError(FixminError, ValueError): ...
class UnsupportedError(FixminError, ValueError): ...
class DeviceError(FixminError): ...
class ContextLengthError(FixminError, ValueError): ...
class ArgumentError(FixminError, ValueError): ...

# --- bind_gguf.cpp ---------------------------------------------------------------------------------------------

class GgufTensor:
    name: str
    shape: tuple[int, ...]  # NumPy order: slowest dimension first, row length last
    type: str  # "F32", "Q8_0", ...
    offset: int  # bytes from the start of the file
    n_bytes: int

class GgufFile:
    """A validated GGUF file. Raises GGUFError for anything malformed, OSError if the path cannot be opened."""

    def __init__(self, path: str | bytes | os.PathLike[str]) -> None: ...
    @staticmethod
    def from_bytes(data: bytes) -> GgufFile: ...
    @property
    def version(self) -> int: ...
    @property
    def alignment(self) -> int: ...
    @property
    def metadata(self) -> dict[str, Any]: ...  # arrays of numbers as ndarray, of strings as list[str]
    @property
    def metadata_types(self) -> dict[str, tuple[int, int | None]]: ...  # type, element type; the file's numbers
    @property
    def tensors(self) -> list[GgufTensor]: ...
    def tensor_data(self, name: str) -> NDArray[np.uint8]: ...  # raw bytes, read-only; KeyError

# --- bind_codes.cpp --------------------------------------------------------------------------------------------

class CodeMap:
    """Token id -> K-bit code; see csrc/codes/code_map.h."""

    @staticmethod
    def affine(vocab_size: int, matrix: NDArray[np.uint8], shift: NDArray[np.uint8]) -> CodeMap: ...
    @staticmethod
    def table(rows: NDArray[np.uint8]) -> CodeMap: ...  # [V, K] of 0/1
    @property
    def vocab_size(self) -> int: ...
    @property
    def width(self) -> int: ...
    def codes(self, ids: NDArray[np.uint32]) -> NDArray[np.uint8]: ...  # [T, K] of 0/1
    def id_of(self, code: NDArray[np.uint8]) -> int | None: ...  # [K] of 0/1

def lift_codes(
    codes: NDArray[np.uint8], embedding_length: int, lift: str, values: tuple[float, float]
) -> NDArray[np.float32]: ...  # [T, D]

class FoldedProjection:
    """norm1 followed by one projection of layer 0, collapsed into K + 2 columns; see csrc/codes/fold.h."""

    def apply(self, codes: NDArray[np.uint8]) -> NDArray[np.float32]: ...  # [T, K] -> [T, M]
    def scales(self, codes: NDArray[np.uint8]) -> NDArray[np.float32]: ...  # [T, 2]: v0 - mu, 1 / sigma
    @property
    def columns(self) -> NDArray[np.float32]: ...  # [K, M]
    @property
    def sum(self) -> NDArray[np.float32]: ...  # [M]
    @property
    def constant(self) -> NDArray[np.float32]: ...  # [M]

class FoldBuilder:
    """A FoldedProjection from blocks of rows; see csrc/codes/fold.h."""

    def __init__(
        self,
        rows: int,
        norm_weight: NDArray[np.float32],
        norm_bias: NDArray[np.float32] | None,
        eps: float,
        rms: bool,
        width: int,
        lift: str,
        values: tuple[float, float],
    ) -> None: ...
    def add_rows(self, row_begin: int, weight: NDArray[np.float32], bias: NDArray[np.float32] | None) -> None: ...
    def finish(self) -> FoldedProjection: ...

# --- bind_sampler.cpp ------------------------------------------------------------------------------------------

class SamplingParams:
    """How the next token is chosen; see csrc/sampling/sampling_params.h and docs/sampling.md. Cannot be changed."""

    temperature: float  # 0: greedy
    dynatemp_range: float  # 0: off
    dynatemp_exponent: float
    top_n_sigma: float  # 0 or less: off
    top_k: int  # 0: off
    typical_p: float  # 1: off
    top_p: float  # 1: off
    min_p: float  # 0: off
    xtc_probability: float  # 0: off
    xtc_threshold: float  # above 0.5: off
    min_keep: int
    mirostat: int  # 0: off; 1; 2
    mirostat_tau: float  # bits
    mirostat_eta: float
    seed: int  # uint64
    logit_bias: dict[int, float]
    banned_ids: list[int]
    allowed_ids: list[int]  # empty: all
    min_new_tokens: int  # before so many no stop id is drawn
    repeat_penalty: float  # 1: off
    frequency_penalty: float  # 0: off
    presence_penalty: float  # 0: off
    repeat_last_n: int  # tokens; -1: all
    openai_penalties: bool  # frequency and presence count all generated tokens and nothing of the prompt
    dry_multiplier: float  # 0: off
    dry_base: float
    dry_allowed_length: int  # tokens
    dry_penalty_last_n: int  # tokens; -1: all
    dry_sequence_breakers: list[list[int]]
    max_new_tokens: int
    stop_ids: list[int]  # generation ends after one of these; it is not part of the result
    def __init__(self, **kwargs: Any) -> None: ...  # values by name; TypeError for others, or of a wrong kind

class Sampler:
    """Chooses the tokens of one request from logits; see csrc/sampling/sampler.h. Not for several threads at once."""

    def __init__(
        self,
        params: SamplingParams,  # ArgumentError if one is out of range
        prompt_ids: Sequence[int] = (),  # what penalties and DRY look back on
        isa: str | None = None,
    ) -> None: ...
    def sample(
        self,
        logits: NDArray[np.float32],  # [V]
        step: int,  # tokens generated so far
        allowed: NDArray[np.uint32] | None = None,  # bit set [ceil(V/32)]
    ) -> int: ...
    def accept(self, id: int) -> None: ...  # the token that the request goes on with
    def probabilities(
        self, logits: NDArray[np.float32], step: int, allowed: NDArray[np.uint32] | None = None
    ) -> tuple[NDArray[np.uint32], NDArray[np.float64]]: ...  # what sample() draws from: ids [n], probabilities [n]
    @property
    def mirostat_mu(self) -> float: ...  # bits

def top_logprobs(
    logits: NDArray[np.float32],  # [V], as the model gave them
    k: int,  # up to 1024
    chosen: int,
    isa: str | None = None,
) -> tuple[
    float, int, NDArray[np.uint32], NDArray[np.float32]
]: ...  # natural logarithm of the probability of `chosen`, its rank from 1, ids [k] and their log-probabilities [k]

# --- bind_request.cpp ------------------------------------------------------------------------------------------

class Mailbox:
    """Says which requests have news."""

    def __init__(self) -> None: ...
    def wait(self, timeout_s: float) -> list[int]: ...  # their numbers; empty after timeout_s or close()
    def close(self) -> None: ...

class Request:
    """A queued, running or ended request; made by Engine.submit. Any thread may use it."""

    @property
    def number(self) -> int: ...
    @property
    def prompt_scored(self) -> bool: ...  # whether prompt_top_logprobs() may be asked for before the end
    def cancel(self) -> None: ...
    def wait(self, n_seen: int, timeout_s: float) -> bool: ...  # more than n_seen tokens, or the end; False: timeout
    def read(
        self, start: int
    ) -> tuple[list[int], list[tuple[int, float, int, list[tuple[int, float]]]], bool]: ...  # ids, logprobs, ended
    def result(self) -> dict[str, Any]: ...  # reason, counters and times; raises what went wrong
    def prompt_logprobs(self) -> NDArray[np.float32]: ...  # [n], of the tokens that were scored
    def prompt_ranks(self) -> NDArray[np.uint32]: ...  # [n], the same; 1: no token was more probable
    def prompt_top_logprobs(self) -> list[tuple[int, float, int, list[tuple[int, float]]]]: ...

# --- bind_engine.cpp -------------------------------------------------------------------------------------------

class Engine:
    """A loaded model and its worker threads. Requests of any number of threads run together."""

    def __init__(
        self,
        path: str,
        *,
        n_threads: int = 0,  # 0: default, min(affinity, cgroup quota, physical cores)
        n_ctx: int = 0,  # 0: the model's context_length
        kv_type: str = "f16",  # "f16" | "f32" | "q8_0"
        n_batch: int = 512,  # tokens of all requests in a step
        isa: str | None = None,  # None: best of this CPU, or FIXMIN_ISA
        n_kv: int = 0,  # positions of the cache, for all requests; 0: kv_contexts contexts ...
        kv_contexts: int | None = None,  # None: 16, or any number if there is a share
        kv_memory_share: float | None = None,  # ... or fewer, down to one, if that were more of the memory; None: 1/8
        n_parallel: int = 256,  # most requests in a step
        device: str | None = None,  # "cpu" | "cuda" | "cuda:N" | "auto"; None: FIXMIN_DEVICE, or "cpu"
        progress: Callable[[float], object] | None = None,
    ) -> None: ...
    @property
    def info(self) -> dict[str, Any]: ...
    def codes(self, ids: NDArray[np.uint32]) -> NDArray[np.uint8]: ...
    def logits(
        self,
        ids: NDArray[np.uint32],
        last: bool = False,
        prefix_cache: bool = True,
        rows: Sequence[int] | None = None,  # rising
    ) -> NDArray[np.float32]: ...  # [T, V], [V] of the last row, or [n, V] of rows
    def hidden_states(self, ids: NDArray[np.uint32], layer: int) -> NDArray[np.float32]: ...  # [T, D]
    def submit(
        self,
        ids: NDArray[np.uint32],
        params: SamplingParams,  # max_new_tokens 0: nothing is generated
        *,
        seed: int | None = None,  # in place of that of params
        mask: Any = None,  # object with allowed() -> uint32 [V/32], accept(id), finished() -> bool
        n_logprobs: int = -1,  # of generated tokens: -1 none, else how many of the most probable besides
        n_prompt_logprobs: int = -1,  # of the prompt's tokens but the first
        prefix_cache: bool = True,
        n_draft: int = 0,  # most tokens guessed from the text so far
        timeout_s: float = ...,  # infinity
        after: Request | None = None,  # starts once that one's prompt has been read
        mailbox: Mailbox | None = None,
        first_row: int = 0,  # scores only what follows this token of the prompt, and later ones
        next: int | None = None,  # follows the prompt: is scored, but not read
    ) -> Request: ...
    def stats(self) -> dict[str, int]: ...
    def export_prefix(self, ids: NDArray[np.uint32]) -> NDArray[np.uint8]: ...  # [n * block_bytes], whole blocks
    def import_prefix(self, ids: NDArray[np.uint32], blocks: NDArray[np.uint8]) -> None: ...
    def clear_prefix_cache(self) -> None: ...
    def read_ceiling(self, n_bytes: int, passes: int = 3) -> list[float]: ...  # bytes per second, all threads, per pass
    def int8_ceiling(self, passes: int = 3) -> list[float]: ...  # 8-bit multiplications and additions per second
    def tile_ceiling(self, passes: int = 3) -> list[float]: ...  # the same of AMX tiles; empty where there are none
    def launch_ceiling(self, passes: int = 3) -> list[float]: ...  # seconds from part to part of a step, without work
    def take_metadata(self) -> dict[str, Any]: ...  # GgufFile.metadata of what was loaded; empty when taken
    @property
    def file_changed(self) -> bool: ...  # what was loaded has been written to since
    def read_file(self, offset: int, n: int) -> bytes: ...  # of what was loaded
    def lease(self) -> Engine: ...  # the same engine: close() ends what it runs, not its memory
    def close(self) -> None: ...

class TeamSize:
    """How many threads take a step; times are given, so that tests can make them up. See csrc/cpu/team_size.h."""

    def __init__(self, most: int) -> None: ...
    def choose(self, n_tokens: int, work_ns: float) -> int: ...
    def record(self, elapsed_ns: float) -> None: ...  # of the step last chosen for

class InputSquares:
    """Sums over tokens of the squared inputs of every matrix product, per input channel: an importance matrix."""

    def __init__(self, engine: Engine) -> None: ...
    def add(self, engine: Engine, ids: NDArray[np.uint32]) -> NDArray[np.float32]: ...  # [T-1], as Model.score
    @property
    def sums(self) -> dict[str, tuple[NDArray[np.float64], int]]: ...  # tensor -> (sums [inputs], tokens)

def cgroup_limits(root: str = "") -> dict[str, float]: ...  # cpus, memory_bytes, cpuset
def system_info() -> dict[str, Any]: ...
def cuda_driver() -> str: ...  # "CUDA 13.0 (driver 580.65.06)", or "none: " and the reason; starts the driver
def gpus() -> list[dict[str, Any]]: ...  # name, architecture, memory_bytes; starts the driver

# --- bind_kernels.cpp: for tests -------------------------------------------------------------------------------

def dequantize(type: str, data: NDArray[np.uint8], rows: int, inner: int) -> NDArray[np.float32]: ...  # [rows, inner]
def packed_bytes(type: str, rows: int, inner: int) -> int: ...

class Kernels:
    """Single kernels of one instruction set; all arrays float32 and C-contiguous; see csrc/kernels/kernels.h."""

    def __init__(self, isa: str) -> None: ...
    def quantize_activations(
        self, x: NDArray[np.float32]
    ) -> tuple[NDArray[np.int8], NDArray[np.float32], NDArray[np.int32]]: ...  # q [n], scale [n/32], sum [n/32]
    def quantize_row(self, x: NDArray[np.float32]) -> tuple[NDArray[np.int8], float, int]: ...  # q, scale, sum of q
    def matmul(
        self,
        type: str,
        data: NDArray[np.uint8],  # rows in the file's layout
        rows: int,
        x: NDArray[np.float32],  # [T, inner]
        bias: NDArray[np.float32] | None = None,  # [rows]
        residual: NDArray[np.float32] | None = None,  # [T, rows]
        panels_per_call: int = 0,  # 0: all; else calls after the first use its layout of the tokens
    ) -> NDArray[np.float32]: ...  # [T, rows]
    def norm(
        self,
        x: NDArray[np.float32],
        weight: NDArray[np.float32],
        bias: NDArray[np.float32] | None,
        eps: float,
        rms: bool,
    ) -> NDArray[np.float32]: ...
    def unary(self, name: str, x: NDArray[np.float32]) -> NDArray[np.float32]: ...  # "gelu", "gelu_tanh", "exp"
    def silu_mul(self, gate: NDArray[np.float32], up: NDArray[np.float32]) -> NDArray[np.float32]: ...
    def rope(
        self, x: NDArray[np.float32], interleaved: bool, cos: NDArray[np.float32], sin: NDArray[np.float32]
    ) -> NDArray[np.float32]: ...
    def attention(
        self,
        kv_type: str,  # "f16" | "f32" | "q8_0"
        queries: NDArray[np.float32],  # [n, d], the last n tokens
        keys: NDArray[np.float32],  # [T, d]
        values: NDArray[np.float32],  # [T, d]
    ) -> NDArray[np.float32]: ...  # [n, d]
    def argmax(self, x: NDArray[np.float32]) -> int | None: ...  # None: NaN or +infinity among x
    def softmax_stats(self, x: NDArray[np.float32]) -> tuple[float, float]: ...  # max, sum of exp(x - max)

# --- bind_park.cpp ---------------------------------------------------------------------------------------------

# Stops a thread of this process for good if it runs the code of the library that `type` is of, the same at each call.
# True: it is parked, or has ended; False: not now, try again after letting go of the GIL; None: cannot be done here.
def park_thread(thread_id: int, type: type) -> bool | None: ...
