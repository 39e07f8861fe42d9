"""The harnesses of tests/tools/load/harness/, each run for a moment against the service on the miniature checkpoint."""

from __future__ import annotations

import json
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.hosts import Process
from tests.support.paths import ROOT
from tests.support.programs import program
from tests.tools.load.harness import bodies

pytestmark = pytest.mark.tools

HARNESS = ROOT / "tests" / "tools" / "load" / "harness"
SCENARIOS = [*bodies.SCENARIOS, "health"]
each_scenario = pytest.mark.parametrize("scenario", SCENARIOS)


@dataclass(frozen=True)
class Target:
    url: str
    bodies: Path

    def run(self, *command: str, key: str = "sk-test") -> tuple[int, str]:
        """Exit code and what it prints."""
        own = {"API_KEY": key, "BASE_URL": self.url, "BODIES": str(self.bodies), "NO_PROXY": "*", "no_proxy": "*"}
        done = subprocess.run(command, env=os.environ | own, cwd=self.bodies, capture_output=True, text=True, timeout=240)
        return done.returncode, done.stdout + done.stderr

    def wrk(self, scenario: str, key: str = "sk-test") -> tuple[int, str]:
        options = [
            "-t",
            "2",
            "-c",
            "4",
            "--timeout",
            "60s",
            "--latency",
            "-s",
            str(HARNESS / "wrk.lua"),
            self.url,
            "--",
            scenario,
        ]
        return self.for_a_moment(r"[1-9]\d* requests in", program("wrk"), "-d", *options, key=key)

    def hey(self, scenario: str, key: str = "sk-test") -> tuple[int, str]:
        program("hey")
        return self.for_a_moment(r"\]\s+\d+ responses", str(HARNESS / "hey.sh"), scenario, "-c", "4", "-z", key=key)

    def for_a_moment(self, replied: str, *command: str, key: str) -> tuple[int, str]:
        """The command with a number of seconds after its option: a second, or more on a machine too busy to reply within one."""
        place = next(index for index, word in enumerate(command) if word in ("-d", "-z")) + 1
        for seconds in (1, 5, 25):
            code, said = self.run(*command[:place], f"{seconds}s", *command[place:], key=key)
            if re.search(replied, said):
                break
        return code, said

    def locust(self, *users: str, key: str = "sk-test") -> tuple[int, str]:
        own = ROOT / ".venv-locust" / "bin" / "locust"
        path = str(own) if own.exists() else program("locust", "make locust")
        script = ["--locustfile", str(HARNESS / "locustfile.py"), "--host", self.url]
        load = ["--headless", "--users", "4", "--spawn-rate", "4", "--run-time", "2s", "--stop-timeout", "30", "--only-summary"]
        return self.run(path, *script, *load, *users, key=key)

    def k6(self, scenario: str, key: str = "sk-test", **environment: str) -> tuple[int, str]:
        """The script in Node.js: k6 itself is in no package index."""
        given = [f"{name}={value}" for name, value in {"SCENARIO": scenario, **environment}.items()]
        script = (
            program("node", "apt-get install nodejs"),
            str(ROOT / "tests" / "support" / "k6_shim.mjs"),
            str(HARNESS / "k6.js"),
            "5",
        )
        return self.run("env", *given, *script, key=key)


@pytest.fixture(scope="module")
def target(real_server: Process, tmp_path_factory: pytest.TempPathFactory) -> Target:
    folder = tmp_path_factory.mktemp("bodies")
    bodies.write(folder, 100)
    return Target(f"http://127.0.0.1:{real_server.port()}", folder)


def test_no_two_requests_are_alike(target: Target) -> None:
    for scenario, vectors in (("text", 1), ("mixed", bodies.MIXED_INPUTS), ("image", 1)):
        lines = (target.bodies / f"{scenario}.tsv").read_text().splitlines()
        assert len(lines) == (bodies.MOST_IMAGES if scenario == "image" else 100)
        inputs = [item for line in lines for item in json.loads(line.partition("\t")[2])["input"]]
        assert len({json.dumps(item) for item in inputs}) == len(inputs) == vectors * len(lines)
        assert {line.partition("\t")[0] for line in lines} == {str(vectors)}


@each_scenario
def test_wrk(target: Target, scenario: str) -> None:
    code, said = target.wrk(scenario)
    counts = re.search(r"Replies: (\d+) good, (\d+) refused with 429, (\d+) with .*, (\d+) with .*; (\d+) broken", said)
    assert code == 0 and counts and int(counts[1]) > 0, said
    assert counts.groups()[1:] == ("0",) * 4, said
    assert int(re.search(r"(\d+) requests in", said)[1]) == int(counts[1])  # type: ignore[index]


@each_scenario
def test_hey(target: Target, scenario: str) -> None:
    code, said = target.hey(scenario)
    assert code == 0, said
    assert re.findall(r"\[(\d+)\]\s+\d+ responses", said) == ["200"]
    assert "Error distribution" not in said


@pytest.mark.parametrize("users", [("TextUser", "HealthUser"), ("MixedUser",), ("ImageUser",)], ids=lambda users: users[0])
def test_locust(target: Target, users: tuple[str, ...]) -> None:
    code, said = target.locust(*users)
    assert code == 0, said
    rows = {name: int(failures) for name, failures in re.findall(r"(?m)^(?:GET|POST) +(\w+) +\d+ +(\d+)\(", said)}
    assert rows == {user.removesuffix("User").lower(): 0 for user in users}, said


@each_scenario
def test_k6(target: Target, scenario: str) -> None:
    code, said = target.k6(scenario)
    assert code == 0, said
    result = json.loads(said)
    assert result["checks"] == {"status is 200": [5, 0], "every vector is there": [5, 0]}
    assert result["counters"] == {"refused_with_429": 0}
    assert result["options"]["scenarios"][scenario]["executor"] == "constant-vus"


def test_k6_with_a_rate_is_an_open_loop(target: Target) -> None:
    code, said = target.k6("text", RATE="50", VUS="8", DURATION="9s")
    assert code == 0, said
    loop = {"executor": "constant-arrival-rate", "rate": 50, "timeUnit": "1s", "duration": "9s", "preAllocatedVUs": 8}
    assert json.loads(said)["options"]["scenarios"] == {"text": loop}


def test_what_is_refused_is_seen(target: Target) -> None:
    code, said = target.wrk("text", key="sk-wrong")
    assert code == 1 and re.search(r"Replies: 0 good, 0 refused with 429, [1-9]\d* with another status", said), said
    code, said = target.hey("text", key="sk-wrong")
    assert code == 1 and "[401]" in said, said
    code, said = target.k6("text", key="sk-wrong")
    assert json.loads(said)["checks"] == {"status is 200": [0, 5], "every vector is there": [0, 5]}


def test_what_is_refused_is_seen_by_locust(target: Target) -> None:
    code, said = target.locust("TextUser", key="sk-wrong")
    assert code == 1 and re.search(r"(?m)^POST +text +(\d+) +\1\(100\.00%\)", said), said


def test_a_reply_that_is_not_whole_is_seen(target: Target, tmp_path: Path) -> None:
    """Of requests that claim to have one input more than they have."""
    for scenario in bodies.SCENARIOS:
        lines = (target.bodies / f"{scenario}.tsv").read_text().splitlines(keepends=True)
        (tmp_path / f"{scenario}.tsv").write_text("".join(f"9{line}" for line in lines))
    wrong = Target(target.url, tmp_path)
    code, said = wrong.wrk("text")
    assert code == 1 and re.search(r"0 with another status, [1-9]\d* with a wrong number", said), said
    code, said = wrong.k6("text")
    assert json.loads(said)["checks"] == {"status is 200": [5, 0], "every vector is there": [0, 5]}


def test_a_reply_that_is_not_whole_is_seen_by_locust(target: Target, tmp_path: Path) -> None:
    lines = (target.bodies / "mixed.tsv").read_text().splitlines(keepends=True)
    (tmp_path / "mixed.tsv").write_text("".join(f"9{line}" for line in lines))
    code, said = Target(target.url, tmp_path).locust("MixedUser")
    assert code == 1 and "16 vectors instead of 916" in said, said
