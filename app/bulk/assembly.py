"""The end of a run: writes the output beside the parts, moves it to its place, and removes the parts.

It may be cut off anywhere: before the journal is marked as written, the next run writes the output anew; after that, it moves
what has not been moved yet. OUTPUT itself is moved last, so that everything is in its place if OUTPUT is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import orjson

from app.bulk import durable
from app.bulk.delimited import without_surrogates
from app.bulk.journal import Journal
from app.bulk.outputs import WRITERS, ids_path


def sibling(output: Path, suffix: str) -> Path:
    """Return the path of a file that belongs to the output, OUTPUT.suffix."""
    return output.with_name(f"{output.name}.{suffix}")


def assemble(journal: Journal, check: Callable[[], None]) -> None:
    """Write the output of an embedded run into the journal's folder. `check` is called for each part, and may raise."""
    manifest, output = journal.manifest(), journal.output
    assert manifest is not None
    parts = journal.parts()
    rows = parts[-1].end if parts else 0
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
    durable.write(sibling(journal.folder / output.name, "meta.json"), orjson.dumps(summary, option=orjson.OPT_INDENT_2))
    files = [without_surrogates(name) for name in file_names(output) if source_of(journal, name).exists()]
    asked = {key: manifest[key] for key in ("version", "input", "options")}
    journal.mark_written({"summary": summary, "files": files, "asked": asked})


def publish(journal: Journal) -> dict[str, Any]:
    """Move the output and its siblings to their place, and remove the journal. Returns the summary."""
    result, output = journal.result(), journal.output
    assert result is not None
    for name in file_names(output):
        target, source = output.with_name(name), source_of(journal, name)
        if without_surrogates(name) not in result["files"]:
            target.unlink(missing_ok=True)  # it belonged to an earlier output
        elif source.exists():
            durable.move(source, target)
    journal.remove()
    summary: dict[str, Any] = result["summary"]
    return summary


def file_names(output: Path) -> list[str]:
    """Return the names of all files that an output may consist of, in the order in which they are moved."""
    return [sibling(output, "bad.jsonl").name, ids_path(output).name, sibling(output, "meta.json").name, output.name]


def source_of(journal: Journal, name: str) -> Path:
    """Return where a file of the output is before it is moved."""
    return journal.bad_rows if name == sibling(journal.output, "bad.jsonl").name else journal.folder / name


def labels(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Return what decides whether two outputs can be compared, as text for the metadata of a schema."""
    model, options = manifest["model"], manifest["options"]
    known = {"model": model["name"], "fingerprint": model["fingerprint"], "instruction": options["instruction"]}
    return {key: value for key, value in known.items() if value is not None} | {"dimension": str(model["dimension"])}
