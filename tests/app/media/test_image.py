"""app/media/image.py: the official pixels, and a short answer for every file that is not an image within the limits."""

from __future__ import annotations

import copy
import io
import random
import struct
import subprocess
import sys
import tracemalloc
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from app.media import image as image_decode
from app.media.image import FORMATS, MAX_ASPECT_RATIO, ImageInvalid, decode_image
from tests.support.hosts import picture
from tests.support.image_files import (
    BOMBS,
    PIECES,
    PIXELS,
    SMALL,
    disposing_gif,
    encode,
    exif_jpeg,
    noise,
    png,
    png_chunk,
    progressive_jpeg,
    tiff,
)
from tests.support.paths import CONFORMANCE

CASES = sorted(path for path in CONFORMANCE.glob("cases/*.*") if path.suffix not in (".json", ".npz"))
MAX_BYTES = 20 * 2**20
MAX_PIXELS = 50_000_000


def decode(data: bytes, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS) -> Image.Image:
    return decode_image(data, max_bytes, max_pixels)


def refusal(data: bytes, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS) -> str:
    with pytest.raises(ImageInvalid) as caught:
        decode(data, max_bytes, max_pixels)
    assert caught.value.__cause__ is None and caught.value.__context__ is None  # it would hold the pixels
    return str(caught.value)


# The official pixels


def official(data: bytes) -> Image.Image:
    """qwen_vl_utils.vision_process.fetch_image up to its resize, for an image that came by URL."""
    with io.BytesIO(data) as file:
        image = copy.deepcopy(Image.open(file))
    if image.mode != "RGBA":
        return image.convert("RGB")
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image, mask=image.split()[3])
    return white


def official_format(path: Path) -> str | None:
    with Image.open(path) as image:
        return image.format


def assert_official(data: bytes) -> None:
    ours, theirs = decode(data), official(data)
    assert (ours.mode, ours.size) == ("RGB", theirs.size)
    assert ours.tobytes() == theirs.tobytes()


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.name)
def test_pixels_are_official(path: Path) -> None:
    assert_official(path.read_bytes())


def test_cases_cover_every_format() -> None:
    assert {official_format(path) for path in CASES} == set(FORMATS)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_png_modes_are_official(mode: str) -> None:
    image = Image.new("I;16", (24, 16), 40_000) if mode == "I;16" else noise(mode=mode)
    assert_official(encode(image, "PNG"))


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_tiff_is_official_with_its_metadata(compression: str | None, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif.get_ifd(0x8769)[0x829A] = 0.01
    exif.get_ifd(0x8825)[1] = "N"
    data = encode(noise(), "TIFF", compression=compression, exif=exif)
    assert decode(data).size == ((24, 16) if orientation == 1 else (16, 24))  # Pillow itself turns a TIFF, and no other format
    assert_official(data)


@pytest.mark.parametrize("big", [False, True])
def test_tiff_of_either_size_is_official(big: bool) -> None:
    assert_official(encode(noise(), "TIFF", big_tiff=big))


def test_rgba_is_composited_on_white() -> None:
    image = noise(mode="RGBA")
    values = np.asarray(image).astype(int)
    colour, alpha = values[..., :3], values[..., 3:]
    blended = colour * alpha + 255 * (255 - alpha) + 128
    expected = ((blended >> 8) + blended) >> 8
    assert np.array_equal(np.asarray(decode(encode(image, "PNG"))), expected)


def test_other_transparency_is_dropped_but_for_one_colour() -> None:
    """That is left to whom the image is for; the pixels stay."""
    gray = decode(encode(Image.new("LA", (4, 4), (9, 0)), "PNG"))
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30] + [0] * 765)
    one, many = (decode(encode(palette, "PNG", transparency=which, exif=b"x")) for which in (0, bytes(range(256))))
    assert [image.getpixel((0, 0)) for image in (gray, one, many)] == [(9, 9, 9), (10, 20, 30), (10, 20, 30)]
    assert [image.info for image in (gray, one, many)] == [{}, {"transparency": (10, 20, 30)}, {}]


def test_exif_does_not_rotate_a_jpeg() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(noise(), "JPEG", exif=exif)
    assert b"Exif\0\0" in data
    assert decode(data).size == (24, 16)
    assert_official(data)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (20, 20), colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
    red, green, blue = decode(data).getpixel((5, 5))
    assert red > 200 and green < 50 and blue < 50
    assert_official(data)


def test_multi_picture_jpeg_is_a_jpeg() -> None:
    data = encode(noise(), "MPO", save_all=True, append_images=[noise().rotate(180)])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert_official(data)


def test_metadata_is_left_behind() -> None:
    plain = noise(mode="RGB")
    tagged = encode(plain, "PNG", icc_profile=b"not a profile" * 9, exif=Image.Exif().tobytes(), dpi=(72, 72))
    assert decode(tagged).info == {}
    assert decode(tagged).tobytes() == plain.tobytes()


# The limits


def test_bytes() -> None:
    data = encode(noise(), "PNG")
    assert decode(data, max_bytes=len(data)).size == (24, 16)
    assert refusal(data, max_bytes=len(data) - 1) == f"image has {len(data):,} bytes; the limit is {len(data) - 1:,}"


def test_pixels() -> None:
    data = encode(noise(), "PNG")
    assert decode(data, max_pixels=384).size == (24, 16)
    assert refusal(data, max_pixels=383) == "image has 384 pixels; the limit is 383"


def test_message_groups_digits() -> None:
    assert refusal(png(15_000, 10_000, b"")) == "image has 150,000,000 pixels; the limit is 50,000,000"


def test_aspect_ratio_is_the_official_limit() -> None:
    assert MAX_ASPECT_RATIO == 200
    assert decode(encode(noise((200, 1)), "PNG")).size == (200, 1)
    assert decode(encode(noise((2, 400)), "PNG")).size == (2, 400)
    assert refusal(encode(noise((201, 1)), "PNG")) == "image is 201 x 1; the limit is an aspect ratio of 200"
    assert "aspect ratio of 200" in refusal(encode(noise((2, 401)), "PNG"))


def test_our_pixel_limit_is_the_only_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow alone warns at 90 million pixels, and refuses twice that."""
    monkeypatch.setattr(image_decode, "_to_rgb", lambda image: Image.new("RGB", (1, 1)))  # a gigabyte less
    for data in (png(14_000, 13_000, b""), tiff({256: (4, 1, 14_000), 257: (4, 1, 13_000)}, 9000)):
        assert decode(data, max_pixels=182_000_000).size == (1, 1)
        assert "182,000,000 pixels" in refusal(data, max_pixels=181_999_999)


@pytest.mark.parametrize("width, height", [(0, 0), (0, 9), (9, 0)])
def test_zero_size(width: int, height: int) -> None:
    refusal(png(width, height, b""))
    gif = bytearray(encode(noise(), "GIF"))
    gif[6:10] = struct.pack("<HH", width, height)
    place = gif.index(b",", 13 + 768)
    gif[place + 5 : place + 9] = struct.pack("<HH", width, height)
    refusal(bytes(gif))


# Formats


@pytest.mark.parametrize("kind", ["ICO", "PPM", "TGA", "PCX", "SGI", "DDS", "ICNS", "JPEG2000", "EPS", "PDF", "SPIDER", "AVIF"])
def test_other_formats_are_refused(kind: str) -> None:
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow does not write {kind}")
    assert refusal(encode(noise((32, 32)), kind)) == "image is not a readable PNG, JPEG, WEBP, GIF, BMP or TIFF file"


@pytest.mark.parametrize(
    "data",
    [b"8BPS\x00\x01" + bytes(60), b"%!PS-Adobe-3.0 EPSF-3.0\n", b"<svg/>", b"hello", b"MMXXIV", b"\x00", b"{}"],
    ids=["psd", "eps", "svg", "text", "year", "nul", "json"],
)
def test_what_is_no_image(data: bytes) -> None:
    assert refusal(data) == "image is not a readable PNG, JPEG, WEBP, GIF, BMP or TIFF file"


def test_empty() -> None:
    assert refusal(b"") == "image is empty"


@pytest.mark.parametrize("head", [b"MM\x00+", b"MM*\x00", b"II\x00*"])
def test_tiff_headers_that_readers_dispute(head: bytes) -> None:
    assert decode(tiff({}, 11_000)).size == (100, 100)
    refusal(tiff({}, 11_000, head))


# Bombs: each is refused, for little work and little memory


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """What Pillow does: `reads` of a file, the `bytes` that it gets, and images whose pixels it begins to decode (`loads`)."""
    done: Counter[str] = Counter()

    class Counted(image_decode._MeteredFile):
        def read(self, size: int | None = -1, /) -> bytes:
            done["reads"] += 1
            data = super().read(size)
            done["bytes"] += len(data)
            return data

    def load(self: ImageFile.ImageFile) -> object:
        done["loads"] += 1
        return original(self)

    original = ImageFile.ImageFile.load
    monkeypatch.setattr(image_decode, "_MeteredFile", Counted)
    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    return done


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_for_little_work(name: str, work: Counter[str]) -> None:
    reason, make = BOMBS[name]
    data = make()
    assert len(data) < 6_000_000
    assert reason in refusal(data)
    assert work["bytes"] <= 2 * len(data)
    if name == "bmp of runs":  # it is in its pixels that this one has too many pieces
        assert work["loads"] == 1 and work["reads"] < 2_100_000
    else:
        assert not work["loads"] and work["reads"] < 20_100


@pytest.mark.parametrize("name", [name for name, (reason, _) in BOMBS.items() if reason != PIECES])
def test_bombs_take_little_memory(name: str) -> None:
    data = BOMBS[name][1]()
    tracemalloc.start()
    try:
        refusal(data)
        assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    finally:
        tracemalloc.stop()


def test_real_files_are_far_from_the_bounds() -> None:
    assert decode(progressive_jpeg(40)).size == (64, 64)
    assert decode(tiff({278: (3, 1, 1), 273: (3, 100, 500), 279: (3, 100, 500)}, 2**16)).size == (100, 100)
    chunks = png_chunk(b"tEXt", b"key\0value") * 2000
    assert decode(png(9, 9, bytes(90), chunks)).size == (9, 9)


@pytest.mark.parametrize("piece", [16, 64, 1000, 1 << 18])
def test_a_search_in_pieces_finds_all_wherever_they_end(monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    """As many scans as are refused, and EXIF in every place against the ends of the pieces."""
    monkeypatch.setattr(image_decode, "_SEARCHED", piece)
    assert len(list(image_decode._search(image_decode._JPEG_SCAN, progressive_jpeg(65)))) > 64
    for before in range(40):
        data = b"\xff\xd8" + b"x" * before + b"\xff\xe1\x00\x10Exif\0\0" + b"y" * 50 + b"\xff\xe1\xff\xe1Exif\0\0"
        assert image_decode._defused_jpeg(data) == data.replace(b"Exif", b"none")
    plain = b"\xff\xd8" + bytes(3000)
    assert image_decode._defused_jpeg(plain) is plain


def test_exif_is_hidden_from_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    data = exif_jpeg()
    monkeypatch.setattr(Image.Exif, "load", lambda *_: pytest.fail("EXIF was parsed"))
    with pytest.raises(pytest.fail.Exception):
        Image.open(io.BytesIO(data))
    assert decode(data).size == (24, 16)


def test_tiff_metadata_directories_are_hidden_from_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    data = tiff({34665: (4, 1, 200)}, 11_000)
    seen: list[int] = []
    monkeypatch.setattr(Image.Exif, "_get_ifd_dict", lambda self, offset, group=None: seen.append(offset) or {})
    Image.open(io.BytesIO(data)).load()
    assert seen == [200]
    assert decode(data).size == (100, 100)
    assert seen == [200]


@pytest.mark.parametrize("method", [2, 3])
def test_nothing_is_made_for_a_gifs_next_frame(monkeypatch: pytest.MonkeyPatch, method: int) -> None:
    """C code makes it, which the memory that Python traces does not show."""
    monkeypatch.setattr(Image.core, "fill", lambda mode, size, colour: pytest.fail(f"{size} was made"))
    assert PIXELS in refusal(disposing_gif(method))


def test_size_is_checked_before_pixels_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("pixels were read"))
    assert "pixels; the limit is 9" in refusal(encode(noise(), "PNG"), max_pixels=9)


def test_memory_error_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: ImageFile.ImageFile) -> None:
        raise MemoryError("0x7f00 at /secret")

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    assert refusal(encode(noise(), "PNG")) == "image file is damaged or cut short"


# Damage


def survives(data: bytes) -> bool:
    """Whether the file is taken; every failure but ImageInvalid, warnings among them, fails the test."""
    try:
        image = decode(data, max_pixels=10_000)
    except ImageInvalid:
        return False
    assert image.mode == "RGB" and 0 < image.width * image.height <= 10_000
    return True


@pytest.mark.parametrize("name", SMALL)
def test_every_truncation(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    data = SMALL[name]
    taken = [length for length in range(len(data)) if survives(data[:length])]
    assert survives(data)
    # What a file may lack and still have all its pixels: PNG's last checksum and end chunk, GIF's trailer.
    assert all(length >= len(data) - 20 for length in taken)
    assert capfd.readouterr() == ("", "")


def test_cut_short_message() -> None:
    assert refusal(SMALL["PNG"][:400]) == "image file is damaged or cut short"
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_mutations(capfd: pytest.CaptureFixture[str]) -> None:
    chance = random.Random(20_240_607)
    outcomes = []
    for data in chance.choices(list(SMALL.values()), k=600):
        mutant = bytearray(data)
        for _ in range(chance.randint(1, 6)):
            place = chance.randrange(min(len(mutant), chance.choice([64, 10**6])))
            mutant[place] = chance.choice([0, 1, 127, 255, chance.randrange(256)])
        outcomes.append(survives(bytes(mutant)))
    assert 100 < sum(outcomes) < 500
    assert capfd.readouterr() == ("", "")


# Warnings


WARNS = tiff({282: (5, 1, 90_000)}, 12_000)  # a resolution that lies beyond the end of the file


def test_pillow_does_warn_of_this_file() -> None:
    with pytest.warns(UserWarning, match="Truncated File Read"):
        Image.open(io.BytesIO(WARNS))


def test_warnings_are_neither_raised_nor_shown() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(WARNS).size == (100, 100)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        decode(WARNS)
        assert not caught


def test_filter_is_added_once() -> None:
    decode(WARNS)
    before = list(warnings.filters)
    decode(WARNS)
    assert list(warnings.filters) == before


def test_nothing_is_printed_in_a_process_of_its_own() -> None:
    noisy = tiff({277: (3, 1, 9999)}, 12_000)  # Pillow logs this one as an error
    program = (
        "import app.media.image as d\n"
        f"d.decode_image({WARNS[:400]!r}.ljust(12000, b'x'), 10**6, 10**6)\n"
        f"try:\n d.decode_image({noisy[:400]!r}.ljust(12000, b'x'), 10**6, 10**6)\n"
        "except d.ImageInvalid as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "image is not a readable PNG, JPEG, WEBP, GIF, BMP or TIFF file\n"


def test_many_threads() -> None:
    files = [WARNS, *SMALL.values(), SMALL["PNG"][:300]] * 20
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(survives, files))
    assert together == [survives(data) for data in files]
    assert sum(together) == 20 * (len(SMALL)) + 20


def test_torch_is_not_imported() -> None:
    source = Path(image_decode.__file__).read_text()
    assert "import torch" not in source and "import qwen_vl_utils" not in source


# What will be reduced


def photograph(width: int, height: int) -> bytes:
    """A JPEG with structure at every scale, as photographs have it."""
    random, field = np.random.default_rng(1), np.zeros((height, width, 3), np.float32)
    for level in range(1, 9):
        shape = (max(2, height * 2**level // 1024), max(2, width * 2**level // 1024))
        for channel in range(3):
            layer = Image.fromarray(random.standard_normal(shape).astype(np.float32)).resize((width, height))
            field[..., channel] += np.asarray(layer) * 2.0**-level
    field = (field - field.min()) / (field.max() - field.min()) * 255
    return encoded(Image.fromarray(field.astype(np.uint8)), "JPEG", quality=90)


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


@pytest.mark.parametrize(("reduced", "size"), [((200, 150), (500, 375)), ((600, 450), (2000, 1500)), (None, (2000, 1500))])
def test_a_jpeg_is_decoded_at_no_less_than_twice_its_reduced_size(reduced: Any, size: tuple[int, int]) -> None:
    asked: list[tuple[int, int]] = []
    room: list[int] = []

    def reduced_size(size: tuple[int, int]) -> Any:
        asked.append(size)
        return reduced

    image = decode_image(photograph(2000, 1500), MAX_BYTES, MAX_PIXELS, room.append, reduced_size)
    assert (asked, image.size, room) == ([(2000, 1500)], size, [size[0] * size[1]])


def in_three_scans(image: Image.Image) -> bytes:
    """A sequential JPEG with a scan for each component, as libjpeg's tools can write it: put together from three grey ones."""
    grey = [encoded(channel, "JPEG") for channel in image.convert("YCbCr").split()]
    frame, scan = (grey[0].index(mark) for mark in (b"\xff\xc0", b"\xff\xda"))
    tables = grey[0][: frame + 9] + bytes((3, 1, 0x11, 0, 2, 0x11, 0, 3, 0x11, 0)) + grey[0][frame + 13 : scan]
    tables = tables.replace(b"\xff\xc0\x00\x0b", b"\xff\xc0\x00\x11")
    scans = [
        b"\xff\xda\x00\x08\x01%c\x00\x00\x3f\x00" % number + data[data.index(b"\xff\xda") + 10 : -2]
        for number, data in enumerate(grey, start=1)
    ]
    return tables + b"".join(scans) + b"\xff\xd9"


@pytest.mark.parametrize("subsampling", [0, 2])
@pytest.mark.parametrize("kind", ["RGB", "L", "CMYK", "progressive", "three scans", "one scan of three", "EXIF"])
def test_room_is_taken_for_what_a_jpeg_in_several_scans_keeps(kind: str, subsampling: int) -> None:
    """A progressive one of 49 megapixels took 293 MiB, and room for 3 megapixels."""
    image, room = picture(1, (640, 480)), []
    mode = kind if kind in ("L", "CMYK") else "RGB"
    data = encoded(image.convert(mode), "JPEG", subsampling=subsampling, progressive=kind == "progressive")
    if "three" in kind:
        data = in_three_scans(image)
        assert np.abs(np.asarray(decode(data), int) - np.asarray(image, int)).mean() < 8
    if kind == "one scan of three":
        data = data[: data.index(b"\xff\xda", data.index(b"\xff\xda") + 2)] + b"\xff\xd9"
    if kind == "EXIF":
        data = data[:2] + b"\xff\xe1\x00\x12Exif\x00\x00\xff\xda\x00\x08\x01\x01\x00\x00" + data[2:]
    reduced = decode_image(data, MAX_BYTES, MAX_PIXELS, room.append, lambda size: (64, 48))
    assert reduced.size == (160, 120)
    assert room == [160 * 120 if kind in ("RGB", "L", "CMYK", "EXIF") else 640 * 480]


def test_its_reduced_pixels_are_the_same_to_within_one_level() -> None:
    data, reduced = photograph(2000, 1500), (320, 240)
    whole = decode(data).resize(reduced, Image.Resampling.BICUBIC)
    smaller = decode_image(data, MAX_BYTES, MAX_PIXELS, reduced_size=lambda size: reduced)
    apart = np.abs(np.asarray(whole, int) - np.asarray(smaller.resize(reduced, Image.Resampling.BICUBIC), int))
    assert smaller.size == (1000, 750)
    assert apart.max() <= 2 and apart.mean() < 0.2


@pytest.mark.parametrize("format", ["PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_other_formats_are_decoded_whole(format: str) -> None:
    data = encoded(picture(1, (640, 480)), format)
    image = decode_image(data, MAX_BYTES, MAX_PIXELS, reduced_size=lambda size: (32, 24))
    assert image.size == (640, 480)
    assert image.tobytes() == decode(data).tobytes()
