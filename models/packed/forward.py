"""The packed forward of a decoder: all sequences of a batch in one row of T tokens, padded nowhere but inside attention.

A batch is laid out in numpy, sent to the device, and run by the decoder; the last token of each sequence becomes its vector. The
keys and values of an instruction's prefix are computed once. On CUDA layers are compiled, and small batches are run as graphs.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from models.base import PreparedInput
from models.packed.attention import AttentionKernel, PrefixKeys, Span
from models.packed.compiled import Stepped, compile_steps
from models.packed.decoder import Decoder, ImageRows
from models.packed.graphs import CudaRecorder, Recorder, TokenGraphs, ToVectors
from models.packed.prefix_cache import PrefixCache
from models.packed.staging import Staging
from models.packed.token_row import TokenRow
from models.packed.varlen import VarlenKernel
from models.vectors import nearness

log = logging.getLogger(__name__)

# The least cosine at which two vectors are taken for the same: half precision moves a cosine by some 1e-4, a mistake by far more.
SAME = 0.995
# A deep model may round worse. Then the bar is lowered to so many times the rounding that the company of other inputs causes,
# since fused layers round elsewhere too; but never below this cosine.
ROUNDING_FACTOR = 4
MIN_SAME = 0.9


class DecoderForward:
    """Computes vectors by a decoder of texts. A subclass that reads images overrides `embed_images`, and `stepped` to have more
    compiled."""

    def __init__(self, decoder: Decoder, to_vectors: ToVectors, kernel: AttentionKernel, staging: Staging) -> None:
        self._decoder = decoder
        self._to_vectors = to_vectors
        self._kernel = kernel
        self._staging = staging
        self._graphs: TokenGraphs | None = None
        self.prefixes = PrefixCache(self._compute_prefix)

    @torch.inference_mode()
    def __call__(self, batch: Sequence[PreparedInput]) -> npt.NDArray[np.float32]:
        """Returns unit vectors, float32 (len(batch), width): row i is of batch[i]'s last token."""
        self._staging.begin()
        prefixes = self.prefixes.for_batch(batch)
        graph = None
        if self._graphs and not any(item.images for item in batch):
            saved = sum(prefix.length for prefix in prefixes if prefix)
            graph = self._graphs.choose(sum(item.num_tokens for item in batch), len(batch), saved)
        row = TokenRow.lay_out(batch, () if graph else prefixes)
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
        """Compiles the layers by torch.compile's backend `compiler`, and captures graphs by `recorder`, CUDA's by default.

        Both are used only if they give the vectors that the forward gave before. `samples` are batches to compare them by: of one
        input, of several, and of images if the model reads them.
        """
        same = self._same(samples)
        compile_steps(self.stepped(), lambda: [self(sample) for sample in samples], same, compiler)
        # A graph needs a kernel that reads the sequences' lengths from the device's memory.
        if graphs and isinstance(self._kernel, VarlenKernel):
            recorder = recorder or CudaRecorder(self._staging.device)
            self._graphs = TokenGraphs(self._decoder, self._to_vectors, self._staging, recorder, self._run, same)
            if len(self._graphs):
                log.info("%s", self._graphs.report())

    def stepped(self) -> list[Stepped]:
        """Returns the models whose layers can be compiled."""
        return [self._decoder]

    def embed_images(self, row: TokenRow, hidden: torch.Tensor) -> ImageRows | None:
        """Writes the features of a row's images into its embedded tokens, `hidden` (T, width), in place, and returns where; None
        for texts alone."""
        return None

    def _same(self, samples: Sequence[Sequence[PreparedInput]]) -> float:
        """Returns the least cosine at which two vectors are taken for one input's: the rounding that the company of other inputs
        causes, with some room."""
        alone = (np.concatenate([self([item]) for item in sample]) for sample in samples)
        noise = 1 - min(nearness(rows, self(sample)) for rows, sample in zip(alone, samples, strict=True))
        return max(MIN_SAME, min(SAME, 1 - ROUNDING_FACTOR * noise))

    def _run(self, row: TokenRow) -> torch.Tensor:
        """Returns unit vectors, float32 (sequences, width), in the order of the row's spans."""
        send = self._staging.send
        positions, last_rows = send(row.positions), send(row.last_rows)
        attention = self._kernel.causal(row.spans, send)
        hidden = self._decoder.embed(send(row.token_ids))
        images = self.embed_images(row, hidden)
        prefixes = [prefix.layers for prefix in row.prefixes]
        return self._to_vectors(self._decoder.run(hidden, positions, attention, last_rows, prefixes, images).float())

    def _compute_prefix(self, token_ids: npt.NDArray[np.int64]) -> list[PrefixKeys]:
        """Returns every layer's keys and values of a prefix, by its token ids, int64 (length,)."""
        send = self._staging.send
        positions = np.broadcast_to(np.arange(len(token_ids)), (3, len(token_ids)))
        attention = self._kernel.causal([Span(len(token_ids))], send)
        return self._decoder.keys(self._decoder.embed(send(token_ids)), send(positions), attention)
