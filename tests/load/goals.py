"""What is to be reached, and whether it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

SHORT = ("16", "32")
SERVICE = ("32", "128", "512", "mixed")


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
    beside = result["interactive"]
    label = f"p99 beside {beside['bulk_inputs']:,} inputs / mean batch"
    yield Goal(label, "16", beside["p99_to_batch"], 3.0, at_most=True)
