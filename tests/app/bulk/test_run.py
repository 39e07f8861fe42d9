"""The command with the engine in this process: its output, what it refuses, and that a run is resumed where it stopped."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from app.bulk import run as module
from app.bulk import stream
from app.bulk.embedder import Answer
from app.bulk.ending import Ending, Stopped
from app.bulk.in_process import InProcess
from app.bulk.journal import Journal, read_part
from app.bulk.options import Options
from app.bulk.progress import Progress
from app.bulk.run import Run
from models.base import DeviceUnavailable, ModelLoadError
from tests.conformance.report import CASES, golden, load
from tests.conftest import Serve, make_settings
from tests.support.bulk_runs import leftovers, read, run, write_lines
from tests.support.fakes import FakeModel
from tests.support.oracle import cosines
from tests.support.paths import CONFORMANCE, ROOT
from tests.support.waiting import until

FORMS = (".parquet", ".npy", ".jsonl")


def texts(count: int, ids: bool = True) -> list[Any]:
    return [{"id": row, "text": f"text {row}"} if ids else f"text {row}" for row in range(count)]


def expected(rows: list[int], model: FakeModel | None = None, **more: Any) -> np.ndarray:
    model = model or FakeModel()
    return np.stack([model.vector(f"text {row}", **more) for row in rows])


# The output


@pytest.mark.parametrize("form", FORMS)
def test_output_has_every_vector_in_order(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / f"out{form}"
    items: list[Any] = texts(100)
    items[7], items[50], items[99] = {"id": 7}, b"{", {"id": 99, "image": "none.png"}
    assert run(write_lines(tmp_path / "in.jsonl", items), output, request_rows=9) == Ending.BAD_ROWS
    written = read(output)
    good = [row for row in range(100) if row not in (7, 50, 99)]
    assert written.rows == written.ids == good
    assert np.array_equal(written.vectors, expected(good))
    assert [(line["row"], line["line"], line["id"], line["param"]) for line in written.bad] == [
        (7, 8, 7, None),
        (50, 51, None, None),
        (99, 100, 99, "image"),
    ]
    assert "holds nothing to embed" in written.bad[0]["reason"] and "input[" not in written.bad[0]["reason"]
    assert {key: written.meta[key] for key in ("name", "dimension", "rows", "vectors", "bad_rows")} == {
        "name": "Qwen3-VL-Embedding-2B",
        "dimension": 16,
        "rows": 100,
        "vectors": 97,
        "bad_rows": 3,
    }
    assert not leftovers(output)
    assert "97 vectors of 16 components; 3 bad rows" in capsys.readouterr().out


@pytest.mark.parametrize("form", FORMS)
def test_output_of_an_empty_input_is_empty(form: str, tmp_path: Path) -> None:
    output = tmp_path / f"out{form}"
    assert run(write_lines(tmp_path / "in.jsonl", []), output) == Ending.COMPLETE
    assert output.exists() and not leftovers(output)
    if form == ".npy":
        assert np.load(output).shape == (0, 16)
    elif form == ".parquet":
        assert pq.read_table(output).num_rows == 0
    else:
        assert output.read_bytes() == b""


def test_parquet_metadata_names_model_and_options(tmp_path: Path) -> None:
    output = tmp_path / "out.parquet"
    assert run(write_lines(tmp_path / "in.jsonl", texts(9)), output, instruction="Find.", dimensions=8) == Ending.COMPLETE
    schema = pq.read_schema(output)
    assert schema.field("embedding").type == pa.list_(pa.float32(), 8)
    assert (schema.field("row").type, schema.field("id").type) == (pa.int64(), pa.int64())
    said = {key.decode(): value.decode() for key, value in schema.metadata.items()}
    said.pop("ARROW:schema", None)
    meta = read(output).meta
    assert said == {
        "model": "Qwen3-VL-Embedding-2B",
        "fingerprint": meta["fingerprint"],
        "instruction": "Find.",
        "dimension": "8",
    }
    assert len(meta["fingerprint"]) == 16
    cut = expected(list(range(9)), instruction="Find.")[:, :8]
    assert np.allclose(read(output).vectors, cut / np.linalg.norm(cut, axis=1, keepdims=True), atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_ids_are_numbers_if_all_are(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.bulk.stream.COMMIT_ROWS", 2)  # so that some parts have only numbers
    for ids, found in (
        ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5]),
        ([1, 2, "x", 4, None], ["1", "2", "x", "4", None]),
        ([1, 2, 1 << 63, 4, 5], ["1", "2", "9223372036854775808", "4", "5"]),
        ([None] * 5, [None] * 5),
    ):
        items = [{"id": identity, "text": f"text {row}"} for row, identity in enumerate(ids)]
        output = tmp_path / f"out{form}"
        run(write_lines(tmp_path / "in.jsonl", items), output, overwrite=True, request_rows=2)
        assert read(output).ids == found
        assert output.with_name(f"{output.name}.ids.jsonl").exists() == (form == ".npy" and ids != [None] * 5)


def test_npy_has_a_row_for_each_row_of_the_input(tmp_path: Path) -> None:
    items: list[Any] = texts(5)
    items[1] = {"id": "one"}
    output = tmp_path / "out.npy"
    assert run(write_lines(tmp_path / "in.jsonl", items), output) == Ending.BAD_ROWS
    array = np.load(output)
    assert array.shape == (5, 16) and array.dtype == np.float32
    assert np.isnan(array[1]).all()
    assert np.array_equal(array[[0, 2, 3, 4]], expected([0, 2, 3, 4]))
    ids = [json.loads(line) for line in (tmp_path / "out.npy.ids.jsonl").read_text().splitlines()]
    assert ids == ["0", "one", "2", "3", "4"]  # with the id of the bad row


def test_options_reach_the_model(tmp_path: Path) -> None:
    model = FakeModel()
    long = "x" * 100
    items = [{"text": "a", "instruction": "own"}, "b", long]
    source = write_lines(tmp_path / "in.jsonl", [*items, "c"])
    settings = {"max_input_tokens": 50}
    assert run(source, tmp_path / "a.npy", model, settings, instruction="all", limit=3) == Ending.BAD_ROWS
    array = np.load(tmp_path / "a.npy")
    assert array.shape[0] == 3
    assert np.array_equal(array[:2], [model.vector("a", instruction="own"), model.vector("b", instruction="all")])
    (bad,) = read(tmp_path / "a.npy").bad
    assert bad["row"] == 2 and "limit is 50" in bad["reason"]
    assert run(source, tmp_path / "b.npy", model, settings, truncate=True) == Ending.COMPLETE


def test_request_size_is_not_lowered_by_items_of_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request of nothing but numbers is refused as a whole, as one with too many inputs is."""
    sizes: list[int] = []
    post = InProcess.post

    async def counted(self: InProcess, body: bytes) -> Answer:
        sizes.append(len(json.loads(body)["input"]))
        return await post(self, body)

    monkeypatch.setattr(InProcess, "post", counted)
    source = write_lines(tmp_path / "in.jsonl", [*([1, 2, 3] for _ in range(40)), 5, *texts(300)])
    assert run(source, tmp_path / "out.npy", concurrency=1) == Ending.BAD_ROWS
    assert read(tmp_path / "out.npy").rows == list(range(41, 341))
    assert len(sizes) < 120 and max(sizes[66:]) > 100, sizes


def test_model_that_fails_for_one_input_makes_one_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.bulk.embedder._FIRST_BACKOFF_S", 0.01)
    items: list[Any] = [*texts(20, ids=False), "poison", *texts(20, ids=False)]
    output = tmp_path / "out.npy"
    assert run(write_lines(tmp_path / "in.jsonl", items), output, FakeModel(fail_text="poison")) == Ending.BAD_ROWS
    written = read(output)
    assert [line["row"] for line in written.bad] == [20]
    assert len(written.rows) == 40


def test_model_that_fails_for_everything_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.bulk.embedder._FIRST_BACKOFF_S", 0.001)
    source, output = write_lines(tmp_path / "in.jsonl", texts(100)), tmp_path / "out.npy"
    with pytest.raises(Stopped, match="fails for whatever it is asked") as stopped:
        run(source, output, FakeModel(fail_text="text"))
    assert stopped.value.code == Ending.STOPPED
    assert run(source, output) == Ending.COMPLETE
    assert np.array_equal(np.load(output), expected(list(range(100))))


# A real model


async def test_vectors_are_those_of_the_service_and_of_the_official_code(serve: Serve, tmp_path: Path) -> None:
    model = load("float32")
    items = []
    for case in CASES:
        images = [case["image"]] if isinstance(case.get("image"), str) else case.get("image", [])
        item = {"id": case["id"], "text": case.get("text"), "instruction": case.get("instruction")}
        items.append({**item, "image": [str(CONFORMANCE / "cases" / image) for image in images]} if images else item)
    source, output = write_lines(tmp_path / "in.jsonl", [*items, {"id": "bad", "image": "none.png"}]), tmp_path / "out.parquet"
    command = Run(make_settings(), Options(source, output, quiet=True, request_rows=20), model.load_both)
    assert await command.run() == Ending.BAD_ROWS
    written = read(output)
    assert written.ids == [case["id"] for case in CASES]
    assert cosines(written.vectors, golden()).min() >= 0.9999

    client = await serve(model)
    plain = [{key: item[key] for key in ("text", "instruction")} for item in items if "image" not in item]
    status, reply = await client.embed({"input": plain})
    assert status == 200
    mine = written.vectors[[index for index, item in enumerate(items) if "image" not in item]]
    assert cosines(mine, np.array([row["embedding"] for row in reply["data"]], dtype=np.float32)).min() >= 0.99999
    _, listed = await client.get("/v1/models")
    assert written.meta["fingerprint"] == listed["data"][0]["fingerprint"]


def test_folder_of_images_has_the_vectors_of_the_official_code(tmp_path: Path) -> None:
    output = tmp_path / "out.parquet"
    assert run(CONFORMANCE / "cases", output, load("float32")) == Ending.COMPLETE
    written = read(output)
    files = sorted(path.name for path in (CONFORMANCE / "cases").iterdir() if path.suffix not in (".json", ".npz"))
    assert written.ids == files
    alone = {
        case["image"]: index
        for index, case in enumerate(CASES)
        if isinstance(case.get("image"), str) and "text" not in case and not case.get("instruction")
    }
    found = [(index, alone[name]) for index, name in enumerate(files) if name in alone]
    assert len(found) >= 5
    assert cosines(written.vectors[[mine for mine, _ in found]], golden()[[theirs for _, theirs in found]]).min() >= 0.9999


# Resuming, and what is refused


def stopped_in_the_middle(source: Path, output: Path, **more: Any) -> Journal:
    """Run until the device is lost, after some rows are committed. Returns the resumed journal."""
    with pytest.raises(Stopped) as stopped:
        run(source, output, FakeModel(lose_after=5), request_rows=10, concurrency=1, **more)
    assert stopped.value.code == Ending.DEVICE_FAILED
    assert "the same command goes on" in str(stopped.value)
    journal = Journal(output)
    journal.resume()
    assert 0 < journal.cursor.row < 100
    return journal


def test_resume_begins_where_the_run_stopped(tmp_path: Path) -> None:
    source, output = write_lines(tmp_path / "in.jsonl", texts(100)), tmp_path / "out.npy"
    done = stopped_in_the_middle(source, output).cursor.row
    assert not output.exists()
    model = FakeModel()
    assert run(source, output, model) == Ending.COMPLETE
    assert model.embedded == 100 - done + 1  # and one to see whether the options are accepted
    assert np.array_equal(np.load(output), expected(list(range(100))))
    assert not leftovers(output)


def test_resume_with_truncate_needs_the_same_limit(tmp_path: Path) -> None:
    source, output = write_lines(tmp_path / "in.jsonl", texts(100)), tmp_path / "out.npy"
    stopped_in_the_middle(source, output, truncate=True)
    with pytest.raises(Stopped, match="MAX_INPUT_TOKENS") as stopped:
        run(source, output, truncate=True, settings={"max_input_tokens": 7})
    assert stopped.value.code == Ending.REFUSED
    with pytest.raises(Stopped, match=r"other options \(MAX_INPUT_TOKENS\)"):
        run(source, output, truncate=True, url="http://127.0.0.1:9")
    assert run(source, output, truncate=True) == Ending.COMPLETE


def test_resume_keeps_an_output_that_came_meanwhile(tmp_path: Path) -> None:
    source, output = write_lines(tmp_path / "in.jsonl", texts(100)), tmp_path / "out.npy"
    stopped_in_the_middle(source, output)
    output.write_bytes(b"dear")
    with pytest.raises(Stopped, match="--overwrite replaces it") as stopped:
        run(source, output)
    assert stopped.value.code == Ending.REFUSED and output.read_bytes() == b"dear"
    model = FakeModel()
    assert run(source, output, model, overwrite=True) == Ending.COMPLETE
    assert model.embedded < 100


def test_resume_refuses_another_input_model_or_options(tmp_path: Path) -> None:
    source, output = write_lines(tmp_path / "in.jsonl", texts(100)), tmp_path / "out.npy"
    stopped_in_the_middle(source, output)

    def refused(match: str, model: FakeModel | None = None, **more: Any) -> None:
        with pytest.raises(Stopped, match=match) as stopped:
            run(source, output, model, **more)
        assert stopped.value.code == Ending.REFUSED and "--restart" in str(stopped.value)
        assert Journal(output).parts()

    refused(r"other options \(instruction\)", instruction="another")
    refused(r"other options \(MAX_INPUT_TOKENS, truncate\)", truncate=True)
    refused(r"other options \(columns\)", columns=("text", None, None, None))
    refused("began with the model .* and this is", FakeModel(width=32))
    kept = source.stat()
    source.write_bytes(source.read_bytes().replace(b"text 5", b"text 6"))
    refused("another INPUT")
    os.utime(source, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    refused("another INPUT")
    assert run(source, output, restart=True) == Ending.COMPLETE
    assert np.array_equal(np.load(output)[5], FakeModel().vector("text 6"))


def test_resume_ignores_a_run_without_progress(tmp_path: Path) -> None:
    """Its input could not be read. The next command has another input, and other options."""
    source, output = tmp_path / "in.jsonl", tmp_path / "out.npy"
    source.write_text("a text\n", "utf-16")
    with pytest.raises(Stopped, match="convert it to UTF-8"):
        run(source, output)
    other = write_lines(tmp_path / "other.jsonl", texts(3))
    assert run(other, output, FakeModel(width=32), instruction="another") == Ending.COMPLETE
    assert np.load(output).shape == (3, 32)
    assert not leftovers(output)


def test_input_that_changes_meanwhile_ends_the_run(tmp_path: Path) -> None:
    source, output = write_lines(tmp_path / "in.jsonl", texts(100)), tmp_path / "out.npy"

    class Changing(FakeModel):
        def embed(self, batch: Any) -> Any:
            if self.embedded > 20:
                os.utime(source, ns=(1, 1))
            return super().embed(batch)

    with pytest.raises(Stopped, match="has changed while it was read"):
        run(source, output, Changing(), request_rows=10)


def test_overwrite_is_needed_to_replace_an_output(tmp_path: Path) -> None:
    source, output = write_lines(tmp_path / "in.jsonl", texts(3)), tmp_path / "out.npy"
    output.write_bytes(b"dear")
    bad = output.with_name("out.npy.bad.jsonl")
    bad.write_bytes(b"old")
    with pytest.raises(Stopped, match="--overwrite") as stopped:
        run(source, output)
    assert stopped.value.code == Ending.REFUSED
    assert output.read_bytes() == b"dear" and not leftovers(output)
    with pytest.raises(Stopped, match="cannot be used"):
        run_with_load_error(source, output, ModelLoadError("no weights"))
    assert output.read_bytes() == b"dear" and bad.exists() and not leftovers(output)
    assert run(source, output, overwrite=True) == Ending.COMPLETE
    assert np.array_equal(np.load(output), expected([0, 1, 2]))
    assert not bad.exists()  # it belonged to the old output


def run_with_load_error(source: Path, output: Path, error: Exception) -> int:
    options = Options(source, output, quiet=True, overwrite=True)
    return asyncio.run(Run(make_settings(), options, FakeModel(load_error=error).load_both).run())


@pytest.mark.parametrize(("error", "code"), [(ModelLoadError("x"), 1), (DeviceUnavailable("x"), 2), (ValueError("x"), 1)])
def test_model_that_cannot_be_loaded_ends_the_run(error: Exception, code: int, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", texts(3))
    with pytest.raises(Stopped) as stopped:
        run_with_load_error(source, tmp_path / "out.npy", error)
    assert stopped.value.code == code
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl"}


@pytest.mark.parametrize(
    ("source", "output", "said"),
    [
        ("none.jsonl", "out.npy", "is not there"),
        ("in.jsonl", "out.csv", "ends in none of"),
        ("in.jsonl", "none/out.npy", "is not there"),
        ("in.jsonl", "folder.npy", "is a folder"),
        ("in.jsonl", "in.jsonl", "one file"),
    ],
)
def test_paths_are_checked_before_a_model_is_loaded(source: str, output: str, said: str, tmp_path: Path) -> None:
    write_lines(tmp_path / "in.jsonl", texts(3))
    (tmp_path / "folder.npy").mkdir()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(Stopped, match=said) as stopped:
        run_with_load_error(tmp_path / source, tmp_path / output, AssertionError("loaded"))
    assert stopped.value.code == Ending.REFUSED
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_dimensions_beyond_the_models_are_refused(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", texts(3))
    with pytest.raises(Stopped, match="dimensions must be an integer from 1 to 16") as stopped:
        run(source, tmp_path / "out.npy", dimensions=17)
    assert stopped.value.code == Ending.REFUSED and {path.name for path in tmp_path.iterdir()} == {"in.jsonl"}


def test_lock_refuses_a_second_process(tmp_path: Path) -> None:
    source, output = write_lines(tmp_path / "in.jsonl", texts(3)), tmp_path / "out.npy"
    holder = "import sys; from app.bulk.journal import Journal; from pathlib import Path\n"
    holder += "with Journal(Path(sys.argv[1])).locked(): print('held', flush=True); input()"
    command = [sys.executable, "-c", holder, str(output)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(Stopped, match="another process is writing") as stopped:
            run(source, output)
        assert stopped.value.code == Ending.REFUSED
        other.communicate("\n")
    assert run(source, output) == Ending.COMPLETE


def test_journal_part_that_is_gone_or_damaged_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.bulk.stream.COMMIT_ROWS", 10)
    source, output = write_lines(tmp_path / "in.jsonl", texts(100)), tmp_path / "out.npy"
    parts = stopped_in_the_middle(source, output).parts()
    assert len(parts) > 2
    data = parts[-1].path.read_bytes()
    parts[-1].path.write_bytes(data[: len(data) // 2])
    with pytest.raises(Stopped, match="is damaged"):
        run(source, output)
    parts[-1].path.write_bytes(data)
    parts[0].path.unlink()
    with pytest.raises(Stopped, match="lacks a part"):
        run(source, output)


# While it runs


def test_reader_stops_when_the_window_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The window has room for twice as many requests as may be under way. One row more is read, which closes the last of them."""
    read_rows: list[int] = []
    leads: list[int] = []
    gate = threading.Event()
    filled = asyncio.Event()
    read_ahead = stream.Stream._read_ahead
    opened = module.open_source

    def counting(*arguments: Any, **more: Any) -> Any:
        source = opened(*arguments, **more)
        rows = source.rows
        source.rows = lambda cursor: (read_rows.append(row.number) or row for row in rows(cursor))  # type: ignore[method-assign]
        return source

    class Held(FakeModel):
        def embed(self, batch: Any) -> Any:
            if len(batch) > 1:
                gate.wait(60)
            leads.append(len(read_rows) - self.embedded)
            return super().embed(batch)

    async def noted(self: stream.Stream) -> bool:
        found = await read_ahead(self)
        filled.set()
        return found

    monkeypatch.setattr(module, "open_source", counting)
    monkeypatch.setattr(stream.Stream, "_read_ahead", noted)
    source, output = write_lines(tmp_path / "in.jsonl", texts(1000)), tmp_path / "out.npy"

    async def embed() -> int:
        options = Options(source, output, quiet=True, request_rows=10, concurrency=2)
        running = asyncio.create_task(Run(make_settings(), options, Held().load_both).run())
        await until(lambda: filled.is_set() or running.done())
        assert len(read_rows) == 41
        gate.set()
        return await running

    assert asyncio.run(embed()) == Ending.COMPLETE
    assert read_rows == list(range(1000))
    assert max(leads) <= 41


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_the_run_and_keeps_what_is_done(number: signal.Signals, tmp_path: Path) -> None:
    source, output = write_lines(tmp_path / "in.jsonl", texts(100)), tmp_path / "out.npy"

    class Asked(FakeModel):
        """Sends the signal once: a second one would end the process, which is pytest's."""

        asked = False

        def embed(self, batch: Any) -> Any:
            if self.embedded > 30 and not self.asked:
                self.asked = True
                os.kill(os.getpid(), number)
            return super().embed(batch)

    with pytest.raises(Stopped, match="the same command goes on") as stopped:
        run(source, output, Asked(seconds_per_batch=0.05), request_rows=10, concurrency=1)
    assert stopped.value.code == 128 + number
    journal = Journal(output)
    journal.resume()
    assert journal.cursor.row >= 20
    assert run(source, output) == Ending.COMPLETE
    assert np.array_equal(np.load(output), expected(list(range(100))))


def test_resume_after_a_kill_at_every_point(tmp_path: Path) -> None:
    """At every third point at which a run makes something durable, those of the assembly included; at fewer for other formats."""
    kills = 0
    for step, forms in (("3", [".npy"]), ("13", [".parquet", ".jsonl"])):
        (tmp_path / step).mkdir()
        command = [sys.executable, "-m", "tests.support.bulk_crashes", str(tmp_path / step), step, *forms]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr
        kills += int(done.stdout.split()[2])
    assert kills > 20


def test_commit_counts_bad_rows_and_long_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "COMMIT_BYTES", 2000)
    committed: list[int] = []
    commit = Journal.commit
    monkeypatch.setattr(Journal, "commit", lambda self, rows, width: committed.append(len(rows)) or commit(self, rows, width))
    for items, most in (([{"id": row} for row in range(200)], 50), ([{"id": f"{row:0500}"} for row in range(50)], 10)):
        committed.clear()
        source = write_lines(tmp_path / "in.jsonl", items)
        assert run(source, tmp_path / "out.npy", request_rows=5, overwrite=True) == Ending.BAD_ROWS
        assert sum(committed) == len(items) and max(committed) <= most


def test_progress_is_logged_without_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("app.bulk.progress._LOG_INTERVAL_S", 0.0)
    caplog.set_level("INFO")
    source = write_lines(tmp_path / "in.jsonl", [*texts(30), b"{"])
    options = Options(source, tmp_path / "out.npy", request_rows=10)
    assert asyncio.run(Run(make_settings(), options, FakeModel().load_both).run()) == Ending.BAD_ROWS
    lines = [record.message for record in caplog.records if record.name == "app.bulk.progress"]
    assert len(lines) == 4
    assert lines[0].startswith("10 rows, ") and lines[0].endswith(" left") and "rows/s, 3" in lines[0]
    assert lines[3].startswith("31 rows, ") and "1 bad, 100%" in lines[3]


@pytest.mark.parametrize("total", [100, None])
def test_progress_is_a_bar_on_a_terminal(total: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(total, 0, quiet=False) as progress:
        progress.advance(50, 5, 1005, 2)
    shown = terminal.getvalue().rpartition("\r")[2]
    assert re.fullmatch(r"( 50%\|.*\| )?1,005 rows, [\d,]+ rows/s, 2 bad \[00:00(<00:00)?\]\s*", shown), shown


# Files of others, and damaged ones


def finished_but_not_moved(source: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run until the output is written, but not moved to its place."""

    def full(journal: Journal) -> dict[str, Any]:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(Stopped, match="No space left"):
        patched.setattr(module, "publish", full)
        run(source, output)


def test_resume_moves_no_output_of_another_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out.npy"
    first, second = (write_lines(tmp_path / f"{count}.jsonl", texts(count)) for count in (3, 5))
    finished_but_not_moved(first, output, monkeypatch)
    with pytest.raises(Stopped, match="another INPUT") as stopped:
        run(second, output)
    assert stopped.value.code == Ending.REFUSED and not output.exists()
    with pytest.raises(Stopped, match=r"other options \(limit\)"):
        run(first, output, limit=2)
    assert run(first, output) == Ending.COMPLETE
    assert np.array_equal(np.load(output), expected([0, 1, 2]))
    output.unlink()
    finished_but_not_moved(first, output, monkeypatch)
    assert run(second, output, restart=True) == Ending.COMPLETE
    assert len(np.load(output)) == 5


@pytest.mark.parametrize("name", ["bad.jsonl", "ids.jsonl"])
def test_paths_of_the_input_and_the_outputs_siblings_must_differ(name: str, tmp_path: Path) -> None:
    source = write_lines(tmp_path / f"out.npy.{name}", texts(3))
    (tmp_path / "link.jsonl").symlink_to(source)
    for path in (source, tmp_path / "link.jsonl"):
        with pytest.raises(Stopped, match="are one file") as stopped:
            run(path, tmp_path / "out.npy")
        assert stopped.value.code == Ending.REFUSED
    assert len(source.read_bytes().splitlines()) == 3


def test_paths_that_cannot_be_written_are_refused_before_embedding(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", texts(3))
    (tmp_path / "out.npy.meta.json").mkdir()
    for output, said in ((tmp_path / "out.npy", "is a folder"), (tmp_path / f"{'n' * 240}.npy", "too long")):
        model = FakeModel()
        with pytest.raises(Stopped, match=said) as stopped:
            run(source, output, model)
        assert stopped.value.code == Ending.REFUSED and not model.embedded


@pytest.mark.parametrize("form", FORMS)
def test_paths_need_not_be_utf_8(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / os.fsdecode(b"in\xff.parquet")
    pq.write_table(pa.table({"id": range(3), "text": [f"text {row}" for row in range(3)]}), tmp_path / "in.parquet")
    (tmp_path / "in.parquet").rename(source)
    output = tmp_path / os.fsdecode(b"out\xff" + form.encode())
    assert run(source, output) == Ending.COMPLETE
    assert f"out\\udcff{form}: 3 vectors" in capsys.readouterr().out
    output.with_name(f"{output.name}.meta.json").rename(tmp_path / f"out{form}.meta.json")
    written = read(output.rename(tmp_path / f"out{form}"))
    assert written.rows == [0, 1, 2] and np.array_equal(written.vectors, expected([0, 1, 2]))


@pytest.mark.parametrize(
    ("source", "output", "said"),
    [
        (f"{'n' * 300}.jsonl", "out.npy", "File name too long"),
        ("in.jsonl", f"{'n' * 300}/out.npy", "File name too long"),
        ("pipe.jsonl", "out.npy", "pipe.jsonl is no regular file"),
    ],
)
def test_paths_that_cannot_be_read_are_refused(source: str, output: str, said: str, tmp_path: Path) -> None:
    write_lines(tmp_path / "in.jsonl", texts(3))
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(Stopped, match=said) as stopped:
        run(tmp_path / source, tmp_path / output)
    assert stopped.value.code == Ending.REFUSED


@pytest.mark.parametrize("name", ["bad.jsonl", "bad.ndjson", "listing.jsonl", "lock.npy"])
def test_journal_of_an_output_named_like_one_of_its_files(name: str, tmp_path: Path) -> None:
    source, output = write_lines(tmp_path / "in.jsonl", [*texts(30), b"{", *texts(30)]), tmp_path / name
    stopped_in_the_middle(source, output)
    assert run(source, output) == Ending.BAD_ROWS
    written = read(output)
    assert len(written.rows) == 60 and [line["row"] for line in written.bad] == [30]
    assert not leftovers(output)


def test_journal_folder_with_foreign_files_is_left_alone(tmp_path: Path) -> None:
    source, output = write_lines(tmp_path / "in.jsonl", texts(3)), tmp_path / "out.parquet"
    parts = tmp_path / "out.parquet.parts"
    parts.mkdir()
    (parts / "part-0.parquet").write_bytes(b"dear")
    for more in ({}, {"restart": True}):
        with pytest.raises(Stopped, match="is of no run") as stopped:
            run(source, output, **more)
        assert stopped.value.code == Ending.REFUSED
    assert [(path.name, path.read_bytes()) for path in parts.iterdir()] == [("part-0.parquet", b"dear")]


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("manifest.json", b"", "damaged"),
        ("manifest.json", b"[]", "damaged"),
        ("finished.json", b"{", "damaged"),
        ("bad.jsonl", b"", "lacks rows"),
        ("bad.jsonl", b"\0\0\n", "lacks rows"),
        ("complete.json", b'{"rows": 99}', "lacks its last part"),
    ],
)
def test_journal_that_is_damaged_is_refused(name: str, data: bytes, said: str, tmp_path: Path) -> None:
    items: list[Any] = [b"{", *texts(100)]
    source, output = write_lines(tmp_path / "in.jsonl", items), tmp_path / "out.npy"
    stopped_in_the_middle(source, output)
    (tmp_path / "out.npy.parts" / name).write_bytes(data)
    with pytest.raises(Stopped, match=said) as stopped:
        run(source, output)
    assert stopped.value.code == Ending.REFUSED and "--restart" in str(stopped.value)
    assert run(source, output, restart=True) == Ending.BAD_ROWS
    assert len(read(output).rows) == 100


def test_journal_part_that_is_damaged_anywhere_is_read_or_refused(tmp_path: Path) -> None:
    """Only bytes of the format are damaged: any bytes are a valid vector."""
    source, output = write_lines(tmp_path / "in.jsonl", texts(100)), tmp_path / "out.npy"
    part = stopped_in_the_middle(source, output).parts()[-1].path
    data = part.read_bytes()
    for at in range(len(data) - 700, len(data), 7):
        part.write_bytes(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
        journal = Journal(output)
        try:
            journal.resume()
            read_part(journal.parts()[-1])
        except Stopped as stopped:
            assert stopped.code == Ending.REFUSED


def test_resume_hint_counts_the_rows_of_earlier_runs(tmp_path: Path) -> None:
    source, output = write_lines(tmp_path / "in.jsonl", texts(100)), tmp_path / "out.npy"
    done = stopped_in_the_middle(source, output).cursor.row
    with pytest.raises(Stopped, match=f"\n{done} rows are done") as stopped:
        run(source, output, url="http://127.0.0.1:1", patience=0.0)
    assert stopped.value.code == Ending.STOPPED
