"""make bench PEER=...: a real run of this service beside its library, what makes one fail, and the ratios."""

from __future__ import annotations

import asyncio
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from tests.support.hosts import process
from tests.support.paths import ROOT
from tests.support.programs import until
from tests.tools.load import bench, infinity, peer, workloads
from tests.tools.load.callers import LoadFailed, Reply, Server, Tally, load
from tests.tools.load.children import ChildFailed, child
from tests.tools.load.goals import TO_LIBRARY, peer_goals
from tests.tools.load.measure import LOADS, Load
from tests.tools.load.peer import Comparison, recounted, row_of_load
from tests.tools.load.peer_report import peer_table

pytestmark = pytest.mark.tools

# A real run


@pytest.fixture(scope="module")
def printed() -> list[str]:
    """What a short run prints, as a person starts it."""
    command = [sys.executable, "-m", "tests.tools.load.bench", "--peer", "library", "--device", "cpu", "--loads", "1x1,8x1"]
    run = subprocess.run(
        [*command, "--texts", "64", "--rounds", "2", "--seconds", "0.2"], cwd=ROOT, capture_output=True, text=True, timeout=280
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


@pytest.fixture(scope="module")
def result(printed: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(printed[-1])
    return found


def test_every_load_has_its_rows_and_every_round_its_ratio(result: dict[str, Any]) -> None:
    assert list(result["loads"]) == ["1x1", "8x1"]
    assert result["texts"]["count"] == 64
    assert (result["rounds"], result["dtype"], result["library"]["threads"]) == (2, "float32", 1)
    for load_row in result["loads"].values():
        assert list(load_row["rows"]) == ["library", "ours"]
        for line in load_row["rows"].values():
            assert all(math.isfinite(value) and value > 0 for value in (line["tokens_per_s"], line["core_share"]))
            per_vector = line["tokens_per_s"] / line["vectors_per_s"]
            assert 10 <= per_vector <= 202
        ours = load_row["rows"]["ours"]
        assert len(ours["to_library_rounds"]) == 2
        assert min(ours["to_library_rounds"]) <= ours["to_library"] <= max(ours["to_library_rounds"])
        assert 0 < ours["p50_ms"] <= ours["p99_ms"]


def test_service_and_library_do_the_same_work(result: dict[str, Any]) -> None:
    assert list(result["cosine"]) == ["ours"]
    assert result["cosine"]["ours"] > 0.9999
    # One has a core, and so has the other.
    assert all(line["core_share"] < 1.1 for load_row in result["loads"].values() for line in load_row["rows"].values())


def test_the_table_tells_the_same(printed: list[str], result: dict[str, Any]) -> None:
    text = "\n".join(printed[:-1])
    for load_row in result["loads"].values():
        for line in load_row["rows"].values():
            assert f"{line['vectors_per_s']:,.1f}" in text
        assert f"{load_row['rows']['ours']['to_library']:.2f}" in text
    judged = [line.split()[0] for line in printed if line.startswith(("  pass", "  MISS"))]
    assert judged == ["pass" if goal["met"] else "MISS" for goal in result["goals"]]
    assert [goal["workload"] for goal in result["goals"]] == ["1x1", "8x1", "ours"]


# What makes it fail


def test_without_the_peers_environment_it_says_how_to_make_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for python in (tmp_path / "none", Path(sys.executable)):
        assert bench.main(["--peer", "infinity", "--device", "cpu", "--peer-python", str(python)]) == 1
        printed = capsys.readouterr()
        assert "make bench PEER=infinity" in printed.err and not printed.out


def test_a_peer_that_cannot_start_is_a_failure(tmp_path: Path) -> None:
    """Its module is not in this environment."""
    start = infinity.infinity(Path(sys.executable), "infinity", tmp_path, "cpu", "float32")
    with start as running, pytest.raises(ChildFailed, match="infinity has ended with 1"):
        running.wait()


def test_loads_that_are_not_known_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.parse_arguments(["--device", "cpu", "--peer", "library", "--loads", "1x1,3x3"])
    assert "3x3: loads are 1x1, 8x1" in capsys.readouterr().err


def test_fewer_texts_than_callers_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--device", "cpu", "--peer", "library", "--loads", "8x1"]
    assert bench.parse_arguments([*asked, "--texts", "8"]).texts == 8
    with pytest.raises(SystemExit):
        bench.parse_arguments([*asked, "--texts", "7"])
    assert "8 are under way at once" in capsys.readouterr().err


def test_a_server_that_refuses_is_a_failure() -> None:
    with process() as running:
        running.until_status("ok")
        with pytest.raises(LoadFailed, match="replied with 401"):
            asyncio.run(peer.vectors(Server(running.port(), "another"), ["hello"]))


# The parts


def test_defaults_are_those_of_what_is_measured() -> None:
    alone, beside = (bench.parse_arguments(["--device", "cpu", *more]) for more in ([], ["--peer", "library"]))
    assert (alone.seconds, alone.rounds, alone.budget_s) == (10, 3, 840)
    assert (beside.seconds, beside.rounds, beside.budget_s) == (peer.SECONDS, peer.ROUNDS, peer.BUDGET_S)
    # Of no load more than half of the texts are under way at once, and goals are of ratios on all of them.
    assert beside.texts == 2 * max(each.total for each in LOADS)
    assert beside.loads == LOADS and beside.checkpoint is None
    assert bench.parse_arguments(["--device", "cpu", "--peer", "library", "--loads", "8x32"]).loads == [Load(8, 32)]


def test_vectors_are_compared_by_their_place() -> None:
    """Of the fake model, whose vector proves its input."""
    with process() as running:
        running.until_status("ok")
        server = Server(running.port(), "sk-test")
        one, other = (asyncio.run(peer.vectors(server, [text]))[0] for text in ("one", "other"))
        both = asyncio.run(peer.vectors(server, ["other", "one"]))
    assert np.array_equal(both, np.stack([other, one]))
    assert not np.array_equal(one, other)


def test_tokens_are_those_that_are_counted_here() -> None:
    told = [Reply(caller, at, at + 1, 1, 999) for at, caller in ((0, 0), (0, 1), (1, 0), (2, 0), (1, 1))]
    counted = recounted(Tally(0.0, 3.0, replies=told), [[10, 20], [7]])
    assert [(reply.caller, reply.tokens) for reply in counted.replies] == [(0, 10), (1, 7), (0, 20), (0, 10), (1, 7)]
    assert counted.since == 0.0 and [reply.at for reply in counted.replies] == [reply.at for reply in told]


def turn(rate: float, share: float = 1.0, **more: float) -> dict[str, float]:
    return {"vectors_per_s": rate / 60, "tokens_per_s": rate, "core_share": share, **more}


def window(rate: float, share: float = 1.0) -> dict[str, float]:
    return turn(rate, share, p50_ms=1.0, p99_ms=2.0, generator_share=0.1)


def test_a_ratio_is_of_one_round_and_the_median_of_them_is_told() -> None:
    """The machine had half its speed in the second round: no ratio tells of it."""
    rates = [(4000, 3000), (2000, 1600), (4000, 2800)]
    row = row_of_load(Load(1, 1), [{"library": turn(base), "ours": window(rate)} for base, rate in rates])["rows"]
    assert row["ours"]["to_library_rounds"] == pytest.approx([0.75, 0.8, 0.7])
    assert row["ours"]["to_library"] == pytest.approx(0.75)
    assert (row["ours"]["tokens_per_s"], row["library"]["tokens_per_s"]) == (2800, 4000)
    assert "to_library" not in row["library"]


def test_by_work_what_others_had_of_the_core_does_not_count() -> None:
    row = row_of_load(Load(64, 1), [{"library": turn(4000, 1.0), "ours": window(2000, 0.5)}])["rows"]["ours"]
    assert (row["to_library"], row["to_library_by_work"]) == (0.5, 1.0)


class Clock:
    """A clock that only turns move on."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


class Told:
    """In place of a process: what it was asked, and how long a turn of it takes."""

    def __init__(self, name: str, asked: list[str], clock: Clock, seconds: float = 0.0) -> None:
        self.name, self.asked, self.clock, self.seconds = name, asked, clock, seconds
        self.server = Server(1, "key")

    def take(self, count: int) -> list[int]:
        return [7] * count

    def turn(self, seconds: float) -> dict[str, float]:
        self.asked.append(self.name)
        self.clock.now += self.seconds
        return {"passes": 2, "seconds": 1.0, "cpu_seconds": 0.5}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Who had a turn, in order; servers have theirs at once."""
    found: list[str] = []

    def of_server(self: Comparison, process: Told, load: Load, seconds: float) -> dict[str, float]:
        found.append(process.name)
        return window(1.0)

    monkeypatch.setattr(Comparison, "_window", of_server)
    return found


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(peer, "time", clock)
    return clock


def comparison(asked: list[str], clock: Clock, seconds: float = 0.0) -> Comparison:
    servers: Any = {name: Told(name, asked, clock) for name in ("ours", "other")}
    library: Any = Told("library", asked, clock, seconds)
    return Comparison(library, servers, [Load(1, 1), Load(8, 1)], 64)


def test_each_round_another_is_first(asked: list[str], clock: Clock) -> None:
    rounds = list(comparison(asked, clock).rounds(3, 1.0, clock.now + 60))
    assert asked == [*("library", "ours", "other") * 2, *("ours", "other", "library") * 2, *("other", "library", "ours") * 2]
    assert [set(found) for found in rounds] == [{Load(1, 1), Load(8, 1)}] * 3
    # Two passes over the 64 texts in a second, half of which the process had.
    base = rounds[0][Load(1, 1)]["library"]
    assert base == {"vectors_per_s": 128, "tokens_per_s": 128 * 7, "core_share": 0.5}


@pytest.mark.parametrize(("budget", "count"), [(0.0, 1), (0.5, 2), (60.0, 4)])
def test_no_round_begins_that_does_not_fit(asked: list[str], clock: Clock, budget: float, count: int) -> None:
    """Of 0.2 seconds each: one is made whatever the budget is."""
    rounds = comparison(asked, clock, seconds=0.1).rounds(4, 1.0, clock.now + budget)
    assert len(list(rounds)) == count


def test_no_two_callers_share_an_input() -> None:
    inputs = list(range(512))
    for each in LOADS:
        pools = [[part for request in pool for part in request] for pool in each.pools(inputs)]
        assert len(pools) == each.callers
        assert sorted(part for pool in pools for part in pool) == inputs
        assert {len(request) for pool in each.pools(inputs) for request in pool} == {each.inputs}


def test_a_steady_window_begins_when_every_caller_has_a_reply() -> None:
    """Sixteen callers of a device that takes one at a time: the first replies of all that were asked at once come early."""
    with process(FAKE_SECONDS_PER_BATCH="0.03", MAX_BATCH_SIZE="1") as running:
        running.until_status("ok")
        server = Server(running.port(), "sk-test")
        callers = [cycle([server.request([f"{number} {place}"]) for place in range(2)]) for number in range(16)]
        tally = asyncio.run(load(server, callers, seconds=0.6, steady=True))
    firsts: dict[int, float] = {}
    for reply in tally.replies:
        firsts.setdefault(reply.caller, reply.at)
    assert len(firsts) == 16 and max(firsts.values()) <= tally.since
    assert tally.until - tally.since == pytest.approx(0.6)
    window = tally.window()
    waits = [reply.at - reply.asked_at for reply in window.replies]
    # Sixteen requests are under way all the time, but for the moment between a reply and the next request.
    assert 0.9 * 16 / max(waits) <= window.vectors_per_s <= 16 / min(waits)


def test_texts_are_what_they_are_said_to_be() -> None:
    texts = workloads.passages(512)
    assert len(set(texts)) == 512 and texts == workloads.passages(512)
    lengths = sorted(len(text.split()) for text in texts)
    assert (lengths[0], lengths[-1]) == (8, 200)
    # As many below the geometric mean of the ends as above it.
    assert lengths[256] == pytest.approx(40, abs=1)
    tokenizer = Tokenizer.from_file(str(peer.packaged() / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # A word is a token, and two stand around.
    assert [len(tokenizer.encode(text).ids) - 2 for text in texts] == [len(text.split()) for text in texts]


def test_a_peer_is_idle_when_it_has_nothing_of_the_processor(tmp_path: Path) -> None:
    """It computes on for callers that have gone: here for a second, and a little, as the kernel counts in hundredths."""
    code = "import sys, time; end = time.process_time() + 1.1\nwhile time.process_time() < end: pass\ntime.sleep(600)"
    (tmp_path / "busy.py").write_text(code)
    (tmp_path / "log").touch()
    with child("busy", cwd=tmp_path) as popen:
        running = infinity.Infinity(popen, tmp_path / "log", Server(1, "key"), "busy")
        until(lambda: running.cpu_seconds() >= 0.3, "it computes")
        running.settle()
        assert 1.0 <= running.cpu_seconds() < 5.0
        popen.kill()
        popen.wait()
        with pytest.raises(ChildFailed, match="busy is gone"):
            running.cpu_seconds()


def compared(**changes: Any) -> dict[str, Any]:
    """A result with a row for every load."""
    row = {**window(3000), "to_library": 0.93, "to_library_rounds": [0.92, 0.93, 0.99], "to_library_by_work": 0.94}
    rows = {"library": turn(3200), "ours": row, "infinity": {**row, "to_library": 0.5, "generator_share": 0.95}}
    found: dict[str, Any] = {
        "peer": "infinity", "checkpoint": "minilm", "device": "cpu", "dtype": "float32", "cores": {"model": 0, "load": 1},
        "library": {"torch": "2", "threads": 1}, "peer_versions": {"infinity-emb": "0.0.78"},
        "texts": {"count": 512, "tokens": 31563, "longest": 202}, "window_s": 4.0, "rounds": 3, "elapsed_s": 500.0,
        "loads": {each.name: {"callers": each.callers, "inputs": each.inputs, "rows": rows} for each in LOADS},
        "cosine": {"ours": 1.0, "infinity": 0.9}, **changes,
    }  # fmt: skip
    return {**found, "goals": peer_goals(found)}


def test_every_load_has_its_goal_and_a_wrong_vector_is_a_miss() -> None:
    judged = [(goal["workload"], goal["bound"], goal["met"]) for goal in compared()["goals"]]
    assert judged == [
        ("1x1", 0.66, True), ("8x1", 0.8, True), ("64x1", 0.9, True), ("256x1", 0.95, False), ("8x32", 0.97, False),
        ("ours", 0.9999, True), ("infinity", 0.9999, False),
    ]  # fmt: skip
    assert [*TO_LIBRARY] == [each.name for each in LOADS]
    # The goals were set for a CPU.
    assert [goal["workload"] for goal in compared(device="cuda")["goals"]] == ["ours", "infinity"]


def test_the_table_has_ratio_and_spread_and_marks_a_busy_load() -> None:
    lines = peer_table(compared()).splitlines()
    assert "infinity: infinity-emb 0.0.78" in lines
    (ours, *_), (other, *_) = (list(rows_of(lines, name)) for name in ("ours", "infinity"))
    assert re.fullmatch(r"  ours +50.0 +3,000 +1.0 +2.0 +0.93 +0.92 +0.99 +0.94 +100%", ours)
    assert other.endswith("100% *")
    assert sum(line.startswith("  MISS") for line in lines) == 3


def rows_of(lines: Sequence[str], name: str) -> Iterator[str]:
    return (line for line in lines if line.startswith(f"  {name} "))
