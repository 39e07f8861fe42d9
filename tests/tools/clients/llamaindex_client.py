"""llama-index-embeddings-openai-like, as its users use it."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
from llama_index.core import VectorStoreIndex
from llama_index.core.schema import TextNode
from llama_index.embeddings.openai_like import OpenAILikeEmbedding

from tests.tools.clients import trial
from tests.tools.clients.trial import API_KEY, INSTRUCTION, MODEL, TEXT, TEXTS, Vector

# What the package makes of a text before it is sent.
SENT = [text.replace("\n", " ") for text in TEXTS]


def embedding(url: str = trial.BASE_URL, key: str = API_KEY, **options: Any) -> OpenAILikeEmbedding:
    return OpenAILikeEmbedding(**{"model_name": MODEL, "api_base": f"{url}/v1", "api_key": key, **options})


def text(**options: Any) -> list[Vector]:
    return [embedding(**options).get_text_embedding(TEXT)]


def found() -> list[str]:
    index = VectorStoreIndex([TextNode(text=text) for text in TEXTS], embed_model=embedding())
    retriever = index.as_retriever(similarity_top_k=1)
    return [hit.text for text in TEXTS for hit in retriever.retrieve(text)]


documents = trial.many(105)
extra_body = {"extra_body": {"instruction": INSTRUCTION}}

trial.vectors("get_text_embedding", {"input": TEXT}, text)
trial.vectors("get_query_embedding", {"input": TEXT}, lambda: [embedding().get_query_embedding(TEXT)])
trial.vectors("a batch, its line breaks sent as spaces", {"input": SENT}, lambda: embedding().get_text_embedding_batch(TEXTS))
trial.vectors("105 texts in batches of 10", {"input": documents}, lambda: embedding().get_text_embedding_batch(documents))
trial.vectors(
    "105 texts in one batch",
    {"input": documents},
    lambda: embedding(embed_batch_size=2048).get_text_embedding_batch(documents),
)
trial.vectors("aget_text_embedding", {"input": TEXT}, lambda: [asyncio.run(embedding().aget_text_embedding(TEXT))])
trial.vectors("aget_query_embedding", {"input": TEXT}, lambda: [asyncio.run(embedding().aget_query_embedding(TEXT))])
trial.vectors("105 texts, async", {"input": documents}, lambda: asyncio.run(embedding().aget_text_embedding_batch(documents)))
trial.vectors(
    "105 texts, async with 4 workers",
    {"input": documents},
    lambda: asyncio.run(embedding(num_workers=4).aget_text_embedding_batch(documents)),
)
trial.vectors("the empty text", {"input": ""}, lambda: [embedding().get_text_embedding("")])
trial.vectors("dimensions", {"input": TEXT, "dimensions": 8}, lambda: text(dimensions=8))
trial.vectors("float", {"input": TEXT}, lambda: text(additional_kwargs={"encoding_format": "float"}))
trial.vectors(
    "an instruction in additional_kwargs",
    {"input": TEXT, "instruction": INSTRUCTION},
    lambda: [embedding(additional_kwargs=extra_body).get_query_embedding(TEXT)],
)
trial.value("a VectorStoreIndex finds each text", TEXTS, found)
trial.refusal(
    "a wrong key",
    {"input": TEXT},
    openai.AuthenticationError,
    lambda: text(key=trial.WRONG_KEY),
    key=trial.WRONG_KEY,
)
trial.refusal("another model", {"input": TEXT, "model": "other"}, openai.NotFoundError, lambda: text(model_name="other"))
trial.refusal(
    "a deadline of the server's",
    {"input": TEXT},
    openai.InternalServerError,
    lambda: text(url=trial.SLOW_URL, max_retries=0, default_headers=trial.DEADLINE),
    url=trial.SLOW_URL,
    headers=trial.DEADLINE,
)
trial.timeout(openai.APITimeoutError, lambda: text(url=trial.SLOW_URL, max_retries=1, timeout=trial.TIMEOUT_S))
trial.overload({"input": TEXT}, openai.RateLimitError, lambda retries: text(url=trial.FULL_URL, max_retries=retries))
trial.draining({"input": TEXT}, openai.InternalServerError, lambda: text(url=trial.DRAINING_URL, max_retries=1))
