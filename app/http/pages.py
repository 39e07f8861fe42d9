"""The pages that a browser shows: the playground and the API's document, and the folders of files that they load.

They lie in static/ as they are sent, and load nothing from elsewhere: the policy has the browser hold them to it. This module
knows nothing of what they show.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

from aiohttp import web

STATIC = Path(str(files("app"))) / "static"
# What each folder has by name: nothing else is served, whatever a path spells.
SHARED, DOCS, PLAYGROUND = (
    {file.name: file for file in (STATIC / folder).iterdir()} for folder in ("shared", "docs", "playground")
)
# The one policy of every page. Thumbnails of chosen images are blobs; nothing inline runs or styles.
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data: blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # Files of two versions never meet on a page: a cache that keeps one asks whether it still holds.
    "Cache-Control": "no-cache",
}
# The machine's own table of types may have others.
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


async def playground(request: web.Request) -> web.FileResponse:
    """GET /"""
    return file_reply(STATIC / "playground.html")


async def docs(request: web.Request) -> web.FileResponse:
    """GET /docs"""
    return file_reply(STATIC / "docs.html")


async def asset(folder: Mapping[str, Path], request: web.Request) -> web.FileResponse:
    """Answers with a file of a folder. Not aiohttp's add_static: its 404 is no JSON."""
    name = request.match_info["name"]
    if name not in folder:
        raise web.HTTPNotFound
    return file_reply(folder[name])


def file_reply(file: Path) -> web.FileResponse:
    """Makes a reply of a file, with the policy. A browser that has the file already gets 304."""
    return web.FileResponse(file, headers={**_HEADERS, "Content-Type": f"{_TYPES[file.suffix]}; charset=utf-8"})
