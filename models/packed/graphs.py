"""A decoder as CUDA graphs: a small batch is one launch, and next to no work for the interpreter.

A graph replays fixed shapes from fixed memory, so there is one for each of some numbers of tokens, the buckets. A batch is
written into the memory of the smallest graph that holds it; the tokens that are left over form one more sequence, whose vector is
dropped, and sequences that are not needed are empty. Prefixes are computed with their inputs: in so small a batch they cost the
device little.

Graphs are captured in the warm-up, by the thread that replays them. A graph that gives other vectors than the eager forward is
not used.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from models.base import PreparedInput
from models.packed.decoder import Decoder
from models.packed.staging import Staging
from models.packed.token_row import TokenRow
from models.packed.varlen import Bounds, VarlenAttention
from models.vectors import nearness

log = logging.getLogger(__name__)

# Tokens of a graph. Every step is small enough that a batch fills at least three quarters of its bucket, but for the smallest.
# Beyond the largest the device takes longer for the work than the interpreter takes to launch it piece by piece.
BUCKETS = (32, 48, 64, 96, 128, 160, 192, 256, 320, 384, 512, 640, 768, 1024, 1280, 1536, 2048)
# Tokens of the shortest sequence that a graph makes room for: the chat template alone has more. A batch of more sequences than
# that allows is run without a graph.
MIN_TOKENS = 16
# Replays that are timed; the fastest counts.
TIMED_RUNS = 5

# Makes unit vectors of pooled hidden states, each float32 (sequences, width).
ToVectors = Callable[[torch.Tensor], torch.Tensor]


class Recorder(Protocol):
    """Makes a function of no arguments replayable. Every replay writes its result into the tensor that was returned first."""

    def record(self, run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]: ...


class CudaRecorder:
    """Records CUDA graphs, which share one pool of memory: no two of them may run at once."""

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        # One stream for all graphs: libraries keep a workspace for every stream that they have seen.
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def record(self, run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        current = torch.cuda.current_stream(self._stream.device)
        # In their first runs libraries allocate memory and choose their kernels, which a capture does not allow.
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(2):
                run()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            output = run()
        return graph.replay, output


class TokenGraph:
    """The graph of one bucket: a decoder over `tokens` tokens in at most `sequences` sequences, the left-over one not counted."""

    def __init__(self, tokens: int, decoder: Decoder, to_vectors: ToVectors, staging: Staging, recorder: Recorder) -> None:
        self.tokens = tokens
        self.sequences = tokens // MIN_TOKENS
        slots = self.sequences + 1
        self._staging = staging
        # One block of memory, so that one copy brings a batch: 64-bit numbers first, then the 32-bit ones.
        words = 4 * tokens + slots
        self._host = staging.keep(8 * words + 4 * (slots + 1))
        self._device = torch.zeros_like(self._host, device=staging.device)
        self._token_ids, self._positions, self._last_rows, self._starts = _views(self._host.numpy(), tokens, slots)
        self._write(TokenRow.lay_out([PreparedInput(np.zeros(tokens, dtype=np.int64))]))
        self._device.copy_(self._host)

        longs = self._device[: 8 * words].view(torch.int64)
        token_ids, positions, last_rows = longs[:tokens], longs[tokens : 4 * tokens].view(3, tokens), longs[4 * tokens :]
        starts = self._device[8 * words :].view(torch.int32)
        single = torch.arange(slots + 1, dtype=torch.int32, device=staging.device)
        attention = VarlenAttention(Bounds(starts, tokens), single)

        def run() -> torch.Tensor:
            return to_vectors(decoder.run(decoder.embed(token_ids), positions, attention, last_rows).float())

        self._replay, self._rows = recorder.record(run)
        # A graph knows addresses only: tensors that it reads, and that were allocated before its capture, must be kept alive.
        self._reads = run

    def __call__(self, row: TokenRow) -> torch.Tensor:
        """Returns the unit vectors of a batch that fits, float32 (sequences, width) on the device, in the order of the row's
        spans. The next replay overwrites them."""
        self._write(row)
        self._device.copy_(self._host, non_blocking=True)
        self._replay()
        return self._rows[: len(row.spans)]

    def _write(self, row: TokenRow) -> None:
        """Writes a batch into the host's block."""
        used, count = len(row.token_ids), len(row.spans)
        self._token_ids[:used], self._token_ids[used:] = row.token_ids, 0
        self._positions[:, :used], self._positions[:, used:] = row.positions, 0
        self._last_rows[:count], self._last_rows[count:] = row.last_rows, self.tokens - 1
        # The left-over sequence ends with the bucket; those after it are empty.
        self._starts[0], self._starts[count + 1 :] = 0, self.tokens
        self._starts[1 : count + 1] = row.last_rows + 1


class TokenGraphs:
    """The graphs of all buckets, and the choice of one for a batch."""

    def __init__(
        self,
        decoder: Decoder,
        to_vectors: ToVectors,
        staging: Staging,
        recorder: Recorder,
        eager: Callable[[TokenRow], torch.Tensor],
        same: float,
    ) -> None:
        """Captures all graphs, the largest first. `eager` gives a row's unit vectors, (sequences, width), without a graph; a
        graph is used only if the cosine of its vectors with those is `same` or more."""
        self._graphs: dict[int, TokenGraph] = {}
        self._seconds: dict[int, float] = {}
        self._eager_seconds = 0.0
        rng = np.random.default_rng(0)
        for tokens in sorted(BUCKETS, reverse=True):
            try:
                graph = TokenGraph(tokens, decoder, to_vectors, staging, recorder)
            except Exception as error:
                log.warning("no graph can be captured here: %s: %s", type(error).__name__, " ".join(str(error).split())[:200])
                break
            rows = [TokenRow.lay_out(draw(rng, tokens, graph.sequences, decoder.vocabulary)) for _ in range(2)]
            near = min(nearness(staging.fetch(graph(row)), staging.fetch(eager(row))) for row in rows)
            if not near >= same:
                log.warning("the graph of %d tokens gives other vectors (cosine %.4f); it is not used", tokens, near)
                continue
            self._graphs[tokens] = graph
            self._seconds[tokens] = _fastest(partial(graph, rows[0]), staging)
            # The last, of the smallest bucket, is the least that a batch takes without a graph: the time to launch it.
            self._eager_seconds = _fastest(partial(eager, rows[0]), staging)

    def __len__(self) -> int:
        return len(self._graphs)

    def report(self) -> str:
        """Returns one line for the log: how many graphs there are, and how long each takes."""
        times = ", ".join(f"{tokens}: {seconds * 1e3:.1f}" for tokens, seconds in sorted(self._seconds.items()))
        return f"{len(self)} graphs, ms by tokens: {times}; the least without one: {self._eager_seconds * 1e3:.1f} ms"

    def choose(self, tokens: int, sequences: int, saved: int) -> TokenGraph | None:
        """Returns the graph for a batch of so many tokens and sequences, None if the eager forward is done sooner: it takes
        `saved` of the tokens from prefixes, and need not compute them."""
        graph = self._smallest(tokens)
        if graph is None or graph.tokens > 2 * tokens or sequences > graph.sequences:
            return None
        shorter = self._smallest(tokens - saved) or graph
        return graph if self._seconds[graph.tokens] <= max(self._eager_seconds, self._seconds[shorter.tokens]) else None

    def _smallest(self, tokens: int) -> TokenGraph | None:
        """Returns the smallest graph that holds so many tokens."""
        fitting = [bucket for bucket in self._graphs if bucket >= tokens]
        return self._graphs[min(fitting)] if fitting else None


def draw(rng: np.random.Generator, tokens: int, sequences: int, vocabulary: int) -> list[PreparedInput]:
    """Draws a batch of random sequences, some short and one long, that leaves some of `tokens` over."""
    budget = tokens - int(rng.integers(0, tokens // 4))
    lengths: list[int] = []
    while len(lengths) < sequences - 1 and budget - sum(lengths) > 2 * MIN_TOKENS:
        lengths.append(int(rng.integers(MIN_TOKENS, budget - sum(lengths) - MIN_TOKENS)))
    lengths.append(budget - sum(lengths))
    return [PreparedInput(rng.integers(0, vocabulary, length)) for length in lengths]


def _views(host: npt.NDArray[np.uint8], tokens: int, slots: int) -> tuple[npt.NDArray[Any], ...]:
    """Returns the parts of a graph's block, as views: token ids (tokens,), positions (3, tokens), last rows (slots,), starts
    (slots + 1,)."""
    words = 4 * tokens + slots
    longs = host[: 8 * words].view(np.int64)
    return longs[:tokens], longs[tokens : 4 * tokens].reshape(3, tokens), longs[4 * tokens :], host[8 * words :].view(np.int32)


def _fastest(run: Callable[[], torch.Tensor], staging: Staging) -> float:
    """Returns the fastest of some runs in seconds, the copy to the host included."""
    seconds = []
    for _ in range(TIMED_RUNS):
        started = time.perf_counter()
        staging.begin()
        staging.fetch(run())
        seconds.append(time.perf_counter() - started)
    return min(seconds)
