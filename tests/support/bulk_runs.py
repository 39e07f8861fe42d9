"""Runs of `python -m app embed` for its tests: inputs to write, a run in this process, and what an output holds."""

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
    """JSON Lines; bytes are a line as it is."""
    path.write_bytes(b"".join((item if isinstance(item, bytes) else json.dumps(item).encode()) + b"\n" for item in items))
    return path


def run(
    source: Path, output: Path, model: EmbeddingModel | None = None, settings: dict[str, Any] | None = None, **more: Any
) -> int:
    """The exit code of a run in this process. Raises Stopped."""
    model = model or FakeModel()
    options = Options(source, output, quiet=True, **more)
    return asyncio.run(Run(make_settings(**settings or {}), options, model.load_both).run())


@dataclass
class Written:
    """An output: vectors, float32 of shape (good rows, dimension), with their rows and ids; the lines of its bad rows."""

    rows: list[int]
    ids: list[Any]
    vectors: npt.NDArray[np.float32]
    bad: list[dict[str, Any]]
    meta: dict[str, Any]


def read(output: Path) -> Written:
    """An output of any form, in one."""
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
    """What lies beside an output, less what belongs to it."""
    own = {output.name, *(f"{output.name}.{name}" for name in ("bad.jsonl", "meta.json", "ids.jsonl"))}
    return {path.name for path in output.parent.iterdir() if path.name.startswith(output.name)} - own
