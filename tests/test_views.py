"""Views: drawn once, rendered the same for teacher and student."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from references import view_of
from samples import pixels

from pipeline.dataset_distill.config import ImageConfig
from pipeline.dataset_distill.views import (
    Views,
    normalise,
    render,
    sample_box,
    sample_crop,
    sample_views,
)

CPU = torch.device("cpu")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
"""Places of pixels are float32."""


def image_config(size: int = 8, **values: object) -> ImageConfig:
    return ImageConfig.model_validate({"size": size, **values})


def images_of(rows: int, size: int) -> torch.Tensor:
    return torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(0))


def one_view(crop: tuple[int, ...], flip: int = 0, box: tuple[int, ...] = (0, 0, 0, 0)) -> Views:
    views = Views(
        np.array([[crop]] * 2), np.array([[flip]] * 2), np.array([[1], [0]]), np.array([[box]] * 2)
    )
    return views.to(CPU)


def first(views: Views, images: torch.Tensor) -> torch.Tensor:
    zero = torch.zeros(1, dtype=torch.int64)
    return render(images, views, zero, zero)[0]


@pytest.mark.parametrize("size", [4, 8, 16, 28, 32])
def test_the_whole_image_is_itself_and_its_mirror_image(size: int) -> None:
    images = images_of(2, size)
    whole = (0, 0, size, size)
    torch.testing.assert_close(first(one_view(whole), images), images[0], **CLOSE)
    torch.testing.assert_close(first(one_view(whole, flip=1), images), images[0].flip(2), **CLOSE)


@pytest.mark.parametrize("crop", [(1, 2, 3, 5), (0, 0, 4, 4), (3, 1, 5, 7), (2, 2, 1, 1)])
def test_away_from_its_border_a_crop_is_an_interpolated_slice(crop: tuple[int, ...]) -> None:
    images, (top, left, height, width) = images_of(2, 8), crop
    part = images[:1, :, top : top + height, left : left + width]
    expected = F.interpolate(part, (8, 8), mode="bilinear", align_corners=False)[0]
    centre = [(torch.arange(8) + 0.5) * side / 8 - 0.5 for side in (height, width)]
    inner = [(c >= 0) & (c <= side - 1) for c, side in zip(centre, (height, width), strict=True)]
    found = first(one_view(crop), images)
    mask = inner[0][:, None] & inner[1][None, :]
    torch.testing.assert_close(found[:, mask], expected[:, mask], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [7, 8])
def test_every_view_agrees_with_plain_arithmetic(size: int) -> None:
    rngs = [np.random.default_rng(seed) for seed in range(4)]
    views = sample_views(rngs, image_config(size), 3, 0.1, 1.0)
    images = images_of(4, size)
    pairs = torch.cartesian_prod(torch.arange(4), torch.arange(3))
    found = render(images, views.to(CPU), pairs[:, 0], pairs[:, 1]).numpy()
    plain = images.double().numpy()
    for index, (row, view) in enumerate(pairs.tolist()):
        assert np.abs(found[index] - view_of(plain, views, row, view)).max() < 1e-5
    assert views.flip.any()
    assert (views.box[..., 2] > views.box[..., 0]).any()


def test_the_box_comes_from_the_partner_and_the_rest_from_the_image() -> None:
    images = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)])
    expected = torch.zeros(3, 8, 8)
    expected[:, 2:5, 1:8] = 1
    found = first(one_view((1, 1, 6, 5), flip=1, box=(2, 1, 5, 8)), images)
    torch.testing.assert_close(found, expected)


def test_normalise_is_the_usual_formula() -> None:
    raw = pixels(3, 4)
    config = image_config(4, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    expected = (raw / 255 - config.mean) / config.std
    found = normalise(raw, config, CPU)
    assert found.shape == (3, 3, 4, 4)
    assert found.dtype == torch.float32
    assert np.allclose(found.permute(0, 2, 3, 1).numpy(), expected, atol=1e-6)


@given(seed=st.integers(0, 2**32), size=st.integers(4, 64), low=st.floats(0.05, 1))
@settings(max_examples=150)
def test_crops_lie_in_the_image_and_have_the_asked_area_and_shape(
    seed: int, size: int, low: float
) -> None:
    top, left, height, width = sample_crop(np.random.default_rng(seed), size, (low, 1.0))
    assert min(top, left) >= 0
    assert min(height, width) >= 1
    assert max(top + height, left + width) <= size
    assert (height + 0.5) * (width + 0.5) >= low * size**2 - 1e-9
    assert (width + 0.5) / (height - 0.5) >= 3 / 4
    assert (width - 0.5) / (height + 0.5) <= 4 / 3


def test_area_is_uniform_and_shape_and_place_are_fair() -> None:
    size, rng = 1000, np.random.default_rng(0)
    crops = np.array([sample_crop(rng, size, (0.2, 0.5)) for _ in range(3000)], float)
    top, left, height, width = crops.T
    area, shape = np.sort(height * width / size**2), np.sort(np.log(width / height))
    line = (np.arange(3000) + 0.5) / 3000
    assert np.abs(area - (0.2 + 0.3 * line)).max() < 0.3 * 0.04
    assert np.abs(shape - math.log(4 / 3) * (2 * line - 1)).max() < math.log(16 / 9) * 0.04
    for start, side in ((top, height), (left, width)):
        assert np.abs(np.sort(start / (size - side)) - line).max() < 0.04


def test_crops_reach_every_border() -> None:
    rng = np.random.default_rng(0)
    crops = [sample_crop(rng, 6, (0.2, 0.6)) for _ in range(4000)]
    for start, side in ((0, 2), (1, 3)):
        found = {(crop[start], crop[side]) for crop in crops}
        sides = {crop[side] for crop in crops}
        assert found == {(place, s) for s in sides for place in range(6 - s + 1)}


@pytest.mark.parametrize("size", [8, 32, 224])
def test_a_crop_of_everything_is_the_whole_image(size: int) -> None:
    rng = np.random.default_rng(0)
    assert {sample_crop(rng, size, (1.0, 1.0)) for _ in range(50)} == {(0, 0, size, size)}


@given(seed=st.integers(0, 2**32), size=st.integers(4, 64), alpha=st.floats(0.1, 4))
@settings(max_examples=100)
def test_boxes_lie_in_the_image(seed: int, size: int, alpha: float) -> None:
    top, left, bottom, right = sample_box(np.random.default_rng(seed), size, alpha)
    assert 0 <= top <= bottom <= size
    assert 0 <= left <= right <= size
    assert sample_box(np.random.default_rng(seed), size, 0) == (0, 0, 0, 0)


def test_boxes_have_the_sides_of_cutmix() -> None:
    size, rng = 1000, np.random.default_rng(0)
    boxes = np.array([sample_box(rng, size, 1.0) for _ in range(4000)], float)
    found = (boxes[:, 2] - boxes[:, 0]) / size
    other = np.random.default_rng(1)
    half = np.sqrt(1 - other.uniform(size=200_000)) / 2
    centre = other.uniform(size=200_000)
    expected = np.minimum(1, centre + half) - np.maximum(0, centre - half)
    for share in (0.1, 0.25, 0.5, 0.75, 0.9):
        assert np.quantile(found, share) == pytest.approx(np.quantile(expected, share), abs=0.03)


def drawn(seeds: list[int], views: int = 4, **values: object) -> Views:
    rngs = [np.random.default_rng(seed) for seed in seeds]
    return sample_views(rngs, image_config(8, **values), views, 0.25, 1.0)


def test_a_row_depends_on_its_own_generator_alone() -> None:
    ours, theirs = drawn([1, 2, 3]), drawn([7, 2, 9])
    again, longer = drawn([1, 2, 3]), drawn([1, 2, 3], views=6)
    for name in Views.NAMES:
        assert np.array_equal(getattr(ours, name)[1], getattr(theirs, name)[1])
        assert np.array_equal(getattr(ours, name), getattr(again, name))
        assert np.array_equal(getattr(ours, name), getattr(longer, name)[:, :4])
    assert not np.array_equal(ours.crop[0], theirs.crop[0])


def test_partners_are_other_images_and_flips_can_be_forbidden() -> None:
    views = drawn(list(range(5)), views=60, flip=False)
    assert not (views.partner == np.arange(5)[:, None]).any()
    assert set(views.partner.ravel().tolist()) == set(range(5))
    assert not views.flip.any()
    assert 0.3 < drawn(list(range(5)), views=60).flip.mean() < 0.7
    alone = drawn([1])
    assert not alone.partner.any()
