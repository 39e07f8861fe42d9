"""Records -> items as the API's `input` takes them. Columns are chosen here, and images that are named by a path are read.

An image is a string as in the API, or the path of a file. The rule that tells them apart: what begins with a scheme (`https:`,
`data:`) is a URL, else what holds a dot is a path, for base64 has none; the rest is base64.
"""

from __future__ import annotations

import base64
import os
import re
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from app.bulk.ending import refused
from app.bulk.rows import BadRow, Id
from app.dialects.items import ITEM_KEYS

_SCHEME = re.compile(r"\s*[A-Za-z][A-Za-z0-9+.-]*:")
# Messages in a list, their content in a list, and a part in it.
_DEPTH = 3


@dataclass(frozen=True, slots=True)
class Columns:
    """Names of columns, or of an object's keys; None is `text`, `image`, `instruction` or `id`, where that is there."""

    text: str | None = None
    image: str | None = None
    instruction: str | None = None
    id: str | None = None

    @property
    def are_chosen(self) -> bool:
        """Whether a row's item is to be made of columns, though it may be one as it stands."""
        return self.text is not None or self.image is not None or self.instruction is not None

    def found_in(self, names: Sequence[str], what: str) -> Columns:
        """The columns of a table that has `names`, None for what it has not. Raises Stopped where those are not enough."""
        missing = [name for name in (self.text, self.image, self.instruction, self.id) if name is not None and name not in names]
        if missing:
            raise refused(f"{what} has no column {missing[0]!r}; it has {', '.join(map(repr, names))}")

        def found(chosen: str | None, default: str) -> str | None:
            return chosen or (default if default in names else None)

        def unique(name: str | None) -> str | None:
            if name is not None and names.count(name) > 1:
                raise refused(f"{what} has more than one column {name!r}")
            return name

        # Who chooses one of the two wants that one, and not what else is called text or image.
        text = found(self.text, "text") if self.text or not self.image else None
        image = found(self.image, "image") if self.image or not self.text else None
        if text is None and image is None:
            raise refused(
                f"{what} has neither a column 'text' nor one 'image', but {', '.join(map(repr, names))}; choose with "
                "--text-column or --image-column"
            )
        chosen = Columns(text, image, found(self.instruction, "instruction"), found(self.id, "id"))
        return Columns(*map(unique, (chosen.text, chosen.image, chosen.instruction, chosen.id)))


class ImageFiles:
    """Images that lie in files, at most `max_bytes` each; relative paths begin in `base`."""

    def __init__(self, base: Path, max_bytes: int) -> None:
        self._base = base
        self._max_bytes = max_bytes

    def resolved(self, image: str) -> str:
        """An image as the API takes it. Raises BadRow."""
        return image if _SCHEME.match(image) or "." not in image else self.read(image)

    def read(self, path: str) -> str:
        """A file in base64. Raises BadRow."""
        try:
            # Non-blocking: a pipe without a writer would hold up the run for ever.
            descriptor = os.open(self._base / path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            with open(descriptor, "rb") as file:
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    raise BadRow("image is no file", "image")
                return self.encoded(file.read(self._max_bytes + 1))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "it is no path"
            raise BadRow(f"image file cannot be read: {reason}", "image") from None

    def encoded(self, data: bytes) -> str:
        """A file's bytes in base64. Raises BadRow."""
        if len(data) > self._max_bytes:
            raise BadRow(f"image is larger than {self._max_bytes} bytes, which is the limit", "image")
        return base64.b64encode(data).decode()


def item_of(value: Any, files: ImageFiles) -> bytes:
    """The JSON of what stands in a line: an item of the API, its keys alone. Raises BadRow."""
    if isinstance(value, dict):
        value = {key: held for key, held in value.items() if key in ITEM_KEYS}
        if value.get("role") is not None:
            # Messages of several rows in one request would be one conversation.
            value = [value]
    return _dumped(_with_files(value, files.resolved, _DEPTH))


def item_of_record(record: Mapping[str, Any], columns: Columns, files: ImageFiles) -> bytes:
    """The JSON of a record's text and image, fused where it has both, under its instruction. Raises BadRow."""
    item: dict[str, Any] = {}
    if columns.text is not None and (text := record.get(columns.text)) is not None:
        item["text"] = text
    if columns.image is not None and (image := record.get(columns.image)) is not None:
        item["image"] = [_image(one, files) for one in image] if isinstance(image, list) else _image(image, files)
    if not item:
        raise BadRow("the row has neither a text nor an image")
    if columns.instruction is not None and (instruction := record.get(columns.instruction)) is not None:
        item["instruction"] = instruction
    return _dumped(item)


def id_of(value: Any) -> Id:
    """Raises BadRow."""
    if value is None or isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise BadRow("id must be a string or a whole number", "id")


def _image(cell: Any, files: ImageFiles) -> Any:
    """A cell of an image column: a file's bytes, a string, or `{"bytes", "path"}` as Hugging Face datasets have it."""
    if isinstance(cell, Mapping) and {"bytes", "path"} & cell.keys():
        if (data := cell.get("bytes")) is not None:
            if not isinstance(data, bytes):
                raise BadRow("image.bytes holds no bytes", "image")
            return files.encoded(data)
        if not isinstance(cell.get("path"), str):
            raise BadRow("image has neither bytes nor a path", "image")
        return files.read(cell["path"])
    if isinstance(cell, bytes):
        return files.encoded(cell)
    return files.resolved(cell) if isinstance(cell, str) else cell


def _with_files(value: Any, resolve: Callable[[str], str], depth: int) -> Any:
    """The item with base64 in place of the paths that name its images."""
    if isinstance(value, list) and depth:
        return [_with_files(element, resolve, depth - 1) for element in value]
    if not isinstance(value, dict):
        return value
    changed = dict(value)
    for key in ("image", "image_url", *(("data",) if value.get("type") == "image" else ())):
        if key in value:
            changed[key] = _place(value[key], resolve)
    if isinstance(value.get("content"), list) and depth:
        changed["content"] = _with_files(value["content"], resolve, depth - 1)
    return changed


def _place(image: Any, resolve: Callable[[str], str]) -> Any:
    if isinstance(image, str):
        return resolve(image)
    if isinstance(image, list):
        return [one if isinstance(one, list) else _place(one, resolve) for one in image]
    if isinstance(image, dict) and isinstance(image.get("url"), str):
        return {"url": resolve(image["url"])}
    return image


def _dumped(item: Any) -> bytes:
    try:
        return orjson.dumps(item)
    except TypeError as error:
        what = "not valid UTF-8 text" if "UTF-8" in str(error) else f"of no type that JSON has ({error})"
        raise BadRow(f"the row is {what}") from None
