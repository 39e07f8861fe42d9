"""That no client dials anybody but the servers here: where the machine permits it, everything runs in a network namespace whose
every address lies on the loopback, with hosts that note who came. tests.tools.clients.guard sees a part of that on any machine.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.paths import ROOT
from tests.tools.hardening import namespace
from tests.tools.hardening.board import namespaces
from tests.tools.hardening.namespace import World

_STRANGER = "stranger.example"
# Dials a name and an address, each as packages do that call home: what fails is of no interest to them.
_CALLS_HOME = f"""
import contextlib, socket
for address in ("{_STRANGER}", "{namespace.PUBLIC}"):
    with contextlib.suppress(OSError):
        socket.create_connection((address, 443), 1).close()
"""


def enter(arguments: list[str]) -> int | None:
    """Run this command again in namespaces of its own, and return its exit code; None where there are none to be had."""
    unshare = namespaces()
    if unshare is None or not all(map(shutil.which, ("ip", "mount"))):
        return None
    return subprocess.run([*unshare, sys.executable, "-m", "tests.tools.clients", "--inside", *arguments], cwd=ROOT).returncode


@dataclass
class Outside:
    """What there is beyond the loopback: `world` is None on a machine that permits no namespace."""

    world: World | None

    def dialled(self, noted: Path) -> list[str]:
        """Everything that was dialled since it was asked last; `noted` is the guard's file."""
        found = noted.read_text().splitlines() if noted.exists() else []
        noted.unlink(missing_ok=True)
        if self.world is not None:
            namespace.settle()
            found += [f"name {name}" for name in self.world.unknown]
            found += [f"host {host} port {port}" for host, port in self.world.reached]
            self.world.unknown.clear()
            self.world.reached.clear()
        return found

    def prove(self, folder: Path) -> None:
        """See a program that calls home be found out, by the guard and by the namespace. AssertionError where not."""
        noted, program = folder / "proof", folder / "calls_home.py"
        program.write_text(_CALLS_HOME)
        guarded = [sys.executable, "-m", "tests.tools.clients.guard", str(program)]
        subprocess.run(guarded, cwd=ROOT, env={"DIALLED": str(noted)}, check=True)
        assert len(self.dialled(noted)) == 2, "the guard does not see what is dialled"
        if self.world is not None:
            subprocess.run([sys.executable, str(program)], check=True)
            seen = self.dialled(noted)
            wanted = {f"name {_STRANGER}", f"host {namespace.PUBLIC} port 443"}
            assert wanted <= set(seen), f"the namespace does not see what is dialled: {seen}"


@contextmanager
def outside(inside: bool) -> Iterator[Outside]:
    """In the namespaces that `enter` made: lay every address on the loopback, and be everybody there."""
    if not inside:
        yield Outside(None)
        return
    namespace.enter()
    world = World(b"")
    with namespace.running(world):
        yield Outside(world)
