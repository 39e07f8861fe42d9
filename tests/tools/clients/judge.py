"""Judges whether a client gave what the server gives. Knows no client and no server: it reads what `trial` wrote down."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

SAME = 0.9999


@dataclass(frozen=True, slots=True)
class Verdict:
    """A trial, whether the client passed it, and the figure that says so."""

    tried: str
    passed: bool
    figure: str


def judge(record: dict[str, Any]) -> Verdict:
    """The verdict on one line of a program's."""
    return Verdict(record["tried"], *_judged(record))


def _judged(record: dict[str, Any]) -> tuple[bool, str]:
    kind, wanted = record["kind"], record["wanted"]
    if "raised" in record:
        passed, figure = _refused(kind, wanted, record)
    elif kind == "vectors":
        passed, figure = _same_vectors(wanted, record["got"])
    elif kind == "tokens":
        passed, figure = wanted.get("tokens") == record["got"], f"{record['got']} of {wanted.get('tokens')} tokens"
    elif kind == "value":
        passed, figure = wanted == record["got"], f"{record['got']!r}"
    else:
        passed, figure = False, "it raised nothing"
    if passed and record["retries"]:
        return _retried(record["waits"], record["retries"], wanted["retry_after"], figure)
    return passed, figure


def _refused(kind: str, wanted: Any, record: dict[str, Any]) -> tuple[bool, str]:
    """By the client's own class, with the server's own words."""
    said = f"{record['raised']}: {record['message']}"
    if kind not in ("refusal", "exception") or not record["is_expected"]:
        return False, record.get("trace", said)
    if kind == "exception":
        return True, record["raised"]
    if wanted["status"] < 400:
        return False, f"the server refuses it not: {wanted['status']}"
    return wanted["message"] in record["message"], f"{wanted['status']}, {said}"


def _retried(waits: list[float], least: int, retry_after: str | None, figure: str) -> tuple[bool, str]:
    """After the time that the server named: whole seconds, which the client's own back-off, a random time, never is. The server
    may name another one for every retry."""
    honoured = len(waits) >= least and retry_after is not None and all(wait >= 1 and wait.is_integer() for wait in waits)
    return honoured, f"{figure}; waited {waits} s, Retry-After: {retry_after}"


def _same_vectors(wanted: dict[str, Any], got: Any) -> tuple[bool, str]:
    """In number, in width, in direction, and each in its place."""
    if wanted["status"] != 200:
        return False, f"the server refuses it: {wanted['message']}"
    widths, wanted_widths = ([len(row or ()) for row in rows] for rows in (got, wanted["vectors"]))
    if widths != wanted_widths:
        return False, f"{len(widths)} of {sorted(set(widths))} instead of {len(wanted_widths)} of {sorted(set(wanted_widths))}"
    ours, theirs = (np.asarray(rows, dtype=np.float64) for rows in (wanted["vectors"], got))
    cosines = _unit(theirs) @ _unit(ours).T
    lowest = float(cosines.diagonal().min())
    strays = int((cosines.argmax(axis=1) != np.arange(len(ours))).sum())
    figure = f"{len(ours)} of {ours.shape[1]}, cosine {lowest:.6f}"
    return lowest >= SAME and not strays, figure + (f", {strays} nearer to another's" if strays else "")


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float64).tiny)
