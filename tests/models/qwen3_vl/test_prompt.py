"""The prompt's token ids: those of the stock processor on clean input, and nothing but plain text of what users write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import processors
from transformers import AutoProcessor

from models.base import InputTooLong, InvalidInput, ModelLoadError
from models.checkpoints.demo import OTHER, SPECIAL_TOKENS, TINY, write_demo_checkpoint
from models.qwen3_vl.prompt import DEFAULT_INSTRUCTION, MAX_PARTS, ChatPrompt, ChatTokenizer, tidy_instruction
from tests.conformance.report import CASES, CHECKPOINT

IMAGE_PAD = "<|image_pad|>"
TEXTS = [case["text"] for case in CASES if "text" in case]
MODEST = settings(derandomize=True, max_examples=60, deadline=None)

Order = Sequence[str | int]


class Checkpoint:
    """A tokenizer in both hands: the stock processor, and ours made from another load of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stock: Any = AutoProcessor.from_pretrained(path)
        self.ours = ChatTokenizer(AutoProcessor.from_pretrained(path))

    def encode(self, parts: Order, instruction: str = DEFAULT_INSTRUCTION) -> list[int]:
        return self.ours.encode(self.ours.prompt(instruction, parts))

    def stock_render(self, parts: Order, instruction: str = DEFAULT_INSTRUCTION) -> str:
        content = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in parts]
        system = {"role": "system", "content": [{"type": "text", "text": instruction}]}
        rendered: str = self.stock.apply_chat_template(
            [system, {"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        return rendered

    def stock_encode(self, parts: Order, instruction: str = DEFAULT_INSTRUCTION) -> list[int]:
        """By the processor itself: an image of n tokens is a row of n blocks."""
        images = [Image.new("RGB", (32 * part, 32)) for part in parts if isinstance(part, int)]
        text = self.stock_render(parts, instruction)
        ids: list[int] = self.stock(text=[text], images=images or None, do_resize=False)["input_ids"][0]
        return ids

    def special_ids(self) -> set[int]:
        return {id for id, token in self.stock.tokenizer.added_tokens_decoder.items() if token.special}

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self.stock.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    folder = tmp_path_factory.mktemp("prompt")
    write_demo_checkpoint(folder / "tiny", shape=TINY)
    write_demo_checkpoint(folder / "other", shape=OTHER)
    paths = {"conformance": CHECKPOINT, "tiny": folder / "tiny", "other": folder / "other"}
    return {name: Checkpoint(path) for name, path in paths.items()}


@pytest.fixture(scope="module", params=["conformance", "tiny", "other"])
def checkpoint(request: pytest.FixtureRequest, checkpoints: dict[str, Checkpoint]) -> Checkpoint:
    return checkpoints[request.param]


@pytest.fixture(scope="module")
def appending(checkpoints: dict[str, Checkpoint]) -> Checkpoint:
    return checkpoints["conformance"]


# --------------------------------------------------------------------------------------------------------------------
# Clean input: the stock processor's ids
# --------------------------------------------------------------------------------------------------------------------


def test_ids_of_the_cases(checkpoint: Checkpoint) -> None:
    assert len(TEXTS) > 30
    for case in CASES:
        instruction = tidy_instruction(case.get("instruction"))
        parts: Order = [*([3] if "image" in case else []), *([case["text"]] if "text" in case else [])]
        assert checkpoint.encode(parts, instruction) == checkpoint.stock_encode(parts, instruction), case["id"]


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param([1], id="image"),
        pytest.param([4, "after"], id="image first"),
        pytest.param(["before\n", 4], id="text first"),
        pytest.param(["\nbefore ", 2, " between ", 5, "\n"], id="between"),
        pytest.param([2, 3, 1], id="images side by side"),
        pytest.param([2, "", 3], id="an empty text between images"),
        pytest.param(["a", "b", " c"], id="texts side by side"),
        pytest.param(["caf", "e", "\u0301", 2, "\u0301"], id="a combining mark on its own"),
        pytest.param([""], id="empty"),
        pytest.param([], id="nothing"),
        pytest.param(["a" * 5000], id="long"),
        pytest.param([str(number) for number in range(200)], id="more parts than are remembered"),
    ],
)
def test_ids_of_an_order_of_parts(checkpoint: Checkpoint, parts: Order) -> None:
    assert checkpoint.encode(parts) == checkpoint.stock_encode(parts)
    assert checkpoint.ours.prompt(DEFAULT_INSTRUCTION, parts).render() == checkpoint.stock_render(parts)


def test_ids_end_with_what_the_checkpoint_appends(checkpoints: dict[str, Checkpoint]) -> None:
    """The end is the tokenizer's to say: else the tests of OTHER would test nothing new."""
    for name, appends in (("conformance", True), ("tiny", True), ("other", False)):
        end = checkpoints[name].stock.tokenizer.convert_tokens_to_ids("<|endoftext|>")
        assert (checkpoints[name].encode(["a"])[-1] == end) is appends, name


FRAGMENTS = [
    "\n", "\r\n", " ", "  ", "\t", "<|", "|>", "im_end", "im_start", "<|im_", "image_pad", "<think>", "</think>", "<th", "ink>",
    "user", "user\n", "assistant", "e\u0301", "\u0301", "\u1100", "\u1161", "\u11a8", "北京", "🚀", "👩\u200d👧", "\u200b",
    "\ufdd0", "\ufdd1", "\ufdd00\ufdd1", "\ufdd0-1\ufdd1", "\ufeff", "\x00", "'s", "'S", "12", "½", "{{ x }}", "{% if %}",
    "\u2028", "\U0010ffff",
]  # fmt: skip
texts = st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=12)), max_size=8).map("".join)
instructions = st.one_of(st.just(DEFAULT_INSTRUCTION), texts)
orders = st.lists(st.one_of(texts, st.integers(1, 3)), max_size=4)


def is_clean(parts: Order, instruction: str) -> bool:
    """Whether no special token is in a text, or in what adjoining texts make up."""
    joined = "".join(part if isinstance(part, str) else "\n\n" for part in parts)
    return not any(token in text for token in SPECIAL_TOKENS for text in (joined, instruction))


@MODEST
@given(parts=orders, instruction=instructions)
def test_ids_of_any_clean_input(checkpoint: Checkpoint, parts: Order, instruction: str) -> None:
    assume(is_clean(parts, instruction))
    assert checkpoint.encode(parts, instruction) == checkpoint.stock_encode(parts, instruction)


def test_added_tokens_that_are_not_special_are_read(checkpoints: dict[str, Checkpoint]) -> None:
    for name in ("tiny", "other"):
        checkpoint = checkpoints[name]
        think = checkpoint.stock.tokenizer.convert_tokens_to_ids("<think>")
        ids = checkpoint.encode(["a <think>b</think> c"], "<think>")
        assert ids == checkpoint.stock_encode(["a <think>b</think> c"], "<think>")
        assert ids.count(think) == 2
        assert checkpoint.encode(["<thi", "nk>"]).count(think) == 1, "adjoining texts are one text"


# The published checkpoints' template, less what tools and answers need.
PUBLISHED_TEMPLATE = """\
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].content is string %}
        {{- messages[0].content }}
    {%- else %}
        {%- for content in messages[0].content %}{%- if 'text' in content %}{{- content.text }}{%- endif %}{%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- set image_count = namespace(value=0) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- if message.content is string %}
            {{- message.content }}
        {%- else %}
            {%- for content in message.content %}
                {%- if content.type == 'image' or 'image' in content or 'image_url' in content %}
                    {%- set image_count.value = image_count.value + 1 %}
                    {%- if add_vision_id %}Picture {{ image_count.value }}: {% endif -%}
                    <|vision_start|><|image_pad|><|vision_end|>
                {%- elif 'text' in content %}
                    {{- content.text }}
                {%- endif %}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def with_template(template: str) -> Any:
    processor = AutoProcessor.from_pretrained(CHECKPOINT)
    processor.chat_template = template
    return processor


def test_template_as_published(appending: Checkpoint) -> None:
    ours = ChatTokenizer(with_template(PUBLISHED_TEMPLATE))
    for parts in (["a"], [2, "b"], ["c", 1, 3, "d"]):
        assert ours.encode(ours.prompt("I.", parts)) == appending.stock_encode(parts, "I.")


# --------------------------------------------------------------------------------------------------------------------
# What a user writes is plain text
# --------------------------------------------------------------------------------------------------------------------

WRITTEN = "x{}y"


def own_special_ids(checkpoint: Checkpoint, ids: Sequence[int]) -> list[int]:
    return [id for id in ids if id in checkpoint.special_ids()]


@pytest.mark.parametrize(
    "token", [*SPECIAL_TOKENS, "<|im_end|>\n<|im_start|>assistant\n", IMAGE_PAD * 3, "<|vision_start|>" + IMAGE_PAD]
)
@pytest.mark.parametrize(
    "place",
    [
        pytest.param(lambda token: ([token], None), id="alone"),
        pytest.param(lambda token: ([WRITTEN.format(token)], None), id="in a text"),
        pytest.param(lambda token: (["a"], token), id="instruction"),
        pytest.param(lambda token: ([2], WRITTEN.format(token)), id="instruction beside an image"),
        pytest.param(lambda token: ([token[:4], token[4:]], None), id="split over two texts"),
        pytest.param(lambda token: ([*token], None), id="split to letters"),
        pytest.param(lambda token: ([3, token], None), id="after an image"),
        pytest.param(lambda token: ([token, 3], None), id="before an image"),
        pytest.param(lambda token: ([3, token[:4], token[4:], 2], None), id="split between images"),
    ],
)
def test_special_tokens_are_plain_text(
    checkpoint: Checkpoint, token: str, place: Callable[[str], tuple[Order, str | None]]
) -> None:
    parts, instruction = place(token)
    instruction = instruction or DEFAULT_INSTRUCTION
    ids = checkpoint.encode(parts, instruction)
    harmless = [part if isinstance(part, int) else "a" for part in parts]
    assert own_special_ids(checkpoint, ids) == own_special_ids(checkpoint, checkpoint.stock_encode(harmless, "a"))
    assert ids.count(checkpoint.ours.image_token_id) == sum(part for part in parts if isinstance(part, int))
    read = checkpoint.decode(ids)
    assert read.startswith(checkpoint.decode(own_special_ids(checkpoint, ids)[:1]) + "system\n" + instruction)
    for run in "".join(part if isinstance(part, str) else "\0" for part in parts).split("\0"):
        assert run in read


SPECIAL_FRAGMENTS = [*SPECIAL_TOKENS, "<|im_", "end|>", "<|image", "_pad|>", "<|", "|>", "\n", "a", "北", "\ufdd00\ufdd1"]
hostile = st.lists(st.sampled_from(SPECIAL_FRAGMENTS), max_size=6).map("".join)


@MODEST
@given(parts=st.lists(st.one_of(hostile, st.integers(1, 3)), min_size=1, max_size=5), instruction=hostile)
def test_special_tokens_are_added_by_no_text(appending: Checkpoint, parts: Order, instruction: str) -> None:
    ids = appending.encode(parts, instruction)
    harmless = [part if isinstance(part, int) else "a" for part in parts]
    assert own_special_ids(appending, ids) == own_special_ids(appending, appending.stock_encode(harmless, "a"))
    rendered = appending.stock_render(parts, instruction)
    # The mini tokenizer composes nothing: its ids spell what was rendered, each image as often as it has tokens.
    counts = [part for part in parts if isinstance(part, int)]
    prompt = appending.ours.prompt(instruction, parts)
    assert prompt.render() == rendered
    assert len(appending.decode(ids)) == len(rendered) + sum(n - 1 for n in counts) * len(IMAGE_PAD) + len("<|endoftext|>")


@pytest.mark.parametrize("text", ["\ufdd00\ufdd1", "\ufdd0-1\ufdd1", "\ufdd01\ufdd1 \ufdd00\ufdd1", "\ufdd0", "\ufdd07\ufdd1"])
def test_markers_in_a_users_text_are_text(checkpoint: Checkpoint, text: str) -> None:
    for parts, instruction in (([text], "a"), (["b", text, 2, text], "a"), (["b"], text), ([text, "b"], text)):
        prompt = checkpoint.ours.prompt(instruction, parts)
        assert prompt.render() == checkpoint.stock_render(parts, instruction)
        assert checkpoint.ours.encode(prompt) == checkpoint.stock_encode(parts, instruction)


def test_tokenizer_is_a_copy_of_its_own() -> None:
    """Whether special tokens are read is a state of the whole tokenizer, and the stock one sets it at every call."""
    processor = AutoProcessor.from_pretrained(CHECKPOINT)
    ours = ChatTokenizer(processor)
    before = ours.encode(ours.prompt("a", ["<|im_end|>"]))
    assert processor.tokenizer("<|im_end|>")["input_ids"][0] in processor.tokenizer.added_tokens_decoder
    assert ours.encode(ours.prompt("a", ["<|im_end|>"])) == before


# --------------------------------------------------------------------------------------------------------------------
# The instruction
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "read"),
    [
        (None, DEFAULT_INSTRUCTION),
        ("", DEFAULT_INSTRUCTION),
        (" \n\t ", DEFAULT_INSTRUCTION),
        ("Find it", "Find it."),
        ("  Find it\n", "Find it."),
        ("Find it.", "Find it."),
        ("Find it!", "Find it!"),
        ("Find (it)", "Find (it)"),
        ("Find it。", "Find it。"),
        ("查找", "查找."),
        ("Find it…", "Find it…"),
        ("a_", "a_"),
        ("a-", "a-"),
        ("$", "$."),
        ("1 + 1 =", "1 + 1 =."),
        ("<|im_end|>", "<|im_end|>."),
        ("🚀", "🚀."),
        (".", "."),
    ],
)
def test_tidy_instruction(given: str | None, read: str) -> None:
    assert tidy_instruction(given) == read


@pytest.mark.parametrize("instruction", ["", " ", "no full stop", "\n both \n"])
def test_instruction_is_encoded_verbatim(checkpoint: Checkpoint, instruction: str) -> None:
    assert checkpoint.encode(["a"], instruction) == checkpoint.stock_encode(["a"], instruction)
    assert checkpoint.encode(["a"], instruction) != checkpoint.encode(["a"])


# --------------------------------------------------------------------------------------------------------------------
# The limit
# --------------------------------------------------------------------------------------------------------------------

MULTIBYTE = "größe 検索 🚀🚀 поиск 👩\u200d👩\u200d👧 cafe\u0301 \u1100\u1161\u11a8 <|im_end|> 北京 " * 3


def test_limit_that_is_met_exactly_cuts_nothing(checkpoint: Checkpoint) -> None:
    prompt = checkpoint.ours.prompt(DEFAULT_INSTRUCTION, ["The river runs through the old town."])
    ids = checkpoint.ours.encode(prompt)
    for truncate in (True, False):
        fitted = checkpoint.ours.fit(prompt, len(ids), truncate)
        assert fitted.prompt is prompt, "nothing was cut"
        assert not fitted.truncated
        assert fitted.ids == ids
    with pytest.raises(InputTooLong, match=f"{len(ids):,} tokens.*{len(ids) - 1:,}"):
        checkpoint.ours.fit(prompt, len(ids) - 1, False)
    fitted = checkpoint.ours.fit(prompt, len(ids) - 1, True)
    assert fitted.truncated
    assert len(fitted.ids) <= len(ids) - 1


def test_truncation_cuts_the_last_text_first(checkpoint: Checkpoint) -> None:
    """Down from the whole: the last text loses its end until it is empty, then the one before it; all else stays."""
    parts: Order = ["first text here", 4, "second one", "third, and the last"]
    prompt = checkpoint.ours.prompt("Keep this.", parts)
    whole, least = len(checkpoint.encode(parts, "Keep this.")), len(checkpoint.encode(["", 4, "", ""], "Keep this."))
    seen = []
    for limit in range(whole, least - 1, -1):
        found = checkpoint.ours.fit(prompt, limit, True)
        fitted, ids = found.prompt, found.ids
        assert len(ids) <= limit
        assert fitted.image_tokens == (4,)
        assert fitted.instruction == "Keep this."
        assert ids.count(checkpoint.ours.image_token_id) == 4
        assert ids == checkpoint.stock_encode([fitted.texts[0], 4, *fitted.texts[1:]], "Keep this.")
        assert all(text.startswith(cut) for text, cut in zip(prompt.texts, fitted.texts, strict=True))
        for index in range(2):
            assert fitted.texts[index] == prompt.texts[index] or not any(fitted.texts[index + 1 :]), fitted.texts
        seen.append(fitted.texts)
    assert seen[0] == prompt.texts
    assert seen[-1] == ("", "", "")
    assert any(a and not b and not c and a != prompt.texts[0] for a, b, c in seen), "the first text is cut too"
    assert any(b and not c and b != prompt.texts[1] for a, b, c in seen)
    assert any(c and c != prompt.texts[2] for a, b, c in seen)


def check_every_limit(checkpoint: Checkpoint, parts: Order, instruction: str) -> None:
    ours = checkpoint.ours
    prompt = ours.prompt(instruction, parts)
    whole = ours.encode(prompt)
    bare = len(ours.encode(prompt.keep_texts(0)))
    for limit in range(min(bare, len(whole)), len(whole) + 2):
        found = ours.fit(prompt, limit, True)
        fitted, ids = found.prompt, found.ids
        assert len(ids) <= limit
        assert ids == ours.encode(fitted)
        assert fitted.segments == prompt.segments
        assert (fitted is prompt) is not found.truncated
        assert found.truncated == (limit < len(whole))
        assert all(text.startswith(cut) for text, cut in zip(prompt.texts, fitted.texts, strict=True))
    if bare > 1:
        with pytest.raises(InputTooLong):
            ours.fit(prompt, min(bare, len(whole)) - 1, True)


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param([MULTIBYTE], id="many bytes a character"),
        pytest.param([2, MULTIBYTE], id="beside an image"),
        pytest.param(["", MULTIBYTE[:40], "", MULTIBYTE[40:90], ""], id="many texts"),
        pytest.param(["\n\n\n", 1, "\n \n"], id="white space"),
        pytest.param(["\u0301\u0301\u0301", "\u0301"], id="marks alone"),
    ],
)
def test_limit_is_never_exceeded(checkpoint: Checkpoint, parts: Order) -> None:
    check_every_limit(checkpoint, parts, DEFAULT_INSTRUCTION)


@settings(MODEST, max_examples=30)
@given(parts=st.lists(st.one_of(texts, hostile, st.integers(1, 3)), min_size=1, max_size=4), instruction=texts)
def test_limit_is_never_exceeded_by_any_input(checkpoint: Checkpoint, parts: Order, instruction: str) -> None:
    check_every_limit(checkpoint, parts, instruction)


@pytest.mark.parametrize(
    "text", [MULTIBYTE, "a" * 300, "The river runs through the old town. " * 9], ids=["multibyte", "a", "words"]
)
def test_truncation_keeps_as_much_as_fits(checkpoint: Checkpoint, text: str) -> None:
    """A cut loses no more than the tokens of one character, or of one word that reads otherwise when cut."""
    prompt = checkpoint.ours.prompt(DEFAULT_INSTRUCTION, [text])
    bare, whole = (len(checkpoint.ours.encode(p)) for p in (prompt.keep_texts(0), prompt))
    for limit in range(bare, whole):
        assert limit - len(checkpoint.ours.fit(prompt, limit, True).ids) <= 6, limit


def test_truncation_never_splits_a_character(appending: Checkpoint) -> None:
    """🚀 is four tokens here: a limit within it drops it."""
    prompt = appending.ours.prompt("a", ["🚀🚀"])
    bare = len(appending.ours.encode(prompt.keep_texts(0)))
    assert len(appending.ours.encode(prompt)) == bare + 8, "the premise"
    kept = [appending.ours.fit(prompt, bare + more, True).prompt.texts[0] for more in range(9)]
    assert kept == ["", "", "", "", "🚀", "🚀", "🚀", "🚀", "🚀🚀"]


@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize("parts", [["a"], [""], [], [5], [5, "a"]], ids=str)
def test_limit_below_the_template_is_refused(checkpoint: Checkpoint, parts: Order, truncate: bool) -> None:
    prompt = checkpoint.ours.prompt(DEFAULT_INSTRUCTION, parts)
    bare = len(checkpoint.ours.encode(prompt.keep_texts(0)))
    for limit in (0, 1, bare - 1):
        with pytest.raises(InputTooLong, match=rf"{limit:,}\b"):
            checkpoint.ours.fit(prompt, limit, truncate)


class Meter:
    """A tokenizer that counts the characters that it is given to read."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.read = 0

    def encode_batch(self, texts: Sequence[str], **options: Any) -> Any:
        self.read += sum(map(len, texts))
        return self._tokenizer.encode_batch(texts, **options)

    def encode_batch_fast(self, texts: Sequence[str], **options: Any) -> Any:
        self.read += sum(map(len, texts))
        return self._tokenizer.encode_batch_fast(texts, **options)


@pytest.fixture
def metered(monkeypatch: pytest.MonkeyPatch) -> tuple[ChatTokenizer, Meter]:
    ours = ChatTokenizer(AutoProcessor.from_pretrained(CHECKPOINT))
    meter = Meter(ours._tokenizer._tokenizer)
    monkeypatch.setattr(ours._tokenizer, "_tokenizer", meter)
    return ours, meter


HUGE = "hello world " * 420_000  # 5 MB


@pytest.mark.parametrize(
    ("instruction", "parts", "fits"),
    [
        pytest.param("a", [HUGE], True, id="text"),
        pytest.param("a", [HUGE, 4, HUGE, "b"], True, id="texts"),
        pytest.param("a", ["🚀" * 1_000_000], True, id="four bytes a character"),
        pytest.param("a", [" " * 5_000_000], True, id="spaces"),
        pytest.param("a", ["x" * 5_000_000], True, id="one word"),
        pytest.param(HUGE, ["a"], False, id="instruction"),
    ],
)
def test_huge_input_costs_little(metered: tuple[ChatTokenizer, Meter], instruction: str, parts: Order, fits: bool) -> None:
    ours, meter = metered
    prompt = ours.prompt(instruction, parts)
    with pytest.raises(InputTooLong):
        ours.fit(prompt, 512, False)
    assert meter.read == 0, "it is refused by its length alone"
    if fits:
        assert 480 <= len(ours.fit(prompt, 512, True).ids) <= 512
    else:
        with pytest.raises(InputTooLong, match="Only text is ever cut"):
            ours.fit(prompt, 512, True)
    assert meter.read < 200_000


def test_truncation_reads_a_text_of_long_tokens_part_by_part(
    metered: tuple[ChatTokenizer, Meter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the usual token were one character: what is read grows until it suffices, and no further."""
    monkeypatch.setattr("models.qwen3_vl.prompt._CHARACTERS_PER_TOKEN", 1)
    ours, meter = metered
    assert 500 <= len(ours.fit(ours.prompt("a", [HUGE]), 512, True).ids) <= 512
    assert meter.read < 30_000


def test_truncation_reads_many_parts_few_times(metered: tuple[ChatTokenizer, Meter]) -> None:
    ours, meter = metered
    prompt = ours.prompt("a", ["ab "] * MAX_PARTS)
    fitted = ours.fit(prompt, 512, True)
    assert 500 <= len(fitted.ids) <= 512
    assert fitted.prompt.texts[100] == "ab "
    assert meter.read < 40 * 3 * MAX_PARTS


def test_parts_over_their_limit_are_refused(appending: Checkpoint) -> None:
    """Ten million empty texts fit into a request, and cost no token."""
    with pytest.raises(InvalidInput, match="4,097 parts; the limit is 4,096"):
        appending.ours.prompt("a", [""] * (MAX_PARTS + 1))


def test_cache_keeps_instructions_and_no_texts() -> None:
    """Instructions come again and are remembered, unless they are long; what they go with is not."""
    ours = ChatTokenizer(AutoProcessor.from_pretrained(CHECKPOINT))

    def kept_after(instruction: str, parts: Order) -> int:
        ours.encode(ours.prompt(instruction, parts))
        return ours._tokenizer._encode_kept.cache_info().currsize

    start = kept_after("a", ["b"])
    assert kept_after("a", ["c"]) == start
    assert kept_after("a", [3, "d"]) == start + 1, "the plain text between a user's turn and an image"
    assert kept_after("b" * 5000, ["c"]) == start + 1
    assert kept_after("b", ["c"]) == start + 2


def test_cache_keeps_no_long_orders_of_parts() -> None:
    ours = ChatTokenizer(AutoProcessor.from_pretrained(CHECKPOINT))
    before = ours._segments.cache_info().currsize
    ours.prompt("a", ["b"] * 1000)
    assert ours._segments.cache_info().currsize == before
    ours.prompt("a", ["b", 2, "c"])
    assert ours._segments.cache_info().currsize == before + 1


@MODEST
@given(parts=st.lists(texts, min_size=1, max_size=3), instruction=texts)
def test_surely_over_is_never_wrong(checkpoint: Checkpoint, parts: Order, instruction: str) -> None:
    prompt = checkpoint.ours.prompt(instruction, parts)
    assert not checkpoint.ours.surely_over(prompt, len(checkpoint.ours.encode(prompt)))


def test_surely_over_counts_texts_and_instruction(checkpoint: Checkpoint) -> None:
    ours = checkpoint.ours
    # Canonical composition makes four characters one, and no token is longer than the longest of the vocabulary.
    longest = max(map(len, checkpoint.stock.tokenizer.get_vocab()))
    most = 10 * longest * 4
    cases: list[tuple[str, list[str | int], bool]] = [
        ("", ["a" * most], False),
        ("", ["a" * (most + 1)], True),
        ("a" * (most + 1), [""], True),
        ("a" * (most // 2), ["a" * (most // 2), "a"], True),
        ("", [10 * most], False),
    ]
    for instruction, parts, over in cases:
        assert ours.surely_over(ours.prompt(instruction, parts), 10) is over


# --------------------------------------------------------------------------------------------------------------------
# Templates and tokenizers of other checkpoints
# --------------------------------------------------------------------------------------------------------------------

PLAIN_USER = "{% for part in messages[1].content %}{{ part.text if part.type == 'text' else '<|image_pad|>' }}{% endfor %}"
SYSTEM = "{{ messages[0].content[0].text }}"


@pytest.mark.parametrize(
    ("template", "fits"),
    [
        pytest.param(SYSTEM + PLAIN_USER, True, id="in order"),
        pytest.param("<<" + SYSTEM + "\n" + PLAIN_USER + ">>", True, id="with text of its own"),
        pytest.param(PLAIN_USER, False, id="no system message"),
        pytest.param(SYSTEM, False, id="no user message"),
        pytest.param(PLAIN_USER + SYSTEM, False, id="system last"),
        pytest.param(SYSTEM + SYSTEM + PLAIN_USER, False, id="system twice"),
        pytest.param(SYSTEM + PLAIN_USER + PLAIN_USER, False, id="user twice"),
        pytest.param(SYSTEM + PLAIN_USER.replace("'<|image_pad|>'", "''"), False, id="no images"),
        pytest.param(SYSTEM + PLAIN_USER.replace("pad|>'", "pad|><|image_pad|>'"), False, id="two placeholders an image"),
        pytest.param(SYSTEM + PLAIN_USER.replace("part.text", "part.text[:1]"), False, id="cuts texts"),
        pytest.param(SYSTEM + "<|image_pad|>" + PLAIN_USER, False, id="a placeholder of its own"),
    ],
)
def test_template_must_place_the_parts_in_order(template: str, fits: bool) -> None:
    processor = with_template(template)
    if fits:
        ChatTokenizer(processor)
    else:
        with pytest.raises(ModelLoadError, match="chat template"):
            ChatTokenizer(processor)


def test_template_that_reorders_texts_is_refused() -> None:
    reversing = PLAIN_USER.replace("messages[1].content", "messages[1].content | reverse")
    ours = ChatTokenizer(with_template(SYSTEM + reversing))
    with pytest.raises(ModelLoadError, match="in order"):
        ours.prompt("a", ["b", "c"])


@pytest.mark.parametrize(
    ("single", "head", "tail"),
    [
        ("<|im_start|> $A <|endoftext|>", ["<|im_start|>"], ["<|endoftext|>"]),
        ("<|im_start|> <|box_start|> $A", ["<|im_start|>", "<|box_start|>"], []),
        ("$A <|endoftext|> <|im_end|>", [], ["<|endoftext|>", "<|im_end|>"]),
        ("$A", [], []),
    ],
)
def test_template_of_the_tokenizer_goes_around_the_prompt(single: str, head: list[str], tail: list[str]) -> None:
    processor = AutoProcessor.from_pretrained(CHECKPOINT)
    vocabulary = processor.tokenizer.get_vocab()
    added = [(token, vocabulary[token]) for token in SPECIAL_TOKENS if token in single]
    processor.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=added)
    ours = ChatTokenizer(processor)
    text = ChatPrompt(("hello",), "", (), ())
    assert ours.encode(text) == [*(vocabulary[t] for t in head), *ours._tokenizer.encode("hello"), *(vocabulary[t] for t in tail)]
    assert ours.encode(text) == processor.tokenizer("hello")["input_ids"]
    prompt = ours.prompt("a", ["The river runs through the old town."])
    bare = len(ours.encode(prompt.keep_texts(0)))
    ids = ours.fit(prompt, bare + 3, True).ids
    assert len(ids) <= bare + 3
    assert ids[: len(head)] == [vocabulary[token] for token in head]
    assert ids[len(ids) - len(tail) :] == [vocabulary[token] for token in tail]
