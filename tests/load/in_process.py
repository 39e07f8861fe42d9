"""The forward pass without a service, step by step, on one workload after the other; a JSON line for each.

    python -m tests.load.in_process CHECKPOINT [--device cpu] [--seconds 2] [--cores 0]

Engines, tokenising included: `stock` is transformers' own processor and model in padded batches of 32 sorted by length, as the
official embedder calls them; `reference` our preprocessing before the same padded forward; `packed` without padding; `prefix`
with the instruction's keys and values computed once, which is what is served. Their turns are interleaved, and the fastest of
each counts: others use the machine too.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

# Inputs of a turn, by device and workload: enough to sort by length and to pack, and a few seconds at most.
TEXTS = {
    "cpu": {"16": 96, "32": 96, "128": 32, "512": 8, "mixed": 64},
    "cuda": dict.fromkeys(("16", "32", "128", "512", "mixed"), 2048),
}
IMAGES = {"cpu": 4, "cuda": 256}

Inputs = Sequence[Any]


class Stock:
    """The official way: processor and model of transformers, batches of 32 sorted by length, padded."""

    def __init__(self, path: Path, device: str) -> None:
        from tests.oracle import Oracle

        self._oracle = Oracle(path)
        self._oracle.model.to(device)

    def __call__(self, inputs: Inputs) -> int:
        import torch

        from models.qwen3_vl.reference import GROUP_SIZE

        tokens = 0
        ordered = sorted(inputs, key=lambda one: len(one) if isinstance(one, str) else 0)
        with torch.inference_mode():
            for start in range(0, len(ordered), GROUP_SIZE):
                batch = self._batch(ordered[start : start + GROUP_SIZE]).to(self._oracle.model.device)
                hidden = self._oracle.model(**batch).last_hidden_state
                last = batch["attention_mask"].sum(dim=1) - 1
                rows = hidden[torch.arange(len(hidden)), last]
                torch.nn.functional.normalize(rows.float(), dim=-1).cpu()
                tokens += int(batch["attention_mask"].sum())
        return tokens

    def _batch(self, inputs: Inputs) -> Any:
        from qwen_vl_utils import process_vision_info

        oracle = self._oracle
        conversations = [oracle.conversation([one]) for one in inputs]
        pictures, _ = process_vision_info(conversations, image_patch_size=oracle.processor.image_processor.patch_size)
        rendered = [oracle.rendered([one]) for one in inputs]
        return oracle.processor(text=rendered, images=pictures, do_resize=False, padding=True, return_tensors="pt")


class Ours:
    """An adapter, in batches as the scheduler would fill them."""

    def __init__(self, path: Path, device: str, backend: str, prefix: bool) -> None:
        from models.registry import load_model

        options = {"max_image_width": 0, "max_image_height": 0, "allow_pickle": False}
        self._model = load_model(path, device=device, dtype="auto", backend=backend, **options)
        self._prefix = prefix
        self._batch_tokens = 8192 if device.startswith("cuda") else 2048

    def __call__(self, inputs: Inputs) -> int:
        from models.base import EmbeddingInput, PreparedInput

        tokens = 0
        batch: list[PreparedInput] = []
        for one in [*inputs, None]:
            item = self._model.prepare(EmbeddingInput((one,))) if one is not None else None
            if batch and (item is None or sum(each.num_tokens for each in batch) + item.num_tokens > self._batch_tokens):
                self._model.embed(batch)
                batch = []
            if item is not None:
                tokens += item.num_tokens
                batch.append(item if self._prefix else replace(item, prefix_tokens=0))
        return tokens


def measure(engines: dict[str, Callable[[Inputs], int]], inputs: Inputs, seconds: float) -> dict[str, dict[str, float]]:
    """Vectors and tokens per second of each engine: the fastest of interleaved turns within `seconds` each."""
    best = dict.fromkeys(engines, float("inf"))
    tokens = {name: engine(inputs) for name, engine in engines.items()}
    spent = 0.0
    while spent < seconds * len(engines):
        for name, engine in engines.items():
            started = time.perf_counter()
            engine(inputs)
            elapsed = time.perf_counter() - started
            best[name] = min(best[name], elapsed)
            spent += elapsed
    return {name: {"vectors_per_s": len(inputs) / best[name], "tokens_per_s": tokens[name] / best[name]} for name in engines}


def main() -> None:
    """Print a line for each workload."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each engine on each workload")
    parser.add_argument("--cores", help="run on these alone, as in 0,1")
    options = parser.parse_args()
    if options.cores:
        os.sched_setaffinity(0, {int(core) for core in options.cores.split(",")})
    from tests.load import workloads

    engines: dict[str, Callable[[Inputs], int]] = {
        "stock": Stock(options.checkpoint, options.device),
        "reference": Ours(options.checkpoint, options.device, "reference", prefix=False),
        "packed": Ours(options.checkpoint, options.device, "packed", prefix=False),
        "prefix": Ours(options.checkpoint, options.device, "packed", prefix=True),
    }
    kind = options.device.partition(":")[0]
    for name in (*map(str, workloads.LENGTHS), "mixed", "images"):
        inputs: list[str | Image.Image] = (
            [*workloads.images(IMAGES[kind])]
            if name == "images"
            else [*workloads.texts(options.checkpoint, name, TEXTS[kind][name])]
        )
        print(json.dumps({"workload": name, **measure(engines, inputs, options.seconds)}), flush=True)


if __name__ == "__main__":
    main()
