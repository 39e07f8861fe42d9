"""Reading a request's body: bounded in bytes and time, never inflated."""

from __future__ import annotations

import asyncio

from aiohttp import hdrs, web

from app.engine.memory import MemoryShare
from app.errors import BodyBroken, BodyCompressed, BodyTimeout, BodyTooLarge


async def read_body(request: web.Request, max_bytes: int, timeout_s: float, memory: MemoryShare) -> bytearray:
    """Reads the whole body, and copies it no more than once. The length that the headers announce is checked before anything is
    read; `memory` is charged for what comes.

    Raises BodyCompressed, BodyTooLarge, BodyTimeout, BodyBroken, and as MemoryShare does.
    """
    codings = (*_codings(request, hdrs.CONTENT_ENCODING), *_codings(request, hdrs.TRANSFER_ENCODING) - {"chunked"})
    if any(coding not in ("", "identity") for coding in codings):
        raise BodyCompressed
    if (request.content_length or 0) > max_bytes:
        raise BodyTooLarge(f"the body is larger than the limit of {max_bytes:,} bytes")
    if request.headers.get(hdrs.EXPECT):
        # As aiohttp's own: an interim reply is no part of the reply that follows.
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in request.content.iter_any():
                memory.add(len(chunk))
                body += chunk
                if len(body) > max_bytes:
                    raise BodyTooLarge(f"the body is larger than the limit of {max_bytes:,} bytes")
    except TimeoutError:
        raise BodyTimeout from None
    except (web.RequestPayloadError, ConnectionError):
        raise BodyBroken from None
    return body


def _codings(request: web.Request, header: str) -> set[str]:
    return {coding.strip(" \t").lower() for line in request.headers.getall(header, []) for coding in line.split(",")}
