"""Checks of images: broken files, files that are small and cost much, and large ones that are allowed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable

from PIL import Image, UnidentifiedImageError

from tests.hardening.board import Outcome, Site, check
from tests.hardening.client import Client, Reply
from tests.hardening.corpus import NoCorpus, mutations, pillow_images
from tests.hosts import Process
from tests.image_files import SMALL

SEED = 20_240_607
LONGEST_S = 2.0
# What only an exception's text has: an address, a repr, a path, the name of a class or of a module.
_ECHO = re.compile(r"0x[0-9a-f]|[<>/\\\n]|[a-z][A-Z]|[a-z]\.[a-z]|[Ee]rr(or|no)")


# Servers without a guard


def with_errors_of_pillow() -> None:
    """with the decoder's exceptions as they are, but for the usual ones."""

    def decode(data: bytes, max_bytes: int, max_pixels: int) -> Image.Image:
        from app import image_decode

        try:
            return image_decode._decode(data, max_pixels)
        except (UnidentifiedImageError, OSError):
            raise image_decode.ImageInvalid("image file is damaged or cut short") from None

    _decode_with(decode)


def with_the_text_of_errors() -> None:
    """with the text of exceptions in messages."""

    def decode(data: bytes, max_bytes: int, max_pixels: int) -> Image.Image:
        from app import image_decode

        try:
            return image_decode._decode(data, max_pixels)
        except Exception as error:
            raise image_decode.ImageInvalid(str(error)) from None

    _decode_with(decode)


def _decode_with(decode: Callable[[bytes, int, int], Image.Image]) -> None:
    from app import preparation

    vars(preparation)["decode_image"] = decode


# Broken files


@check(
    "image corpus",
    "every file of Pillow's own tests, some of them to a model too",
    f"each 200 or 400 in JSON within {LONGEST_S:g} s; no exception's text in a message",
    with_errors_of_pillow,
    with_the_text_of_errors,
    quick=False,
)
def image_corpus(site: Site) -> Outcome:
    try:
        files = pillow_images()
    except NoCorpus as error:
        return Outcome(False, f"not run: Pillow's source distribution cannot be had: {error}")
    figure, passed = judged(ask(site.fake(), files.values()))
    sample = list(files.values())[::10]
    sampled, sample_passed = judged(ask(site.app(), sample))
    return Outcome(passed and sample_passed, f"{len(files)} files: {figure}; {len(sample)} to a model: {sampled}")


@check(
    "image mutations",
    "5,000 files of all formats, broken by chance",
    f"each 200 or 400 in JSON within {LONGEST_S:g} s; no exception's text in a message",
    with_errors_of_pillow,
    with_the_text_of_errors,
)
def image_mutations(site: Site) -> Outcome:
    files, of = list(SMALL.values()), "files made here"
    if not site.quick:
        try:
            files += [data for data in pillow_images().values() if 0 < len(data) < 20_000]
            of += " and Pillow's"
        except NoCorpus:
            of += " alone: there is no corpus"
    count = site.many(5000, 400)
    figure, passed = judged(ask(site.fake(), mutations(files, count, SEED)))
    return Outcome(passed, f"{count} of {of}: {figure}")


@check("echo", "60 broken files", "400, no message with an exception's text, an address or a path", with_the_text_of_errors)
def echo(site: Site) -> Outcome:
    broken: list[Reply] = []
    with Client(site.fake()) as client:
        for data in mutations(list(SMALL.values()), 600, SEED + 1):
            if (reply := client.image(data)).status != 200 and len(broken) < 60:
                broken.append(reply)
    figure, passed = judged(broken)
    return Outcome(passed and len(broken) == 60, f"{figure}; {len({reply.message for reply in broken})} different messages")


def ask(server: Process, files: Iterable[bytes]) -> list[Reply]:
    with Client(server) as client:
        return [client.image(data) for data in files]


def judged(replies: list[Reply]) -> tuple[str, bool]:
    """The figure, and whether every reply is one that a file may have."""
    kinds = Counter(reply.kind for reply in replies)
    telling = [reply.message for reply in replies if _ECHO.search(reply.message or "")]
    longest = max(reply.seconds for reply in replies)
    figure = f"{', '.join(f'{count} x {kind}' for kind, count in sorted(kinds.items()))}; slowest {longest:.2f} s"
    figure += f"; {len(telling)} messages tell too much" + (f", such as {telling[0]!r}" if telling else "")
    return figure, set(kinds) <= {"200", "400"} and longest < LONGEST_S and not telling
