"""Every accepted shape, every refusal, and that nothing else ever comes out."""

from __future__ import annotations

import base64
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.dialects.contract import EmbeddingRequest, ImageSource, InvalidRequest, ModelNotFound, RequestItem, RequestLimits
from app.dialects.openai import parse
from models.base import Refusal

LIMITS = RequestLimits(frozenset({"served", "Org/served"}), max_inputs=4, max_input_tokens=16, dimension=64, max_image_bytes=30)
PIXELS = b"\xff\xd8 not opened here"
B64 = base64.b64encode(PIXELS).decode()
DATA_URI = f"data:image/png;base64,{B64}"
URL = "https://example.org/cat.jpg"
USER = {"role": "user", "content": "question"}


def read(body: Any, limits: RequestLimits = LIMITS) -> EmbeddingRequest:
    return parse(body if isinstance(body, bytes) else orjson.dumps(body), limits)


def item(*parts: str | ImageSource, param: str = "input", instruction: str | None = None, verbatim: bool = False) -> RequestItem:
    return RequestItem(parts, instruction, verbatim, param)


def by_url(param: str, url: str = URL) -> ImageSource:
    return ImageSource(url, None, param)


def by_data(param: str, data: bytes = PIXELS) -> ImageSource:
    return ImageSource(None, data, param)


def message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


# Forms of one item. The same table is read bare, in a list, and under `partial`.
FORMS: list[tuple[str, Any, tuple[str | ImageSource, ...]]] = [
    ("string", "text", ("text",)),
    ("empty string", "", ("",)),
    ("string that is a URL is text", URL, (URL,)),
    ("string that is base64 is text", B64, (B64,)),
    ("data URI string", DATA_URI, (by_data("@"),)),
    ("data URI string, any case", f"DATA:Image/WebP;BASE64,{B64}", (by_data("@"),)),
    ("other data URI string is text", "data:text/plain;base64,QUJD", ("data:text/plain;base64,QUJD",)),
    ("text in data", {"type": "text", "data": "a"}, ("a",)),
    ("text in text", {"type": "text", "text": "a"}, ("a",)),
    ("typed text is never an image", {"type": "text", "text": DATA_URI}, (DATA_URI,)),
    ("typed text, empty", {"type": "text", "text": ""}, ("",)),
    ("null beside", {"type": "text", "text": "a", "data": None, "image": None, "video": None, "role": None}, ("a",)),
    ("unknown beside", {"type": "text", "text": "a", "id": 1, "cache_control": {}, "min_pixels": 4, "detail": "low"}, ("a",)),
    ("image in data", {"type": "image", "data": B64}, (by_data("@.data"),)),
    ("image in image", {"type": "image", "image": URL}, (by_url("@.image"),)),
    ("image, data URI", {"type": "image", "image": DATA_URI}, (by_data("@.image"),)),
    ("image_url string", {"type": "image_url", "image_url": URL}, (by_url("@.image_url"),)),
    ("image_url object", {"type": "image_url", "image_url": {"url": URL, "detail": "high"}}, (by_url("@.image_url"),)),
    ("image_url object, data URI", {"type": "image_url", "image_url": {"url": DATA_URI}}, (by_data("@.image_url"),)),
    ("image_url, bare base64", {"type": "image_url", "image_url": B64}, (by_data("@.image_url"),)),
    ("image_base64", {"type": "image_base64", "image_base64": B64}, (by_data("@.image_base64"),)),
    ("image_base64, data URI", {"type": "image_base64", "image_base64": DATA_URI}, (by_data("@.image_base64"),)),
    ("scheme in capitals", {"image": "HTTP://EXAMPLE.org"}, (by_url("@.image", "HTTP://EXAMPLE.org"),)),
    ("URL in white space", {"image": f" {URL}\n"}, (by_url("@.image"),)),
    ("URL with a port", {"image": "http://[::1]:80/a"}, (by_url("@.image", "http://[::1]:80/a"),)),
    ("wrapped base64", {"image": f"\n{B64[:4]}\r\n\t {B64[4:]}\v\f\n"}, (by_data("@.image"),)),
    ("no media type", {"image": f"data:;base64,{B64}"}, (by_data("@.image"),)),
    ("media type is ignored", {"image": f"data:text/plain;charset=x;name=y;base64,{B64}"}, (by_data("@.image"),)),
    ("untyped text", {"text": "a"}, ("a",)),
    ("untyped text is never an image", {"text": DATA_URI}, (DATA_URI,)),
    ("untyped image", {"image": URL}, (by_url("@.image"),)),
    ("untyped image object", {"image": {"url": URL}}, (by_url("@.image"),)),
    ("image before text", {"text": "a", "image": URL}, (by_url("@.image"), "a")),
    ("lists", {"text": ["a", ""], "image": [URL, B64]}, (by_url("@.image[0]"), by_data("@.image[1]"), "a", "")),
    ("one list is empty", {"text": "a", "image": []}, ("a",)),
    ("one key is null", {"text": None, "image": URL}, (by_url("@.image"),)),
    ("official, with video absent", {"text": "a", "image": None, "video": None, "fps": 2}, ("a",)),
    ("content string", {"content": "a"}, ("a",)),
    ("content empty string", {"content": ""}, ("",)),
    ("content data URI", {"content": DATA_URI}, (by_data("@.content"),)),
    (
        "content parts keep their order",
        {
            "content": [
                {"type": "text", "text": "a"},
                {"type": "image_url", "image_url": {"url": URL}},
                "b",
                DATA_URI,
                {"type": "image", "data": B64},
            ]
        },
        ("a", by_url("@.content[1].image_url"), "b", by_data("@.content[3]"), by_data("@.content[4].data")),
    ),
    ("conversation", [USER], ("question",)),
    (
        "conversation with an image",
        [message("user", [{"type": "image", "image": URL}, "b"])],
        (by_url("@[0].content[0].image"), "b"),
    ),
]


def placed(parts: tuple[str | ImageSource, ...], param: str) -> tuple[str | ImageSource, ...]:
    return tuple(
        part if isinstance(part, str) else ImageSource(part.url, part.data, part.param.replace("@", param)) for part in parts
    )


@pytest.mark.parametrize(("value", "parts"), [pytest.param(form, parts, id=name) for name, form, parts in FORMS])
@pytest.mark.parametrize("partial", [False, True])
def test_form(value: Any, parts: tuple[str | ImageSource, ...], partial: bool) -> None:
    alone = read({"input": value, "partial": partial})
    assert alone.items == (item(*placed(parts, "input")),)

    listed = read({"input": ["first", value], "instruction": "find", "partial": partial})
    assert listed.items == (
        item("first", param="input[0]", instruction="find"),
        item(*placed(parts, "input[1]"), param="input[1]", instruction="find"),
    )


def test_defaults() -> None:
    assert read({"input": "a"}) == EmbeddingRequest((item("a"),), None, 16, False, False, "float")


@pytest.mark.parametrize(
    ("field", "value", "name", "expected"),
    [
        ("dimensions", 1, "dimensions", 1),
        ("dimensions", 64, "dimensions", 64),
        ("encoding_format", "base64", "encoding_format", "base64"),
        ("encoding_format", "float", "encoding_format", "float"),
        ("truncate", True, "truncate", True),
        ("truncate", False, "truncate", False),
        ("truncate_prompt_tokens", 5, "max_tokens", 5),
        ("truncate_prompt_tokens", 5, "truncate", True),
        ("truncate_prompt_tokens", 16, "max_tokens", 16),
        ("truncate_prompt_tokens", -1, "max_tokens", 16),
        ("truncate_prompt_tokens", -1, "truncate", True),
        ("partial", True, "partial", True),
    ],
)
def test_field(field: str, value: Any, name: str, expected: Any) -> None:
    assert getattr(read({"input": "a", field: value}), name) == expected


@pytest.mark.parametrize("model", ["served", "Org/served", None])
def test_model(model: str | None) -> None:
    assert read({"input": "a", "model": model}).items == (item("a"),)


def test_truncate_prompt_tokens_wins() -> None:
    request = read({"input": "a", "truncate_prompt_tokens": 5, "truncate": False})
    assert (request.max_tokens, request.truncate) == (5, True)


def test_null_is_absent_and_the_unknown_ignored() -> None:
    known = ["messages", "model", "instruction", "dimensions", "encoding_format", "truncate", "truncate_prompt_tokens"]
    ignored = {"user": "someone", "add_special_tokens": False, "continue_final_message": True, "input_type": "query", "x": [{}]}
    assert read({"input": "a", "partial": None, "modality": None, **dict.fromkeys(known), **ignored}) == read({"input": "a"})


def test_the_last_of_duplicate_keys_wins() -> None:
    assert read(b'{"input": 1, "input": "b"}').items == (item("b"),)


def test_modality_image_makes_every_string_an_image() -> None:
    request = read({"input": [URL, B64, DATA_URI, {"text": "a"}], "modality": "image"})
    assert request.items == (
        item(by_url("input[0]"), param="input[0]"),
        item(by_data("input[1]"), param="input[1]"),
        item(by_data("input[2]"), param="input[2]"),
        item("a", param="input[3]"),
    )
    assert read({"input": URL, "modality": "image"}).items == (item(by_url("input")),)
    assert read({"input": URL, "modality": "text"}).items == (item(URL),)


@pytest.mark.parametrize("form", [{"text": "a"}, {"content": "a"}, {"type": "text", "text": "a"}])
@pytest.mark.parametrize(("own", "expected"), [("own", "own"), ("", ""), (None, "request's")])
def test_an_items_own_instruction_wins(form: dict[str, Any], own: str | None, expected: str) -> None:
    request = read({"input": [{**form, "instruction": own}], "instruction": "request's"})
    assert request.items == (item("a", param="input[0]", instruction=expected),)


@pytest.mark.parametrize(
    ("messages", "instruction", "verbatim"),
    [
        ([USER], "request's", False),
        ([message("system", " as it stands"), USER], " as it stands", True),
        ([message("system", ""), USER], "", True),
        ([message("system", []), USER], "", True),
        ([message("system", [{"type": "text", "text": "a "}, {"type": "text", "data": "b"}, "c"]), USER], "a bc", True),
        ([USER, message("assistant", "")], "request's", False),
        ([USER, message("assistant", None)], "request's", False),
        ([USER, {"role": "assistant"}], "request's", False),
        ([USER, message("assistant", [])], "request's", False),
        ([USER, message("assistant", [{"type": "text", "text": ""}])], "request's", False),
        ([message("system", "s"), USER, message("assistant", "")], "s", True),
    ],
)
def test_conversation(messages: list[Any], instruction: str, verbatim: bool) -> None:
    def expected(param: str) -> RequestItem:
        return item("question", param=param, instruction=instruction, verbatim=verbatim)

    extra = {"instruction": "request's"}
    assert read({"messages": messages, **extra}).items == (expected("messages"),)
    assert read({"messages": messages, "partial": True, **extra}).items == (expected("messages"),)
    assert read({"input": messages, **extra}).items == (expected("input"),)
    nested = read({"input": [messages, "text"], **extra})
    assert nested.items == (expected("input[0]"), item("text", param="input[1]", instruction="request's"))


def test_a_conversation_names_its_images_by_their_place() -> None:
    messages = [message("system", "s"), message("user", ["a", {"type": "image_url", "image_url": {"url": URL}}])]
    for key, value, param in [
        ("messages", messages, "messages"),
        ("input", messages, "input"),
        ("input", [messages], "input[0]"),
    ]:
        image = by_url(f"{param}[1].content[1].image_url")
        assert read({key: value}).items == (item("a", image, param=param, instruction="s", verbatim=True),)


def test_a_long_conversation_is_one_input_and_not_too_many() -> None:
    with pytest.raises(InvalidRequest, match="twice") as caught:
        read({"input": [USER] * 9})
    assert caught.value.param == "input[1].role"


# (what the body is, where the fault is, a phrase of the message)
BODIES: list[tuple[bytes, str | None, str]] = [
    (b"", None, "not valid JSON"),
    (b"{", None, "not valid JSON"),
    (b'{"input": NaN}', None, "not valid JSON"),
    (b'{"input": 1e999}', None, "not valid JSON"),
    (b'{"input": "\xff"}', None, "not valid JSON"),
    (b'{"input": "\\ud800"}', None, "not valid JSON"),
    (b'\xef\xbb\xbf{"input": "a"}', None, "not valid JSON"),
    (b"[" * 2000 + b"]" * 2000, None, "nested too deeply"),
    (b"null", None, "must be a JSON object"),
    (b'["a"]', None, "must be a JSON object"),
    (b'"a"', None, "must be a JSON object"),
    (b"{}", "input", "exactly one of"),
    (b'{"input": null, "messages": null}', "input", "exactly one of"),
    (orjson.dumps({"input": "a", "messages": [USER]}), "input", "exactly one of"),
]

FIELDS: list[tuple[str, Any, str]] = [
    *[("dimensions", value, "an integer from 1 to 64") for value in (0, -1, 65, 2**63, True, 32.0, "32", [32], {})],
    *[("encoding_format", value, '"float" or "base64"') for value in ("int8", "", 1, True, ["float"])],
    *[("truncate", value, "true or false") for value in (1, 0, "true", [], {})],
    *[("partial", value, "true or false") for value in (1, 0, "true", [], {})],
    *[("truncate_prompt_tokens", value, "an integer from 1 to 16, or -1") for value in (0, -2, 17, True, 5.0, "5", [5])],
    *[("modality", value, '"text" or "image"') for value in ("audio", "video", "", 1, ["image"])],
    *[("instruction", value, "must be a string") for value in (1, False, ["a"], {})],
    *[("model", value, "must be a string") for value in (1, False, ["served"], {})],
    ("input", [], "must not be an empty list"),
    ("input", ["a"] * 5, "holds 5 inputs; at most 4"),
    ("input", [1, 2, 3], "check_embedding_ctx_length=False"),
    ("input", [1, 2, 3, 4, 5, 6], "another tokenizer"),
    ("input", [0.5], "check_embedding_ctx_length=False"),
    ("input", [[1, 2], [3]], "check_embedding_ctx_length=False"),
    ("input", [[1, 2]] * 5, "check_embedding_ctx_length=False"),
    ("messages", [], "at least one message"),
    ("messages", "a", "at least one message"),
    ("messages", USER, "at least one message"),
    ("messages", 5, "at least one message"),
]

# Malformed items: (the item, the fault's place with @ for the item's own, a phrase of the message)
TWO = "fits more than one form"
NOTHING = "holds nothing to embed"
NO_BASE64 = "not valid base64"
ITEMS: list[tuple[Any, str, str]] = [
    *[(value, "@", "must be a string, an object, or a list of messages") for value in (True, False, [], [[]], ["a"], [[USER]])],
    ([1, 2], "@", "check_embedding_ctx_length=False"),
    ([USER, "a"], "@", "all have a role"),
    ({}, "@", f"{NOTHING}: it needs"),
    ({"instruction": "find"}, "@", NOTHING),
    ({"text": None, "image": None}, "@", NOTHING),
    ({"text": [], "image": []}, "@", NOTHING),
    ({"text": []}, "@", NOTHING),
    ({"content": []}, "@", NOTHING),
    ({"type": "text"}, "@", f"{NOTHING}: its type needs text or data"),
    ({"type": "text", "text": None}, "@", NOTHING),
    ({"type": "text", "image": URL}, "@", NOTHING),
    ({"type": "image", "image_url": URL}, "@", NOTHING),
    ({"type": "image_url", "url": URL}, "@", f"{NOTHING}: its type needs image_url"),
    ({"type": "text", "text": "a", "data": "b"}, "@", TWO),
    ({"type": "text", "text": "a", "image": URL}, "@", TWO),
    ({"type": "text", "text": "a", "content": "b"}, "@", TWO),
    ({"type": "image", "data": B64, "image": URL}, "@", TWO),
    ({"type": "image_url", "image_url": URL, "text": "a"}, "@", TWO),
    ({"text": "a", "content": "b"}, "@", TWO),
    ({"text": "a", "data": "b"}, "@", TWO),
    ({"text": "a", "image_url": URL}, "@", TWO),
    ({"image": URL, "content": "b"}, "@", TWO),
    ({"image_url": {"url": URL}}, "@", 'needs a "type" beside "image_url"'),
    ({"image_base64": B64}, "@", 'needs a "type"'),
    ({"data": "a"}, "@", 'needs a "type"'),
    *[
        ({"type": kind, "text": "a", "image": URL}, "@.type", 'one of "text", "image", "image_url", "image_base64"')
        for kind in ("input_text", "input_image", "audio", "input_audio", "Text", "", 1, True, ["text"], {})
    ],
    ({"type": "video", "video": URL}, "@", "video"),
    ({"type": "video_url", "video_url": {"url": URL}}, "@", "video"),
    ({"type": "input_video"}, "@", "video"),
    ({"text": "a", "video": URL}, "@", "video"),
    ({"video": [URL]}, "@", "video"),
    ({"content": ["a", {"type": "video", "video": URL}]}, "@.content[1]", "video"),
    ("data:video/mp4;base64,QUJD", "@", "video"),
    ({"role": "user", "content": "a"}, "@", "outside of a conversation"),
    *[({"type": "text", "text": value}, "@.text", "must be a string") for value in (1, True, ["a"], {})],
    *[({"text": value}, "@.text", "must be a string") for value in (1, True, {})],
    *[({"text": ["a", value]}, "@.text[1]", "must be a string") for value in (1, None, ["b"], {})],
    *[({"text": "a", "instruction": value}, "@.instruction", "must be a string") for value in (1, ["a"], {})],
    *[({"content": value}, "@.content", "a string or a list of parts") for value in (1, True, {"type": "text", "text": "a"})],
    *[({"content": ["a", value]}, "@.content[1]", "must be a string, or an object") for value in (1, None, [], ["a"])],
    ({"content": [{"text": "a"}]}, "@.content[0].type", "must be one of"),
    ({"content": [{"type": "text", "text": "a", "image": URL}]}, "@.content[0]", TWO),
    ({"content": [{"type": "image_url", "image_url": 1}]}, "@.content[0].image_url", "http(s) URL"),
    ({"content": [{"type": "text", "text": "a", "instruction": "b"}]}, "@.content[0].instruction", "out of place"),
    *[({"image": value}, "@.image", "must be an http(s) URL") for value in (1, True, {}, {"url": None}, {"url": {"url": URL}})],
    ({"type": "image", "image": [URL]}, "@.image", "must be an http(s) URL"),
    ({"image": [URL, None]}, "@.image[1]", "must be an http(s) URL"),
    *[
        ({"image": url}, "@.image", "no other scheme")
        for url in ("file:///etc/passwd", "FILE:/x", "ftp://a/b", "javascript:1", "C:\\a.png", "://a", "h ttp://a")
    ],
    *[
        ({"image": url}, "@.image", "not a valid http(s) URL")
        for url in ("http:", "http://", "https:///a", "http:a", "http://[::1", "http://a:b/", "http://a:99999/", "http://:80")
    ],
    ({"image": "http://a/" + "b" * 9000}, "@.image", "more than 8190"),
    ({"image": f"data:image/png,{B64}"}, "@.image", "data URI without base64"),
    ({"image": f"data:image/png;base64{B64}"}, "@.image", "data URI without base64"),
    ({"image": "data:image/png;base64Q"}, "@.image", "data URI without base64"),
    ({"image": f"data:base64,{B64}"}, "@.image", "data URI without base64"),
    ({"image": f"data:image/png;{'x' * 2000};base64,{B64}"}, "@.image", "data URI without base64"),
    (f"data:image/png,{B64}", "@", "data URI without base64"),
    *[({"image": value}, "@.image", "empty image") for value in ("", " \n", "data:image/png;base64,", "data:;base64, ")],
    *[
        ({"image": value}, "@.image", NO_BASE64)
        for value in (
            *("QQ", "QUJ", "QUJDR", "QUJD=", "QUJD==", "QUJD====", "QUI==", "=", "====", "QQ==QQ==", "=QQ=", "Q=Q="),
            *("QU-_", "QUJé", "QU%3D", "QUJ?", "/a/b.png", "QUJ\x00", "QUJ\xa0D"),
        )
    ],
    ({"image": f"data:image/png;base64,{B64.replace('=', '%3D')}x"}, "@.image", NO_BASE64),
    ({"image": [B64, base64.b64encode(bytes(31)).decode()]}, "@.image[1]", "more than 30 bytes"),
    ({"image": [URL] * 17}, "@", "more images than fit into 16 tokens"),
    ({"content": [DATA_URI] * 17}, "@", "more images than fit into 16 tokens"),
]

ORDER = "an optional system message, one user message"
CONVERSATIONS: list[tuple[list[Any], str, str]] = [
    ([message("system", "a")], "@", ORDER),
    ([message("assistant", "")], "@", ORDER),
    ([message("system", "a"), message("assistant", "")], "@", ORDER),
    ([USER, message("system", "a")], "@", ORDER),
    ([message("assistant", ""), USER], "@", ORDER),
    ([USER, USER], "@[1].role", "twice"),
    ([message("system", "a"), message("system", "b"), USER], "@[1].role", "twice"),
    *[([USER, message(role, "a")], "@[1].role", '"system", "user" or "assistant"') for role in ("tool", "developer", "", "User")],
    *[([{"role": role, "content": "a"}], "@[0].role", '"system", "user" or "assistant"') for role in (1, True, ["user"], {})],
    ([USER, message("assistant", "answer")], "@[1].content", "must be without text"),
    ([USER, message("assistant", ["", {"type": "text", "text": " "}])], "@[1].content", "must be without text"),
    ([USER, message("assistant", [{"type": "image", "image": URL}])], "@[1].content[0].image", "only text may stand"),
    ([USER, message("assistant", 1)], "@[1].content", "a string or a list of parts"),
    ([message("system", ["a", {"type": "image", "image": URL}]), USER], "@[0].content[1].image", "only text may stand"),
    ([message("system", None), USER], "@[0].content", "a string or a list of parts"),
    ([message("system", 1), USER], "@[0].content", "a string or a list of parts"),
    ([{"role": "user"}], "@[0].content", "a string or a list of parts"),
    ([message("user", None)], "@[0].content", "a string or a list of parts"),
    ([message("user", [])], "@[0].content", NOTHING),
    ([message("user", [{"type": "text"}])], "@[0].content[0]", NOTHING),
    ([message("user", [{"type": "video_url", "video_url": URL}])], "@[0].content[0]", "video"),
    ([message("user", [DATA_URI] * 17)], "@[0].content", "more images than fit"),
]


def refused(body: Any, param: str | None, phrase: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read(body)
    assert phrase in str(caught.value)
    assert caught.value.param == param


@pytest.mark.parametrize(("body", "param", "phrase"), BODIES)
def test_refused_body(body: bytes, param: str | None, phrase: str) -> None:
    refused(body, param, phrase)


@pytest.mark.parametrize(("field", "value", "phrase"), FIELDS)
@pytest.mark.parametrize("partial", [False, True])
def test_refused_field(field: str, value: Any, phrase: str, partial: bool) -> None:
    given = {} if field in ("input", "messages") else {"input": "a"}
    refused({**given, "partial": partial, field: value}, field, phrase)


@pytest.mark.parametrize(("value", "param", "phrase"), ITEMS + CONVERSATIONS)
def test_refused_item(value: Any, param: str, phrase: str) -> None:
    refused({"input": ["a", value]}, param.replace("@", "input[1]"), phrase)

    request = read({"input": ["a", value, "c"], "partial": True})
    fault = request.items[1]
    assert isinstance(fault, Refusal) and phrase in fault.message and fault.param == param.replace("@", "input[1]")
    assert (request.items[0], request.items[2]) == (item("a", param="input[0]"), item("c", param="input[2]"))


@pytest.mark.parametrize(
    ("value", "param", "phrase"),
    [
        (True, "input", "must be a string, an object, or a list of messages"),
        ({"type": "text", "text": "a", "data": "b"}, "input", TWO),
        ({"type": "image", "data": "?"}, "input.data", NO_BASE64),
    ],
)
def test_refused_item_alone(value: Any, param: str, phrase: str) -> None:
    """A fault of an input that is not in a list has its place; the faults are those of test_refused_item."""
    refused({"input": value}, param, phrase)


@pytest.mark.parametrize(("messages", "param", "phrase"), CONVERSATIONS)
def test_refused_conversation(messages: list[Any], param: str, phrase: str) -> None:
    refused({"input": messages}, param.replace("@", "input"), phrase)
    refused({"messages": messages}, param.replace("@", "messages"), phrase)

    (fault,) = read({"messages": messages, "partial": True}).items
    assert isinstance(fault, Refusal) and phrase in fault.message and fault.param == param.replace("@", "messages")


@pytest.mark.parametrize("messages", [[USER, "a"], [USER, None], ["a", USER], [{"content": "a"}]])
def test_every_message_needs_a_role(messages: list[Any]) -> None:
    wrong = next(index for index, value in enumerate(messages) if value is not USER)
    refused({"messages": messages}, f"messages[{wrong}].role", '"system", "user" or "assistant"')


@pytest.mark.parametrize("value", [None, 1, 1.5])
def test_an_element_that_is_no_item(value: Any) -> None:
    refused({"input": ["a", value]}, "input[1]", "must be a string, an object, or a list of messages")


def test_a_single_number_is_no_item() -> None:
    refused({"input": 5}, "input", "must be a string, an object, or a list of messages")


def test_messages_among_other_items() -> None:
    refused({"input": [USER, "a"]}, "input[0]", "outside of a conversation")
    refused({"input": ["a", USER]}, "input[1]", "outside of a conversation")


def test_modality_image_refuses_text() -> None:
    refused({"input": ["a cat!", URL], "modality": "image"}, "input[0]", NO_BASE64)


@pytest.mark.parametrize("model", ["", "Served", "gpt-4"])
def test_another_model(model: str) -> None:
    with pytest.raises(ModelNotFound, match="this server has Org/served, served") as caught:
        read({"input": "a", "model": model})
    assert caught.value.param == "model"
    assert not isinstance(caught.value, InvalidRequest)


def test_limits_are_met_exactly() -> None:
    whole = base64.b64encode(bytes(30)).decode()
    assert read({"input": {"image": whole}}).items == (item(by_data("input.image", bytes(30))),)
    padded = base64.b64encode(bytes(28)).decode()
    assert read({"input": {"image": padded}}, RequestLimits(frozenset(), 1, 1, 1, 28)).items
    assert len(read({"input": ["a"] * 4}).items) == 4
    request = read({"input": {"image": [URL] * 16, "text": ["a"] * 40}}).items[0]
    assert isinstance(request, RequestItem) and len(request.parts) == 56
    longest = "http://a/" + "b" * (8190 - 9)
    assert read({"input": {"image": longest}}).items == (item(by_url("input.image", longest)),)


@pytest.mark.parametrize(
    "body",
    [
        b'{"input": "s3cret"',
        {"input": {"type": "s3cret", "text": "s3cret"}},
        {"input": {"image": "s3cret!"}},
        {"input": {"image": "http://s3cret:x/"}},
        {"input": {"image": "s3cret://a"}},
        {"input": [{"role": "s3cret", "content": "s3cret"}]},
        {"input": "a", "encoding_format": "s3cret"},
        {"input": "a", "model": "s3cret"},
    ],
)
def test_a_refusal_neither_repeats_nor_holds_the_body(body: Any) -> None:
    with pytest.raises((InvalidRequest, ModelNotFound)) as caught:
        read(body)
    assert "s3cret" not in str(caught.value)
    assert caught.value.__context__ is None


def test_a_fault_kept_in_its_slot_holds_no_frames() -> None:
    (fault,) = read({"input": {"image": "not base64!"}, "partial": True}).items
    assert isinstance(fault, Refusal)


def test_repr_shows_no_content() -> None:
    shown = repr(read({"input": [{"text": "s3cret", "image": ["http://s3cret", B64], "instruction": "s3cret"}]}))
    assert "s3cret" not in shown and "jpg" not in shown and "input[0]" in shown


def test_instructions_are_counted_once_where_they_are_shared() -> None:
    texts, long = ["a", "b", "c"], "x" * 5000
    plain = read({"input": texts}).num_bytes
    assert plain + 5000 < read({"input": texts, "instruction": long}).num_bytes < plain + 6000
    assert read({"input": [{"text": text, "instruction": long} for text in texts]}).num_bytes > plain + 15_000


def test_large_bodies_are_read_in_linear_time() -> None:
    """A regular expression, or a search without bound, would not come to an end within a test's time limit."""
    size = 30 << 20
    limits = RequestLimits(frozenset(), 4, 16, 64, 20 << 20)
    for value in ["data:" + "a;" * (size // 2), "http://" + "[" * size, "A" * size, " " * size, "=" * size, "a:" * (size // 2)]:
        body = orjson.dumps({"input": {"image": value}})
        with pytest.raises(InvalidRequest):
            parse(body, limits)


WORDS = st.sampled_from(
    [
        *("type", "text", "data", "image", "image_url", "image_base64", "content", "role", "instruction", "url", "video"),
        *("user", "system", "assistant", "input", "messages", "float", "base64", "served", DATA_URI, URL, B64, ""),
    ]
)
LEAVES = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | WORDS | st.text(max_size=8)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=4), max_leaves=12
)
FIELD_NAMES = st.sampled_from(
    [
        *("input", "messages", "model", "instruction", "dimensions", "encoding_format", "truncate", "truncate_prompt_tokens"),
        *("modality", "partial", "user", "other"),
    ]
)
REQUESTS = st.builds(
    lambda fields, given: {**fields, **given},
    st.dictionaries(FIELD_NAMES, LEAVES, max_size=2),
    st.dictionaries(st.sampled_from(["input", "messages"]), VALUES, min_size=1, max_size=1),
)


def outcome(body: bytes) -> None:
    try:
        request = parse(body, LIMITS)
    except (InvalidRequest, ModelNotFound) as fault:
        assert str(fault)
        return
    assert isinstance(request, EmbeddingRequest) and request.items
    for value in request.items:
        if isinstance(value, Refusal):
            assert request.partial and value.param
        else:
            assert value.parts
            for part in value.parts:
                assert isinstance(part, str) or (part.url is None) != (part.data is None)


@settings(derandomize=True, max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(VALUES | REQUESTS)
def test_any_json_is_a_request_or_a_refusal(body: Any) -> None:
    outcome(orjson.dumps(body))


@settings(derandomize=True, max_examples=300, deadline=None)
@given(st.binary(max_size=64))
def test_any_bytes_are_a_request_or_a_refusal(body: bytes) -> None:
    outcome(body)
    outcome(b'{"input":"' + body + b'"}')
