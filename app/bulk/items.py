"""Records -> items as the API's `input` takes them: chooses the columns, and reads the images that are given as paths.

An image is a string as in the API, or the path of a file. If it begins with a scheme (`https:`, `data:`), it is a URL; else, if
it has a dot, which base64 has not, it is a path; else it is base64.
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
# Lists may be nested as deep as the API nests them: a list of messages, a message's list of content, and a part in it.
_MAX_DEPTH = 3


@dataclass(frozen=True, slots=True)
class Columns:
    """Names of columns, or of an object's keys. None means the default of the same name, if the input has that."""

    text: str | None = None
    image: str | None = None
    instruction: str | None = None
    id: str | None = None

    @property
    def are_chosen(self) -> bool:
        """Whether the user named a column, so that an object is a record even if it would be an item of the API as it is."""
        return self.text is not None or self.image is not None or self.instruction is not None

    def find_in(self, names: Sequence[str], what: str) -> Columns:
        """Return the columns of a table that has `names`; in it None means that the table has no such column. Raises Stopped if a
        chosen column is missing or ambiguous, or if there is neither a text nor an image. `what` names the table in messages."""
        missing = [name for name in (self.text, self.image, self.instruction, self.id) if name is not None and name not in names]
        if missing:
            raise refused(f"{what} has no column {missing[0]!r}; it has {', '.join(map(repr, names))}")

        def found(chosen: str | None, default: str) -> str | None:
            return chosen or (default if default in names else None)

        def unique(name: str | None) -> str | None:
            if name is not None and names.count(name) > 1:
                raise refused(f"{what} has more than one column {name!r}")
            return name

        # If only one of --text-column and --image-column is given, the other's default is ignored.
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
    """Reads images from files of at most `max_bytes` each. Relative paths begin in `base`."""

    def __init__(self, base: Path, max_bytes: int) -> None:
        self._base = base
        self._max_bytes = max_bytes

    def resolve(self, image: str) -> str:
        """Return an image as the API takes it: a URL or base64 as it is, the file at a path in base64. Raises BadRow."""
        return image if _SCHEME.match(image) or "." not in image else self.read(image)

    def read(self, path: str) -> str:
        """Return a file in base64. Raises BadRow."""
        try:
            # Non-blocking, since opening a pipe without a writer would never return.
            descriptor = os.open(self._base / path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            with open(descriptor, "rb") as file:
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    raise BadRow("image is no file", "image")
                return self.encode(file.read(self._max_bytes + 1))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "it is no path"
            raise BadRow(f"image file cannot be read: {reason}", "image") from None

    def encode(self, data: bytes) -> str:
        """Return the bytes of an image in base64. Raises BadRow if there are too many."""
        if len(data) > self._max_bytes:
            raise BadRow(f"image is larger than {self._max_bytes} bytes, which is the limit", "image")
        return base64.b64encode(data).decode()


def item_of(value: Any, files: ImageFiles) -> bytes:
    """Return the JSON of an item of the API, without keys that are none of the API's. Raises BadRow."""
    if isinstance(value, dict):
        value = {key: held for key, held in value.items() if key in ITEM_KEYS}
        if value.get("role") is not None:
            # Messages of several rows in one request would be taken for one conversation.
            value = [value]
    return _to_json(_inline_images(value, files.resolve, _MAX_DEPTH))


def item_of_record(record: Mapping[str, Any], columns: Columns, files: ImageFiles) -> bytes:
    """Return the JSON of an item with a record's text, image and instruction, as far as it has them. Raises BadRow."""
    item: dict[str, Any] = {}
    if columns.text is not None and (text := record.get(columns.text)) is not None:
        item["text"] = text
    if columns.image is not None and (image := record.get(columns.image)) is not None:
        item["image"] = [_image(one, files) for one in image] if isinstance(image, list) else _image(image, files)
    if not item:
        raise BadRow("the row has neither a text nor an image")
    if columns.instruction is not None and (instruction := record.get(columns.instruction)) is not None:
        item["instruction"] = instruction
    return _to_json(item)


def id_of(value: Any) -> Id:
    """Return a row's id. Raises BadRow unless it is a string, an integer or None."""
    if value is None or isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise BadRow("id must be a string or a whole number", "id")


def _image(cell: Any, files: ImageFiles) -> Any:
    """Return the image in a cell: a file's bytes, a string, or `{"bytes", "path"}` as in Hugging Face datasets. Raises BadRow."""
    if isinstance(cell, Mapping) and {"bytes", "path"} & cell.keys():
        if (data := cell.get("bytes")) is not None:
            if not isinstance(data, bytes):
                raise BadRow("image.bytes holds no bytes", "image")
            return files.encode(data)
        if not isinstance(cell.get("path"), str):
            raise BadRow("image has neither bytes nor a path", "image")
        return files.read(cell["path"])
    if isinstance(cell, bytes):
        return files.encode(cell)
    return files.resolve(cell) if isinstance(cell, str) else cell


def _inline_images(value: Any, resolve: Callable[[str], str], depth: int) -> Any:
    """Return an item with `resolve(image)` in place of each image."""
    if isinstance(value, list) and depth:
        return [_inline_images(element, resolve, depth - 1) for element in value]
    if not isinstance(value, dict):
        return value
    changed = dict(value)
    for key in ("image", "image_url", *(("data",) if value.get("type") == "image" else ())):
        if key in value:
            changed[key] = _inline_image(value[key], resolve)
    if isinstance(value.get("content"), list) and depth:
        changed["content"] = _inline_images(value["content"], resolve, depth - 1)
    return changed


def _inline_image(image: Any, resolve: Callable[[str], str]) -> Any:
    if isinstance(image, str):
        return resolve(image)
    if isinstance(image, list):
        return [one if isinstance(one, list) else _inline_image(one, resolve) for one in image]
    if isinstance(image, dict) and isinstance(image.get("url"), str):
        return {"url": resolve(image["url"])}
    return image


def _to_json(item: Any) -> bytes:
    try:
        return orjson.dumps(item)
    except TypeError as error:
        what = "not valid UTF-8 text" if "UTF-8" in str(error) else f"of no type that JSON has ({error})"
        raise BadRow(f"the row is {what}") from None
