"""`python -m app embed`: a run from the first row to the output, or to where it is stopped.

Rows are read ahead on a thread, sent in requests of which several are under way, and committed in order. A run that goes on does
nothing twice but what was under way.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import asdict, replace
from datetime import timedelta
from itertools import takewhile
from typing import Any

from app.bulk.assembly import assemble, beside, publish
from app.bulk.embedder import Embedder, Transport, Vector
from app.bulk.ending import Ending, Stopped, refused
from app.bulk.in_process import in_process
from app.bulk.interruption import Interruption
from app.bulk.items import Columns
from app.bulk.journal import Journal
from app.bulk.options import Options
from app.bulk.outputs import WRITERS
from app.bulk.over_http import endpoint, over_http
from app.bulk.progress import Progress
from app.bulk.rows import Cursor, Fault, Row, Source, groups
from app.bulk.sources import kind_of, open_source
from app.engine import LoadModel
from app.process import freeze_heap, share_interpreter
from app.settings import Settings

log = logging.getLogger(__name__)

VERSION = 1
# A request's rows, as JSON. Images in base64 fill it; of texts the number of rows is the limit.
MOST_BYTES = 8 << 20
# What is lost at most when the process is killed, beside what is under way.
COMMIT_EVERY_S = 10.0
COMMIT_ROWS = 65_536
COMMIT_BYTES = 32 << 20

Answered = tuple[Row, Vector | Fault]
Group = tuple[list[Row], asyncio.Task[list[Vector | Fault]]]


def embed(settings: Settings, options: Options) -> int:
    """The exit code."""
    share_interpreter()
    try:
        return asyncio.run(Run(settings, options, on_begin=freeze_heap).whole())
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return int(stopped.code)


class Run:
    """One. `load_model` is by default what the settings name; `on_begin` is called when the model is there."""

    def __init__(
        self,
        settings: Settings,
        options: Options,
        load_model: LoadModel | None = None,
        on_begin: Callable[[], None] = lambda: None,
    ) -> None:
        self._settings = settings
        self._options = options
        self._load_model = load_model
        self._on_begin = on_begin
        self._journal = Journal(options.output)
        # Done, and not committed yet.
        self._pending: list[Answered] = []
        self._pending_bytes = 0
        self._good = 0
        self._committed_at = time.monotonic()
        self.rate = 0.0

    async def whole(self) -> int:
        """All that is left to do. Raises Stopped, with a word on how to go on."""
        options, journal = self._options, self._journal
        check(options)
        interruption = Interruption()
        started = time.monotonic()
        with journal.locked():
            try:
                if options.restart:
                    journal.clear()
                if journal.finished() is None:
                    await self._rows(interruption)
                    await asyncio.to_thread(assemble, journal, interruption.check)
                summary = await asyncio.to_thread(publish, journal)
            except Stopped as stopped:
                hint = "" if stopped.code == Ending.REFUSED else self._hint()
                raise Stopped(f"{stopped}{hint}", stopped.code) from None
            except OSError as error:
                # A full disk, as a rule.
                raise Stopped(f"{journal.output} cannot be written: {error.strerror}{self._hint()}", Ending.STOPPED) from None
        return report(options, summary, self.rate, time.monotonic() - started)

    async def _rows(self, interruption: Interruption) -> None:
        """Embed and commit what is not committed yet. Raises Stopped."""
        options, journal = self._options, self._journal
        if journal.manifest() is None and options.output.exists() and not options.overwrite:
            raise refused(f"{options.output} exists; --overwrite replaces it")
        source = await asyncio.to_thread(self._opened, interruption)
        known = journal.manifest()
        asked = {"version": VERSION, "input": dict(source.identity), "options": options.decisive()}
        if known is not None:
            compare(known, asked, journal)
        if journal.complete():
            journal.resume()
            return
        async with self._embedder(interruption) as embedder:
            model = asdict(await interruption.unless_asked(embedder.start()))
            if known is None:
                journal.begin({**asked, "model": model})
            else:
                compare_models(known["model"], model, journal)
                journal.resume()
            self._on_begin()
            log.info("embedding %s into %s, from row %d on", options.input, options.output, journal.cursor.row)
            await self._all_groups(source, embedder, model["dimension"], interruption)
        journal.end()

    def _opened(self, interruption: Interruption) -> Source:
        options, settings = self._options, self._settings
        return open_source(
            options.input,
            Columns(*options.columns),
            options.delimiter,
            max_image_bytes=settings.max_image_bytes,
            max_line_bytes=settings.max_request_bytes,
            listing=self._journal.listing,
            check=interruption.check,
        )

    @asynccontextmanager
    async def _embedder(self, interruption: Interruption) -> AsyncIterator[Embedder]:
        """What asks for vectors, here or over HTTP. Raises Stopped."""
        options, settings = self._options, self._settings
        given = {"instruction": options.instruction, "dimensions": options.dimensions, "model": options.model}
        fields: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
        if options.truncate:
            fields["truncate"] = True
        opening: AbstractAsyncContextManager[Transport] = (
            in_process(settings, self._load_model)
            if options.url is None
            else over_http(settings, options.url, options.concurrency)
        )
        async with AsyncExitStack() as stack:
            transport: Transport = await interruption.unless_asked(stack.enter_async_context(opening))
            yield Embedder(
                transport,
                fields,
                patience=options.patience,
                most_rows=min(options.request_rows, settings.max_inputs_per_request),
                most_bytes=min(MOST_BYTES, settings.max_request_bytes),
            )

    async def _all_groups(self, source: Source, embedder: Embedder, dimension: int, interruption: Interruption) -> None:
        """Read, embed and commit, from the journal's cursor to the end. Raises Stopped, with all committed that was done."""
        options, journal = self._options, self._journal
        slots = asyncio.Semaphore(options.concurrency)
        window: deque[Group] = deque()
        rows = source.rows(journal.cursor)
        if (limit := options.limit) is not None:
            rows = takewhile(lambda row: row.number < limit, rows)
        reader = groups(rows, options.request_rows, MOST_BYTES)
        total, measure = (source.total, at_of) if options.limit is None else (options.limit, row_of)

        async def answers(group: list[Row]) -> list[Vector | Fault]:
            async with slots:
                return await embedder.embed([row.item for row in group if row.item is not None])

        with Progress(total, measure(journal.cursor), quiet=options.quiet) as progress:
            try:
                more = True
                while more or window:
                    # Twice as many as are under way: what is done waits for what comes before it.
                    while more and len(window) < 2 * options.concurrency:
                        group = await interruption.unless_asked(asyncio.to_thread(next, reader, None))
                        more = group is not None
                        if group is not None:
                            window.append((group, asyncio.create_task(answers(group))))
                    if window:
                        group, task = window[0]
                        self._add(group, await interruption.unless_asked(task))
                        window.popleft()
                        cursor = group[-1].after
                        progress.advance(measure(cursor), len(group), cursor.row, cursor.row - journal.vectors - self._good)
                    if self._is_due():
                        await self._commit(source, dimension)
            finally:
                self.rate = progress.rate()
                for _, task in window:
                    task.cancel()
                await asyncio.gather(*(task for _, task in window), return_exceptions=True)
                await self._commit(source, dimension)

    def _add(self, group: list[Row], answers: list[Vector | Fault]) -> None:
        """What is done, in order, to be committed. Of a row nothing is kept that takes memory."""
        left = iter(answers)
        for row in group:
            answer = row.fault or next(left)
            self._good += not isinstance(answer, Fault)
            self._pending_bytes += 0 if isinstance(answer, Fault) else answer.nbytes
            self._pending.append((replace(row, item=None), answer))

    def _is_due(self) -> bool:
        if len(self._pending) >= COMMIT_ROWS or self._pending_bytes >= COMMIT_BYTES:
            return True
        return bool(self._pending) and time.monotonic() - self._committed_at >= COMMIT_EVERY_S

    async def _commit(self, source: Source, dimension: int) -> None:
        """Raises Stopped where what was read is not what the run began with."""
        if source.has_changed():
            raise refused(f"{self._options.input} has changed while it was read; --restart begins anew")
        if self._pending:
            await asyncio.to_thread(self._journal.commit, self._pending, dimension)
            self._pending, self._pending_bytes, self._good = [], 0, 0
        self._committed_at = time.monotonic()

    def _hint(self) -> str:
        """How to go on, where there is something to go on with."""
        if self._journal.manifest() is None:
            return ""
        return f"\n{self._journal.cursor.row:,} rows are done and kept in {self._journal.folder}: the same command goes on there"


def check(options: Options) -> None:
    """Raises Stopped for what needs no look into any file."""
    kind_of(options.input)
    output = options.output
    if output.suffix.lower() not in WRITERS:
        raise refused(f"{output} ends in none of {', '.join(WRITERS)}")
    if not output.absolute().parent.is_dir():
        raise refused(f"the folder {output.absolute().parent} is not there")
    if output.is_dir():
        raise refused(f"{output} is a folder")
    if output.exists() and output.samefile(options.input):
        raise refused("INPUT and OUTPUT are one file")
    if options.url is not None:
        endpoint(options.url)


def compare(known: Mapping[str, Any], asked: Mapping[str, Any], journal: Journal) -> None:
    """Raises Stopped where a run cannot go on, for it began with something else."""
    what = ""
    if known["version"] != asked["version"]:
        what = "another version of this program"
    elif known["input"] != asked["input"]:
        what = "another INPUT, or INPUT has changed since"
    elif known["options"] != asked["options"]:
        changed = (name for name, value in asked["options"].items() if known["options"].get(name) != value)
        what = f"other options ({', '.join(changed)})"
    if what:
        raise refused(f"the run in {journal.folder} began with {what}; --restart discards what it has done")


def compare_models(known: Mapping[str, Any], model: Mapping[str, Any], journal: Journal) -> None:
    """Raises Stopped where vectors of the one cannot be compared with those of the other. A fingerprint tells, where there is
    one, else the name."""
    told = ("fingerprint", "dimension") if known["fingerprint"] and model["fingerprint"] else ("name", "fingerprint", "dimension")
    if any(known[key] != model[key] for key in told):
        raise refused(
            f"the run in {journal.folder} began with the model {known['name']} (fingerprint {known['fingerprint']}), and this is "
            f"{model['name']} (fingerprint {model['fingerprint']}); --restart discards what it has done"
        )


def report(options: Options, summary: Mapping[str, Any], rate: float, seconds: float) -> Ending:
    """Say what there is now."""
    bad = summary["bad_rows"]
    said = f"{options.output}: {summary['vectors']:,} vectors of {summary['dimension']:,} components"
    if bad:
        said += f"; {bad:,} bad rows, with their reasons in {beside(options.output, 'bad.jsonl')}"
    if rate:
        said += f"; {rate:,.0f} rows/s, {timedelta(seconds=round(seconds))} in all"
    print(said, flush=True)
    return Ending.BAD_ROWS if bad else Ending.COMPLETE


def at_of(cursor: Cursor) -> int:
    return cursor.at


def row_of(cursor: Cursor) -> int:
    return cursor.row
