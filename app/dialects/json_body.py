"""The bytes of a body -> what they hold as JSON, if that is not too much.

A decoder makes all of a body's values in one go and lets no other thread run meanwhile: 30 MiB of `{},{},...` would stop the
event loop for half a second, and fill twenty times their memory. So values are counted before they are made. A text is one
value, however long.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from app.dialects.contract import TOKEN_IDS_ADVICE, InvalidRequest

# Some 20 ms. 2,048 inputs of 15 typed parts each have fewer: a part has five to seven.
MAX_VALUES = 250_000
# Bytes that are looked at in one go: a fraction of a millisecond.
_PIECE = 1 << 18
_QUOTE, _BACKSLASH = b'"\\'
# Every value but the first comes after a bracket, a comma or a colon; an empty list or object has a bracket of its own.
_OPENING = b"[{,:"


def decode_json(body: bytes | bytearray) -> Any:
    """Decodes the value that `body` holds. Raises InvalidRequest."""
    if len(body) > MAX_VALUES and holds_more_values(body, MAX_VALUES):
        raise InvalidRequest(
            f"the body holds more than {MAX_VALUES:,} JSON values. Send fewer inputs at a time. {TOKEN_IDS_ADVICE}"
        )
    try:
        return orjson.loads(body)
    except ValueError:
        pass  # raised outside of here: the decoder's exception holds the whole body, and a refusal would hold it too
    raise InvalidRequest("the body is not valid JSON in UTF-8, or is nested too deeply")


def holds_more_values(body: bytes | bytearray, most: int) -> bool:
    """Tells whether more than `most` brackets open, commas and colons stand outside of strings."""
    found = 0
    in_string = escaping = False
    for at in range(0, len(body), _PIECE):
        # The backslash that escapes the first byte of a piece is put before it.
        piece = np.frombuffer((b"\\" if escaping else b"") + body[at : at + _PIECE], dtype=np.uint8)
        unescaped, escaping = _unescaped(piece)
        quotes = np.flatnonzero((piece == _QUOTE) & unescaped)
        signs = np.flatnonzero(np.logical_or.reduce([piece == sign for sign in _OPENING]))
        # Outside of strings stands what has an even number of quotes before it.
        found += int(np.count_nonzero((np.searchsorted(quotes, signs) + in_string) % 2 == 0))
        if found > most:
            return True
        in_string ^= bool(len(quotes) % 2)
    return False


def _unescaped(piece: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.bool_] | np.bool_, bool]:
    """Marks the bytes that no backslash escapes, of a piece whose first is not escaped; and whether the byte after it is."""
    backslashes = np.flatnonzero(piece == _BACKSLASH)
    if not len(backslashes):
        return np.True_, False
    # In a run of backslashes they escape each other in pairs: one of odd length escapes what comes after.
    breaks = np.flatnonzero(np.diff(backslashes) != 1)
    first = backslashes[np.concatenate([[0], breaks + 1])]
    last = backslashes[np.concatenate([breaks, [len(backslashes) - 1]])]
    after = last[(last - first) % 2 == 0] + 1
    unescaped = np.ones(len(piece) + 1, dtype=np.bool_)
    unescaped[after] = False
    return unescaped[:-1], not unescaped[-1]
