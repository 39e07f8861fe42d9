"""The cache of vectors: bounded in bytes, least recently used first out, and nobody's array but its own."""

from __future__ import annotations

import hashlib
import tracemalloc
import weakref

import numpy as np
import pytest

from scheduler.vector_cache import ENTRY_BYTES, VectorCache

WIDTH = 16
SIZE = WIDTH * 4 + ENTRY_BYTES


def key(number: int) -> bytes:
    return hashlib.sha256(b"%d" % number).digest()


def row(number: int) -> np.ndarray:
    return np.full(WIDTH, number, dtype=np.float32)


def fill(cache: VectorCache, *numbers: int) -> None:
    for number in numbers:
        cache.put(key(number), row(number))


def kept(cache: VectorCache, upto: int = 10) -> list[int]:
    """The numbers that are kept, not looked up."""
    return [number for number in range(upto) if key(number) in cache._rows]


def test_cache_gives_back_what_was_put() -> None:
    cache = VectorCache(10 * SIZE)
    fill(cache, 1, 2)
    for number in (1, 2):
        got = cache.get(key(number))
        assert got is not None and got.dtype == np.float32 and np.array_equal(got, row(number))
    assert cache.get(key(3)) is None
    assert (len(cache), cache.num_bytes) == (2, 2 * SIZE)


def test_cache_evicts_the_least_recently_used_first() -> None:
    cache = VectorCache(3 * SIZE)
    fill(cache, 1, 2, 3)
    cache.get(key(1))
    fill(cache, 4)
    assert kept(cache) == [1, 3, 4]
    fill(cache, 3, 5)
    assert kept(cache) == [3, 4, 5]
    assert cache.num_bytes == 3 * SIZE


@pytest.mark.parametrize("max_bytes", [0, 1, SIZE - 1])
def test_cache_without_room_keeps_nothing(max_bytes: int) -> None:
    cache = VectorCache(max_bytes)
    fill(cache, 1, 2)
    assert (len(cache), cache.num_bytes) == (0, 0)
    assert cache.get(key(1)) is None


def test_cache_counts_the_same_input_once() -> None:
    cache = VectorCache(3 * SIZE)
    fill(cache, *[1] * 10)
    assert (len(cache), cache.num_bytes) == (1, SIZE)
    cache.put(key(1), row(2))
    got = cache.get(key(1))
    assert got is not None and np.array_equal(got, row(2))


def test_cache_counts_vectors_of_several_widths_as_they_are() -> None:
    cache = VectorCache(4000)
    for number in range(50):
        cache.put(key(number), np.ones(1 + 37 * number % 200, dtype=np.float32))
        assert cache.num_bytes == sum(kept.nbytes + ENTRY_BYTES for kept in cache._rows.values()) <= 4000


def test_cache_keeps_a_copy_that_nobody_can_change() -> None:
    cache = VectorCache(10 * SIZE)
    batch = np.stack([row(1), row(2)])
    whole = weakref.ref(batch)
    cache.put(key(1), batch[0])
    batch[0] = 7
    got = cache.get(key(1))
    assert got is not None and np.array_equal(got, row(1))
    with pytest.raises(ValueError, match="read-only"):
        got[0] = 7
    del batch
    assert whole() is None, "a row keeps its whole batch alive"


@pytest.mark.parametrize("capacity", [100, 700, 1366, 2732])
def test_cache_takes_no_more_memory_than_it_says(capacity: int) -> None:
    cache = VectorCache(capacity * SIZE)
    one = row(1)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for number in range(3 * capacity):
            cache.put(key(number), one)
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert len(cache) == capacity
    assert 0.5 * cache.num_bytes < taken <= cache.num_bytes
