"""How many cores there are to use: affinity and a container's quota, whichever is less."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from app import process as cores
from app.process import tame_threads


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Eight cores, and the file of a quota that is not there yet."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(cores, "QUOTA", tmp_path / "cpu.max")
    return tmp_path / "cpu.max"


@pytest.mark.parametrize(
    ("quota", "usable"),
    [
        (None, 8),
        ("max 100000", 8),
        ("200000 100000", 2),
        ("250000 100000", 2),
        ("50000 100000", 1),
        ("3200000 100000", 8),
        ("", 8),
        ("nonsense", 8),
    ],
)
def test_the_lesser_of_affinity_and_quota(machine: Path, quota: str | None, usable: int) -> None:
    if quota is not None:
        machine.write_text(quota + "\n")
    assert cores.usable_cores() == usable


@pytest.mark.parametrize(
    ("quota", "given", "expected"), [("max 100000", None, None), ("200000 100000", None, "2"), ("200000 100000", "5", "5")]
)
def test_torch_is_told_of_a_quota(
    machine: Path, quota: str, given: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_NUM_THREADS", "GOMP_SPINCOUNT", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "x")  # so that it is put back
        monkeypatch.delenv(name)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    machine.write_text(quota)
    tame_threads()
    assert os.environ.get("OMP_NUM_THREADS") == expected
