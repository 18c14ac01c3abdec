"""GET /metrics for Prometheus: llama-server's and vLLM's names where they have one for it, `fixmin:` else."""

from collections.abc import Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ..generation import Completion
from .host import ModelHost
from .record import end_of

__all__ = ["Metrics"]

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 600.0)
_TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)


class Metrics:
    """Counters of one server; not process-wide, so that several apps can live in a process."""

    def __init__(self, host: ModelHost) -> None:
        self._registry = CollectorRegistry()
        label = host.settings.name

        def metric(kind: Any, name: str, text: str, *labels: str, **more: Any) -> Any:
            return kind(name, text, ("model_name", *labels), registry=self._registry, **more)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Any:
            return metric(Histogram, name, text, buckets=buckets).labels(label)

        self.queued = histogram("vllm:request_queue_time_seconds", "Until a generation begins to run.", _SECONDS)
        self.first_token = histogram("vllm:time_to_first_token_seconds", "Until the first token.", _SECONDS)
        self.between_tokens = histogram("vllm:inter_token_latency_seconds", "Between two tokens.", _TOKEN_SECONDS)
        self.whole = histogram("vllm:e2e_request_latency_seconds", "From the request to its end.", _SECONDS)
        self._ends = metric(Counter, "vllm:request_success", "Generations that ended, by how.", "finished_reason")
        what = "Answers, by status; 499: the client went away before it had all of it."
        self._responses = metric(Counter, "fixmin:http_responses", what, "status")
        refused = metric(Counter, "fixmin:connections_refused", "Connections beyond --max-connections.")
        self.refused_connections = refused.labels(label)
        self.open_connections = metric(Gauge, "fixmin:connections_open", "Connections.").labels(label)
        self.prompt_seconds = 0.0
        self.predicted_seconds = 0.0
        self._label = label
        self._registry.register(_EngineCollector(host, self))

    def ended(self, completion: Completion) -> None:
        """Counts a generation."""
        self.count_end(completion.finish_reason)
        self.prompt_seconds += completion.timings.prefill_s
        self.predicted_seconds += completion.timings.decode_s

    def count_end(self, reason: str, n: int = 1) -> None:
        """Counts generations by how they ended, those of which nothing else is known too."""
        self._ends.labels(self._label, end_of(reason)).inc(n)

    def answered(self, status: int) -> None:
        """Counts an answer."""
        self._responses.labels(self._label, str(status)).inc()

    def text(self) -> bytes:
        """What a scrape gets."""
        return generate_latest(self._registry)


class _EngineCollector:
    """The scheduler's own counters, read when they are asked for."""

    def __init__(self, host: ModelHost, metrics: Metrics) -> None:
        self._host = host
        self._metrics = metrics

    def describe(self) -> Iterable[Metric]:
        """None: registering must not ask a model that is not there yet."""
        return []

    def collect(self) -> Iterable[Metric]:
        """One sample each."""
        model = self._host.model
        stats = model.stats()
        label = self._host.settings.name
        n_waiting = stats["n_waiting"] + self._host.turns.n_waiting
        # Known prompts that nobody uses give way at once: they are no use of it.
        free = stats["n_free_blocks"] + stats["n_evictable_blocks"]
        used = 1.0 - free / max(1, stats["n_blocks"])
        counters = {
            "llamacpp:prompt_tokens": ("Tokens of prompts.", stats["n_prompt_tokens"]),
            "llamacpp:prompt_seconds": ("Reading prompts, summed over requests.", self._metrics.prompt_seconds),
            "llamacpp:tokens_predicted": ("Generated tokens.", stats["n_generated"]),
            "llamacpp:tokens_predicted_seconds": (
                "Generating, summed over requests.",
                self._metrics.predicted_seconds,
            ),
            "llamacpp:n_decode": ("Steps of the engine.", stats["n_steps"]),
            "vllm:prompt_tokens": ("Tokens of prompts.", stats["n_prompt_tokens"]),
            "vllm:generation_tokens": ("Generated tokens.", stats["n_generated"]),
            "vllm:prefix_cache_queries": ("Tokens of prompts that were looked for.", stats["n_prompt_tokens"]),
            "vllm:prefix_cache_hits": ("Of these, found.", stats["n_cached_prompt_tokens"]),
            "vllm:num_preemptions": ("Generations sent back for lack of room.", stats["n_preempted"]),
            "vllm:spec_decode_num_draft_tokens": ("Guessed tokens.", stats["n_drafted"]),
            "vllm:spec_decode_num_accepted_tokens": ("Of these, right.", stats["n_accepted"]),
        }
        gauges = {
            "llamacpp:requests_processing": ("Generations that run.", stats["n_running"]),
            "llamacpp:requests_deferred": ("Generations that wait.", n_waiting),
            "llamacpp:kv_cache_usage_ratio": ("Share of the KV cache in use, known prompts excluded.", used),
            "vllm:num_requests_running": ("Generations that run.", stats["n_running"]),
            "vllm:num_requests_waiting": ("Generations that wait.", n_waiting),
            "vllm:kv_cache_usage_perc": ("The same.", used),
            "fixmin:sequences_admitted": ("Generations that the server has taken on.", self._host.n_sequences),
            "fixmin:memory_bytes": ("Weights, KV cache and buffers.", model.info["bytes"]["memory"]),
        }
        for family, samples in ((CounterMetricFamily, counters), (GaugeMetricFamily, gauges)):
            for name, (text, value) in samples.items():
                metric = family(name, text, labels=("model_name",))
                metric.add_metric((label,), value)
                yield metric
