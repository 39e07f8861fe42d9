"""Makes token ids of texts, by rules that all families share.

What users write is data: a special token in a text is read as the characters that spell it. The special tokens of a prompt are
put in by their ids: those of the tokenizer's own template here, those of a chat template by its family.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer
from tokenizers.normalizers import Lowercase
from tokenizers.normalizers import Sequence as Normalizers

from models.base import ModelLoadError

# The end of a refusal's message: what to do about an input that is too long.
TOO_LONG_HINT = "Shorten it, or send truncate: true to have its text cut"
# The ids of instructions are kept, since most come again; those of a longer one are not worth the memory.
MAX_KEPT_CHARACTERS = 4096
# The texts by which a template is found: of unlike tokens, so that only one place within it fits them all.
_PROBES = ("a", "1", ".", "的")


@dataclass(frozen=True, slots=True)
class Template:
    """The ids that a tokenizer's own template (its post-processor) puts before and after every text."""

    head: list[int]
    tail: list[int]

    def __len__(self) -> int:
        return len(self.head) + len(self.tail)

    def around(self, ids: Sequence[int]) -> list[int]:
        """Returns a text's ids with the template around them."""
        return [*self.head, *ids, *self.tail]


class PlainTextTokenizer:
    """A copy of a checkpoint's tokenizer that reads every text as plain text. Safe in many threads at once.

    Special tokens keep their ids, and have names that nobody can write. `special_ids` has their ids by their names in the
    checkpoint; `template` is the tokenizer's own.
    """

    def __init__(self, stock: Any, lower_case: bool = False) -> None:
        """`stock` is the checkpoint's tokenizer, as transformers loads it, and stays as it is; `lower_case` has texts put into
        lower case first. Raises ModelLoadError."""
        own = json.loads(stock.backend_tokenizer.to_str())
        # tokenizer.json may not mark those that tokenizer_config.json names.
        specials = {token["content"] for token in own["added_tokens"] if token["special"]}.union(stock.all_special_tokens)
        self.special_ids: dict[str, int] = {name: stock.convert_tokens_to_ids(name) for name in specials}
        # A longer word is one unknown token (WordPiece); 0 is no limit.
        self.longest_word = int(own["model"].get("max_input_chars_per_word") or 0)
        self._tokenizer = Tokenizer.from_str(json.dumps(_out_of_reach(own, specials)))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # For the unknown token, which keeps its name: the model looks it up by that.
        self._tokenizer.encode_special_tokens = True
        if lower_case:
            normalizer = self._tokenizer.normalizer
            steps: Any = normalizer if isinstance(normalizer, Normalizers) else [normalizer] if normalizer else []
            # The rule of sentence-transformers: not if a step of the tokenizer's own does it, first or not.
            if not any(isinstance(step, Lowercase) for step in steps):
                self._tokenizer.normalizer = Normalizers([Lowercase(), *steps])
        self.template = self._find_template()
        self._encode_kept = lru_cache(maxsize=1024)(self.encode)
        self._encode_long = lru_cache(maxsize=2)(self.encode)

    def _find_template(self) -> Template:
        """Returns the tokenizer's own template. Raises ModelLoadError if it does more than put tokens around a text."""
        bare, framed = (
            [self._tokenizer.encode(text, add_special_tokens=added).ids for text in _PROBES] for added in (False, True)
        )
        if not any(bare):
            raise ModelLoadError("its tokenizer makes no token of any text")
        # The template may hold a token that the text has too: only the right place fits all texts.
        for start in range(len(framed[0]) - len(bare[0]) + 1):
            template = Template(framed[0][:start], framed[0][start + len(bare[0]) :])
            if all(found == template.around(ids) for ids, found in zip(bare, framed, strict=True)):
                return template
        raise ModelLoadError("its tokenizer does more to a text than put tokens before and after it")

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without the template."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        """Returns the ids of several texts in one call, each as `encode` does."""
        # The batch form releases the interpreter's lock, the tokenizer's `encode` does not.
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_repeated(self, text: str) -> list[int]:
        """Returns the ids of a text that comes again, such as an instruction: they are kept, and must not be changed. A long
        one's are kept for the request at hand, which may have it in each of thousands of inputs."""
        return self._encode_kept(text) if len(text) <= MAX_KEPT_CHARACTERS else self._encode_long(text)

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Returns the characters that each token of a text covers, as (start, end)."""
        return list(self._tokenizer.encode_batch([text], add_special_tokens=False)[0].offsets)


def _out_of_reach(tokenizer: dict[str, Any], specials: Collection[str]) -> dict[str, Any]:
    """Gives the special tokens of a tokenizer.json names that no text holds, under their ids, and returns it.

    It is not enough not to look for special tokens in a text: a vocabulary of pieces (Unigram) has "</s>" as a piece like any
    other.
    """
    model = tokenizer["model"]
    names = {name: secrets.token_hex(16) for name in set(specials) - {model.get("unk_token")}}
    for token in tokenizer["added_tokens"]:
        token["special"] = token["content"] in specials
        token["content"] = names.get(token["content"], token["content"])
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(piece, piece): id for piece, id in vocabulary.items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    return tokenizer
