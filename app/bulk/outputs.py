"""The parts of a run -> its output, in one of three forms. Some tens of megabytes are in memory at a time, however large it is.

In Parquet and JSON Lines a bad row is left out, and the others have their numbers. A NumPy file has a row for each row of the
input, so that row i is row i; a bad one is NaN. Its ids are in a file of their own.
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

# A row group of the output has so many rows or bytes, about; parts may be much smaller.
_GROUP_ROWS = 65_536
_GROUP_BYTES = 64 << 20

Labels = Mapping[str, str]
# Called for each part; what it raises ends the writing.
Check = Callable[[], None]
Writer = Callable[[Path, Sequence[Part], int, Labels, Check], None]


def write_parquet(path: Path, parts: Sequence[Part], dimension: int, labels: Labels, check: Check) -> None:
    """Columns `row`, `id`, `embedding`, a list of so many float32; `labels` are the schema's metadata."""
    schema = pa.schema(
        [("row", pa.int64()), ("id", _id_type(parts)), ("embedding", pa.list_(pa.float32(), dimension))], metadata=labels
    )
    with (
        durable.new_file(path) as file,
        # No two components of vectors are alike: a dictionary or compression would take time and save nothing.
        pq.ParquetWriter(file, schema, use_dictionary=False, compression={"row": "zstd", "id": "zstd"}) as writer,
    ):
        for table in _joined(_tables(parts, check)):
            writer.write_table(table.filter(table["good"]).select(schema.names).cast(schema))


def write_jsonl(path: Path, parts: Sequence[Part], dimension: int, labels: Labels, check: Check) -> None:
    """A line `{"row", "id", "embedding"}` for each vector."""
    with durable.new_file(path) as file:
        for table in _tables(parts, check):
            columns = (table["row"].to_pylist(), table["id"].to_pylist(), table["good"].to_pylist(), _vectors(table))
            for row, identity, good, vector in zip(*columns, strict=True):
                if good:
                    line = {"row": row, "id": identity, "embedding": vector}
                    file.write(orjson.dumps(line, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE))


def write_npy(path: Path, parts: Sequence[Part], dimension: int, labels: Labels, check: Check) -> None:
    """float32 of shape (rows of the input, dimension), and beside it the ids, a line of JSON each, where there are any."""
    rows = parts[-1].past if parts else 0
    header = {"descr": "<f4", "fortran_order": False, "shape": (rows, dimension)}
    has_ids = False
    ids_path = ids_beside(path)
    with durable.new_file(ids_path) as ids_file, durable.new_file(path) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for table in _tables(parts, check):
            file.write(np.ascontiguousarray(_vectors(table), dtype="<f4").data)
            has_ids = has_ids or table["id"].null_count < table.num_rows
            ids_file.writelines(orjson.dumps(identity) + b"\n" for identity in table["id"].to_pylist())
    if not has_ids:
        ids_path.unlink()


WRITERS: Mapping[str, Writer] = {".parquet": write_parquet, ".npy": write_npy, ".jsonl": write_jsonl, ".ndjson": write_jsonl}


def ids_beside(path: Path) -> Path:
    """Where the ids of a NumPy file are."""
    return path.with_name(f"{path.name}.ids.jsonl")


def _tables(parts: Sequence[Part], check: Check) -> Iterator[pa.Table]:
    """Every part: `row`, `id`, of one type in all of them, `good`, `embedding`."""
    id_type = _id_type(parts)
    for part in parts:
        check()
        table = read_part(part)
        table = table.set_column(0, "id", table["id"].cast(id_type))
        yield table.append_column("row", pa.array(range(part.first, part.past), pa.int64()))


def _joined(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in larger tables."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        if sum(one.num_rows for one in waiting) >= _GROUP_ROWS or sum(one.nbytes for one in waiting) >= _GROUP_BYTES:
            yield pa.concat_tables(waiting)
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting)


def _vectors(table: pa.Table) -> npt.NDArray[np.float32]:
    """float32 of shape (rows, dimension)."""
    column = table["embedding"].combine_chunks()
    flat: npt.NDArray[np.float32] = column.flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(table.num_rows, -1)


def _id_type(parts: Iterable[Part]) -> pa.DataType:
    """Whole numbers where every part has those, else text."""
    types = {open_part(part.path).schema.field("id").type for part in parts} - {pa.null()}
    return pa.int64() if types == {pa.int64()} else pa.string()
