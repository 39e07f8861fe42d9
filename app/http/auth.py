"""Bearer keys: who may use the protected routes."""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from aiohttp import web
from aiohttp.typedefs import Handler

from app.errors import Unauthorized
from app.http.keys import LOG, ROUTES, SETTINGS
from app.settings import ApiKey


@web.middleware
async def auth_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuses a protected route without a right key, before its body is read. Unknown paths and methods need none."""
    settings = request.app[SETTINGS]
    resource = request.match_info.route.resource
    row = request.app[ROUTES].get(resource.canonical) if resource else None
    if row and not row.public and not settings.auth_disabled:
        request[LOG].key_name = check_key(request.headers.getall("Authorization", []), settings.api_keys)
    return await handler(request)


def check_key(headers: Sequence[str], keys: Sequence[ApiKey]) -> str:
    """Returns the name of the key that the one Authorization header carries. Raises Unauthorized."""
    scheme, _, token = (headers[0] if len(headers) == 1 else "").partition(" ")
    if scheme.lower() != "bearer":
        raise Unauthorized
    # Header bytes that are not UTF-8 come as surrogates. Every key is compared, in constant time: none is found out by timing.
    given = token.strip(" \t").encode("utf-8", "surrogateescape")
    matches = [key.name for key in keys if hmac.compare_digest(given, key.key)]
    if not matches:
        raise Unauthorized
    return matches[0]
