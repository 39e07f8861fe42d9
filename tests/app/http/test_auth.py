"""Keys: which Authorization headers open the service. The routes that need one are in test_api_errors.py."""

from __future__ import annotations

import hmac
from contextlib import suppress
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import Unauthorized
from app.http import auth
from app.http.auth import check_key
from app.settings import ApiKey

KEYS = (ApiKey("first", b"sk-1"), ApiKey("second", "ключ".encode()), ApiKey("third", b"sk-3"))


@pytest.mark.parametrize(("header", "name"), [("Bearer sk-1", "first"), ("bearer ключ", "second"), ("BEARER \t sk-3 ", "third")])
def test_a_right_key_has_its_name(header: str, name: str) -> None:
    assert check_key([header], KEYS) == name


@pytest.mark.parametrize("token", ["sk-1", "sk-3", "wrong", ""])
def test_every_key_is_compared(monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    compared = []

    def compare(given: bytes, key: bytes) -> bool:
        compared.append(key)
        return hmac.compare_digest(given, key)

    monkeypatch.setattr(auth, "hmac", SimpleNamespace(compare_digest=compare))
    with suppress(Unauthorized):
        check_key([f"Bearer {token}"], KEYS)
    assert compared == [key.key for key in KEYS]


@given(st.lists(st.text(), max_size=3))
def test_nothing_else_opens_it_or_breaks(headers: list[str]) -> None:
    with pytest.raises(Unauthorized):
        check_key(headers, (ApiKey("only", b"a-key-that-no-strategy-finds"),))


def test_bytes_that_are_no_text_are_compared_as_bytes() -> None:
    header = b"Bearer \xff\xfe".decode("utf-8", "surrogateescape")
    assert check_key([header], (ApiKey("odd", b"\xff\xfe"),)) == "odd"


def test_without_keys_nothing_opens_it() -> None:
    with pytest.raises(Unauthorized):
        check_key(["Bearer "], ())
