"""Counting the values of a body before they are made."""

from __future__ import annotations

import json

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.dialects import json_body
from app.dialects.items import InvalidRequest
from app.dialects.json_body import MAX_VALUES, decode_json, holds_more_values

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(alphabet=st.sampled_from('\\",[]{}:aé\n')),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(alphabet='\\",{:x', max_size=4), inner, max_size=4),
    max_leaves=20,
)


def signs(body: bytes) -> int:
    """Opening brackets, commas and colons outside of strings, byte by byte."""
    found, in_string, escaped = 0, False, False
    for byte in body:
        if escaped:
            escaped = False
        elif byte == ord("\\"):
            escaped = True
        elif byte == ord('"'):
            in_string = not in_string
        elif not in_string and byte in b"[{,:":
            found += 1
    return found


@given(value=JSON, piece=st.integers(1, 9))
def test_the_count_is_exact_wherever_the_pieces_end(value: object, piece: int) -> None:
    body = json.dumps(value, ensure_ascii=False).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_body, "_PIECE", piece)
        count = signs(body)
        assert not holds_more_values(body, count)
        assert count == 0 or holds_more_values(body, count - 1)


@pytest.mark.parametrize("value", [b"{}", b"0", b'""', b'{"a":0}', b"[]", b'["\\\\"]'])
def test_a_body_of_too_many_values_is_refused(value: bytes) -> None:
    many = b",".join([value] * (MAX_VALUES + 1))
    with pytest.raises(InvalidRequest, match=r"250,000 JSON values.*check_embedding_ctx_length"):
        decode_json(bytearray(b'{"input":[' + many + b"]}"))


def test_a_text_is_one_value_whatever_it_holds() -> None:
    body = orjson.dumps({"input": ['[{,:"\\ \n' * MAX_VALUES]})
    assert decode_json(body) == orjson.loads(body)


def test_as_many_values_as_are_allowed_are_decoded() -> None:
    # One bracket, and a comma before each but the first.
    assert decode_json(b"[" + b",".join([b"0"] * MAX_VALUES) + b"]") == [0] * MAX_VALUES


@pytest.mark.parametrize("body", [b"", b"\xff", b"{", b"[" * 2000, b"[" * (MAX_VALUES + 1), b'"' + b"\\" * MAX_VALUES])
def test_what_is_no_json_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest) as refused:
        decode_json(body)
    assert refused.value.__context__ is None and refused.value.__cause__ is None
