"""What is in flight, and why the process ends."""

from __future__ import annotations

import asyncio

import pytest

from app.lifecycle import ExitCode, Lifecycle
from scheduler.errors import Draining


async def test_the_first_reason_to_end_counts() -> None:
    lifecycle = Lifecycle()
    ending = asyncio.create_task(lifecycle.ending())
    await asyncio.sleep(0)
    assert not ending.done()
    lifecycle.end(ExitCode.DEVICE_FAILED)
    lifecycle.end(ExitCode.DRAINED)
    await ending
    assert lifecycle.exit_code is ExitCode.DEVICE_FAILED


async def test_idle_waits_for_what_is_in_flight() -> None:
    lifecycle = Lifecycle()
    await lifecycle.idle()
    async with lifecycle.request():
        idle = asyncio.create_task(lifecycle.idle())
        async with lifecycle.request():
            assert lifecycle.in_flight == 2
        await asyncio.sleep(0.01)
        assert not idle.done()
    await idle
    assert lifecycle.in_flight == 0


async def test_what_is_in_flight_can_be_given_up() -> None:
    lifecycle = Lifecycle()

    async def request() -> None:
        async with lifecycle.request():
            await asyncio.sleep(60)

    tasks = [asyncio.create_task(request()) for _ in range(3)]
    await asyncio.sleep(0.01)
    lifecycle.abandon()
    errors = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(error) for error in errors] == [Draining] * 3
    await lifecycle.idle()


async def test_other_ends_of_a_request_pass_through() -> None:
    lifecycle = Lifecycle()
    for error in (TimeoutError("another's"), ValueError()):
        with pytest.raises(type(error)) as caught:
            async with lifecycle.request():
                raise error
        assert caught.value is error

    async def request() -> None:
        async with lifecycle.request():
            await asyncio.sleep(60)

    leaving = asyncio.create_task(request())
    await asyncio.sleep(0.01)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    assert lifecycle.in_flight == 0


def test_exit_codes_are_those_of_the_contract() -> None:
    assert {code.name: int(code) for code in ExitCode} == {
        "DRAINED": 0,
        "START_FAILED": 1,
        "SETTINGS_WRONG": 2,
        "DEVICE_FAILED": 3,
    }
