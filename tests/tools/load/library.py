"""sentence-transformers in a process of its own: `SentenceTransformer.encode` over texts, in its batches of 32 sorted by length.

`Library` is the asking side, and imports no torch. What the servers are compared with is how the library's own users would embed
the same texts: all at once, in one process, on the same core.
"""

from __future__ import annotations

import argparse
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.tools.load import children, workloads
from tests.tools.load.lines import LineProcess, answer_lines

BATCH_SIZE = 32
VERSIONS = ("sentence-transformers", "transformers", "torch")


class Library(LineProcess):
    """The process from outside. `ready` has the versions of VERSIONS, and its `threads`."""

    def take(self, count: int) -> list[int]:
        """Draw so many texts, and run over them once. The tokens of each, special ones included."""
        tokens: list[int] = self.ask("take", count=count)
        return tokens

    def turn(self, seconds: float) -> dict[str, float]:
        """Passes over the texts for `seconds`, one at the least: `passes`, `seconds`, and `cpu_seconds` of the process."""
        done: dict[str, float] = self.ask("turn", seconds=seconds)
        return done

    def vectors(self, count: int) -> list[list[float]]:
        """Those of the first `count` texts."""
        found: list[list[float]] = self.ask("vectors", count=count)
        return found


@contextmanager
def library(path: Path, device: str, dtype: str) -> Iterator[Library]:
    """Start the process; it loads while its starter goes on."""
    arguments = [str(path), "--device", device, "--dtype", dtype]
    with children.child("tests.tools.load.library", *arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as popen:
        yield Library(popen, "the library's process")


class Encoder:
    """What the process answers with: a method for each command."""

    def __init__(self, path: Path, device: str, dtype: str) -> None:
        import torch
        from sentence_transformers import SentenceTransformer

        self._model = SentenceTransformer(
            str(path), device=device, local_files_only=True, model_kwargs={"dtype": getattr(torch, dtype)}
        )
        self._texts: Sequence[str] = ()

    def describe(self) -> dict[str, Any]:
        import torch

        return {**{name: version(name) for name in VERSIONS}, "threads": torch.get_num_threads()}

    def take(self, count: int) -> list[int]:
        self._texts = workloads.passages(count)
        self._encode(self._texts)
        tokenizer = self._model.tokenizer
        return [min(len(ids), self._model.max_seq_length) for ids in tokenizer(list(self._texts))["input_ids"]]

    def turn(self, seconds: float) -> dict[str, float]:
        passes, started, spent = 0, time.perf_counter(), time.process_time()
        while not passes or time.perf_counter() - started < seconds:
            self._encode(self._texts)
            passes += 1
        return {"passes": passes, "seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - spent}

    def vectors(self, count: int) -> Any:
        return self._encode(self._texts[:count]).tolist()

    def _encode(self, texts: Sequence[str]) -> Any:
        return self._model.encode(list(texts), batch_size=BATCH_SIZE, show_progress_bar=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()

    def make() -> tuple[dict[str, Any], dict[str, Callable[..., Any]]]:
        encoder = Encoder(options.checkpoint, options.device, options.dtype)
        return encoder.describe(), {"take": encoder.take, "turn": encoder.turn, "vectors": encoder.vectors}

    answer_lines(make)


if __name__ == "__main__":
    from app.process import tame_threads

    tame_threads()
    main()
