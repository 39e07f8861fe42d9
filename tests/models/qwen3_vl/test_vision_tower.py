"""The vision tower against transformers' own, on its own weights: images of every shape, in one call."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from models.base import ImageGrid, PreparedImage
from models.checkpoints.demo import OTHER, TINY, write_demo_checkpoint
from models.packed.attention import AttentionKernel, SdpaKernel
from models.packed.staging import Staging
from models.packed.varlen import VarlenKernel
from models.qwen3_vl.patches import VisionSpec
from models.qwen3_vl.vision_tower import PixelNormalizer, VisionTower, make_table
from tests.support import varlen_cpu  # noqa: F401 - the kernel for this test's device
from tests.support.oracle import Oracle

# Rows and columns in patches: square, as small as can be, strips of both directions, larger than the learned square, and equals.
GRIDS = [(4, 4), (2, 2), (2, 40), (40, 2), (30, 18), (4, 4), (4, 4), (6, 10), (12, 12)]


@pytest.fixture(scope="module", params=[TINY, OTHER], ids=["tiny", "other"])
def oracle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    path: Path = tmp_path_factory.mktemp("tower") / "checkpoint"
    write_demo_checkpoint(path, seed=5, shape=request.param)
    return Oracle(path)


@pytest.mark.parametrize("kernel", [SdpaKernel(), VarlenKernel()], ids=["sdpa", "varlen"])
@torch.inference_mode()
def test_vision_tower_gives_the_stock_towers_features(oracle: Oracle, kernel: AttentionKernel) -> None:
    spec = VisionSpec.from_processor(oracle.processor.image_processor)
    rng = np.random.default_rng(0)
    images = [
        PreparedImage(ImageGrid((1, 1), (1, 1), grid, 1), rng.integers(0, 256, (grid[0] * grid[1], 3 * 16 * 16), dtype=np.uint8))
        for grid in GRIDS
    ]
    visual = oracle.model.visual
    pixels = PixelNormalizer(spec, visual.device)(torch.from_numpy(np.concatenate([image.patches for image in images])))
    stock = visual(pixels, grid_thw=torch.tensor([(1, *grid) for grid in GRIDS]), return_dict=True)

    features, deepstack = VisionTower(visual, spec, kernel, Staging(torch.device("cpu")))(images)
    torch.testing.assert_close(features, stock.pooler_output, rtol=1e-4, atol=1e-5)
    assert len(deepstack) == len(stock.deepstack_features) > 0
    for ours, theirs in zip(deepstack, stock.deepstack_features, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", [8, 48])
@pytest.mark.parametrize("grid", [*GRIDS, (120, 60)])
def test_position_embeddings_are_interpolated_as_by_torch(grid: tuple[int, int], side: int) -> None:
    """Of a random square: each patch's position embedding by the table, against torch's own bilinear interpolation."""
    square = torch.randn(side * side, 3, generator=torch.Generator().manual_seed(0))
    table = make_table(grid, 2, side)
    ours = (square.numpy()[table.taps] * table.weights[:, :, None]).sum(1)
    whole = torch.nn.functional.interpolate(square.T.view(1, 3, side, side), size=grid, mode="bilinear", align_corners=True)
    row, column = table.places.astype(int).T
    np.testing.assert_allclose(ours, whole[0].numpy()[:, row, column].T, atol=1e-4)
    assert len(set(zip(row, column, strict=True))) == grid[0] * grid[1]
