"""Groups of a batch: in the given order, each as large as its limits allow."""

from __future__ import annotations

from typing import Any

import pytest

from models.grouping import group_by_tokens

LENGTHS = [1, 2, 3, 3, 10]


@pytest.mark.parametrize(
    ("limits", "groups"),
    [
        pytest.param({}, [[0, 1, 2, 3, 4]], id="no limit"),
        pytest.param({"max_size": 2}, [[0, 1], [2, 3], [4]], id="size"),
        pytest.param({"max_tokens": 6}, [[0, 1, 2], [3], [4]], id="tokens, and one that alone is over the limit"),
        pytest.param({"max_tokens": 6, "padded": True}, [[0, 1], [2, 3], [4]], id="padded tokens"),
        pytest.param({"max_tokens": 6, "max_size": 1, "padded": True}, [[0], [1], [2], [3], [4]], id="both"),
    ],
)
def test_group_by_tokens(limits: dict[str, Any], groups: list[list[int]]) -> None:
    assert list(group_by_tokens(range(5), LENGTHS, **limits)) == groups


def test_group_by_tokens_keeps_the_order() -> None:
    assert list(group_by_tokens([4, 0, 2], LENGTHS, max_tokens=10)) == [[4], [0, 2]]
    assert list(group_by_tokens([], LENGTHS)) == []
