"""Rotary embedding, against the rotation of complex numbers."""

from __future__ import annotations

import pytest
import torch

from models.packed.rotary import per_token, rotate


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotate_turns_pairs_of_components(dtype: torch.dtype) -> None:
    """A component of the first half, and the same one of the second, by one angle; in float32, and back in the dtype of x."""
    x = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    angles = torch.arange(5)[:, None] * torch.tensor([1.0, 0.5, 0.25, 0.125])
    whole = torch.cat((angles, angles), dim=-1).unsqueeze(0)
    cos, sin = per_token(whole.cos(), whole.sin())
    assert cos.shape == sin.shape == (5, 1, 8)
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.complex(first, second) * torch.polar(torch.ones(5, 4), angles).unsqueeze(1)
    found = rotate(x, cos, sin)
    assert found.dtype is dtype
    assert torch.equal(found[0], x[0])
    torch.testing.assert_close(found, torch.cat((turned.real, turned.imag), dim=-1).to(dtype))


def test_rotate_computes_in_the_dtype_of_the_angles() -> None:
    x = torch.randn(2, 1, 4, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    cos, sin = (torch.full((2, 1, 4), value) for value in (0.6, 0.8))
    half = [part.to(torch.bfloat16) for part in (cos, sin)]
    first, second = x.chunk(2, dim=-1)
    assert torch.equal(rotate(x, *half), x * half[0] + torch.cat((-second, first), dim=-1) * half[1])
    assert not torch.equal(rotate(x, *half), rotate(x, cos, sin))
