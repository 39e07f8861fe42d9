"""make bench: a real run on a tiny checkpoint, what makes one fail, and the limits that it counts."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from models.checkpoints.demo import SHAPE_2B, TINY, _config, _tokenizer, write_demo_checkpoint
from tests.support.hosts import process
from tests.support.paths import ROOT
from tests.tools.load import bench, in_process, service, workloads
from tests.tools.load.callers import LoadFailed, Reply, Server, Tally, load
from tests.tools.load.children import ChildFailed, child, end, on_cores
from tests.tools.load.engines import ENGINES, Engine, Work, engines_on
from tests.tools.load.goals import Goal, goals
from tests.tools.load.limits import TextTower, Towers, nominal_tflops
from tests.tools.load.measure import LOADS, Load, one_text, row, seconds_that_fit

pytestmark = pytest.mark.tools


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "tiny"
    write_demo_checkpoint(path, shape=TINY)
    return path


# A real run


@pytest.fixture(scope="module")
def printed(tiny: Path) -> list[str]:
    """What a short run prints, as a person starts it."""
    command = [sys.executable, "-m", "tests.tools.load.bench", "--checkpoint", str(tiny), "--device", "cpu"]
    run = subprocess.run(
        [*command, "--rounds", "2", "--seconds", "0.2", "--workloads", "16,images"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


@pytest.fixture(scope="module")
def result(printed: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(printed[-1])
    return found


def figures(value: Any, place: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a result, with where it stands."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from figures(part, f"{place}.{key}")
    elif isinstance(value, list):
        for part in value:
            yield from figures(part, place)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield place, value


def rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    found = result["workloads"].values()
    return [line for workload in found for kind in ("engines", "service") for line in workload[kind].values()]


def test_every_engine_and_every_load_has_its_row(result: dict[str, Any]) -> None:
    assert list(result["workloads"]) == ["16", "images"]
    for workload in result["workloads"].values():
        assert list(workload["engines"]) == [engine.name for engine in engines_on("cpu")]
        assert workload["cosine"].keys() == workload["engines"].keys()
        assert min(workload["cosine"].values()) > 0.9999
        assert list(workload["service"]) == ["1x1", "8x1", "64x1", "256x1", "8x32"]
    assert result["served"] == ENGINES[-1].name
    assert result["checkpoint"] == "tiny"
    assert (result["dtype"], result["nominal_tflops"], result["threads"]) == ("float32", None, 1)


def test_every_figure_is_one(result: dict[str, Any]) -> None:
    found = list(figures(result))
    assert len(found) > 150
    # A core may be number 0, a run too short to differ, and one text faster through the service by chance.
    free = ("core_share", "spread", "overhead_ms", "overhead_rounds", "cores", "image_side", "goals", "busy", "generator_share")
    for place, value in found:
        assert math.isfinite(value), place
        assert value > 0 or any(word in place for word in free), place


def test_ratios_are_the_quotients_of_what_is_printed_beside_them(result: dict[str, Any]) -> None:
    for workload in result["workloads"].values():
        stock, served = (workload["engines"][name]["tokens_per_s"] for name in ("stock", result["served"]))
        for line in (*workload["engines"].values(), *workload["service"].values()):
            assert line["to_stock"] == pytest.approx(line["tokens_per_s"] / stock)
            assert line["to_served"] == pytest.approx(line["tokens_per_s"] / served)
            assert line["limit_share_measured"] == pytest.approx(line["vectors_per_s"] / workload["limit_measured"])
        one = workload["one_text"]
        assert one["overhead_ms"] == pytest.approx(one["service_p50_ms"] - one["in_process_ms"])
    beside = result["interactive"]
    assert beside["p99_to_batch"] == pytest.approx(beside["p99_ms"] / beside["batch_ms"])


def test_service_and_engines_read_the_same(result: dict[str, Any]) -> None:
    """As many tokens a vector in every row: template and image sizes are the same for the stock model, ours and the service."""
    for name, workload in result["workloads"].items():
        tokens = workload["tokens_per_vector"]
        assert tokens == pytest.approx(289 if name == "images" else 47, abs=1)
        for line in (*workload["engines"].values(), *workload["service"].values()):
            assert line["tokens_per_s"] / line["vectors_per_s"] == pytest.approx(tokens, rel=0.02)


def test_one_core_is_what_they_have(result: dict[str, Any]) -> None:
    if result["cores"]["model"] != result["cores"]["load"]:
        assert all(line["core_share"] < 1.1 for line in rows(result))
    # Of a core that they share with whatever else is running.
    assert max(line["core_share"] for line in rows(result)) > 0.05


def test_percentiles_are_in_order(result: dict[str, Any]) -> None:
    waited = [line for line in (*rows(result), result["interactive"]) if "p50_ms" in line]
    assert len(waited) == 2 * len(LOADS) + 1
    assert all(line["p50_ms"] <= line["p99_ms"] for line in waited)


def test_the_table_tells_the_same(printed: list[str], result: dict[str, Any]) -> None:
    text = "\n".join(printed[:-1])
    for line in rows(result):
        assert f"{line['vectors_per_s']:,.1f}" in text
    judged = [line.split()[0] for line in printed if line.startswith(("  pass", "  MISS"))]
    assert judged == ["pass" if goal["met"] else "MISS" for goal in result["goals"]]
    assert {goal["workload"] for goal in result["goals"]} == {"16", "images"}


def test_nothing_runs_on(printed: list[str], tiny: Path) -> None:
    names = [path.read_bytes().decode(errors="replace") for path in Path("/proc").glob("[0-9]*/cmdline") if readable(path)]
    assert not [name for name in names if str(tiny) in name]


def readable(path: Path) -> bool:
    try:
        path.read_bytes()
    except OSError:
        return False
    return True


# What makes it fail


class StillEngines:
    """In place of the engines' process: rates without work."""

    def __init__(self) -> None:
        self.ready = {"device": "cpu", "dtype": "float32", "matmul_size": 8, "matmul_tflops": 1.0, "threads": 1}

    def wait(self) -> None: ...

    def take(self, workload: str) -> dict[str, Any]:
        return {"tokens": [20], "prefix_tokens": 4, "cosine": {"stock": 1.0}}

    def turn(self, engine: str, seconds: float) -> Work:
        return Work(vectors=1000, tokens=20_000, seconds=1.0, model_seconds=0.5, cpu_seconds=0.9)

    def one_by_one(self, seconds: float) -> dict[str, float]:
        return {"median_s": 0.001, "count": 3}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tiny: Path) -> list[str]:
    """Arguments of a run with no engines, against the service of the fake model."""

    @contextmanager
    def engines(*_: object) -> Iterator[StillEngines]:
        yield StillEngines()

    monkeypatch.setattr(bench, "in_process", engines)
    monkeypatch.setattr(service, "MODULE", "tests.support.fakes")
    monkeypatch.setattr(service, "SETTLE_S", 0.0)
    return ["--checkpoint", str(tiny), "--device", "cpu", "--workloads", "16", "--seconds", "0.2", "--rounds", "1"]


def test_a_run_that_goes_well_is_a_success(quick: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    cores = os.sched_getaffinity(0)
    assert bench.main([*quick, "--json", str(tmp_path / "line")]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert json.loads((tmp_path / "line").read_text()) == json.loads(last)
    assert os.sched_getaffinity(0) == cores


def test_a_reply_that_is_no_200_is_a_failure(
    quick: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(service.MEASURED, "MAX_INPUT_TOKENS", "8")
    assert bench.main(quick) == 1
    printed = capsys.readouterr()
    assert "the server replied with 400" in printed.err
    assert not printed.out


def test_a_service_that_cannot_start_is_a_failure(
    quick: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(service.MEASURED, "MAX_QUEUE_SIZE", "none at all")
    assert bench.main(quick) == 1
    assert "MAX_QUEUE_SIZE" in capsys.readouterr().err


def test_a_child_that_ends_is_a_failure(tmp_path: Path) -> None:
    with in_process.in_process(tmp_path / "nowhere", "cpu", "auto") as engines, pytest.raises(ChildFailed, match="ended with 1"):
        engines.wait()


def test_a_server_that_dies_under_load_is_a_failure() -> None:
    with process(FAKE_SECONDS_PER_BATCH="0.05") as running:
        running.until_status("ok")
        server = Server(running.port(), "sk-test")

        async def die() -> None:
            await asyncio.sleep(0.3)
            running.popen.kill()

        async def both() -> None:
            requests = [itertools.cycle([server.request(["hello"])])]
            await asyncio.gather(load(server, requests, seconds=60), die())

        with pytest.raises(LoadFailed, match="the server is gone"):
            asyncio.run(both())


def test_a_child_that_does_not_heed_is_killed() -> None:
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    popen = subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE, text=True)
    assert popen.stdout and popen.stdout.readline() == "deaf\n"
    end(popen, grace=0.2)
    assert popen.returncode == -9


def test_a_child_ends_with_what_went_wrong_beside_it() -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        child("http.server", "0", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as popen,
    ):
        raise KeyboardInterrupt
    assert popen.returncode is not None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_moment_of_a_start_leaves_no_child(number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes when the child is there, and its id not yet with anyone who would end it."""
    started: list[subprocess.Popen[str]] = []

    class Interrupted(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            started.append(self)
            signal.raise_signal(number)

    def interrupt(*_: object) -> None:
        raise InterruptedError

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    before = signal.signal(number, interrupt)
    try:
        with pytest.raises(InterruptedError), child("http.server", "0", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
            pytest.fail("the signal was lost")
        assert signal.getsignal(number) is interrupt
    finally:
        signal.signal(number, before)
    assert started[0].returncode is not None


def test_no_other_host_is_loaded() -> None:
    with pytest.raises(ValueError, match="only a loopback"):
        Server(80, "key", host="192.0.2.1")


def test_a_workload_without_distinct_texts_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.parse_arguments(["--device", "cpu", "--workloads", "16,4"])
    assert "'4' is none of" in capsys.readouterr().err


# The parts


def test_a_child_has_the_core_that_it_was_started_on() -> None:
    before = os.sched_getaffinity(0)
    core = max(before)
    with on_cores({core}):
        seen = subprocess.check_output([sys.executable, "-c", "import os; print(os.sched_getaffinity(0))"], text=True)
    assert seen.strip() == str({core})
    assert os.sched_getaffinity(0) == before


def test_a_window_is_of_whole_clumps() -> None:
    """Ten callers answered at once, every second: whenever the clock is looked at, ten a second."""
    replies = [Reply(caller, at - 1, at, 1, 7) for at in range(1, 9) for caller in range(10)]
    for since, until in ((1.0, 5.0), (1.3, 1.6), (1.9, 4.1), (2.5, 6.25)):
        window = Tally(since, until, replies=replies).window()
        assert window.vectors_per_s == pytest.approx(10)
        assert window.tokens_per_s == pytest.approx(70)


def test_a_clump_that_is_spread_is_no_more_than_it_is() -> None:
    """Wherever the window begins, within the spread of a clump or not."""
    replies = [Reply(caller, at + caller / 50 - 1, at + caller / 50, 1, 1) for at in range(1, 9) for caller in range(10)]
    for since in (2.0, 2.05, 2.11, 2.5):
        assert Tally(since, since + 3.3, replies=replies).window().vectors_per_s == pytest.approx(10)


def test_a_window_without_replies_is_none() -> None:
    with pytest.raises(LoadFailed, match="no reply was counted"):
        Tally(2.0, 3.0, replies=[Reply(0, 0.0, 1.0, 1, 1)]).window()


def test_percentiles_are_of_the_replies_that_count() -> None:
    window = Tally(0.0, 1000.0, replies=[Reply(0, at - at / 1000, at, 1, 1) for at in range(-50, 101)]).window()
    assert window.percentile_ms(0.5) == pytest.approx(51)
    assert window.percentile_ms(0.99) == pytest.approx(100)


def test_a_load_lasts_until_all_that_the_window_saw_is_answered() -> None:
    with process(FAKE_SECONDS_PER_BATCH="0.05") as running:
        running.until_status("ok")
        server = Server(running.port(), "sk-test")
        callers = [itertools.cycle([server.request([f"{number} {place}"]) for place in range(2)]) for number in range(3)]
        tally = asyncio.run(load(server, callers, seconds=0.3, ramp=0.1))
    assert tally.answered() == 3
    assert tally.statuses == {200: len(tally.replies)}
    window = tally.window()
    assert window.until - window.since == pytest.approx(0.3)
    assert {reply.vectors for reply in window.replies} == {1}
    # Each caller has one request under way all the time: of those that end in the window a part may be before it, and of one
    # more a part in it.
    ended = sum(window.since < reply.at <= window.until for reply in window.replies)
    assert abs(window.vectors_per_s * (window.until - window.since) - ended) < len(callers)


@pytest.mark.parametrize(
    ("wanted", "most", "got"),
    [
        (Load(256, 1), 300, Load(256, 1)),
        (Load(256, 1), 130, Load(128, 1)),
        (Load(8, 32), 100, Load(8, 8)),
        (Load(8, 32), 5, Load(4, 1)),
        (Load(8, 32), 0.1, Load(1, 1)),
        (Load(1, 1), 0.1, Load(1, 1)),
    ],
)
def test_a_load_that_takes_too_long_is_halved(wanted: Load, most: float, got: Load) -> None:
    assert wanted.fitted(most) == got


def test_windows_shrink_with_the_time_that_is_left() -> None:
    assert seconds_that_fit(540, 6, "cuda", 3) < seconds_that_fit(540, 3, "cuda", 3) < seconds_that_fit(540, 3, "cuda", 2)
    assert seconds_that_fit(0, 6, "cpu", 3) == pytest.approx(0.2)


def test_the_fastest_round_counts_and_the_others_are_told() -> None:
    stock, served = ([{"tokens_per_s": rate} for rate in rates] for rates in ((100.0, 80.0), (150.0, 200.0)))
    line = row(served, stock, served)
    assert (line["tokens_per_s"], line["to_stock"], line["to_served"], line["spread"]) == (200, 2.0, 1.0, 0.25)
    assert line["to_stock_rounds"] == [1.5, 2.5]
    one = one_text([10.0, 12.0], [{"p50_ms": 15.0}, {"p50_ms": 13.0}])
    assert (one["overhead_ms"], one["overhead_rounds"]) == (3.0, [5.0, 1.0])


def test_what_is_served_is_the_last_engine_of_a_device() -> None:
    assert [engine.name for engine in engines_on("cpu")] == [engine.name for engine in ENGINES if not engine.cuda_only]
    assert engines_on("cuda:1") == ENGINES
    # What the service runs where no setting says otherwise.
    assert engines_on("cpu")[-1] == engines_on("cuda")[-1] == Engine("prefix")


def test_a_goal_knows_its_direction() -> None:
    assert Goal("", "", 1.5, 1.5).met and not Goal("", "", 1.4, 1.5).met
    assert Goal("", "", 2.0, 2.0, at_most=True).met and not Goal("", "", 2.1, 2.0, at_most=True).met


@pytest.mark.parametrize("tflops", [None, 790.0])
def test_every_goal_has_its_workloads(tflops: float | None) -> None:
    ratio: dict[str, Any] = {
        "to_stock": 1.6,
        "to_stock_rounds": [],
        "to_served": 0.9,
        "to_served_rounds": [],
        "callers": 1,
        "inputs": 1,
    }
    workload = {
        "engines": {"prefix": ratio},
        "service": {load.name: ratio for load in LOADS},
        "one_text": {"overhead_ms": 1.0, "overhead_rounds": [], "in_process_ms": 2.5},
        "cosine": {"stock": 1.0, "prefix": 0.998},
    }
    if tflops:
        ratio["limit_share_nominal"] = 0.72
    result = {
        "served": "prefix",
        "dtype": "bfloat16" if tflops else "float32",
        "nominal_tflops": tflops,
        "workloads": dict.fromkeys(workloads.WORKLOADS, workload),
        "interactive": {"bulk_inputs": 2000, "p99_to_batch": 2.5},
    }
    judged = [(goal["workload"], goal["bound"], goal["met"]) for goal in goals(result)]
    assert judged == [
        ("16", 1.5, True), ("32", 1.5, True), ("mixed", 1.3, True),
        ("32", 0.85, True), ("128", 0.85, True), ("512", 0.85, True), ("mixed", 0.85, True),
        ("32", 0.95, False), ("128", 0.95, False), ("512", 0.95, False), ("mixed", 0.95, False),
        ("16", 2.0, True), ("32", 2.0, True),
        *((name, 0.995 if tflops else 0.9999, bool(tflops)) for name in workloads.WORKLOADS),
        *([(name, 0.7, True) for name in ("16", "32", "128", "512", "images")] if tflops else []),
        *([("16", 2.0, False)] if tflops else []),
        ("16", 3.0, True),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["16", "mixed"])
def test_no_text_is_drawn_twice(tiny: Path, name: str) -> None:
    texts = workloads.texts(tiny, name, 600)
    assert len(set(texts)) == 600
    assert texts == workloads.texts(tiny, name, 600)


def test_a_mix_is_the_same_in_any_number() -> None:
    few, many = (workloads.mixed_lengths(count) for count in (64, 2048))
    assert sum(few) / 64 == pytest.approx(sum(many) / 2048, rel=0.05)
    assert sorted(many)[1024] == pytest.approx(40, abs=1)
    assert sum(length > 320 for length in many) / 2048 == pytest.approx(0.01, abs=0.005)


def test_no_image_is_drawn_twice() -> None:
    files = workloads.images(3)
    assert len(set(files)) == 3 and all(file.startswith(b"\xff\xd8") for file in files)


# The limits, as counted by hand for Qwen3-VL-Embedding-2B


@pytest.fixture(scope="module")
def two_b() -> Towers:
    return Towers.of(_config(_tokenizer(TINY), SHAPE_2B).to_dict())


def test_the_2b_models_text_tower(two_b: Towers) -> None:
    assert two_b.text.parameters == pytest.approx(1.409e9, rel=1e-3)
    assert two_b.text.flop_per_token == pytest.approx(2.82e9, rel=1e-3)
    assert two_b.text.kv_bytes_per_token() == 112 << 10


@pytest.mark.parametrize(
    ("tokens", "per_second", "saved"),
    [(35, 7997, 13748), (51, 5484, 7803), (147, 1895, 2164), (531, 517, 548)],
)
def test_the_2b_models_texts_per_second(two_b: Towers, tokens: int, per_second: float, saved: float) -> None:
    assert 790e12 / two_b.flop(tokens) == pytest.approx(per_second, rel=1e-3)
    assert 790e12 / two_b.flop(tokens, prefix=14, trimmed=True) == pytest.approx(saved, rel=1e-3)


def test_the_2b_models_images(two_b: Towers) -> None:
    assert two_b.vision.flop(512, 512) == pytest.approx(776e9, rel=1e-3)
    assert two_b.flop(277, 512) == pytest.approx(1566e9, rel=1e-3)
    assert 790e12 / two_b.flop(277, 512) == pytest.approx(504, rel=2e-3)


def test_a_prefix_and_what_follows_it_are_the_whole() -> None:
    text = TextTower(layers=3, hidden=64, intermediate=96, heads=4, kv_heads=2, head_dim=32)
    assert text.flop(50, prefix=20) + text.flop(20) == text.flop(50)
    assert text.flop(1, trimmed=True) == text.flop(1)
    assert text.flop(50, trimmed=True) < text.flop(50)


def test_a_checkpoints_config_is_read(tiny: Path) -> None:
    assert Towers.read(tiny) == Towers.of(json.loads((tiny / "config.json").read_text()))
    assert Towers.read(tiny).text.layers == TINY.layers


def test_only_known_devices_have_a_nominal_rate() -> None:
    assert nominal_tflops("NVIDIA H100 80GB HBM3") == nominal_tflops("NVIDIA H200") == 790
    assert nominal_tflops("cpu") is None


def test_bench_options(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.tools.load.bench"]
    shown = subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "usage: python -m tests.tools.load.bench" in shown and "--budget-s" in shown and "--peer" in shown
    refused = subprocess.run([*command, "--rounds", "none"], cwd=ROOT, capture_output=True, text=True)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "--rounds" in refused.stderr


def test_bench_that_is_terminated_ends_what_it_started(tmp_path: Path) -> None:
    write_demo_checkpoint(tmp_path / "checkpoint")
    command = [sys.executable, "-m", "tests.tools.load.bench", "--checkpoint", str(tmp_path / "checkpoint"), "--device", "cpu"]
    popen = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while not (children := children_of(popen.pid)) and time.monotonic() < until:
            time.sleep(0.1)
        (started,) = children
        popen.terminate()
        assert popen.wait(60) == 128 + 15
        assert not Path(f"/proc/{started}").exists()
    finally:
        popen.kill()
        popen.wait()


def children_of(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in found.split()]
