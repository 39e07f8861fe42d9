"""Base64 in pieces: what the standard library makes of the whole, wherever the pieces end."""

from __future__ import annotations

import base64
import binascii
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.dialects import base64_text
from app.dialects.base64_text import decode_base64, decoded_size


@pytest.fixture(params=[4, 5, 7, 64, 1 << 16])
def piece(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(base64_text, "_PIECE", request.param)
    size: int = request.param
    return size


def whole(text: str) -> bytes | None:
    """The rule for the text at once."""
    packed = "".join(text.split())
    try:
        data = binascii.a2b_base64(packed.encode("ascii", errors="replace"), strict_mode=True)
    except binascii.Error:
        return None
    return data if data and len(data) == len(packed) // 4 * 3 - packed.count("=", -2) else None


@pytest.mark.parametrize("size", [1, 2, 3, 47, 48, 49, 1000])
@pytest.mark.parametrize("head", ["", "data:image/png;base64,"])
def test_pieces_make_the_whole(piece: int, size: int, head: str) -> None:
    data = random.Random(size).randbytes(size)
    text = head + base64.b64encode(data).decode()
    assert decode_base64(text, len(head)) == data
    assert decoded_size(text, len(head)) == size


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_white_space_is_dropped_wherever_it_stands(piece: int, size: int) -> None:
    data = random.Random(size).randbytes(size)
    packed = base64.b64encode(data).decode()
    for space in (" ", "\n", "\r\n\t", " " * 9):
        text = space.join(packed)
        assert decode_base64(text) == data
        assert decoded_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "=", "====", "A", "AA", "AAA", "AA=", "AA=A", "AAAA=", "AAAA==", "AAAA====", "AA==AAAA", "AAA=AA=="]
)
@pytest.mark.parametrize("before", [0, 4, 8, 60, 64])
def test_what_is_not_valid_is_none(piece: int, text: str, before: int) -> None:
    assert decode_base64("A" * before + text) == whole("A" * before + text)
    if text:
        assert decode_base64("A" * before + text) is None


@pytest.mark.parametrize("bad", ["!", "-", "_", "é", "狗", "\0"])
def test_a_foreign_character_is_found_in_any_place(piece: int, bad: str) -> None:
    for place in range(0, 80, 3):
        text = "A" * place + bad + "A" * (79 - place)
        assert decode_base64(text) is None


@given(st.text(alphabet="Aa0+/=\n !é", max_size=40))
def test_any_text_is_as_the_standard_library_has_it(text: str) -> None:
    text = text.strip()
    pieces = base64_text._PIECE
    try:
        for base64_text._PIECE in (4, 6, 9):
            assert decode_base64(text) == whole(text)
    finally:
        base64_text._PIECE = pieces
    if (data := whole(text)) is not None:
        assert decoded_size(text) == len(data)
