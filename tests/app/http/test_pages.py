"""app.http.pages: the playground and the document's page, the files that they load, and that they load nothing else."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from urllib.parse import urljoin

import pytest
from aiohttp.multipart import CIMultiDictProxy

from tests.conftest import Client, Serve
from tests.support.hosts import connect

PAGES = ["/", "/docs"]
TYPES = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
# An address of a namespace is a name: nothing is ever fetched from it.
NAMES = {"http://www.w3.org/2000/svg"}


async def fetch(client: Client, path: str) -> tuple[int, CIMultiDictProxy[str], str]:
    async with client.request("GET", path, headers={"Authorization": ""}) as reply:
        return reply.status, reply.headers, await reply.text()


def loaded_by(address: str, text: str) -> set[str]:
    """The paths that a page's tags, or a script's imports, name."""
    found = re.findall(r"<(?:script|link|img)\b[^>]*?(?:src|href)=\"([^\"]+)\"", text)
    found += re.findall(r"^(?:import|export) .*?from \"([^\"]+)\";$", text, re.MULTILINE)
    return {urljoin(address, one) for one in found}


async def all_files(client: Client, page: str) -> dict[str, str]:
    """Every file of a page by its path: those that it names, and those that they name in turn."""
    texts: dict[str, str] = {}
    wanted = [page]
    while wanted:
        path = wanted.pop()
        if path not in texts:
            status, _, texts[path] = await fetch(client, path)
            assert status == 200, path
            wanted.extend(loaded_by(path, texts[path]))
    return texts


def directives(policy: str) -> dict[str, list[str]]:
    return {name: values for name, *values in (directive.split() for directive in policy.split(";"))}


@pytest.mark.parametrize("page", PAGES)
async def test_a_page_and_its_policy(client: Client, page: str) -> None:
    status, headers, text = await fetch(client, page)
    assert status == 200
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["Cache-Control"] == "no-cache"
    assert directives(headers["Content-Security-Policy"]) == {
        "default-src": ["'none'"],
        "script-src": ["'self'"],
        "style-src": ["'self'"],
        "img-src": ["'self'", "data:", "blob:"],
        "connect-src": ["'self'"],
        "base-uri": ["'none'"],
        "form-action": ["'none'"],
        "frame-ancestors": ["'none'"],
    }
    # What the policy would block anyhow.
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\son\w+=|\sstyle=", text)


@pytest.mark.parametrize("page", PAGES)
async def test_its_files_are_served_with_their_types(client: Client, page: str) -> None:
    paths = (await all_files(client, page)).keys() - {page}
    assert len(paths) >= 5
    for path in paths:
        assert path.startswith("/assets/")
        status, headers, text = await fetch(client, path)
        assert (status, headers["Content-Type"]) == (200, f"{TYPES[path.rpartition('.')[2]]}; charset=utf-8")
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cache-Control"] == "no-cache"
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert text


@pytest.mark.parametrize("page", PAGES)
async def test_nothing_of_it_names_another_host(client: Client, page: str) -> None:
    for path, text in (await all_files(client, page)).items():
        assert set(re.findall(r"(?:https?:)?//[\w-]+\.[^\s\"'`)]+", text)) <= NAMES, path
        assert "@import" not in text
        assert not re.search(r"\burl\(", text)


async def test_every_file_that_lies_there_is_of_a_page(client: Client) -> None:
    used = {path.removeprefix("/assets/") for page in PAGES for path in await all_files(client, page)}
    static = Path(str(files("app"))) / "static"
    kept = {file.relative_to(static).as_posix() for file in static.rglob("*") if file.is_file()}
    assert kept == used - set(PAGES) | {"playground.html", "docs.html"}


@pytest.mark.parametrize(
    "name",
    [
        *("__init__.py", "..%2Fauth.py", "%2e%2e/auth.py", "docs.html", "playground.html", "docs.js", "static", "."),
        *("docs/..%2Fdocs.html", "docs/%2e%2e/docs.html", "docs/../docs.html", "docs/docs.js%00", "shared/nothing.js"),
    ],
)
async def test_nothing_else_is_served(client: Client, name: str) -> None:
    async with connect(client.port) as raw:
        await raw.send(f"GET /assets/{name} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
        reply = await raw.reply()
    assert reply.status == 404
    assert reply.error["code"] == "not_found"


async def test_the_pages_link_to_each_other(client: Client) -> None:
    for page, other in (("/", "docs"), ("/docs", "./")):
        assert f'href="{other}"' in (await fetch(client, page))[2]


# PLAYGROUND=false


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
async def test_without_the_playground_its_path_is_like_any_other(serve: Serve, method: str) -> None:
    client = await serve(playground=False)
    async with client.request(method, "/") as reply, client.request(method, "/nothing") as other:
        assert reply.status == other.status == 404
        assert await reply.read() == await other.read()


async def test_without_the_playground_the_other_page_is_whole(serve: Serve) -> None:
    client = await serve()
    own = (await all_files(client, "/")).keys() - (await all_files(client, "/docs")).keys() - {"/"}
    without = await serve(playground=False)
    assert own and all(path.startswith("/assets/playground/") for path in own)
    for path in own:
        assert (await fetch(without, path))[0] == 404, path
    assert await all_files(without, "/docs") == await all_files(client, "/docs")
    assert "/" not in (await without.get("/openapi.json"))[1]["paths"]
