"""The process: its port, its signals, its exit codes. Every test runs a server of its own; a drain, wrong settings and a real
model are tested on a Python that is executed for them."""

from __future__ import annotations

import asyncio
import json
import math
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from app.http.keys import LIFECYCLE, SCHEDULER
from app.http.server import bind, drain, finish_replies, listen
from app.main import create_app
from tests.conftest import Clock, Serve, make_settings, until
from tests.support.fakes import FakeModel
from tests.support.hosts import Process, post, process
from tests.support.paths import CHECKPOINT


@pytest.fixture
def hold(tmp_path: Path) -> Path:
    """The file for FAKE_HOLD, which is not there yet."""
    return tmp_path / "hold"


@contextmanager
def in_threads(count: int, request: Callable[[int], Any]) -> Iterator[list[Any]]:
    """`count` requests at once; their futures."""
    with ThreadPoolExecutor(count) as pool:
        yield [pool.submit(request, index) for index in range(count)]


def embed(running: Process, text: str) -> tuple[int, Any, Any]:
    return running.request("/v1/embeddings", {"input": text})


def read_all(connection: socket.socket) -> bytes:
    """All that comes until the server closes the connection."""
    connection.settimeout(20)
    return b"".join(iter(lambda: connection.recv(1 << 20), b""))


def until_busy(running: Process, depth: int, timeout: float = 60.0) -> None:
    """Wait until so many inputs have a place in the queue, behind those that the device has taken."""
    ends = time.monotonic() + timeout
    seen = 0
    while seen < 2:  # twice: at first sight the device may not have taken its own yet
        seen = seen + 1 if running.request("/health")[2]["queue_depth"] >= depth else 0
        assert time.monotonic() < ends
        time.sleep(0.05)


def test_the_port_is_open_while_the_model_loads(hold: Path) -> None:
    hold.touch()
    with process(FAKE_HOLD=str(hold)) as running:
        status, _, health = running.request("/health")
        assert (status, health["status"]) == (503, "loading")
        assert running.request("/health/live")[0] == 200
        status, headers, body = embed(running, "a")
        assert (status, body["error"]["code"]) == (503, "loading")
        assert int(headers["Retry-After"]) >= 1
        hold.unlink()
        running.until_status("ok")
        assert embed(running, "a")[0] == 200
        running.popen.terminate()
        assert running.wait() == 0
        assert "Traceback" not in running.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains(number: signal.Signals, hold: Path) -> None:
    with process(fresh=True, FAKE_HOLD=str(hold), MAX_BATCH_SIZE="1") as running:
        running.until_status("ok")
        hold.touch()
        with in_threads(4, lambda index: embed(running, f"text {index}")) as futures:
            until_busy(running, 3)
            running.popen.send_signal(number)
            running.until_status("draining")
            # The port is open all the while, for probes and for a clear refusal.
            status, headers, body = embed(running, "late")
            assert (status, body["error"]["code"]) == (503, "draining")
            assert int(headers["Retry-After"]) >= 1
            with socket.create_connection(("127.0.0.1", running.port())) as kept:
                kept.sendall(post(b'{"input":"late"}'))
                assert b"\r\nConnection: close\r\n" in read_all(kept)
            assert running.request("/health/ready")[0] == 503
            assert running.request("/health/live")[0] == 200
            assert running.popen.poll() is None
            hold.unlink()
            replies = [future.result() for future in futures]
        assert [status for status, _, _ in replies] == [200] * 4
        assert len({json.dumps(body["data"]) for _, _, body in replies}) == 4
        assert running.wait(30) == 0
        assert "Traceback" not in running.stderr


def test_drain_grace_keeps_the_port_open() -> None:
    with process(DRAIN_GRACE_S="600", SHUTDOWN_TIMEOUT_S="1200") as running:
        running.until_status("ok")
        running.popen.terminate()
        running.until_status("draining")
        for _ in range(20):  # nothing is under way: without the grace it would have ended at once
            assert running.request("/health/live")[0] == 200
            time.sleep(0.02)
        running.popen.terminate()
        assert running.wait(30) == 128 + signal.SIGTERM


async def test_drain_ends_with_the_grace(serve: Serve, clock: Clock) -> None:
    client = await serve()
    lifecycle, scheduler = client.app[LIFECYCLE], client.app[SCHEDULER]
    draining = asyncio.create_task(drain(lifecycle, scheduler, give_up_at=math.inf, grace=300.0))
    await until(lambda: lifecycle.draining)
    clock.advance(290)
    assert (await client.get("/health"))[1]["status"] == "draining"
    assert not draining.done()
    clock.advance(20)
    await draining


def test_a_signal_while_the_model_loads() -> None:
    with process(FAKE_LOAD_SECONDS="100") as running:
        running.port()
        running.popen.terminate()
        assert running.wait(30) == 0


def test_idle_connections_do_not_hold_up_the_end() -> None:
    with process() as running:  # SHUTDOWN_TIMEOUT_S is 75
        running.until_status("ok")
        with socket.create_connection(("127.0.0.1", running.port())) as fresh:
            with socket.create_connection(("127.0.0.1", running.port())) as used:
                used.sendall(post(b'{"input":"a"}'))
                assert used.recv(12) == b"HTTP/1.1 200"
                running.popen.terminate()
                assert running.wait(30) == 0
            assert fresh.recv(1) == b""


def test_the_second_signal_is_the_end(hold: Path) -> None:
    with process(FAKE_HOLD=str(hold), MAX_BATCH_SIZE="1") as running:
        running.until_status("ok")
        hold.touch()
        with in_threads(2, lambda index: embed(running, f"text {index}")) as futures:
            until_busy(running, 1)
            running.popen.terminate()
            running.until_status("draining")
            running.popen.terminate()
            assert running.wait(20) == 128 + signal.SIGTERM
            assert all(isinstance(future.exception(), OSError) for future in futures)


def test_what_is_unanswered_at_the_shutdown_timeout_gets_503(hold: Path) -> None:
    with process(FAKE_HOLD=str(hold), MAX_BATCH_SIZE="1", SHUTDOWN_TIMEOUT_S="0.5") as running:
        running.until_status("ok")
        hold.touch()
        with socket.create_connection(("127.0.0.1", running.port())) as half:
            half.sendall(post(None, "Content-Length: 100") + b"{")
            with in_threads(3, lambda index: embed(running, f"text {index}")) as futures:
                until_busy(running, 2)
                running.popen.terminate()
                replies = [future.result() for future in futures]
                half.settimeout(30)
                assert half.recv(12) == b"HTTP/1.1 503"
        hold.unlink()
        assert {body["error"]["code"] for _, _, body in replies} == {"draining"}
        assert [status for status, _, _ in replies] == [503] * 3
        # The batch on the device is waited for, then the process ends.
        assert running.wait(30) == 0


@contextmanager
def large_reply(running: Process) -> Iterator[socket.socket]:
    """A connection whose reply, of 24 MB, is far more than the buffers of both sides hold, and has just begun."""
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", running.port()))
        slow.sendall(post(json.dumps({"input": [f"text {index}" for index in range(100)]}).encode()))
        assert slow.recv(12) == b"HTTP/1.1 200"
        yield slow


def test_a_client_that_does_not_read_does_not_hold_up_the_end() -> None:
    with process(SHUTDOWN_TIMEOUT_S="1", EMBEDDING_DIMENSION="60000") as running:
        running.until_status("ok")
        with large_reply(running):
            running.popen.terminate()
            assert running.wait(30) == 0


def test_a_client_that_reads_slowly_gets_its_whole_reply() -> None:
    with process(EMBEDDING_DIMENSION="60000") as running:
        running.until_status("ok")
        with large_reply(running) as slow:
            running.popen.terminate()
            time.sleep(0.7)
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
            head, _, body = read_all(slow).partition(b"\r\n\r\n")
        assert int(head.lower().partition(b"content-length: ")[2].split()[0]) == len(body)
        assert running.wait(30) == 0


# In one of these turns asyncio itself drops the connection: its listener is gone before the transport is there.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("turns", range(8))
async def test_a_connection_of_the_last_moment_does_not_hold_up_the_end(turns: int) -> None:
    """The listener has accepted it, and so many turns of the loop later it closes: the connection is answered, or closed."""
    runner = web.AppRunner(create_app(make_settings(), FakeModel().load_both), handle_signals=False, handler_cancellation=True)
    await runner.setup()
    (sock,) = bind("127.0.0.1", 0)
    listener = await listen(runner, sock, header_timeout_s=15)
    with socket.create_connection(sock.getsockname()) as late:
        late.sendall(post(b'{"input":"late"}'))
        for _ in range(turns):
            await asyncio.sleep(0)
        listener.close()
        # Were it held up, it would be to the end of the test's time.
        await finish_replies(runner, math.inf)
    await runner.cleanup()


def test_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, process(PORT=str(taken.getsockname()[1])) as running:
        assert running.wait() == 1
        assert "cannot listen on 127.0.0.1 port" in running.stderr
        assert "Traceback" not in running.stderr


def test_a_lost_device(hold: Path) -> None:
    # The time for probes to see it is longer than in production, for slow ones to be in time.
    with process(FAKE_LOSE_AFTER="2", FAKE_HOLD=str(hold), MAX_BATCH_SIZE="1", FAKE_FAILED_GRACE_S="5") as running:
        running.until_status("ok")
        assert embed(running, "first")[0] == 200
        hold.touch()
        with in_threads(6, lambda index: embed(running, f"text {index}")) as futures:
            until_busy(running, 5)
            hold.unlink()
            replies = [future.result() for future in futures]
        assert [(status, body["error"]["code"]) for status, _, body in replies] == [(503, "worker_died")] * 6
        status, _, health = running.request("/health")
        assert (status, health["status"]) == (503, "failed")
        assert running.request("/health/live")[0] == 503
        assert running.wait(20) == 3
        assert "the device has failed" in running.stderr


def test_a_device_that_hangs() -> None:
    with process(FAKE_SECONDS_PER_BATCH="100", WORKER_STALL_S="0.3") as running:
        running.until_status("ok")
        assert embed(running, "a")[2]["error"]["code"] == "worker_died"
        assert running.wait(20) == 3


WRONG = {
    "API_KEY": "",
    "PORT": "70000",
    "DEVICE": "gpu",
    "EMBEDDING_DIMENSION": "0",
    "MAX_BATCH_TOKENS": "many",
    "REQUEST_TIMEOUT_S": "nan",
    "CORS_ORIGINS": "https://page.example/path",
    "LOG_LEVEL": "LOUD",
}


def test_wrong_settings_are_all_named() -> None:
    with process("app", fresh=True, **WRONG) as running:
        assert running.wait() == 2
        for name in WRONG:
            assert f"\n  {name} " in running.stderr
        assert "Traceback" not in running.stderr


def test_a_key_never_shows() -> None:
    with process("app", API_KEY="name:s3cret key", PORT="x") as running:
        assert running.wait() == 2
        assert "API_KEY" in running.stderr
        assert "s3cret" not in running.stderr


def last_line(running: Process) -> str:
    return running.stderr.strip().splitlines()[-1]


def test_a_checkpoint_that_is_not_there() -> None:
    with process("app", DEVICE="cpu", MODEL_PATH="nowhere/at-all") as running:
        assert running.wait(60) == 1
        assert "nowhere/at-all" in last_line(running)
        assert "CRITICAL" in last_line(running)
        assert "Traceback" not in running.stderr


def test_cuda_where_there_is_none() -> None:
    checkpoint = CHECKPOINT
    with process("app", DEVICE="cuda", MODEL_PATH=str(checkpoint), CUDA_VISIBLE_DEVICES="-1") as running:
        assert running.wait(60) == 2
        assert "DEVICE=cpu" in last_line(running)
        assert "DEVICE=auto" in last_line(running)
        assert "Traceback" not in running.stderr


def test_a_checkpoint_is_served_on_a_cpu() -> None:
    checkpoint = CHECKPOINT
    with process("app", fresh=True, DEVICE="cpu", MODEL_PATH=str(checkpoint)) as running:
        running.until_status("ok")
        health = running.request("/health")[2]
        assert (health["device"], health["model_path"]) == ("cpu", str(checkpoint))
        status, _, reply = embed(running, "a dog")
        assert status == 200
        assert len(reply["data"][0]["embedding"]) == health["native_dimension"]
        running.popen.terminate()
        assert running.wait() == 0


def test_a_flood_of_requests_across_the_end() -> None:
    """Every request that gets a connection while the server drains is answered: with its vector, or with 503."""
    with process(FAKE_SECONDS_PER_BATCH="0.05", DRAIN_GRACE_S="4") as running:
        running.until_status("ok")
        seen: list[list[int]] = [[] for _ in range(4)]

        def knock(index: int) -> None:
            while 503 not in seen[index]:
                seen[index].append(embed(running, "a")[0])

        with in_threads(4, knock) as futures:
            while not all(seen):
                time.sleep(0.01)
            running.popen.terminate()
            for future in futures:
                future.result()
        assert set().union(*seen) == {200, 503}
        assert running.wait(30) == 0
