"""Checks of images: broken files, files that are small and cost much, and large ones that are allowed."""

from __future__ import annotations

import importlib
import io
import re
import resource
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from PIL import Image, UnidentifiedImageError

from tests.support.hosts import Process
from tests.support.image_files import BOMBS, SMALL, encode, png, png_chunk
from tests.tools.hardening.board import READY_S, Outcome, Site, check, peak_mib, reset_peak
from tests.tools.hardening.client import Client, Reply
from tests.tools.hardening.corpus import NoCorpus, mutations, pillow_images

SEED = 20_240_607
LONGEST_S = 2.0
# What only an exception's text has: an address, a repr, a path, the name of a class or of a module.
_ECHO = re.compile(r"0x[0-9a-f]|[<>/\\\n]|[a-z][A-Z]|[a-z]\.[a-z]|[Ee]rr(or|no)")


# Servers without a guard


def with_errors_of_pillow() -> None:
    """with the decoder's exceptions as they are, but for the usual ones."""

    def decode(data: bytes, max_bytes: int, max_pixels: int, *callbacks: Any) -> Image.Image:
        from app.media import image as image_decode

        try:
            return image_decode._decode(data, max_pixels, *callbacks)
        except (UnidentifiedImageError, OSError):
            raise image_decode.ImageInvalid("image file is damaged or cut short") from None

    _decode_with(decode)


def with_the_text_of_errors() -> None:
    """with the text of exceptions in messages."""

    def decode(data: bytes, max_bytes: int, max_pixels: int, *callbacks: Any) -> Image.Image:
        from app.media import image as image_decode

        try:
            return image_decode._decode(data, max_pixels, *callbacks)
        except Exception as error:
            raise image_decode.ImageInvalid(str(error)) from None

    _decode_with(decode)


def _decode_with(decode: Callable[..., Image.Image]) -> None:
    from app.engine import preparation

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
    limit = site.seconds(LONGEST_S)
    try:
        files = pillow_images()
    except NoCorpus as error:
        return Outcome(False, f"not run: Pillow's source distribution cannot be had: {error}")
    figure, passed = judged(ask(site.fake(), files.values()), limit)
    sample = list(files.values())[::10]
    sampled, sample_passed = judged(ask(site.app(), sample), limit)
    return Outcome(passed and sample_passed, f"{len(files)} files: {figure}; {len(sample)} to a model: {sampled}")


@check(
    "image mutations",
    "files of all formats, broken by chance",
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
    figure, passed = judged(ask(site.fake(), mutations(files, count, SEED)), site.seconds(LONGEST_S))
    return Outcome(passed, f"{count} of {of}: {figure}")


@check("echo", "60 broken files", "400, no message with an exception's text, an address or a path", with_the_text_of_errors)
def echo(site: Site) -> Outcome:
    broken: list[Reply] = []
    with Client(site.fake()) as client:
        for data in mutations(list(SMALL.values()), 600, SEED + 1):
            if (reply := client.image(data)).status != 200 and len(broken) < 60:
                broken.append(reply)
    figure, passed = judged(broken, site.seconds(LONGEST_S))
    return Outcome(passed and len(broken) == 60, f"{figure}; {len({reply.message for reply in broken})} different messages")


def ask(server: Process, files: Iterable[bytes]) -> list[Reply]:
    with Client(server) as client:
        return [client.image(data) for data in files]


def judged(replies: list[Reply], longest_s: float) -> tuple[str, bool]:
    """The figure, and whether every reply is one that a file may have."""
    kinds = Counter(reply.kind for reply in replies)
    telling = [reply.message for reply in replies if _ECHO.search(reply.message or "")]
    longest = max(reply.seconds for reply in replies)
    figure = f"{counted(kinds)}; slowest {longest:.2f} s"
    figure += f"; {len(telling)} messages tell too much" + (f", such as {telling[0]!r}" if telling else "")
    return figure, set(kinds) <= {"200", "400"} and longest < longest_s and not telling


def counted(kinds: Counter[str]) -> str:
    return ", ".join(f"{count} x {kind}" for kind, count in sorted(kinds.items()))


# Bombs


def without_the_limit_of_pixels() -> None:
    """without the limit of pixels, where 3 GiB are all there is."""
    from app.media import image as image_decode

    _limit_memory()
    image_decode._check_size = lambda width, height, max_pixels: None


def with_gifs_made_ready_for_their_next_frame() -> None:
    """with GIFs made ready for their next frame, where 3 GiB are all there is."""
    from PIL.GifImagePlugin import GifImageFile

    _limit_memory()
    importlib.import_module("app.media.image")  # which does away with it
    delattr(GifImageFile, "disposal_method")


def without_the_list_of_formats() -> None:
    """without the list of formats."""
    from app.media import image as image_decode

    vars(image_decode)["FORMATS"] = None


def without_the_meter_of_reads() -> None:
    """without the meter of a parser's reads."""
    from app.media import image as image_decode

    vars(image_decode)["_MeteredFile"] = type("File", (io.BytesIO,), {"reads_left": 0})


def without_the_limit_of_scans() -> None:
    """without the limit of a JPEG's scans."""
    from app.media import image as image_decode

    vars(image_decode)["_MAX_JPEG_SCANS"] = 1 << 30


def without_a_look_at_tiff_directories() -> None:
    """without the look at a TIFF's directory."""
    from app.media import image as image_decode

    image_decode._defused_tiff = lambda data, max_pixels: data


def _limit_memory() -> None:
    """What is not bounded must not take the machine with it."""
    resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))


def icon(side: int) -> bytes:
    """An ICO that says 256 x 256 and holds a PNG of another size."""
    inner = png(side, side, bytes(2**20))
    return struct.pack("<HHHBBBBHHLL", 0, 1, 1, 0, 0, 0, 0, 1, 32, len(inner), 22) + inner


def svg() -> bytes:
    """A billion laughs."""
    entities = "".join(f'<!ENTITY a{level} "{f"&a{level - 1};" * 10}">' for level in range(1, 10))
    return f'<!DOCTYPE svg [<!ENTITY a0 "ha">{entities}]><svg xmlns="http://www.w3.org/2000/svg"><text>&a9;</text></svg>'.encode()


def profile_png() -> bytes:
    return png(9, 9, bytes(90), png_chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(64 << 20), 9)))


# Formats that are small and large for other reasons than ours, and those that only Pillow reads.
OTHER_BOMBS: dict[str, Callable[[], bytes]] = {
    "png profile": profile_png,
    "ico around a png": lambda: icon(9000),
    "tga of runs": lambda: encode(Image.new("L", (7000, 7000)), "TGA", compression="tga_rle"),
    "svg": svg,
}
ALL_BOMBS = {name: make for name, (_, make) in BOMBS.items()} | OTHER_BOMBS
BOMBS_MIB = 200


@check(
    "bombs",
    f"{len(ALL_BOMBS)} files that are small and cost much",
    f"each 4xx in JSON within {LONGEST_S:g} s; memory under +{BOMBS_MIB} MiB",
    without_the_limit_of_pixels,
    with_gifs_made_ready_for_their_next_frame,
    without_the_list_of_formats,
    without_the_meter_of_reads,
    without_the_limit_of_scans,
    without_a_look_at_tiff_directories,
)
def bombs(site: Site) -> Outcome:
    files = {name: bytes(make()) for name, make in ALL_BOMBS.items()}
    with site.own("tests.support.fakes") as server:
        server.until_status("ok", READY_S)
        ask(server, SMALL.values())
        reset_peak(server)
        before = peak_mib(server)
        replies = dict(zip(files, ask(server, files.values()), strict=True))
        grown = peak_mib(server) - before
    figure, passed = judged(list(replies.values()), site.seconds(LONGEST_S))
    taken = [name for name, reply in replies.items() if reply.status != 400]
    figure += f"; memory +{grown:.0f} MiB" + (f"; not refused: {', '.join(taken)}" if taken else "")
    return Outcome(passed and not taken and grown < BOMBS_MIB, figure)


# Large images that are allowed


def beside_a_gpu() -> None:
    """on a machine whose cores are free for images."""
    from app.engine import threads

    threads.thread_count = lambda device, cores: threads.MAX_PREPARATION_THREADS


def without_a_budget_of_pixels() -> None:
    """with as many images decoded at once as there are threads."""
    from app.engine import engine

    vars(engine)["DECODED_AT_ONCE"] = 1000


def with_small_blocks() -> None:
    """with images in Pillow's own blocks of 16 MiB."""
    from app.media import image as image_decode

    image_decode._imaging.set_block_size(1 << 24)


LARGE_SIDE = 7000
DECODING_MIB = 1100


@check(
    "decode memory",
    "16 RGBA images of 49 megapixels at once, PNG and WEBP, to 8 threads",
    f"each 200; memory under +{DECODING_MIB:,} MiB",
    without_a_budget_of_pixels,
    with_small_blocks,
    quick=False,
)
def decode_memory(site: Site) -> Outcome:
    image = Image.new("RGBA", (LARGE_SIDE, LARGE_SIDE), (200, 100, 50, 128))
    # The file of WEBP has 38 bytes.
    files = [encode(image, "PNG"), encode(image, "WEBP", lossless=True, method=0, quality=0)] * site.many(8, 4)
    with site.own("app", beside_a_gpu) as server:
        server.until_status("ok", READY_S)
        ask(server, SMALL.values())
        reset_peak(server)
        before = peak_mib(server)
        with ThreadPoolExecutor(len(files)) as pool:
            replies = [reply for asked in pool.map(lambda file: ask(server, [file]), files) for reply in asked]
        grown = peak_mib(server) - before
    kinds = Counter(reply.kind for reply in replies)
    longest = max(reply.seconds for reply in replies)
    figure = f"{counted(kinds)}, the last after {longest:.0f} s; memory {before:.0f} +{grown:.0f} MiB"
    return Outcome(kinds == {"200": len(files)} and grown < DECODING_MIB, figure)
