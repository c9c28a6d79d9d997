"""What a server counts and times, in Prometheus' text format.

In: requests as they end, and the scheduler and registry as they are when asked. Out: text. The registry of names is
this server's own: several servers in a process do not mix.
"""

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_PREFIX = "lora_gen"


class Metrics:
    """Counters and histograms of one server.

    Args:
        scheduler: its rows, queue and tokens are read when somebody asks.
        registry: its length is.
    """

    def __init__(self, scheduler: Any, registry: Any):
        self._names = CollectorRegistry()
        self.requests = Counter(f"{_PREFIX}_requests", "Requests.", ["endpoint", "status"], registry=self._names)
        self.seconds = self._histogram(
            "request_seconds", "From a request's head to the end of its answer.", ["endpoint"]
        )
        self.first_token = self._histogram("first_token_seconds", "From a request's head to its first token.", [])
        self.cancelled = Counter(
            f"{_PREFIX}_cancelled", "Sequences that nobody waited for any longer.", registry=self._names
        )
        self._names.register(_Now(scheduler, registry))  # pyright: ignore[reportArgumentType]

    def _histogram(self, name: str, text: str, labels: list[str]) -> Histogram:
        return Histogram(f"{_PREFIX}_{name}", text, labels, buckets=_SECONDS, registry=self._names)

    def text(self) -> bytes:
        """All of it."""
        return generate_latest(self._names)


class _Now:
    """What is read at the moment of asking."""

    def __init__(self, scheduler: Any, registry: Any):
        self._scheduler, self._registry = scheduler, registry

    def collect(self) -> Iterator[Any]:
        s = self._scheduler
        for name, text, value in (
            ("rows", "Sequences that can be generated at a time.", s.rows),
            ("rows_busy", "Sequences that are being generated.", s.running),
            ("queue_length", "Sequences that wait for a row.", s.waiting),
            ("specializations", "Specializations that can be asked for.", len(self._registry)),
        ):
            yield GaugeMetricFamily(f"{_PREFIX}_{name}", text, value)
        yield CounterMetricFamily(f"{_PREFIX}_read_tokens", "Tokens of prompts.", s.read_tokens)
        yield CounterMetricFamily(f"{_PREFIX}_generated_tokens", "New tokens.", s.generated_tokens)
