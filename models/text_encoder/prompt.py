"""The prompt of a text: instruction and text -> token ids, as the checkpoint's tokenizer has them.

What users write is plain text (models/tokenizer.py). Without special tokens in it the ids are those of the checkpoint's tokenizer
called on the same text, cut at the same token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from models.base import Refusal
from models.tokenizer import MAX_KEPT_CHARACTERS, TOO_LONG_HINT, PlainTextTokenizer

# A text is first read so far for each token that may be kept of it, and a longer one a part at a time: a token of most texts
# covers fewer characters.
_CHARACTERS_PER_TOKEN = 32


def instruct(instruction: str) -> str:
    """Returns what Qwen3-Embedding reads before a text, by its model card's get_detailed_instruct: nothing without an
    instruction."""
    return f"Instruct: {instruction}\nQuery:" if instruction else ""


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """A text, and what stands before it."""

    before: str
    text: str

    def render(self) -> str:
        """Returns the prompt as text."""
        return self.before + self.text


@dataclass(frozen=True, slots=True)
class FittedText:
    """The ids of a prompt within its limit of tokens, template included, and whether text was cut."""

    ids: list[int]
    truncated: bool


class TextTokenizer:
    """The tokenizer of one checkpoint. Safe in many threads at once."""

    def __init__(self, stock: Any, lower_case: bool) -> None:
        """`stock` is the checkpoint's tokenizer, as transformers loads it; `lower_case` has texts put into lower case first.
        Raises ModelLoadError."""
        self._tokenizer = PlainTextTokenizer(stock, lower_case)
        self._template = self._tokenizer.template
        self._stock_specials = frozenset(stock.all_special_ids)
        self.specials = frozenset(self._tokenizer.special_ids)

    def fit_all(
        self, prompts: Sequence[TextPrompt], limits: Sequence[int], truncate: Sequence[bool]
    ) -> list[FittedText | Refusal]:
        """Fits each prompt into its limit of tokens, template included, or says why it cannot be. If `truncate[i]` allows it,
        text i is cut from its end; what stands before it never is.

        All prompts that are not very long are tokenised in one call.
        """
        texts = [prompt.render() for prompt in prompts]
        short = [index for index, text in enumerate(texts) if len(text) <= _CHARACTERS_PER_TOKEN * limits[index]]
        encoded = dict(zip(short, self._tokenizer.encode_all([texts[index] for index in short]), strict=True))
        return [
            self._fit(prompt, limit, cut, *((encoded[index], True) if index in encoded else self._beginning(texts[index], limit)))
            for index, (prompt, limit, cut) in enumerate(zip(prompts, limits, truncate, strict=True))
        ]

    def _beginning(self, text: str, limit: int) -> tuple[list[int], bool]:
        """Returns the ids of a text, or those of its beginning if they are far over the limit already, and whether they are
        all."""
        size = _CHARACTERS_PER_TOKEN * max(limit, 1)
        while True:
            ids = self._tokenizer.encode(text[:size])
            # The last word may be cut in two, and a part of it read as a token for each character: none is within the limit.
            if size >= len(text) or len(ids) > 2 * limit + self._tokenizer.longest_word:
                return ids, size >= len(text)
            size *= 4

    def _fit(self, prompt: TextPrompt, limit: int, truncate: bool, content: list[int], complete: bool) -> FittedText | Refusal:
        """Fits a prompt whose ids begin with `content`, and are no more if `complete`."""
        around = len(self._template)
        if around + len(content) <= limit:
            return FittedText(self._template.around(content), truncated=False)
        if not truncate:
            exact = f"{around + len(content):,} tokens, special ones included; the limit is {limit:,}"
            counted = exact if complete else f"far more than the limit of {limit:,} tokens"
            return Refusal(f"the input has {counted}. {TOO_LONG_HINT}")
        fixed = around + len(self._before(prompt.before))
        if fixed > limit:
            alone = f"instruction and special tokens alone have {fixed:,} tokens"
            return Refusal(f"{alone}; the limit is {limit:,}. Only text is ever cut")
        return FittedText(self._template.around(content[: limit - around]), truncated=True)

    def count(self, prompt: TextPrompt, enough: int) -> int | None:
        """Returns how many tokens a prompt has, None if they are so many more than `enough` that they are not worth counting."""
        content, complete = self._beginning(prompt.render(), enough)
        return len(self._template) + len(content) if complete else None

    def cut_text(self, prompt: TextPrompt, fitted: FittedText) -> str:
        """Returns the part of a prompt's text that its ids cover, for showing."""
        kept = len(fitted.ids) - len(self._template)
        size = _CHARACTERS_PER_TOKEN * max(kept, 1)
        text = prompt.render()
        while True:
            offsets = self._tokenizer.offsets(text[:size])
            if len(offsets) > kept or size >= len(text):
                return text[: offsets[kept - 1][1]] if kept else ""
            size *= 4

    def unpooled_tokens(self, before: str) -> int:
        """Returns how many of a prompt's first tokens are not pooled, if what stands before the text is not. The library counts
        all ids that its tokenizer makes of that alone, less one if the last is special: one of the template's, or the unknown
        token."""
        ids = self._template.around(self._before(before))
        return len(ids) - (bool(ids) and ids[-1] in self._stock_specials)

    def shared_tokens(self, before: str, ids: Sequence[int]) -> int:
        """Returns how many of a prompt's first ids every prompt with this beginning has: its last word may merge with the text's
        first."""
        if not before or len(before) > MAX_KEPT_CHARACTERS:
            return 0
        expected = [*self._template.head, *self._before(before)]
        same = (ours == theirs for ours, theirs in zip(ids, expected, strict=False))
        return next((index for index, equal in enumerate(same) if not equal), min(len(expected), len(ids)))

    def _before(self, before: str) -> list[int]:
        """Returns the ids of what stands before a text, without the template."""
        return self._tokenizer.encode_repeated(before) if before else []
