"""make bench: the stock forward, our engines step by step, and the service under load, side by side on this machine.

    python -m tests.load.bench [--shape bench-40m | --checkpoint PATH] [--device cpu|cuda] [--workloads 16,mixed,images]
                               [--seconds 10] [--budget-s 480] [--json FILE]

Prints a table, the goals with what was reached, and as its last line everything as JSON. Not 0 where a child ends or a reply is
no 200; a goal that is missed is a result, and no failure.

On a CPU engines and service have one core and the load another; on CUDA nothing is pinned. While one is measured the other is
idle.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from tests.load.callers import LoadFailed
from tests.load.children import ChildFailed, on_cores
from tests.load.goals import goals
from tests.load.in_process import in_process
from tests.load.limits import Towers, nominal_tflops
from tests.load.measure import ROUNDS, Bench, seconds_that_fit
from tests.load.report import table
from tests.load.service import ROOT, service
from tests.load.workloads import SHORTEST, WORKLOADS

SHAPE = {"cpu": "bench-40m", "cuda": "2b"}
# Of everything, loading included: a session on a lent GPU is ten minutes, a CPU is slow.
BUDGET_S = {"cpu": 840.0, "cuda": 480.0}


@dataclass(frozen=True, slots=True)
class Cores:
    """The core of engines and service, and that of the load; they are one where there is but one."""

    model: int
    load: int

    @classmethod
    def first(cls) -> Cores:
        """The first two that this process may use."""
        allowed = sorted(os.sched_getaffinity(0))
        return cls(allowed[0], allowed[min(1, len(allowed) - 1)])


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    started = time.monotonic()
    try:
        result = run(options, started)
    except (ChildFailed, LoadFailed, OSError, subprocess.CalledProcessError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    line = orjson.dumps(result).decode()
    if options.json:
        options.json.write_text(line + "\n")
    print(table(result))
    print(line)
    return 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """`device` is resolved, `checkpoint` set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", help="sizes of models.demo (default: 2b on CUDA, else bench-40m); written once into models/")
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint that is there, in place of a shape")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto: a GPU if there is one")
    parser.add_argument("--dtype", default="auto", help="as the service's DTYPE, for all engines")
    parser.add_argument("--workloads", type=workload_list, default=WORKLOADS, help="numbers of content tokens, mixed, images")
    parser.add_argument("--seconds", type=float, default=10.0, help="for a service window, at most (default: %(default)s)")
    parser.add_argument(
        "--rounds",
        type=int,
        default=ROUNDS,
        choices=range(1, 10),
        metavar="N",
        help="of engines and service in turn (default: %(default)s)",
    )
    parser.add_argument("--budget-s", type=float, help="for everything: windows are shortened to fit in")
    parser.add_argument("--json", type=Path, help="write the JSON line to a file too")
    options = parser.parse_args(arguments)
    if options.device == "auto":
        from models.devices import resolve_device

        options.device = resolve_device("auto")
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


def run(options: argparse.Namespace, started: float) -> dict[str, Any]:
    """Everything that is printed. Raises ChildFailed, LoadFailed, OSError, CalledProcessError."""
    path, on_cpu = options.checkpoint, options.device == "cpu"
    if options.write:
        # Its own words go where progress goes: standard output is the table's.
        command = [sys.executable, "-m", "models.demo", str(path), "--shape", options.shape]
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


def _terminated(*_: object) -> None:
    raise SystemExit(128 + signal.SIGTERM)


if __name__ == "__main__":
    # As an interrupt does, so that no child outlives its parent.
    signal.signal(signal.SIGTERM, _terminated)
    sys.exit(main())
