"""Prometheus metrics of one application, in a registry of its own. Buckets are in seconds, tokens or items, as the name says."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from models.base import PreparedInput
from scheduler.work import BatchReport, Source, Vector

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_SIZES = tuple(2**n for n in range(9))
_TOKENS = tuple(2**n for n in range(4, 16))


class Metrics:
    """The metrics that /metrics shows."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("embedding_requests", "Replies by HTTP status", ["status"], registry=self.registry)
        self.request_seconds = Histogram(
            "embedding_request_seconds", "Time to answer an embedding request", buckets=_SECONDS, registry=self.registry
        )
        self.inputs = Counter("embedding_inputs", "Inputs embedded", ["kind"], registry=self.registry)
        self.shared = Counter(
            "embedding_shared", "Inputs that took the vector of an identical one", ["how"], registry=self.registry
        )
        self.tokens = Counter("embedding_tokens", "Tokens read by the model", ["kind"], registry=self.registry)
        self.queue_depth = Gauge("embedding_queue_depth", "Inputs that hold a place in the queue", registry=self.registry)
        self.queue_seconds = Histogram(
            "embedding_queue_seconds", "Time an input waited for the device", buckets=_SECONDS, registry=self.registry
        )
        self.prepare_seconds = Histogram(
            "embedding_prepare_seconds", "Time to fetch, decode and tokenise a request", buckets=_SECONDS, registry=self.registry
        )
        self.batch_size = Histogram("embedding_batch_size", "Inputs in a batch", buckets=_SIZES, registry=self.registry)
        self.batch_tokens = Histogram("embedding_batch_tokens", "Tokens in a batch", buckets=_TOKENS, registry=self.registry)
        self.batch_seconds = Histogram(
            "embedding_batch_seconds", "Forward pass of a batch", buckets=_SECONDS, registry=self.registry
        )
        self.batches = Counter("embedding_batches", "Batches run", registry=self.registry)
        self.rejected = Counter("embedding_rejected", "Requests refused", ["reason"], registry=self.registry)
        self.dropped = Counter("embedding_dropped", "Queued inputs that got no vector", ["reason"], registry=self.registry)
        self.image_fetch_seconds = Histogram(
            "embedding_image_fetch_seconds", "Download of an image URL", buckets=_SECONDS, registry=self.registry
        )
        self.device_memory = Gauge("embedding_device_memory_bytes", "Device memory of this process", registry=self.registry)
        self.ready = Gauge("embedding_ready", "1 while traffic is taken", registry=self.registry)

    def watch(self, *, queue_depth: Callable[[], float], device_memory: Callable[[], float], ready: Callable[[], float]) -> None:
        """Reads these at every scrape."""
        self.queue_depth.set_function(queue_depth)
        self.device_memory.set_function(device_memory)
        self.ready.set_function(ready)

    def on_batch(self, report: BatchReport) -> None:
        """Counts one batch, as the scheduler reports it."""
        self.batches.inc()
        self.batch_size.observe(report.size)
        self.batch_tokens.observe(report.num_tokens)
        self.batch_seconds.observe(report.device_seconds)
        for wait in report.waits:
            self.queue_seconds.observe(wait)

    def count_inputs(self, inputs: Iterable[tuple[PreparedInput, Vector]]) -> None:
        """Counts inputs that got their vector."""
        for item, vector in inputs:
            image_tokens = item.image_tokens
            self.inputs.labels("image" if image_tokens else "text").inc()
            if vector.source is not Source.COMPUTED:
                self.shared.labels(vector.source.value).inc()
                continue
            self.tokens.labels("text").inc(item.num_tokens - image_tokens)
            self.tokens.labels("image").inc(image_tokens)
