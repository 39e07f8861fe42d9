"""POST /v1/embeddings over HTTP: every form of an input gets the vector of what it says, and every field does what it says."""

from __future__ import annotations

import asyncio
import base64
import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from app.http.keys import SCHEDULER
from models.base import EmbeddingInput
from models.vectors import to_dimension
from tests.conftest import Client, Clock, Serve, until
from tests.support.fakes import FakeModel, vector_of
from tests.support.hosts import base64_of, data_uri, image_host, picture, png

CAT, DOG = picture(1), picture(2)
CAT_URI, DOG_URI = data_uri(CAT), data_uri(DOG)
B64 = base64_of(CAT)
VIDEO_URI = "data:video/mp4;base64,AAAA"
IDS = [101, 7592, 102]


def vectors(reply: Any) -> list[npt.NDArray[np.float32]]:
    return [np.array(row["embedding"], dtype=np.float32) for row in reply["data"]]


async def embed(client: Client, body: Any, **options: Any) -> Any:
    status, reply = await client.embed(body, **options)
    assert status == 200, reply
    return reply


async def refused(client: Client, body: Any, status: int = 400) -> dict[str, Any]:
    got, reply = await client.embed(body)
    assert got == status, reply
    assert set(reply) == {"error"}
    assert set(reply["error"]) == {"message", "type", "param", "code"}
    return reply["error"]


def same(got: npt.NDArray[np.float32], wanted: npt.NDArray[np.float32]) -> bool:
    return got.shape == wanted.shape and bool(np.array_equal(got, wanted))


# One item: (what it is called, the item, its parts, its instruction). Every form that an item may have is in
# tests/app/dialects/test_openai.py; here a few come the whole way.
ITEMS: list[tuple[str, Any, tuple[str | Image.Image, ...], str | None]] = [
    ("any script", "狗 🐕 собака\u0000\n", ("狗 🐕 собака\u0000\n",), None),
    ("string of a data URI", CAT_URI, (CAT,), None),
    ("base64 with white space", {"type": "image", "data": f" {B64[:9]}\n{B64[9:]}\r\n\t"}, (CAT,), None),
    ("wrong media type", {"type": "image", "data": CAT_URI.replace("png", "jpeg")}, (CAT,), None),
    ("lists: images first", {"text": ["a", "b"], "image": [CAT_URI, DOG_URI]}, (CAT, DOG, "a", "b"), None),
    (
        "content, parts in their order",
        {"content": ["a", {"type": "image", "image": CAT_URI}, {"type": "text", "text": "b"}], "instruction": "Find it."},
        ("a", CAT, "b"),
        "Find it.",
    ),
]
NAMED_ITEMS = [pytest.param(*row[1:], id=row[0]) for row in ITEMS]


@pytest.mark.parametrize(("item", "parts", "instruction"), NAMED_ITEMS)
async def test_an_item_bare_and_in_a_list(
    client: Client, fake: FakeModel, item: Any, parts: tuple[str | Image.Image, ...], instruction: str | None
) -> None:
    wanted = fake.vector(*parts, instruction=instruction)
    alone = await embed(client, {"input": item})
    listed = await embed(client, {"input": ["before", item, "after"]})
    assert [row["index"] for row in listed["data"]] == [0, 1, 2]
    assert same(vectors(alone)[0], wanted)
    assert same(vectors(listed)[1], wanted)


def test_the_pictures_differ() -> None:
    assert not same(FakeModel().vector(CAT), FakeModel().vector(DOG))


async def test_images_by_url(serve: Serve, fake: FakeModel) -> None:
    async with image_host(cat=png(CAT), dog=png(DOG)) as host:
        client = await serve(fake, image_url_allowed_hosts=frozenset({host.host}))
        cat, dog = host.url("/cat.png"), host.url("/dog.png")
        body = [
            {"type": "image_url", "image_url": {"url": cat}},
            {"type": "image", "data": dog},
            {"text": "and", "image": [dog, cat]},
            {"content": [{"type": "image", "image": cat}, "text"]},
        ]
        got = vectors(await embed(client, {"input": body}))
    wanted = [fake.vector(CAT), fake.vector(DOG), fake.vector(DOG, CAT, "and"), fake.vector(CAT, "text")]
    assert all(map(same, got, wanted))
    assert sorted(host.asked) == ["/cat.png"] * 3 + ["/dog.png"] * 2


async def test_images_of_every_mode_and_format(client: Client, fake: FakeModel) -> None:
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    grey = Image.new("L", (8, 8), 90)
    got = vectors(await embed(client, {"input": [data_uri(clear), data_uri(grey)]}))
    assert same(got[0], fake.vector(Image.new("RGB", (8, 8), (255, 255, 255))))
    assert same(got[1], fake.vector(Image.new("RGB", (8, 8), (90, 90, 90))))


USER = {"role": "user", "content": "a dog"}
CONVERSATIONS: list[tuple[str, list[Any], tuple[str | Image.Image, ...], str | None]] = [
    ("user", [USER], ("a dog",), None),
    ("system and user", [{"role": "system", "content": " Find it"}, USER], ("a dog",), " Find it"),
    ("system in parts", [{"role": "system", "content": [{"type": "text", "text": "Find it"}]}, USER], ("a dog",), "Find it"),
    ("empty assistant", [USER, {"role": "assistant", "content": ""}], ("a dog",), None),
    (
        "vLLM's own example",
        [
            {"role": "system", "content": [{"type": "text", "text": "Find it"}]},
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": CAT_URI}}, {"type": "text", "text": "a"}]},
            {"role": "assistant", "content": [{"type": "text", "text": ""}]},
        ],
        (CAT, "a"),
        "Find it",
    ),
]


@pytest.mark.parametrize(("messages", "parts", "instruction"), [pytest.param(*row[1:], id=row[0]) for row in CONVERSATIONS])
async def test_conversations(
    client: Client, fake: FakeModel, messages: Any, parts: tuple[str | Image.Image, ...], instruction: str | None
) -> None:
    wanted = fake.vector(*parts, instruction=instruction, verbatim=instruction is not None)
    flags = {"add_special_tokens": True, "continue_final_message": True}
    for body in ({"messages": messages, **flags}, {"input": messages}, {"input": [messages]}):
        got = vectors(await embed(client, body))
        assert len(got) == 1
        assert same(got[0], wanted)
    assert same(vectors(await embed(client, {"input": ["first", messages]}))[1], wanted)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "a dog",
        ["a dog"],
        [{"role": "system", "content": "Find it"}],
        [{"role": "assistant", "content": ""}],
        [USER, USER],
        [USER, {"role": "system", "content": "late"}],
        [USER, {"role": "assistant", "content": "an answer"}],
        [{"role": "tool", "content": "a dog"}],
        [{"role": "user"}],
        [{"role": "user", "content": []}],
        [{"role": "system", "content": [{"type": "image", "image": B64}]}, USER],
    ],
)
async def test_a_conversation_that_is_none(client: Client, messages: Any) -> None:
    error = await refused(client, {"messages": messages})
    assert error["type"] == "invalid_request_error"
    assert error["param"].startswith("messages")


async def test_a_user_message_without_content_is_refused_where_it_stands(client: Client) -> None:
    assert (await refused(client, {"input": ["a", [{"role": "user", "content": None}]]}))["param"] == "input[1][0].content"


async def test_the_reply_has_the_form_of_the_contract(client: Client) -> None:
    async with client.session.post("/v1/embeddings", json={"input": ["a", "bc"]}) as reply:
        assert reply.status == 200
        assert reply.content_type == "application/json"
        body = await reply.json()
    assert set(body) == {"object", "model", "data", "usage"}
    assert body["object"] == "list"
    assert body["model"] == "Qwen3-VL-Embedding-2B"
    assert all(set(row) == {"object", "index", "embedding"} and row["object"] == "embedding" for row in body["data"])
    assert all(abs(np.linalg.norm(vector) - 1) < 1e-6 for vector in vectors(body))


async def test_usage_counts_what_the_model_reads(client: Client) -> None:
    # The fake: a token per character, ten per image, and a template of four.
    usage = (await embed(client, {"input": ["abc", {"text": "ab", "image": [CAT_URI, DOG_URI]}, ""]}))["usage"]
    assert usage == {
        "prompt_tokens": 3 + 2 + 20 + 3 * 4,
        "total_tokens": 37,
        "prompt_tokens_details": {"text_tokens": 17, "image_tokens": 20},
    }


async def test_300_inputs_keep_their_order(client: Client, fake: FakeModel) -> None:
    inputs: list[Any] = [data_uri(picture(index)) if index % 50 == 7 else f"text {index}" for index in range(300)]
    parts = [picture(index) if index % 50 == 7 else f"text {index}" for index in range(300)]
    reply = await embed(client, {"input": inputs})
    assert [row["index"] for row in reply["data"]] == list(range(300))
    assert all(same(got, fake.vector(part)) for got, part in zip(vectors(reply), parts, strict=True))


async def test_200_concurrent_requests_each_get_their_own(client: Client, fake: FakeModel) -> None:
    async def one(index: int) -> bool:
        inputs = [f"{index} {row}" for row in range(index % 4 + 1)]
        got = vectors(await embed(client, {"input": inputs}))
        return len(got) == len(inputs) and all(same(row, fake.vector(text)) for row, text in zip(got, inputs, strict=True))

    assert all(await asyncio.gather(*(one(index) for index in range(200))))
    assert fake.embedded == 500


# Fields


async def test_instructions(client: Client, fake: FakeModel) -> None:
    body = {
        "instruction": "Of all.",
        "input": ["a", {"text": "a"}, {"text": "a", "instruction": "Own."}, [{"role": "system", "content": "Sys"}, USER], [USER]],
    }
    got = vectors(await embed(client, body))
    wanted = [
        fake.vector("a", instruction="Of all."),
        fake.vector("a", instruction="Of all."),
        fake.vector("a", instruction="Own."),
        fake.vector("a dog", instruction="Sys", verbatim=True),
        fake.vector("a dog", instruction="Of all."),
    ]
    assert all(map(same, got, wanted))


async def test_null_is_an_absent_field(client: Client, fake: FakeModel) -> None:
    nulls = dict.fromkeys(
        ("messages", "model", "instruction", "dimensions", "encoding_format", "truncate", "truncate_prompt_tokens", "modality")
    )
    body = {**nulls, "partial": None, "user": None, "input": {"text": "a", "image": None, "instruction": None, "type": None}}
    assert same(vectors(await embed(client, body))[0], fake.vector("a"))


async def test_unknown_fields_and_content_types_are_ignored(client: Client, fake: FakeModel) -> None:
    body = (
        b'{"input": "a", "add_special_tokens": 7, "continue_final_message": [], "input_type": {}, "nonsense": "x", "user": "me"}'
    )
    for content_type in ("text/plain", "application/x-www-form-urlencoded", "nonsense"):
        async with client.session.post("/v1/embeddings", data=body, headers={"Content-Type": content_type}) as reply:
            assert reply.status == 200
            assert same(vectors(await reply.json())[0], fake.vector("a"))


@pytest.mark.parametrize("name", ["Qwen3-VL-Embedding-2B", "Qwen/Qwen3-VL-Embedding-2B"])
async def test_model_names(client: Client, name: str) -> None:
    assert (await embed(client, {"input": "a", "model": name}))["model"] == "Qwen3-VL-Embedding-2B"


async def test_another_model(client: Client) -> None:
    error = await refused(client, {"input": "a", "model": "text-embedding-3-small"}, 404)
    assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", "model_not_found", "model")
    assert "text-embedding-3-small" not in error["message"]


@pytest.mark.parametrize("dimensions", [1, 5, 16])
async def test_dimensions_cut_and_normalise(client: Client, fake: FakeModel, dimensions: int) -> None:
    got = vectors(await embed(client, {"input": ["a", "b"], "dimensions": dimensions}))
    for row, text in zip(got, "ab", strict=True):
        cut = fake.vector(text)[:dimensions]
        np.testing.assert_allclose(row, cut / np.linalg.norm(cut), atol=1e-6)


@pytest.mark.parametrize("dimensions", [0, -1, 17, 1.0, True, "8", [8]])
async def test_dimensions_out_of_range(client: Client, dimensions: Any) -> None:
    assert (await refused(client, {"input": "a", "dimensions": dimensions}))["param"] == "dimensions"


async def test_embedding_dimension_smaller(serve: Serve, fake: FakeModel) -> None:
    client = await serve(fake, embedding_dimension=6)
    assert same(vectors(await embed(client, {"input": "a"}))[0], to_dimension(fake.vector("a")[None], 6)[0])
    assert vectors(await embed(client, {"input": "a", "dimensions": 4}))[0].shape == (4,)
    assert (await refused(client, {"input": "a", "dimensions": 7}))["param"] == "dimensions"


async def test_embedding_dimension_larger(serve: Serve, fake: FakeModel, caplog: pytest.LogCaptureFixture) -> None:
    client = await serve(fake, embedding_dimension=20)
    (warning,) = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert "EMBEDDING_DIMENSION=20" in warning
    assert "16" in warning
    whole = vectors(await embed(client, {"input": "a"}))[0]
    assert same(whole, np.concatenate([fake.vector("a"), np.zeros(4, np.float32)]))
    assert same(vectors(await embed(client, {"input": "a", "dimensions": 18}))[0], whole[:18])
    cut = fake.vector("a")[:8]
    np.testing.assert_allclose(
        vectors(await embed(client, {"input": "a", "dimensions": 8}))[0], cut / np.linalg.norm(cut), atol=1e-6
    )


@pytest.mark.parametrize("dimensions", [None, 5])
async def test_base64_is_little_endian_float32(client: Client, dimensions: int | None) -> None:
    body = {"input": ["a", data_uri(CAT)], "dimensions": dimensions}
    floats = vectors(await embed(client, body))
    encoded = await embed(client, {**body, "encoding_format": "base64"})
    for wanted, row in zip(floats, encoded["data"], strict=True):
        assert same(np.frombuffer(base64.b64decode(row["embedding"], validate=True), dtype="<f4"), wanted)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("encoding_format", "hex"),
        ("encoding_format", 7),
        ("modality", "video"),
        ("truncate", "yes"),
        ("partial", 1),
        ("instruction", ["Find it."]),
        ("model", 7),
        ("truncate_prompt_tokens", 0),
        ("truncate_prompt_tokens", -2),
        ("truncate_prompt_tokens", 8193),
        ("truncate_prompt_tokens", 5.0),
    ],
)
async def test_fields_of_another_kind(client: Client, field: str, value: Any) -> None:
    # A fault of the request itself is one with `partial` too.
    for partial in ({}, {"partial": True}) if field != "partial" else ({},):
        error = await refused(client, {"input": "a", **partial, field: value})
        assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", None, field)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"input": None},
        {"input": "a", "messages": [USER]},
        {"input": []},
        {"input": 7},
        {"input": True},
        {"input": {}},
        {"input": [None]},
        {"input": {"text": []}},
        {"input": {"content": []}},
        {"input": [[]]},
        {"input": ["a", ["b"]]},
        {"input": {"type": "text", "text": "a", "data": "b"}},
        {"input": {"text": "a", "content": "b"}},
        {"input": {"type": "image_url", "image": B64}},
        {"input": {"image": "not base64"}},
        {"input": {"image": B64[:-1]}},
        {"input": {"image": "ftp://127.0.0.1/cat.png"}},
        {"input": {"image": "file:///etc/passwd"}},
        {"input": {"type": "video", "video": "x"}},
        {"input": {"video": "x", "text": "a"}},
        {"input": VIDEO_URI},
        {"input": {"content": [{"type": "video_url", "video_url": {"url": "x"}}]}},
        {"input": IDS},
        {"input": [IDS, IDS]},
        {"input": ["text", IDS]},
    ],
)
async def test_inputs_that_are_none(client: Client, body: Any) -> None:
    error = await refused(client, body)
    assert (error["type"], error["code"]) == ("invalid_request_error", None)
    assert error["param"].startswith("input")
    if "video" in str(body):
        assert "video" in error["message"]
    if str(IDS) in str(body):
        assert "check_embedding_ctx_length=False" in error["message"]


async def test_too_many_inputs(serve: Serve, fake: FakeModel) -> None:
    client = await serve(fake, max_inputs_per_request=3)
    assert len(vectors(await embed(client, {"input": ["a"] * 3}))) == 3
    error = await refused(client, {"input": ["a"] * 4, "partial": True})
    assert error["param"] == "input"
    assert "3" in error["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"nonsense", b"[]", b'"text"', b"null", b'{"input": NaN}', b'{"input": "\xff"}'])
async def test_bodies_that_are_no_json_object(client: Client, body: bytes) -> None:
    async with client.session.post("/v1/embeddings", data=body) as reply:
        assert reply.status == 400
        error = (await reply.json())["error"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", None, None)


async def test_a_large_body_is_parsed_as_a_small_one(client: Client, fake: FakeModel) -> None:
    padding = {"nonsense": "x" * 200_000}
    assert same(vectors(await embed(client, {"input": "a", **padding}))[0], fake.vector("a"))
    assert (await refused(client, {"input": 7, **padding}))["param"] == "input"


async def test_modality_image(client: Client, fake: FakeModel) -> None:
    body = {"modality": "image", "input": [B64, DOG_URI, {"text": "a"}]}
    got = vectors(await embed(client, body))
    assert all(map(same, got, [fake.vector(CAT), fake.vector(DOG), fake.vector("a")]))
    assert (await refused(client, {"modality": "image", "input": ["a dog"]}))["param"] == "input[0]"
    assert same(vectors(await embed(client, {"modality": "text", "input": "a"}))[0], fake.vector("a"))


# Lengths


def cut(fake: FakeModel, text: str, tokens: int) -> npt.NDArray[np.float32]:
    """The vector of a text that is cut to so many tokens."""
    return vector_of(fake.prepare(EmbeddingInput((text,), max_tokens=tokens, truncate=True)).token_ids, fake.width)


async def test_truncate(serve: Serve, fake: FakeModel) -> None:
    client = await serve(fake, max_input_tokens=20)
    fits, long = "x" * 16, "x" * 17
    assert same(vectors(await embed(client, {"input": fits}))[0], fake.vector(fits))
    error = await refused(client, {"input": ["a", long]})
    assert (error["type"], error["param"]) == ("invalid_request_error", "input[1]")
    assert "20" in error["message"]
    assert (await refused(client, {"input": long, "truncate": False}))["param"] == "input"
    reply = await embed(client, {"input": long, "truncate": True})
    assert same(vectors(reply)[0], cut(fake, long, 20))
    assert reply["usage"]["prompt_tokens"] == 20


async def test_truncate_prompt_tokens(serve: Serve, fake: FakeModel) -> None:
    client = await serve(fake, max_input_tokens=20)
    long = "x" * 50
    for given, tokens in ((-1, 20), (10, 10), (20, 20)):
        reply = await embed(client, {"input": long, "truncate_prompt_tokens": given})
        assert same(vectors(reply)[0], cut(fake, long, tokens))
        assert reply["usage"]["total_tokens"] == tokens
    reply = await embed(client, {"input": long, "truncate_prompt_tokens": 10, "truncate": False})
    assert reply["usage"]["total_tokens"] == 10
    assert (await refused(client, {"input": long, "truncate_prompt_tokens": 3}))["param"] == "input"
    assert (await refused(client, {"input": long, "truncate_prompt_tokens": 21}))["param"] == "truncate_prompt_tokens"


async def test_images_are_never_cut(serve: Serve, fake: FakeModel) -> None:
    client = await serve(fake, max_input_tokens=20)
    body = {"input": {"image": [CAT_URI, DOG_URI]}, "truncate": True}
    assert (await refused(client, body))["type"] == "invalid_request_error"


async def test_the_models_own_length_is_a_limit_too(serve: Serve) -> None:
    client = await serve(FakeModel(max_tokens=10))
    assert "10" in (await refused(client, {"input": "x" * 7}))["message"]
    assert (await embed(client, {"input": "x" * 7, "truncate_prompt_tokens": -1}))["usage"]["total_tokens"] == 10


# Images that cannot be had


@pytest.mark.parametrize(
    ("image", "changes", "word"),
    [
        (base64.b64encode(b"no image").decode(), {}, "PNG"),
        (base64.b64encode(png(CAT)[:-30]).decode(), {}, "damaged"),
        (B64, {"max_image_pixels": 62}, "62"),
        (B64, {"max_image_bytes": 50}, "50"),
        (base64_of(Image.new("RGB", (402, 2))), {}, "200"),
    ],
)
async def test_images_at_fault(serve: Serve, image: str, changes: dict[str, Any], word: str) -> None:
    client = await serve(**changes)
    error = await refused(client, {"input": ["a", {"text": "b", "image": [image]}]})
    assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", None, "input[1].image[0]")
    assert word in error["message"]


async def test_image_urls_at_fault(serve: Serve, fake: FakeModel, clock: Clock) -> None:
    async with image_host(cat=png(CAT), empty=b"", page=b"<html>") as host:
        client = await serve(fake, image_url_allowed_hosts=frozenset({host.host}), image_fetch_timeout_s=40)
        for path in ("/missing.png?secret=1", "/empty.png", "/page.png"):
            error = await refused(client, {"input": {"type": "image_url", "image_url": {"url": host.url(path)}}})
            assert (error["type"], error["param"]) == ("invalid_request_error", "input.image_url")
            assert "secret" not in error["message"]
            assert "404" not in error["message"]
        host.hold = asyncio.Event()
        host.asked.clear()
        waiting = asyncio.create_task(refused(client, {"input": {"image": host.url("/cat.png")}}))
        await until(lambda: host.asked)
        clock.advance(41)
        assert "within 40 seconds" in (await waiting)["message"]
        host.hold.set()
    assert fake.embedded == 0


async def test_a_model_of_texts_refuses_images_and_dials_nothing_for_them(serve: Serve) -> None:
    async with image_host(cat=png(CAT)) as host:
        client = await serve(FakeModel(supports_images=False), image_url_allowed_hosts=frozenset({host.host}))
        for image in (host.url("/cat.png"), CAT_URI):
            error = await refused(client, {"input": ["a", {"text": "b", "image": image}]})
            assert (error["param"], error["message"]) == ("input[1].image", "this model embeds text only: send no image")
            reply = await embed(client, {"input": ["a", {"image": image}], "partial": True})
            assert [row["embedding"] is None for row in reply["data"]] == [False, True]
            status, reply = await client.embed({"input": [{"image": image}]})
            assert status == 400
        assert host.asked == []


async def test_a_private_host_is_refused_and_not_dialled(serve: Serve) -> None:
    async with image_host(cat=png(CAT)) as host:
        client = await serve()
        error = await refused(client, {"input": {"image": host.url("/cat.png")}})
        assert error["param"] == "input.image"
        assert "not a public host" in error["message"]
        assert host.asked == []


# partial


async def test_partial_puts_errors_into_their_rows(serve: Serve, fake: FakeModel) -> None:
    fake.fail_text = "poison"
    broken = base64.b64encode(b"no image").decode()
    inputs = ["a", 7, {"image": broken}, "x" * 40, "poison", {"text": "b"}, IDS, [{"role": "user"}], DOG_URI]
    client = await serve(fake, max_input_tokens=20)
    reply = await embed(client, {"input": inputs, "partial": True})
    assert [row["index"] for row in reply["data"]] == list(range(9))
    good = {0: fake.vector("a"), 5: fake.vector("b"), 8: fake.vector(DOG)}
    params = {1: "input[1]", 2: "input[2].image", 3: "input[3]", 4: None, 6: "input[6]", 7: "input[7][0].content"}
    for index, row in enumerate(reply["data"]):
        if index in good:
            assert same(np.array(row["embedding"], np.float32), good[index])
            continue
        assert set(row) == {"object", "index", "embedding", "error"}
        assert row["embedding"] is None
        assert set(row["error"]) == {"message", "type", "param", "code"}
        assert row["error"]["param"] == params[index]
        assert row["error"]["type"] == ("server_error" if index == 4 else "invalid_request_error")
    assert reply["usage"]["prompt_tokens"] == 5 + 5 + 14


async def test_partial_is_200_though_all_fail(client: Client) -> None:
    reply = await embed(client, {"input": [7, {}, {"image": "!"}], "partial": True})
    assert [row["embedding"] for row in reply["data"]] == [None] * 3
    assert reply["usage"]["total_tokens"] == 0
    for body in ({"messages": ["a"], "partial": True}, {"input": 7, "partial": True}):
        assert (await embed(client, body))["data"][0]["error"]["type"] == "invalid_request_error"


async def test_without_partial_one_fault_refuses_all(client: Client, fake: FakeModel) -> None:
    assert (await refused(client, {"input": ["a", "b", 7]}))["param"] == "input[2]"
    assert fake.embedded == 0


async def test_one_poisonous_input_fails_alone(serve: Serve) -> None:
    fake = FakeModel(fail_text="poison", seconds_per_batch=0.02)
    client = await serve(fake)
    texts = [f"text {index}" for index in range(20)]
    replies = await asyncio.gather(*(client.embed({"input": text}) for text in [*texts[:10], "poison", *texts[10:]]))
    assert [status for status, _ in replies] == [200] * 10 + [500] + [200] * 10
    good = [reply for status, reply in replies if status == 200]
    assert all(same(vectors(reply)[0], fake.vector(text)) for reply, text in zip(good, texts, strict=True))


async def test_where_one_has_failed_the_others_are_not_computed(serve: Serve) -> None:
    answered = threading.Event()

    class Waiting(FakeModel):
        """Takes the input after the poisonous one, and then no other until there is an answer."""

        def embed(self, batch: Any) -> Any:
            if self.batches:
                assert answered.wait(30)
            return super().embed(batch)

    fake = Waiting(fail_text="poison")
    client = await serve(fake, max_batch_size=1)
    try:
        assert (await client.embed({"input": ["poison", *(f"text {index}" for index in range(50))]}))[0] == 500
        assert client.app[SCHEDULER].queue_depth == 0
    finally:
        answered.set()
    await asyncio.sleep(0.1)
    assert fake.embedded < 5


async def test_a_batch_too_large_for_the_device_is_halved(serve: Serve) -> None:
    fake = FakeModel(most_inputs=3)
    client = await serve(fake)
    got = vectors(await embed(client, {"input": [f"text {index}" for index in range(32)]}))
    assert all(same(row, fake.vector(f"text {index}")) for index, row in enumerate(got))


# Inputs that are alike


async def test_single_flight_computes_identical_requests_once(serve: Serve) -> None:
    fake = FakeModel(gate=threading.Event())
    client = await serve(fake)
    scheduler = client.app[SCHEDULER]
    body = {"input": ["the same", {"text": "the same", "image": CAT_URI}, "the same"]}
    requests = [asyncio.create_task(embed(client, body)) for _ in range(20)]
    assert fake.gate is not None
    try:
        # Both inputs are on the device, and all of the requests wait for these.
        works = scheduler._in_flight._works.values()
        await until(lambda: sum(len(work.waiters) for work in works if work.taken) == 60)
    finally:
        fake.gate.set()
    replies = await asyncio.gather(*requests)
    assert fake.embedded == 2
    for reply in replies:
        text, mixed, again = vectors(reply)
        assert same(text, fake.vector("the same")) and same(again, text)
        assert same(mixed, fake.vector(CAT, "the same"))
        assert reply["usage"] == replies[0]["usage"]
    assert replies[0]["usage"]["total_tokens"] == 2 * 12 + 22


async def test_single_flight_lets_each_ask_for_dimensions_of_its_own(client: Client, fake: FakeModel) -> None:
    bodies = [{"input": "the same", "dimensions": dimensions} for dimensions in (4, 8, 16)]
    for reply, body in zip(await asyncio.gather(*(embed(client, body) for body in bodies)), bodies, strict=True):
        wanted = to_dimension(fake.vector("the same")[None], body["dimensions"])[0]
        assert np.allclose(vectors(reply)[0], wanted, atol=1e-6)


async def test_with_a_cache_what_comes_again_is_not_computed_again(serve: Serve) -> None:
    fake = FakeModel()
    client = await serve(fake, vector_cache_mb=1)
    for _ in range(3):
        reply = await embed(client, {"input": ["a", "b", CAT_URI]})
        assert [same(*pair) for pair in zip(vectors(reply), map(fake.vector, ("a", "b", CAT)), strict=True)] == [True] * 3
    assert fake.embedded == 3
    await embed(client, {"input": ["a"], "instruction": "find"})
    assert fake.embedded == 4


# Clients that leave


async def test_a_client_that_leaves_is_not_computed(serve: Serve) -> None:
    fake = FakeModel(gate=threading.Event())
    client = await serve(fake, max_queue_size=4, max_inputs_per_request=4)
    scheduler = client.app[SCHEDULER]
    running = asyncio.create_task(client.embed({"input": "on the device"}))
    await until(lambda: scheduler.queue_depth == 0 and scheduler._worker and scheduler._worker.busy_seconds())
    leaving = asyncio.create_task(client.embed({"input": ["a", "b", "c", "d"]}))
    await until(lambda: scheduler.queue_depth == 4)
    assert (await client.embed({"input": "one too many"}))[0] == 429
    leaving.cancel()
    await until(lambda: scheduler.queue_depth == 0)
    staying = asyncio.create_task(client.embed({"input": ["e", "f", "g", "h"]}))
    await until(lambda: scheduler.queue_depth == 4)
    assert fake.gate is not None
    fake.gate.set()
    assert (await running)[0] == 200
    assert (await staying)[0] == 200
    assert fake.embedded == 5


async def test_a_client_that_leaves_while_an_image_is_fetched(serve: Serve, fake: FakeModel) -> None:
    async with image_host(cat=png(CAT)) as host:
        host.hold = asyncio.Event()
        client = await serve(fake, image_url_allowed_hosts=frozenset({host.host}))
        leaving = asyncio.create_task(client.embed({"input": {"image": host.url("/cat.png")}}))
        await until(lambda: host.asked)
        assert client.app[SCHEDULER].queue_depth == 1
        leaving.cancel()
        await until(lambda: client.app[SCHEDULER].queue_depth == 0)
        host.hold.set()
    assert fake.embedded == 0
