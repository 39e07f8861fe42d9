"""What was measured, as text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

# Of a core: beyond it the load is bound by those who make it.
GENERATOR_BOUND = 0.9

HEAD = (
    f"{'':<29}{'vectors/s':>11}{'tokens/s':>11}{'p50 ms':>10}{'p99 ms':>10}{'/ stock':>9}{'/ served':>9}"
    f"{'spread':>8}{'model':>7}{'core':>7}{'limit':>7}"
)


def table(result: dict[str, Any]) -> str:
    """All lines but the JSON."""
    lines = [*_machine(result), "", HEAD]
    for name, workload in result["workloads"].items():
        lines += ["", *_workload(name, workload, result["served"])]
    lines += ["", *_interactive(result["interactive"]), "", *goal_lines(result["goals"]), "", *_legend(result)]
    return "\n".join(lines)


def _machine(result: dict[str, Any]) -> Iterator[str]:
    peak = (
        f"matrix products measured at {result['matmul_tflops']:.3g} TFLOP/s ({result['matmul_size']} x {result['matmul_size']})"
    )
    if result["nominal_tflops"]:
        peak += f", nominally {result['nominal_tflops']:.0f}"
    yield f"{result['checkpoint']} on {result['device']} in {result['dtype']}; {peak}; {result['elapsed_s']:.0f} s in all"
    if cores := result["cores"]:
        shared = "; there is but ONE core, which the load shares" if cores["model"] == cores["load"] else ""
        yield f"engines and service on core {cores['model']} alone, the load on core {cores['load']}{shared}"


def _workload(name: str, workload: dict[str, Any], served: str) -> Iterator[str]:
    what = {"mixed": "mixed texts", "images": "images of 512 x 512, as JPEG"}.get(name, f"{name} content tokens")
    limit = f"{workload['limit_measured']:,.0f}"
    if "limit_nominal" in workload:
        limit += (
            f" (nominal {workload['limit_nominal']:,.0f}, {workload['limit_nominal_saved']:,.0f} with what need not be computed)"
        )
    yield f"{what}: {workload['tokens_per_vector']:.0f} tokens a vector, at most {limit} vectors/s"
    for engine, row in workload["engines"].items():
        yield _row(f"{engine}, in-process", row)
    one = workload["one_text"]
    yield f"  {f'{served}, one by one':<27}{1000 / one['in_process_ms']:>11,.1f}{'':>11}{one['in_process_ms']:>10,.1f}"
    for label, row in workload["service"].items():
        load = f"{row['callers']}x{row['inputs']}"
        yield _row(f"service, {load.replace('x', ' x ')}{'' if load == label else f' (for {label})'}", row)
    yield "  least cosine with the stock model's vectors: " + ", ".join(
        f"{engine} {cosine:.5f}" for engine, cosine in workload["cosine"].items() if engine != "stock"
    )
    yield f"  one caller's p50 is {one['overhead_ms']:.1f} ms over in-process"


def _row(label: str, row: dict[str, Any]) -> str:
    times = "".join(f"{row[key]:>10,.1f}" if key in row else f"{'-':>10}" for key in ("p50_ms", "p99_ms"))
    mark = " *" if row.get("generator_share", 0.0) > GENERATOR_BOUND else ""
    share = row.get("limit_share_nominal", row["limit_share_measured"])
    return (
        f"  {label:<27}{row['vectors_per_s']:>11,.1f}{row['tokens_per_s']:>11,.0f}{times}{row['to_stock']:>9.2f}"
        f"{row['to_served']:>9.2f}{row['spread']:>8.0%}{row['model_share']:>7.0%}"
        f"{row['core_share']:>7.0%}{share:>7.0%}{mark}"
    )


def _interactive(beside: dict[str, Any]) -> Iterator[str]:
    yield (
        f"{beside['callers']} callers of one short text beside requests of {beside['bulk_inputs']:,}: "
        f"p50 {beside['p50_ms']:,.1f} ms, p99 {beside['p99_ms']:,.1f} ms of {beside['replies']} replies"
    )
    yield (
        f"  a batch takes {beside['batch_ms']:,.1f} ms on the device ({beside['batch_tokens']:,.0f} tokens): "
        f"p99 is {beside['p99_to_batch']:.1f} batches"
    )


def goal_lines(goals: list[dict[str, Any]]) -> Iterator[str]:
    """Each with its verdict."""
    yield "goals"
    for goal in goals:
        bound = f"{'<=' if goal['at_most'] else '>='} {goal['bound']:<6g}"
        rounds = f"  rounds {', '.join(f'{value:.2f}' for value in goal['rounds'])}" if goal["rounds"] else ""
        verdict = "pass" if goal["met"] else "MISS"
        yield f"  {verdict}  {goal['value']:>8.4f} {bound}  {goal['workload']:<7} {goal['goal']}{rounds}"


def _legend(result: dict[str, Any]) -> Iterator[str]:
    base = "the nominal rate" if result["nominal_tflops"] else f"the measured rate of matrix products in {result['dtype']}"
    yield f"/ stock, / served: tokens/s, to the stock forward and to {result['served']} in-process, measured in this run"
    yield f"each figure is of the fastest of {result['rounds']} rounds; spread: how much slower the slowest was"
    yield "model: the share of the time in the forward pass; the rest is tokenising, decoding, HTTP, and waiting for callers"
    yield "core: the processor time of engine or service, of one core; saturated on one and under 100 %, others had the rest"
    yield f"limit: the share of the physical limit, all operations of an input at {base}"
    yield "JPEGs are decoded in-process too; base64, JSON and HTTP are the service's alone"
    yield "(for AxB): a reply for each of A callers with B inputs would take too much of a window"
    yield "*: those who made the load were themselves busy; the service may do more"
