"""The openai package, as its users use it."""

from __future__ import annotations

import array
import asyncio
import base64
from typing import Any

import openai

from tests.tools.clients import trial
from tests.tools.clients.trial import API_KEY, MODEL, PHOTO, PHOTO_URL, TEXT, TEXTS, Vector


def client(url: str = trial.BASE_URL, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(**{"base_url": f"{url}/v1", "api_key": API_KEY, **options})


def rows(reply: Any) -> list[Vector]:
    return [row.embedding for row in reply.data]


def create(given: Any, asked: openai.OpenAI | None = None, **options: Any) -> list[Vector]:
    return rows((asked or client()).embeddings.create(**{"model": MODEL, "input": given, **options}))


def in_base64() -> list[Vector]:
    encoded: list[Any] = create(TEXTS, encoding_format="base64")
    return [array.array("f", base64.b64decode(row)).tolist() for row in encoded]


async def asynchronous() -> list[Vector]:
    """Requests side by side on one connection pool."""
    async with openai.AsyncOpenAI(base_url=f"{trial.BASE_URL}/v1", api_key=API_KEY) as asked:
        replies = await asyncio.gather(*(asked.embeddings.create(model=MODEL, input=text) for text in trial.many(50)))
    return [vector for reply in replies for vector in rows(reply)]


async def refused_asynchronously() -> None:
    async with openai.AsyncOpenAI(base_url=f"{trial.BASE_URL}/v1", api_key=trial.WRONG_KEY) as asked:
        await asked.embeddings.create(model=MODEL, input=TEXT)


def headers() -> list[Any]:
    raw = client().embeddings.with_raw_response.create(model=MODEL, input=TEXT, extra_headers={"X-Request-Id": "mine"})
    return [raw.request_id, "device" in raw.headers["Server-Timing"], len(raw.headers["X-Model-Fingerprint"])]


def partial() -> list[Any]:
    reply = client().embeddings.create(model=MODEL, input=[TEXT, {"image": "no image"}], extra_body={"partial": True})  # type: ignore[list-item]
    return [[row.embedding is not None, bool(getattr(row, "error", None))] for row in reply.data]


photo = "data:image/jpeg;base64," + base64.b64encode(PHOTO.read_bytes()).decode()
images = [photo, {"image": PHOTO_URL}, {"image": photo, "text": TEXT}]

trial.vectors("a text", {"input": TEXT}, lambda: create(TEXT))
trial.vectors("a list, in base64 by default", {"input": TEXTS}, lambda: create(TEXTS))
trial.vectors("float", {"input": TEXTS}, lambda: create(TEXTS, encoding_format="float"))
trial.vectors("base64, not decoded", {"input": TEXTS}, in_base64)
trial.vectors("the empty text", {"input": ""}, lambda: create(""))
trial.vectors("2,048 texts", {"input": trial.many(2048)}, lambda: create(trial.many(2048)))
trial.vectors("50 requests at once, async", {"input": trial.many(50)}, lambda: asyncio.run(asynchronous()))
trial.vectors("dimensions", {"input": TEXTS, "dimensions": 8}, lambda: create(TEXTS, dimensions=8))
trial.vectors("the model's id", {"input": TEXT}, lambda: create(TEXT, model=f"Qwen/{MODEL}"))
trial.vectors("images, and fused with a text", {"input": images}, lambda: create(images))
trial.vectors(
    "an instruction in extra_body",
    {"input": TEXTS, "instruction": trial.INSTRUCTION},
    lambda: create(TEXTS, extra_body={"instruction": trial.INSTRUCTION}),
)
trial.value("partial in extra_body", [[True, False], [False, True]], partial)
trial.value("raw response headers", ["mine", True, 16], headers)
trial.value("the list of models", [MODEL], lambda: [row.id for row in client().models.list()])
trial.tokens("usage", {"input": TEXTS}, lambda: client().embeddings.create(model=MODEL, input=TEXTS).usage.prompt_tokens)
trial.refusal(
    "a wrong key",
    {"input": TEXT},
    openai.AuthenticationError,
    lambda: create(TEXT, client(api_key=trial.WRONG_KEY)),
    key=trial.WRONG_KEY,
)
trial.refusal(
    "a wrong key, async",
    {"input": TEXT},
    openai.AuthenticationError,
    lambda: asyncio.run(refused_asynchronously()),
    key=trial.WRONG_KEY,
)
trial.refusal("another model", {"input": TEXT, "model": "other"}, openai.NotFoundError, lambda: create(TEXT, model="other"))
trial.refusal("2,049 texts", {"input": trial.many(2049)}, openai.BadRequestError, lambda: create(trial.many(2049)))
trial.refusal("an empty list", {"input": []}, openai.BadRequestError, lambda: create([]))
trial.refusal("token ids", {"input": [[1, 2]]}, openai.BadRequestError, lambda: create([[1, 2]]))
trial.refusal(
    "a base URL without /v1",
    {"input": TEXT},
    openai.NotFoundError,
    lambda: create(TEXT, client(base_url=trial.BASE_URL)),
    path="/embeddings",
)
trial.refusal(
    "a deadline of the server's",
    {"input": TEXT},
    openai.InternalServerError,
    lambda: create(TEXT, client(trial.SLOW_URL, max_retries=0), extra_headers=trial.DEADLINE),
    url=trial.SLOW_URL,
    headers=trial.DEADLINE,
)
trial.timeout(openai.APITimeoutError, lambda: create(TEXT, client(trial.SLOW_URL, max_retries=1, timeout=trial.TIMEOUT_S)))
trial.overload({"input": TEXT}, openai.RateLimitError, lambda retries: create(TEXT, client(trial.FULL_URL, max_retries=retries)))
trial.draining({"input": TEXT}, openai.InternalServerError, lambda: create(TEXT, client(trial.DRAINING_URL, max_retries=1)))
