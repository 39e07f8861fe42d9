"""The forward pass without a service, step by step from the stock one to what is served; tokenising and decoding included."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from models.base import EmbeddingInput, PreparedInput
    from tests.support.whole_model import WholeModel

# A text, or the bytes of an image's JPEG file.
Input = str | bytes


@dataclass(frozen=True, slots=True)
class Engine:
    """A row of the table. `options` are load_model's, None for the stock model; without `prefix` no input's `prefix_tokens` is
    used, so that nothing is computed once for all."""

    name: str
    options: Mapping[str, str] | None = field(default_factory=dict)
    prefix: bool = True
    cuda_only: bool = False


ENGINES = (
    Engine("stock", options=None),
    Engine("reference", {"backend": "reference"}, prefix=False),
    Engine("packed", {"compile": "off"}, prefix=False),
    Engine("compiled", {"compile": "layers"}, prefix=False, cuda_only=True),
    Engine("graphs", prefix=False, cuda_only=True),
    Engine("prefix"),
)


def engines_on(device: str) -> tuple[Engine, ...]:
    """Those that are measured on a device; the last of them is what the service runs by default."""
    return tuple(engine for engine in ENGINES if device.startswith("cuda") or not engine.cuda_only)


@dataclass(slots=True)
class Work:
    """What an engine has done. Of its `seconds`, `model_seconds` were in the model, and not in tokenising or decoding;
    `cpu_seconds` are those of the process on all cores."""

    vectors: int = 0
    tokens: int = 0
    seconds: float = 0.0
    model_seconds: float = 0.0
    cpu_seconds: float = 0.0


class Stock:
    """The official way: processor and model of transformers, batches of 32 sorted by length, padded."""

    def __init__(self, path: Path, device: str, dtype: str) -> None:
        import torch

        from tests.support.oracle import Oracle

        self._oracle = Oracle(path, dtype=getattr(torch, dtype))
        self._oracle.model.to(device)

    def run(self, inputs: Sequence[Input], work: Work) -> None:
        """Embed them all, and add to `work`."""
        from models.qwen3_vl.reference import GROUP_SIZE

        ordered = sorted(inputs, key=lambda one: len(one) if isinstance(one, str) else 0)
        for start in range(0, len(ordered), GROUP_SIZE):
            batch = self._batch(ordered[start : start + GROUP_SIZE])
            started = time.perf_counter()
            self._embed(batch)
            work.model_seconds += time.perf_counter() - started
            work.tokens += int(batch["attention_mask"].sum())
        work.vectors += len(inputs)

    def vectors(self, inputs: Sequence[Input]) -> npt.NDArray[np.float32]:
        """Unit vectors of a few inputs, float32 of shape (len(inputs), width), each computed alone."""
        return np.concatenate([self._embed(self._batch([one])) for one in inputs])

    def _batch(self, inputs: Sequence[Input]) -> Any:
        from PIL import Image
        from qwen_vl_utils import process_vision_info

        oracle = self._oracle
        parts = [one if isinstance(one, str) else Image.open(io.BytesIO(one)).convert("RGB") for one in inputs]
        conversations = [oracle.conversation([part]) for part in parts]
        pictures, _ = process_vision_info(conversations, image_patch_size=oracle.processor.image_processor.patch_size)
        rendered = [oracle.rendered([part]) for part in parts]
        return oracle.processor(text=rendered, images=pictures, do_resize=False, padding=True, return_tensors="pt")

    def _embed(self, batch: Any) -> npt.NDArray[np.float32]:
        import torch

        with torch.inference_mode():
            hidden = self._oracle.model(**batch.to(self._oracle.model.device)).last_hidden_state
            last = batch["attention_mask"].sum(dim=1) - 1
            rows = hidden[torch.arange(len(hidden), device=hidden.device), last.to(hidden.device)]
            found: npt.NDArray[np.float32] = torch.nn.functional.normalize(rows.float(), dim=-1).cpu().numpy()
            return found


class Ours:
    """Our model, in batches as the scheduler would fill them."""

    def __init__(self, model: WholeModel, batch_tokens: int, prefix: bool) -> None:
        self._model = model
        self._batch_tokens = batch_tokens
        self._prefix = prefix

    def run(self, inputs: Sequence[Input], work: Work) -> None:
        """Embed them all, and add to `work`."""
        for batch in self._batches(inputs):
            started = time.perf_counter()
            self._model.embed(batch)
            work.model_seconds += time.perf_counter() - started
            work.vectors += len(batch)
            work.tokens += sum(item.num_tokens for item in batch)

    def vectors(self, inputs: Sequence[Input]) -> npt.NDArray[np.float32]:
        """Unit vectors of a few inputs, float32 of shape (len(inputs), width), computed together."""
        return self._model.embed([self.prepare(one) for one in inputs])

    def prepare(self, one: Input) -> PreparedInput:
        """As the service does, from the text or the file's bytes."""
        item = self._model.prepare(_embedding_input(one))
        return item if self._prefix else replace(item, prefix_tokens=0)

    def _batches(self, inputs: Sequence[Input]) -> Iterator[list[PreparedInput]]:
        from app.settings import DEFAULTS

        batch: list[PreparedInput] = []
        tokens = 0
        for item in map(self.prepare, inputs):
            if batch and (tokens + item.num_tokens > self._batch_tokens or len(batch) == DEFAULTS.max_batch_size):
                yield batch
                batch, tokens = [], 0
            batch.append(item)
            tokens += item.num_tokens
        if batch:
            yield batch


def _embedding_input(one: Input) -> EmbeddingInput:
    from app.media.image import decode_image
    from app.settings import DEFAULTS
    from models.base import EmbeddingInput

    if isinstance(one, str):
        return EmbeddingInput((one,))
    return EmbeddingInput((decode_image(one, DEFAULTS.max_image_bytes, DEFAULTS.max_image_pixels),))


def load_engines(path: Path, device: str, dtype: str) -> tuple[dict[str, Stock | Ours], str]:
    """Every engine of the device by name, warmed up, and the dtype that all of them run in: `dtype` may be "auto"."""
    from tests.support.whole_model import load_model

    loaded: dict[tuple[tuple[str, str], ...], tuple[WholeModel, int]] = {}
    engines: dict[str, Stock | Ours] = {}
    # What `auto` is, our model says; the stock model is loaded after.
    for engine in sorted(engines_on(device), key=lambda engine: engine.options is None):
        if engine.options is None:
            engines[engine.name] = Stock(path, device, dtype)
            continue
        key = tuple(sorted(engine.options.items()))
        if key not in loaded:
            options: dict[str, Any] = {"max_image_width": 0, "max_image_height": 0, "allow_pickle": False, **engine.options}
            model = load_model(path, device=device, dtype=dtype, **options)
            loaded[key] = model, batch_tokens(device, model.warm_up())
        model, tokens = loaded[key]
        dtype = model.info.dtype
        engines[engine.name] = Ours(model, tokens, engine.prefix)
    return engines, dtype


def batch_tokens(device: str, rate: float) -> int:
    """The scheduler's own bound of a batch for a model of `rate` tokens per second."""
    from scheduler.batch_queue import CPU_BATCH_SECONDS, DEFAULT_BATCH_TOKENS, MIN_CPU_BATCH_TOKENS

    if device != "cpu":
        return DEFAULT_BATCH_TOKENS
    return min(max(int(rate * CPU_BATCH_SECONDS), MIN_CPU_BATCH_TOKENS), DEFAULT_BATCH_TOKENS)
