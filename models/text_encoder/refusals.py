"""Refuses checkpoints that ask for something which the library does and this server does not, or warns of it in the log."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from models.base import ModelLoadError
from models.checkpoints.json_files import read_json
from models.registry import Family
from models.text_encoder.folder import Folder

log = logging.getLogger(__name__)

# Characters by which a special token differs from words.
_MARK = re.compile(r"[<>\[\]{}|]")


def check_own_code(path: Path) -> None:
    """Raises ModelLoadError if config.json names code of the checkpoint's own: transformers' model of that type is another."""
    if own := read_json(path / "config.json").get("auto_map"):
        raise ModelLoadError(
            f"{path}: config.json asks for code of the checkpoint's own (auto_map: {', '.join(sorted(own))}), which is never run"
        )


def check_attention(path: Path, config: Any, family: Family) -> None:
    """Raises ModelLoadError if an encoder's config.json has `is_causal`: transformers' modules follow it in a batch without
    padding, and not in one with some. Likewise for a decoder, if it is null or a number."""
    causal = getattr(config, "is_causal", family.is_causal)
    if not isinstance(causal, bool) if family.is_causal else causal:
        raise ModelLoadError(f"{path}: what a token sees would depend on the other inputs of its batch (is_causal)")


def check_tokenizer(path: Path, family: Family, folder: Folder, stock: Any, specials: Collection[str]) -> None:
    """Raises ModelLoadError if `stock`, the checkpoint's tokenizer as transformers loads it, would have other ids than are made
    here. `specials` are its special tokens."""
    # A type with a form of its own for instructions says by that how texts go in.
    if stock.chat_template and folder.is_plain and not family.instruction:
        raise ModelLoadError(f"{path}: its tokenizer has a chat template, and no modules.json says that texts go without it")
    if inside := sorted(token for token in specials if token in folder.settings.default_prompt):
        raise ModelLoadError(f"{path}: its default prompt has special tokens ({', '.join(inside)}), which are plain text here")
    if words := sorted(token for token in specials if not _MARK.search(token) and token != stock.unk_token):
        raise ModelLoadError(
            f"{path}: its tokenizer has special tokens that texts are likely to hold ({', '.join(words)[:200]}), and a special "
            "token in a text is plain text here"
        )
    if any(stock("a").get("token_type_ids", ())):
        raise ModelLoadError(f"{path}: its tokenizer says that a text is not of the first type, which is the one known here")
    if stock.truncation_side != "right":
        log.warning("%s: its tokenizer cuts a text's beginning; here `truncate` cuts its end", path)
