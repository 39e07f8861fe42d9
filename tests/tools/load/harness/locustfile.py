"""For locust: users that each have one request under way, and check every reply.

    export API_KEY=sk-... BODIES=bodies
    locust --locustfile tests/tools/load/harness/locustfile.py --host http://localhost:6008 \\
        --headless --users 64 --spawn-rate 64 --run-time 60s --only-summary TextUser HealthUser

The classes that are named take part: TextUser, MixedUser, ImageUser, HealthUser. With RATE=2 each user starts two requests a
second, where it can; without it the next one follows the reply. It ends with 1 where a reply was not the right one. Knows nothing
of the project: it runs in an environment of its own, which has locust alone.
"""

import itertools
import os
import random
from collections.abc import Iterator
from pathlib import Path

from locust import FastHttpUser, constant, constant_throughput, task

BODIES = Path(os.environ.get("BODIES", "bodies"))
HEADERS = {"Authorization": f"Bearer {os.environ.get('API_KEY', '')}", "Content-Type": "application/json"}
RATE = float(os.environ.get("RATE", "0"))


def requests(scenario: str) -> Iterator[tuple[int, bytes]]:
    """The requests of a scenario without end, each user from a place of its own; (vectors, body)."""
    lines = (BODIES / f"{scenario}.tsv").read_bytes().splitlines()
    start = random.randrange(len(lines))
    for line in itertools.cycle(lines[start:] + lines[:start]):
        vectors, _, body = line.partition(b"\t")
        yield int(vectors), body


class User(FastHttpUser):
    abstract = True
    wait_time = constant_throughput(RATE) if RATE else constant(0)


class EmbeddingUser(User):
    """Sends one scenario."""

    abstract = True
    scenario = ""

    def on_start(self) -> None:
        self.requests = requests(self.scenario)

    @task
    def embed(self) -> None:
        vectors, body = next(self.requests)
        options = {"data": body, "headers": HEADERS, "name": self.scenario, "catch_response": True}
        with self.client.post("/v1/embeddings", **options) as reply:
            if reply.status_code == 429:
                reply.failure("429: the queue is full")
            # Any other status but 200 is a failure by itself.
            elif reply.status_code == 200 and (count := len(reply.json()["data"])) != vectors:
                reply.failure(f"{count} vectors instead of {vectors}")


class TextUser(EmbeddingUser):
    scenario = "text"


class MixedUser(EmbeddingUser):
    scenario = "mixed"


class ImageUser(EmbeddingUser):
    scenario = "image"


class HealthUser(User):
    """One probe a second, however busy the server is."""

    fixed_count = 1
    wait_time = constant_throughput(1)

    @task
    def probe(self) -> None:
        self.client.get("/health/live", name="health")
