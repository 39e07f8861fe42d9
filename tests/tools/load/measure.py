"""The measuring itself: turns of the engines and windows of the service, in rounds.

The machine is shared, and what others do on it only ever slows a measurement down. So every figure is that of the fastest of
its rounds, a ratio is the quotient of two such figures, and engines and service take turns within a round: what lasts longer
than a round slows both. How far the rounds lie apart is reported beside every figure, and beside a ratio the quotients of each
round. The share of a core that a row had tells a disturbed one: on a CPU, one core saturated is 100 % of it.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, TypeVar

from tests.tools.load import callers, workloads
from tests.tools.load.callers import Tally, Window
from tests.tools.load.engines import engines_on
from tests.tools.load.in_process import InProcess
from tests.tools.load.server_process import ServerProcess
from tests.tools.load.service import Service

T = TypeVar("T")

ROUNDS = 3
# Of the seconds of a service window. LOAD_TURN is the longest that all callers of a load may take for a reply each.
TURN = 0.5
ONE_BY_ONE = 0.25
LOAD_TURN = 0.5
RAMP = 0.25
INTERACTIVE = 4.0
# Drawing inputs, the passes that warm up, and waiting for an idle service; for a workload.
OVERHEAD_S = 12.0
SHORTEST_S = 0.2

BULK_INPUTS = 2000
BULK_WORKLOAD = "16"
INTERACTIVE_CALLERS = 4


@dataclass(frozen=True, slots=True)
class Load:
    """So many callers, each with one request of so many inputs under way at a time."""

    callers: int
    inputs: int

    @property
    def name(self) -> str:
        return f"{self.callers}x{self.inputs}"

    @property
    def total(self) -> int:
        """Inputs under way at once."""
        return self.callers * self.inputs

    def pools(self, inputs: Sequence[T]) -> Iterator[list[Sequence[T]]]:
        """The inputs of each request of each caller: no two callers share one."""
        starts = range(0, len(inputs) - self.inputs + 1, self.inputs)
        requests = [inputs[start : start + self.inputs] for start in starts]
        for place in range(self.callers):
            yield requests[place :: self.callers]

    def fitted(self, most: float) -> Load:
        """With no more than `most` inputs under way, as far as halving goes: requests first, then callers."""
        if self.total <= most or self.total == 1:
            return self
        smaller = Load(self.callers, self.inputs // 2) if self.inputs > 1 else Load(self.callers // 2, 1)
        return smaller.fitted(most)


LOADS = (Load(1, 1), Load(8, 1), Load(64, 1), Load(256, 1), Load(8, 32))


def seconds_that_fit(left: float, count: int, device: str, rounds: int) -> float:
    """Of a service window, so that `count` more workloads and the interactive callers are done in `left` seconds."""
    windows = len(LOADS) * (1 + max(RAMP, LOAD_TURN) + LOAD_TURN)
    in_rounds = rounds * (len(engines_on(device)) * TURN + ONE_BY_ONE + windows)
    return max(SHORTEST_S, (left - count * OVERHEAD_S) / (count * in_rounds + INTERACTIVE))


class Bench:
    """Engines and service of one checkpoint. `seconds` is the length of a service window."""

    def __init__(self, engines: InProcess, service: Service, path: Path, device: str, rounds: int = ROUNDS) -> None:
        self._engines = engines
        self._service = service
        self._path = path
        self.rounds = rounds
        self._names = [engine.name for engine in engines_on(device)]
        self.served = self._names[-1]
        self.seconds = 10.0

    def workload(self, name: str) -> dict[str, Any]:
        """All rows of a workload. Raises ChildFailed, LoadFailed."""
        taken = self._engines.take(name)
        engines: dict[str, list[dict[str, Any]]] = {engine: [] for engine in self._names}
        windows: dict[Load, list[dict[str, Any]]] = {}
        alone: list[float] = []
        requests: dict[Load, list[list[bytes]]] = {}
        for _ in range(self.rounds):
            for engine, turns in engines.items():
                turns.append(self._turn(engine))
            alone.append(self._engines.one_by_one(self.seconds * ONE_BY_ONE)["median_s"] * 1000)
            if not requests:
                rate = engines[self.served][0]["vectors_per_s"]
                fitted = {load.name: load.fitted(rate * self.seconds * LOAD_TURN) for load in LOADS}
                requests = self._requests(name, list(dict.fromkeys(fitted.values())))
                windows = {load: [] for load in requests}
            for load, pools in requests.items():
                windows[load].append(self._window(load, pools, rate))
        stock, served = engines["stock"], engines[self.served]
        return {
            "token_counts": taken["tokens"],
            "tokens_per_vector": sum(taken["tokens"]) / len(taken["tokens"]),
            "prefix_tokens": taken["prefix_tokens"],
            "cosine": taken["cosine"],
            "image_side": workloads.IMAGE_SIDE if name == "images" else 0,
            "window_s": self.seconds,
            "engines": {engine: row(turns, stock, served) for engine, turns in engines.items()},
            "service": {label: row(windows[load], stock, served) for label, load in fitted.items()},
            "one_text": one_text(alone, windows[LOADS[0]]),
        }

    def interactive(self, seconds: float) -> dict[str, Any]:
        """Single short texts beside a caller whose requests of 2,000 follow each other. Raises ChildFailed, LoadFailed."""
        texts = workloads.texts(self._path, BULK_WORKLOAD, 2 * BULK_INPUTS + 16 * INTERACTIVE_CALLERS)
        server = self._service.server
        bulk = [server.request(texts[start : start + BULK_INPUTS]) for start in (0, BULK_INPUTS)]
        single = [server.request([text]) for text in texts[2 * BULK_INPUTS :]]
        pools = [single[place::INTERACTIVE_CALLERS] for place in range(INTERACTIVE_CALLERS)]

        async def both() -> Tally:
            async with asyncio.TaskGroup() as group:
                other = group.create_task(callers.load(server, [cycle(bulk)], seconds=float("inf")))
                tally = await callers.load(server, [cycle(pool) for pool in pools], seconds=seconds, ramp=seconds / 10)
                other.cancel()
            return tally

        before = self._service.metrics()
        try:
            tally = asyncio.run(both())
        except* callers.LoadFailed as failed:
            raise failed.exceptions[0] from None
        batches = batches_between(before, self._service.metrics())
        window = tally.window()
        p99 = window.percentile_ms(0.99)
        return {
            "bulk_inputs": BULK_INPUTS,
            "callers": INTERACTIVE_CALLERS,
            "replies": len(window.replies),
            "p50_ms": window.percentile_ms(0.5),
            "p99_ms": p99,
            **batches,
            "p99_to_batch": p99 / batches["batch_ms"],
        }

    def _turn(self, engine: str) -> dict[str, Any]:
        work = self._engines.turn(engine, self.seconds * TURN)
        return {
            "vectors_per_s": work.vectors / work.seconds,
            "tokens_per_s": work.tokens / work.seconds,
            "model_share": work.model_seconds / work.seconds,
            "core_share": work.cpu_seconds / work.seconds,
        }

    def _window(self, load: Load, pools: Sequence[Sequence[bytes]], rate: float) -> dict[str, Any]:
        """The service under a load, and idle again. `rate`, in vectors per second, says how long a full turn takes."""
        ramp = max(self.seconds * RAMP, load.total / rate)
        before = self._service.metrics()
        tally, elapsed, spent = loaded(self._service, pools, self.seconds, ramp)
        batches = batches_between(before, self._service.metrics())
        self._service.settle()
        return {
            "callers": load.callers,
            "inputs": load.inputs,
            **figures(tally.window()),
            "model_share": batches["batches"] * batches["batch_ms"] / 1000 / elapsed,
            "core_share": spent / elapsed,
            **batches,
            "generator_share": tally.busy,
        }

    def _requests(self, name: str, loads: Sequence[Load]) -> dict[Load, list[list[bytes]]]:
        """The requests of each caller of each load. No two callers share an input, so none is ever under way twice."""
        most = max(load.total for load in loads)
        if name == "images":
            inputs = [f"data:image/jpeg;base64,{base64.b64encode(file).decode()}" for file in workloads.images(2 * most)]
        else:
            inputs = workloads.texts(self._path, name, 2 * most)
        request = self._service.server.request
        return {load: [[request(part) for part in pool] for pool in load.pools(inputs)] for load in loads}


def loaded(process: ServerProcess, pools: Sequence[Sequence[bytes]], seconds: float, ramp: float) -> tuple[Tally, float, float]:
    """A server under a caller for each pool, whose requests it sends over and over: what came back, the seconds that it took, and
    those of the processor that the server had. Raises ChildFailed, LoadFailed."""
    started, spent = time.perf_counter(), process.cpu_seconds()
    requests = [cycle(pool) for pool in pools]
    tally = asyncio.run(callers.load(process.server, requests, seconds=seconds, ramp=ramp, steady=True))
    # The clock last, as it was the first: what the server computes while this process waits for its core is within the time.
    spent = process.cpu_seconds() - spent
    return tally, time.perf_counter() - started, spent


def figures(window: Window) -> dict[str, Any]:
    """Of a window, as a row has them."""
    return {
        "vectors_per_s": window.vectors_per_s,
        "tokens_per_s": window.tokens_per_s,
        "p50_ms": window.percentile_ms(0.5),
        "p99_ms": window.percentile_ms(0.99),
        "replies": len(window.replies),
    }


def batches_between(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """The service's own account of its batches between two looks at its metrics; milliseconds and tokens are means."""
    grown = {name: after[f"embedding_batch_{name}"] - before[f"embedding_batch_{name}"] for name in (
        "seconds_sum", "seconds_count", "tokens_sum", "size_sum",
    )}  # fmt: skip
    count = grown["seconds_count"] or float("nan")
    return {
        "batches": grown["seconds_count"],
        "batch_ms": grown["seconds_sum"] / count * 1000,
        "batch_tokens": grown["tokens_sum"] / count,
        "batch_inputs": grown["size_sum"] / count,
    }


def row(turns: Sequence[dict[str, Any]], stock: Sequence[dict[str, Any]], served: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The fastest of a row's rounds, how far they lie apart, and its ratios.

    Ratios are of tokens per second: of texts of one length that is the same as of vectors, and of a mix it is fair where two
    windows have not had quite the same texts.
    """
    best = fastest(turns)
    rates = [turn["tokens_per_s"] for turn in turns]
    return {
        **best,
        "spread": 1 - min(rates) / max(rates),
        "to_stock": best["tokens_per_s"] / fastest(stock)["tokens_per_s"],
        "to_served": best["tokens_per_s"] / fastest(served)["tokens_per_s"],
        "to_stock_rounds": [rate / turn["tokens_per_s"] for rate, turn in zip(rates, stock, strict=True)],
        "to_served_rounds": [rate / turn["tokens_per_s"] for rate, turn in zip(rates, served, strict=True)],
    }


def fastest(turns: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return max(turns, key=lambda turn: turn["tokens_per_s"])


def one_text(alone_ms: Sequence[float], windows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One caller's median beside the median of preparing and embedding the same inputs in-process; milliseconds."""
    served = [window["p50_ms"] for window in windows]
    return {
        "in_process_ms": min(alone_ms),
        "service_p50_ms": min(served),
        "overhead_ms": min(served) - min(alone_ms),
        "overhead_rounds": [whole - part for whole, part in zip(served, alone_ms, strict=True)],
    }
