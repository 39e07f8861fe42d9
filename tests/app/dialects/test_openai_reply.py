"""app.dialects.openai: the bytes of a reply, compared with what a JSON library makes of the same."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import orjson
import pytest

from app.dialects.contract import EmbeddingRequest, Failure, Reply, Usage
from app.dialects.openai import write

USAGE = Usage(text_tokens=3, image_tokens=4)
ROWS = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)


def embeddings_body(rows: Sequence[npt.NDArray[np.float32] | Failure], model: str, encoding: Literal["float", "base64"]) -> bytes:
    request = EmbeddingRequest((), None, 512, truncate=False, partial=True, encoding_format=encoding)
    return write(Reply(request, rows, USAGE, model))


def test_reply_floats_come_back_bit_by_bit() -> None:
    extremes = np.array([1e-45, -0.0, 1.0, 3.4028235e38, 1 / 3], dtype=np.float32)
    body = orjson.loads(embeddings_body([*ROWS, extremes], "model", "float"))
    assert [row["index"] for row in body["data"]] == [0, 1, 2, 3]
    for row, wanted in zip(body["data"], [*ROWS, extremes], strict=True):
        assert np.array(row["embedding"], dtype=np.float32).tobytes() == wanted.tobytes()


@pytest.mark.parametrize("encoding", ["float", "base64"])
@pytest.mark.parametrize("row", [ROWS[:, ::2][0], np.asfortranarray(ROWS)[1], ROWS[0].astype(">f4").astype("<f4")])
def test_reply_rows_of_any_memory_layout(encoding: str, row: np.ndarray) -> None:
    got = orjson.loads(embeddings_body([row], "model", encoding))["data"][0]["embedding"]  # type: ignore[arg-type]
    vector = np.frombuffer(base64.b64decode(got), "<f4") if encoding == "base64" else np.array(got, np.float32)
    assert vector.tolist() == row.tolist()


def test_reply_base64_is_little_endian_whatever_the_machine() -> None:
    row = np.array([1.0], dtype=np.float32)
    body = orjson.loads(embeddings_body([row.astype(">f4")], "model", "base64"))
    assert base64.b64decode(body["data"][0]["embedding"]) == b"\x00\x00\x80\x3f"


def test_reply_faults_stand_in_their_rows() -> None:
    body = orjson.loads(embeddings_body([ROWS[0], Failure(400, "m", param="input[1]")], "model", "base64"))
    assert body["data"][1] == {
        "object": "embedding",
        "index": 1,
        "embedding": None,
        "error": {"message": "m", "type": "invalid_request_error", "param": "input[1]", "code": None},
    }


def test_reply_frame() -> None:
    body = orjson.loads(embeddings_body([], 'a "model" \\ ключ %s', "float"))
    assert body == {
        "object": "list",
        "model": 'a "model" \\ ключ %s',
        "data": [],
        "usage": {"prompt_tokens": 7, "total_tokens": 7, "prompt_tokens_details": {"text_tokens": 3, "image_tokens": 4}},
    }
