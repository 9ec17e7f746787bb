"""Images to files of one kind."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from samples import encoded, pixels

from pipeline.stage import ShardContext
from pipeline.stages.encode import Encode
from pipeline.storage.images import decode
from pipeline.tensors import tensor_column
from pipeline.testing import check_stage

WIDE = pixels(1, 60)[0][:40]


def table_of(*images: Any) -> pa.Table:
    keys = [f"k{row}" for row in range(len(images))]
    return pa.table(
        {"key": keys, "image": pa.array(images, pa.binary()), "label": range(len(keys))}
    )


def files(stage: Encode, *images: Any) -> list[bytes]:
    context = ShardContext("00000", 0)
    result = check_stage(stage, table_of(*images), context)
    assert context.bad == []
    assert result.schema == table_of(*images).schema
    return list(result["image"].to_pylist())


@pytest.mark.parametrize("kind", ["png", "webp-lossless"])
def test_pixels_come_back_from_lossless_files(kind: Any) -> None:
    gray = WIDE[..., :1]
    colour, black = files(Encode(kind), encoded(WIDE, "BMP"), encoded(gray, "TIFF"))
    assert np.array_equal(decode(colour), WIDE)
    assert np.array_equal(decode(black, 1), gray)
    assert kind == "webp-lossless" or decode(black).shape[2] == 1


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "webp-lossless"])
def test_every_file_is_of_the_kind_whatever_came_in(kind: Any) -> None:
    given = [encoded(WIDE, other) for other in ("PNG", "JPEG", "WEBP", "GIF")]
    found = [Image.open(io.BytesIO(data)) for data in files(Encode(kind), *given)]
    assert {picture.format for picture in found} == {kind.split("-")[0].upper()}
    assert {picture.size for picture in found} == {(60, 40)}


def test_tensors_are_taken() -> None:
    images = pixels(3, 20, 1)
    table = pa.table({"image": tensor_column(images), "key": ["a", "b", "c"]})
    result = check_stage(Encode("png"), table, ShardContext("0", 0))
    assert result.column_names == ["image", "key"]
    assert result["image"].type == pa.binary()
    assert np.array_equal([decode(data) for data in result["image"].to_pylist()], images)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize(
    ("shape", "shorter", "expected"),
    [
        ((400, 600), 100, (100, 150)),
        ((600, 400), 100, (150, 100)),
        ((301, 200), 150, (226, 150)),
        ((90, 300), 90, (90, 300)),
        ((40, 60), 100, (40, 60)),
    ],
)
def test_large_images_are_scaled_down_and_small_ones_left(
    kind: str, shape: tuple[int, int], shorter: int, expected: tuple[int, int]
) -> None:
    ramp = np.linspace(0, 255, shape[1])[None, :, None].repeat(shape[0], 0).repeat(3, 2)
    (data,) = files(Encode("png", shorter=shorter), encoded(ramp.astype(np.uint8), kind))
    found = decode(data)
    assert found.shape == (*expected, 3)
    ideal = (np.arange(expected[1]) + 0.5) / expected[1] * 255
    assert np.abs(found.astype(float) - ideal[None, :, None]).max() < 5


def test_images_are_upright_and_have_lost_their_metadata() -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "taken at home"
    (data,) = files(Encode("png"), encoded(WIDE, "PNG", exif=exif))
    assert np.array_equal(decode(data), np.rot90(WIDE, -1))
    assert b"home" not in data


def test_quality_counts_where_pixels_are_lost() -> None:
    low, high = (files(Encode("jpeg", quality), encoded(WIDE))[0] for quality in (20, 95))
    assert len(low) < len(high)
    again = files(Encode("jpeg", 95), encoded(WIDE))[0]
    assert again == high


def test_bad_images_are_set_aside_and_the_others_go_on() -> None:
    tall = encoded(np.zeros((16_384, 2, 3), np.uint8))
    images = [encoded(WIDE), None, b"", encoded(WIDE)[:-900], tall, encoded(WIDE)]
    context = ShardContext("00000", 0)
    result = check_stage(Encode("webp"), table_of(*images), context)
    assert result["key"].to_pylist() == ["k0", "k5"]
    assert result["label"].to_pylist() == [0, 5]
    assert [(row["key"], row["reason"]) for row in context.bad] == [
        ("k1", "decode-error"),
        ("k2", "decode-error"),
        ("k3", "decode-error"),
        ("k4", "too-large"),
    ]
