"""The prompt: instruction and parts -> token ids, as the checkpoint's chat template and tokenizer have them.

What a user writes is data: a special token in it is plain text, also where two adjoining parts make one up. So the template is
rendered around markers, once per order of parts; the users' pieces, joined with the template's plain text beside them (a
leading newline merges with the template's last one), are tokenised with special tokens off; and the template's own special
tokens are put between. On clean input the ids equal those of the checkpoint's processor called on the rendered text.
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

from tokenizers import Tokenizer

from models.base import InputTooLong, InvalidInput, ModelLoadError

# The official embedder's default (QwenLM/Qwen3-VL-Embedding, Qwen3VLEmbedder).
DEFAULT_INSTRUCTION = "Represent the user's input."

# Canonical composition (NFC) makes at most four characters one.
_NFC_SHRINK = 4

# A token of most texts covers fewer.
_USUAL_CHARACTERS = 8

# An empty part costs no token, but the template takes 20 microseconds to render it: ten million fit into a request.
MAX_PARTS = 4096
# Longer orders of parts hardly come again, and are not worth their memory.
_REPEATED_PARTS = 64

# The same holds for instructions.
_REPEATED_CHARACTERS = 4096

# Unicode noncharacters: they stand for a piece of the user's in the rendered template, and are never tokenised.
_MARKER = "\ufdd0{}\ufdd1"
_MARKER_PATTERN = re.compile(_MARKER.format("(-?[0-9]+)"))
_INSTRUCTION = -1
# What a template that trims, escapes, counts or cuts would not leave as it is.
_PROBES = ("", ' \n <b>&amp; "It\'s" é\t \n', "a long text. " * 1000)


def tidy_instruction(instruction: str | None) -> str:
    """The official embedder's rule: strip, default where empty, and a "." unless it ends in punctuation (category P)."""
    instruction = (instruction or "").strip()
    if not instruction:
        return DEFAULT_INSTRUCTION
    return instruction if unicodedata.category(instruction[-1]).startswith("P") else instruction + "."


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a piece of the user's goes: `index` among the text parts, or -1 for the instruction."""

    index: int


@dataclass(frozen=True, slots=True)
class SpecialToken:
    id: int
    text: str


Segment = str | SpecialToken | Slot


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt with its pieces in place: text to be tokenised, special tokens, and images by their number of tokens.

    `texts` are the text parts; `image_tokens` the count for each image, in order.
    """

    segments: tuple[Segment, ...]
    instruction: str
    texts: tuple[str, ...]
    image_tokens: tuple[int, ...]

    def piece(self, segment: Segment) -> str:
        match segment:
            case Slot(index):
                return self.instruction if index == _INSTRUCTION else self.texts[index]
            case SpecialToken():
                return segment.text
            case _:
                return segment

    def render(self) -> str:
        """The prompt as text, with one placeholder for each image."""
        return "".join(map(self.piece, self.segments))

    def keep_texts(self, count: int) -> Prompt:
        """The prompt with all texts but the first `count` empty."""
        texts = (*self.texts[:count], *[""] * (len(self.texts) - count))
        return Prompt(self.segments, self.instruction, texts, self.image_tokens)

    def with_text(self, index: int, text: str) -> Prompt:
        texts = (*self.texts[:index], text, *self.texts[index + 1 :])
        return Prompt(self.segments, self.instruction, texts, self.image_tokens)


# A prompt of at most so many tokens, and its ids.
Fitted = tuple[Prompt, list[int]]


class PromptTokenizer:
    """The chat template and tokenizer of one checkpoint. Safe in many threads at once."""

    def __init__(self, processor: Any) -> None:
        """`processor` is the checkpoint's Qwen3VLProcessor, as transformers loads it."""
        if processor.tokenizer.split_special_tokens:
            raise ModelLoadError("the checkpoint's tokenizer reads its template's special tokens as text (split_special_tokens)")
        self._render_template = processor.apply_chat_template
        added = processor.tokenizer.added_tokens_decoder
        self._special_ids = {str(token.content): int(id) for id, token in added.items() if token.special}
        self._unlike = {str(token.content) for token in added.values() if token.lstrip or token.rstrip or token.single_word}
        self.image_token_id: int = processor.image_token_id
        alternatives = "|".join(re.escape(text) for text in sorted(self._special_ids, key=len, reverse=True))
        self._boundaries = re.compile(f"({_MARKER.format(r'-?[0-9]+')}|{alternatives})")

        # A copy of its own: whether special tokens are read is a state of the whole tokenizer.
        self._tokenizer = Tokenizer.from_str(processor.tokenizer.backend_tokenizer.to_str())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self._head, self._tail = self._post_processor_ids()
        self._longest_token = max(map(len, self._tokenizer.get_vocab(with_added_tokens=True)))
        self._segments = lru_cache(maxsize=256)(self._render_segments)
        self._encode_fixed = lru_cache(maxsize=1024)(self._encode_one)
        self._encode_long = lru_cache(maxsize=2)(self._encode_one)
        self._prefix = lru_cache(maxsize=1024)(self._prefix_ids)
        self._check_template()

    def _post_processor_ids(self) -> tuple[list[int], list[int]]:
        """What the tokenizer's own post-processor puts before and after a text: one checkpoint of the family appends a token."""
        bare = self._tokenizer.encode("a", add_special_tokens=False)
        whole = self._tokenizer.encode("a", add_special_tokens=True).ids
        start = next(i for i in range(len(whole)) if whole[i : i + len(bare.ids)] == bare.ids)
        return whole[:start], whole[start + len(bare.ids) :]

    def _check_template(self) -> None:
        """Pieces must stand in the template as they are, and its special tokens take nothing of what is beside them. Raises
        ModelLoadError."""
        for images in ((False, True), (True, False)):
            segments = self._segments(images)
            tokens = {segment.text for segment in segments if isinstance(segment, SpecialToken)}
            if unlike := sorted(tokens & self._unlike):
                raise ModelLoadError(
                    f"a special token of the chat template takes in what is beside it: {', '.join(unlike)[:100]}"
                )
            for piece in _PROBES:
                whole = Prompt(segments, piece, (piece,), (1,)).render()
                if self._rendered([None if image else piece for image in images], piece) != whole:
                    raise ModelLoadError("the checkpoint's chat template does not leave texts as they are")

    def _rendered(self, parts: Sequence[str | None], instruction: str) -> str:
        """By the template, an image for None."""
        content = [{"type": "image", "image": ""} if part is None else {"type": "text", "text": part} for part in parts]
        system = [{"type": "text", "text": instruction}]
        messages = [{"role": "system", "content": system}, {"role": "user", "content": content}]
        rendered: str = self._render_template(messages, tokenize=False, add_generation_prompt=True)
        return rendered

    def _render_segments(self, images: tuple[bool, ...]) -> tuple[Segment, ...]:
        """The template as segments, for one order of parts: `images[i]` tells whether part i is an image."""
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

    def prompt(self, instruction: str, parts: Sequence[str | int]) -> Prompt:
        """The prompt of an instruction, taken as it stands, and parts: a text, or the number of an image's tokens.

        Raises InvalidInput for too many parts.
        """
        if len(parts) > MAX_PARTS:
            raise InvalidInput(f"the input has {len(parts):,} parts; the limit is {MAX_PARTS:,}. Join its texts")
        texts = tuple(part for part in parts if isinstance(part, str))
        image_tokens = tuple(part for part in parts if isinstance(part, int))
        render = self._segments if len(parts) <= _REPEATED_PARTS else self._render_segments
        segments = render(tuple(isinstance(part, int) for part in parts))
        return Prompt(segments, instruction, texts, image_tokens)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, each image's placeholder as often as it has tokens."""
        return self.encode_all([prompt])[0]

    def encode_all(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Token ids of several prompts, each as by itself, in one call of the tokenizer: it releases the interpreter's lock, and
        among threads that compute it may take half a millisecond to get it back."""
        pieces = [list(self._pieces(prompt)) for prompt in prompts]
        encoded = iter(self._encode_each([piece for prompt in pieces for piece in prompt if isinstance(piece, str)]))
        found: list[list[int]] = []
        for prompt in pieces:
            ids = list(self._head)
            for piece in prompt:
                ids += next(encoded) if isinstance(piece, str) else piece
            found.append(ids + self._tail)
        return found

    def _pieces(self, prompt: Prompt) -> Iterator[Sequence[int] | str]:
        """What a prompt is made of: ids where they are known, text where it is still to be tokenised."""
        counts = iter(prompt.image_tokens)
        plain, fixed = "", True
        for segment in prompt.segments:
            if not isinstance(segment, SpecialToken):
                plain += prompt.piece(segment)
                fixed &= not isinstance(segment, Slot) or segment.index == _INSTRUCTION
                continue
            yield self._known(plain) if fixed else plain
            yield [segment.id] * (next(counts) if segment.id == self.image_token_id else 1)
            plain, fixed = "", True
        yield self._known(plain) if fixed else plain

    def prefix_length(self, prompt: Prompt, ids: Sequence[int]) -> int:
        """How many of a prompt's first tokens every input with its instruction begins with.

        The template's last line before the text counts as far as it does not merge with the text's first characters.
        """
        if len(prompt.instruction) > _REPEATED_CHARACTERS:
            return 0
        prefix = self._prefix(prompt.instruction)
        if ids[: len(prefix)] == prefix:
            return len(prefix)
        return next(i for i, (ours, theirs) in enumerate(zip(prefix, ids, strict=False)) if ours != theirs)

    def _prefix_ids(self, instruction: str) -> list[int]:
        """Token ids of everything that comes before the first text."""
        before = takewhile(lambda segment: segment != Slot(0), self._segments((False,)))
        whole = Prompt(tuple(before), instruction, (), ())
        return self.encode(whole)[: -len(self._tail) or None]

    def _known(self, text: str) -> Sequence[int]:
        # Template and instruction repeat from request to request; a long instruction is not worth its memory, but for that of
        # the request at hand, which may have it in each of thousands of inputs.
        return self._encode_fixed(text) if len(text) <= _REPEATED_CHARACTERS else self._encode_long(text)

    def _encode_one(self, text: str) -> Sequence[int]:
        return self._encode_each([text])[0]

    def _encode_each(self, texts: list[str]) -> list[list[int]]:
        # The batch form releases the interpreter's lock, `encode` does not.
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def fit_all(self, prompts: Sequence[Prompt], limits: Sequence[int], truncate: Sequence[bool]) -> list[Fitted | InputTooLong]:
        """Each prompt as `fit` has it, or its error; those that may fit as they are in one call of the tokenizer."""
        countable = [index for index, prompt in enumerate(prompts) if not self.surely_over(prompt, limits[index])]
        encoded = dict(zip(countable, self.encode_all([prompts[index] for index in countable]), strict=True))
        found: list[Fitted | InputTooLong] = []
        for index, prompt in enumerate(prompts):
            try:
                found.append(self.fit(prompt, limits[index], truncate[index], encoded.pop(index, None)))
            except InputTooLong as error:
                found.append(error.with_traceback(None))
        return found

    def fit(self, prompt: Prompt, max_tokens: int, truncate: bool, encoded: list[int] | None = None) -> Fitted:
        """A prompt of at most `max_tokens` tokens, and its ids. The last text is cut from its end, then the one before it;
        template, instruction and images never are. `encoded` are the ids of the whole, where they are known.

        Raises InputTooLong.
        """
        if not self.surely_over(prompt, max_tokens):
            ids = encoded or self.encode(prompt)
            if len(ids) <= max_tokens:
                return prompt, ids
            if not truncate:
                raise InputTooLong(f"the input has {len(ids):,} tokens, template included; the limit is {max_tokens:,}. {_HINT}")
        elif not truncate:
            raise InputTooLong(f"the input has far more than the limit of {max_tokens:,} tokens. {_HINT}")

        def over(kept: int) -> bool:
            bare = prompt.keep_texts(kept)
            return self.surely_over(bare, max_tokens) or len(self.encode(bare)) > max_tokens

        # The first texts that fit whole are found by halving: an input of thousands of parts is encoded a dozen times.
        kept = bisect_left(range(len(prompt.texts)), True, key=over) - 1
        if kept < 0:
            raise InputTooLong(self._fixed_too_long(prompt.keep_texts(0), max_tokens))
        return self._cut(prompt.keep_texts(kept), kept, prompt.texts[kept], max_tokens)

    def _fixed_too_long(self, bare: Prompt, max_tokens: int) -> str:
        counted = "far more" if self.surely_over(bare, max_tokens) else f"{len(self.encode(bare)):,}"
        return f"template, instruction and images alone have {counted} tokens; the limit is {max_tokens:,}. Only text is ever cut"

    def surely_over(self, prompt: Prompt, max_tokens: int) -> bool:
        """Whether the text is so long that it need not be counted: a token covers only so many characters."""
        characters = sum(map(len, prompt.texts)) + len(prompt.instruction)
        return characters > max_tokens * self._longest_token * _NFC_SHRINK

    def _cut(self, prompt: Prompt, index: int, text: str, max_tokens: int) -> tuple[Prompt, list[int]]:
        """Put back as much of `text` as there is room for, to whole characters."""
        bare = self.encode(prompt)
        room = max_tokens - len(bare)
        offsets = self._offsets(text, room)
        while room > 0 and offsets:
            cut = prompt.with_text(index, text[: offsets[min(room, len(offsets)) - 1][1]])
            ids = self.encode(cut)
            if len(ids) <= max_tokens:
                return cut, ids
            room -= len(ids) - max_tokens
        return prompt, bare

    def _offsets(self, text: str, count: int) -> list[tuple[int, int]]:
        """Where the first `count` tokens of a text start and end, and some more; a long text is read no further than needed."""
        size = (count + 1) * _USUAL_CHARACTERS
        while True:
            # The batch form releases the interpreter's lock.
            encoding = self._tokenizer.encode_batch([text[:size]], add_special_tokens=False)[0]
            if len(encoding.ids) > count or size >= len(text):
                return list(encoding.offsets)
            size *= 4


_HINT = "Shorten it, or send truncate: true to have its text cut"
