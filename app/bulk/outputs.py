"""The parts of a run -> its output, in one of three formats. Memory stays at some tens of megabytes, whatever the output's size.

Parquet and JSON Lines leave bad rows out; the others keep their row numbers. A NumPy file has row i for row i of the input, NaN
if that is bad, and its ids are in a file of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from app.bulk import durable
from app.bulk.journal import Part, open_part, read_part

# Parts may be much smaller than what Parquet reads well, so they are joined to row groups of at least so many rows or bytes.
_GROUP_ROWS = 65_536
_GROUP_BYTES = 64 << 20

Labels = Mapping[str, str]
# Called for each part; an exception that it raises ends the writing.
Check = Callable[[], None]
Writer = Callable[[Path, Sequence[Part], int, Labels, Check], None]


def write_parquet(path: Path, parts: Sequence[Part], dimension: int, labels: Labels, check: Check) -> None:
    """Write columns `row`, `id` and `embedding`, a list of `dimension` float32; `labels` become the schema's metadata."""
    schema = pa.schema(
        [("row", pa.int64()), ("id", _id_type(parts)), ("embedding", pa.list_(pa.float32(), dimension))], metadata=labels
    )
    with (
        durable.new_file(path) as file,
        # Components of vectors hardly ever repeat: a dictionary or compression would take time and save nothing.
        pq.ParquetWriter(file, schema, use_dictionary=False, compression={"row": "zstd", "id": "zstd"}) as writer,
    ):
        for table in _joined(_tables(parts, check)):
            writer.write_table(table.filter(table["good"]).select(schema.names).cast(schema))


def write_jsonl(path: Path, parts: Sequence[Part], dimension: int, labels: Labels, check: Check) -> None:
    """Write a line `{"row", "id", "embedding"}` for each vector."""
    with durable.new_file(path) as file:
        for table in _tables(parts, check):
            columns = (table["row"].to_pylist(), table["id"].to_pylist(), table["good"].to_pylist(), _vectors(table))
            for row, row_id, good, vector in zip(*columns, strict=True):
                if good:
                    line = {"row": row, "id": row_id, "embedding": vector}
                    file.write(orjson.dumps(line, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE))


def write_npy(path: Path, parts: Sequence[Part], dimension: int, labels: Labels, check: Check) -> None:
    """Write float32 of shape (rows of the input, dimension); and, if any row has an id, all ids to `ids_path(path)`, a line of
    JSON each."""
    rows = parts[-1].end if parts else 0
    header = {"descr": "<f4", "fortran_order": False, "shape": (rows, dimension)}
    has_ids = False
    with durable.new_file(ids_path(path)) as ids_file, durable.new_file(path) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for table in _tables(parts, check):
            file.write(np.ascontiguousarray(_vectors(table), dtype="<f4").data)
            has_ids = has_ids or table["id"].null_count < table.num_rows
            ids_file.writelines(orjson.dumps(row_id) + b"\n" for row_id in table["id"].to_pylist())
    if not has_ids:
        ids_path(path).unlink()


WRITERS: Mapping[str, Writer] = {".parquet": write_parquet, ".npy": write_npy, ".jsonl": write_jsonl, ".ndjson": write_jsonl}


def ids_path(path: Path) -> Path:
    """Return the file of a NumPy file's ids."""
    return path.with_name(f"{path.name}.ids.jsonl")


def _tables(parts: Sequence[Part], check: Check) -> Iterator[pa.Table]:
    """Yield each part as a table of `row`, `id`, `good` and `embedding`; `id` has one type in all of them."""
    id_type = _id_type(parts)
    for part in parts:
        check()
        table = read_part(part)
        table = table.set_column(0, "id", table["id"].cast(id_type))
        yield table.append_column("row", pa.array(range(part.first, part.end), pa.int64()))


def _joined(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Yield the same rows in tables of at least _GROUP_ROWS or _GROUP_BYTES; the last one may be smaller."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        if sum(one.num_rows for one in waiting) >= _GROUP_ROWS or sum(one.nbytes for one in waiting) >= _GROUP_BYTES:
            yield pa.concat_tables(waiting)
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting)


def _vectors(table: pa.Table) -> npt.NDArray[np.float32]:
    """Return the embeddings as float32 of shape (rows, dimension)."""
    column = table["embedding"].combine_chunks()
    flat: npt.NDArray[np.float32] = column.flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(table.num_rows, -1)


def _id_type(parts: Iterable[Part]) -> pa.DataType:
    """Return int64 if the ids of every part are integers or missing, else string."""
    types = {open_part(part.path).schema.field("id").type for part in parts} - {pa.null()}
    return pa.int64() if types == {pa.int64()} else pa.string()
