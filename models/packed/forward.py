"""The packed forward of a decoder: all sequences of a batch in one row of T tokens, nothing padded but inside attention.

A batch is laid out in numpy, sent to the device, and run by the decoder; the last token of each sequence becomes its vector. The
keys and values of an instruction's prefix are computed once. On CUDA the layers are compiled and small batches are run as graphs.
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
from models.packed.graphs import CudaRecorder, Head, Recorder, TokenGraphs
from models.packed.layout import PackedRow
from models.packed.prefix_cache import PrefixCache
from models.packed.staging import Staging
from models.packed.varlen import VarlenKernel
from models.vectors import nearness

log = logging.getLogger(__name__)

# Half precision moves a vector's cosine by some 1e-4, a mistake by far more. A deep model may round worse: then it is so many
# times the rounding that company makes, since layers that are fused round elsewhere too; but never less than this.
SAME = 0.995
ROUNDING = 4
NEVER_SAME = 0.9


class DecoderForward:
    """Vectors by a decoder of texts. What reads images too says how in `see`, and what of it can be compiled in `stepped`."""

    def __init__(self, decoder: Decoder, head: Head, kernel: AttentionKernel, staging: Staging) -> None:
        self._decoder = decoder
        self._head = head
        self._kernel = kernel
        self._staging = staging
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
        with images where they are read.
        """
        same = self._same(samples)
        compile_steps(self.stepped(), lambda: [self(sample) for sample in samples], same, compiler)
        # Only there does a kernel take lengths from the device's memory.
        if graphs and isinstance(self._kernel, VarlenKernel):
            recorder = recorder or CudaRecorder(self._staging.device)
            self._graphs = TokenGraphs(self._decoder, self._head, self._staging, recorder, self._run, same)
            if len(self._graphs):
                log.info("%s", self._graphs.report())

    def stepped(self) -> list[Stepped]:
        """The models whose layers can be compiled."""
        return [self._decoder]

    def see(self, row: PackedRow, hidden: torch.Tensor) -> ImageRows | None:
        """Put what is seen of a row's images into its embedded tokens, `hidden` (T, width), in place; None for texts alone."""
        return None

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
        hidden = self._decoder.embed(send(row.token_ids))
        images = self.see(row, hidden)
        prefixes = [prefix.layers for prefix in row.prefixes]
        return self._head(self._decoder.run(hidden, positions, attention, last_rows, prefixes, images).float())

    def _compute_prefix(self, token_ids: npt.NDArray[np.int64]) -> list[PrefixKeys]:
        send = self._staging.send
        positions = np.broadcast_to(np.arange(len(token_ids)), (3, len(token_ids)))
        attention = self._kernel.causal([Span(len(token_ids))], send)
        return self._decoder.keys(self._decoder.embed(send(token_ids)), send(positions), attention)
