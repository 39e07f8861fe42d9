"""langchain-openai, as its users use it."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import openai
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_openai import OpenAIEmbeddings
from pydantic import SecretStr

from tests.tools.clients import trial
from tests.tools.clients.trial import API_KEY, INSTRUCTION, MODEL, PHOTO, TEXT, TEXTS, Vector


def embeddings(url: str = trial.BASE_URL, key: str = API_KEY, **options: Any) -> OpenAIEmbeddings:
    given = {"model": MODEL, "check_embedding_ctx_length": False, **options}
    return OpenAIEmbeddings(base_url=f"{url}/v1", api_key=SecretStr(key), **given)


def query(text: str = TEXT, **options: Any) -> list[Vector]:
    return [embeddings(**options).embed_query(text)]


def with_its_default(**options: Any) -> OpenAIEmbeddings:
    """It makes token ids of texts by itself."""
    return embeddings(check_embedding_ctx_length=True, **options)


def names_the_way_out() -> bool:
    try:
        with_its_default().embed_documents(TEXTS)
    except openai.BadRequestError as error:
        return "check_embedding_ctx_length=False" in str(error)
    return False


def found() -> list[str]:
    store = InMemoryVectorStore.from_texts(TEXTS, embeddings())
    return [document.page_content for text in TEXTS for document in store.similarity_search(text, k=1)]


documents = trial.many(1050)
photo = "data:image/jpeg;base64," + base64.b64encode(PHOTO.read_bytes()).decode()
extra_body = {"extra_body": {"instruction": INSTRUCTION}}

trial.vectors("embed_query", {"input": TEXT}, query)
trial.vectors("embed_documents", {"input": TEXTS}, lambda: embeddings().embed_documents(TEXTS))
trial.vectors("1,050 documents in chunks of 1,000", {"input": documents}, lambda: embeddings().embed_documents(documents))
trial.vectors("chunks of 2", {"input": TEXTS}, lambda: embeddings().embed_documents(TEXTS, chunk_size=2))
trial.vectors("aembed_query", {"input": TEXT}, lambda: [asyncio.run(embeddings().aembed_query(TEXT))])
trial.vectors("aembed_documents", {"input": TEXTS}, lambda: asyncio.run(embeddings(chunk_size=2).aembed_documents(TEXTS)))
trial.vectors("the empty text", {"input": ""}, lambda: query(""))
trial.vectors("dimensions", {"input": TEXT, "dimensions": 8}, lambda: query(dimensions=8))
trial.vectors("float", {"input": TEXT}, lambda: query(model_kwargs={"encoding_format": "float"}))
trial.vectors("an image", {"input": [photo]}, lambda: embeddings().embed_documents([photo]))
trial.vectors(
    "an instruction in model_kwargs",
    {"input": TEXT, "instruction": INSTRUCTION},
    lambda: query(model_kwargs=extra_body),
)
trial.value("a vector store finds each text", TEXTS, found)
trial.refusal("its default: token ids", {"input": [[1, 2]]}, openai.BadRequestError, lambda: with_its_default().embed_query(TEXT))
trial.refusal(
    "its default, async",
    {"input": [[1, 2]]},
    openai.BadRequestError,
    lambda: asyncio.run(with_its_default().aembed_documents(TEXTS)),
)
trial.value("its default: the message names the way out", True, names_the_way_out)
trial.refusal(
    "a wrong key",
    {"input": TEXT},
    openai.AuthenticationError,
    lambda: query(key=trial.WRONG_KEY),
    key=trial.WRONG_KEY,
)
trial.refusal("another model", {"input": TEXT, "model": "other"}, openai.NotFoundError, lambda: query(model="other"))
trial.refusal(
    "a deadline of the server's",
    {"input": TEXT},
    openai.InternalServerError,
    lambda: query(url=trial.SLOW_URL, max_retries=0, default_headers=trial.DEADLINE),
    url=trial.SLOW_URL,
    headers=trial.DEADLINE,
)
trial.timeout(openai.APITimeoutError, lambda: query(url=trial.SLOW_URL, max_retries=1, timeout=trial.TIMEOUT_S))
trial.overload({"input": TEXT}, openai.RateLimitError, lambda retries: query(url=trial.FULL_URL, max_retries=retries))
trial.draining({"input": TEXT}, openai.InternalServerError, lambda: query(url=trial.DRAINING_URL, max_retries=1))
