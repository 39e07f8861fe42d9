"""The command with --url: against our service as a process, and against services of another make; and its command line."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import ssl
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from app.bulk.ending import Ending, Stopped
from app.bulk.journal import Journal
from app.bulk.options import Options
from app.bulk.over_http import endpoint
from app.bulk.run import Run
from app.settings import ApiKey
from tests.conformance.report import CHECKPOINT, load
from tests.conftest import Serve, make_settings
from tests.support.bulk_runs import leftovers, read, run, write_lines
from tests.support.fakes import FakeModel
from tests.support.hosts import Process, base64_of, picture, process
from tests.support.paths import ROOT
from tests.support.programs import certificate, free_port
from tests.support.waiting import wait_until

KEY = "sk-test"


def texts(count: int) -> list[Any]:
    return [{"id": row, "text": f"text {row}"} for row in range(count)]


def expected(count: int) -> np.ndarray:
    model = FakeModel()
    return np.stack([model.vector(f"text {row}") for row in range(count)])


@contextmanager
def service(**environment: str) -> Iterator[tuple[Process, str]]:
    """Serve the fake model in another process. Yields it and its URL."""
    with process(**environment) as running:
        url = f"http://127.0.0.1:{running.port()}"
        running.until_status("ok")
        yield running, url


def command(*arguments: Any, folder: Path, **environment: str) -> subprocess.Popen[str]:
    """Start `python -m app embed ...` in `folder`, with no settings but those given."""
    clean = {"PATH": os.environ["PATH"], "HOME": str(folder), "PYTHONPATH": str(ROOT), "API_KEY": KEY, **environment}
    words = [sys.executable, "-m", "app", "embed", *map(str, arguments)]
    return subprocess.Popen(words, cwd=folder, env=clean, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(running: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Wait for the end of a command. Returns its exit code, stdout and stderr."""
    out, err = running.communicate(timeout=100)
    return running.returncode, out, err


def is_running(command: subprocess.Popen[str]) -> bool:
    """Return True. Raises AssertionError, with what it has printed, if the command has ended."""
    assert command.poll() is None, command.communicate()
    return True


def until_answered(url: str, count: int, command: subprocess.Popen[str]) -> None:
    """Wait until a service has answered `count` requests for vectors. The first one of a command counts too."""

    def answered() -> bool:
        with urllib.request.urlopen(f"{url}/metrics", timeout=30) as reply:
            found = re.search(r'(?m)^embedding_requests_total\{status="200"\} (\S+)$', reply.read().decode())
        return found is not None and float(found[1]) >= count

    wait_until(lambda: is_running(command) and answered(), f"{count} answered requests")


def parts(output: Path) -> list[str]:
    with contextlib.suppress(FileNotFoundError):
        return [name for name in os.listdir(f"{output}.parts") if re.fullmatch(r"part-.*\.arrow", name)]
    return []


# Our service


async def test_over_http_gives_the_same_as_in_process(serve: Serve, tmp_path: Path) -> None:
    """A real model, texts, images and bad rows: both ways give the same vectors, fingerprint and reasons."""
    (tmp_path / "a.png").write_bytes(b"no image")
    items: list[Any] = [f"text {row}" for row in range(40)]
    items += [{"image": base64_of(picture(row, (40, 30)))} for row in range(5)] + [
        {"text": "t", "image": "a.png"},
        {"text": 5},
        b"{",
    ]
    source = write_lines(tmp_path / "in.jsonl", items)
    client = await serve(load("float32"))
    options = Options(source, tmp_path / "http.parquet", url=f"http://127.0.0.1:{client.port}", request_rows=7, quiet=True)
    assert await Run(make_settings(), options).run() == Ending.BAD_ROWS
    settings = {"MODEL_PATH": str(CHECKPOINT), "DEVICE": "cpu", "EMBEDDING_DIMENSION": "native"}
    code, _, said = await asyncio.to_thread(ended, command(source, "here.parquet", folder=tmp_path, **settings))
    assert code == 4, said
    http, here = read(tmp_path / "http.parquet"), read(tmp_path / "here.parquet")
    assert http.rows == here.rows == list(range(45))
    assert np.allclose(http.vectors, here.vectors, atol=1e-4)
    assert http.bad == here.bad and [line["row"] for line in http.bad] == [45, 46, 47]
    assert http.meta == here.meta


@pytest.mark.parametrize(
    "limits",
    [
        {"MAX_INPUTS_PER_REQUEST": "7"},
        {"MAX_REQUEST_BYTES": "2000"},
        {"MAX_QUEUE_SIZE": "11"},
        {"MAX_BYTES_IN_FLIGHT": "64KiB"},
    ],
    ids=str,
)
def test_service_with_smaller_limits_gets_smaller_requests(limits: dict[str, str], tmp_path: Path) -> None:
    """Requests that are too large are split, those that come too early are retried, and a row that is too large alone is bad."""
    items = texts(150)
    items[70] = {"id": 70, "text": "x" * 3000}
    source, output = write_lines(tmp_path / "in.jsonl", items), tmp_path / "out.npy"
    with service(**limits) as (_, url):
        code = run(source, output, url=url, request_rows=64, concurrency=3)
    written = read(output)
    too_long = "MAX_REQUEST_BYTES" in limits
    assert code == (Ending.BAD_ROWS if too_long else Ending.COMPLETE)
    good = [row for row in range(150) if row != 70]
    assert set(range(150)) - set(written.rows) == ({70} if too_long else set())
    assert np.array_equal(np.load(output)[good], expected(150)[good])


def test_service_whose_deadline_passes_is_asked_for_the_rest_again(tmp_path: Path) -> None:
    """Rows that came in time are kept, and the others are asked for again."""
    source, output = write_lines(tmp_path / "in.jsonl", texts(40)), tmp_path / "out.npy"
    slow = {"FAKE_SECONDS_PER_BATCH": "0.1", "MAX_BATCH_SIZE": "1", "REQUEST_TIMEOUT_S": "2"}
    with service(**slow) as (_, url):
        assert run(source, output, url=url, concurrency=1) == Ending.COMPLETE
        with urllib.request.urlopen(f"{url}/metrics") as reply:
            metrics = reply.read().decode()
    assert 'embedding_dropped_total{reason="deadline"}' in metrics
    assert np.array_equal(np.load(output), expected(40))


def test_service_that_goes_away_is_waited_for(tmp_path: Path) -> None:
    port = str(free_port())
    source, output = write_lines(tmp_path / "in.jsonl", texts(4000)), tmp_path / "out.npy"
    options = ["--url", f"http://127.0.0.1:{port}", "--request-rows", 10, "--concurrency", 2]
    slow = {"PORT": port, "FAKE_SECONDS_PER_BATCH": "0.1"}
    with service(**slow) as (running, url):
        begun = command(source, output, *options, "--patience", 1, folder=tmp_path)
        until_answered(url, 6, begun)
        running.popen.kill()
        code, out, said = ended(begun)
    assert (code, out) == (5, "")
    assert "has not answered for 1 s" in said and "the same command goes on" in said
    journal = Journal(output)
    journal.resume()
    assert 0 < journal.cursor.row < 4000
    # The next command waits for a service to start.
    begun = command(source, output, *options, "--patience", 90, folder=tmp_path)
    assert begun.stderr is not None
    while "waiting for http" not in (line := begun.stderr.readline()):
        assert line, "it ended"
    with service(PORT=port):
        code, out, said = ended(begun)
    assert code == 0, said
    assert np.array_equal(np.load(output), expected(4000))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_resume_after_a_signal(number: signal.Signals, tmp_path: Path) -> None:
    source, output = write_lines(tmp_path / "in.jsonl", texts(1000)), tmp_path / "out.parquet"
    with service(FAKE_SECONDS_PER_BATCH="0.1") as (_, url):
        options = ("--url", url, "--request-rows", 10, "--concurrency", 1)
        begun = command(source, output, *options, folder=tmp_path)
        if number is signal.SIGKILL:
            # The whole run would take twice COMMIT_INTERVAL_S.
            wait_until(lambda: is_running(begun) and parts(output), "a part")
        else:
            until_answered(url, 4, begun)
        begun.send_signal(number)
        code, out, said = ended(begun)
        assert code == (-9 if number is signal.SIGKILL else 128 + number)
        assert out == "" and ("goes on" in said) == (number is not signal.SIGKILL) and "Traceback" not in said
        assert not output.exists() and parts(output)
        code, _, said = ended(command(source, output, *options, "--concurrency", 4, folder=tmp_path))
    assert code == 0, said
    assert int(re.findall(r"from row (\d+) on", said)[0]) > 0
    written = read(output)
    assert written.rows == written.ids == list(range(1000))
    assert np.array_equal(written.vectors, expected(1000))
    assert not leftovers(output)


def test_resume_after_a_full_disk(tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk."""
    source, output = write_lines(tmp_path / "in.jsonl", texts(1000)), tmp_path / "out.jsonl"
    with service() as (_, url):
        arguments = [sys.executable, "-m", "app", "embed", str(source), str(output), "--url", url]
        environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "API_KEY": KEY}
        limited = ["bash", "-c", 'ulimit -f 100; exec "$@"', "bash", *arguments]
        done = subprocess.run(limited, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
        assert done.returncode == 5 and "Traceback" not in done.stderr
        assert "cannot be written: File too large" in done.stderr and "the same command goes on" in done.stderr
        assert not output.exists() and parts(output)
        code, _, said = ended(command(source, output, folder=tmp_path, MODEL_PATH="none"))
        assert code == 0, said  # every row was embedded, so writing the output needs no model
    assert np.allclose(read(output).vectors, expected(1000))


def test_key_that_is_wrong_ends_the_run_and_is_never_shown(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", texts(3))
    with service() as (_, url):
        code, _, said = ended(command(source, "out.npy", "--url", url, folder=tmp_path, API_KEY="mine:sk-wrong"))
        assert code == 2
        assert "refuses the key" in said and "sk-wrong" not in said and "Traceback" not in said
        assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl"}
        code, _, said = ended(command(source, "out.npy", "--url", url, "--model", "another", folder=tmp_path))
        assert code == 2 and "404: model is not served here" in said


def test_model_that_changes_behind_the_address_ends_the_run(tmp_path: Path) -> None:
    port = str(free_port())
    source, output = write_lines(tmp_path / "in.jsonl", texts(4000)), tmp_path / "out.npy"
    slow = {"PORT": port, "FAKE_SECONDS_PER_BATCH": "0.1"}
    options = ("--url", f"http://127.0.0.1:{port}", "--request-rows", 10, "--concurrency", 1)
    with service(**slow) as (running, url):
        begun = command(source, output, *options, folder=tmp_path)
        until_answered(url, 4, begun)
        running.popen.kill()
        running.popen.wait()
        with service(**slow, EMBEDDING_DIMENSION="8"):
            code, _, said = ended(begun)
            assert code == 2 and "has another model now" in said
            code, _, said = ended(command(source, output, *options, folder=tmp_path))
            assert code == 2 and "--restart" in said


# Services of another make, which know neither `partial` nor fingerprints


@asynccontextmanager
async def plain_service(most: int, failing: int = 0) -> AsyncIterator[tuple[str, list[int]]]:
    """Serve an embeddings API that takes at most `most` inputs, and refuses a request if any text has "bad" in it. After the
    first reply, `failing` ones are 500 or a broken connection. Yields its URL, and a list of the sizes of all requests."""
    model = FakeModel()
    asked: list[int] = []

    async def answer(request: web.Request) -> web.Response:
        inputs = (await request.json())["input"]
        asked.append(len(inputs))
        if 1 < len(asked) <= 1 + failing:
            if len(asked) % 2:
                return web.Response(status=500, text="oops")
            assert request.transport is not None
            request.transport.abort()
        if len(inputs) > most:
            return web.json_response({"error": {"message": "too many"}}, status=413)
        inputs = [item if isinstance(item, str) else item["text"] for item in inputs]
        if any("bad" in item for item in inputs):
            return web.json_response({"detail": "no"}, status=422)
        rows = [{"index": index, "embedding": model.vector(item).tolist()} for index, item in enumerate(inputs)]
        return web.json_response({"data": rows[::-1], "model": "plain"})

    app = web.Application()
    app.router.add_post("/v1/embeddings", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1/", asked
    finally:
        await runner.cleanup()


async def test_service_of_another_make_gives_vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.bulk.embedder._MIN_BODY_BYTES", 1)
    items = texts(100)
    items[31] = items[32] = {"text": "bad"}
    source, output = write_lines(tmp_path / "in.jsonl", items), tmp_path / "out.npy"
    async with plain_service(most=10) as (url, asked):
        options = Options(source, output, url=url, request_rows=50, concurrency=1, quiet=True)
        assert await Run(make_settings(), options).run() == Ending.BAD_ROWS
    written = read(output)
    assert [line["row"] for line in written.bad] == [31, 32]
    assert np.allclose(written.vectors, np.delete(expected(100), [31, 32], axis=0), atol=1e-6)
    assert (written.meta["name"], written.meta["fingerprint"]) == ("plain", None)
    assert asked[0] == 1 and max(asked[-4:]) <= 10  # requests that were refused as too large are not sent again


async def test_service_that_fails_for_a_while_is_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.bulk.embedder._FIRST_BACKOFF_S", 0.01)
    source, output = write_lines(tmp_path / "in.jsonl", texts(50)), tmp_path / "out.npy"
    async with plain_service(most=100, failing=6) as (url, _):
        options = Options(source, output, url=url, request_rows=10, concurrency=1, quiet=True)
        assert await Run(make_settings(), options).run() == Ending.COMPLETE
    assert np.allclose(np.load(output), expected(50), atol=1e-6)


async def test_service_that_is_no_embeddings_api_is_refused(tmp_path: Path) -> None:
    async def hello(request: web.Request) -> web.Response:
        return web.Response(text="hello")

    app = web.Application()
    app.router.add_post("/v1/embeddings", hello)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    source = write_lines(tmp_path / "in.jsonl", texts(3))
    try:
        for address, said in ((url, "does not answer as an embeddings API"), (f"{url}/elsewhere", "answers 404")):
            options = Options(source, tmp_path / "out.npy", url=address, quiet=True)
            with pytest.raises(Stopped, match=said) as stopped:
                await Run(make_settings(), options).run()
            assert stopped.value.code == Ending.REFUSED
    finally:
        await runner.cleanup()


Respond = Callable[[list[Any], int], web.Response]


@asynccontextmanager
async def odd_service(respond: Respond, tls: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    """Serve an embeddings API that answers the first request, for one vector, with that, and each later one with
    `respond(inputs, number of the request)`. Yields its URL."""
    count = 0

    async def answer(request: web.Request) -> web.Response:
        nonlocal count
        count += 1
        inputs = (await request.json())["input"]
        return web.json_response({"data": rows_of(inputs)}) if count == 1 else respond(inputs, count)

    app = web.Application()
    app.router.add_post("/v1/embeddings", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls).start()
    try:
        yield f"{'https' if tls else 'http'}://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def rows_of(inputs: list[Any]) -> list[dict[str, Any]]:
    texts = [item if isinstance(item, str) else item["text"] for item in inputs]
    return [{"index": index, "embedding": FakeModel().vector(text).tolist()} for index, text in enumerate(texts)]


@pytest.mark.parametrize(
    "change",
    [
        lambda row: {**row, "index": 0},
        lambda row: {**row, "index": row["index"] or 7},
        lambda row: {**row, "embedding": [row["embedding"]]},
        lambda row: {**row, "embedding": []},
    ],
)
async def test_reply_with_malformed_rows_ends_the_run(change: Any, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", texts(20))
    async with odd_service(lambda inputs, _: web.json_response({"data": [change(row) for row in rows_of(inputs)]})) as url:
        with pytest.raises(Stopped, match="does not answer as an embeddings API does") as stopped:
            await Run(make_settings(), Options(source, tmp_path / "out.npy", url=url, quiet=True)).run()
    assert stopped.value.code == Ending.REFUSED


async def test_reply_with_a_vector_that_is_not_finite_is_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.bulk.embedder._FIRST_BACKOFF_S", 0.01)
    again = 0

    def respond(inputs: list[Any], _: int) -> web.Response:
        nonlocal again
        rows = rows_of(inputs)
        for row, item in zip(rows, inputs, strict=True):
            if isinstance(item, dict) and item["text"] in ("text 3", "text 5"):
                again += item["text"] == "text 5"
                if item["text"] == "text 3" or again == 1:
                    row["embedding"][1] = None
        return web.json_response({"data": rows})

    source, output = write_lines(tmp_path / "in.jsonl", texts(20)), tmp_path / "out.jsonl"
    async with odd_service(respond) as url:
        assert await Run(make_settings(), Options(source, output, url=url, quiet=True)).run() == Ending.BAD_ROWS
    written = read(output)
    assert [(line["row"], line["reason"]) for line in written.bad] == [(3, "the vector has components that are not finite")]
    assert np.allclose(written.vectors, np.delete(expected(20), 3, axis=0))


async def test_reply_with_an_error_of_another_form_is_a_bad_row(tmp_path: Path) -> None:
    error = {"error": {"message": "no", "param": 5, "type": ["x"]}}
    source, output = write_lines(tmp_path / "in.jsonl", texts(2)), tmp_path / "out.npy"
    async with odd_service(lambda *_: web.json_response(error, status=400)) as url:
        assert await Run(make_settings(), Options(source, output, url=url, quiet=True)).run() == Ending.BAD_ROWS
    assert [(line["reason"], line["param"]) for line in read(output).bad] == [("no", None)] * 2


@pytest.mark.parametrize("failing", [1, 2, 3, 4, 5, 9])
async def test_service_that_fails_for_a_while_makes_no_bad_row(
    failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It recovers after any number of failures. With a row in each request, each row fails alone at once."""
    monkeypatch.setattr("app.bulk.embedder._FIRST_BACKOFF_S", 0.001)

    def respond(inputs: list[Any], number: int) -> web.Response:
        return web.Response(status=500) if 3 < number <= 3 + failing else web.json_response({"data": rows_of(inputs)})

    source, output = write_lines(tmp_path / "in.jsonl", texts(5)), tmp_path / "out.npy"
    async with odd_service(respond) as url:
        options = Options(source, output, url=url, request_rows=1, concurrency=1, quiet=True)
        assert await Run(make_settings(), options).run() == Ending.COMPLETE
    assert np.allclose(np.load(output), expected(5))


async def test_service_that_fails_for_everything_loses_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.bulk.embedder._FIRST_BACKOFF_S", 0.001)
    source, output = write_lines(tmp_path / "in.jsonl", texts(50)), tmp_path / "out.npy"
    async with odd_service(lambda *_: web.Response(status=500)) as url:
        options = Options(source, output, url=url, request_rows=1, concurrency=1, patience=0.0, quiet=True)
        with pytest.raises(Stopped, match="fails for whatever it is asked") as stopped:
            await Run(make_settings(), options).run()
    assert stopped.value.code == Ending.STOPPED
    assert Journal(output).rows_committed() == 0


async def test_certificate_that_is_not_trusted_ends_the_run_at_once(tmp_path: Path) -> None:
    """Retrying would not help. A certificate that SSL_CERT_FILE vouches for is accepted."""
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority, key = certificate(tmp_path, "IP:127.0.0.1")
    tls.load_cert_chain(authority, key)
    source, output = write_lines(tmp_path / "in.jsonl", texts(5)), tmp_path / "out.npy"
    async with odd_service(lambda inputs, _: web.json_response({"data": rows_of(inputs)}), tls) as url:
        with pytest.raises(Stopped, match=r"certificate .* not trusted.*SSL_CERT_FILE") as stopped:
            await Run(make_settings(), Options(source, output, url=url, quiet=True)).run()
        assert stopped.value.code == Ending.REFUSED
        begun = command(source, output, "--url", url, folder=tmp_path, SSL_CERT_FILE=str(authority))
        code, _, said = await asyncio.to_thread(ended, begun)
    assert code == 0, said
    assert np.allclose(np.load(output), expected(5))


def test_endpoint_of_every_form_of_an_address() -> None:
    for url in ("http://a:1", "http://a:1/", "http://a:1/v1", "http://a:1/v1/", "http://a:1/v1/embeddings"):
        assert endpoint(url) == "http://a:1/v1/embeddings"
    assert endpoint("https://a/b/v1") == "https://a/b/v1/embeddings"
    for wrong in ("a:1", "http://", "http://[::1", "http://a:99999", "http://a/v1?b=c", "http://me:sk-mine@a:1"):
        with pytest.raises(Stopped) as stopped:
            endpoint(wrong)
        assert stopped.value.code == Ending.REFUSED and "sk-mine" not in str(stopped.value)


def test_key_that_is_sent_is_the_first(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", texts(3))
    with service(API_KEY="a:sk-a,b:sk-b") as (_, url):
        keys = tuple(ApiKey(name, f"sk-{name}".encode()) for name in ("b", "x"))
        assert run(source, tmp_path / "out.npy", settings={"api_keys": keys}, url=url) == Ending.COMPLETE
        with pytest.raises(Stopped, match="refuses the key"):
            run(source, tmp_path / "two.npy", settings={"api_keys": keys[::-1]}, url=url)


# The command line


def test_help_names_every_command_and_option(tmp_path: Path) -> None:
    def helped(*arguments: str) -> str:
        words = [sys.executable, "-m", "app", *arguments, "--help"]
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        return done.stdout

    said = helped()
    for name in ("serve", "embed", "verify", "configure", "demo"):
        assert re.search(rf"(?m)^ +{name}\s+\S", said)
    said = helped("embed")
    for option in re.findall(r'add\("(--[a-z-]+)"', (ROOT / "app" / "bulk" / "options.py").read_text()):
        assert re.search(rf"(?m)^ +{option}\b.*\S", said)
    for code in ("0", "1", "2", "3", "4", "5", "130, 143"):
        assert re.search(rf"(?m)^  (.* {{3,}})?{code}  \S", said), code


@pytest.mark.parametrize("listener", [">&-", "2>&-", "> /dev/full", "| :"])
def test_stdout_that_cannot_be_written_is_no_failure(listener: str, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", texts(3))
    with service() as (_, url):
        words = [sys.executable, "-m", "app", "embed", str(source), "out.npy", "--url", url]
        environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "API_KEY": KEY}
        script = f'set -o pipefail; "$@" {listener}'
        done = subprocess.run(
            ["bash", "-c", script, "bash", *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100
        )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert np.array_equal(np.load(tmp_path / "out.npy"), expected(3))


@pytest.mark.parametrize(
    "wrong",
    [["--limit", "0"], ["--concurrency", "x"], ["--delimiter", ",,"], ["--patience", "-1"], ["--api-key", "sk-x"]]
    + [[option, "\udcff"] for option in ("--text-column", "--instruction", "--delimiter")],
    ids=ascii,
)
def test_options_that_are_wrong_end_with_2(wrong: list[str], tmp_path: Path) -> None:
    code, _, said = ended(command("in.jsonl", "out.npy", *wrong, folder=tmp_path))
    assert code == 2 and wrong[0] in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_before_the_run_has_begun_is_no_success(number: signal.Signals, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.env")
    begun = command(write_lines(tmp_path / "in.jsonl", texts(3)), "out.npy", folder=tmp_path)
    with (tmp_path / "config.env").open("w"):  # returns once the command reads its settings
        begun.send_signal(number)
        code, _, said = ended(begun)
    assert code == -number and said == ""


def test_settings_that_are_wrong_end_with_2(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", texts(3))
    assert ended(command(source, "out.npy", folder=tmp_path, DEVICE="gpu"))[0] == 2
    code, _, said = ended(command(source, "out.npy", folder=tmp_path, MODEL_PATH=str(tmp_path / "none"), DEVICE="cpu"))
    assert code == 1 and "Traceback" not in said
    assert json.loads(source.read_text().splitlines()[0]) == texts(1)[0]
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl"}
