"""Image files for tests: small good ones, and bombs, which cost much memory or time where nothing is bounded."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image


def noise(size: tuple[int, int] = (24, 16), mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(7).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    return Image.fromarray(values, "RGBA").convert(mode)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">L", len(body)) + name + body + struct.pack(">L", zlib.crc32(name + body))


def png(width: int, height: int, pixels: bytes, before: bytes = b"") -> bytes:
    header = struct.pack(">LLBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = png_chunk(b"IHDR", header) + before + png_chunk(b"IDAT", zlib.compress(pixels, 9)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def tiff(fields: dict[int, tuple[int, int, int]], size: int, head: bytes = b"II*\x00") -> bytes:
    """A grey 100 x 100 TIFF; `fields` are tag -> (type, count, value or offset), and the file is filled up to `size`."""
    grey = {256: (4, 1, 100), 257: (4, 1, 100), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1), 277: (3, 1, 1)}
    grey |= {273: (4, 1, 1000), 278: (4, 1, 100), 279: (4, 1, 10_000)}
    entries = sorted((grey | fields).items())
    directory = b"".join(struct.pack("<HHLL", tag, *field) for tag, field in entries)
    return (head + struct.pack("<LH", 8, len(entries)) + directory + bytes(4)).ljust(size, b"\x01")


# Bombs


def comment_gif() -> bytes:
    gif = encode(noise(mode="P"), "GIF")
    place = gif.index(b",", 13 + 768)
    return gif[:place] + (b"!\xfe\x01x\x00" * 400_000) + gif[place:]


def disposing_gif(method: int) -> bytes:
    """A frame of 1.6 gigapixels that is to be disposed of before the next, in 36 bytes."""
    screen, control = b"GIF89a\x09\x00\x09\x00\x00\x00\x00", b"!\xf9\x04" + bytes((method << 2 | 1, 0, 0, 0, 0))
    return screen + control + struct.pack("<cHHHHB", b",", 0, 0, 40_000, 40_000, 0) + b"\x08\x01\x00\x00;"


def progressive_jpeg(scans: int) -> bytes:
    data = encode(Image.new("L", (64, 64), 128), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * scans + b"\xff\xd9"


def exif_jpeg() -> bytes:
    """A resolution of 25,000 numbers, in EXIF: Pillow would make an object of each."""
    values = struct.pack("<HHLLHHLLL", 0x11A, 5, 8000, 100, 0x128, 3, 1, 2, 0)
    exif = (b"Exif\0\0II*\0\x08\0\0\0\x02\0" + values).ljust(65_000, b"\x01")
    plain = encode(noise(), "JPEG")
    return plain[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + plain[20:]


def run_length_bmp(runs: int) -> bytes:
    """An RLE8 file, which Pillow decodes in Python, two bytes at a time."""
    size = struct.pack("<LllHHLLllLL", 40, 7000, 7000, 1, 8, 1, 0, 0, 0, 256, 256)
    return struct.pack("<2sLHHL", b"BM", 0, 0, 0, 54 + 1024) + size + bytes(1024) + b"\x01\x05" * runs


def webp_canvas() -> bytes:
    data = bytearray(encode(noise(), "WEBP", save_all=True, append_images=[noise().rotate(90)]))
    assert data[12:16] == b"VP8X"
    data[24:30] = (15_999).to_bytes(3, "little") * 2
    return bytes(data)


JPEG, GIF, BMP = encode(noise(), "JPEG"), encode(noise(), "GIF"), encode(noise(), "BMP")
LONG_TEXT = zlib.compress(bytes(64 * 2**20), 9)
SIDE = (4, 1, 100_000)
TILE = (4, 1, 30_000)
TILED = {259: (3, 1, 8), 324: (4, 1, 500), 325: (4, 1, 900)}

PIXELS, PIECES, VALUES = "pixels; the limit is 50,000,000", "made of too many pieces", "values; the limit is 200,000"
# Each with words of its refusal.
BOMBS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "png of 2.5 gigapixels": (PIXELS, lambda: png(50_000, 50_000, bytes(2**20))),
    "png with the largest size": (PIXELS, lambda: png(2**31 - 1, 2**31 - 1, b"")),
    "png text": ("damaged", lambda: png(9, 9, bytes(90), png_chunk(b"zTXt", b"k\0\0" + LONG_TEXT))),
    "png international text": ("damaged", lambda: png(9, 9, bytes(90), png_chunk(b"iTXt", b"k\0\1\0\0\0" + LONG_TEXT))),
    "png of empty chunks": (PIECES, lambda: png(9, 9, bytes(90), png_chunk(b"abCd", b"") * 400_000)),
    "jpeg of 4.3 gigapixels": (PIXELS, lambda: JPEG.replace(b"\x08\x00\x10\x00\x18", b"\x08\xff\xff\xff\xff")),
    "jpeg scans": ("more than 64 JPEG scans", lambda: progressive_jpeg(65)),
    "jpeg junk": (PIECES, lambda: b"\xff\xd8\xff\xe0\x00\x02" + b"\x01" * 4_000_000),
    "jpeg of exif segments": (PIECES, lambda: b"\xff\xd8" + b"\xff\xe1\x00\x09Exif\0\0x" * 400_000 + JPEG[2:]),
    "jpeg of comments": (PIECES, lambda: b"\xff\xd8" + b"\xff\xfe\x00\x03x" * 400_000 + JPEG[2:]),
    "gif screen": (PIXELS, lambda: b"GIF89a\xff\xff\xff\xff\x00\x00\x00" + GIF[13 + 768 :]),
    "gif frame": (PIXELS, lambda: b"GIF89a\x09\x00\x09\x00\x00\x00\x00,\x00\x00\x00\x00" + b"\xff" * 4 + b"\x00\x08\x00;"),
    "gif disposal": (PIXELS, lambda: disposing_gif(2)),
    "gif restoring": (PIXELS, lambda: disposing_gif(3)),
    "gif comments": (PIECES, comment_gif),
    "webp canvas": (PIXELS, webp_canvas),
    "bmp of 1.6 gigapixels": (PIXELS, lambda: BMP[:18] + struct.pack("<ll", 40_000, 40_000) + BMP[26:]),
    "bmp of runs": (PIECES, lambda: run_length_bmp(2_500_000)),
    "tiff of 10 gigapixels": (PIXELS, lambda: tiff({256: SIDE, 257: SIDE, 278: SIDE}, 20_000)),
    "tiff strips": (VALUES, lambda: tiff({278: (3, 1, 1), 273: (3, 900_000, 500)}, 2_000_000)),
    "tiff strips as bytes": (VALUES, lambda: tiff({278: (3, 1, 1), 273: (1, 1_900_000, 500)}, 2_000_000)),
    "tiff rationals": (VALUES, lambda: tiff({282: (5, 240_000, 500)}, 2_000_000)),
    "tiff tiles": ("tiles of 900,000,000 pixels", lambda: tiff(TILED | {322: TILE, 323: TILE}, 2000)),
    "tiff fields": ("more than 1,000 TIFF fields", lambda: tiff({40_000 + tag: (3, 1, 0) for tag in range(1000)}, 50_000)),
}


# Small ones


SMALL = {
    "PNG": encode(noise(), "PNG"),
    "JPEG": encode(noise(), "JPEG"),
    "progressive": encode(noise(), "JPEG", progressive=True),
    "GIF": encode(noise(), "GIF"),
    "WEBP": encode(noise(), "WEBP"),
    "lossless": encode(noise(mode="RGBA"), "WEBP", lossless=True),
    "BMP": encode(noise(), "BMP"),
    "TIFF": encode(noise(), "TIFF"),
    "deflate": encode(noise(), "TIFF", compression="tiff_adobe_deflate"),
}
