"""The transport to a running service. No other module of the command knows HTTP."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import numpy as np
import orjson
from yarl import URL

from app.bulk.embedder import Answer, Away, Problem
from app.bulk.ending import refused
from app.bulk.rows import Vector
from app.settings import Settings

# For a whole request: longer than any sensible REQUEST_TIMEOUT_S of the service, which ends it first.
_REQUEST_TIMEOUT_S = 600.0
_CONNECT_TIMEOUT_S = 10.0


class OverHttp:
    """A Transport over HTTP to the service at `url`."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self.name = url
        self._session = session
        self._url = endpoint(url)

    async def post(self, body: bytes) -> Answer:
        try:
            # As a file, since aiohttp warns if a body is more than 1 MiB of bytes.
            async with self._session.post(self._url, data=io.BytesIO(body), allow_redirects=False) as reply:
                raw = await reply.read()
        except aiohttp.ClientConnectorCertificateError as error:
            why = f"the certificate of {self.name} is not trusted: {error.certificate_error}"
            raise refused(f"{why} (SSL_CERT_FILE, in the environment, may name a file of other authorities)") from None
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise Away(_reason(error)) from None
        if reply.status != 200:
            return Answer(reply.status, problem=_problem(_json_object(raw).get("error"), reply))
        value = _json_object(raw)
        try:
            rows = _rows(value["data"])
        except (KeyError, TypeError, ValueError):
            raise refused(f"{self.name} does not answer as an embeddings API does") from None
        model = value.get("model")
        fingerprint = reply.headers.get("X-Model-Fingerprint") or None
        return Answer(200, rows, fingerprint=fingerprint, model=model if isinstance(model, str) else None)


@asynccontextmanager
async def over_http(settings: Settings, url: str, concurrency: int) -> AsyncIterator[OverHttp]:
    """Open a transport to the service at `url`, with the first key of the settings and at most `concurrency` connections."""
    headers = {"Content-Type": "application/json"}
    if settings.api_keys:
        headers["Authorization"] = f"Bearer {settings.api_keys[0].key.decode()}"
    async with aiohttp.ClientSession(
        headers=headers,
        connector=aiohttp.TCPConnector(limit=concurrency),
        timeout=aiohttp.ClientTimeout(total=_REQUEST_TIMEOUT_S, sock_connect=_CONNECT_TIMEOUT_S),
    ) as session:
        yield OverHttp(session, url)


def endpoint(url: str) -> str:
    """Return the URL of a service's embeddings; `url` may end in /v1. Raises Stopped if it is no URL of a service."""
    if not url.lower().startswith(("http://", "https://")):
        raise refused("--url must begin with http:// or https://")
    try:
        parsed = URL(url)
    except ValueError:
        raise refused("--url is no address of a service") from None
    if not parsed.host:
        raise refused("--url names no host")
    if parsed.user is not None or parsed.password is not None:
        raise refused("--url must hold no user name and no password; the key is the first of API_KEY, a setting")
    if parsed.query_string or parsed.fragment:
        raise refused("--url must end with the path")
    base = url.rstrip("/").removesuffix("/embeddings").removesuffix("/v1")
    return f"{base}/v1/embeddings"


def _rows(data: Sequence[dict[str, Any]]) -> list[Vector | Problem]:
    """Return the rows of a reply by index. Raises KeyError, TypeError or ValueError if it is no embeddings reply."""
    rows = sorted(data, key=lambda row: row["index"])
    if any(row["index"] != index for index, row in enumerate(rows)):
        raise ValueError("the indexes are not 0 to the number of rows")
    return [_problem(row["error"]) if row.get("embedding") is None else _vector(row["embedding"]) for row in rows]


def _vector(embedding: str | list[float]) -> Vector | Problem:
    """Return a vector, given as base64 or as numbers, or the problem that it is not finite. Raises ValueError or TypeError."""
    if isinstance(embedding, str):
        vector = np.frombuffer(base64.b64decode(embedding), "<f4")
    else:
        vector = np.asarray(embedding, dtype=np.float32)
    if vector.ndim != 1 or not vector.size:
        raise ValueError("it is no vector")
    return vector if np.isfinite(vector).all() else Problem("the vector has components that are not finite")


def _problem(error: Any, reply: aiohttp.ClientResponse | None = None) -> Problem:
    """Return the problem that an error object says, of a row or of a reply. An error of another form counts as empty; the message
    is then the reply's reason."""
    fields = error if isinstance(error, dict) else {}
    message = str(fields.get("message") or (reply.reason if reply else None) or "no reason is given")
    kind, param = (value if isinstance(value := fields.get(key), str) else None for key in ("type", "param"))
    return Problem(message, kind, param, _retry_after(reply.headers.get("Retry-After")) if reply else None)


def _retry_after(text: str | None) -> float | None:
    """Return the seconds of a Retry-After header, None if it is missing or a date."""
    try:
        value = float(text or "nan")
    except ValueError:
        return None
    return max(0.1, value) if math.isfinite(value) else None


def _json_object(raw: bytes) -> dict[str, Any]:
    """Parse a JSON object. Anything else counts as an empty one."""
    try:
        value = orjson.loads(raw)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "it does not answer in time"
    if isinstance(error, aiohttp.ClientConnectorError):
        return f"cannot connect: {error.os_error.strerror or error.os_error}"
    return str(error) or type(error).__name__
