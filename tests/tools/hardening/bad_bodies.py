"""Bodies that no server may take: bad by construction, never by what a parser of ours says of them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

from tests.support.hosts import base64_of, data_uri, picture

PNG = base64_of(picture(5))
URI = data_uri(picture(6))
GOOD: tuple[dict[str, Any], ...] = (
    {"input": "a lantern"},
    {"input": ["a lantern", "the harbour"], "dimensions": 8, "encoding_format": "base64"},
    {"input": {"text": "a lantern", "image": URI, "instruction": "Find it."}},
    {"input": [{"content": [{"type": "text", "text": "a"}, {"type": "image", "image": PNG}]}, "b"], "truncate": True},
    {"messages": [{"role": "system", "content": "Find it."}, {"role": "user", "content": "a lantern"}]},
)

_NO_STRING: tuple[Any, ...] = (0, 5, -1.5, True, False, [], {}, ["a"], {"a": "b"})
_NO_BOOLEAN: tuple[Any, ...] = (0, 1, "", "true", "false", 1.5, [], {}, [True])
_NO_INTEGER: tuple[Any, ...] = ("5", "", True, False, 1.5, [], {}, [5], {"a": 5}, 10**30, -(10**30))
# Field -> values that are wrong for it whatever else the body holds.
WRONG_FIELDS: dict[str, tuple[Any, ...]] = {
    "model": (*_NO_STRING, "", "another", "qwen3-vl-embedding-2b"),
    "instruction": _NO_STRING,
    "dimensions": (*_NO_INTEGER, 0, -1, 65, 4096, 2**63),
    "encoding_format": (*_NO_STRING, "", "FLOAT", "int8", "float ", "binary"),
    "truncate": _NO_BOOLEAN,
    "truncate_prompt_tokens": (*_NO_INTEGER, 0, -2, 2**63),
    "modality": (*_NO_STRING, "", "audio", "Image", "video"),
    "partial": _NO_BOOLEAN,
    "input": (5, 1.5, True, False, [], {}),
    "messages": (5, True, "a", {}, [], [5], ["a"], [[]], [None]),
}
_NO_IMAGE: tuple[Any, ...] = (
    *(5, True, {}, {"url": None}, {"url": 5}, {"url": []}, {"url": ""}, {"url": {"url": PNG}}, {"data": PNG}),
    *(
        "",
        " ",
        "!!!",
        "AAAA=",
        "=AAA",
        "A",
        "aGVsbG8=",
        PNG[: len(PNG) // 8 * 4],
        PNG[4:],
        PNG + "AAAA!",
        PNG.replace("/", "-") + "-",
        PNG[::-1],
    ),
    *(
        "data:image/png;base64,",
        "data:image/png,abc",
        "data:image/png;base64",
        "data:,",
        "data:image/png;base64,!!",
        "data:text/plain,a",
    ),
    *(
        "ftp://a/b.png",
        "file:///a.png",
        "http://",
        "https:///a",
        "http://[::1",
        "javascript:alert(1)",
        "http://a:0/",
        "http://a:b/",
    ),
)
# Items that are wrong wherever they stand.
WRONG_ITEMS: tuple[Any, ...] = (
    *(5, 0.5, True, {}, [], [5], [5, 6], [[5]], ["a"], [None], [{}], [{"role": "user"}, "a"], [[["a"]]]),
    *({"text": value} for value in (5, True, {}, [], [5], [None], ["a", 5], [["a"]])),
    *({"image": value} for value in (*_NO_IMAGE, [], [5], [PNG, 5], [PNG, ""], [[PNG]])),
    *({"type": "image", "image": value} for value in _NO_IMAGE),
    *({"type": "image_url", "image_url": value} for value in _NO_IMAGE),
    *({"type": "image_base64", "image_base64": value} for value in _NO_IMAGE),
    *({"text": "a", "instruction": value} for value in _NO_STRING),
    *({"content": value} for value in (5, True, {}, [], [5], [None], [[]], [{}], ["a", 5], [{"text": "a"}], [{"type": "text"}])),
    {"content": [{"type": "text", "text": "a", "instruction": "b"}]},
    {"content": ["data:image/png;base64,!!"]},
    "data:image/png;base64,aGVsbG8=",
    "data:video/mp4;base64,AAAA",
    *({"type": kind} for kind in ("text", "image", "image_url", "image_base64", "audio", "", 5, [], {}, "video", "TEXT")),
    *({"type": "text", "text": value} for value in (5, True, [], {}, ["a"])),
    *({"type": kind, "text": "a"} for kind in ("image", "image_url", "audio", "input_text", 5, True)),
    {"type": "text", "text": "a", "data": "b"},
    {"type": "image", "image": PNG, "data": PNG},
    {"text": "a", "content": "b"},
    {"text": "a", "data": "b"},
    {"image_url": PNG},
    {"data": "a"},
    {"text": "a", "video": "b"},
    {"type": "video_url", "video_url": {"url": "https://a/b.mp4"}},
    {"role": "user", "content": "a"},
    {"unknown": "a"},
    {"text": None, "image": None},
)
WRONG_CONVERSATIONS: tuple[Any, ...] = (
    [{"role": "user"}],
    [{"role": "user", "content": None}],
    [{"role": "user", "content": 5}],
    [{"role": "user", "content": []}],
    [{"role": "user", "content": [{"type": "video", "video": "a"}]}],
    [{"role": "system", "content": "a"}],
    [{"role": "assistant", "content": ""}],
    [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
    [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    [{"role": "system", "content": 5}, {"role": "user", "content": "a"}],
    [{"role": "system", "content": [{"type": "image", "image": PNG}]}, {"role": "user", "content": "a"}],
    *([{"role": role, "content": "a"}] for role in ("tool", "developer", "", 5, True, [], {}, "USER")),
    *(
        [{"role": "user", "content": [part]}]
        for part in (5, None, {}, {"text": "a"}, {"type": "audio"}, {"type": "text", "text": 5})
    ),
)


def not_json() -> Iterator[bytes]:
    """Bytes that are no JSON in UTF-8, or no object."""
    yield from (b"", b" ", b"\n", b"null", b"true", b"5", b'"input"', b"[]", b'["input"]', b'[{"input":"a"}]', b"{}", b"\x00")
    head, tail = b'{"input":', b"}"
    for value in (
        *(b"NaN", b"Infinity", b"-Infinity", b"nan", b"undefined", b"None", b"True", b"'a'", b"a", b'"a', b'a"', b'"a""b"', b""),
        *(
            b"01",
            b"+1",
            b".5",
            b"5.",
            b"1e",
            b"0x10",
            b"1_0",
            b"-",
            b"1e400",
            b"9" * 400,
            b"-0",
            b"1" * 20,
            b"1.0000000000000001",
        ),
        *(
            b'"\\x"',
            b'"\\u12"',
            b'"\\',
            b'"\\ud800"',
            b'"\\udc00"',
            b'"\\ud800\\u0041"',
            b'"a\x00b"',
            b'"a\nb"',
            b'"a\tb"',
            b'"\x1f"',
        ),
        *(
            b'"\xff"',
            b'"\xc3"',
            b'"\xc0\x80"',
            b'"\xed\xa0\x80"',
            b'"\xf8\x88\x80\x80\x80"',
            b'"\xf4\x90\x80\x80"',
            b'"\xe2\x82"',
        ),
        *(
            b'["a",]',
            b'["a" "b"]',
            b'[,"a"]',
            b'["a"',
            b'"a"]',
            b'{"text":"a",}',
            b'{"text" "a"}',
            b"{text:'a'}",
            b'"a"/*b*/',
            b'"a"//b',
        ),
        *(
            b"[" * 100_000 + b"]" * 100_000,
            b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
            b"[" * 5000,
            b'["a",' * 2000 + b"]" * 2000,
        ),
    ):
        yield head + value + tail
    good = b'{"input":"a"}'
    yield from (
        b"\xef\xbb\xbf" + good,
        good + good,
        good + b"x",
        good + b"\x00",
        good + b",",
        b"," + good,
        good[:-1] + b"]",
        b"=" + good,
    )
    yield from (good.decode().encode(coding) for coding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"))
    yield from (b"input=a", b"--a\r\nContent-Disposition: form-data\r\n\r\na\r\n--a--", b"<input>a</input>", b"\x1f\x8b\x08\x00")
    # The last of several values counts.
    yield from (b'{"input":"a","input":5}', b'{"input":"a","input":null}', b'{"input":"a","dimensions":8,"dimensions":"8"}')


def truncated() -> Iterator[bytes]:
    """Good bodies, cut at every byte."""
    for body in GOOD[:2] + GOOD[4:]:
        data = json.dumps(body).encode()
        yield from (data[:end] for end in range(len(data)))


def from_standard_library() -> Iterator[bytes]:
    """What Python's own tests of JSON must refuse, where they are installed; those that are JSON are no object with an input."""
    try:
        from test.test_json.test_fail import JSONDOCS
    except ImportError:
        return
    yield from (document.encode() for document in JSONDOCS)


def mutated() -> Iterator[bytes]:
    """Good bodies with one thing wrong."""
    bodies: list[dict[str, Any]] = []
    for body in GOOD:
        for field, values in WRONG_FIELDS.items():
            bodies += [body | {field: value} for value in values]
        bodies += [body | {"input": "a", "messages": [{"role": "user", "content": "a"}]}, {"model": None}, {"input": None}]
    for item in WRONG_ITEMS:
        # Of the lists only those of texts are a good list of items.
        bodies += [] if item == ["a"] else [{"input": item}]
        bodies += [{"input": [item, "a"]}, {"input": ["a", item, "b"]}, {"input": ["a", {"text": "b"}, item]}]
    for messages in WRONG_CONVERSATIONS:
        bodies += [{"messages": messages}, {"input": messages}, {"input": ["a", messages]}]
    bodies += [{"input": "word " * 40_000}, {"input": ["a"] * 2049}, {"input": [[1, 2, 3]] * 5}, {"input": list(range(3000))}]
    bodies += [{"input": {"text": [""] * 5000}}, {"input": "a", "truncate_prompt_tokens": 1}]
    yield from (json.dumps(body).encode() for body in bodies)


def bad_bodies(count: int) -> list[bytes]:
    """So many, of every kind, the same ones each time."""
    kinds = [list(kind) for kind in (not_json(), from_standard_library(), truncated(), mutated())]
    chosen: list[bytes] = []
    for index, kind in enumerate(kinds):
        random.Random(index).shuffle(kind)
        share = (count - len(chosen)) // (len(kinds) - index) if index < 3 else count - len(chosen)
        chosen += kind[:share]
    return chosen
