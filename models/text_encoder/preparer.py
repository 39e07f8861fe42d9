"""The Preparer of texts: instruction and text, as the folder and the tokenizer of the checkpoint have them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoTokenizer

from models import devices
from models.base import (
    Description,
    EmbeddingInput,
    ImageLimits,
    InvalidInput,
    ModelInfo,
    ModelLoadError,
    PreparedImage,
    PreparedInput,
    Refusal,
)
from models.base_preparer import BasePreparer
from models.checkpoints.fingerprint import fingerprint
from models.checkpoints.weights import StoredTensor, stored_tensors
from models.registry import Family, named
from models.text_encoder.folder import WITH_WEIGHTS, Folder
from models.text_encoder.positions import max_length
from models.text_encoder.prompt import FittedText, TextPrompt, TextTokenizer
from models.text_encoder.refusals import check_own_code, check_tokenizer

_NO_IMAGES = "this model embeds text only: send no image"


class TextPreparer(BasePreparer[TextPrompt, FittedText]):
    """A Preparer of texts alone."""

    def __init__(self, path: Path, family: Family, *, device: str, dtype: str, limits: ImageLimits, allow_pickle: bool) -> None:
        """Reads the checkpoint in folder `path`; arguments are those of models.registry, and `limits` have no effect. Raises
        ModelLoadError."""
        check_own_code(path)
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        stock = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        self._folder = Folder.read(path, config, family)
        self._tokenizer = TextTokenizer(stock, self._folder.settings.lower_case)
        check_tokenizer(path, family, self._folder, stock, self._tokenizer.specials)
        self._instruct = _instruction_form(self._folder, family)
        # Only a decoder can compute the tokens that inputs share by themselves.
        self._shares_prefixes = family.is_causal
        modules = _module_weights(self._folder, allow_pickle)
        chosen = str(devices.choose_dtype(dtype, devices.checkpoint_dtype(config), torch.device(device)))
        settings = {"dtype": chosen, "folder": self._folder.summary()}
        longest = self._folder.settings.max_seq_length or stock.model_max_length
        self.info = ModelInfo(
            model_type=config.model_type,
            width=_width(self._folder, config.hidden_size, modules),
            max_tokens=int(min(longest, max_length(config) or stock.model_max_length)),
            device=device,
            dtype=chosen.removeprefix("torch."),
            fingerprint=fingerprint(path, [*stored_tensors(path, allow_pickle), *modules], settings),
            supports_images=False,
            cuda_available=torch.cuda.is_available(),
        )

    def reduced_size(self, size: tuple[int, int]) -> None:
        """Returns None: no image is read."""

    def prepare_image(self, image: Image.Image, original_size: tuple[int, int] | None = None) -> PreparedImage:
        """Raises InvalidInput: no image is read."""
        raise InvalidInput(_NO_IMAGES)

    def describe(self, item: EmbeddingInput) -> Description:
        """Describes what `prepare` would make of an input. Raises InvalidInput for an image."""
        prompt = self._plan(item)
        (fitted,) = self._fit([prompt], [self._limit(item)], [item.truncate])
        if isinstance(fitted, Refusal):
            count = self._tokenizer.count(prompt, self.info.max_tokens)
            return Description(prompt.render(), count, 0, (), truncated=False, refusal=fitted.message)
        shown = self._tokenizer.cut_text(prompt, fitted) if fitted.truncated else prompt.render()
        return Description(shown, len(fitted.ids), 0, (), truncated=fitted.truncated, refusal=None)

    def _plan(self, item: EmbeddingInput) -> TextPrompt:
        """Joins the parts of an input to one text."""
        texts = [part for part in item.parts if isinstance(part, str)]
        if len(texts) < len(item.parts):
            raise InvalidInput(_NO_IMAGES)
        default = self._folder.settings.default_prompt
        before = default if item.instruction is None else self._instruct(item.instruction)
        return TextPrompt(before, "".join(texts))

    def _fit(self, plans: Sequence[TextPrompt], limits: Sequence[int], truncate: Sequence[bool]) -> list[FittedText | Refusal]:
        return self._tokenizer.fit_all(plans, limits, truncate)

    def _assemble(self, item: EmbeddingInput, plan: TextPrompt, fitted: FittedText) -> PreparedInput:
        count = len(fitted.ids)
        if not count:
            raise InvalidInput("the text has no tokens: there is nothing to embed")
        has_unpooled = bool(plan.before) and not self._folder.include_prompt
        # At least one token stands after a prefix, and at least one is pooled.
        return PreparedInput(
            token_ids=np.array(fitted.ids, dtype=np.int64),
            truncated=fitted.truncated,
            prefix_tokens=min(self._tokenizer.shared_tokens(plan.before, fitted.ids), count - 1) if self._shares_prefixes else 0,
            unpooled_tokens=min(self._tokenizer.unpooled_tokens(plan.before), count - 1) if has_unpooled else 0,
        )


def _instruction_form(folder: Folder, family: Family) -> Callable[[str], str]:
    """Returns the function that makes of an instruction what stands before the text: the family's, unless the folder has prompts
    of another form. Without it, and as `prompt=` in sentence-transformers, the instruction itself stands there."""
    texts = [text for _, text in folder.settings.prompts if text]
    if family.instruction and (not texts or any(text.startswith("Instruct:") for text in texts)):
        form: Callable[[str], str] = named(family.instruction)
        return form
    return lambda instruction: instruction


def _module_weights(folder: Folder, allow_pickle: bool) -> list[StoredTensor]:
    """Returns the weights of the modules after pooling, each name behind its module's index: a folder's name decides nothing."""
    return [
        StoredTensor(f"{index}.{tensor.name}", tensor.dtype, tensor.shape, tensor.data)
        for index, module in enumerate(folder.post_pooling)
        if module.kind in WITH_WEIGHTS
        for tensor in stored_tensors(module.path, allow_pickle)
    ]


def _width(folder: Folder, hidden_size: int, modules: Sequence[StoredTensor]) -> int:
    """Returns a vector's number of components: the last dense layer's, or one hidden state's for each pooling mode, and no more
    than the folder keeps. Raises ModelLoadError if a dense layer has no matrix."""
    shapes = {tensor.name: tensor.shape for tensor in modules}
    width = hidden_size * len(folder.modes)
    for index, module in enumerate(folder.post_pooling):
        if module.kind == "Dense":
            shape = shapes.get(f"{index}.linear.weight", ())
            if len(shape) != 2:
                raise ModelLoadError(f"{module.path}: its weights are not those of a dense layer of {width} components")
            width = shape[0]
    return min(width, folder.settings.truncate_dim or width)
