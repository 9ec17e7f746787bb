"""Views: drawn once, rendered the same for teacher and student."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from references import view_of
from samples import pixels

from pipeline.dataset_distill.views import ATTEMPTS, Views, ViewSampler, boxes, crops, render
from pipeline.labelled_images import ImageConfig, Pictures, normalise

CPU = torch.device("cpu")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
"""Places of pixels are float32."""


def image_config(size: int = 8, **values: object) -> ImageConfig:
    return ImageConfig.model_validate({"size": size, **values})


def images_of(rows: int, size: int) -> Pictures:
    raw = np.random.default_rng(0).integers(0, 256, (rows, size, size, 3), np.uint8)
    return Pictures.of(raw, image_config(size), CPU)


def whole_of(pictures: Pictures) -> torch.Tensor:
    return pictures.take(slice(None))


def sampler(size: int = 8, floor: float = 0.25, group: int = 100, **values: object) -> ViewSampler:
    return ViewSampler(image_config(size, **values), floor, 1.0, group)


def seeds_of(count: int) -> np.ndarray:
    return np.random.default_rng(5).integers(0, 2**63, count)


def one_view(crop: tuple[int, ...], flip: int = 0, box: tuple[int, ...] = (0, 0, 0, 0)) -> Views:
    views = Views(
        np.array([[crop]] * 2), np.array([[flip]] * 2), np.array([[1], [0]]), np.array([[box]] * 2)
    )
    return views.to(CPU)


def first(views: Views, images: Pictures) -> torch.Tensor:
    zero = torch.zeros(1, dtype=torch.int64)
    return render(images, views, zero, zero)[0]


@pytest.mark.parametrize("size", [4, 8, 16, 28, 32])
def test_the_whole_image_is_itself_and_its_mirror_image(size: int) -> None:
    images = images_of(2, size)
    whole = (0, 0, size, size)
    own = whole_of(images)[0]
    torch.testing.assert_close(first(one_view(whole), images), own, **CLOSE)
    torch.testing.assert_close(first(one_view(whole, flip=1), images), own.flip(2), **CLOSE)


@pytest.mark.parametrize("crop", [(1, 2, 3, 5), (0, 0, 4, 4), (3, 1, 5, 7), (2, 2, 1, 1)])
def test_away_from_its_border_a_crop_is_an_interpolated_slice(crop: tuple[int, ...]) -> None:
    images, (top, left, height, width) = images_of(2, 8), crop
    part = whole_of(images)[:1, :, top : top + height, left : left + width]
    expected = F.interpolate(part, (8, 8), mode="bilinear", align_corners=False)[0]
    centre = [(torch.arange(8) + 0.5) * side / 8 - 0.5 for side in (height, width)]
    inner = [(c >= 0) & (c <= side - 1) for c, side in zip(centre, (height, width), strict=True)]
    found = first(one_view(crop), images)
    mask = inner[0][:, None] & inner[1][None, :]
    torch.testing.assert_close(found[:, mask], expected[:, mask], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [7, 8])
def test_every_view_agrees_with_plain_arithmetic(size: int) -> None:
    views = sampler(size, 0.1).draw(seeds_of(4), range(3))
    images = images_of(4, size)
    pairs = torch.cartesian_prod(torch.arange(4), torch.arange(3))
    found = render(images, views.to(CPU), pairs[:, 0], pairs[:, 1]).numpy()
    plain = whole_of(images).double().numpy()
    for index, (row, view) in enumerate(pairs.tolist()):
        assert np.abs(found[index] - view_of(plain, views, row, view)).max() < 1e-5
    assert views.flip.any()
    assert (views.box[..., 2] > views.box[..., 0]).any()


def test_the_box_comes_from_the_partner_and_the_rest_from_the_image() -> None:
    raw = np.stack([np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 255, np.uint8)])
    images = Pictures.of(raw, image_config(mean=(0.0,) * 3, std=(1.0,) * 3), CPU)
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


def drawn_crops(rng: np.random.Generator, count: int, size: int, scale: tuple[float, float]) -> Any:
    return crops(rng.random((count, ATTEMPTS, 4)), size, scale)


@given(seed=st.integers(0, 2**32), size=st.integers(4, 64), low=st.floats(0.05, 1))
@settings(max_examples=150)
def test_crops_lie_in_the_image_and_have_the_asked_area_and_shape(
    seed: int, size: int, low: float
) -> None:
    found = drawn_crops(np.random.default_rng(seed), 1, size, (low, 1.0))
    top, left, height, width = found[0].tolist()
    assert min(top, left) >= 0
    assert min(height, width) >= 1
    assert max(top + height, left + width) <= size
    assert (height + 0.5) * (width + 0.5) >= low * size**2 - 1e-9
    assert (width + 0.5) / (height - 0.5) >= 3 / 4
    assert (width - 0.5) / (height + 0.5) <= 4 / 3


def test_area_is_uniform_and_shape_and_place_are_fair() -> None:
    size = 1000
    found = drawn_crops(np.random.default_rng(0), 3000, size, (0.2, 0.5)).astype(float)
    top, left, height, width = found.T
    area, shape = np.sort(height * width / size**2), np.sort(np.log(width / height))
    line = (np.arange(3000) + 0.5) / 3000
    assert np.abs(area - (0.2 + 0.3 * line)).max() < 0.3 * 0.04
    assert np.abs(shape - math.log(4 / 3) * (2 * line - 1)).max() < math.log(16 / 9) * 0.04
    for start, side in ((top, height), (left, width)):
        assert np.abs(np.sort(start / (size - side)) - line).max() < 0.04


def test_crops_reach_every_border() -> None:
    found = drawn_crops(np.random.default_rng(0), 4000, 6, (0.2, 0.6)).tolist()
    for start, side in ((0, 2), (1, 3)):
        places = {(crop[start], crop[side]) for crop in found}
        sides = {crop[side] for crop in found}
        assert places == {(place, s) for s in sides for place in range(6 - s + 1)}


@pytest.mark.parametrize("size", [8, 32, 224])
def test_a_crop_of_everything_is_the_whole_image(size: int) -> None:
    found = drawn_crops(np.random.default_rng(0), 50, size, (1.0, 1.0))
    assert {tuple(crop) for crop in found.tolist()} == {(0, 0, size, size)}


def test_the_first_draw_that_fits_is_taken() -> None:
    draws = np.random.default_rng(3).random((500, ATTEMPTS, 4))
    found = crops(draws, 32, (0.7, 1.0))
    for row, expected in zip(draws, found.tolist(), strict=True):
        crop = [0, 0, 32, 32]
        for area, shape, down, across in row:
            ratio = math.exp(math.log(3 / 4) + shape * math.log(16 / 9))
            width = round(math.sqrt((0.7 + 0.3 * area) * 1024 * ratio))
            height = round(math.sqrt((0.7 + 0.3 * area) * 1024 / ratio))
            if width <= 32 and height <= 32:
                crop = [int(down * (33 - height)), int(across * (33 - width)), height, width]
                break
        assert expected == crop


@given(seed=st.integers(0, 2**32), size=st.integers(4, 64), alpha=st.floats(0.1, 4))
@settings(max_examples=100)
def test_boxes_lie_in_the_image(seed: int, size: int, alpha: float) -> None:
    draws = np.random.default_rng(seed).random((1, 3))
    top, left, bottom, right = boxes(draws, size, alpha)[0].tolist()
    assert 0 <= top <= bottom <= size
    assert 0 <= left <= right <= size
    assert boxes(draws, size, 0).tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_boxes_have_the_sides_of_cutmix(alpha: float) -> None:
    size, rng, other = 1000, np.random.default_rng(0), np.random.default_rng(1)
    found = boxes(rng.random((4000, 3)), size, alpha).astype(float)
    sides = (found[:, 2] - found[:, 0]) / size
    half = np.sqrt(1 - other.beta(alpha, alpha, 200_000)) / 2
    centre = other.uniform(size=200_000)
    expected = np.minimum(1, centre + half) - np.maximum(0, centre - half)
    for share in (0.1, 0.25, 0.5, 0.75, 0.9):
        assert np.quantile(sides, share) == pytest.approx(np.quantile(expected, share), abs=0.03)


def test_a_view_depends_on_its_seed_and_its_number_alone() -> None:
    ours, theirs = sampler().draw([1, 2, 3], range(4)), sampler().draw([7, 2, 9], range(4))
    some = sampler().draw([1, 2, 3], [2])
    for name, values in vars(ours).items():
        assert np.array_equal(values[1], getattr(theirs, name)[1])
        assert np.array_equal(values[:, 2:3], getattr(some, name))
    assert not np.array_equal(ours.crop[0], theirs.crop[0])
    many = sampler(64).draw(seeds_of(200), range(5)).crop.reshape(-1, 4)
    assert len(np.unique(many, axis=0)) > 950


def test_partners_are_other_images_of_the_group_and_flips_can_be_forbidden() -> None:
    views = sampler(group=5, flip=False).draw(seeds_of(12), range(60))
    for row in range(12):
        group = set(range(row // 5 * 5, min(row // 5 * 5 + 5, 12)))
        assert set(views.partner[row].tolist()) == group - {row}
    assert not views.flip.any()
    assert 0.4 < sampler().draw(seeds_of(50), range(60)).flip.mean() < 0.6
    assert not sampler().draw([1], range(4)).partner.any()


def test_views_of_a_seed_do_not_change_between_releases() -> None:
    """Labels that were stored belong to the views that were seen."""
    views = sampler(32).draw([123456789, 2**62], [0, 7])
    assert views.crop.tolist() == GOLDEN["crop"]
    assert views.flip.tolist() == GOLDEN["flip"]
    assert views.partner.tolist() == GOLDEN["partner"]
    assert views.box.tolist() == GOLDEN["box"]


GOLDEN: dict[str, Any] = {
    "crop": [[[2, 7, 19, 19], [1, 1, 31, 28]], [[17, 6, 15, 17], [0, 0, 30, 32]]],
    "flip": [[1, 1], [0, 1]],
    "partner": [[1, 1], [0, 0]],
    "box": [[[0, 0, 18, 14], [8, 7, 22, 21]], [[16, 0, 32, 16], [12, 17, 30, 32]]],
}
