"""litellm, as its users use it."""

from __future__ import annotations

import array
import asyncio
import base64
from typing import Any

import litellm

from tests.tools.clients import trial
from tests.tools.clients.trial import API_KEY, INSTRUCTION, MODEL, PHOTO, PHOTO_URL, TEXT, TEXTS, Vector


def given(url: str = trial.BASE_URL, **options: Any) -> dict[str, Any]:
    return {"model": f"openai/{MODEL}", "api_base": f"{url}/v1", "api_key": API_KEY, **options}


def rows(reply: Any) -> list[Vector]:
    return [row["embedding"] for row in reply.data]


def embed(texts: Any = TEXT, **options: Any) -> list[Vector]:
    # Of a text alone it makes a list.
    return rows(litellm.embedding(input=texts, **given(**options)))


async def asynchronous() -> list[Vector]:
    replies = await asyncio.gather(*(litellm.aembedding(input=text, **given()) for text in trial.many(50)))
    return [vector for reply in replies for vector in rows(reply)]


def in_base64() -> list[Vector]:
    encoded: list[Any] = embed(TEXTS, encoding_format="base64")
    return [array.array("f", base64.b64decode(row)).tolist() for row in encoded]


def routed() -> list[Vector]:
    """By the router, which has a list of models and names of its own for them."""
    router = litellm.Router(model_list=[{"model_name": "mine", "litellm_params": given()}])
    return rows(router.embedding(model="mine", input=TEXTS))


photo = "data:image/jpeg;base64," + base64.b64encode(PHOTO.read_bytes()).decode()
images = [photo, {"image": PHOTO_URL}, {"image": photo, "text": TEXT}]

trial.vectors("a text", {"input": TEXT}, embed)
trial.vectors("a list", {"input": TEXTS}, lambda: embed(TEXTS))
trial.vectors("1,050 texts", {"input": trial.many(1050)}, lambda: embed(trial.many(1050)))
trial.vectors("50 requests at once, async", {"input": trial.many(50)}, lambda: asyncio.run(asynchronous()))
trial.vectors("custom_llm_provider", {"input": TEXTS}, lambda: embed(TEXTS, model=MODEL, custom_llm_provider="openai"))
trial.vectors("the model's id", {"input": TEXT}, lambda: embed(model=f"openai/Qwen/{MODEL}"))
trial.vectors("provider hosted_vllm", {"input": TEXTS}, lambda: embed(TEXTS, model=f"hosted_vllm/{MODEL}"))
trial.vectors("a Router", {"input": TEXTS}, routed)
trial.vectors("float", {"input": TEXTS}, lambda: embed(TEXTS, encoding_format="float"))
trial.vectors("base64, not decoded", {"input": TEXTS}, in_base64)
trial.vectors("the empty text", {"input": ""}, lambda: embed(""))
trial.vectors(
    "dimensions, with allowed_openai_params",
    {"input": TEXT, "dimensions": 8},
    lambda: embed(dimensions=8, allowed_openai_params=["dimensions"]),
)
trial.vectors("an instruction", {"input": TEXTS, "instruction": INSTRUCTION}, lambda: embed(TEXTS, instruction=INSTRUCTION))
trial.vectors("images, and fused with a text", {"input": images}, lambda: embed(images))
trial.tokens("usage", {"input": TEXTS}, lambda: litellm.embedding(input=TEXTS, **given()).usage.prompt_tokens)
trial.refusal(
    "a wrong key",
    {"input": TEXT},
    litellm.AuthenticationError,
    lambda: embed(api_key=trial.WRONG_KEY),
    key=trial.WRONG_KEY,
)
trial.refusal("another model", {"input": TEXT, "model": "other"}, litellm.NotFoundError, lambda: embed(model="openai/other"))
trial.refusal("token ids", {"input": [[1, 2]]}, litellm.BadRequestError, lambda: embed([[1, 2]]))
trial.refusal("an empty list", {"input": []}, litellm.BadRequestError, lambda: embed([]))
trial.refusal(
    "a deadline of the server's",
    {"input": TEXT},
    litellm.Timeout,
    lambda: embed(url=trial.SLOW_URL, max_retries=1, extra_headers=trial.DEADLINE),
    url=trial.SLOW_URL,
    headers=trial.DEADLINE,
)
trial.timeout(litellm.Timeout, lambda: embed(url=trial.SLOW_URL, max_retries=1, timeout=trial.TIMEOUT_S))
trial.overload({"input": TEXT}, litellm.RateLimitError, lambda retries: embed(url=trial.FULL_URL, max_retries=retries))
trial.draining({"input": TEXT}, litellm.ServiceUnavailableError, lambda: embed(url=trial.DRAINING_URL, max_retries=1))
