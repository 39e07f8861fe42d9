"""The server as it is, but for image URLs: none of them is ever dialled. For a tool that makes up hosts."""

from __future__ import annotations

import runpy
from typing import NoReturn

import aiohttp

if __name__ == "__main__":

    async def refuse(self: aiohttp.ClientSession, *arguments: object, **options: object) -> NoReturn:
        raise aiohttp.ClientConnectionError

    # Of the library, not of the app: whatever a download is called there, it comes by here.
    assert hasattr(aiohttp.ClientSession, "_request")
    aiohttp.ClientSession._request = refuse  # type: ignore[method-assign]
    runpy.run_module("app", run_name="__main__", alter_sys=True)
