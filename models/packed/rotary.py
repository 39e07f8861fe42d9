"""Rotary position embedding (RoPE): queries and keys are turned by angles that follow from where a token stands.

Each component of a head's first half is paired with the same one of its second half, as transformers pairs them.
"""

from __future__ import annotations

import torch

# Cosine and sine of every token's angles, each (T, 1, head_dim).
Rotation = tuple[torch.Tensor, torch.Tensor]


def per_token(cos: torch.Tensor, sin: torch.Tensor) -> Rotation:
    """Returns what a rotary module of transformers gives, two of (1, T, head_dim), in the shape that `rotate` takes."""
    return cos[0].unsqueeze(1), sin[0].unsqueeze(1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates (T, heads, head_dim). Computes in the dtype of `cos` and `sin`, since families of transformers differ in that;
    returns that of `x`."""
    wide = x.to(cos.dtype)
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)
