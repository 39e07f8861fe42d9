"""Progress of a run: a bar on a terminal, a line of the log every few seconds elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from contextlib import ExitStack
from datetime import timedelta

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

log = logging.getLogger(__name__)

_LOG_INTERVAL_S = 10.0
_BAR_FORMAT = "{percentage:3.0f}%|{bar}| {desc} [{elapsed}<{remaining}]"
_BAR_FORMAT_WITHOUT_TOTAL = "{desc} [{elapsed}]"


class Progress:
    """A context manager that shows progress from `begin` to `total`, in any unit; a `total` of None is not known. `quiet` shows
    nothing."""

    def __init__(self, total: int | None, begin: int, *, quiet: bool) -> None:
        self._total = total
        self._begin = self._done = begin
        self._rows = 0
        self._started = self._last_logged = time.monotonic()
        self._logs = not quiet and not (sys.stderr is not None and sys.stderr.isatty())
        self._bar = tqdm(
            total=total,
            initial=begin,
            disable=quiet or self._logs,
            bar_format=_BAR_FORMAT_WITHOUT_TOTAL if total is None else _BAR_FORMAT,
            dynamic_ncols=True,
            # The remaining time follows the last minutes, not the last requests.
            smoothing=0.02,
            file=sys.stderr,
        )

        self._closing = ExitStack()

    def __enter__(self) -> Progress:
        self._closing.callback(self._bar.close)
        if not self._bar.disable:
            # Otherwise lines of the log would break the bar.
            self._closing.enter_context(logging_redirect_tqdm())
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def advance(self, done: int, rows: int, all_rows: int, bad: int) -> None:
        """Show that `done` of the total is done, by `rows` more rows. `all_rows` and `bad` count earlier runs' rows too."""
        self._rows += rows
        text = f"{all_rows:,} rows, {self.rate():,.0f} rows/s" + (f", {bad:,} bad" if bad else "")
        self._bar.set_description_str(text, refresh=False)
        self._bar.update(done - self._done)
        self._done = done
        now = time.monotonic()
        if self._logs and now - self._last_logged >= _LOG_INTERVAL_S:
            self._last_logged = now
            log.info("%s%s", text, self._remaining(now))

    def rate(self) -> float:
        """Return the rows per second of this run."""
        return self._rows / max(1e-6, time.monotonic() - self._started)

    def _remaining(self, now: float) -> str:
        if not self._total or self._done == self._begin:
            return ""
        seconds = (now - self._started) / (self._done - self._begin) * (self._total - self._done)
        return f", {self._done / self._total:.0%}, about {timedelta(seconds=round(seconds))} left"
