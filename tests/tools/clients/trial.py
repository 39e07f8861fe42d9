"""What a client's program tries: each trial becomes a JSON line in the file TRIALS, beside the server's own reply to the same
request by plain HTTP. tests.tools.clients.judge compares the two.

It is imported in every client's environment, so it knows the standard library alone, and nothing of any client.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import re
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, Request, build_opener

# The servers: one that serves, one with a queue of one place, one that keeps texts waiting, one that is stopping.
BASE_URL, FULL_URL, SLOW_URL, DRAINING_URL = (os.environ[name] for name in ("BASE_URL", "FULL_URL", "SLOW_URL", "DRAINING_URL"))
API_KEY = os.environ["API_KEY"]
# An image that never comes.
HELD_IMAGE_URL = os.environ["HELD_IMAGE_URL"]
PHOTO = Path(os.environ["PHOTO"])
PHOTO_URL = os.environ["PHOTO_URL"]
TRIALS = Path(os.environ["TRIALS"])

MODEL = "Qwen3-VL-Embedding-2B"
TEXT = "A dog plays on the beach."
TEXTS = [TEXT, "海边的小狗", "<|im_end|> is plain text", "two\nlines", " white space ", "a" * 500]
INSTRUCTION = "Retrieve passages that answer the question."
WRONG_KEY = "sk-wrong"
TIMEOUT_S = 0.3
DEADLINE = {"X-Request-Timeout": "1"}
READY_S = 60.0

Vector = list[float]

_direct = build_opener(ProxyHandler({}))


def many(count: int) -> list[str]:
    """So many texts, each another."""
    return [f"document {index} of {count}" for index in range(count)]


def plain(
    body: dict[str, Any],
    *,
    url: str = BASE_URL,
    path: str = "/v1/embeddings",
    key: str = API_KEY,
    headers: dict[str, str] | None = None,
) -> dict[str, Any]:
    """The server's own reply, as JSON takes it."""
    sent = {"Authorization": f"Bearer {key}", **(headers or {})}
    try:
        with _direct.open(Request(url + path, json.dumps(body).encode(), sent), timeout=READY_S) as reply:
            parsed = json.load(reply)
    except HTTPError as refused:
        with refused:
            message = json.load(refused)["error"]["message"]
            return {"status": refused.code, "message": message, "retry_after": refused.headers["Retry-After"]}
    vectors = [row["embedding"] for row in parsed["data"]]
    return {"status": 200, "vectors": vectors, "tokens": parsed["usage"]["prompt_tokens"]}


# Trials


def vectors(tried: str, body: dict[str, Any], call: Callable[[], list[Vector]]) -> None:
    """The client must give what the server gives for `body`."""
    _record("vectors", tried, plain(body), call)


def tokens(tried: str, body: dict[str, Any], call: Callable[[], int]) -> None:
    """The client must count the prompt tokens that the server counts."""
    _record("tokens", tried, plain(body), call)


def value(tried: str, wanted: Any, call: Callable[[], Any]) -> None:
    """The client must give this very value; JSON has to have it."""
    _record("value", tried, wanted, call)


def refusal(
    tried: str,
    body: dict[str, Any],
    error: type[Exception],
    call: Callable[[], Any],
    **options: Any,
) -> None:
    """The client must raise `error` with the message that the server refuses `body` with. The options are those of `plain`."""
    _record("refusal", tried, plain(body, **options), call, error)


def overload(body: dict[str, Any], error: type[Exception], call: Callable[[int], list[Vector]]) -> None:
    """`call` asks the full server, with so many retries: one too few, and more than enough."""
    with full(refusals=2) as said:
        _record("refusal", "429 twice with one retry", said, lambda: call(1), error, retries=1)
    wanted = plain(body)
    with full(refusals=1) as said:
        _record("vectors", "429, then a retry", wanted | {"retry_after": said["retry_after"]}, lambda: call(9), retries=1)


def draining(body: dict[str, Any], error: type[Exception], call: Callable[[], Any]) -> None:
    """`call` asks the server that is stopping, with one retry."""
    _record("refusal", "503 twice with one retry", plain(body, url=DRAINING_URL), call, error, retries=1)


def timeout(error: type[Exception], call: Callable[[], Any]) -> None:
    """`call` asks the slow server, with TIMEOUT_S."""
    _record("exception", f"a timeout of {TIMEOUT_S} s", None, call, error)


def _record(
    kind: str, tried: str, wanted: Any, call: Callable[[], Any], error: type[Exception] | None = None, retries: int = 0
) -> None:
    """Call, and write down what came. `retries`: at the least so many, each after the time of Retry-After."""
    record: dict[str, Any] = {"kind": kind, "tried": tried, "wanted": wanted, "retries": retries}
    _waits.clear()
    try:
        record["got"] = call()
    except Exception as caught:
        record["raised"] = f"{type(caught).__module__}.{type(caught).__qualname__}"
        record["message"] = str(caught)
        record["is_expected"] = error is not None and isinstance(caught, error)
        if not record["is_expected"]:
            record["trace"] = traceback.format_exc()
    record["waits"] = list(_waits)
    with TRIALS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


# The retries of the openai package, on which every one of these clients stands: it says how long it will wait.

_waits: list[float] = []


class _Waits(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if found := re.search(r"^Retrying request\b.* in (\S+) seconds", record.getMessage()):
            _waits.append(float(found[1]))


_retries = logging.getLogger("openai._base_client")
_retries.setLevel(logging.INFO)
_retries.propagate = False
_retries.addHandler(_Waits())


# The full server


@contextmanager
def full(refusals: int) -> Iterator[dict[str, Any]]:
    """The full server's one place is taken, by an image that never comes, until it has refused so many requests. Yields what it
    says to plain HTTP meanwhile."""
    holder = http.client.HTTPConnection(urlsplit(FULL_URL).netloc)
    body = json.dumps({"input": {"image": HELD_IMAGE_URL}})
    holder.request("POST", "/v1/embeddings", body, {"Authorization": f"Bearer {API_KEY}"})
    _until(lambda: _metric("embedding_queue_depth") == 1)
    said = plain({"input": TEXT}, url=FULL_URL)
    enough = _metric(_REFUSED) + refusals
    over = threading.Event()

    def release() -> None:
        while _metric(_REFUSED) < enough and not over.wait(0.02):
            pass
        holder.close()

    thread = threading.Thread(target=release)
    thread.start()
    try:
        yield said
    finally:
        over.set()
        thread.join()
        _until(lambda: _metric("embedding_queue_depth") == 0)


_REFUSED = 'embedding_rejected_total{reason="overloaded"}'


def _metric(name: str) -> float:
    with _direct.open(f"{FULL_URL}/metrics", timeout=READY_S) as reply:
        found = re.search(rf"^{re.escape(name)} (\S+)$", reply.read().decode(), re.MULTILINE)
    return float(found[1]) if found else 0.0


def _until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + READY_S
    while not condition():
        if time.monotonic() > until:
            raise TimeoutError("the full server does not come to the state that is waited for")
        time.sleep(0.02)
