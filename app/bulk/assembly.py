"""The end of a run: its output is written beside its parts, moved to its place, and the parts go.

Whenever it is cut off, the next run goes on: before finished.json is there it writes all anew, after that it moves what is not
moved yet. OUTPUT itself is moved last, so that where it is there, all is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import orjson

from app.bulk import durable
from app.bulk.delimited import readable
from app.bulk.journal import Journal
from app.bulk.outputs import WRITERS, ids_beside


def beside(output: Path, name: str) -> Path:
    """A file that goes with the output."""
    return output.with_name(f"{output.name}.{name}")


def assemble(journal: Journal, check: Callable[[], None]) -> None:
    """Write the output of a run that is complete. `check` is called for each part, and may raise."""
    manifest, output = journal.manifest(), journal.output
    assert manifest is not None
    parts = journal.parts()
    rows = parts[-1].past if parts else 0
    model = manifest["model"]
    summary = {
        **{key: model[key] for key in ("name", "fingerprint", "dimension")},
        "rows": rows,
        "vectors": journal.vectors,
        "bad_rows": rows - journal.vectors,
        "input": manifest["input"],
        "options": manifest["options"],
    }
    WRITERS[output.suffix.lower()](journal.folder / output.name, parts, model["dimension"], labels(manifest), check)
    durable.write(beside(journal.folder / output.name, "meta.json"), orjson.dumps(summary, option=orjson.OPT_INDENT_2))
    files = [readable(name) for name in companions(output) if source_of(journal, name).exists()]
    asked = {key: manifest[key] for key in ("version", "input", "options")}
    journal.finish({"summary": summary, "files": files, "asked": asked})


def publish(journal: Journal) -> dict[str, Any]:
    """Move the output, and what goes with it, to its place; the parts go. Returns the summary."""
    finished, output = journal.finished(), journal.output
    assert finished is not None
    for name in companions(output):
        target, source = output.with_name(name), source_of(journal, name)
        if readable(name) not in finished["files"]:
            target.unlink(missing_ok=True)  # an earlier output's
        elif source.exists():
            durable.move(source, target)
    journal.remove()
    summary: dict[str, Any] = finished["summary"]
    return summary


def companions(output: Path) -> list[str]:
    """Names of all that there may be, in the order in which they are moved."""
    return [beside(output, "bad.jsonl").name, ids_beside(output).name, beside(output, "meta.json").name, output.name]


def source_of(journal: Journal, name: str) -> Path:
    """Where a file lies before it is moved."""
    return journal.bad_rows if name == beside(journal.output, "bad.jsonl").name else journal.folder / name


def labels(manifest: Mapping[str, Any]) -> dict[str, str]:
    """What a reader of the vectors has to know to compare them with others, as text."""
    model, options = manifest["model"], manifest["options"]
    known = {"model": model["name"], "fingerprint": model["fingerprint"], "instruction": options["instruction"]}
    return {key: value for key, value in known.items() if value is not None} | {"dimension": str(model["dimension"])}
