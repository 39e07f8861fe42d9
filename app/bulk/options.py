"""The options of `python -m app embed`. Light, since every command imports it with the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DESCRIPTION = """\
Embed every row of INPUT into OUTPUT, with the model that config.env and the environment name, or with --url by a running service.
Stopped at any moment, the same command goes on where it was."""

EPILOG = """\
INPUT
  .jsonl, .ndjson   a line for each row, what the API's `input` takes: "text", {"text": ...}, {"image": ...}, {"content": [...]};
                    an object may have an "id"
  .csv, .tsv        UTF-8 with a header; columns text, image, instruction, id; an empty cell is an absent one
  .parquet          the same columns; an image may be bytes, or {"bytes", "path"}
  a folder          its images, those of folders in it too, in order of their paths, which are their ids
  JSON Lines and CSV may be compressed (.gz). Columns that are not there are none; text and image of a row give one vector.
  An image is a URL (http:, https:, data:), else, where it holds a dot, the path of a file, from INPUT's folder; else base64.

OUTPUT
  .parquet          columns row, id, embedding; model and fingerprint are in the schema's metadata
  .jsonl, .ndjson   a line {"row", "id", "embedding"} for each vector
  .npy              float32, row i for row i of INPUT, NaN where that is bad; ids in OUTPUT.ids.jsonl
  OUTPUT.meta.json has model, fingerprint and counts. OUTPUT.bad.jsonl has the bad rows and why, where there are any.
  OUTPUT.parts holds what is done while the command runs.

exit codes
  0  every row has a vector            4  done; some rows are bad
  1  the model is missing or broken    5  stopped: the same command goes on
  2  something asked for is wrong      130, 143  stopped by Ctrl-C, or SIGTERM: likewise
  3  the device failed: likewise"""


@dataclass(frozen=True, slots=True)
class Options:
    """The parsed command line. `columns` names the columns of text, image, instruction and id, in this order."""

    input: Path
    output: Path
    columns: tuple[str | None, str | None, str | None, str | None] = (None, None, None, None)
    delimiter: str | None = None
    instruction: str | None = None
    dimensions: int | None = None
    truncate: bool = False
    limit: int | None = None
    url: str | None = None
    model: str | None = None
    concurrency: int = 4
    request_rows: int = 256
    patience: float = 300.0
    overwrite: bool = False
    restart: bool = False
    quiet: bool = False

    def output_options(self) -> dict[str, Any]:
        """Return the options that change the output. A run is only resumed if they are the same, as input and model are."""
        return {
            "columns": list(self.columns),
            "delimiter": self.delimiter,
            "instruction": self.instruction,
            "dimensions": self.dimensions,
            "truncate": self.truncate,
            "limit": self.limit,
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to `parser`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    add = parser.add_argument
    add("input", type=Path, metavar="INPUT", help=".jsonl, .ndjson, .csv, .tsv, .parquet, or a folder of images")
    add("output", type=Path, metavar="OUTPUT", help=".parquet, .npy, .jsonl or .ndjson")

    rows = parser.add_argument_group("what is read")
    add = rows.add_argument
    add("--text-column", type=text, metavar="NAME", help="column, or key of a line's object, with the text (default: text)")
    add("--image-column", type=text, metavar="NAME", help="with the image (default: image)")
    add("--instruction-column", type=text, metavar="NAME", help="with the row's own instruction (default: instruction)")
    add("--id-column", type=text, metavar="NAME", help="with the row's id (default: id)")
    add("--delimiter", type=one_character, metavar="C", help="between the cells of a CSV (default: , and a tab in .tsv)")
    add("--limit", type=int_between(1), metavar="N", help="the first N rows alone")

    vectors = parser.add_argument_group("what is made")
    add = vectors.add_argument
    add("--instruction", type=text, metavar="TEXT", help="for every row that has none of its own")
    add("--dimensions", type=int_between(1), metavar="N", help="keep the first N components, and normalise again")
    add("--truncate", action="store_true", help="cut texts that are too long, which are bad rows otherwise")
    add("--overwrite", action="store_true", help="replace an OUTPUT that is there")
    add("--restart", action="store_true", help="discard what an earlier run has done")

    service = parser.add_argument_group("by a running service")
    add = service.add_argument
    add("--url", metavar="URL", help="its address, as http://localhost:6008; its key is the first of API_KEY, a setting")
    add("--model", type=text, metavar="NAME", help="the model to ask it for (default: its own)")
    add("--patience", type=seconds, default=300.0, metavar="SECONDS", help="how long to wait for one that is away (default: 300)")

    speed = parser.add_argument_group("how")
    add = speed.add_argument
    add("--concurrency", type=int_between(1, 256), default=4, metavar="N", help="requests at a time (default: 4)")
    add("--request-rows", type=int_between(1, 2048), default=256, metavar="N", help="rows in a request, at most (default: 256)")
    add("--quiet", action="store_true", help="no progress")


def read(arguments: argparse.Namespace) -> Options:
    """Return the options that the command line gives."""
    return Options(
        input=arguments.input,
        output=arguments.output,
        columns=(arguments.text_column, arguments.image_column, arguments.instruction_column, arguments.id_column),
        delimiter=arguments.delimiter,
        instruction=arguments.instruction,
        dimensions=arguments.dimensions,
        truncate=arguments.truncate,
        limit=arguments.limit,
        url=arguments.url,
        model=arguments.model,
        concurrency=arguments.concurrency,
        request_rows=arguments.request_rows,
        patience=arguments.patience,
        overwrite=arguments.overwrite,
        restart=arguments.restart,
        quiet=arguments.quiet,
    )


def int_between(low: int, high: int | None = None) -> Callable[[str], int]:
    """Return a parser for argparse of an integer from `low` to `high`, both included; `high` None is no limit."""

    def parse(text: str) -> int:
        value = int(text) if text.isascii() and text.isdigit() else -1
        if value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"must be a whole number, {low} {'or more' if high is None else f'to {high}'}")
        return value

    return parse


def seconds(text: str) -> float:
    """Parse a finite number of seconds, 0 or more."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError("must be a number of seconds")
    return value


def text(given: str) -> str:
    """Return the argument as it is, or refuse it if it is not UTF-8: neither a request nor the journal can hold that."""
    if given.encode("utf-8", "replace").decode() != given:
        raise argparse.ArgumentTypeError("is not valid UTF-8 text")
    return given


def one_character(given: str) -> str:
    r"""Parse the delimiter of a CSV: a single character, or `\t` for a tab."""
    character = "\t" if given == r"\t" else text(given)
    if len(character) != 1 or character in '\r\n"':
        raise argparse.ArgumentTypeError("must be one character")
    return character
