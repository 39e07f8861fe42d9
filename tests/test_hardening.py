"""The quick half of the scoreboard: every promise that can be seen from outside, against servers started here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.hardening.board import Check, Site, all_checks, attempt

QUICK = [check for check in all_checks() if check.quick]


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with Site(quick=True) as site:
        yield site


@pytest.mark.parametrize("check", QUICK, ids=lambda check: check.name.replace(" ", "-"))
def test_promise_is_kept(check: Check, site: Site) -> None:
    outcome, _ = attempt(check, site)
    assert outcome.passed, outcome.figure


def test_every_check_names_a_guard_without_which_it_fails() -> None:
    assert [check.name for check in all_checks() if not check.guards] == []
