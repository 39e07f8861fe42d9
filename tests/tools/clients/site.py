"""The servers that the clients' programs ask, and the hosts of images that they fetch from."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection

from tests.support.hosts import Process, image_host, process
from tests.support.paths import CHECKPOINT, ROOT
from tests.tools.hardening.background import background, listening

CONFORMANCE = ROOT / "tests" / "conformance"
PHOTO, ANOTHER_PHOTO = CONFORMANCE / "cases" / "rgb.jpg", CONFORMANCE / "cases" / "wide.jpg"
KEY = "sk-clients"
READY_S = 120.0
# Longer than all clients take together: what is held is held until the end.
HELD_S = "3600"


@dataclass(frozen=True, slots=True)
class Site:
    """What a program finds in its environment."""

    variables: Mapping[str, str]


@contextmanager
def site() -> Iterator[Site]:
    """Four servers of the miniature checkpoint: one that serves, one with a queue of one place, one that keeps texts waiting for
    others, and one that is stopping but cannot, since it has accepted an image that never comes."""
    with ExitStack() as stack:
        photos = stack.enter_context(background(lambda: image_host(photo=ANOTHER_PHOTO.read_bytes())))
        held = stack.enter_context(background(lambda: listening(_hold, "127.0.0.1", 0)))
        held_url = f"http://127.0.0.1:{held}/held.png"

        def server(**settings: str) -> Process:
            given = {"API_KEY": KEY, "MODEL_PATH": str(CHECKPOINT), "DEVICE": "cpu"}
            return stack.enter_context(process("app", **given, **settings))

        waits = {"IMAGE_FETCH_TIMEOUT_S": HELD_S, "REQUEST_TIMEOUT_S": HELD_S, "IMAGE_URL_ALLOWED_HOSTS": f"127.0.0.1:{held}"}
        servers = {
            "BASE_URL": server(IMAGE_URL_ALLOWED_HOSTS=photos.host),
            "FULL_URL": server(MAX_QUEUE_SIZE="1", **waits),
            "SLOW_URL": server(MAX_BATCH_WAIT_MS="60000"),
            "DRAINING_URL": server(SHUTDOWN_TIMEOUT_S=HELD_S, **waits),
        }
        for one in servers.values():
            one.until_status("ok", READY_S)
        stack.callback(_drain(servers["DRAINING_URL"], held_url).close)
        urls = {name: f"http://127.0.0.1:{one.port()}" for name, one in servers.items()}
        others = {"API_KEY": KEY, "PHOTO": str(PHOTO), "PHOTO_URL": photos.url("/photo.png"), "HELD_IMAGE_URL": held_url}
        yield Site(urls | others)


async def _hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer nothing, for as long as the other side waits."""
    try:
        await reader.read()
    finally:
        writer.close()


def _drain(server: Process, held_url: str) -> HTTPConnection:
    """Give a server a request that it cannot finish, and ask it to stop. Returns the request's connection."""
    connection = HTTPConnection("127.0.0.1", server.port())
    body = json.dumps({"input": {"image": held_url}})
    connection.request("POST", "/v1/embeddings", body, {"Authorization": f"Bearer {KEY}"})
    until = time.monotonic() + READY_S
    while server.request("/health")[2]["queue_depth"] == 0:
        assert time.monotonic() < until, server.stderr
        time.sleep(0.02)
    server.popen.terminate()
    server.until_status("draining")
    return connection
