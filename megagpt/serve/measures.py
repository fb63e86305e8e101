"""What /metrics shows, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


class Measures:
    """gauges: by name, what is shown as it is when it is asked for, and what it means."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, gauges: Mapping[str, tuple[str, Callable[[], float]]]) -> None:
        self._registry = CollectorRegistry()
        for name, (meaning, value) in gauges.items():
            Gauge(name, meaning, registry=self._registry).set_function(value)
        self.requests = self._counter("megagpt_requests", "Answers, by path and status", "path", "status")
        self.read = self._counter("megagpt_prompt_tokens", "Tokens of prompts that were answered")
        self.written = self._counter("megagpt_generated_tokens", "Tokens written")
        self.first = self._seconds("megagpt_first_token_seconds", "From a request to its first token")
        self.whole = self._seconds("megagpt_request_seconds", "From a request to its end")

    def text(self) -> bytes:
        """As it is now."""
        return generate_latest(self._registry)

    def _counter(self, name: str, meaning: str, *labels: str) -> Counter:
        return Counter(name, meaning, labels, registry=self._registry)

    def _seconds(self, name: str, meaning: str) -> Histogram:
        return Histogram(name, meaning, buckets=SECONDS, registry=self._registry)
