"""A fake model whose vectors prove their input, with faults to order.

    python -m tests.support.fakes

serves it, over create_app and with the settings of the environment; faults are taken from FAKE_* variables.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from models.base import (
    Description,
    DeviceLost,
    EmbeddingInput,
    ImageGrid,
    InputTooLong,
    InvalidInput,
    LoadedModel,
    ModelInfo,
    OutOfDeviceMemory,
    PreparedImage,
    PreparedInput,
    Refusal,
)

DEFAULT_INSTRUCTION = "default"
TEMPLATE_TOKENS = 4
IMAGE_TOKENS = 10


def contents(item: EmbeddingInput) -> bytes:
    """All of an input as bytes: whatever differs in it differs in them."""
    pieces = [(item.instruction or DEFAULT_INSTRUCTION).encode(), b"verbatim" if item.verbatim else b""]
    for part in item.parts:
        pieces.append(part.encode() if isinstance(part, str) else prepare_image(part).patches.tobytes())
    return b"\x1f".join(pieces)


def prepare_image(image: Image.Image | PreparedImage) -> PreparedImage:
    """Its patches are a digest of its size and pixels: no other image has them."""
    if isinstance(image, PreparedImage):
        return image
    digest = hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()
    grid = ImageGrid(image.size, (32, 32), (2, 2), IMAGE_TOKENS)
    return PreparedImage(grid, np.frombuffer(digest, dtype=np.uint8).reshape(4, -1))


def vector_of(key: bytes | npt.NDArray[np.int64], width: int) -> npt.NDArray[np.float32]:
    """A unit vector, float32 of shape (width,), that only this input has."""
    data = key if isinstance(key, bytes) else key.tobytes()
    seed = int.from_bytes(hashlib.sha256(data).digest()[:8], "little")
    row = np.random.default_rng(seed).standard_normal(width).astype(np.float32)
    return row / np.linalg.norm(row)


@dataclass
class FakeModel:
    """A Preparer and an EmbeddingModel. One token per character of text and IMAGE_TOKENS per image, after the template's four."""

    width: int = 16
    max_tokens: int = 1_000_000
    device: str = "cpu"
    largest_image: int = 32
    supports_images: bool = True
    # Faults.
    seconds_per_batch: float = 0.0
    load_seconds: float = 0.0
    load_error: Exception | None = None
    fail_text: str = ""
    heavy_text: str = ""
    most_inputs: int = 0
    lose_after: int = 0
    kill_after: int = 0
    stall_after: int = 0
    gate: threading.Event | None = None
    # While this file is there, neither a load nor a batch ends.
    hold: Path | None = None
    # What it has seen.
    batches: list[int] = field(default_factory=list)
    embedded: int = 0

    def load(self) -> FakeModel:
        time.sleep(self.load_seconds)
        self._wait_for_hold()
        if self.load_error:
            raise self.load_error
        return self

    def load_both(self) -> LoadedModel:
        """Loads it as an engine wants it: what prepares, and what computes."""
        model = self.load()
        return LoadedModel(model, model)

    @property
    def info(self) -> ModelInfo:
        return ModelInfo(
            "fake",
            self.width,
            self.max_tokens,
            self.device,
            "float32",
            "f00d",
            self.supports_images,
            largest_image=self.largest_image,
            image_token_bytes=-(-self.largest_image // IMAGE_TOKENS),
        )

    def vector(
        self, *parts: str | Image.Image, instruction: str | None = None, verbatim: bool = False
    ) -> npt.NDArray[np.float32]:
        """The vector that an input must get."""
        return vector_of(self.prepare(EmbeddingInput(parts, instruction, verbatim)).token_ids, self.width)

    def reduced_size(self, size: tuple[int, int]) -> tuple[int, int] | None:
        return None

    def prepare_image(self, image: Image.Image, original_size: tuple[int, int] | None = None) -> PreparedImage:
        return prepare_image(image)

    def prepare(self, item: EmbeddingInput) -> PreparedInput:
        images = [prepare_image(part) for part in item.parts if not isinstance(part, str)]
        limit = min(item.max_tokens or self.max_tokens, self.max_tokens)
        fixed = TEMPLATE_TOKENS + IMAGE_TOKENS * len(images)
        length = fixed + sum(len(part) for part in item.parts if isinstance(part, str))
        truncated = length > limit
        if truncated and (not item.truncate or fixed > limit):
            raise InputTooLong(f"the input has {length} tokens; the limit is {limit}")
        length = min(length, limit)
        ids = np.frombuffer(hashlib.sha256(contents(item)).digest(), dtype=np.uint8).astype(np.int64)
        fault = next((mark for mark, text in ((-1, self.fail_text), (-2, self.heavy_text)) if _begins(item, text)), 0)
        return PreparedInput(np.concatenate([np.resize(ids, length - 1), [fault]]), tuple(images), truncated=truncated)

    def prepare_all(self, items: Sequence[EmbeddingInput]) -> list[PreparedInput | Refusal]:
        results: list[PreparedInput | Refusal] = []
        for item in items:
            try:
                results.append(self.prepare(item))
            except InvalidInput as error:
                results.append(Refusal(str(error)))
        return results

    def describe(self, item: EmbeddingInput) -> Description:
        grids = tuple(prepare_image(part).grid for part in item.parts if not isinstance(part, str))
        text = "".join(part if isinstance(part, str) else "<image>" for part in item.parts)
        prompt = f"{item.instruction or DEFAULT_INSTRUCTION}|{text}"
        try:
            prepared = self.prepare(item)
        except InputTooLong as error:
            return Description(prompt, None, IMAGE_TOKENS * len(grids), grids, False, str(error))
        return Description(prompt, prepared.text_tokens, prepared.image_tokens, grids, prepared.truncated, None)

    def embed(self, batch: Sequence[PreparedInput]) -> npt.NDArray[np.float32]:
        if self.gate is not None:
            self.gate.wait()
        self._wait_for_hold()
        time.sleep(self.seconds_per_batch)
        self.batches.append(len(batch))
        if self.lose_after and len(self.batches) >= self.lose_after:
            raise DeviceLost("CUDA error: an illegal memory access was encountered")
        if self.kill_after and len(self.batches) >= self.kill_after:
            raise SystemExit("the thread is killed")
        if self.stall_after and len(self.batches) >= self.stall_after:
            threading.Event().wait()
        if any(item.token_ids[-1] == -2 for item in batch):
            raise OutOfDeviceMemory("one input is too large for the device")
        if self.most_inputs and len(batch) > self.most_inputs:
            raise OutOfDeviceMemory(f"{len(batch)} inputs do not fit")
        if any(item.token_ids[-1] == -1 for item in batch):
            raise RuntimeError("this input breaks the model")
        self.embedded += len(batch)
        return np.stack([vector_of(item.token_ids, self.width) for item in batch])

    def _wait_for_hold(self) -> None:
        while self.hold is not None and self.hold.exists():
            time.sleep(0.005)

    def warm_up(self) -> float:
        return 1_000_000.0

    def memory_bytes(self) -> int:
        return 0


def _begins(item: EmbeddingInput, text: str) -> bool:
    return bool(text) and any(str(part).startswith(text) for part in item.parts)


def _from_environment() -> FakeModel:
    number = lambda name, kind: kind(os.environ.get(f"FAKE_{name}", "0"))  # noqa: E731
    return FakeModel(
        seconds_per_batch=number("SECONDS_PER_BATCH", float),
        load_seconds=number("LOAD_SECONDS", float),
        most_inputs=number("MOST_INPUTS", int),
        lose_after=number("LOSE_AFTER", int),
        kill_after=number("KILL_AFTER", int),
        stall_after=number("STALL_AFTER", int),
        fail_text=os.environ.get("FAKE_FAIL_TEXT", ""),
        heavy_text=os.environ.get("FAKE_HEAVY_TEXT", ""),
        hold=Path(hold) if (hold := os.environ.get("FAKE_HOLD")) else None,
    )


def main() -> None:
    """Serve the fake model."""
    import asyncio

    import app.http.server
    from app.logs import configure_logging
    from app.main import create_app
    from app.process import allow_connections, freeze_heap, share_interpreter
    from app.settings import load_settings

    settings = load_settings().settings
    configure_logging(settings.log_level, settings.log_format)
    app.http.server.FAILED_GRACE_S = float(os.environ.get("FAKE_FAILED_GRACE_S", app.http.server.FAILED_GRACE_S))

    async def run() -> int:
        return await app.http.server.serve(create_app(settings, _from_environment().load_both, freeze_heap))

    share_interpreter()
    allow_connections()
    os._exit(asyncio.run(run()))


if __name__ == "__main__":
    main()
