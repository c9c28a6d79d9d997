"""What a server counts and times, in Prometheus' text format.

In: requests as they end, and the scheduler and registry as they are when asked. Out: text. The registry of names is
this server's own: several servers in a process do not mix.
"""

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counters and histograms of one server; what the scheduler and the registry hold is read when somebody asks."""

    def __init__(self, scheduler: Any, registry: Any):
        self._scheduler, self._registry = scheduler, registry
        self._names = own = CollectorRegistry()
        self.requests = Counter("lora_gen_requests", "Requests.", ["endpoint", "status"], registry=own)
        self.cancelled = Counter("lora_gen_cancelled", "Sequences that nobody waited for any longer.", registry=own)
        text = "From a request's head to the end of its answer."
        self.seconds = Histogram("lora_gen_request_seconds", text, ["endpoint"], buckets=_SECONDS, registry=own)
        text = "From a request's head to its first token."
        self.first_token = Histogram("lora_gen_first_token_seconds", text, buckets=_SECONDS, registry=own)
        own.register(self)  # pyright: ignore[reportArgumentType]

    def text(self) -> bytes:
        """All of it."""
        return generate_latest(self._names)

    def collect(self) -> Iterator[Any]:
        """What is read at the moment of asking."""
        s = self._scheduler
        yield GaugeMetricFamily("lora_gen_rows", "Sequences that can be generated at a time.", s.rows)
        yield GaugeMetricFamily("lora_gen_rows_busy", "Sequences that are being generated.", s.running)
        yield GaugeMetricFamily("lora_gen_queue_length", "Sequences that wait for a row.", s.waiting)
        served = len(self._registry)
        yield GaugeMetricFamily("lora_gen_specializations", "Specializations that can be asked for.", served)
        yield CounterMetricFamily("lora_gen_read_tokens", "Tokens of prompts.", s.read_tokens)
        yield CounterMetricFamily("lora_gen_generated_tokens", "New tokens.", s.generated_tokens)
