"""Compiled layers: a layer's work before attention and its work after, each fused by torch.compile, once for all layers.

The stock layer reads and writes 11.5 MB a token outside matrix products and attention (2B model, bfloat16); fused it is 2.3 MB.
Layers are compiled in the warm-up and never later: a shape that was not foreseen is run uncompiled.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from models.vectors import nearness

log = logging.getLogger(__name__)


class Stepped(Protocol):
    """A model whose layers are run by functions of tensors alone, which are the fields of the dataclass `steps`."""

    steps: Any


def compile_steps(
    models: Sequence[Stepped], run: Callable[[], Sequence[npt.NDArray[np.float32]]], same: float, backend: Any = "inductor"
) -> bool:
    """Compiles all models' steps, and returns whether they are used. They are only if `run`, which embeds samples of every kind,
    gives the unit vectors that it gave before, to a cosine of `same`; else a warning is logged, and the steps stay as they were.
    `backend` is torch.compile's."""
    # Another model of this process may have changed it.
    torch.compiler.set_stance("default")
    expected = run()
    eager = [model.steps for model in models]
    started = time.perf_counter()
    for model, steps in zip(models, eager, strict=True):
        model.steps = _compiled(steps, backend)
    try:
        # Twice: the first run finds the sizes that vary, the second compiles for any size.
        near = min(nearness(rows, before) for _ in range(2) for rows, before in zip(run(), expected, strict=True))
        fault = "" if near >= same else f"they give other vectors (cosine {near:.4f})"
    except Exception as error:
        fault = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if fault:
        for model, steps in zip(models, eager, strict=True):
            model.steps = steps
        log.warning("the layers are not compiled: %s", fault)
        return False
    # A compilation takes seconds, in which no request would be answered.
    torch.compiler.set_stance("eager_on_recompile")
    log.info("layers compiled in %.1f s", time.perf_counter() - started)
    return True


def _compiled(steps: Any, backend: Any) -> Any:
    compiled: Any = partial(torch.compile, backend=backend, fullgraph=True)
    return type(steps)(**{step.name: compiled(getattr(steps, step.name)) for step in fields(steps)})
