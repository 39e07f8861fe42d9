"""`python -m app embed`: one run, from the first row to the output. A run that was stopped is resumed; only the rows that were
under way are embedded again."""

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

from app.bulk.assembly import assemble, file_names, publish, sibling
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
from app.bulk.stream import MAX_GROUP_BYTES, Stream
from app.engine.engine import LoadModel
from app.process import freeze_heap, share_interpreter
from app.settings import Settings

log = logging.getLogger(__name__)

# Of the journal. A run that began with another version is not resumed.
VERSION = 1
_LONGEST_SUFFIX = len(".ids.jsonl.tmp")


def embed(settings: Settings, options: Options, load_model: LoadModel) -> int:
    """Runs the command; returns its exit code."""
    share_interpreter()
    try:
        return asyncio.run(Run(settings, options, load_model, freeze_heap).run())
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return int(stopped.code)


class Run:
    """One run of the command. `load_model` defaults to loading the model that the settings name; `on_begin` is called once the
    model is loaded."""

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

    async def run(self) -> int:
        """Do everything that is left to do, and return the exit code. Raises Stopped, whose message says how to go on."""
        options, journal = self._options, self._journal
        try:
            check_options(options)
        except OSError as error:
            raise refused(f"{error.filename or options.input} cannot be looked at: {error.strerror}") from None
        interruption = Interruption()
        started = time.monotonic()
        with journal.locked():
            try:
                result = None if options.restart else journal.result()
                if result is None:
                    await self._embed(interruption)
                    await asyncio.to_thread(assemble, journal, interruption.check)
                else:
                    # The output that is left to move must be the one that this command asks for.
                    source = await asyncio.to_thread(self._open_source, interruption)
                    check_same_run(result["asked"], self._asked(source), journal)
                summary = await asyncio.to_thread(publish, journal)
            except Stopped as stopped:
                hint = "" if stopped.code == Ending.REFUSED else self._hint()
                raise Stopped(f"{stopped}{hint}", stopped.code) from None
            except OSError as error:
                # As a rule, the disk is full.
                raise Stopped(f"{journal.output} cannot be written: {error.strerror}{self._hint()}", Ending.STOPPED) from None
        return report(options, summary, self._rate, time.monotonic() - started)

    async def _embed(self, interruption: Interruption) -> None:
        """Embed and commit the rows that are not committed yet. Raises Stopped."""
        options, journal = self._options, self._journal
        # An earlier run binds this one only if it committed anything. It is discarded when this one begins, and not before, since
        # this one may be refused.
        known = journal.manifest() if journal.has_progress() and not options.restart else None
        if options.output.exists() and not options.overwrite:
            raise refused(f"{options.output} exists; --overwrite replaces it")
        source = await asyncio.to_thread(self._open_source, interruption)
        asked = self._asked(source)
        if known is not None:
            check_same_run(known, asked, journal)
            if journal.is_embedded():
                journal.resume()
                return
        async with self._embedder(interruption) as embedder:
            model = asdict(await interruption.unless_stopped(embedder.start()))
            if known is None:
                journal.begin({**asked, "model": model})
            else:
                check_same_model(known["model"], model, journal)
                journal.resume()
            self._on_begin()
            log.info("embedding %s into %s, from row %d on", options.input, options.output, journal.cursor.row)
            stream = Stream(source, embedder, journal, options, model["dimension"], interruption)
            await stream.run()
            self._rate = stream.rate
        journal.mark_embedded()

    def _asked(self, source: Source) -> dict[str, Any]:
        """Return what must be the same for a run to be resumed, besides the model."""
        options = self._options.output_options()
        if self._options.truncate and self._options.url is None:
            # It decides where a text is cut. With --url the service's own limit does, which is not known here.
            options["MAX_INPUT_TOKENS"] = self._settings.max_input_tokens
        return {"version": VERSION, "input": dict(source.identity), "options": options}

    def _open_source(self, interruption: Interruption) -> Source:
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
        """Open the embedder, in this process or over HTTP. Raises Stopped if the model cannot be loaded."""
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
            transport: Transport = await interruption.unless_stopped(stack.enter_async_context(opening))
            yield Embedder(
                transport,
                fields,
                patience=options.patience,
                max_rows=min(options.request_rows, settings.max_inputs_per_request),
                max_bytes=min(MAX_GROUP_BYTES, settings.max_request_bytes),
            )

    def _hint(self) -> str:
        """Return a line on how to resume the run, empty if it has not begun."""
        if not self._journal.has_begun():
            return ""
        journal = self._journal
        return f"\n{journal.rows_committed():,} rows are done and kept in {journal.folder}: the same command goes on there"


def check_options(options: Options) -> None:
    """Raise Stopped if INPUT, OUTPUT or --url cannot work, as far as that shows without reading a file."""
    kind_of(options.input)
    output = options.output
    if output.suffix.lower() not in WRITERS:
        raise refused(f"{output} ends in none of {', '.join(WRITERS)}")
    if not output.absolute().parent.is_dir():
        raise refused(f"the folder {output.absolute().parent} is not there")
    if len(os.fsencode(output.name)) + _LONGEST_SUFFIX > os.pathconf(output.absolute().parent, "PC_NAME_MAX"):
        raise refused(f"the name of {output} is too long: what lies beside it has longer ones")
    for name in file_names(output):
        if (path := output.with_name(name)).is_dir():
            raise refused(f"{path} is a folder")
        if path.exists() and path.samefile(options.input):
            what = "OUTPUT" if path == output else f"{path}, which goes with OUTPUT,"
            raise refused(f"INPUT and {what} are one file")
    if options.url is not None:
        endpoint(options.url)


def check_same_run(known: Mapping[str, Any], asked: Mapping[str, Any], journal: Journal) -> None:
    """Raise Stopped if the run in the journal began with another version, another input or other options."""
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


def check_same_model(known: Mapping[str, Any], model: Mapping[str, Any], journal: Journal) -> None:
    """Raise Stopped if vectors of two models cannot be compared: their fingerprints differ, or their names if either has none."""
    keys = ("fingerprint", "dimension") if known["fingerprint"] and model["fingerprint"] else ("name", "fingerprint", "dimension")
    if any(known[key] != model[key] for key in keys):
        raise refused(
            f"the run in {journal.folder} began with the model {known['name']} (fingerprint {known['fingerprint']}), and this is "
            f"{model['name']} (fingerprint {model['fingerprint']}); --restart discards what it has done"
        )


def report(options: Options, summary: Mapping[str, Any], rate: float, seconds: float) -> Ending:
    """Print the summary of a run, and return its exit code."""
    bad = summary["bad_rows"]
    text = f"{options.output}: {summary['vectors']:,} vectors of {summary['dimension']:,} components"
    if bad:
        text += f"; {bad:,} bad rows, with their reasons in {sibling(options.output, 'bad.jsonl')}"
    if rate:
        text += f"; {rate:,.0f} rows/s, {timedelta(seconds=round(seconds))} in all"
    print_line(text)
    return Ending.BAD_ROWS if bad else Ending.COMPLETE


def print_line(text: str) -> None:
    """Print a line to stdout. An error is only logged, since the run is done by then."""
    if sys.stdout is None:
        return
    encoding = sys.stdout.encoding or "utf-8"
    try:
        # The name of a file may not be UTF-8.
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except OSError as error:
        log.warning("stdout cannot be written (%s): %s", error.strerror, text)
        # Flushing stdout's buffer at exit would fail once more, with an exit code of its own.
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
