"""What tests share: settings, a fake model, and an application running on a loopback port."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import aiohttp
import hypothesis
import pytest
from aiohttp import web

from app.http.keys import SCHEDULER
from app.http.server import bind, listen
from app.logs import RequestIdFilter
from app.main import create_app
from app.settings import ApiKey, Settings
from models.base import LoadedModel
from scheduler.scheduler import State
from tests.support import forkserver, recorded
from tests.support.fakes import FakeModel
from tests.support.hosts import Process, process
from tests.support.paths import CHECKPOINT

# By default a property may take 200 ms: so may a machine that is busy with something else.
hypothesis.settings.register_profile("any-machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("any-machine")

KEY = "sk-test"
AUTH = {"Authorization": f"Bearer {KEY}"}


def make_settings(**changes: Any) -> Settings:
    """Settings for a test: one key, a loopback port that the system picks, the model's own width."""
    defaults: dict[str, Any] = {
        "api_keys": (ApiKey("test", KEY.encode()),),
        "host": "127.0.0.1",
        "port": 0,
        "embedding_dimension": None,
        "model_id": "Qwen/Qwen3-VL-Embedding-2B",
    }
    return Settings(**{**defaults, **changes})


@dataclass
class Client:
    """A client of one running application, with its key: `session` sends it unless told otherwise."""

    session: aiohttp.ClientSession
    app: web.Application
    port: int
    server: web.Server

    def request(self, method: str, path: str, **options: Any) -> Any:
        return self.session.request(method, path, **options)

    async def embed(self, body: Any, **options: Any) -> tuple[int, Any]:
        """Status and parsed reply of POST /v1/embeddings."""
        async with self.session.post("/v1/embeddings", json=body, **options) as reply:
            return reply.status, await reply.json()

    async def get(self, path: str, **options: Any) -> tuple[int, Any]:
        """Status and parsed reply of a GET."""
        async with self.session.get(path, **options) as reply:
            return reply.status, await reply.json()


Serve = Callable[..., Awaitable[Client]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Start an application, over the connection handler that production uses: `await serve(model, **settings)` is its client."""
    running: list[tuple[Client, asyncio.Server, web.AppRunner]] = []

    async def start(model: FakeModel | Callable[[], Any] | None = None, wait: bool = True, **changes: Any) -> Client:
        settings = make_settings(**changes)
        model = model or FakeModel()

        def load() -> LoadedModel:
            loaded = model() if callable(model) else model
            return loaded if isinstance(loaded, LoadedModel) else loaded.load_both()

        app = create_app(settings, load)
        runner = web.AppRunner(app, handle_signals=False, handler_cancellation=True, access_log=None)
        await runner.setup()
        (sock,) = bind(settings.host, settings.port)
        port = sock.getsockname()[1]
        listener = await listen(runner, sock, settings.header_timeout_s)
        client = Client(aiohttp.ClientSession(f"http://127.0.0.1:{port}", headers=AUTH), app, port, runner.server)
        running.append((client, listener, runner))
        while wait and app[SCHEDULER].state is State.LOADING:
            await asyncio.sleep(0.005)
        return client

    yield start
    for client, listener, runner in running:
        await client.session.close()
        listener.close()
        await runner.cleanup()


class Clock:
    """The running loop's, which can be put forward: what waits for a time has it come, and nothing else has happened meanwhile.
    So a limit may be of minutes, which no pause of the machine reaches."""

    def __init__(self) -> None:
        self._ahead = 0.0
        loop = asyncio.get_running_loop()
        now = loop.time
        loop.time = lambda: now() + self._ahead  # type: ignore[method-assign]

    def advance(self, seconds: float) -> None:
        self._ahead += seconds


@pytest.fixture
def caplog(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """pytest's own, whose records have the request's id as those of a server do."""
    caplog.handler.addFilter(RequestIdFilter())
    return caplog


def records_of(caplog: pytest.LogCaptureFixture, request_id: str) -> list[logging.LogRecord]:
    """What was logged for a request."""
    return [record for record in caplog.records if vars(record)["request_id"] == request_id]


@pytest.fixture
async def clock() -> Clock:
    return Clock()


async def until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    """Wait until it holds; the time is only a guard against waiting for good."""
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends
        await asyncio.sleep(0.005)


@pytest.fixture(scope="session")
def real_server() -> Iterator[Process]:
    """`python -m app` on the miniature checkpoint, ready, with the key KEY: one for all tests that only ask it."""
    with process("app", API_KEY=f"test:{KEY}", MODEL_PATH=str(CHECKPOINT), DEVICE="cpu") as running:
        running.until_status("ok")
        yield running
        running.popen.terminate()
        assert running.wait() == 0


@pytest.fixture
def fake() -> FakeModel:
    return FakeModel()


@pytest.fixture
async def client(serve: Serve, fake: FakeModel) -> Client:
    """A client of an application with the fake model."""
    return await serve(fake)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fail-on-skip", action="store_true", help="a skipped test fails the run")
    parser.addoption("--library", choices=recorded.SOURCES, default="recorded", help="where other libraries' answers come from")


def pytest_configure(config: pytest.Config) -> None:
    """One fork server for the run: this process's, or that of the process whose worker this is."""
    # What is imported stays: the collector does not look at it, neither while it comes nor in tests that ask for a collection.
    gc.disable()
    recorded.SENTENCE_TRANSFORMERS.source = config.getoption("--library")
    config.add_cleanup(recorded.SENTENCE_TRANSFORMERS.save)
    if (given := getattr(config, "workerinput", None)) is not None:
        forkserver.find_server = lambda: given["forkserver"]
        return
    server = forkserver.ForkServer()
    forkserver.find_server = server.address
    config.add_cleanup(server.close)


def pytest_collection_finish() -> None:
    gc.enable()
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    assert forkserver.find_server is not None
    node.workerinput["forkserver"] = forkserver.find_server()


def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if session.config.getoption("--fail-on-skip") and reporter and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
