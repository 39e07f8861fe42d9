"""Paths that tests use: the repository, and the conformance set."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
CONFORMANCE = ROOT / "tests" / "conformance"
CHECKPOINT = CONFORMANCE / "checkpoint"
CASES = CONFORMANCE / "cases"
