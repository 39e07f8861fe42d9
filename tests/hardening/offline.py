"""The server as it is, but for image URLs: none of them is ever dialled. For a tool that makes up hosts."""

from __future__ import annotations

import runpy

if __name__ == "__main__":
    from app.image_fetch import ImageFetcher, ImageUnavailable

    async def fetch(self: ImageFetcher, url: str) -> bytes:
        raise ImageUnavailable("the image cannot be downloaded")

    ImageFetcher.fetch = fetch  # type: ignore[method-assign]
    runpy.run_module("app", run_name="__main__", alter_sys=True)
