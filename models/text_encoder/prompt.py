"""A text and its instruction -> token ids, as the checkpoint's tokenizer has them.

What a user writes is data: a special token in it is plain text. The tokenizer that reads users' text is a copy of the
checkpoint's in which special tokens have names that nobody can write; those of the tokenizer's own template are put around by
their ids. On clean input the ids equal those of the checkpoint's tokenizer called on the same text, cut at the same token.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer
from tokenizers.normalizers import Lowercase
from tokenizers.normalizers import Sequence as Normalizers

from models.base import InputTooLong, ModelLoadError

# A token covers fewer characters in most texts: what is longer is read a part at a time, until it is known to be too long.
_USUAL_CHARACTERS = 32
# Instructions repeat from request to request; one that is longer is not worth its memory.
_REPEATED_CHARACTERS = 4096
_HINT = "Shorten it, or send truncate: true to have its text cut"

# An instruction -> what stands before the text.
InstructionForm = Callable[[str], str]


def verbatim(instruction: str) -> str:
    """sentence-transformers: what its `prompt=` would be, prepended as it stands."""
    return instruction


def instruct(instruction: str) -> str:
    """Qwen3-Embedding: its model card's get_detailed_instruct. Without an instruction the text stands alone."""
    return f"Instruct: {instruction}\nQuery:" if instruction else ""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What stands before the text, and the text."""

    before: str
    text: str

    def render(self) -> str:
        return self.before + self.text


@dataclass(frozen=True, slots=True)
class Fitted:
    """The ids of a prompt within its limit, template included, and whether text was cut."""

    ids: list[int]
    truncated: bool


class TextTokenizer:
    """The tokenizer of one checkpoint. Safe in many threads at once."""

    def __init__(self, stock: Any, lower_case: bool) -> None:
        """`stock` is the checkpoint's tokenizer, as transformers loads it; `lower_case` has texts put into lower case first."""
        own = json.loads(stock.backend_tokenizer.to_str())
        # tokenizer.json may not mark those that tokenizer_config.json names.
        marked = {token["content"] for token in own["added_tokens"] if token["special"]}
        self.specials = frozenset(marked.union(stock.all_special_tokens))
        self._tokenizer = Tokenizer.from_str(json.dumps(_out_of_reach(own, self.specials)))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # For the one that keeps its name: the model looks its unknown token up by it.
        self._tokenizer.encode_special_tokens = True
        if lower_case:
            normalizer = self._tokenizer.normalizer
            steps: Any = normalizer if isinstance(normalizer, Normalizers) else [normalizer] if normalizer else []
            # The library's rule: not where one of the tokenizer's own does it, first or not.
            if not any(isinstance(step, Lowercase) for step in steps):
                self._tokenizer.normalizer = Normalizers([Lowercase(), *steps])
        # A longer word is one unknown token (WordPiece), and a part of it may be a token for each character.
        self._longest_word = int(own["model"].get("max_input_chars_per_word") or 0)
        self._head, self._tail = self._template()
        # Those that no input has: neither text nor template.
        special = {token["id"]: token["content"] for token in own["added_tokens"] if token["special"]}
        unknown, place = (own["model"].get(key) for key in ("unk_token", "unk_id"))
        self._unread = {id for id, name in special.items() if name != unknown} - {place, *self._head, *self._tail}
        self._stock_specials = frozenset(stock.all_special_ids)
        self._count_before = lru_cache(maxsize=1024)(lambda before: len(self._encode([before])[0]))
        self._ids_before = lru_cache(maxsize=1024)(lambda before: self._encode([before])[0])

    def _template(self) -> tuple[list[int], list[int]]:
        """What the tokenizer's own post-processor puts before and after a text."""
        bare, whole = (
            [self._tokenizer.encode(text, add_special_tokens=added).ids for text in ("a", "1", ".", "的")]
            for added in (False, True)
        )
        if not any(bare):
            raise ModelLoadError("its tokenizer makes no token of any text")
        # A template may hold what is a text's token elsewhere: it is the one that fits all of them.
        for start in range(len(whole[0]) - len(bare[0]) + 1):
            head, tail = whole[0][:start], whole[0][start + len(bare[0]) :]
            if all(found == [*head, *ids, *tail] for ids, found in zip(bare, whole, strict=True)):
                return head, tail
        raise ModelLoadError("its tokenizer does more to a text than put tokens before and after it")

    def may_read(self, token_id: int) -> bool:
        """Whether an input may have a token: not where it is special, and no part of the template."""
        return token_id not in self._unread

    def _encode(self, texts: list[str]) -> list[list[int]]:
        # The batch form releases the interpreter's lock, `encode` does not.
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def fit_all(self, prompts: Sequence[Prompt], limits: Sequence[int], truncate: Sequence[bool]) -> list[Fitted | InputTooLong]:
        """Each prompt in at most its limit of tokens, template included, or why not. Only the text is ever cut, from its end.

        All that are not very long are tokenised in one call.
        """
        texts = [prompt.render() for prompt in prompts]
        usual = [index for index, text in enumerate(texts) if len(text) <= _USUAL_CHARACTERS * limits[index]]
        encoded = dict(zip(usual, self._encode([texts[index] for index in usual]), strict=True))
        return [
            self._fit(prompt, limit, cut, *((encoded[index], True) if index in encoded else self._beginning(texts[index], limit)))
            for index, (prompt, limit, cut) in enumerate(zip(prompts, limits, truncate, strict=True))
        ]

    def _beginning(self, text: str, limit: int) -> tuple[list[int], bool]:
        """The ids of a text, or those of its beginning where they are far over the limit already; whether they are all."""
        size = _USUAL_CHARACTERS * max(limit, 1)
        while True:
            ids = self._encode([text[:size]])[0]
            # What is cut in two is the last word: no token within the limit.
            if size >= len(text) or len(ids) > 2 * limit + self._longest_word:
                return ids, size >= len(text)
            size *= 4

    def _fit(self, prompt: Prompt, limit: int, truncate: bool, content: list[int], whole: bool) -> Fitted | InputTooLong:
        around = len(self._head) + len(self._tail)
        if around + len(content) <= limit:
            return Fitted([*self._head, *content, *self._tail], truncated=False)
        before = self.tokens_before(prompt.before) - len(self._head)
        if not truncate:
            exact = f"{around + len(content):,} tokens, special ones included; the limit is {limit:,}"
            return InputTooLong(f"the input has {exact if whole else f'far more than the limit of {limit:,} tokens'}. {_HINT}")
        if around + before > limit:
            alone = f"instruction and special tokens alone have {around + before:,} tokens"
            return InputTooLong(f"{alone}; the limit is {limit:,}. Only text is ever cut")
        return Fitted([*self._head, *content[: limit - around], *self._tail], truncated=True)

    def count(self, prompt: Prompt, enough: int) -> int | None:
        """How many tokens a prompt has; None where they are so many more than `enough` that they are not worth counting."""
        content, whole = self._beginning(prompt.render(), enough)
        return len(self._head) + len(content) + len(self._tail) if whole else None

    def cut_text(self, prompt: Prompt, fitted: Fitted) -> str:
        """The prompt as text, as far as its ids go: for showing."""
        kept = len(fitted.ids) - len(self._head) - len(self._tail)
        size = _USUAL_CHARACTERS * max(kept, 1)
        text = prompt.render()
        while True:
            offsets = self._tokenizer.encode_batch([text[:size]], add_special_tokens=False)[0].offsets
            if len(offsets) > kept or size >= len(text):
                return text[: offsets[kept - 1][1]] if kept else ""
            size *= 4

    def tokens_before(self, before: str) -> int:
        """How many of a prompt's first tokens are those before its text, the template's first ones included."""
        count = self._count_before if len(before) <= _REPEATED_CHARACTERS else self._count_before.__wrapped__
        return len(self._head) + (count(before) if before else 0)

    def unpooled_tokens(self, before: str) -> int:
        """How many of a prompt's first tokens are not pooled, where what stands before the text is not. As the library counts:
        all that its tokenizer makes of that alone, less one if the last is special, be it one of several or the unknown token."""
        read = self._ids_before if len(before) <= _REPEATED_CHARACTERS else self._ids_before.__wrapped__
        ids = [*self._head, *read(before), *self._tail]
        return len(ids) - (bool(ids) and ids[-1] in self._stock_specials)

    def shared_tokens(self, before: str, ids: Sequence[int]) -> int:
        """How many of a prompt's ids every prompt with this beginning has: its last word may merge with the text's first."""
        if not before or len(before) > _REPEATED_CHARACTERS:
            return 0
        expected = [*self._head, *self._ids_before(before)]
        same = (ours == theirs for ours, theirs in zip(ids, expected, strict=False))
        return next((index for index, equal in enumerate(same) if not equal), min(len(expected), len(ids)))


def _out_of_reach(tokenizer: dict[str, Any], specials: Collection[str]) -> dict[str, Any]:
    """A tokenizer.json whose special tokens have the ids that they had and names that no text holds.

    It is not enough not to look for them: a vocabulary of pieces (Unigram) has "</s>" as a piece like any other.
    """
    model = tokenizer["model"]
    hidden = set(specials) - {model.get("unk_token")}
    names = {name: secrets.token_hex(16) for name in hidden}
    for token in tokenizer["added_tokens"]:
        token["special"] = token["content"] in specials
        token["content"] = names.get(token["content"], token["content"])
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(piece, piece): id for piece, id in vocabulary.items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    return tokenizer
