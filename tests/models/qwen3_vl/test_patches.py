"""Images: their size against qwen_vl_utils, their patches and positions against stock transformers."""

from __future__ import annotations

import io
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from qwen_vl_utils.vision_process import fetch_image, smart_resize

from models.base import ImageGrid, InvalidInput
from models.qwen3_vl.patches import (
    ImageLimits,
    VisionSpec,
    extract_patches,
    fit_within,
    largest_image,
    mrope_positions,
    plan_image,
)
from models.qwen3_vl.vision_tower import PixelNormalizer
from tests.conformance.report import CHECKPOINT
from tests.support.oracle import PIXEL_BOUNDS, Oracle

NO_LIMITS = ImageLimits()
SPEC = VisionSpec(16, 2, 2, 1 / 255, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle(CHECKPOINT)


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width * 10_000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def official_size(width: int, height: int) -> tuple[int, int]:
    height, width = smart_resize(height, width, 32, **PIXEL_BOUNDS)
    return width, height


# --------------------------------------------------------------------------------------------------------------------
# Sizes
# --------------------------------------------------------------------------------------------------------------------


@settings(derandomize=True, max_examples=300, deadline=None)
@given(width=st.integers(1, 6000), height=st.integers(1, 6000))
def test_image_size_without_limits_is_the_official_one(width: int, height: int) -> None:
    if max(width, height) > 200 * min(width, height):
        with pytest.raises(InvalidInput, match="200 times"):
            plan_image((width, height), NO_LIMITS, SPEC)
        return
    grid = plan_image((width, height), NO_LIMITS, SPEC)
    assert grid.original_size == (width, height)
    assert grid.size == official_size(width, height)
    assert grid.grid == (grid.size[1] // 16, grid.size[0] // 16)
    assert grid.num_tokens == grid.size[0] * grid.size[1] // 1024


@settings(derandomize=True, max_examples=300, deadline=None)
@given(
    size=st.tuples(st.integers(1, 6000), st.integers(1, 6000)),
    limits=st.tuples(*[st.sampled_from([0, 1, 32, 100, 512, 777])] * 2),
)
def test_image_size_with_limits_is_fitted_and_then_the_official_one(size: tuple[int, int], limits: tuple[int, int]) -> None:
    width, height = size
    if max(size) > 200 * min(size):
        return
    scale = min([1.0, *(limit / side for limit, side in zip(limits, size, strict=True) if limit)])
    fitted = max(1, round(width * scale)), max(1, round(height * scale))
    if max(fitted) > 200 * min(fitted):
        # Rounding alone would refuse what is permitted.
        assert plan_image(size, ImageLimits(*limits), SPEC).num_tokens > 0
    else:
        assert plan_image(size, ImageLimits(*limits), SPEC).size == official_size(*fitted)


@pytest.mark.parametrize(
    ("size", "limits", "fitted", "read"),
    [
        pytest.param((512, 512), (512, 512), (512, 512), (512, 512), id="at the limits"),
        pytest.param((300, 200), (512, 512), (300, 200), (288, 192), id="within"),
        pytest.param((513, 512), (512, 512), (512, 511), (512, 512), id="a pixel over"),
        pytest.param((1024, 768), (512, 512), (512, 384), (512, 384), id="wide"),
        pytest.param((768, 1024), (512, 512), (384, 512), (384, 512), id="tall"),
        pytest.param((4000, 3000), (0, 0), (4000, 3000), (1536, 1152), id="no limits: the official bound"),
        pytest.param((1024, 768), (0, 256), (341, 256), (352, 256), id="height only"),
        pytest.param((1024, 768), (256, 0), (256, 192), (256, 192), id="width only"),
        pytest.param((1024, 768), (512, 96), (128, 96), (128, 96), id="the tighter one rules"),
        pytest.param((768, 1024), (512, 96), (72, 96), (64, 96), id="each rules its own side"),
        pytest.param((4000, 20), (512, 512), (512, 3), (512, 32), id="a strip, at the aspect limit"),
        pytest.param((4000, 20), (250, 250), (250, 2), (256, 32), id="a strip that rounding would make too thin"),
        pytest.param((20, 4000), (250, 250), (2, 250), (32, 256), id="an upright one"),
        pytest.param((10, 10), (512, 512), (10, 10), (64, 64), id="never scaled up to the limits"),
        pytest.param((100, 100), (1, 1), (1, 1), (64, 64), id="limits of a pixel"),
    ],
)
def test_image_limits(size: tuple[int, int], limits: tuple[int, int], fitted: tuple[int, int], read: tuple[int, int]) -> None:
    assert fit_within(size, ImageLimits(*limits)) == fitted
    assert plan_image(size, ImageLimits(*limits), SPEC).size == read


@pytest.mark.parametrize("limits", [(0, 0), (512, 512), (32, 0)])
@pytest.mark.parametrize("size", [(201, 1), (1, 201), (40_001, 200), (3000, 14)])
def test_aspect_ratio_over_200_is_refused(size: tuple[int, int], limits: tuple[int, int]) -> None:
    """Whatever the limits: what is refused does not hang on how small it would have been made."""
    with pytest.raises(InvalidInput, match="more than 200 times"):
        plan_image(size, ImageLimits(*limits), SPEC)


@pytest.mark.parametrize("size", [(200, 1), (1, 200), (40_000, 200)])
@pytest.mark.parametrize("limits", [(0, 0), (512, 512), (100, 100), (1, 1)])
def test_aspect_ratio_of_200_is_read(size: tuple[int, int], limits: tuple[int, int]) -> None:
    assert plan_image(size, ImageLimits(*limits), SPEC).num_tokens >= 4


@settings(derandomize=True, max_examples=500, deadline=None)
@given(
    size=st.tuples(st.integers(1, 5000), st.integers(1, 5000)) | st.tuples(st.integers(1, 200), st.integers(1, 200)),
    limits=st.tuples(st.integers(0, 700), st.integers(0, 700)),
)
def test_largest_image_is_never_exceeded(size: tuple[int, int], limits: tuple[int, int]) -> None:
    if max(size) > 200 * min(size):
        return
    width, height = plan_image(size, ImageLimits(*limits), SPEC).size
    assert width * height * 3 <= largest_image(ImageLimits(*limits), SPEC)


@pytest.mark.parametrize(("limits", "size"), [((0, 0), (4000, 3000)), ((512, 512), (1024, 1024)), ((512, 256), (2048, 1024))])
def test_largest_image_can_be_reached(limits: tuple[int, int], size: tuple[int, int]) -> None:
    image = extract_patches(noise(*size), plan_image(size, ImageLimits(*limits), SPEC), SPEC)
    assert 0.9 * largest_image(ImageLimits(*limits), SPEC) <= image.patches.nbytes <= largest_image(ImageLimits(*limits), SPEC)


def test_image_size_for_another_patch_size() -> None:
    spec = VisionSpec(14, 2, 2, 1 / 255, (0.5,) * 3, (0.5,) * 3)
    grid = plan_image((200, 100), NO_LIMITS, spec)
    assert grid == ImageGrid((200, 100), (196, 112), (8, 14), 28)


# --------------------------------------------------------------------------------------------------------------------
# Patches
# --------------------------------------------------------------------------------------------------------------------


def normalized(patches: np.ndarray[Any, Any], spec: VisionSpec) -> np.ndarray[Any, Any]:
    """What the vision tower gets, in numpy's float64: (value / 255 - mean) / deviation, each channel in every frame."""
    channels = patches.reshape(len(patches), 3, 1, -1) * spec.rescale_factor
    mean, std = (np.array(values).reshape(3, 1, 1) for values in (spec.mean, spec.std))
    frames = np.broadcast_to((channels - mean) / std, (len(patches), 3, spec.temporal_patch_size, channels.shape[-1]))
    return frames.reshape(len(patches), -1)


@pytest.mark.parametrize("size", [(64, 64), (32, 96), (96, 32), (130, 70), (17, 400), (500, 333), (1, 1), (512, 512)])
def test_patches_are_the_stock_processors(oracle: Oracle, size: tuple[int, int]) -> None:
    image = noise(*size)
    spec = VisionSpec.from_processor(oracle.processor.image_processor)
    prepared = extract_patches(image, plan_image(size, NO_LIMITS, spec), spec)
    resized = fetch_image({"image": image, **PIXEL_BOUNDS}, image_patch_size=16)
    stock = oracle.processor.image_processor(images=[resized], do_resize=False, return_tensors="pt")
    assert prepared.patches.dtype == np.uint8
    assert prepared.patches.flags.c_contiguous
    assert [1, *prepared.grid.grid] == stock["image_grid_thw"][0].tolist()
    assert prepared.patches.shape == (prepared.grid.grid[0] * prepared.grid.grid[1], 3 * 16 * 16)
    np.testing.assert_allclose(normalized(prepared.patches, spec), stock["pixel_values"].numpy(), rtol=0, atol=1e-6)


def test_patches_of_an_image_over_the_limits_are_resized_once(oracle: Oracle) -> None:
    """Straight to the grid: a thumbnail in between would blur it."""
    image = noise(900, 700)
    grid = plan_image(image.size, ImageLimits(512, 512), SPEC)
    pixels = np.asarray(image.resize(grid.size, Image.Resampling.BICUBIC))
    resized = Image.fromarray(pixels)
    stock = oracle.processor.image_processor(images=[resized], do_resize=False, return_tensors="pt")["pixel_values"].numpy()
    np.testing.assert_allclose(normalized(extract_patches(image, grid, SPEC).patches, SPEC), stock, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(521, 519), (519, 1031), (2049, 1537), (271, 1000)])
def test_patches_of_a_reduced_jpeg_are_those_of_the_original(size: tuple[int, int]) -> None:
    """Where sides are no multiples of the reduction the image was stretched, by up to nine levels in the pixels."""
    waves = [np.cos(np.arange(side) * 12 / side)[:: 1 if axis else -1] for axis, side in enumerate(reversed(size))]
    image = Image.fromarray((np.add.outer(*waves) * 60 + 128).astype(np.uint8)).convert("RGB")
    file = io.BytesIO()
    image.save(file, "JPEG", quality=98)
    grid = plan_image(size, ImageLimits(64, 64), SPEC)
    whole, reduced = Image.open(file), Image.open(file)
    reduced.draft(None, (2 * grid.size[0], 2 * grid.size[1]))
    assert reduced.size < whole.size
    as_whole, as_reduced = (extract_patches(image, grid, SPEC).patches.astype(int) for image in (whole, reduced))
    assert np.abs(as_whole - as_reduced).max() <= 2


def test_patches_leave_the_image_as_it_was() -> None:
    image = noise(64, 64)
    before = image.tobytes()
    extract_patches(image, plan_image(image.size, NO_LIMITS, SPEC), SPEC).patches[:] = 0
    assert image.tobytes() == before


@pytest.mark.parametrize(
    "spec", [SPEC, VisionSpec(16, 2, 2, 1 / 255, (0.48, 0.45, 0.40), (0.26, 0.27, 0.28))], ids=["half", "each"]
)
def test_pixels_are_normalised_as_by_the_stock_processor(oracle: Oracle, spec: VisionSpec) -> None:
    """Normalised by the checkpoint's own mean and deviation."""
    images = [noise(64, 96), noise(128, 64)]
    prepared = [extract_patches(image, plan_image(image.size, NO_LIMITS, spec), spec) for image in images]
    patches = torch.from_numpy(np.concatenate([image.patches for image in prepared]))
    processor = oracle.processor.image_processor
    resized = [fetch_image({"image": image, **PIXEL_BOUNDS}, image_patch_size=16) for image in images]
    stock = processor(
        images=resized, do_resize=False, image_mean=list(spec.mean), image_std=list(spec.std), return_tensors="pt"
    )  # fmt: skip
    ours = PixelNormalizer(spec, torch.device("cpu"))(patches)
    torch.testing.assert_close(ours, stock["pixel_values"], rtol=0, atol=1e-6)


# --------------------------------------------------------------------------------------------------------------------
# Positions
# --------------------------------------------------------------------------------------------------------------------

Run = int | tuple[int, int]  # so many tokens of text, or an image of so many merged rows and columns


def check_positions(oracle: Oracle, runs: list[Run]) -> None:
    image_token = oracle.model.config.image_token_id
    grids = [ImageGrid((0, 0), (0, 0), (2 * run[0], 2 * run[1]), run[0] * run[1]) for run in runs if isinstance(run, tuple)]
    ids = [token for run in runs for token in ([5] * run if isinstance(run, int) else [image_token] * (run[0] * run[1]))]
    token_ids = torch.tensor([ids])
    thw = torch.tensor([(1, *grid.grid) for grid in grids]) if grids else None
    stock, _ = oracle.model.get_rope_index(token_ids, (token_ids == image_token).int(), image_grid_thw=thw)
    ours = mrope_positions(np.array(ids), image_token, 2, grids)
    assert ours.dtype == np.int64
    np.testing.assert_array_equal(ours, stock[:, 0].numpy())


@pytest.mark.parametrize(
    "runs",
    [
        pytest.param([7], id="text"),
        pytest.param([3, (2, 4), 5], id="image"),
        pytest.param([3, (4, 2), 5], id="upright image"),
        pytest.param([(3, 3), 5], id="image first"),
        pytest.param([5, (3, 3)], id="image last"),
        pytest.param([(1, 1)], id="one token"),
        pytest.param([3, (2, 2), 2, (5, 1), 4], id="two images"),
        pytest.param([3, (2, 6), 2, (6, 2), 2, (3, 3), 9], id="side by side, as the template has them"),
        pytest.param([1, (2, 6), 1, (6, 2), 1], id="a token between"),
        pytest.param([1, (1, 8), 1, (8, 1), 1, (1, 8), 1], id="strips"),
    ],
)
def test_positions_are_the_stock_models(oracle: Oracle, runs: list[Run]) -> None:
    check_positions(oracle, runs)


def test_positions_of_many_orders(oracle: Oracle) -> None:
    rng = random.Random(0)
    for _ in range(200):
        runs: list[Run] = [rng.randrange(1, 9)]
        for _ in range(rng.randrange(4)):
            runs += [(rng.randrange(1, 9), rng.randrange(1, 9)), rng.randrange(1, 9)]
        check_positions(oracle, runs)


def test_positions_of_images_side_by_side() -> None:
    """A template without tokens around an image: each begins where the one before it has ended."""
    grids = [ImageGrid((0, 0), (0, 0), (2, 4), 2), ImageGrid((0, 0), (0, 0), (4, 2), 2)]
    positions = mrope_positions(np.array([5, 9, 9, 9, 9, 5]), 9, 2, grids)
    assert positions.tolist() == [[0, 1, 1, 3, 3, 5], [0, 1, 1, 3, 4, 5], [0, 1, 2, 3, 3, 5]]


@pytest.mark.parametrize("colour", [(0, 0, 0), (10, 20, 30), (266, 20, 30 << 8 | 30), (300, 20, 30)])
def test_transparent_colour_is_what_pillow_makes_of_it(colour: tuple[int, int, int]) -> None:
    """A PNG of 16 bits names one of 16 bits."""
    pixels = np.zeros((64, 96, 3), np.uint8)
    pixels[4:20, 5:50] = (10, 20, 30)
    image = Image.fromarray(pixels)
    image.info["transparency"] = colour
    white = Image.new("RGBA", image.size, "white")
    expected = np.asarray(Image.alpha_composite(white, image.convert("RGBA")).convert("RGB"))
    for whitens in (True, False):
        spec = replace(SPEC, whitens=whitens)
        found = extract_patches(image, plan_image(image.size, NO_LIMITS, spec), spec).patches
        plain = Image.fromarray(expected if whitens else pixels)
        assert np.array_equal(found, extract_patches(plain, plan_image(image.size, NO_LIMITS, SPEC), SPEC).patches)
