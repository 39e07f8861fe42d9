"""Base64 in text -> bytes, a piece at a time.

A C call keeps the interpreter's lock to its end: one for an image of 20 MiB would stop the event loop for a tenth of a second,
whichever thread it is made in. Between two pieces the loop can go on; and no copy of the whole is made but the result.
"""

from __future__ import annotations

import binascii

WHITE_SPACE = " \t\n\r\f\v"
# Characters in a piece: a fraction of a millisecond.
_PIECE = 1 << 16
# The padding is looked for in so many last characters, since white space may stand within it.
_TAIL = 256


def decoded_size(text: str, start: int = 0) -> int:
    """Counts the bytes that the base64 from `start` on stands for, white space dropped: exact if it is valid, else near it."""
    tail = text[max(start, len(text) - _TAIL) :]
    padding = tail.count("=", len(tail.rstrip("=" + WHITE_SPACE)))
    return (len(text) - start - _spaces(text, start)) // 4 * 3 - min(padding, 2)


def decode_base64(text: str, start: int = 0) -> bytes | None:
    """Decodes the base64 from `start` on, white space dropped; returns None if it is not valid, or empty. The text does not end
    in white space."""
    dropped = WHITE_SPACE.encode() if _spaces(text, start) else None
    pieces: list[bytes] = []
    rest = b""
    for at in range(start, len(text), _PIECE):
        packed = text[at : at + _PIECE].encode("ascii", errors="replace")  # "?" is no base64 either
        packed = rest + (packed.translate(None, dropped) if dropped else packed)
        is_last = at + _PIECE >= len(text)
        whole = len(packed) if is_last else len(packed) // 4 * 4
        packed, rest = packed[:whole], packed[whole:]
        try:
            piece = binascii.a2b_base64(packed, strict_mode=True)
        except binascii.Error:
            return None
        # Strict mode lets surplus padding pass, and knows not that more follows.
        if len(piece) != whole // 4 * 3 - (packed.count(b"=", -2) if is_last else 0):
            return None
        pieces.append(piece)
    return b"".join(pieces) or None


def _spaces(text: str, start: int) -> int:
    present = [space for space in WHITE_SPACE if text.find(space, start) >= 0]
    if not present:
        return 0
    return sum(text.count(space, at, at + _PIECE) for at in range(start, len(text), _PIECE) for space in present)
