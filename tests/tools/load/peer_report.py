"""A comparison with a peer, as text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.tools.load.report import GENERATOR_BOUND, goal_lines

RATIOS = f"{'/ library':>11}{'least':>8}{'most':>8}{'by work':>9}"
HEAD = f"{'':<24}{'vectors/s':>11}{'tokens/s':>11}{'p50 ms':>10}{'p99 ms':>10}{RATIOS}{'core':>7}"


def peer_table(result: dict[str, Any]) -> str:
    """All lines but the JSON."""
    lines = [*_what(result), "", HEAD]
    for load in result["loads"].values():
        lines += ["", f"{load['callers']} x {load['inputs']}"]
        lines += [_row(name, row) for name, row in load["rows"].items()]
    return "\n".join([*lines, "", *goal_lines(result["goals"]), "", *_legend(result)])


def _what(result: dict[str, Any]) -> Iterator[str]:
    texts = result["texts"]
    yield (
        f"{result['checkpoint']} on {result['device']} in {result['dtype']}; {texts['count']} texts of 8 to 200 words, "
        f"{texts['tokens'] / texts['count']:.0f} tokens on average and {texts['longest']} at most; "
        f"{result['rounds']} rounds, {result['elapsed_s']:.0f} s in all"
    )
    if cores := result["cores"]:
        shared = "; there is but ONE core, which the load shares" if cores["model"] == cores["load"] else ""
        yield f"library and servers on core {cores['model']} alone, one at a time, the load on core {cores['load']}{shared}"
    library = {name: value for name, value in result["library"].items() if name != "threads"}
    for name, packages in (("library and ours", library), (result["peer"], result["peer_versions"])):
        if packages:
            yield f"{name}: {', '.join(f'{package} {number}' for package, number in packages.items())}"


def _row(name: str, row: dict[str, Any]) -> str:
    times = "".join(f"{row[key]:>10,.1f}" if key in row else f"{'-':>10}" for key in ("p50_ms", "p99_ms"))
    ratios = "".join(f"{'-':>{width}}" for width in (11, 8, 8, 9))
    if rounds := row.get("to_library_rounds"):
        ratios = f"{row['to_library']:>11.2f}{min(rounds):>8.2f}{max(rounds):>8.2f}{row['to_library_by_work']:>9.2f}"
    mark = " *" if row.get("generator_share", 0.0) > GENERATOR_BOUND else ""
    return (
        f"  {name:<22}{row['vectors_per_s']:>11,.1f}{row['tokens_per_s']:>11,.0f}{times}{ratios}{row['core_share']:>7.0%}{mark}"
    )


def _legend(result: dict[str, Any]) -> Iterator[str]:
    yield "library: SentenceTransformer.encode in process, all texts at once, in its batches of 32 sorted by length"
    if result["peer"] == "infinity":
        yield "infinity: infinity-emb as it comes, with BetterTransformer; infinity-plain: without"
    yield "A x B: A callers, each with one request of B texts under way at a time"
    yield "/ library: tokens/s, to the library's in the same round; the median of the rounds, the least and the most"
    yield "by work: the same for each second of the processor: what others had of the core does not count, nor does waiting"
    yield "other figures are medians of the rounds; core: the processor time of library or server, of one core"
    yield "*: those who made the load were themselves busy; the server may do more"
