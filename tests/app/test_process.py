"""What belongs to the served process alone: an application in another process leaves it as it was."""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from aiohttp import web

import app.http.server
import app.main
from app import process
from app.__main__ import run_server
from app.http.keys import SCHEDULER, SERVICE
from app.main import create_app
from scheduler.scheduler import State
from tests.conftest import Client, Serve, make_settings
from tests.support.fakes import FakeModel


class Cycle:
    """Garbage that only the collector finds."""

    def __init__(self) -> None:
        self.me = self


def test_what_is_there_is_looked_at_no_more() -> None:
    """What is garbage by then is gone, and the rest is left alone."""
    garbage = weakref.ref(Cycle())
    try:
        process.freeze_heap()
        assert garbage() is None
        assert gc.get_freeze_count() > 1000
    finally:
        gc.unfreeze()


def test_threads_share_more_often_than_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    set_to: list[float] = []
    monkeypatch.setattr(sys, "setswitchinterval", set_to.append)
    process.share_interpreter()
    assert set_to == [5e-4]


@pytest.mark.parametrize("refused", [False, True])
def test_as_many_connections_as_the_system_allows(monkeypatch: pytest.MonkeyPatch, refused: bool) -> None:
    asked: list[tuple[int, tuple[int, int]]] = []

    def setrlimit(which: int, limits: tuple[int, int]) -> None:
        asked.append((which, limits))
        if refused:
            raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(resource, "getrlimit", lambda which: (1024, 4096))
    monkeypatch.setattr(resource, "setrlimit", setrlimit)
    process.allow_connections()
    assert asked == [(resource.RLIMIT_NOFILE, (4096, 4096))]


def test_the_command_to_serve_does_each_at_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []

    def load_model() -> Any:
        raise AssertionError("nothing is loaded")

    def fake_create_app(settings: object, load: Any, on_ready: Any) -> object:
        assert load is load_model and on_ready is process.freeze_heap
        happened.append("created")
        return object()

    async def fake_serve(application: object) -> int:
        happened.append("served")
        return 0

    monkeypatch.setattr(process, "share_interpreter", lambda: happened.append("shared"))
    monkeypatch.setattr(process, "allow_connections", lambda: happened.append("allowed"))
    monkeypatch.setattr(app.main, "create_app", fake_create_app)
    monkeypatch.setattr(app.http.server, "serve", fake_serve)
    assert run_server(make_settings(), load_model) == 0
    assert happened == ["shared", "allowed", "created", "served"]


async def test_an_application_alone_changes_nothing(client: Client) -> None:
    assert (await client.embed({"input": "a"}))[0] == 200
    assert sys.getswitchinterval() == 5e-3
    assert gc.get_freeze_count() == 0


@pytest.mark.parametrize("error", [None, RuntimeError("no weights")])
async def test_ready_is_told_once_the_model_is_and_only_then(error: Exception | None) -> None:
    told: list[State] = []
    application = create_app(make_settings(), FakeModel(load_error=error).load_both, lambda: told.append(scheduler.state))
    scheduler = application[SCHEDULER]
    runner = web.AppRunner(application)
    await runner.setup()
    assert told == []
    async with asyncio.timeout(30):
        while scheduler.state is State.LOADING:
            await asyncio.sleep(0.005)
    assert told == ([] if error else [State.READY])
    await runner.cleanup()


@pytest.mark.parametrize(
    ("device", "cores", "threads"),
    [
        ("cpu", {3}, 1),
        ("cpu", {0, 5}, 1),
        ("cpu", set(range(16)), 4),
        ("cuda:1", {3}, 1),
        ("cuda", {0, 5}, 2),
        ("cuda", set(range(64)), 8),
    ],
)
async def test_threads_for_preparation_are_as_many_as_the_device_leaves_cores_for(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, device: str, cores: set[int], threads: int
) -> None:
    """Of the cores that this process may use, not of those that the machine has."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: cores)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    client = await serve(FakeModel(device=device))
    status, _ = await client.embed({"input": ["a", "b"]})
    assert status == 200
    pool, count = client.app[SERVICE]._tools.threads.pool(device)
    assert isinstance(pool, ThreadPoolExecutor)
    assert count == pool._max_workers == threads
