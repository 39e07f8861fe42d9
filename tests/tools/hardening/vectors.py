"""Requests for embeddings over the wire, many at a time, and what their vectors are compared with."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import numpy as np
import numpy.typing as npt

from tests.support.hosts import Process
from tests.tools.hardening.wire import error_object

# Below it two vectors are not the same input's.
SAME = 0.9999

Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Reply:
    """What came for one body."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Of a reply that is 200; else none."""
        found: list[dict[str, Any]] = json.loads(self.body)["data"] if self.status == 200 else []
        return found

    @property
    def vectors(self) -> list[Vectors | None]:
        """Float32 of shape (width,) for each input, None for a row with an error; none where the reply is not 200."""
        return [None if row["embedding"] is None else decoded(row["embedding"]) for row in self.rows]

    def __str__(self) -> str:
        good = self.status == 200 or (self.headers.get("X-Request-Id") and error_object(self.body))
        return f"{self.status}{'' if self.status == 200 else ' JSON' if good else ' in no form'}"


def decoded(embedding: str | list[float]) -> Vectors:
    if isinstance(embedding, str):
        return np.frombuffer(base64.b64decode(embedding), dtype="<f4")
    return np.array(embedding, dtype=np.float32)


def embed_all(server: Process, bodies: Sequence[Any], concurrency: int, path: str = "/v1/embeddings") -> list[Reply]:
    """The replies to all bodies, bytes or what JSON can say, in order, so many under way at a time."""
    return asyncio.run(_embed_all(f"http://127.0.0.1:{server.port()}", bodies, concurrency, path))


async def _embed_all(url: str, bodies: Sequence[Any], concurrency: int, path: str) -> list[Reply]:
    replies: list[Reply | None] = [None] * len(bodies)
    waiting = iter(range(len(bodies)))

    async def call() -> None:
        for index in waiting:
            body = bodies[index]
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            async with session.post(path, data=data) as reply:
                replies[index] = Reply(reply.status, reply.headers, await reply.read())

    connector = aiohttp.TCPConnector(limit=concurrency)
    async with aiohttp.ClientSession(url, connector=connector, headers={"Authorization": "Bearer sk-test"}) as session:
        await asyncio.gather(*(call() for _ in range(concurrency)))
    return [reply for reply in replies if reply is not None]


def solo_vectors(server: Process, bodies: Sequence[Any]) -> list[Vectors]:
    """What each body of one input gets with nobody beside it. Raises where one gets none."""
    found = [vector for reply in embed_all(server, bodies, 1) for vector in reply.vectors]
    assert len(found) == len(bodies), "an input got no vector even alone"
    return [vector for vector in found if vector is not None]


def same(ours: Vectors | None, theirs: Vectors) -> bool:
    return cosine(ours, theirs) > SAME


def cosine(ours: Vectors | None, theirs: Vectors) -> float:
    """Of two unit vectors; -1 where there is none, or of another width."""
    if ours is None or ours.shape != theirs.shape or not np.isfinite(ours).all():
        return -1.0
    return float(ours @ theirs)
