"""Child processes of a measurement: on cores of their own, and ended by their ids however the measurement ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

# A service drains and a model is freed well within it.
TERMINATE_S = 15.0


class ChildFailed(RuntimeError):
    """A child has ended, or never came to be ready. The message names it."""


@dataclass(frozen=True, slots=True)
class Cores:
    """The core of engines and services, and that of the load; they are one where there is but one."""

    model: int
    load: int

    @classmethod
    def first(cls) -> Cores:
        """The first two that this process may use."""
        allowed = sorted(os.sched_getaffinity(0))
        return cls(allowed[0], allowed[min(1, len(allowed) - 1)])


@contextmanager
def on_cores(cores: Iterable[int] | None) -> Iterator[None]:
    """This process on these cores alone; None changes nothing.

    What it starts meanwhile keeps them: affinity is inherited, so that torch counts these cores when it is imported.
    """
    before = os.sched_getaffinity(0)
    if cores is not None:
        os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def child(module: str, *arguments: str, python: str = sys.executable, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """`python -m MODULE` while the context lasts; `options` are Popen's."""
    popen = None
    try:
        with _signals_wait():
            # In a session of its own: an interrupt from the terminal is ours to hear, and the child's end ours to bring about.
            popen = subprocess.Popen([python, "-m", module, *arguments], text=True, start_new_session=True, **options)
        yield popen
    finally:
        if popen:
            end(popen)


@contextmanager
def _signals_wait() -> Iterator[None]:
    """SIGINT and SIGTERM come when the context ends: raised within Popen, they would leave a child that nobody knows of."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard: list[int] = []
    before = {number: signal.signal(number, lambda number, _: heard.append(number)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in heard:
            signal.raise_signal(number)


def end(popen: subprocess.Popen[str], grace: float = TERMINATE_S) -> None:
    """Ask it to end, and after `grace` seconds make it."""
    try:
        if popen.poll() is None:
            popen.terminate()
            popen.wait(grace)
    except subprocess.TimeoutExpired:
        pass
    finally:
        if popen.poll() is None:
            popen.kill()
            popen.wait()
        for pipe in (popen.stdin, popen.stdout):
            if pipe:
                pipe.close()
