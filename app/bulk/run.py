"""`python -m app embed`: a run from the first row to the output, or to where it is stopped. A run that goes on does nothing twice
but what was under way."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import asdict
from datetime import timedelta
from typing import Any

from app.bulk.assembly import assemble, beside, companions, publish
from app.bulk.embedder import Embedder, Transport
from app.bulk.ending import Ending, Stopped, refused
from app.bulk.in_process import in_process
from app.bulk.interruption import Interruption
from app.bulk.items import Columns
from app.bulk.journal import Journal
from app.bulk.options import Options
from app.bulk.outputs import WRITERS
from app.bulk.over_http import endpoint, over_http
from app.bulk.rows import Source
from app.bulk.sources import kind_of, open_source
from app.bulk.stream import MOST_BYTES, Stream
from app.engine.engine import LoadModel
from app.process import freeze_heap, share_interpreter
from app.settings import Settings

log = logging.getLogger(__name__)

VERSION = 1
_LONGEST_COMPANION = len(".ids.jsonl.tmp")


def embed(settings: Settings, options: Options, load_model: LoadModel) -> int:
    """The exit code."""
    share_interpreter()
    try:
        return asyncio.run(Run(settings, options, load_model, freeze_heap).whole())
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
        self._rate = 0.0

    async def whole(self) -> int:
        """All that is left to do. Raises Stopped, with a word on how to go on."""
        options, journal = self._options, self._journal
        try:
            check(options)
        except OSError as error:
            raise refused(f"{error.filename or options.input} cannot be looked at: {error.strerror}") from None
        interruption = Interruption()
        started = time.monotonic()
        with journal.locked():
            try:
                finished = None if options.restart else journal.finished()
                if finished is None:
                    await self._rows(interruption)
                    await asyncio.to_thread(assemble, journal, interruption.check)
                else:
                    # What is left to move must be what this command asks for.
                    source = await asyncio.to_thread(self._opened, interruption)
                    compare(finished["asked"], self._asked(source), journal)
                summary = await asyncio.to_thread(publish, journal)
            except Stopped as stopped:
                hint = "" if stopped.code == Ending.REFUSED else self._hint()
                raise Stopped(f"{stopped}{hint}", stopped.code) from None
            except OSError as error:
                # A full disk, as a rule.
                raise Stopped(f"{journal.output} cannot be written: {error.strerror}{self._hint()}", Ending.STOPPED) from None
        return report(options, summary, self._rate, time.monotonic() - started)

    async def _rows(self, interruption: Interruption) -> None:
        """Embed and commit what is not committed yet. Raises Stopped."""
        options, journal = self._options, self._journal
        # What is discarded goes when the new run begins, and not before: it may be refused. One that has done nothing binds none.
        known = journal.manifest() if journal.has_work() and not options.restart else None
        if options.output.exists() and not options.overwrite:
            raise refused(f"{options.output} exists; --overwrite replaces it")
        source = await asyncio.to_thread(self._opened, interruption)
        asked = self._asked(source)
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
            stream = Stream(source, embedder, journal, options, model["dimension"], interruption)
            await stream.whole()
            self._rate = stream.rate
        journal.end()

    def _asked(self, source: Source) -> dict[str, Any]:
        """What a run may go on under, and no other."""
        options = self._options.decisive()
        if self._options.truncate and self._options.url is None:
            # Where a text is cut. That of a service is its own, and not known.
            options["MAX_INPUT_TOKENS"] = self._settings.max_input_tokens
        return {"version": VERSION, "input": dict(source.identity), "options": options}

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

    def _hint(self) -> str:
        """How to go on, where there is something to go on with."""
        if not self._journal.has_begun():
            return ""
        return f"\n{self._journal.rows_kept():,} rows are done and kept in {self._journal.folder}: the same command goes on there"


def check(options: Options) -> None:
    """Raises Stopped for what needs no look into any file."""
    kind_of(options.input)
    output = options.output
    if output.suffix.lower() not in WRITERS:
        raise refused(f"{output} ends in none of {', '.join(WRITERS)}")
    if not output.absolute().parent.is_dir():
        raise refused(f"the folder {output.absolute().parent} is not there")
    if len(os.fsencode(output.name)) + _LONGEST_COMPANION > os.pathconf(output.absolute().parent, "PC_NAME_MAX"):
        raise refused(f"the name of {output} is too long: what lies beside it has longer ones")
    for name in companions(output):
        if (path := output.with_name(name)).is_dir():
            raise refused(f"{path} is a folder")
        if path.exists() and path.samefile(options.input):
            what = "OUTPUT" if path == output else f"{path}, which goes with OUTPUT,"
            raise refused(f"INPUT and {what} are one file")
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
        before, now = known["options"], asked["options"]
        changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
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
    say(said)
    return Ending.BAD_ROWS if bad else Ending.COMPLETE


def say(text: str) -> None:
    """A line on stdout. All is done by then: that nobody listens is no failure."""
    if sys.stdout is None:
        return
    encoding = sys.stdout.encoding or "utf-8"
    try:
        # The name of a file need not be text.
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except OSError as error:
        log.warning("stdout cannot be written (%s): %s", error.strerror, text)
        # What is left in its buffer would fail once more at the process's end, with an exit code of its own.
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
