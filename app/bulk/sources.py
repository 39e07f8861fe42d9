"""INPUT -> a Source: the suffix decides which."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from app.bulk.delimited import Delimited
from app.bulk.ending import refused
from app.bulk.folder import Folder
from app.bulk.items import Columns, ImageFiles
from app.bulk.jsonl import JsonLines
from app.bulk.lines import is_gzip
from app.bulk.parquet import Parquet
from app.bulk.rows import Source

JSON_LINES = (".jsonl", ".ndjson")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
PARQUET = (".parquet", ".pq")


def kind_of(path: Path) -> str:
    """Return the suffix of an input without .gz, or "/" for a folder. Raises Stopped if it is not supported, or not there."""
    suffix = (path.with_suffix("") if is_gzip(path) else path).suffix.lower()
    if path.is_dir():
        return "/"
    if suffix not in (*JSON_LINES, *DELIMITERS, *PARQUET) or (is_gzip(path) and suffix in PARQUET):
        raise refused(
            f"{path} is neither a folder of images nor a file that ends in .jsonl, .ndjson, .csv, .tsv (each perhaps with .gz) "
            "or .parquet"
        )
    if not path.is_file():
        raise refused(f"{path} is {'no regular file' if path.exists() else 'not there'}")
    return suffix


def open_source(
    path: Path,
    columns: Columns,
    delimiter: str | None,
    *,
    max_image_bytes: int,
    max_line_bytes: int,
    listing: Path,
    check: Callable[[], None],
) -> Source:
    """Open an input. For a folder, `listing` is the file to write its paths to, and `check`, which may raise, is called while
    that goes on. Raises Stopped if the input cannot be read."""
    kind = kind_of(path)
    if kind == "/":
        return Folder(path, listing, ImageFiles(path, max_image_bytes), check)
    files = ImageFiles(path.parent, max_image_bytes)
    if kind in JSON_LINES:
        return JsonLines(path, columns, files, max_line_bytes)
    if kind in DELIMITERS:
        return Delimited(path, columns, delimiter or DELIMITERS[kind], files, max_line_bytes)
    return Parquet(path, columns, files)
