"""Vectors -> the bytes of a reply."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import orjson

from app.engine.service import Usage
from app.errors import error_object

Row = npt.NDArray[np.float32] | Exception


def embeddings_body(rows: Sequence[Row], usage: Usage, model: str, encoding: Literal["float", "base64"]) -> bytes:
    """The body of a reply: a vector, float32 of shape (dimension,), or an error for each input, in order.

    Written row by row: a C call that writes thousands of vectors would hold the interpreter's lock for as long.
    """
    data = b",".join(_row(index, row, encoding) for index, row in enumerate(rows))
    counts = {
        "prompt_tokens": usage.total,
        "total_tokens": usage.total,
        "prompt_tokens_details": {"text_tokens": usage.text_tokens, "image_tokens": usage.image_tokens},
    }
    return b'{"object":"list","model":%b,"data":[%b],"usage":%b}' % (orjson.dumps(model), data, orjson.dumps(counts))


def _row(index: int, row: Row, encoding: Literal["float", "base64"]) -> bytes:
    if isinstance(row, Exception):
        return orjson.dumps({"object": "embedding", "index": index, "embedding": None, "error": error_object(row)})
    if encoding == "base64":
        vector = b'"%b"' % base64.b64encode(np.ascontiguousarray(row, dtype="<f4").data)
    else:
        vector = orjson.dumps(np.ascontiguousarray(row), option=orjson.OPT_SERIALIZE_NUMPY)
    return b'{"object":"embedding","index":%d,"embedding":%b}' % (index, vector)
