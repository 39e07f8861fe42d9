"""BaseModel: the part of an EmbeddingModel that all families share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from models import devices, rates
from models.base import PreparedInput
from models.packed.forward import DecoderForward

# Tokens of a text in the warm-up: of one of usual length, and of a word with the template around it.
USUAL_TOKENS = 72
SHORT_TOKENS = 24


class BaseModel(ABC):
    """The weights of a checkpoint on one device, and the forward that runs them.

    `forward` makes unit vectors of a batch, float32 (len(batch), width). Inputs for the warm-up are drawn as token ids, since a
    model has no tokenizer.
    """

    forward: devices.Forward

    def __init__(self, device: str, compile: str) -> None:
        """`device` is a torch device; `compile` is as in models.registry."""
        self._device = torch.device(device)
        self._compile = compile
        if self._device.type == "cuda":
            # For this thread, which is the one that embeds: streams and graphs are the current device's.
            torch.cuda.set_device(self._device.index or 0)

    @abstractmethod
    def _usual_input(self) -> PreparedInput:
        """Returns a text of usual length, by which the rate is measured."""

    @abstractmethod
    def _warm_up_batch(self) -> Sequence[PreparedInput]:
        """Returns a small batch that runs every part of the model once."""

    @abstractmethod
    def _samples(self) -> Sequence[Sequence[PreparedInput]]:
        """Returns batches of every kind, by which compiled layers and graphs are judged. A size that varies is compiled for its
        first value, so the first batch of several inputs is one of usual size."""

    @property
    def device(self) -> str:
        """The torch device."""
        return str(self._device)

    def embed(self, batch: Sequence[PreparedInput]) -> npt.NDArray[np.float32]:
        """Returns unit vectors, float32 (len(batch), width). Raises OutOfDeviceMemory, DeviceLost."""
        return devices.run(self.forward, batch)

    def warm_up(self) -> float:
        """Runs every part of the model once, compiled if it is a decoder on CUDA, and returns the rate in tokens per second of
        the largest batch of texts."""
        if isinstance(self.forward, DecoderForward) and self._compile != "off" and self._device.type == "cuda":
            self.forward.optimize(self._samples(), graphs=self._compile == "auto")
        self.embed(self._warm_up_batch())
        return rates.measure(self.embed, self._usual_input())

    def memory_bytes(self) -> int:
        """Returns the memory that the device has given to this process, in bytes; 0 on a CPU."""
        return torch.cuda.memory_reserved(self._device) if self._device.type == "cuda" else 0


def draw_tokens(num_tokens: int, vocabulary: int) -> npt.NDArray[np.int64]:
    """Draws token ids, int64 (num_tokens,), at most USUAL_TOKENS: the same ones at every call, so that all begin alike."""
    return np.random.default_rng(0).integers(0, vocabulary, USUAL_TOKENS)[:num_tokens]
