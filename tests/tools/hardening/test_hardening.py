"""The quick half of the scoreboard: every promise that can be seen from outside, against servers started here; and the board."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.tools.hardening.board import Check, Outcome, Site, all_checks, attempt

pytestmark = pytest.mark.tools

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


# The board itself


def guard_that_breaks() -> None:
    """with a guard that cannot be taken away."""
    raise LookupError("it is called otherwise by now")


def guard_that_is_gone() -> None:
    """without a check of the key."""
    from app.http import auth

    vars(auth)["check_key"] = lambda headers, keys: "anyone"


def asks_without_a_key(site: Site) -> Outcome:
    with site.own("tests.support.fakes") as server:
        server.until_status("ok")
        status, _, _ = server.request("/v1/models", Authorization="")
    return Outcome(status == 401, str(status))


def row(run: Callable[[Site], Outcome]) -> Check:
    return Check("row", "something", "something", run, (), quick=True, isolated=False)


def test_a_check_fails_without_its_guard() -> None:
    assert attempt(row(asks_without_a_key), Site())[0] == Outcome(True, "401")
    assert attempt(row(asks_without_a_key), Site(without=guard_that_is_gone))[0] == Outcome(False, "200")


def test_a_guard_that_could_not_be_taken_away_proves_nothing() -> None:
    outcome, _ = attempt(row(asks_without_a_key), Site(without=guard_that_breaks))
    assert outcome.passed and "could not be taken away: LookupError" in outcome.figure


def test_what_a_check_does_not_expect_is_a_failure() -> None:
    def broken(site: Site) -> Outcome:
        raise TimeoutError("nothing came")

    assert attempt(row(broken), Site())[0] == Outcome(False, "TimeoutError: nothing came")


def test_names_are_their_own() -> None:
    names = [check.name for check in all_checks()]
    assert len(names) == len(set(names)) > 40
