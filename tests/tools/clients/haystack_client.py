"""haystack-ai, as its users use it."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
from haystack import Document, Pipeline
from haystack.components.embedders import OpenAIDocumentEmbedder, OpenAITextEmbedder
from haystack.components.retrievers import InMemoryEmbeddingRetriever
from haystack.components.writers import DocumentWriter
from haystack.document_stores.in_memory import InMemoryDocumentStore
from haystack.utils import Secret

from tests.tools.clients import trial
from tests.tools.clients.trial import API_KEY, MODEL, TEXT, TEXTS, Vector


def given(url: str = trial.BASE_URL, key: str = API_KEY, **options: Any) -> dict[str, Any]:
    return {"model": MODEL, "api_base_url": f"{url}/v1", "api_key": Secret.from_token(key), **options}


def text(content: str = TEXT, **options: Any) -> list[Vector]:
    return [OpenAITextEmbedder(**given(**options)).run(content)["embedding"]]


def embedder(**options: Any) -> OpenAIDocumentEmbedder:
    return OpenAIDocumentEmbedder(**given(**{"progress_bar": False, "raise_on_failure": True, **options}))


def documents(texts: list[str], **options: Any) -> list[Vector]:
    embedded = embedder(**options).run([Document(content=text) for text in texts])["documents"]
    return [document.embedding for document in embedded]


def titled() -> list[Vector]:
    written = [Document(content=text, meta={"title": f"title {index}"}) for index, text in enumerate(TEXTS)]
    embedded = embedder(meta_fields_to_embed=["title"], embedding_separator=" | ", prefix="passage: ").run(written)
    return [document.embedding for document in embedded["documents"]]


async def asynchronous() -> list[Vector]:
    embedded = await embedder(batch_size=16).run_async([Document(content=text) for text in trial.many(70)])
    return [document.embedding for document in embedded["documents"]]


def left_out() -> list[Any]:
    """By default a batch that fails is logged, and its documents come back without a vector."""
    embedded = embedder(key=trial.WRONG_KEY, raise_on_failure=False).run([Document(content=TEXT)])["documents"]
    return [document.embedding for document in embedded]


def found() -> list[str]:
    """Two pipelines: one writes what it embeds, one searches it."""
    store = InMemoryDocumentStore(embedding_similarity_function="cosine")
    writing, asking = Pipeline(), Pipeline()
    writing.add_component("embedder", embedder())
    writing.add_component("writer", DocumentWriter(store))
    writing.connect("embedder", "writer")
    writing.run({"embedder": {"documents": [Document(content=text) for text in TEXTS]}})
    asking.add_component("embedder", OpenAITextEmbedder(**given()))
    asking.add_component("retriever", InMemoryEmbeddingRetriever(store, top_k=1))
    asking.connect("embedder.embedding", "retriever.query_embedding")
    hits = [asking.run({"embedder": {"text": text}})["retriever"]["documents"] for text in TEXTS]
    return [document.content for documents in hits for document in documents]


with_titles = [f"passage: title {index} | {text}" for index, text in enumerate(TEXTS)]

trial.vectors("OpenAITextEmbedder", {"input": TEXT}, text)
trial.vectors("prefix and suffix", {"input": f"query: {TEXT} end"}, lambda: text(prefix="query: ", suffix=" end"))
trial.vectors(
    "OpenAITextEmbedder, async",
    {"input": TEXT},
    lambda: [asyncio.run(OpenAITextEmbedder(**given()).run_async(TEXT))["embedding"]],
)
trial.vectors("the empty text", {"input": ""}, lambda: text(""))
trial.vectors("dimensions", {"input": TEXT, "dimensions": 8}, lambda: text(dimensions=8))
trial.vectors("OpenAIDocumentEmbedder", {"input": TEXTS}, lambda: documents(TEXTS))
trial.vectors("70 documents in batches of 32", {"input": trial.many(70)}, lambda: documents(trial.many(70)))
trial.vectors("70 documents in one", {"input": trial.many(70)}, lambda: documents(trial.many(70), batch_size=2048))
trial.vectors("70 documents, async", {"input": trial.many(70)}, lambda: asyncio.run(asynchronous()))
trial.vectors("meta fields, separator and prefix", {"input": with_titles}, titled)
trial.tokens(
    "usage over batches",
    {"input": trial.many(70)},
    lambda: embedder().run([Document(content=text) for text in trial.many(70)])["meta"]["usage"]["prompt_tokens"],
)
trial.value("a pipeline finds each text", TEXTS, found)
trial.value("its default: a batch that fails has no vectors", [None], left_out)
trial.refusal(
    "a wrong key",
    {"input": TEXT},
    openai.AuthenticationError,
    lambda: text(key=trial.WRONG_KEY),
    key=trial.WRONG_KEY,
)
trial.refusal(
    "a wrong key, with raise_on_failure",
    {"input": TEXT},
    openai.AuthenticationError,
    lambda: documents(TEXTS, key=trial.WRONG_KEY),
    key=trial.WRONG_KEY,
)
trial.refusal("another model", {"input": TEXT, "model": "other"}, openai.NotFoundError, lambda: text(model="other"))
trial.timeout(openai.APITimeoutError, lambda: text(url=trial.SLOW_URL, max_retries=1, timeout=trial.TIMEOUT_S))
trial.overload({"input": TEXT}, openai.RateLimitError, lambda retries: text(url=trial.FULL_URL, max_retries=retries))
trial.draining({"input": TEXT}, openai.InternalServerError, lambda: text(url=trial.DRAINING_URL, max_retries=1))
