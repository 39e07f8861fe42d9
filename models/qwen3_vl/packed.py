"""The packed forward: all sequences of a batch in one row of T tokens, nothing padded but inside attention.

A batch is laid out in numpy, sent to the device, and run by the vision tower and the text model; the keys and values of an
instruction's prefix are computed once. On CUDA the layers are compiled and small batches are run as graphs.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from models.base import PreparedInput
from models.pooling import nearness, normalize
from models.qwen3_vl.attention import PrefixKeys, Span
from models.qwen3_vl.compiled import compile_steps
from models.qwen3_vl.graphs import CudaRecorder, Recorder, TokenGraphs
from models.qwen3_vl.layout import PackedRow
from models.qwen3_vl.prefix_cache import PrefixCache
from models.qwen3_vl.staging import Staging
from models.qwen3_vl.text import ImageRows, TextModel
from models.qwen3_vl.tower import VisionTower
from models.qwen3_vl.varlen import Heads, VarlenKernel, choose_kernel
from models.qwen3_vl.vision import VisionSpec

log = logging.getLogger(__name__)

# Half precision moves a vector's cosine by some 1e-4, a mistake by far more. A deep model may round worse: then it is so many
# times the rounding that company makes, since layers that are fused round elsewhere too; but never less than this.
SAME = 0.995
ROUNDING = 4
NEVER_SAME = 0.9


class PackedForward:
    """Vectors by a Qwen3VLModel as transformers loads it: taken over, and of no other use."""

    def __init__(self, model: Any, spec: VisionSpec) -> None:
        """Raises ModelLoadError."""
        self._staging = Staging(model.device)
        self._image_token_id: int = model.config.image_token_id
        self._text = TextModel(model.language_model)
        queries, keys, _ = self._text.sizes.heads
        self._kernel = choose_kernel(model.device, model.dtype, Heads(queries, keys, self._text.sizes.head_dim))
        vision = model.config.vision_config
        seeing = Heads(vision.num_heads, vision.num_heads, vision.hidden_size // vision.num_heads)
        self._tower = VisionTower(model.visual, spec, choose_kernel(model.device, model.dtype, seeing), self._staging)
        self._graphs: TokenGraphs | None = None
        self.prefixes = PrefixCache(self._compute_prefix)

    @torch.inference_mode()
    def __call__(self, batch: Sequence[PreparedInput]) -> npt.NDArray[np.float32]:
        """Unit vectors, float32 of shape (len(batch), width): row i is of batch[i]'s last token."""
        self._staging.begin()
        prefixes = self.prefixes.for_batch(batch)
        graph = None
        if self._graphs and not any(item.images for item in batch):
            saved = sum(prefix.length for prefix in prefixes if prefix)
            graph = self._graphs.choose(sum(item.num_tokens for item in batch), len(batch), saved)
        row = PackedRow.lay_out(batch, [None] * len(batch) if graph else prefixes)
        found = self._staging.fetch(graph(row) if graph else self._run(row))
        rows = np.empty_like(found)
        rows[row.order] = found
        return rows

    @torch.inference_mode()
    def optimize(
        self,
        samples: Sequence[Sequence[PreparedInput]],
        *,
        graphs: bool = True,
        compiler: Any = "inductor",
        recorder: Recorder | None = None,
    ) -> None:
        """Compile the layers by torch.compile's backend `compiler`, and capture graphs by `recorder`, CUDA's by default.

        Each is used only if it gives the vectors that there were without it: of `samples`, batches of one input, of several, and
        with images.
        """
        same = self._same(samples)
        compile_steps(self._text, self._tower, lambda: [self(sample) for sample in samples], same, compiler)
        # Only there does a kernel take lengths from the device's memory.
        if graphs and isinstance(self._kernel, VarlenKernel):
            recorder = recorder or CudaRecorder(self._staging.device)
            self._graphs = TokenGraphs(self._text, self._staging, recorder, self._run, same)
            if len(self._graphs):
                log.info("%s", self._graphs.report())

    def _same(self, samples: Sequence[Sequence[PreparedInput]]) -> float:
        """The cosine at which two vectors are one input's: what rounding alone makes of an input in company, with some room."""
        alone = (np.concatenate([self([item]) for item in sample]) for sample in samples)
        noise = 1 - min(nearness(rows, self(sample)) for rows, sample in zip(alone, samples, strict=True))
        return max(NEVER_SAME, min(SAME, 1 - ROUNDING * noise))

    def _run(self, row: PackedRow) -> torch.Tensor:
        """Unit vectors, float32 (sequences, width), in the order of the row's spans."""
        send = self._staging.send
        positions, last_rows = send(row.positions), send(row.last_rows)
        attention = self._kernel.causal(row.spans, send)
        hidden = self._text.embed(send(row.token_ids))
        images: ImageRows | None = None
        if row.images:
            features, deepstack = self._tower(row.images)
            images = ImageRows(send(np.flatnonzero(row.token_ids == self._image_token_id)), deepstack)
            hidden[images.rows] = features.to(hidden.dtype)
        prefixes = [prefix.layers for prefix in row.prefixes]
        return normalize(self._text.run(hidden, positions, attention, last_rows, prefixes, images).float())

    def _compute_prefix(self, token_ids: npt.NDArray[np.int64]) -> list[PrefixKeys]:
        send = self._staging.send
        positions = np.broadcast_to(np.arange(len(token_ids)), (3, len(token_ids)))
        attention = self._kernel.causal([Span(len(token_ids))], send)
        return self._text.keys(self._text.embed(send(token_ids)), send(positions), attention)
