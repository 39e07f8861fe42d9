"""Runs of `python -m app embed` for its tests: write an input, run in this process, and read an output."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from app.bulk.options import Options
from app.bulk.run import Run
from models.base import EmbeddingModel
from tests.conftest import make_settings
from tests.support.fakes import FakeModel


def write_lines(path: Path, items: Sequence[Any]) -> Path:
    """Write JSON Lines. Items that are bytes are written as they are."""
    path.write_bytes(b"".join((item if isinstance(item, bytes) else json.dumps(item).encode()) + b"\n" for item in items))
    return path


def run(
    source: Path, output: Path, model: EmbeddingModel | None = None, settings: dict[str, Any] | None = None, **more: Any
) -> int:
    """Run in this process. Returns the exit code, or raises Stopped."""
    model = model or FakeModel()
    options = Options(source, output, quiet=True, **more)
    return asyncio.run(Run(make_settings(**settings or {}), options, model.load_both).run())


@dataclass
class Written:
    """An output: its vectors, float32 of shape (good rows, dimension), their rows and ids, its bad rows and its summary."""

    rows: list[int]
    ids: list[Any]
    vectors: npt.NDArray[np.float32]
    bad: list[dict[str, Any]]
    meta: dict[str, Any]


def read(output: Path) -> Written:
    """Read an output of any format."""
    bad_file, meta_file = (output.with_name(f"{output.name}.{name}") for name in ("bad.jsonl", "meta.json"))
    bad = [json.loads(line) for line in bad_file.read_text().splitlines()] if bad_file.exists() else []
    meta = json.loads(meta_file.read_text())
    if output.suffix == ".parquet":
        table = pq.read_table(output)
        vectors = np.array(table["embedding"].to_pylist(), dtype=np.float32)
        return Written(table["row"].to_pylist(), table["id"].to_pylist(), vectors, bad, meta)
    if output.suffix == ".npy":
        array = np.load(output)
        good = np.flatnonzero(np.isfinite(array).all(axis=1))
        ids_file = output.with_name(f"{output.name}.ids.jsonl")
        ids = [json.loads(line) for line in ids_file.read_text().splitlines()] if ids_file.exists() else [None] * len(array)
        assert len(ids) == len(array)
        return Written(good.tolist(), [ids[row] for row in good], array[good], bad, meta)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    vectors = np.array([line["embedding"] for line in lines], dtype=np.float32)
    return Written([line["row"] for line in lines], [line["id"] for line in lines], vectors, bad, meta)


def leftovers(output: Path) -> set[str]:
    """Return the names of files beside an output that begin with its name and do not belong to it."""
    own = {output.name, *(f"{output.name}.{name}" for name in ("bad.jsonl", "meta.json", "ids.jsonl"))}
    return {path.name for path in output.parent.iterdir() if path.name.startswith(output.name)} - own
