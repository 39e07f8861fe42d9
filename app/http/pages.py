"""The pages that a browser shows: the playground and the API's document, and the files that they load.

They lie in static/ as they are sent, and load nothing from elsewhere: the policy has the browser hold them to it. This module
knows nothing of what they show.
"""

from __future__ import annotations

from importlib.resources import files

from aiohttp import web

from app.http.keys import SETTINGS

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
_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}

_SHARED = frozenset({"page.css", "dom.js", "theme.js", "icon.svg"})
_DOCS = frozenset({"docs.css", "docs.js"})
_PLAYGROUND = frozenset(
    {
        "playground.css",
        "playground.js",
        "api.js",
        "chart.js",
        "code.js",
        "files.js",
        "heatmap.js",
        "inputs.js",
        "metrics.js",
        "numbers.js",
        "poll.js",
        "problems.js",
        "result.js",
        "status.js",
        "watch.js",
    }
)


async def playground(request: web.Request) -> web.Response:
    """GET /"""
    return file_reply("playground.html")


async def docs(request: web.Request) -> web.Response:
    """GET /docs"""
    return file_reply("docs.html")


async def asset(request: web.Request) -> web.Response:
    """GET /assets/{name}"""
    name = request.match_info["name"]
    served = _SHARED | _DOCS | (_PLAYGROUND if request.app[SETTINGS].playground else frozenset())
    if name not in served:
        raise web.HTTPNotFound
    return file_reply(name)


def file_reply(name: str) -> web.Response:
    headers = {
        "Content-Security-Policy": _POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        # Files of two versions never meet on a page: a cache that keeps one asks whether it still holds.
        "Cache-Control": "no-cache",
    }
    body = files("app").joinpath("static", name).read_bytes()
    return web.Response(body=body, content_type=_TYPES[name.rpartition(".")[2]], charset="utf-8", headers=headers)
