"""An input's content hash: equal where the vector must be, and nowhere else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from models.base import EmbeddingInput, ImageGrid, PreparedImage, PreparedInput
from tests.support.fakes import FakeModel

IDS = np.arange(20, dtype=np.int64)
POSITIONS = np.zeros((3, 20), dtype=np.int64)


def image(rows: int = 4, columns: int = 2, seed: int = 0, original: tuple[int, int] = (64, 64)) -> PreparedImage:
    patches = np.random.default_rng(seed).integers(0, 255, (rows * columns, 12), dtype=np.uint8)
    return PreparedImage(ImageGrid(original, (32 * columns, 32 * rows), (rows, columns), 2), patches)


def cut(columns: int) -> tuple[PreparedImage, ...]:
    """Two images of one grid, their patches as wide as said, and 24 bytes together."""
    joined = np.arange(8 * 24, dtype=np.uint8)
    grid = image().grid
    return tuple(PreparedImage(grid, part.reshape(8, -1)) for part in (joined[: 8 * columns], joined[8 * columns :]))


CHANGED = {
    "the first token": PreparedInput(np.where(IDS == 0, 8, IDS)),
    "the last token": PreparedInput(np.where(IDS == 19, 8, IDS)),
    "one token more": PreparedInput(np.arange(21, dtype=np.int64)),
    "one token less": PreparedInput(IDS[:-1]),
    "positions": PreparedInput(IDS, positions=POSITIONS),
    "other positions": PreparedInput(IDS, positions=POSITIONS + 1),
    "a token that is not pooled": PreparedInput(IDS, unpooled_tokens=1),
    "and one more": PreparedInput(IDS, unpooled_tokens=2),
    "an image": PreparedInput(IDS, (image(),)),
    "its grid": PreparedInput(IDS, (image(2, 4),)),
    "its pixels": PreparedInput(IDS, (image(seed=1),)),
    "twice": PreparedInput(IDS, (image(), image())),
    "two images": PreparedInput(IDS, (image(), image(seed=1))),
    "in the other order": PreparedInput(IDS, (image(seed=1), image())),
    "two as one": PreparedInput(
        IDS, (PreparedImage(image(8, 2).grid, np.concatenate([image().patches, image(seed=1).patches])),)
    ),
    "the same bytes, cut in one place": PreparedInput(IDS, cut(6)),
    "the same bytes, cut in another": PreparedInput(IDS, cut(18)),
    "positions as tokens": PreparedInput(np.concatenate([IDS, POSITIONS.ravel()])),
}


def test_content_hash_changes_with_whatever_decides_the_vector() -> None:
    hashes = [PreparedInput(IDS).content_hash, *(item.content_hash for item in CHANGED.values())]
    assert len(set(hashes)) == len(hashes)
    assert {len(content_hash) for content_hash in hashes} == {32}


@pytest.mark.parametrize("item", CHANGED.values(), ids=CHANGED.keys())
def test_content_hash_ignores_what_does_not_decide_the_vector(item: PreparedInput) -> None:
    assert replace(item, truncated=True, prefix_tokens=5).content_hash == item.content_hash
    images = tuple(replace(one, grid=replace(one.grid, original_size=(9, 9), official_size=(8, 8))) for one in item.images)
    assert (
        PreparedInput(item.token_ids.copy(), images, item.positions, unpooled_tokens=item.unpooled_tokens).content_hash
        == item.content_hash
    )


def test_content_hash_is_that_of_the_contents_in_any_memory_layout() -> None:
    for other in (np.repeat(IDS, 2)[::2], np.stack([IDS, IDS]).T[:, 0]):
        assert PreparedInput(other).content_hash == PreparedInput(IDS).content_hash
    strided = PreparedImage(image().grid, np.asfortranarray(image().patches))
    assert PreparedInput(IDS, (strided,)).content_hash == PreparedInput(IDS, (image(),)).content_hash


def test_content_hash_differs_for_different_inputs() -> None:
    model = FakeModel()
    inputs = [
        EmbeddingInput(("a",)),
        EmbeddingInput(("b",)),
        EmbeddingInput(("a",), "find"),
        EmbeddingInput(("a", "a")),
    ]
    assert len({model.prepare(item).content_hash for item in inputs}) == len(inputs)
    assert model.prepare(inputs[0]).content_hash == model.prepare(EmbeddingInput(("a",))).content_hash
