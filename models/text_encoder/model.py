"""The EmbeddingModel of texts: tokens' hidden states, pooled as the checkpoint's folder says, and normalised."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModel

from models import devices
from models.base import PreparedInput
from models.base_model import SHORT_TOKENS, USUAL_TOKENS, BaseModel, draw_tokens
from models.checkpoints.modules_json import LAST_TOKEN
from models.checkpoints.pretrained import load_pretrained
from models.packed.attention import Heads
from models.packed.decoder import Decoder, is_causal
from models.packed.forward import DecoderForward
from models.packed.staging import Staging
from models.packed.varlen import choose_kernel
from models.registry import Family, named
from models.text_encoder.folder import Folder
from models.text_encoder.forward import EncoderForward
from models.text_encoder.modules import PostPooling
from models.text_encoder.pooling import Pooling
from models.text_encoder.positions import max_length
from models.text_encoder.reference import ROW_SEQUENCES, PaddedStates
from models.text_encoder.refusals import check_attention, check_own_code

log = logging.getLogger(__name__)

# A layer that reads the first token's state, which no pooling here does: many checkpoints do not have it.
_UNUSED = "pooler."
# How tokens are pooled in a folder that does not say it.
_PLAIN_POOLING = {LAST_TOKEN: "the last one is taken, as of Qwen3-Embedding", "mean": "their mean is taken, as the library does"}


class TextEmbedding(BaseModel):
    """A transformer on a device, and the modules after it."""

    def __init__(
        self, path: Path, family: Family, *, device: str, dtype: str, backend: str, compile: str, allow_pickle: bool
    ) -> None:
        """Loads the weights in folder `path`; arguments are those of models.registry. Raises ModelLoadError."""
        super().__init__(device, compile)
        check_own_code(path)
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        check_attention(path, config, family)
        folder = Folder.read(path, config, family)
        if folder.is_plain:
            pooling = _PLAIN_POOLING[folder.modes[0]]
            log.warning("%s has no modules.json, which says how tokens are pooled: %s", path, pooling)
        chosen = devices.choose_dtype(dtype, devices.checkpoint_dtype(config), self._device)
        model = load_pretrained(AutoModel, path, chosen, allow_pickle, unused=_UNUSED).to(self._device).eval()
        # Keys and values are never kept.
        model.config.use_cache = False
        post_pooling = PostPooling(folder, config.hidden_size * len(folder.modes), self._device, allow_pickle)
        self._vocabulary: int = config.vocab_size
        self._longest = max_length(config)
        self.forward = _choose_forward(model, family, folder, post_pooling, backend)

    def _usual_input(self) -> PreparedInput:
        return self._draw(USUAL_TOKENS)

    def _warm_up_batch(self) -> Sequence[PreparedInput]:
        return [self._draw(SHORT_TOKENS), self._draw(USUAL_TOKENS)]

    def _samples(self) -> Sequence[Sequence[PreparedInput]]:
        short, usual = self._draw(SHORT_TOKENS), self._draw(USUAL_TOKENS)
        return [[short], [usual] * 63 + [short]]

    def _draw(self, num_tokens: int) -> PreparedInput:
        return PreparedInput(draw_tokens(min(num_tokens, self._longest or num_tokens), self._vocabulary))


def _choose_forward(
    model: Any, family: Family, folder: Folder, post_pooling: PostPooling, backend: str
) -> EncoderForward | DecoderForward:
    """Returns the packed forward of a model that has one, else that of transformers' own modules."""
    config, staging = model.config, Staging(model.device)
    if backend == "packed" and family.is_causal and folder.modes == (LAST_TOKEN,) and is_causal(config):
        decoder = Decoder(model)
        kernel = choose_kernel(model.device, model.dtype, decoder.sizes.attention_heads)
        return DecoderForward(decoder, post_pooling, kernel, staging)
    pooling = Pooling(folder.modes)
    if backend == "packed" and family.encoder and not getattr(config, "is_decoder", False):
        count = config.num_attention_heads
        heads = Heads(count, count, config.hidden_size // count)
        kernel = choose_kernel(model.device, model.dtype, heads, getattr(config, "sliding_window", None))
        return EncoderForward(named(family.encoder)(model, kernel), pooling, post_pooling, staging)
    return EncoderForward(PaddedStates(model), pooling, post_pooling, staging, ROW_SEQUENCES)
