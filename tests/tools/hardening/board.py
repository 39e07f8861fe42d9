"""What a check of the scoreboard is, how it is run, and the servers that it is run against.

A check asks a server as a stranger would, over its port, and says with a figure whether a promise is kept. It names the guards
that keep the promise: functions that take one away. `prove` runs the check against a server without each of them, where it has
to fail: a check that cannot fail is none.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field

from tests.support.hosts import Process, process
from tests.support.paths import CHECKPOINT, ROOT
from tests.tools.hardening.unguarded import UNCHANGEABLE

# The modules that hold checks, in the order in which their rows are printed.
MODULES = ("inputs", "texts", "images", "urls", "http", "memory", "load", "life", "faults", "checkpoints", "soak")
READY_S = 120.0
# An isolated check's last line: its outcome.
RESULT = "RESULT "

Guard = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Whether the promise was kept, and the figure that says so."""

    passed: bool
    figure: str


@dataclass(frozen=True, slots=True)
class Check:
    """A row. `sends` and `passes` are for the reader; `isolated` has it run in a network namespace of its own."""

    name: str
    sends: str
    passes: str
    run: Callable[[Site], Outcome]
    guards: tuple[Guard, ...]
    quick: bool
    isolated: bool


@dataclass
class Site:
    """What a check is run on. `quick` asks for fewer repetitions, never for a lower bar; `without` is the guard that its servers
    lack. Servers are shared by checks that want the same one, and end with the site."""

    quick: bool = False
    soak_minutes: float = 0.0
    without: Guard | None = None
    _stack: ExitStack = field(default_factory=ExitStack)
    _shared: dict[str, Process] = field(default_factory=dict)
    _unchangeable: list[str] = field(default_factory=list)

    def __enter__(self) -> Site:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def many(self, full: int, quick: int) -> int:
        """How often to do something."""
        return quick if self.quick else full

    def seconds(self, limit: float) -> float:
        """A time limit: a quick run gives four times as long, since a busy machine must fail no test. A proof does not."""
        return 4 * limit if self.quick and self.without is None else limit

    def app(self, **settings: str) -> Process:
        """`python -m app` on the miniature checkpoint, unless `settings` name another, ready, shared."""
        return self._share("app", **{"MODEL_PATH": str(CHECKPOINT), "DEVICE": "cpu"} | settings)

    def fake(self, **settings: str) -> Process:
        """`python -m tests.support.fakes`, ready, shared. FAKE_* settings are its faults."""
        return self._share("tests.support.fakes", **settings)

    @contextmanager
    def own(self, module: str = "app", *changes: Guard, **settings: str) -> Iterator[Process]:
        """A server that no other check sees, not waited for: for what ends it, or counts its memory. `changes` are made to it
        before it starts, guards or no guards."""
        if module == "app":
            settings = {"MODEL_PATH": str(CHECKPOINT), "DEVICE": "cpu"} | settings
        if self.without is not None:
            changes += (self.without,)
        if changes:
            names = (f"{change.__module__}:{change.__name__}" for change in changes)
            settings |= {"CHANGED": " ".join(names), "SERVED": module}
            module = "tests.tools.hardening.unguarded"
        with process(module, **settings) as running:
            try:
                yield running
            finally:
                if running.popen.poll() == UNCHANGEABLE:
                    self._unchangeable.append(running.stderr)

    def unchangeable(self) -> str:
        """What a server said that could not be changed as it should; empty where all could."""
        shared = [one.stderr for one in self._shared.values() if one.popen.poll() == UNCHANGEABLE]
        return "".join((*self._unchangeable, *shared))

    def _share(self, module: str, **settings: str) -> Process:
        wanted = json.dumps([module, settings], sort_keys=True)
        running = self._shared.get(wanted)
        if running is None or running.popen.poll() is not None:
            running = self._shared[wanted] = self._stack.enter_context(self.own(module, **settings))
            running.until_status("ok", READY_S)
        return running


CHECKS: list[Check] = []


def check(
    name: str, sends: str, passes: str, *guards: Guard, quick: bool = True, isolated: bool = False
) -> Callable[[Callable[[Site], Outcome]], Callable[[Site], Outcome]]:
    """Put a function on the board. `quick` has it run with `make test` too, with fewer repetitions."""

    def enter(run: Callable[[Site], Outcome]) -> Callable[[Site], Outcome]:
        CHECKS.append(Check(name, sends, passes, run, guards, quick, isolated))
        return run

    return enter


@functools.cache
def all_checks() -> tuple[Check, ...]:
    """Every check, in order."""
    for module in MODULES:
        importlib.import_module(f"tests.tools.hardening.{module}")
    return tuple(CHECKS)


def attempt(check: Check, site: Site) -> tuple[Outcome, float]:
    """The outcome, and the seconds that it took."""
    started = time.monotonic()
    outcome = isolated(check, site) if check.isolated else run(check, site)
    return outcome, time.monotonic() - started


def run(check: Check, site: Site) -> Outcome:
    """Run a check here. What it does not expect is a failure; but a server that could not be changed proves nothing."""
    try:
        outcome = check.run(site)
    except Exception as error:
        outcome = Outcome(False, f"{type(error).__name__}: {error}"[:2000])
    if said := site.unchangeable():
        return Outcome(True, f"its guard could not be taken away: {said.splitlines()[-1]}")
    return outcome


def isolated(check: Check, site: Site) -> Outcome:
    """Run a check in network and mount namespaces of its own: what it dials there cannot leave the machine."""
    unshare = namespaces()
    if unshare is None:
        return Outcome(False, "not run: it needs unshare(1), and the right to make a network namespace")
    options = ["--quick"] if site.quick else []
    if site.without is not None:
        options += ["--without", f"{site.without.__module__}:{site.without.__name__}"]
    command = [*unshare, sys.executable, "-m", "tests.tools.hardening", "--inside", check.name, *options]
    ran = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=600)
    for line in reversed(ran.stdout.splitlines()):
        if line.startswith(RESULT):
            return Outcome(**json.loads(line.removeprefix(RESULT)))
    return Outcome(False, f"ended with {ran.returncode}: {ran.stderr[-2000:]}")


def inside(name: str, site: Site) -> None:
    """The other end of `isolated`: run the check here, and print its outcome."""
    (found,) = (check for check in all_checks() if check.name == name)
    print(RESULT + json.dumps(asdict(run(found, site))), flush=True)


@functools.cache
def namespaces() -> tuple[str, ...] | None:
    """The command that enters new network and mount namespaces; None where there is none."""
    if shutil.which("unshare"):
        for command in (("unshare", "--net", "--mount"), ("unshare", "--map-root-user", "--net", "--mount")):
            if subprocess.run([*command, "true"], capture_output=True).returncode == 0:
                return command
    return None


# What a server's process has


def memory_mib(server: Process) -> float:
    """Resident memory, less what is backed by files."""
    return _status(server, "RssAnon") / 1024


def peak_mib(server: Process) -> float:
    """The most resident memory since `reset_peak`."""
    return _status(server, "VmHWM") / 1024


def reset_peak(server: Process) -> None:
    with open(f"/proc/{server.popen.pid}/clear_refs", "w") as file:
        file.write("5")


def threads(server: Process) -> int:
    return _status(server, "Threads")


def descriptors(server: Process) -> int:
    return len(os.listdir(f"/proc/{server.popen.pid}/fd"))


def _status(server: Process, field: str) -> int:
    with open(f"/proc/{server.popen.pid}/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
