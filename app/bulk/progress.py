"""How far a run is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from contextlib import ExitStack
from datetime import timedelta

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

log = logging.getLogger(__name__)

_LINE_EVERY_S = 10.0
_KNOWN = "{percentage:3.0f}%|{bar}| {desc} [{elapsed}<{remaining}]"
_UNKNOWN = "{desc} [{elapsed}]"


class Progress:
    """Of `total`, in whatever measure, `begin` are done before this run; None is not known. A context manager."""

    def __init__(self, total: int | None, begin: int, *, quiet: bool) -> None:
        self._total = total
        self._begin = self._done = begin
        self._rows = 0
        self._started = self._told = time.monotonic()
        self._lines = not quiet and not (sys.stderr is not None and sys.stderr.isatty())
        self._bar = tqdm(
            total=total,
            initial=begin,
            disable=quiet or self._lines,
            bar_format=_UNKNOWN if total is None else _KNOWN,
            dynamic_ncols=True,
            # The time left is that of the last minutes, not of the last requests.
            smoothing=0.02,
            file=sys.stderr,
        )

        self._closing = ExitStack()

    def __enter__(self) -> Progress:
        self._closing.callback(self._bar.close)
        if not self._bar.disable:
            # Lines of the log stand above the bar.
            self._closing.enter_context(logging_redirect_tqdm())
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def advance(self, done: int, rows: int, all_rows: int, bad: int) -> None:
        """`done` of the total now; `rows` rows more, of which there are `all_rows` with earlier runs', and `bad` of those bad."""
        self._rows += rows
        told = f"{all_rows:,} rows, {self.rate():,.0f} rows/s" + (f", {bad:,} bad" if bad else "")
        self._bar.set_description_str(told, refresh=False)
        self._bar.update(done - self._done)
        self._done = done
        now = time.monotonic()
        if self._lines and now - self._told >= _LINE_EVERY_S:
            self._told = now
            log.info("%s%s", told, self._left(now))

    def rate(self) -> float:
        """Rows per second of this run."""
        return self._rows / max(1e-6, time.monotonic() - self._started)

    def _left(self, now: float) -> str:
        if not self._total or self._done == self._begin:
            return ""
        seconds = (now - self._started) / (self._done - self._begin) * (self._total - self._done)
        return f", {self._done / self._total:.0%}, about {timedelta(seconds=round(seconds))} left"
