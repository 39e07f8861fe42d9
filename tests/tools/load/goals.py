"""What is to be reached, and whether it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

SHORT = ("16", "32")
SERVICE = ("32", "128", "512", "mixed")
# On a GPU, of the nominal rate of matrix products.
LIMIT = ("16", "32", "128", "512", "images")
LIMIT_SHARE = 0.7
ONE_TEXT_MS = 2.0
# Rounding moves a cosine by some 1e-4; a mistake by far more.
SAME = {"float32": 0.9999, "bfloat16": 0.995, "float16": 0.995}
# Beside a peer, on a CPU: by load the service's ratio to sentence-transformers' own batches in process.
TO_LIBRARY = {"1x1": 0.66, "8x1": 0.8, "64x1": 0.9, "256x1": 0.95, "8x32": 0.97}


@dataclass(frozen=True, slots=True)
class Goal:
    """`value` is to be `bound` or more, or where `at_most` is set no more than that. `rounds` are the values of each round."""

    goal: str
    workload: str
    value: float
    bound: float
    at_most: bool = False
    rounds: Sequence[float] = ()

    @property
    def met(self) -> bool:
        return self.value <= self.bound if self.at_most else self.value >= self.bound


def goals(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Every goal that the measured workloads have a value for."""
    return [{**asdict(goal), "met": goal.met} for goal in _goals(result)]


def peer_goals(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Of a comparison with a peer: the service's speed on a CPU, and that all have computed the same vectors."""
    found: list[Goal] = []
    for name, load in result["loads"].items() if result["device"] == "cpu" else ():
        row = load["rows"]["ours"]
        found.append(Goal("ours / library", name, row["to_library"], TO_LIBRARY[name], rounds=row["to_library_rounds"]))
    for name, cosine in result["cosine"].items():
        found.append(Goal("least cosine with the library's vectors", name, cosine, SAME[result["dtype"]]))
    return [{**asdict(goal), "met": goal.met} for goal in found]


def _goals(result: dict[str, Any]) -> Iterator[Goal]:
    served, found = result["served"], result["workloads"]
    for name, bound in (*((name, 1.5) for name in SHORT), ("mixed", 1.3)):
        if name in found:
            row = found[name]["engines"][served]
            yield Goal(f"in-process, {served} / stock", name, row["to_stock"], bound, rounds=row["to_stock_rounds"])
    for load, bound in (("64x1", 0.85), ("8x32", 0.95)):
        for name in SERVICE:
            if name in found:
                row = found[name]["service"][load]
                label = f"service, {row['callers']} x {row['inputs']} / in-process, {served}"
                yield Goal(label, name, row["to_served"], bound, rounds=row["to_served_rounds"])
    for name in SHORT:
        if name in found:
            one = found[name]["one_text"]
            label = "one caller's p50 less in-process, ms"
            yield Goal(label, name, one["overhead_ms"], 2.0, at_most=True, rounds=one["overhead_rounds"])
    for name, workload in found.items():
        worst = min(workload["cosine"].values())
        yield Goal("least cosine of any engine with the stock model", name, worst, SAME[result["dtype"]])
    if result["nominal_tflops"]:
        for name in LIMIT:
            if name in found:
                share = found[name]["engines"][served]["limit_share_nominal"]
                yield Goal(f"in-process, {served}, share of the nominal limit", name, share, LIMIT_SHARE)
        if "16" in found:
            yield Goal("one text in-process, ms", "16", found["16"]["one_text"]["in_process_ms"], ONE_TEXT_MS, at_most=True)
    beside = result["interactive"]
    label = f"p99 beside {beside['bulk_inputs']:,} inputs / mean batch"
    yield Goal(label, "16", beside["p99_to_batch"], 3.0, at_most=True)
