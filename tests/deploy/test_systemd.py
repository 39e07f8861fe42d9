"""deploy/embedding.service, as systemd reads it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from app.http.server import ABANDON_GRACE_S
from app.lifecycle import ExitCode
from app.settings import DEFAULTS
from tests.support.paths import ROOT
from tests.support.programs import edited, program, run

pytestmark = pytest.mark.deploy

UNIT = (ROOT / "deploy" / "embedding.service").read_text()
ANALYZE = ("systemd-analyze", "apt-get install systemd")
# 0 is safe, 10 is not; a unit that says nothing comes to 9.6.
MOST_EXPOSED = 3.5


def value(key: str) -> str:
    (found,) = re.findall(rf"(?m)^{key}=(.*)$", UNIT)
    return str(found)


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / "embedding.service"
    # Only the program has to be there.
    unit.write_text(edited(UNIT, {r"^ExecStart=\S+": f"ExecStart={sys.executable}"}))
    said = run(program(*ANALYZE), "verify", "--man=no", str(unit))
    assert unit.name not in said, said


def test_what_an_intruder_could_reach_is_little(tmp_path: Path) -> None:
    said = run(
        program(*ANALYZE),
        "security",
        "--offline=true",
        str(ROOT / "deploy" / "embedding.service"),
    )
    (exposure,) = re.findall(r"Overall exposure level for \S+: ([\d.]+)", said)
    assert float(exposure) <= MOST_EXPOSED


def test_what_would_hide_the_gpu_is_not_set() -> None:
    keys = set(re.findall(r"(?m)^(\w+)=", UNIT))
    assert not keys & {"PrivateDevices", "DeviceAllow", "DevicePolicy", "ProtectClock", "MemoryDenyWriteExecute", "ProcSubset"}


def test_it_is_started_again_only_where_that_helps() -> None:
    assert value("Restart") == "on-failure"
    stays_away = {int(code) for code in value("RestartPreventExitStatus").split()}
    assert stays_away == {ExitCode.START_FAILED, ExitCode.SETTINGS_WRONG}


def test_it_may_take_the_time_to_drain() -> None:
    assert float(value("TimeoutStopSec")) > DEFAULTS.shutdown_timeout_s + ABANDON_GRACE_S
    assert value("KillMode") == "mixed"
