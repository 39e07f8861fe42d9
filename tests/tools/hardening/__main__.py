"""make hardening: every promise that can be seen from outside, one row each, against servers started here.

    python -m tests.tools.hardening [--quick] [--only WORDS] [--soak MINUTES] [--prove]

`--quick` is what `make test` runs: fewer repetitions, the same bars. `--prove` runs every check against servers that lack one of
its guards, and fails where a check passes all the same. Exits with 1 where a row fails.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time

from tests.tools.hardening.board import Check, Guard, Site, all_checks, attempt, inside


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.tools.hardening", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, and only the checks that are quick")
    parser.add_argument("--only", default="", help="the checks whose name contains this")
    parser.add_argument("--soak", type=float, default=0.0, metavar="MINUTES", help="how long the soak lasts; 0 leaves it out")
    parser.add_argument("--prove", action="store_true", help="see every check fail without its guards")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    parser.add_argument("--without", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        with Site(options.quick, without=guard_named(options.without)) as site:
            inside(options.inside, site)
        return 0
    chosen = [check for check in all_checks() if options.only in check.name and (check.quick or not options.quick)]
    chosen = [check for check in chosen if options.soak or check.name != "soak"]
    started = time.monotonic()
    failed = prove(chosen) if options.prove else run(chosen, options.quick, options.soak)
    print(f"\n{len(chosen)} checks, {failed} failed, {time.monotonic() - started:.0f} s")
    return 1 if failed or not chosen else 0


def run(chosen: list[Check], quick: bool, soak_minutes: float) -> int:
    """One row each; returns how many failed."""
    failed = 0
    with Site(quick, soak_minutes) as site:
        for check in chosen:
            outcome, seconds = attempt(check, site)
            failed += not outcome.passed
            print(f"{'pass' if outcome.passed else 'FAIL'}  {check.name}: {check.sends} -> {check.passes}", flush=True)
            print(f"      {outcome.figure}  ({seconds:.0f} s)", flush=True)
    return failed


def prove(chosen: list[Check]) -> int:
    """Every check without each of its guards; returns how many passed all the same, or have no guard to take away."""
    failed = 0
    for check in chosen:
        if not check.guards:
            failed += 1
            print(f"FAIL  {check.name}: names no guard", flush=True)
        for guard in check.guards:
            with Site(quick=True, soak_minutes=1.0, without=guard) as site:
                outcome, seconds = attempt(check, site)
            failed += outcome.passed
            said = (guard.__doc__ or guard.__name__).strip().splitlines()[0].rstrip(".")
            print(f"{'FAIL: it passes' if outcome.passed else 'it fails'}  {check.name}, {said}", flush=True)
            print(f"      {outcome.figure}  ({seconds:.0f} s)", flush=True)
    return failed


def guard_named(name: str | None) -> Guard | None:
    if name is None:
        return None
    module, _, function = name.partition(":")
    guard: Guard = getattr(importlib.import_module(module), function)
    return guard


if __name__ == "__main__":
    sys.exit(main())
