"""What `make clients` stands on: that README, Makefile and packages agree, that its judge can say no, and that its guard sees."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from tests.docs.pages import PAGES, SNIPPETS, Page, bare, each_page_with
from tests.support.paths import ROOT
from tests.tools.clients.__main__ import snippets
from tests.tools.clients.guard import is_local
from tests.tools.clients.judge import judge
from tests.tools.clients.packages import FOLDER, PACKAGES

pytestmark = pytest.mark.tools


@each_page_with("clients")
def test_the_table_is_that_of_the_packages(page: Page) -> None:
    rows = page.table("clients")
    assert [bare(name) for name, _, _ in rows] == [package.name for package in PACKAGES]
    for package, (_, version, _) in zip(PACKAGES, rows, strict=True):
        requirement = Requirement(package.requirements.read_text().splitlines()[0])
        assert requirement.name == package.name
        assert requirement.specifier.contains(version), f"{version} is not {requirement}"


def test_the_makefile_and_the_files_are_those_of_the_packages() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (listed,) = re.findall(r"(?m)^CLIENTS \?= (.+)$", makefile)
    assert listed.split() == [package.name for package in PACKAGES]
    assert {path.name for path in FOLDER.glob("*_client.py")} == {package.program for package in PACKAGES}
    assert set((FOLDER / "requirements").iterdir()) == {package.requirements for package in PACKAGES}


def test_every_example_is_run_by_one_client() -> None:
    run_here = {"openai"}  # its examples are run by tests/docs/test_readme.py
    examples = {package.name: snippets(package) for package in PACKAGES}
    assert {name for name, found in examples.items() if not found} == run_here
    written = [text for page in PAGES for language, text in page.blocks() if language in SNIPPETS]
    assert sorted(text for found in examples.values() for text in found) == sorted(written)


# The judge

SERVED = {"status": 200, "vectors": [[1.0, 0.0], [0.0, 1.0]], "tokens": 7}
REFUSED = {"status": 429, "message": "the server is busy", "retry_after": "2"}
RAISED = {"raised": "openai.RateLimitError", "message": "Error code: 429 - the server is busy", "is_expected": True}


def record(kind: str, wanted: Any, **came: Any) -> dict[str, Any]:
    return {"kind": kind, "tried": "it", "wanted": wanted, "retries": 0, "waits": [], **came}


@pytest.mark.parametrize(
    ("line", "passed"),
    [
        (record("vectors", SERVED, got=[[2.0, 0.0], [0.001, 1.0]]), True),
        (record("vectors", SERVED, got=[[0.0, 1.0], [1.0, 0.0]]), False),
        (record("vectors", SERVED, got=[[1.0, 0.0], [0.02, 1.0]]), False),
        (record("vectors", SERVED, got=[[1.0, 0.0]]), False),
        (record("vectors", SERVED, got=[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), False),
        (record("vectors", SERVED, got=[[1.0, 0.0], [0.0, 0.0]]), False),
        (record("vectors", SERVED, got=[[1.0, 0.0], None]), False),
        (record("vectors", SERVED, got=[[1.0, 0.0], [1.0]]), False),
        (record("vectors", REFUSED, got=[[1.0, 0.0]]), False),
        (record("vectors", SERVED, **RAISED), False),
        (record("tokens", SERVED, got=7), True),
        (record("tokens", SERVED, got=8), False),
        (record("tokens", REFUSED, got=7), False),
        (record("value", ["mine", 16], got=["mine", 16]), True),
        (record("value", ["mine", 16], got=["other", 16]), False),
        (record("refusal", REFUSED, **RAISED), True),
        (record("refusal", REFUSED, **RAISED | {"is_expected": False}), False),
        (record("refusal", REFUSED, **RAISED | {"message": "Error code: 429"}), False),
        (record("refusal", REFUSED, got=[[1.0, 0.0]]), False),
        (record("refusal", SERVED, **RAISED), False),
        (record("refusal", REFUSED, **RAISED) | {"retries": 1, "waits": [2.0]}, True),
        (record("refusal", REFUSED, **RAISED) | {"retries": 1, "waits": []}, False),
        (record("refusal", REFUSED, **RAISED) | {"retries": 1, "waits": [0.5]}, False),
        (record("refusal", REFUSED | {"retry_after": None}, **RAISED) | {"retries": 1, "waits": [0.5]}, False),
        (record("exception", None, **RAISED), True),
        (record("exception", None, **RAISED | {"is_expected": False}), False),
        (record("exception", None, got=[[1.0, 0.0]]), False),
    ],
)
def test_the_judge(line: dict[str, Any], passed: bool) -> None:
    verdict = judge(line)
    assert verdict.passed is passed, verdict.figure
    assert verdict.figure


# The guard


@pytest.mark.parametrize("host", [None, "", "localhost", b"localhost", "127.0.0.1", "127.8.9.10", "::1", "::1%lo"])
def test_the_loopback_is_local(host: Any) -> None:
    assert is_local(host)


@pytest.mark.parametrize("host", ["example.org", b"example.org", "10.0.0.1", "93.184.216.34", "::2", "localhost.example.org"])
def test_what_is_beyond_is_not(host: Any) -> None:
    assert not is_local(host)


def test_the_guard_refuses_and_notes_what_is_dialled(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import socket\n"
        "listener = socket.create_server(('127.0.0.1', 0))\n"
        "socket.create_connection(listener.getsockname()).close()\n"
        "for address in ('stranger.example', '192.0.2.1'):\n"
        "    try:\n"
        "        socket.create_connection((address, 80))\n"
        "    except OSError as error:\n"
        "        print(error)\n"
    )
    dialled = tmp_path / "dialled"
    environment = {**os.environ, "DIALLED": str(dialled)}
    command = [sys.executable, "-m", "tests.tools.clients.guard", str(program)]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("nothing but the loopback") == 2
    assert dialled.read_text().splitlines() == ["socket.getaddrinfo stranger.example", "socket.getaddrinfo 192.0.2.1"]
