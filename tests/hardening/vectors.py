"""Requests for embeddings over the wire, many at a time, and what their vectors are compared with."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import numpy as np
import numpy.typing as npt

from tests.hosts import Process

# Below it two vectors are not the same input's.
SAME = 0.9999

Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Reply:
    """What came for one body. `vectors` are float32 of shape (inputs, width), none where there are none."""

    status: int
    body: Any

    @property
    def vectors(self) -> Vectors:
        if self.status != 200:
            return np.empty((0, 0), dtype=np.float32)
        return np.stack([decoded(row["embedding"]) for row in self.body["data"]])


def decoded(embedding: str | list[float]) -> Vectors:
    if isinstance(embedding, str):
        return np.frombuffer(base64.b64decode(embedding), dtype="<f4")
    return np.array(embedding, dtype=np.float32)


def embed_all(server: Process, bodies: Sequence[Any], concurrency: int, path: str = "/v1/embeddings") -> list[Reply]:
    """The replies to all bodies, in order, so many under way at a time."""
    return asyncio.run(_embed_all(f"http://127.0.0.1:{server.port()}", bodies, concurrency, path))


async def _embed_all(url: str, bodies: Sequence[Any], concurrency: int, path: str) -> list[Reply]:
    replies: list[Reply | None] = [None] * len(bodies)
    waiting = iter(range(len(bodies)))

    async def call() -> None:
        for index in waiting:
            async with session.post(path, json=bodies[index]) as reply:
                replies[index] = Reply(reply.status, await reply.json())

    connector = aiohttp.TCPConnector(limit=concurrency)
    async with aiohttp.ClientSession(url, connector=connector, headers={"Authorization": "Bearer sk-test"}) as session:
        await asyncio.gather(*(call() for _ in range(concurrency)))
    return [reply for reply in replies if reply is not None]


def cosines(ours: Vectors, theirs: Vectors) -> npt.NDArray[np.float32]:
    """Of each row with the row of the same place; all are of length 1."""
    product: npt.NDArray[np.float32] = np.sum(ours * theirs, axis=1)
    return product


def solo_vectors(server: Process, bodies: Sequence[Any]) -> list[Vectors]:
    """What each body gets with nobody beside it."""
    return [reply.vectors for reply in embed_all(server, bodies, 1)]
