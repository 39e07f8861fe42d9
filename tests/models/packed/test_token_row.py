"""A batch in one row: its order, the tokens that prefixes stand for, and positions."""

from __future__ import annotations

import numpy as np

from models.base import ImageGrid, PreparedImage, PreparedInput
from models.packed.attention import Span
from models.packed.prefix_cache import Prefix
from models.packed.token_row import TokenRow


def item(start: int, length: int, **more: object) -> PreparedInput:
    return PreparedInput(np.arange(start, start + length), **more)  # type: ignore[arg-type]


def test_token_row_sorts_by_length() -> None:
    row = TokenRow.lay_out([item(100, 3), item(200, 1), item(300, 2), item(400, 1)])
    assert row.order == [1, 3, 2, 0]
    assert row.spans == [Span(1), Span(1), Span(2), Span(3)]
    assert row.token_ids.tolist() == [200, 400, 300, 301, 100, 101, 102]
    assert row.positions.tolist() == [[0, 0, 0, 1, 0, 1, 2]] * 3
    assert (row.lengths.tolist(), row.last_rows.tolist()) == ([1, 1, 2, 3], [0, 1, 3, 6])


def test_token_row_puts_inputs_on_one_prefix_side_by_side() -> None:
    """Behind those on none; their positions go on from the prefix."""
    one, other = Prefix(b"one", 2, ()), Prefix(b"other", 1, ())
    row = TokenRow.lay_out([item(100, 4), item(200, 3), item(300, 5), item(400, 2)], [one, other, None, one])
    assert row.order == [2, 3, 0, 1]
    assert row.spans == [Span(5), Span(0, 0, 2), Span(2, 0, 2), Span(2, 1, 1)]
    assert row.prefixes == [one, other]
    assert row.token_ids.tolist() == [300, 301, 302, 303, 304, 102, 103, 201, 202]
    assert row.positions[0].tolist() == [0, 1, 2, 3, 4, 2, 3, 1, 2]


def test_token_row_takes_the_positions_of_images() -> None:
    image = PreparedImage(ImageGrid((64, 64), (64, 64), (4, 4), 4), np.zeros((16, 3), dtype=np.uint8))
    positions = np.array([[0, 1, 1, 1, 1, 3], [0, 1, 1, 2, 2, 3], [0, 1, 2, 1, 2, 3]])
    row = TokenRow.lay_out([item(100, 6, images=(image,), positions=positions), item(200, 2)], [Prefix(b"p", 1, ()), None])
    assert row.images == [image]
    assert row.positions.tolist() == [[0, 1, *line[1:]] for line in positions.tolist()]
