"""The engines in a process of their own, which runs what it is asked to and is idle between.

`InProcess` is the asking side, and imports no torch. The process measures the device's rate of matrix products first.
"""

from __future__ import annotations

import argparse
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

from tests.tools.load import children, workloads
from tests.tools.load.engines import Input, Ours, Work, engines_on, load_engines
from tests.tools.load.lines import LineProcess, answer_lines

# Inputs of a pass, by device and workload: enough to sort by length and to pack, and a few seconds at most.
INPUTS = {
    "cpu": {"16": 96, "32": 96, "128": 32, "512": 8, "mixed": 64, "images": 4},
    "cuda": {"16": 2048, "32": 1024, "128": 512, "512": 128, "mixed": 512, "images": 64},
}
OTHER_INPUTS = {"cpu": 16, "cuda": 256}
# Square matrices: large enough to keep the device busy, small enough for its memory.
MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}
# The first of them find the clock low.
MATMUL_RUNS = 20
# Inputs of a workload whose vectors are compared: a fast engine that gives other vectors is worth nothing.
COMPARED = 8


class InProcess(LineProcess):
    """The process from outside. `ready` says what the engines run on, once all of them are warmed up."""

    def take(self, workload: str) -> dict[str, Any]:
        """Draw the inputs of a workload, and let every engine run over them once. Their `tokens`, `prefix_tokens`, and by engine
        `cosine`: the least of its vectors with the stock model's."""
        taken: dict[str, Any] = self.ask("take", workload=workload)
        return taken

    def turn(self, engine: str, seconds: float) -> Work:
        """An engine's passes over the inputs for `seconds`, one at the least."""
        return Work(**self.ask("turn", engine=engine, seconds=seconds))

    def one_by_one(self, seconds: float) -> dict[str, float]:
        """The served engine on one input at a time: `median_s` and `count`."""
        times: dict[str, float] = self.ask("one_by_one", seconds=seconds)
        return times


@contextmanager
def in_process(path: Path, device: str, dtype: str) -> Iterator[InProcess]:
    """Start the process; it loads while its starter goes on."""
    arguments = [str(path), "--device", device, "--dtype", dtype]
    with children.child("tests.tools.load.in_process", *arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as popen:
        yield InProcess(popen, "the in-process engines")


class Engines:
    """What the process answers with: a method for each command."""

    def __init__(self, path: Path, device: str, dtype: str) -> None:
        self._path, self._device = path, device
        self._engines, self._dtype = load_engines(path, device, dtype)
        served = self._engines[engines_on(device)[-1].name]
        assert isinstance(served, Ours), "the stock model is not what is served"
        self._served = served
        self._inputs: Sequence[Input] = ()

    def describe(self) -> dict[str, Any]:
        """Device, dtype, and the measured rate of matrix products."""
        import torch

        kind = torch.device(self._device).type
        name = torch.cuda.get_device_name(self._device) if kind == "cuda" else "cpu"
        size = MATMUL_SIZE[kind]
        tflops = matmul_tflops(self._device, self._dtype, size)
        threads = torch.get_num_threads()
        return {"device": name, "dtype": self._dtype, "matmul_size": size, "matmul_tflops": tflops, "threads": threads}

    def take(self, workload: str) -> dict[str, Any]:
        kind = self._device.partition(":")[0]
        count = INPUTS[kind].get(workload, OTHER_INPUTS[kind])
        self._inputs = workloads.images(count) if workload == "images" else workloads.texts(self._path, workload, count)
        prepared = [self._served.prepare(one) for one in self._inputs]
        for engine in self._engines.values():
            engine.run(self._inputs, Work())
        few = self._inputs[:COMPARED]
        stock = self._engines["stock"].vectors(few)
        return {
            "tokens": [item.num_tokens for item in prepared],
            "prefix_tokens": prepared[0].prefix_tokens,
            "cosine": {name: float((each.vectors(few) * stock).sum(1).min()) for name, each in self._engines.items()},
        }

    def turn(self, engine: str, seconds: float) -> dict[str, Any]:
        work, started, spent = Work(), time.perf_counter(), time.process_time()
        while work.seconds < seconds or not work.vectors:
            self._engines[engine].run(self._inputs, work)
            work.seconds = time.perf_counter() - started
        work.cpu_seconds = time.process_time() - spent
        return asdict(work)

    def one_by_one(self, seconds: float) -> dict[str, Any]:
        times: list[float] = []
        inputs = cycle(self._inputs)
        while sum(times) < seconds or len(times) < 3:
            started = time.perf_counter()
            self._served.run([next(inputs)], Work())
            times.append(time.perf_counter() - started)
        return {"median_s": median(times), "count": len(times)}


def matmul_tflops(device: str, dtype: str, size: int) -> float:
    """The fastest of some products of two square matrices, in 1e12 operations per second."""
    import torch

    left, right = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    fastest = float("inf")
    with torch.inference_mode():
        for _ in range(MATMUL_RUNS):
            _synchronize(device)
            started = time.perf_counter()
            left @ right
            _synchronize(device)
            fastest = min(fastest, time.perf_counter() - started)
    return 2 * size**3 / fastest / 1e12


def _synchronize(device: str) -> None:
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args()

    def make() -> tuple[dict[str, Any], dict[str, Callable[..., dict[str, Any]]]]:
        engines = Engines(options.checkpoint, options.device, options.dtype)
        return engines.describe(), {"take": engines.take, "turn": engines.turn, "one_by_one": engines.one_by_one}

    answer_lines(make)


if __name__ == "__main__":
    from app.process import tame_threads

    tame_threads()
    main()
