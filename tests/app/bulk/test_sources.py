"""Inputs: every format gives the same rows, with bad rows in their places, from any row on, in bounded memory."""

from __future__ import annotations

import base64
import csv
import gzip
import io
import json
import os
import tracemalloc
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from app.bulk.ending import Stopped
from app.bulk.items import Columns
from app.bulk.journal import Journal
from app.bulk.rows import BulkRow, Cursor, Source
from app.bulk.sources import open_source
from app.bulk.stream import FAST_S, SLOW_S, Pace, groups
from tests.support.bulk_runs import write_lines
from tests.support.hosts import base64_of, picture, png

LINE = 10_000


def opened(path: Path, columns: Columns = Columns(), delimiter: str | None = None, max_line: int = LINE) -> Source:  # noqa: B008
    listing = path.parent / f"{path.name}.listing"
    limits = {"max_image_bytes": 5000, "max_line_bytes": max_line}
    return open_source(path, columns, delimiter, listing=listing, check=lambda: None, **limits)


def read_all(path: Path, *arguments: Any) -> list[BulkRow]:
    return list(opened(path, *arguments).rows(Cursor()))


def brief(row: BulkRow) -> Any:
    """Return a row in short: its id, and its item or the reason of its fault."""
    return (row.id, json.loads(row.item) if row.item is not None else row.fault and row.fault.message)


def csv_file(path: Path, rows: list[list[str]], delimiter: str = ",") -> Path:
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows(rows)
    path.write_text(text.getvalue())
    return path


# JSON Lines


def test_jsonl_takes_every_item_of_the_api(tmp_path: Path) -> None:
    items = [
        "a text",
        {"id": "x", "text": "t", "instruction": "i", "title": "is not sent"},
        {"id": 7, "content": ["a", {"type": "text", "text": "b"}]},
        [{"role": "user", "content": "hi"}],
        {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}},
    ]
    rows = read_all(write_lines(tmp_path / "in.jsonl", items))
    assert [brief(row) for row in rows] == [
        (None, "a text"),
        ("x", {"text": "t", "instruction": "i"}),
        (7, {"content": ["a", {"type": "text", "text": "b"}]}),
        (None, [{"role": "user", "content": "hi"}]),
        (None, items[4]),
    ]
    assert [row.number for row in rows] == list(range(5))


def test_jsonl_line_that_is_no_json_is_one_bad_row(tmp_path: Path) -> None:
    lines = ["a", b"{", b"", b"  ", b'"\xff"', b'"' + b"x" * LINE + b'"', {"id": [1], "text": "t"}, "z"]
    rows = read_all(write_lines(tmp_path / "in.jsonl", lines))
    assert [row.number for row in rows] == list(range(6))
    assert [row.line for row in rows] == [1, 2, 5, 6, 7, 8]  # empty lines are counted, but are no rows
    reasons = [row.fault.message if row.fault else None for row in rows]
    assert reasons[0] is None and reasons[-1] is None
    assert all(reason and "not valid JSON in UTF-8" in reason for reason in reasons[1:3])
    assert reasons[3] and "10,000 bytes" in reasons[3]
    assert reasons[4] == "id must be a string or a whole number"


def test_jsonl_loses_its_byte_order_mark_and_utf_16_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'\xef\xbb\xbf"a"\n"b"')
    assert [brief(row) for row in read_all(path)] == [(None, "a"), (None, "b")]
    path.write_text('"a"\n', encoding="utf-16")
    with pytest.raises(Stopped, match="UTF-16"):
        read_all(path)


def test_jsonl_keys_may_be_chosen(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in.jsonl", [{"body": "t", "text": "not this", "key": "k"}, {"text": "no body"}])
    rows = read_all(path, Columns(text="body", id="key"))
    assert [brief(row) for row in rows] == [("k", {"text": "t"}), (None, "the row has neither a text nor an image")]


# Images in rows


def test_image_is_a_url_a_path_or_base64(tmp_path: Path) -> None:
    data = png(picture(1))
    (tmp_path / "in").mkdir()
    (tmp_path / "photo.png").write_bytes(data)
    (tmp_path / "in" / "photo.png").write_bytes(data)
    encoded = base64.b64encode(data).decode()
    assert "." not in encoded
    same = ["https://example.org/photo.png", f"data:image/png;base64,{encoded}", encoded, "bm90IGFuIGltYWdl", "ftp://a.b/c.png"]
    for image in same:
        (row,) = read_all(write_lines(tmp_path / "in" / "in.jsonl", [{"image": image}]))
        assert brief(row) == (None, {"image": image})
    named = "photo.png"
    read: list[tuple[Any, Any]] = [
        ({"image": named}, {"image": encoded}),
        ({"image": "../photo.png"}, {"image": encoded}),
        ({"image": str(tmp_path / "photo.png")}, {"image": encoded}),
        ({"image": [named, {"url": named}]}, {"image": [encoded, {"url": encoded}]}),
        ({"type": "image", "data": named}, {"type": "image", "data": encoded}),
        ({"content": ["a.b", {"type": "image_url", "image_url": {"url": named}}]}, None),
        ([{"role": "user", "content": [{"type": "image", "image": named}]}], None),
        ({"text": "photo.png"}, {"text": "photo.png"}),
        ("photo.png", "photo.png"),
    ]
    for item, expected in read:
        (row,) = read_all(write_lines(tmp_path / "in" / "in.jsonl", [item]))
        found = brief(row)[1]
        assert found == (expected or json.loads(json.dumps(item).replace(f'"{named}"', f'"{encoded}"')))


@pytest.mark.parametrize("what", ["missing.png", ".", "pipe.png", "large.png", "nul\0.png", "/dev/zero."])
def test_image_file_that_cannot_be_read_is_one_bad_row(what: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "large.png").write_bytes(b"x" * 5001)
    bad, good = read_all(write_lines(tmp_path / "in.jsonl", [{"id": 1, "image": what}, {"id": 2, "text": "t"}]))
    assert bad.fault is not None and bad.fault.param == "image" and bad.id == 1
    assert str(tmp_path) not in bad.fault.message
    assert good.fault is None


# CSV


def test_csv_columns_are_found_or_chosen(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(picture(1)))
    rows = [["id", "text", "image", "instruction", "more"], ["1", 'say "hi",\nyou', "", "", "x"], ["", "t", "a.png", "i", ""]]
    expected = [("1", {"text": 'say "hi",\nyou'}), (None, {"text": "t", "image": base64_of(picture(1)), "instruction": "i"})]
    assert [brief(row) for row in read_all(csv_file(tmp_path / "in.csv", rows))] == expected
    assert [brief(row) for row in read_all(csv_file(tmp_path / "in.tsv", rows, "\t"))] == expected
    assert [brief(row) for row in read_all(csv_file(tmp_path / "in.csv", rows, ";"), Columns(), ";")] == expected
    with gzip.open(tmp_path / "in.csv.gz", "wb") as file:
        file.write((tmp_path / "in.tsv").read_bytes().replace(b"\t", b","))
    chosen = read_all(csv_file(tmp_path / "in.csv", rows), Columns(text="more", id="text"))
    assert [brief(row) for row in chosen] == [('say "hi",\nyou', {"text": "x"}), ("t", "the row has neither a text nor an image")]


def test_csv_names_the_lines_that_an_open_quote_took_in(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text('text\na\n"b\nc\nd "e"\nf\n"g\nh\n')
    rows = read_all(tmp_path / "in.csv")
    assert [(row.line, row.item, row.fault and row.fault.message.partition("; ")[2]) for row in rows] == [
        (2, b'{"text":"a"}', None),
        (3, None, "lines 3 to 5 were read as this row"),
        (6, b'{"text":"f"}', None),
        (7, None, "lines 7 to 8 were read as this row"),
    ]


@pytest.mark.parametrize("data", ["", "\ntext\na\n"])
def test_csv_without_a_header_is_refused(data: str, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text(data)
    with pytest.raises(Stopped, match="has no header"):
        opened(tmp_path / "in.csv")


def test_csv_rows_that_are_bad_spoil_no_other(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_bytes(
        b"id,text\n1,a\n2,b,c\n\n3,\xff\xfe\n\xff,e\n4,\n"
        + b"5," + b"x" * LINE + b"\n6,f\n7,\"g\"h\n8,i\n9,\"open\nto the end"
    )  # fmt: skip
    rows = read_all(path)
    assert [(row.id, row.line, row.fault is None) for row in rows] == [
        ("1", 2, True),
        (None, 3, False),
        ("3", 5, False),
        ("�", 6, True),
        ("4", 7, False),
        (None, 8, False),
        ("6", 9, True),
        (None, 10, False),
        ("8", 11, True),
        (None, 12, False),
    ]
    reasons = [row.fault.message for row in rows if row.fault]
    for reason, word in zip(reasons, ["3 cells", "UTF-8", "neither", "10,000 bytes", "CSV", "never closed"], strict=True):
        assert word in reason


@pytest.mark.parametrize(
    ("header", "columns", "said"),
    [
        ("a,b", Columns(), "neither a column 'text' nor one 'image'"),
        ("text", Columns(image="picture"), "no column 'picture'; it has 'text'"),
        ("", Columns(), "has no header"),
    ],
)
def test_csv_without_the_columns_is_refused(header: str, columns: Columns, said: str, tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_text(f"{header}\n1,2\n")
    with pytest.raises(Stopped, match=said):
        opened(path, columns)


# Parquet


def test_parquet_takes_cells_of_every_kind(tmp_path: Path) -> None:
    data = png(picture(1))
    (tmp_path / "a.png").write_bytes(data)
    cells = [{"bytes": data, "path": "gone.png"}, {"bytes": None, "path": "a.png"}, {"bytes": None, "path": None}, None]
    table = pa.table({"id": [1, 2, 3, 4], "text": ["a", None, "c", "d"], "image": cells, "other": [0.5] * 4})
    pq.write_table(table, tmp_path / "in.parquet")
    encoded = base64_of(picture(1))
    assert [brief(row) for row in read_all(tmp_path / "in.parquet")] == [
        (1, {"text": "a", "image": encoded}),
        (2, {"image": encoded}),
        (3, "image has neither bytes nor a path"),
        (4, {"text": "d"}),
    ]
    bare = pa.table({"image": pa.array([data, b"x" * 5001], pa.binary()), "id": pa.array(["a", "b"]).dictionary_encode()})
    pq.write_table(bare, tmp_path / "in.pq")
    assert [brief(row) for row in read_all(tmp_path / "in.pq")] == [
        ("a", {"image": encoded}),
        ("b", "image is larger than 5000 bytes, which is the limit"),
    ]


def test_parquet_text_that_is_not_utf_8_is_one_bad_row(tmp_path: Path) -> None:
    texts = pa.StringArray.from_buffers(3, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffc"))
    pq.write_table(pa.table({"text": texts}), tmp_path / "in.parquet")
    assert [brief(row)[1] for row in read_all(tmp_path / "in.parquet")] == [
        {"text": "a"},
        "the row is not valid UTF-8 text",
        {"text": "c"},
    ]


def test_parquet_row_group_that_is_damaged_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    texts = [f"text {number}" for number in range(300)]
    pq.write_table(pa.table({"text": texts}), path, row_group_size=100, use_dictionary=False, compression="zstd")
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    begin = column.data_page_offset
    data[begin : begin + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(data)
    rows = read_all(path)
    assert [row.number for row in rows] == list(range(300))
    assert {row.fault is None for row in rows[:100] + rows[200:]} == {True}
    assert all(row.fault and "row group 1 cannot be read on" in row.fault.message for row in rows[100:200])


def test_parquet_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(Stopped, match="not readable Parquet"):
        opened(tmp_path / "in.parquet")


# A folder


def test_folder_gives_its_images_in_order(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "photos"
    names = ["b.png", "a.JPG", "sub/deep/c.webp", "line\nfeed\\n.gif", "狗.bmp", "sub.png"]
    for number, name in enumerate([*names, "notes.txt", ".hidden.png", ".git/d.png", "no-suffix"]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"file %d" % number)
    with open(os.fsencode(folder) + b"/\xff.png", "wb") as file:
        file.write(b"file 99")
    (folder / "loop").symlink_to(folder)
    rows = read_all(folder)
    assert [row.id for row in rows] == [*sorted(names), "�.png"]
    read = {row.id: base64.b64decode(json.loads(row.item or b"")["image"]) for row in rows}
    assert read == {name: b"file %d" % number for number, name in enumerate(names)} | {"�.png": b"file 99"}
    assert caplog.text.count("2 files are ignored") == 1
    before = dict(opened(folder).identity)
    (folder / "a.JPG").unlink()
    assert dict(opened(folder).identity) != before


@pytest.mark.parametrize("mark", [b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff"])
def test_folder_keeps_a_name_that_begins_with_a_byte_order_mark(mark: bytes, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with open(os.fsencode(tmp_path / "photos") + b"/" + mark + b".png", "wb") as file:
        file.write(b"file")
    assert [row.item for row in read_all(tmp_path / "photos")] == [
        json.dumps({"image": "ZmlsZQ=="}, separators=(",", ":")).encode()
    ]


def test_folder_listing_is_sorted_in_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.bulk.folder._RUN_LINES", 7)
    (tmp_path / "photos").mkdir()
    names = sorted(f"{number * 7919 % 100:03d}.png" for number in range(100))
    for name in names:
        (tmp_path / "photos" / name).touch()
    assert [row.id for row in read_all(tmp_path / "photos")] == names


# Odd inputs


def test_jsonl_messages_of_several_lines_are_no_conversation(tmp_path: Path) -> None:
    """In one request, both would be one conversation, with one vector."""
    messages = [{"id": row, "role": "user", "content": f"text {row}"} for row in range(2)]
    rows = read_all(write_lines(tmp_path / "in.jsonl", messages))
    assert [brief(row) for row in rows] == [(row, [{"role": "user", "content": f"text {row}"}]) for row in range(2)]


def test_csv_header_may_hold_any_text(tmp_path: Path) -> None:
    path = csv_file(tmp_path / "in.csv", [["id", "Price\u00a0€", "what\nyou think", "text"], ["1", "2", "3", "t"]])
    assert [brief(row) for row in read_all(path)] == [("1", {"text": "t"})]
    for data in ("id,text\n1,a\n".encode("utf-16-le"), b"id,text,\xff\n"):
        path.write_bytes(data)
        with pytest.raises(Stopped, match="not UTF-8 text"):
            opened(path)


def test_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = csv_file(tmp_path / "in.csv", [["a", "a", "text", "text"], ["1", "2", "3", "4"]])
    columns = pa.Table.from_arrays([pa.array(["a"])] * 4, names=["a", "a", "text", "text"])
    pq.write_table(columns, tmp_path / "in.parquet")
    for path in (table, tmp_path / "in.parquet"):
        with pytest.raises(Stopped, match="more than one column 'text'"):
            opened(path)
    csv_file(table, [["a", "a", "text"], ["1", "2", "3"]])
    assert [brief(row) for row in read_all(table)] == [(None, {"text": "3"})]


@pytest.mark.parametrize(
    "ids",
    [
        pa.array([10**9, 1], pa.timestamp("ns")),
        pa.array([1, 10**18], pa.timestamp("ms")),
        pa.array([1, 10**8], pa.date32()),
        pa.array([1000, 1], pa.duration("ns")),
    ],
    ids=lambda ids: str(ids.type),
)
def test_parquet_value_that_python_cannot_hold_is_one_bad_row(ids: pa.Array, tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ids, "text": ["a", "b"]}), tmp_path / "in.parquet")
    good, bad = read_all(tmp_path / "in.parquet")
    assert good.fault is None
    assert bad.fault is not None and bad.fault.param == "id" and bad.fault.message.startswith("id cannot be read")


def test_parquet_texts_may_be_binary(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array(["é".encode(), b"\xff", None], pa.binary())}), tmp_path / "in.parquet")
    assert [brief(row)[1] for row in read_all(tmp_path / "in.parquet")] == [
        {"text": "é"},
        "the row is not valid UTF-8 text",
        "the row has neither a text nor an image",
    ]


def test_parquet_cells_that_no_item_has_are_bad_rows(tmp_path: Path) -> None:
    for cells, said in (
        ({"image": [{"bytes": "a string", "path": "a.png"}]}, "image.bytes holds no bytes"),
        ({"image": [{"data": b"x"}]}, "of no type that JSON has"),
        ({"text": [Decimal("1.5")]}, "of no type that JSON has"),
    ):
        pq.write_table(pa.table(cells), tmp_path / "in.parquet")
        (row,) = read_all(tmp_path / "in.parquet")
        assert row.fault is not None and said in row.fault.message


def test_parquet_that_is_replaced_before_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    for data, said in ((b"no Parquet", "not readable any more"), (None, "not readable any more"), (b"", "changed")):
        pq.write_table(pa.table({"text": ["a"] * 9}), path, row_group_size=3)
        source = opened(path)
        if data is None:
            path.unlink()
        elif data:
            path.write_bytes(data)
        else:
            pq.write_table(pa.table({"text": ["a"]}), path)
        with pytest.raises(Stopped, match=said):
            list(source.rows(Cursor()))


def test_folder_skips_links_that_are_circular_or_dangling(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"x")
    (folder / "circle.png").symlink_to("circle.png")
    (folder / "gone.png").symlink_to("nowhere.png")
    assert [row.id for row in read_all(folder)] == ["a.png"]


# Every format


def some_of_each(folder: Path) -> list[Path]:
    """Write 60 rows in every format: the same ones, but for bad rows in JSON Lines and images in a folder."""
    items = [{"id": number, "text": f"text {number} " + "é\n" * (number % 5)} for number in range(60)]
    lines: list[Any] = [b"{" if number % 7 == 3 else item for number, item in enumerate(items)]
    write_lines(folder / "in.jsonl", lines)
    table = [["id", "text"]] + [[str(item["id"]), str(item["text"])] for item in items]
    csv_file(folder / "in.csv", table)
    for name in ("in.jsonl", "in.csv"):
        with gzip.open(folder / f"{name}.gz", "wb") as file:
            file.write((folder / name).read_bytes())
    pq.write_table(pa.Table.from_pylist(items), folder / "in.parquet", row_group_size=25)
    (folder / "photos").mkdir()
    for number in range(60):
        (folder / "photos" / f"{number:02d}.png").write_bytes(b"%d" % number)
    return [folder / name for name in ("in.jsonl", "in.csv", "in.jsonl.gz", "in.csv.gz", "in.parquet", "photos")]


def test_source_reads_on_from_any_row(tmp_path: Path) -> None:
    for path in some_of_each(tmp_path):
        source = opened(path)
        rows = list(source.rows(Cursor()))
        assert [row.number for row in rows] == list(range(60)), path
        for begin, before in enumerate(rows):
            assert list(source.rows(before.after)) == rows[begin + 1 :], (path, begin)
        if source.total is not None:
            assert rows[-1].after.at == source.total, path


def test_source_of_another_input_has_another_identity(tmp_path: Path) -> None:
    for path in some_of_each(tmp_path):
        known = dict(opened(path).identity)
        assert dict(opened(path).identity) == known, path
        changed = path / "00.png" if path.is_dir() else path
        source = opened(path)
        assert not source.has_changed()
        data = bytearray(changed.read_bytes())
        data[-1] ^= 1
        changed.write_bytes(data)
        os.utime(changed, ns=(1, 1))
        if path.suffix != ".parquet":
            assert dict(opened(path).identity) != known, path
        assert path.is_dir() or source.has_changed()


@pytest.mark.parametrize("name", ["none.jsonl", "in.json", "in.txt", "in.parquet.gz"])
def test_source_of_no_known_form_is_refused(name: str, tmp_path: Path) -> None:
    if not name.startswith("none"):
        (tmp_path / name).touch()
    with pytest.raises(Stopped):
        opened(tmp_path / name)


def test_gzip_that_is_cut_short_ends_the_run(tmp_path: Path) -> None:
    whole = gzip.compress(b'"some text"\n' * 1000)
    (tmp_path / "in.jsonl.gz").write_bytes(whole[:-20])
    with pytest.raises(Stopped, match="cannot be read beyond byte"):
        read_all(tmp_path / "in.jsonl.gz")


def test_groups_are_bounded_in_rows_and_bytes() -> None:
    def row(number: int, size: int) -> BulkRow:
        return BulkRow(number, None, b"x" * size, None, Cursor(number + 1))

    sizes = [1, 1, 1, 1, 5, 4, 1, 20, 1]
    found = [[len(one.item or b"") for one in group] for group in groups(map(row, range(9), sizes), Pace(3), 6)]
    assert found == [[1, 1, 1], [1, 5], [4, 1], [20], [1]]


def test_pace_grows_with_fast_requests_and_shrinks_with_slow_ones() -> None:
    pace = Pace(100)
    sizes = [pace.rows]
    for seconds in (FAST_S / 2,) * 3 + (FAST_S * 2,) + (SLOW_S * 2,) * 9:
        pace.adapt(seconds, pace.rows)
        sizes.append(pace.rows)
    assert sizes == [32, 64, 100, 100, 100, 50, 25, 12, 6, 3, 1, 1, 1, 1]
    pace.adapt(FAST_S / 2, 7)  # a request of an earlier size, which says nothing of the current one
    pace.adapt(SLOW_S * 2, 100)
    assert pace.rows == 1


def test_memory_is_bounded_whatever_the_size(tmp_path: Path) -> None:
    """Of files of 40 MB, lines hold at most 2 MiB, and a row group of all rows some batches."""
    text = "x" * 990
    with (tmp_path / "in.jsonl").open("w") as lines, (tmp_path / "in.csv").open("w") as table:
        table.write("id,text\n")
        for number in range(40_000):
            lines.write(f'{{"id": {number}, "text": "{text}"}}\n')
            table.write(f"{number},{text}\n")
    columns = pa.table({"id": range(40_000), "text": [f"{number}{text}" for number in range(40_000)]})
    pq.write_table(columns, tmp_path / "in.parquet", row_group_size=40_000, use_dictionary=False, compression="none")
    del columns
    for name, bound in (("in.jsonl", 2 << 20), ("in.csv", 2 << 20), ("in.parquet", 16 << 20)):
        source = opened(tmp_path / name)
        arrow, count = 0, 0
        before = pa.total_allocated_bytes()
        tracemalloc.start()
        try:
            for count, _ in enumerate(source.rows(Cursor()), start=1):
                if count % 100 == 0:
                    arrow = max(arrow, pa.total_allocated_bytes() - before)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert count == 40_000
        assert peak + arrow < bound, (name, peak, arrow)


def test_memory_is_bounded_for_a_value_that_many_rows_share(tmp_path: Path) -> None:
    """Parquet may have it once: the rows of this file of some kilobytes would take 200 MB."""
    shared = pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), pa.array(["x" * 200_000]))
    pq.write_table(pa.table({"text": shared}), tmp_path / "in.parquet", store_schema=False)
    before, most = pa.total_allocated_bytes(), 0
    tracemalloc.start()
    try:
        for _ in opened(tmp_path / "in.parquet").rows(Cursor()):
            most = max(most, pa.total_allocated_bytes() - before)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak + most < 16 << 20


def test_groups_count_the_bytes_of_ids(tmp_path: Path) -> None:
    """A bad row may have nothing else."""
    path = write_lines(tmp_path / "in.jsonl", [{"id": "x" * 1000}] * 50)
    assert [len(group) for group in groups(iter(read_all(path)), Pace(256), max_bytes=10_100)] == [10] * 5


# The journal


def test_journal_drops_the_bad_rows_of_a_commit_that_was_cut_off(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "out.npy")
    journal.folder.mkdir()
    for tail in (b"", b'{"row":2,"reason":"r"}\n', b'{"row":3}\n{"row":4}\n', b'{"row":2,"rea', b'{"row'):
        journal.bad_rows.write_bytes(b'{"row":0}\n{"row":1}\n' + tail)
        journal._drop_bad_rows(2)
        assert journal.bad_rows.read_bytes() == b'{"row":0}\n{"row":1}\n'
