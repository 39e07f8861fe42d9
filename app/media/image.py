"""The bytes of an image file -> an RGB image, within limits of format, bytes, pixels and shape.

Pixels are those of the official embedder. It knows neither HTTP nor the model, may run in many threads at once, and never lets a
small file cost much memory or time: what Pillow and its libraries leave unbounded is bounded here.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import re
import struct
import warnings
from collections.abc import Callable, Iterator
from itertools import islice

from PIL import GifImagePlugin, Image, JpegImagePlugin, UnidentifiedImageError, _imaging

Size = tuple[int, int]

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
# qwen_vl_utils.vision_process.MAX_RATIO (0.0.14): smart_resize raises above it. Written here, since importing that needs torch.
MAX_ASPECT_RATIO = 200

# A read costs a parser of Pillow's, all Python, about a microsecond: files of millions of empty chunks, comments or one-byte
# segments hold a thread for minutes. Real headers take under a thousand; pixels are read in large blocks, except by BMP's RLE.
_HEADER_READS = 20_000
_PIXEL_READS = 2_000_000
# Encoders write 1 to about 20. Each scan may fill 75 bytes and take 30 ms for 50 megapixels, so 20 MiB would take hours.
_MAX_JPEG_SCANS = 64
_JPEG_SCAN = re.compile(rb"\xff\xda\x00[\x08\x0a\x0c\x0e][\x01-\x04]")
# Marker, length, count, two bytes for each of four components, and three more.
_SCAN_HEAD = 16
_JPEG_EXIF = re.compile(rb"\xff\xe1..(?P<name>Exif)\x00\x00", re.DOTALL)
# Files are searched so many bytes at a time: a search keeps the interpreter's lock, and must not stop the event loop for long.
# The pieces overlap by more than a match is long.
_SEARCHED = 1 << 18
_OVERLAP = 16
# Decoders take 4 to 9 bytes for a pixel, WEBP's 20.
_PIXELS_WORTH = {"WEBP": 2}
# How many times the reduced size a JPEG has at least when it is decoded at a half, a quarter or an eighth of its size. Of a
# photograph the resized pixels are a level or two apart then, 0.07 on average; of a scanned page six at most (cosine 0.99999).
_DRAFT_GAP = 2
# Rows that are composited at a time.
_STRIP = 256

# Byte order and pointer position, then the codes of pointer, entry count and entry. Headers that Pillow and libtiff do not read
# alike are left out.
_TIFF_LAYOUTS = {
    b"II*\x00": ("<", 4, "L", "H", "HHL4s"),
    b"MM\x00*": (">", 4, "L", "H", "HHL4s"),
    b"II+\x00": ("<", 8, "Q", "Q", "HHQ8s"),
}
_MAX_TIFF_ENTRIES = 1000
# Pillow makes an object of every value, 60 to 400 bytes each. The largest real field is a 16-bit transfer function of 196,608.
_MAX_TIFF_VALUES = 200_000
_TIFF_BYTES_KINDS = frozenset({1, 2, 7})  # BYTE, ASCII, UNDEFINED: kept as bytes
_TIFF_OFFSETS = frozenset({273, 324})  # StripOffsets, TileOffsets
_TIFF_TILE_SIDES = frozenset({322, 323})
_TIFF_METADATA = frozenset({34665, 34853, 40965})  # pointers to EXIF, GPS and Interoperability

_UNREADABLE = f"image is not a readable {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file"
_BROKEN = "image file is damaged or cut short"

# Ours is the limit that rules, checked before pixels are decoded: Pillow's is global and would refuse what the settings allow.
Image.MAX_IMAGE_PIXELS = None
# What to lay over a GIF's frame before the next, Pillow makes while it reads the header, before any size is checked: 4 GiB for a
# file of 36 bytes. Only the first frame is read here, so there is nothing to lay.
GifImagePlugin.GifImageFile.disposal_method = property(lambda image: 0, lambda image, method: None)  # type: ignore[assignment]
# Pillow keeps an image in blocks of 16 MiB. Freed, the C library keeps those for the thread that had them: eight threads held
# 3.7 GB of images that were gone. A block as large as the image goes back to the system.
_imaging.set_block_size(1 << 28)
# Pillow logs what it finds in files, at error level too: words of strangers, as many as they like.
logging.getLogger("PIL").setLevel(logging.CRITICAL)

# So does libtiff, from C straight to stderr. Its symbols are found through Pillow's, which has loaded it; where a build of Pillow
# hides them the lines stay, and nothing else changes.
with contextlib.suppress(AttributeError, OSError):
    ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler(None)

_PIL_WARNINGS = ("ignore", None, Warning, re.compile(r"PIL\."), 0)


class ImageInvalid(Exception):
    """The client's mistake. The message is safe to show: it says what is wrong and the limit."""


class _MeteredFile(io.BytesIO):
    """A file in memory that ends a parser which reads too often."""

    reads_left = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads_left -= 1
        if self.reads_left < 0:
            raise ImageInvalid("image file is made of too many pieces")
        return super().read(size)


def decode_image(
    data: bytes,
    max_bytes: int,
    max_pixels: int,
    wait_for_room: Callable[[int], None] = lambda pixels: None,
    reduced_size: Callable[[Size], Size | None] = lambda size: None,
) -> Image.Image:
    """Decodes the first frame of a PNG, JPEG, WEBP, GIF, BMP or TIFF file, in mode RGB, without its metadata, but for the one
    colour that is transparent: it stays as it is, and `info` says which.

    `wait_for_room` is called before pixels are decoded, with their number: twice where they cost twice as much, as WEBP's do.
    `reduced_size` is called before that, with (width, height): it may return a size to which the image will be reduced, and then
    a JPEG of much more than that comes smaller than it is: at a half, a quarter or an eighth of its sides, rounded up.

    Raises ImageInvalid for all else, and for a file or an image over its limit.
    """
    if not data:
        raise ImageInvalid("image is empty")
    if len(data) > max_bytes:
        raise ImageInvalid(f"image has {len(data):,} bytes; the limit is {max_bytes:,}")
    _silence_pillow()
    try:
        return _decode(data, max_pixels, wait_for_room, reduced_size)
    except ImageInvalid:
        raise
    except UnidentifiedImageError:
        message = _UNREADABLE
    except Exception:  # Pillow raises nearly every kind, MemoryError among them
        message = _BROKEN
    # Outside of the except block: the exception would carry the frames, and with them the pixels.
    raise ImageInvalid(message)


def _decode(
    data: bytes, max_pixels: int, wait_for_room: Callable[[int], None], reduced_size: Callable[[Size], Size | None]
) -> Image.Image:
    file = _MeteredFile(_defused(data, max_pixels))
    file.reads_left = _HEADER_READS
    with Image.open(file, formats=FORMATS) as image:
        _check_size(image.width, image.height, max_pixels)
        width, height = image.size
        if (reduced := reduced_size(image.size)) is not None:
            in_rows = _is_read_in_rows(image, file)
            # Only JPEG's does anything: the decoder leaves out the detail that the resizing would.
            image.draft(None, (_DRAFT_GAP * reduced[0], _DRAFT_GAP * reduced[1]))
            if in_rows:
                width, height = image.size
        wait_for_room(width * height * _PIXELS_WORTH.get(image.format or "", 1))
        file.reads_left = _PIXEL_READS
        rgb = _to_rgb(image)
    # All else is as large as the file, and nothing reads it.
    transparent = rgb.info.get("transparency")
    rgb.info = {"transparency": transparent} if isinstance(transparent, tuple) and len(transparent) == 3 else {}
    return rgb


def _is_read_in_rows(image: Image.Image, file: _MeteredFile) -> bool:
    """Tells whether a JPEG, open and read up to its first scan, is decoded row by row. If that scan is not all of it, libjpeg
    keeps what all scans say of the whole image, 6 bytes for a pixel, at whatever size it is decoded (jdinput.c,
    has_multiple_scans)."""
    if not isinstance(image, JpegImagePlugin.JpegImageFile) or image.format != "JPEG" or "progressive" in image.info:
        return False
    head = bytes(file.getbuffer()[max(0, file.tell() - _SCAN_HEAD) : file.tell()])
    components_at = head.rfind(b"\xff\xda") + 4
    return 4 <= components_at < len(head) and head[components_at] == image.layers


def _to_rgb(image: Image.Image) -> Image.Image:
    """Converts as qwen_vl_utils.vision_process.to_rgb does: only mode RGBA is composited, on white."""
    if image.mode == "RGB":
        # As it is: `convert` would copy it.
        image.load()
        return image
    if image.mode != "RGBA":
        return image.convert("RGB")
    image.load()
    white = Image.new("RGB", image.size, (255, 255, 255))
    # In strips: the mask is a copy of what it is for.
    for top in range(0, image.height, _STRIP):
        strip = image.crop((0, top, image.width, min(top + _STRIP, image.height)))
        white.paste(strip, (0, top), mask=strip.getchannel("A"))
    return white


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise ImageInvalid("image has no pixels")
    if width * height > max_pixels:
        raise ImageInvalid(f"image has {width * height:,} pixels; the limit is {max_pixels:,}")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ImageInvalid(f"image is {width:,} x {height:,}; the limit is an aspect ratio of {MAX_ASPECT_RATIO}")


def _silence_pillow() -> None:
    """Keeps Pillow's warnings about odd files from being printed, or raised under `-W error`.

    Filters belong to the process, and anyone may reset them (pytest does for every test), so this looks each time. It only ever
    adds one, which threads may do at once; `catch_warnings` would put back, in one thread, what another relies on.
    """
    if _PIL_WARNINGS not in warnings.filters:
        warnings.filterwarnings("ignore", module=r"PIL\.")


def _defused(data: bytes, max_pixels: int) -> bytes:
    """Returns the same pixels, less what would be costly before a size is known."""
    if data.startswith(b"\xff\xd8"):
        return _defused_jpeg(data)
    if data.startswith((b"II", b"MM")):
        return _defused_tiff(data, max_pixels)
    return data


def _defused_jpeg(data: bytes) -> bytes:
    """Hides EXIF, which Pillow parses for the resolution alone, and refuses what has too many scans."""
    if sum(1 for _ in islice(_search(_JPEG_SCAN, data), _MAX_JPEG_SCANS + 1)) > _MAX_JPEG_SCANS:
        raise ImageInvalid(f"image has more than {_MAX_JPEG_SCANS} JPEG scans")
    hidden: bytearray | None = None
    for segment in _search(_JPEG_EXIF, data):
        hidden = hidden or bytearray(data)
        hidden[segment.start("name") : segment.end("name")] = b"none"
    return bytes(hidden) if hidden else data


def _search(pattern: re.Pattern[bytes], data: bytes) -> Iterator[re.Match[bytes]]:
    """Yields every match, in order; those of a pattern that may not overlap itself."""
    for start in range(0, len(data), _SEARCHED):
        for match in pattern.finditer(data, start, start + _SEARCHED + _OVERLAP):
            if match.start() < start + _SEARCHED:
                yield match


def _defused_tiff(data: bytes, max_pixels: int) -> bytes:
    """Looks at the first directory: bounds its fields and its tiles, which are decoded whole however small the image, and hide
    the pointers to directories of metadata. A directory that does not lie within the file raises struct.error."""
    if data[:4] not in _TIFF_LAYOUTS:
        raise ImageInvalid(_UNREADABLE)
    order, at, pointer, counter, entry = _TIFF_LAYOUTS[data[:4]]
    (start,) = struct.unpack_from(order + pointer, data, at)
    (entries,) = struct.unpack_from(order + counter, data, start)
    if entries > _MAX_TIFF_ENTRIES:
        raise ImageInvalid(f"image has more than {_MAX_TIFF_ENTRIES:,} TIFF fields")
    start += struct.calcsize(order + counter)
    size = struct.calcsize(order + entry)
    hidden: bytearray | None = None
    tile_pixels = 1
    for position in range(start, start + entries * size, size):
        tag, kind, count, value = struct.unpack_from(order + entry, data, position)
        if count > _MAX_TIFF_VALUES and (kind not in _TIFF_BYTES_KINDS or tag in _TIFF_OFFSETS):
            raise ImageInvalid(f"image has a TIFF field of {count:,} values; the limit is {_MAX_TIFF_VALUES:,}")
        if tag in _TIFF_METADATA:
            hidden = hidden or bytearray(data)
            hidden[position + 2 : position + 4] = b"\x00\x00"  # no kind of value: readers pass over it
        if tag in _TIFF_TILE_SIDES:
            tile_pixels *= _tiff_integer(order, kind, count, value)
    if tile_pixels > max_pixels:
        raise ImageInvalid(f"image has TIFF tiles of {tile_pixels:,} pixels; the limit is {max_pixels:,}")
    return bytes(hidden) if hidden else data


def _tiff_integer(order: str, kind: int, count: int, value: bytes) -> int:
    codes = {3: "H", 4: "L"}  # SHORT, LONG
    if kind not in codes or count != 1:
        raise ImageInvalid(_BROKEN)
    (number,) = struct.unpack_from(order + codes[kind], value)
    return int(number)
