"""What the service counts, in Prometheus' form. `docs/serving.md` has alert rules for these names."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The figures of one service; none of them holds anything of a request's text."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        labels = ("route", "adapter", "status")
        self.requests = Counter("peftkit_requests", "Requests by outcome.", labels, registry=registry)
        self.seconds = Histogram(
            "peftkit_request_seconds", "From request to answer.", ("route",), buckets=SECONDS, registry=registry
        )
        self.refused = Counter("peftkit_refused", "Requests that a limit refused.", ("limit",), registry=registry)
        self.tokens = Counter("peftkit_tokens", "Tokens read, by adapter.", ("adapter",), registry=registry)
        self.batches = Histogram(
            "peftkit_batch_examples", "Examples in a forward pass.", buckets=SIZES, registry=registry
        )
        self.mixed = Histogram("peftkit_batch_adapters", "Adapters in a batch.", buckets=SIZES, registry=registry)
        self.padded = Counter("peftkit_batch_tokens", "Tokens computed, with padding.", registry=registry)
        self.in_flight = Gauge("peftkit_requests_in_flight", "Requests being answered.", registry=registry)
        self.waiting = Gauge("peftkit_queue_examples", "Examples that wait for the model.", registry=registry)
        self.ready = Gauge("peftkit_ready", "1 where requests are answered.", registry=registry)
        self.reloads = Counter("peftkit_reloads", "Reloads by outcome.", ("outcome",), registry=registry)
        self.abandoned = Counter(
            "peftkit_abandoned", "Requests whose client left or whose time ran out.", registry=registry
        )

    def batch(self, examples: int, tokens: int, adapters: int) -> None:
        """Note one batch."""
        self.batches.observe(examples)
        self.mixed.observe(adapters)
        self.padded.inc(tokens)

    def page(self) -> bytes:
        """Everything, as Prometheus reads it."""
        return generate_latest(self.registry)
