"""How a check asks for a vector: one item over one connection, as often as it likes."""

from __future__ import annotations

import base64
import http.client
import json
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from tests.support.hosts import Process

# No reply takes longer than REQUEST_TIMEOUT_S.
_TIMEOUT_S = 90.0


@dataclass(frozen=True, slots=True)
class Reply:
    """`message` is an error's; None where the reply is none of the JSON forms."""

    status: int
    message: str | None
    seconds: float

    @property
    def kind(self) -> str:
        """For a count of replies."""
        return f"{self.status}" if self.message is not None else f"{self.status} that is no JSON"


class Client:
    """A connection that is kept, and opened again where the server closed it. A context manager."""

    def __init__(self, server: Process) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", server.port(), timeout=_TIMEOUT_S)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._connection.close()

    def image(self, file: bytes) -> Reply:
        """A file, as base64."""
        return self.embed({"type": "image_base64", "image_base64": base64.b64encode(file).decode()})

    def url(self, url: str) -> Reply:
        """An image at a URL."""
        return self.embed({"type": "image_url", "image_url": {"url": url}})

    def embed(self, item: Any) -> Reply:
        headers = {"Authorization": "Bearer sk-test"}
        body = json.dumps({"input": [item], "encoding_format": "base64"})
        started = time.monotonic()
        try:
            self._connection.request("POST", "/v1/embeddings", body, headers)
            reply = self._connection.getresponse()
            data = reply.read()
        except OSError:
            self._connection.close()
            raise
        return Reply(reply.status, _message(reply.status, data), time.monotonic() - started)


def _message(status: int, body: bytes) -> str | None:
    try:
        reply = json.loads(body)
        return "" if status == 200 else str(reply["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return None
