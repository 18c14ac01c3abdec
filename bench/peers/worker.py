"""One engine in a process of its own: loads a model, then answers requests of bench/compare.py, one JSON line each.

    python bench/peers/worker.py KIND '{"model": "...", "threads": 2, ...}'

Runs in the environment of the engine, so it imports nothing but the standard library, NumPy and that engine. The
first answer comes after loading: {"load_s", "rss_bytes", "version"}. A request {"threads", "prompt", "depth",
"decode"} is answered with "prefill_s" (a prompt of that many tokens to the logits of its last), "decode_s" ("decode"
tokens, one by one, greedily, after "depth" tokens in the context) and "rss_bytes". Token ids are the same random ones
for all. A request {"threads", "sequences", "prompt", "decode"} (bench/batching.py) is answered with "batch_s": that
many prompts at once, each to its last generated token. Anything that a library prints goes to stderr.
"""

import importlib
import importlib.metadata
import inspect
import json
import os
import sys
import time

import numpy as np


class Engine:
    """What a subclass has to know: how to load, how to read a prompt, how to decode."""

    package = ""  # whose version is reported
    modules: tuple[str, ...] = ()  # what it needs, imported before any clock starts

    def __init__(self, options: dict) -> None:
        self.options = options
        self.model = options["model"]

    def load(self, threads: int) -> None:
        """Makes the engine ready for requests with this number of threads, also when it was loaded before."""
        raise NotImplementedError

    def prefill(self, ids: np.ndarray) -> float:
        """Seconds from an empty context to the logits of the last of ids [T]."""
        raise NotImplementedError

    def decode(self, ids: np.ndarray, n: int) -> float:
        """Seconds to decode n tokens after the prompt ids [T], whose own time does not count."""
        raise NotImplementedError

    def batch(self, prompts: np.ndarray, n: int) -> float:
        """Seconds to read prompts [B, T] and generate n tokens after each, all of them together."""
        raise NotImplementedError

    def facts(self, request: dict) -> dict:
        """More to put into the answer."""
        return {}


class Fixmin(Engine):
    package = "fixmin-cpp"
    modules = ("fixmin_cpp.benchmark",)

    def load(self, threads: int) -> None:
        from fixmin_cpp import _core

        self.engine = None  # the old one's memory first
        self.engine = _core.Engine(self.model, n_threads=threads)
        self.params = _core.SamplingParams

    def prefill(self, ids: np.ndarray) -> float:
        start = time.perf_counter()
        self.engine.logits(ids.astype(np.uint32), last=True, prefix_cache=False)
        return time.perf_counter() - start

    def decode(self, ids: np.ndarray, n: int) -> float:
        params = self.params(max_new_tokens=n + 1)  # the first one comes from the prompt
        request = self.engine.submit(ids.astype(np.uint32), params)
        request.wait(1 << 62, 600.0)
        return request.result()["decode_s"]

    def batch(self, prompts: np.ndarray, n: int) -> float:
        params = self.params(max_new_tokens=n)
        start = time.perf_counter()
        requests = [self.engine.submit(ids, params, prefix_cache=False) for ids in prompts.astype(np.uint32)]
        for request in requests:
            request.wait(1 << 62, 600.0)
        seconds = time.perf_counter() - start
        if any(len(request.read(0)[0]) != n for request in requests):
            raise RuntimeError("a request ended early")
        return seconds

    def facts(self, request: dict) -> dict:
        from fixmin_cpp.benchmark import decode_bytes, prefill_operations

        info, found = self.engine.info, {"isa": self.engine.info["isa"]}
        if request["prompt"]:
            found["prefill_operations"] = prefill_operations(info, request["prompt"])
        if request["decode"]:
            found["decode_bytes"] = decode_bytes(info, max(request["depth"], 1), request["decode"])
        return found


class Ceilings(Fixmin):
    """What the machine can do: reads from memory, products of 8-bit vectors, and products of PyTorch's libraries."""

    def load(self, threads: int) -> None:
        import torch

        super().load(threads)
        torch.set_num_threads(threads)
        side = self.options["side"]
        # Packed once, as an engine packs its weights once: what is timed is the product.
        self.linear = {
            name: torch.nn.Linear(side, side, bias=False, dtype=getattr(torch, name)).requires_grad_(False)
            for name in ("float32", "bfloat16")
        }
        self.inputs = {name: torch.rand(side, side).to(layer.weight.dtype) for name, layer in self.linear.items()}
        self.bytes8 = torch.randint(-127, 128, (side, side), dtype=torch.int8)

    def facts(self, request: dict) -> dict:
        import torch

        from fixmin_cpp.benchmark import mean_rate

        found = {
            "read_bytes_s": mean_rate(self.engine.read_ceiling(self.options["buffer"], 5)),
            "int8_vector_ops": mean_rate(self.engine.int8_ceiling()),
            "int8_product_ops": self.product(lambda: torch._int_mm(self.bytes8, self.bytes8)),
        }
        if tiles := self.engine.tile_ceiling():
            found["int8_tile_ops"] = mean_rate(tiles)
        for name, layer in self.linear.items():
            found[f"{name}_product_ops"] = self.product(lambda layer=layer, name=name: layer(self.inputs[name]))
        return found

    def product(self, compute) -> float:
        """Multiplications and additions per second of a square product: the best of three."""
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            compute()
            seconds.append(time.perf_counter() - start)
        return 2 * self.options["side"] ** 3 / min(seconds)


def kept(network, out) -> dict:
    """The cache in an output, as an argument: transformers 5.24 renamed it, and code knows one name or both."""
    names = ("cache", "past_key_values")
    accepted = inspect.signature(network.forward).parameters
    value = next(out[name] for name in names if name in out)
    return {next(name for name in names if name in accepted): value}


class PyTorch(Engine):
    """The reference model. Options: dtype, int8 (dynamic quantisation of all linear layers), cache."""

    package = "torch"
    modules = ("torch", "transformers")

    def load(self, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        if hasattr(self, "network"):
            return
        dtype = getattr(torch, self.options["dtype"])
        self.network = AutoModelForCausalLM.from_pretrained(self.model, trust_remote_code=True, dtype=dtype).eval()
        if self.options.get("int8"):
            self.network = torch.ao.quantization.quantize_dynamic(self.network, {torch.nn.Linear}, torch.qint8)

    def prefill(self, ids: np.ndarray) -> float:
        import torch

        tokens = torch.from_numpy(ids)[None]
        start = time.perf_counter()
        if self.options.get("cache", True):
            self.network(tokens, use_cache=True, logits_to_keep=1)
        else:
            self.network(tokens, use_cache=False)
        return time.perf_counter() - start

    def decode(self, ids: np.ndarray, n: int) -> float:
        import torch

        tokens = torch.from_numpy(ids)[None]
        cache: dict = {}
        if self.options.get("cache", True):
            out = self.network(tokens, use_cache=True, logits_to_keep=1)
            tokens, cache = out.logits[:, -1:].argmax(-1), kept(self.network, out)  # which grows in place
        start = time.perf_counter()
        for _ in range(n):
            out = self.network(tokens, **cache, use_cache=bool(cache))
            token = out.logits[:, -1:].argmax(-1)
            tokens = token if cache else torch.cat([tokens, token], 1)
        return time.perf_counter() - start


class LlamaCpp(Engine):
    package = "llama-cpp-python"
    modules = ("llama_cpp",)

    def library(self):
        from llama_cpp import llama_cpp

        return llama_cpp

    def load(self, threads: int) -> None:
        if hasattr(self, "context"):
            self.set_threads(threads)
            return
        self.lib = lib = self.library()
        lib.llama_backend_init()
        options = lib.llama_model_default_params()
        self.adapt(options)
        self.weights = lib.llama_model_load_from_file(self.model.encode(), options)
        if not self.weights:
            raise RuntimeError(f"{self.model} was not loaded")
        self.context = self.new_context(threads, self.options["context"])

    def new_context(self, threads: int, n_ctx: int, n_sequences: int = 1):
        settings = self.lib.llama_context_default_params()
        settings.n_ctx = settings.n_batch = n_ctx
        settings.n_ubatch = 512
        settings.n_seq_max = n_sequences
        settings.n_threads = settings.n_threads_batch = threads
        return self.lib.llama_init_from_model(self.weights, settings)

    def adapt(self, options) -> None:
        """Changes the options of loading."""

    def set_threads(self, threads: int) -> None:
        self.lib.llama_set_n_threads(self.context, threads, threads)

    def clear(self) -> None:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)

    def feed(self, tokens: np.ndarray, position: int) -> None:
        lib, n = self.lib, len(tokens)
        batch = lib.llama_batch_init(n, 0, 1)
        batch.n_tokens = n
        for i, token in enumerate(tokens.tolist()):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position + i, 1
            batch.seq_id[i][0], batch.logits[i] = 0, int(i == n - 1)
        if lib.llama_decode(self.context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        lib.llama_get_logits_ith(self.context, -1)  # waits for them
        lib.llama_batch_free(batch)

    def prefill(self, ids: np.ndarray) -> float:
        self.clear()
        start = time.perf_counter()
        self.feed(ids, 0)
        return time.perf_counter() - start

    def decode(self, ids: np.ndarray, n: int) -> float:
        self.clear()
        self.feed(ids, 0)
        start = time.perf_counter()
        for i in range(n):
            at = i % len(ids)
            self.feed(ids[at : at + 1], len(ids) + i)  # any token will do: sampling is not part of its time
        return time.perf_counter() - start

    def batch(self, prompts: np.ndarray, n: int) -> float:
        """As llama-batched-bench: a cache for each sequence, prompts in one call; any token, without sampling."""
        n_sequences, length = prompts.shape
        lib, threads = self.lib, self.lib.llama_n_threads(self.context)
        context = self.new_context(threads, n_sequences * (length + n), n_sequences)
        batch = lib.llama_batch_init(n_sequences * length, 0, 1)

        def feed(tokens: np.ndarray, position: int) -> None:  # [B, T]
            batch.n_tokens = tokens.size
            for i, token in enumerate(tokens.ravel().tolist()):
                sequence, at = divmod(i, tokens.shape[1])
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position + at, 1
                batch.seq_id[i][0], batch.logits[i] = sequence, int(at == tokens.shape[1] - 1)
            if lib.llama_decode(context, batch) != 0:
                raise RuntimeError("llama_decode failed")
            lib.llama_get_logits_ith(context, -1)  # waits for them

        start = time.perf_counter()
        feed(prompts, 0)
        for i in range(n - 1):  # the first token comes from the prompt
            feed(prompts[:, i % length, None], length + i)
        seconds = time.perf_counter() - start
        lib.llama_batch_free(batch)
        lib.llama_free(context)
        return seconds


class IkLlama(LlamaCpp):
    """The fork of llama.cpp; weights are repacked when they are loaded (its fastest form)."""

    package = "ik-llama-cpp-python"
    modules = ("ik_llama_cpp",)

    def library(self):
        from ik_llama_cpp import _ctypes_api

        return _ctypes_api

    def adapt(self, options) -> None:
        options.repack_tensors = True

    def clear(self) -> None:
        self.lib.llama_kv_cache_clear(self.context)


class OpenVINO(Engine):
    package = "openvino"
    modules = ("openvino",)

    def load(self, threads: int) -> None:
        import openvino

        self.request = None
        options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        model = openvino.Core().compile_model(f"{self.model}/openvino_model.xml", "CPU", options)
        self.names = {name for port in model.inputs for name in port.get_names()}
        self.request = model.create_infer_request()

    def feed(self, tokens: np.ndarray, position: int) -> int:
        end = position + len(tokens)
        inputs = {
            "input_ids": tokens[None].astype(np.int64),
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(position, end)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        self.request.infer({name: value for name, value in inputs.items() if name in self.names}, share_outputs=True)
        return int(self.request.get_output_tensor(0).data[0, -1].argmax())

    def prefill(self, ids: np.ndarray) -> float:
        self.request.reset_state()
        start = time.perf_counter()
        self.feed(ids, 0)
        return time.perf_counter() - start

    def decode(self, ids: np.ndarray, n: int) -> float:
        self.request.reset_state()
        token = self.feed(ids, 0)
        start = time.perf_counter()
        for i in range(n):
            token = self.feed(np.array([token]), len(ids) + i)
        return time.perf_counter() - start


class CTranslate2(Engine):
    """It has no function for one token, so times are taken when it reports each one."""

    package = "ctranslate2"
    modules = ("ctranslate2",)

    def load(self, threads: int) -> None:
        import ctranslate2

        self.generator = None
        self.generator = ctranslate2.Generator(
            self.model, device="cpu", compute_type=self.options["compute"], intra_threads=threads, inter_threads=1
        )

    def token_times(self, ids: np.ndarray, n: int) -> list[float]:
        """Seconds after the start at which each of n generated tokens was there."""
        times: list[float] = []
        start = time.perf_counter()

        def note(step) -> bool:
            times.append(time.perf_counter() - start)
            return False

        self.generator.generate_batch(
            [[f"t{i}" for i in ids]],
            max_length=n,
            min_length=n,
            include_prompt_in_result=False,  # otherwise the prompt is read token by token
            callback=note,
        )
        if len(times) != n:
            raise RuntimeError(f"{len(times)} tokens were generated instead of {n}")
        return times

    def prefill(self, ids: np.ndarray) -> float:
        return self.token_times(ids, 1)[0]

    def decode(self, ids: np.ndarray, n: int) -> float:
        times = self.token_times(ids, n + 1)
        return times[-1] - times[0]


KINDS = {
    "fixmin": Fixmin,
    "ceilings": Ceilings,
    "torch": PyTorch,
    "llama": LlamaCpp,
    "ik": IkLlama,
    "openvino": OpenVINO,
    "ctranslate2": CTranslate2,
}


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def answer(engine: Engine, request: dict, ids: np.ndarray) -> dict:
    if "sequences" in request:
        prompts = np.resize(ids, (request["sequences"], request["prompt"]))  # as many of ids as there are
        return {"batch_s": engine.batch(prompts, request["decode"])}
    found = engine.facts(request)
    if request["prompt"]:
        found["prefill_s"] = engine.prefill(ids[: request["prompt"]])
    if request["decode"]:
        found["decode_s"] = engine.decode(ids[: max(request["depth"], 1)], request["decode"])
    return found | {"rss_bytes": resident_bytes()}


def main() -> None:
    kind, options = sys.argv[1], json.loads(sys.argv[2])
    # Libraries print to the process's stdout: it becomes stderr, and answers go to a copy of the real one.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engine = KINDS[kind](options)
    threads = options["threads"]
    version = importlib.metadata.version(engine.package)
    for name in engine.modules:
        importlib.import_module(name)  # not part of loading a model
    start = time.perf_counter()
    engine.load(threads)
    loaded = {"load_s": time.perf_counter() - start, "rss_bytes": resident_bytes(), "version": version}
    print(json.dumps(loaded), file=out, flush=True)
    ids = np.random.default_rng(0).integers(1, options["vocab_size"], options["context"])
    for line in sys.stdin:
        request = json.loads(line)
        if request["threads"] != threads:
            threads = request["threads"]
            engine.load(threads)
            answer(engine, request, ids)  # the first run after loading compiles and touches memory
        print(json.dumps(answer(engine, request, ids)), file=out, flush=True)


if __name__ == "__main__":
    main()
