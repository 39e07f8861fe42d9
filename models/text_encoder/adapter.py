"""Models that embed text alone: folders in the layout of sentence-transformers, and Qwen3-Embedding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoTokenizer

from models import devices, rates
from models.base import (
    Description,
    EmbeddingInput,
    ImageLimits,
    InputTooLong,
    InvalidInput,
    ModelInfo,
    PreparedImage,
    PreparedInput,
    Refusal,
)
from models.checkpoints.fingerprint import fingerprint
from models.checkpoints.pretrained import load_pretrained
from models.packed.attention import Heads as AttentionHeads
from models.packed.decoder import Decoder, is_plain
from models.packed.forward import DecoderForward
from models.packed.staging import Staging
from models.packed.varlen import choose_kernel
from models.text_encoder.bert import NAMES, PostNormEncoder, position_offset
from models.text_encoder.folder import Folder
from models.text_encoder.forward import EncoderForward, TokenStates
from models.text_encoder.modernbert import ModernBertEncoder
from models.text_encoder.modules import Heads
from models.text_encoder.pooling import Pooling
from models.text_encoder.prompt import Fitted, InstructionForm, Prompt, TextTokenizer, instruct, verbatim
from models.text_encoder.reference import ROW_SEQUENCES, PaddedStates
from models.text_encoder.refusals import check_sight, check_tokenizer, refuse_own_code

# A layer that reads the first token's state, which no pooling of ours does: many checkpoints do not have it.
_UNUSED = "pooler."
_NO_IMAGES = "this model embeds text only: send no image"


class TextEmbedding:
    """An EmbeddingModel: tokens' hidden states pooled as the checkpoint's folder says, normalised."""

    def __init__(
        self, path: Path, *, device: str, dtype: str, backend: str, compile: str, limits: ImageLimits, allow_pickle: bool
    ) -> None:
        """Load a checkpoint. `device` is a torch device, `dtype` "auto" or a torch dtype's name, `backend` "packed", or
        "reference" for transformers' own forward. `compile` is as load_model has it, for a decoder; nothing else is compiled.
        `limits` have no effect: no image is read.

        Raises ModelLoadError.
        """
        self._device = torch.device(device)
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device.index or 0)
        refuse_own_code(path)
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        check_sight(path, config)
        stock = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        self._folder = Folder.read(path, config)
        self._instruction_form = _instruction_form(self._folder, config.model_type)
        self._tokenizer = TextTokenizer(stock, self._folder.settings.lower_case)
        check_tokenizer(path, config.model_type, self._folder, stock, self._tokenizer.specials)
        chosen = devices.choose_dtype(dtype, devices.checkpoint_dtype(config), self._device)
        model = load_pretrained(AutoModel, path, chosen, allow_pickle, unused=_UNUSED).to(self._device).eval()
        # Keys and values are never kept.
        model.config.use_cache = False
        heads = Heads(self._folder, config.hidden_size * len(self._folder.modes), self._device, allow_pickle)
        self._max_tokens = _max_tokens(self._folder, stock, model)
        digest = fingerprint(
            path, {**model.state_dict(), **heads.state}, settings={"dtype": str(chosen), "folder": self._folder.summary()}
        )
        if config.model_type in NAMES and (offset := position_offset(model)) and self._tokenizer.may_read(offset - 1):
            # The padding token has no place of its own, as only transformers' modules know.
            backend = "reference"
        self._compile = compile
        self._forward = _choose_forward(model, self._folder, heads, Staging(self._device), backend)
        self.info = ModelInfo(
            model_type=config.model_type,
            width=heads.width,
            max_tokens=self._max_tokens,
            device=str(self._device),
            dtype=str(chosen).removeprefix("torch."),
            fingerprint=digest,
            supports_images=False,
            cuda_available=torch.cuda.is_available(),
        )

    def reduced_size(self, size: tuple[int, int]) -> None:
        """No image is read."""

    def prepare_image(self, image: Image.Image, original_size: tuple[int, int] | None = None) -> PreparedImage:
        """Raises InvalidInput."""
        raise InvalidInput(_NO_IMAGES)

    def prepare(self, item: EmbeddingInput) -> PreparedInput:
        """Tokenise. Raises InvalidInput."""
        (found,) = self._prepare_each([item])
        if isinstance(found, InvalidInput):
            raise found
        return found

    def prepare_all(self, items: Sequence[EmbeddingInput]) -> list[PreparedInput | Refusal]:
        """Each as `prepare` has it, or why not; their texts are tokenised in one go."""
        results = self._prepare_each(items)
        return [Refusal(str(found)) if isinstance(found, InvalidInput) else found for found in results]

    def _prepare_each(self, items: Sequence[EmbeddingInput]) -> list[PreparedInput | InvalidInput]:
        results: dict[int, PreparedInput | InvalidInput] = {}
        prompts: dict[int, Prompt] = {}
        for index, item in enumerate(items):
            try:
                prompts[index] = self._prompt(item)
            except InvalidInput as error:
                results[index] = error
        fitted = self._tokenizer.fit_all(
            list(prompts.values()),
            [self._limit(items[index]) for index in prompts],
            [items[index].truncate for index in prompts],
        )
        for (index, prompt), found in zip(prompts.items(), fitted, strict=True):
            results[index] = self._prepared(prompt, found) if isinstance(found, Fitted) else found
        return [results[index] for index in range(len(items))]

    def _prepared(self, prompt: Prompt, fitted: Fitted) -> PreparedInput | InvalidInput:
        count = len(fitted.ids)
        if not count:
            return InvalidInput("the text has no tokens: there is nothing to embed")
        shared = isinstance(self._forward, DecoderForward)
        unpooled = bool(prompt.before) and not self._folder.include_prompt
        # At least one token is pooled, and one stands after a prefix.
        return PreparedInput(
            token_ids=np.array(fitted.ids, dtype=np.int64),
            truncated=fitted.truncated,
            prefix_tokens=min(self._tokenizer.shared_tokens(prompt.before, fitted.ids), count - 1) if shared else 0,
            unpooled_tokens=min(self._tokenizer.unpooled_tokens(prompt.before), count - 1) if unpooled else 0,
        )

    def describe(self, item: EmbeddingInput) -> Description:
        """What `prepare` would make of an input. Raises InvalidInput for an image."""
        prompt = self._prompt(item)
        (fitted,) = self._tokenizer.fit_all([prompt], [self._limit(item)], [item.truncate])
        if isinstance(fitted, InputTooLong):
            count = self._tokenizer.count(prompt, self._max_tokens)
            return Description(prompt.render(), count, 0, (), truncated=False, refusal=str(fitted))
        shown = self._tokenizer.cut_text(prompt, fitted) if fitted.truncated else prompt.render()
        return Description(shown, len(fitted.ids), 0, (), truncated=fitted.truncated, refusal=None)

    def embed(self, batch: Sequence[PreparedInput]) -> npt.NDArray[np.float32]:
        """Unit vectors, float32 of shape (len(batch), width). Raises OutOfDeviceMemory, DeviceLost."""
        return devices.run(self._forward, batch)

    def warm_up(self) -> float:
        """Run texts of growing number, compiled where that pays; tokens per second of the largest batch."""
        short, text = (self.prepare(EmbeddingInput(("warm-up " * n,), truncate=True)) for n in (1, 24))
        if isinstance(self._forward, DecoderForward) and self._compile != "off" and self._device.type == "cuda":
            # What varies is compiled for the size that it has first: the usual one, of a full batch.
            self._forward.optimize([[short], [text] * 63 + [short]], graphs=self._compile == "auto")
        self.embed([short, text])
        return rates.measure(self.embed, text)

    @property
    def device(self) -> str:
        """The torch device."""
        return self.info.device

    def memory_bytes(self) -> int:
        return torch.cuda.memory_reserved(self._device) if self._device.type == "cuda" else 0

    def _limit(self, item: EmbeddingInput) -> int:
        return self._max_tokens if item.max_tokens is None else min(item.max_tokens, self._max_tokens)

    def _prompt(self, item: EmbeddingInput) -> Prompt:
        """The parts of an input are one text. Raises InvalidInput for an image."""
        texts = [part for part in item.parts if isinstance(part, str)]
        if len(texts) < len(item.parts):
            raise InvalidInput(_NO_IMAGES)
        default = self._folder.settings.default_prompt
        before = default if item.instruction is None else self._instruction_form(item.instruction)
        return Prompt(before, "".join(texts))


def _instruction_form(folder: Folder, model_type: str) -> InstructionForm:
    """Qwen3-Embedding's own, unless a folder of that type has prompts of another form."""
    texts = [text for _, text in folder.settings.prompts if text]
    own = model_type == "qwen3" and (not texts or any(text.startswith("Instruct:") for text in texts))
    return instruct if own else verbatim


def _max_tokens(folder: Folder, stock: Any, model: Any) -> int:
    """The folder's limit, or the tokenizer's; no more than the model has places for."""
    places = getattr(model.config, "max_position_embeddings", None) or stock.model_max_length
    if model.config.model_type in NAMES:
        places = len(model.embeddings.position_embeddings.weight) - position_offset(model)
    return int(min(folder.settings.max_seq_length or stock.model_max_length, places))


def _choose_forward(model: Any, folder: Folder, heads: Heads, staging: Staging, backend: str) -> EncoderForward | DecoderForward:
    """The packed one where there is one, else transformers' own."""
    config, pooling = model.config, Pooling(folder.modes)
    if backend == "packed" and config.model_type == "qwen3" and folder.modes == ("lasttoken",) and is_plain(config):
        decoder = Decoder(model)
        return DecoderForward(decoder, heads, choose_kernel(model.device, model.dtype, decoder.sizes.attention_heads), staging)
    if backend == "packed" and not getattr(config, "is_decoder", False):
        count = config.num_attention_heads
        kinds: dict[str, Callable[..., TokenStates]] = {**dict.fromkeys(NAMES, PostNormEncoder), "modernbert": ModernBertEncoder}
        if encoder := kinds.get(config.model_type):
            reach = config.sliding_window if config.model_type == "modernbert" else None
            kernel = choose_kernel(model.device, model.dtype, AttentionHeads(count, count, config.hidden_size // count), reach)
            return EncoderForward(encoder(model, kernel), pooling, heads, staging)
    return EncoderForward(PaddedStates(model), pooling, heads, staging, ROW_SEQUENCES)
