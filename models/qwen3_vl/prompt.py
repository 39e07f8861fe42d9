"""The chat prompt: instruction and parts -> token ids, as the checkpoint's chat template and tokenizer have them.

The template's special tokens go in by their ids, and what users write is plain text (models/tokenizer.py), also where two
adjoining parts spell a special token. So the template is rendered around markers, once for each order of parts. A user's piece is
tokenised together with the template's plain text beside it, since a leading newline merges with the template's last one. Without
special tokens in the users' texts the ids are those of the checkpoint's processor called on the rendered text.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from typing import Any

from models.base import InputTooLong, InvalidInput, ModelLoadError, Refusal
from models.tokenizer import MAX_KEPT_CHARACTERS, TOO_LONG_HINT, PlainTextTokenizer

# The official embedder's default (QwenLM/Qwen3-VL-Embedding, Qwen3VLEmbedder).
DEFAULT_INSTRUCTION = "Represent the user's input."

# Canonical composition (NFC) makes at most four characters one.
_NFC_SHRINK = 4

# A text is first read so far for each token that may be kept of it: a token of most texts covers fewer characters.
_CHARACTERS_PER_TOKEN = 8

# An empty part costs no token, but the template takes 20 microseconds to render it: ten million fit into a request.
MAX_PARTS = 4096
# The rendered template of more parts is not kept: such an order of parts hardly comes again.
_MAX_KEPT_PARTS = 64

# Unicode noncharacters: they stand for a user's piece in the rendered template, and are never tokenised.
_MARKER = "\ufdd0{}\ufdd1"
_MARKER_PATTERN = re.compile(_MARKER.format("(-?[0-9]+)"))
_INSTRUCTION = -1
# Texts that a template which trims, escapes, counts or cuts would change.
_PROBES = ("", ' \n <b>&amp; "It\'s" é\t \n', "a long text. " * 1000)


def tidy_instruction(instruction: str | None) -> str:
    """Applies the official embedder's rule: strips, takes the default for an empty one, and appends a "." unless it ends in
    punctuation (category P)."""
    instruction = (instruction or "").strip()
    if not instruction:
        return DEFAULT_INSTRUCTION
    return instruction if unicodedata.category(instruction[-1]).startswith("P") else instruction + "."


@dataclass(frozen=True, slots=True)
class Slot:
    """A place in the template for a user's piece: `index` is that of the text part, or -1 for the instruction."""

    index: int


@dataclass(frozen=True, slots=True)
class SpecialToken:
    """A special token of the template: its id, and the text that it is rendered as."""

    id: int
    text: str


Segment = str | SpecialToken | Slot


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """The template's segments and the pieces that go into its slots: the instruction, the text parts, and the number of tokens of
    each image, in order."""

    segments: tuple[Segment, ...]
    instruction: str
    texts: tuple[str, ...]
    image_tokens: tuple[int, ...]

    def piece(self, segment: Segment) -> str:
        """Returns the text of a segment, a slot's being the user's piece."""
        match segment:
            case Slot(index):
                return self.instruction if index == _INSTRUCTION else self.texts[index]
            case SpecialToken():
                return segment.text
            case _:
                return segment

    def render(self) -> str:
        """Returns the prompt as text, with one placeholder for each image."""
        return "".join(map(self.piece, self.segments))

    def keep_texts(self, count: int) -> ChatPrompt:
        """Returns the prompt with every text but the first `count` emptied."""
        texts = (*self.texts[:count], *[""] * (len(self.texts) - count))
        return ChatPrompt(self.segments, self.instruction, texts, self.image_tokens)

    def with_text(self, index: int, text: str) -> ChatPrompt:
        """Returns the prompt with another text at `index`."""
        texts = (*self.texts[:index], text, *self.texts[index + 1 :])
        return ChatPrompt(self.segments, self.instruction, texts, self.image_tokens)


@dataclass(frozen=True, slots=True)
class FittedChat:
    """A prompt within its limit of tokens, its ids, and whether text was cut from it."""

    prompt: ChatPrompt
    ids: list[int]
    truncated: bool


class ChatTokenizer:
    """The chat template and tokenizer of one checkpoint. Safe in many threads at once."""

    def __init__(self, processor: Any) -> None:
        """`processor` is the checkpoint's Qwen3VLProcessor, as transformers loads it. Raises ModelLoadError."""
        if processor.tokenizer.split_special_tokens:
            raise ModelLoadError("the checkpoint's tokenizer reads its template's special tokens as text (split_special_tokens)")
        self._tokenizer = PlainTextTokenizer(processor.tokenizer)
        self._render_template = processor.apply_chat_template
        self._special_ids = self._tokenizer.special_ids
        added = processor.tokenizer.added_tokens_decoder.values()
        self._stripping = {str(token.content) for token in added if token.lstrip or token.rstrip or token.single_word}
        self.image_token_id: int = processor.image_token_id
        alternatives = "|".join(re.escape(text) for text in sorted(self._special_ids, key=len, reverse=True))
        self._boundaries = re.compile(f"({_MARKER.format(r'-?[0-9]+')}|{alternatives})")
        self._longest_token = max(map(len, processor.tokenizer.get_vocab()))
        self._segments = lru_cache(maxsize=256)(self._render_segments)
        self._prefix = lru_cache(maxsize=1024)(self._prefix_ids)
        self._check_template()

    def _check_template(self) -> None:
        """Raises ModelLoadError if the template changes users' pieces, or a special token of it swallows what is beside it."""
        for images in ((False, True), (True, False)):
            segments = self._segments(images)
            tokens = {segment.text for segment in segments if isinstance(segment, SpecialToken)}
            if found := sorted(tokens & self._stripping):
                raise ModelLoadError(f"a special token of the chat template takes in what is beside it: {', '.join(found)[:100]}")
            for piece in _PROBES:
                expected = ChatPrompt(segments, piece, (piece,), (1,)).render()
                if self._rendered([None if image else piece for image in images], piece) != expected:
                    raise ModelLoadError("the checkpoint's chat template does not leave texts as they are")

    def _rendered(self, parts: Sequence[str | None], instruction: str) -> str:
        """Renders the template; a part that is None is an image."""
        content = [{"type": "image", "image": ""} if part is None else {"type": "text", "text": part} for part in parts]
        system = [{"type": "text", "text": instruction}]
        messages = [{"role": "system", "content": system}, {"role": "user", "content": content}]
        rendered: str = self._render_template(messages, tokenize=False, add_generation_prompt=True)
        return rendered

    def _render_segments(self, images: tuple[bool, ...]) -> tuple[Segment, ...]:
        """Returns the template as segments, for one order of parts: `images[i]` tells whether part i is an image. Raises
        ModelLoadError if the template has the parts in another order."""
        text_indices = iter(range(len(images)))
        parts = [None if image else _MARKER.format(next(text_indices)) for image in images]
        rendered = self._rendered(parts, _MARKER.format(_INSTRUCTION))
        segments = tuple(self._segment(text) for text in self._boundaries.split(rendered) if text)
        slots = [segment.index for segment in segments if isinstance(segment, Slot)]
        placeholders = sum(isinstance(s, SpecialToken) and s.id == self.image_token_id for s in segments)
        if slots != [_INSTRUCTION, *range(len(images) - sum(images))] or placeholders != sum(images):
            raise ModelLoadError("the checkpoint's chat template does not place a system message and the user's parts in order")
        return segments

    def _segment(self, text: str) -> Segment:
        if marker := _MARKER_PATTERN.fullmatch(text):
            return Slot(int(marker[1]))
        return SpecialToken(self._special_ids[text], text) if text in self._special_ids else text

    def prompt(self, instruction: str, parts: Sequence[str | int]) -> ChatPrompt:
        """Returns the prompt of an instruction, taken verbatim, and parts, each a text or the number of an image's tokens.

        Raises InvalidInput for too many parts.
        """
        if len(parts) > MAX_PARTS:
            raise InvalidInput(f"the input has {len(parts):,} parts; the limit is {MAX_PARTS:,}. Join its texts")
        texts = tuple(part for part in parts if isinstance(part, str))
        image_tokens = tuple(part for part in parts if isinstance(part, int))
        render = self._segments if len(parts) <= _MAX_KEPT_PARTS else self._render_segments
        segments = render(tuple(isinstance(part, int) for part in parts))
        return ChatPrompt(segments, instruction, texts, image_tokens)

    def encode(self, prompt: ChatPrompt) -> list[int]:
        """Returns the token ids of a prompt, each image's placeholder as often as it has tokens."""
        return self.encode_all([prompt])[0]

    def encode_all(self, prompts: Sequence[ChatPrompt]) -> list[list[int]]:
        """Returns the token ids of several prompts, each as `encode` does, in one call of the tokenizer. It releases the
        interpreter's lock, and among threads that compute it may take half a millisecond to get it back."""
        pieces = [list(self._pieces(prompt)) for prompt in prompts]
        encoded = iter(self._tokenizer.encode_all([piece for prompt in pieces for piece in prompt if isinstance(piece, str)]))
        found: list[list[int]] = []
        for prompt in pieces:
            ids: list[int] = []
            for piece in prompt:
                ids += next(encoded) if isinstance(piece, str) else piece
            found.append(self._tokenizer.template.around(ids))
        return found

    def _pieces(self, prompt: ChatPrompt) -> Iterator[Sequence[int] | str]:
        """Yields a prompt piece by piece: ids where they are known, text where it is still to be tokenised. Template and
        instruction repeat from request to request; users' texts do not, and are not kept."""
        encode = self._tokenizer.encode_repeated
        counts = iter(prompt.image_tokens)
        plain, repeats = "", True
        for segment in prompt.segments:
            if not isinstance(segment, SpecialToken):
                plain += prompt.piece(segment)
                repeats &= not isinstance(segment, Slot) or segment.index == _INSTRUCTION
                continue
            yield encode(plain) if repeats else plain
            yield [segment.id] * (next(counts) if segment.id == self.image_token_id else 1)
            plain, repeats = "", True
        yield encode(plain) if repeats else plain

    def prefix_length(self, prompt: ChatPrompt, ids: Sequence[int]) -> int:
        """Returns how many of a prompt's first tokens every input with its instruction begins with.

        The template's last line before the text counts as far as it does not merge with the text's first characters.
        """
        if len(prompt.instruction) > MAX_KEPT_CHARACTERS:
            return 0
        prefix = self._prefix(prompt.instruction)
        if ids[: len(prefix)] == prefix:
            return len(prefix)
        return next(i for i, (ours, theirs) in enumerate(zip(prefix, ids, strict=False)) if ours != theirs)

    def _prefix_ids(self, instruction: str) -> list[int]:
        """Returns the token ids of everything before the first text."""
        before = takewhile(lambda segment: segment != Slot(0), self._segments((False,)))
        ids = self.encode(ChatPrompt(tuple(before), instruction, (), ()))
        return ids[: len(ids) - len(self._tokenizer.template.tail)]

    def fit_all(
        self, prompts: Sequence[ChatPrompt], limits: Sequence[int], truncate: Sequence[bool]
    ) -> list[FittedChat | Refusal]:
        """Fits each prompt as `fit` does, or says why it cannot be; those that may fit uncut go into one call of the
        tokenizer."""
        countable = [index for index, prompt in enumerate(prompts) if not self.surely_over(prompt, limits[index])]
        encoded = dict(zip(countable, self.encode_all([prompts[index] for index in countable]), strict=True))
        found: list[FittedChat | Refusal] = []
        for index, prompt in enumerate(prompts):
            try:
                found.append(self.fit(prompt, limits[index], truncate[index], encoded.pop(index, None)))
            except InputTooLong as error:
                found.append(Refusal(str(error)))
        return found

    def fit(self, prompt: ChatPrompt, max_tokens: int, truncate: bool, encoded: list[int] | None = None) -> FittedChat:
        """Returns a prompt in at most `max_tokens` tokens. If `truncate` allows it, the last text is cut from its end, then the
        one before it; template, instruction and images never are. `encoded` are the ids of the uncut prompt, if they are known.

        Raises InputTooLong.
        """
        if not self.surely_over(prompt, max_tokens):
            ids = encoded or self.encode(prompt)
            if len(ids) <= max_tokens:
                return FittedChat(prompt, ids, truncated=False)
            if not truncate:
                counted = f"{len(ids):,} tokens, template included; the limit is {max_tokens:,}"
                raise InputTooLong(f"the input has {counted}. {TOO_LONG_HINT}")
        elif not truncate:
            raise InputTooLong(f"the input has far more than the limit of {max_tokens:,} tokens. {TOO_LONG_HINT}")

        def over(kept: int) -> bool:
            bare = prompt.keep_texts(kept)
            return self.surely_over(bare, max_tokens) or len(self.encode(bare)) > max_tokens

        # The number of first texts that fit uncut, by bisection: an input of thousands of parts is encoded a dozen times.
        kept = bisect_left(range(len(prompt.texts)), True, key=over) - 1
        if kept < 0:
            raise InputTooLong(self._fixed_too_long(prompt.keep_texts(0), max_tokens))
        return self._cut(prompt.keep_texts(kept), kept, prompt.texts[kept], max_tokens)

    def _fixed_too_long(self, bare: ChatPrompt, max_tokens: int) -> str:
        """Returns the refusal of a prompt that is too long without any text."""
        counted = "far more" if self.surely_over(bare, max_tokens) else f"{len(self.encode(bare)):,}"
        return f"template, instruction and images alone have {counted} tokens; the limit is {max_tokens:,}. Only text is ever cut"

    def surely_over(self, prompt: ChatPrompt, max_tokens: int) -> bool:
        """Tells whether a prompt is so long that its tokens need not be counted: each covers only so many characters."""
        characters = sum(map(len, prompt.texts)) + len(prompt.instruction)
        return characters > max_tokens * self._longest_token * _NFC_SHRINK

    def _cut(self, prompt: ChatPrompt, index: int, text: str, max_tokens: int) -> FittedChat:
        """Puts the beginning of `text` into the prompt at `index`: as many of its characters as there is room for."""
        bare = self.encode(prompt)
        room = max_tokens - len(bare)
        offsets = self._offsets(text, room)
        while room > 0 and offsets:
            cut = prompt.with_text(index, text[: offsets[min(room, len(offsets)) - 1][1]])
            ids = self.encode(cut)
            if len(ids) <= max_tokens:
                return FittedChat(cut, ids, truncated=True)
            room -= len(ids) - max_tokens
        return FittedChat(prompt, bare, truncated=True)

    def _offsets(self, text: str, count: int) -> list[tuple[int, int]]:
        """Returns where at least the first `count` tokens of a text start and end; a long text is read no further than needed."""
        size = (count + 1) * _CHARACTERS_PER_TOKEN
        while True:
            offsets = self._tokenizer.offsets(text[:size])
            if len(offsets) > count or size >= len(text):
                return offsets
            size *= 4
