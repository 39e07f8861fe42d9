"""make bench: the stock forward, our engines step by step, and the service under load, side by side on this machine.

    python -m tests.tools.load.bench [--shape bench-40m | --checkpoint PATH] [--device cpu|cuda] [--workloads 16,mixed,images]
                        [--seconds 10] [--budget-s 480] [--json FILE]
    python -m tests.tools.load.bench --peer infinity|library [--checkpoint PATH] [--loads 1x1,8x32]
                        [--seconds 4] [--budget-s 840] [--json FILE]

With --peer: the service and another server on one text model, as ratios to the library's own batches (tests/tools/load/peer.py).

Prints a table, the goals with what was reached, and as its last line everything as JSON. Not 0 where a child ends or a reply is
no 200; a goal that is missed is a result, and no failure.

On a CPU engines and service have one core and the load another; on CUDA nothing is pinned. While one is measured the other is
idle.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import orjson

from tests.support.paths import ROOT
from tests.tools.load import peer
from tests.tools.load.callers import LoadFailed
from tests.tools.load.children import ChildFailed, Cores, on_cores
from tests.tools.load.goals import goals
from tests.tools.load.in_process import in_process
from tests.tools.load.infinity import PYTHON
from tests.tools.load.limits import Towers, nominal_tflops
from tests.tools.load.measure import LOADS, ROUNDS, Bench, Load, seconds_that_fit
from tests.tools.load.peer_report import peer_table
from tests.tools.load.report import table
from tests.tools.load.service import service
from tests.tools.load.workloads import SHORTEST, WORKLOADS

SHAPE = {"cpu": "bench-40m", "cuda": "2b"}
SECONDS = 10.0
# Of everything, loading included: a session on a lent GPU is ten minutes, a CPU is slow.
BUDGET_S = {"cpu": 840.0, "cuda": 480.0}


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    started = time.monotonic()
    compare, show = (peer.run, peer_table) if options.peer else (run, table)
    try:
        result = compare(options, started)
    except (ChildFailed, LoadFailed, OSError, subprocess.CalledProcessError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    line = orjson.dumps(result).decode()
    if options.json:
        options.json.write_text(line + "\n")
    print(show(result))
    print(line)
    return 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """`device` is resolved, `checkpoint` set."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.tools.load.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shape", help="sizes of models.checkpoints.demo (default: 2b on CUDA, else bench-40m); written once into models/"
    )
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint that is there, in place of a shape")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto: a GPU if there is one")
    parser.add_argument("--dtype", default="auto", help="as the service's DTYPE, for all engines")
    parser.add_argument("--workloads", type=workload_list, default=WORKLOADS, help="numbers of content tokens, mixed, images")
    parser.add_argument(
        "--seconds", type=float, help=f"for a service window, at most (default: {SECONDS:g}; {peer.SECONDS:g} with a peer)"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        choices=range(1, 100),
        metavar="N",
        help=f"of all that is compared in turn, at most (default: {ROUNDS}; {peer.ROUNDS} with a peer)",
    )
    parser.add_argument(
        "--budget-s", type=float, help="for everything: windows are shortened to fit in; with a peer, rounds left out"
    )
    parser.add_argument("--json", type=Path, help="write the JSON line to a file too")
    parser.add_argument("--peer", choices=peer.PEERS, help="compare with infinity-emb, or with its library alone")
    parser.add_argument(
        "--peer-python", type=Path, default=PYTHON, help="of infinity-emb's environment (default: .venv-infinity's)"
    )
    parser.add_argument("--loads", type=load_list, default=LOADS, help="with a peer: callers x inputs (default: 1x1 to 8x32)")
    parser.add_argument(
        "--texts",
        type=int,
        default=peer.TEXTS,
        help="with a peer: fewer are for a look, and slow the library (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    for name, value in (("seconds", SECONDS), ("rounds", ROUNDS)):
        if getattr(options, name) is None:
            setattr(options, name, getattr(peer, name.upper()) if options.peer else value)
    if options.device == "auto":
        from models.devices import resolve_device

        options.device = resolve_device("auto")
    if options.peer:
        if options.texts < (most := max(load.total for load in options.loads)):
            parser.error(f"--texts {options.texts} are too few: {most} are under way at once")
        options.budget_s = options.budget_s or peer.BUDGET_S
        return options
    kind = options.device.partition(":")[0]
    options.budget_s = options.budget_s or BUDGET_S[kind]
    options.shape = options.shape or SHAPE[kind]
    options.write = not options.checkpoint
    options.checkpoint = options.checkpoint or ROOT / "models" / f"bench-{options.shape.removeprefix('bench-')}"
    return options


def workload_list(text: str) -> list[str]:
    """Comma-separated. Raises ArgumentTypeError."""
    names = text.split(",")
    for name in names:
        if name not in WORKLOADS and not (name.isdecimal() and int(name) >= SHORTEST):
            raise argparse.ArgumentTypeError(f"{name!r} is none of a number from {SHORTEST}, mixed, images")
    return names


def load_list(text: str) -> list[Load]:
    """Comma-separated, as 8x32. Raises ArgumentTypeError."""
    loads = {load.name: load for load in LOADS}
    if unknown := set(text.split(",")) - set(loads):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: loads are {', '.join(loads)}")
    return [loads[name] for name in text.split(",")]


def run(options: argparse.Namespace, started: float) -> dict[str, Any]:
    """Everything that is printed. Raises ChildFailed, LoadFailed, OSError, CalledProcessError."""
    path, on_cpu = options.checkpoint, options.device == "cpu"
    if options.write:
        # Its own words go where progress goes: standard output is the table's.
        command = [sys.executable, "-m", "models.checkpoints.demo", str(path), "--shape", options.shape]
        subprocess.run(command, cwd=ROOT, stdout=sys.stderr, check=True)
    cores = Cores.first() if on_cpu else None
    with ExitStack() as stack:
        stack.enter_context(on_cores({cores.load} if cores else None))
        with on_cores({cores.model} if cores else None):
            engines = stack.enter_context(in_process(path, options.device, options.dtype))
            # Each measures rates in its warm-up, and goes by them ever after: not at the same time.
            engines.wait()
            running = stack.enter_context(service(path, options.device, options.dtype))
        running.wait()
        bench = Bench(engines, running, path, options.device, options.rounds)
        result = {
            "checkpoint": path.name,
            **engines.ready,
            "nominal_tflops": nominal_tflops(engines.ready["device"]),
            "cores": {"model": cores.model, "load": cores.load} if cores else None,
            "served": bench.served,
            "rounds": bench.rounds,
            "workloads": measure_all(bench, options, started),
        }
        result["interactive"] = bench.interactive(bench.seconds * 4)
    result["elapsed_s"] = time.monotonic() - started
    add_limits(result, Towers.read(path))
    result["goals"] = goals(result)
    return result


def measure_all(bench: Bench, options: argparse.Namespace, started: float) -> dict[str, Any]:
    """Every workload, its windows as long as the rest of the budget allows."""
    found: dict[str, Any] = {}
    for done, name in enumerate(options.workloads):
        left = options.budget_s - (time.monotonic() - started)
        bench.seconds = min(
            options.seconds, seconds_that_fit(left, len(options.workloads) - done, options.device, options.rounds)
        )
        print(f"{time.monotonic() - started:5.0f} s: {name}, windows of {bench.seconds:.1f} s", file=sys.stderr, flush=True)
        found[name] = bench.workload(name)
    return found


def add_limits(result: dict[str, Any], towers: Towers) -> None:
    """To every workload its physical limit in vectors per second, and to its rows their share of it.

    Against the rate of matrix products measured in the run, and against the nominal one where the device has one. The share is of
    all operations that the stock forward makes for an input, whether an engine needs to make them or not.
    """
    peaks = {"measured": result["matmul_tflops"], "nominal": result["nominal_tflops"]}
    for workload in result["workloads"].values():
        prefix, side = workload["prefix_tokens"], workload["image_side"]
        lengths = workload.pop("token_counts")
        flop = sum(towers.flop(tokens, side) for tokens in lengths) / len(lengths)
        saved = sum(towers.flop(tokens, side, prefix, trimmed=True) for tokens in lengths) / len(lengths)
        workload["flop_per_vector"], workload["flop_per_vector_saved"] = flop, saved
        for name, tflops in peaks.items():
            if tflops is None:
                continue
            workload[f"limit_{name}"] = tflops * 1e12 / flop
            workload[f"limit_{name}_saved"] = tflops * 1e12 / saved
            for row in (*workload["engines"].values(), *workload["service"].values()):
                row[f"limit_share_{name}"] = row["vectors_per_s"] / workload[f"limit_{name}"]


def command(arguments: Sequence[str] | None = None) -> int:
    """`main` in a process of its own."""
    # As an interrupt does, so that no child outlives its parent.
    signal.signal(signal.SIGTERM, _terminated)
    return main(arguments)


def _terminated(*_: object) -> None:
    raise SystemExit(128 + signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(command())
