"""Bytes to pixels: every kind of picture, and none that stops a run."""

from __future__ import annotations

import io
import random
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from PIL import Image, ImageFile
from samples import encoded, pixels

from pipeline.stage import ShardContext
from pipeline.stages.decode import Decode
from pipeline.storage.open_source import open_source
from pipeline.tensors import tensor_column, to_numpy
from pipeline.testing import check_stage

SIZE = 16
IMAGE = pixels(1, SIZE)[0]


def table_of(images: list[bytes | None]) -> pa.Table:
    return pa.table(
        {
            "key": [f"k{row}" for row in range(len(images))],
            "image": pa.array(images, pa.binary()),
            "label": pa.array(range(len(images)), pa.int64()),
        }
    )


def decode(
    images: list[bytes | None], size: int = SIZE, channels: Any = 3
) -> tuple[npt.NDArray[Any], ShardContext]:
    context = ShardContext("00000", 0)
    table = Decode(size, channels)(table_of(images), context)
    return to_numpy(table["image"]), context


def decode_one(image: bytes, channels: int = 3) -> npt.NDArray[Any]:
    found, context = decode([image], channels=channels)
    assert context.bad == []
    return found[0]


def pillow(image: bytes, mode: str = "RGB") -> npt.NDArray[Any]:
    return np.asarray(Image.open(io.BytesIO(image)).convert(mode))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_lossless_pictures_come_back_exactly(kind: str) -> None:
    data = encoded(IMAGE, kind, **({"lossless": True} if kind == "WEBP" else {}))
    assert np.array_equal(decode_one(data), IMAGE)


def test_jpeg_is_decoded_in_full_at_its_own_size() -> None:
    data = encoded(IMAGE, "JPEG", quality=90)
    # Both are libjpeg-turbo, in versions that may round differently.
    assert np.abs(decode_one(data).astype(int) - pillow(data)).max() <= 1
    fine = decode_one(encoded(IMAGE, "JPEG", quality=100, subsampling=0))
    assert np.abs(fine.astype(int) - IMAGE).max() <= 4


def test_gray_pictures_and_gray_output() -> None:
    gray = IMAGE[..., 0]
    assert np.array_equal(decode_one(encoded(gray), 1), gray[..., None])
    assert np.array_equal(decode_one(encoded(gray), 3), np.repeat(gray[..., None], 3, 2))
    luma = IMAGE.astype(float) @ (0.299, 0.587, 0.114)
    assert np.abs(decode_one(encoded(IMAGE), 1)[..., 0] - luma).max() <= 1


def saved(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_palettes_are_looked_up(kind: str) -> None:
    index = np.arange(SIZE * SIZE, dtype=np.uint8).reshape(SIZE, SIZE)
    picture = Image.fromarray(index, "L").convert("P")
    colours = np.random.default_rng(0).integers(0, 256, (256, 3), np.uint8)
    picture.putpalette(colours.tobytes())
    assert np.array_equal(decode_one(saved(picture, kind)), colours[index])


def test_cmyk_jpegs_become_rgb() -> None:
    flat = np.full((SIZE, SIZE, 4), (0, 200, 200, 0), np.uint8)
    data = saved(Image.fromarray(flat, "CMYK"), "JPEG", quality=95)
    assert Image.open(io.BytesIO(data)).mode == "CMYK"
    found = decode_one(data)
    assert np.abs(found.astype(int) - (255, 55, 55)).max() < 12


def test_transparency_is_left_off() -> None:
    alpha = np.concatenate([IMAGE, np.full((SIZE, SIZE, 1), 7, np.uint8)], axis=2)
    assert np.array_equal(decode_one(encoded(alpha)), IMAGE)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PGM"])
@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_are_scaled_and_not_cut_off(kind: str, channels: int) -> None:
    deep = np.linspace(0, 65535, SIZE * SIZE).astype(np.uint16).reshape(SIZE, SIZE)
    header = f"P5 {SIZE} {SIZE} 65535\n".encode()
    data = (
        header + deep.astype(">u2").tobytes()
        if kind == "PGM"
        else saved(Image.fromarray(deep), kind)
    )
    expected = np.repeat((deep >> 8)[..., None], channels, 2)
    assert np.array_equal(decode_one(data, channels), expected)


TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a[::-1].swapaxes(0, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a.swapaxes(0, 1)[::-1],
}


@pytest.mark.parametrize("orientation", sorted(TURNS))
def test_pictures_are_turned_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.fromarray(IMAGE), "PNG", exif=exif)
    assert np.array_equal(decode_one(data), TURNS[orientation](IMAGE))


def test_the_middle_of_a_wide_or_tall_picture_is_kept() -> None:
    wide = np.random.default_rng(0).integers(0, 256, (SIZE, 3 * SIZE, 3), np.uint8)
    assert np.array_equal(decode_one(encoded(wide)), wide[:, SIZE : 2 * SIZE])
    tall = wide.swapaxes(0, 1)
    assert np.array_equal(decode_one(encoded(tall)), tall[SIZE : 2 * SIZE])


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("side", [8, 100, 401])
def test_resizing_keeps_colours_and_the_shape_of_a_gradient(kind: str, side: int) -> None:
    flat = np.full((side, side + 5, 3), (10, 100, 200), np.uint8)
    assert np.abs(decode_one(encoded(flat, kind)).astype(int) - (10, 100, 200)).max() <= 3
    ramp = np.broadcast_to(np.linspace(0, 255, side)[None, :, None], (side, side, 3))
    found = decode_one(encoded(ramp.astype(np.uint8), kind)).astype(float)
    ideal = (np.arange(SIZE) + 0.5) / SIZE * 255
    assert np.abs(found - ideal[None, :, None]).max() < 255 / 8


def test_tensors_pass_through_or_are_resized() -> None:
    images = pixels(3, SIZE)
    table = pa.table({"key": ["a", "b", "c"], "image": tensor_column(images)})
    same = Decode(SIZE, 3)(table, ShardContext("0", 0))
    assert np.array_equal(to_numpy(same["image"]), images)
    less = Decode(8, 1)(table, ShardContext("0", 0))
    assert to_numpy(less["image"]).shape == (3, 8, 8, 1)


def header_only(width: int, height: int, kind: str) -> bytes:
    """The beginning of a file that claims to be very large."""
    if kind == "JPEG":
        small = encoded(IMAGE, "JPEG")
        place = small.index(b"\xff\xc0") + 5
        return small[:place] + struct.pack(">HH", height, width) + small[place + 4 :]
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    ihdr = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + ihdr + encoded(IMAGE)[33:]


CLAIMS = [(60000, 60000), (10001, 10000), (9000, 8000)]


@pytest.mark.parametrize(
    ("kind", "shape"),
    [("PNG", (1, 64_000_001)), *((kind, shape) for kind in ("PNG", "JPEG") for shape in CLAIMS)],
)
def test_a_picture_that_claims_too_many_pixels_is_not_decoded(
    kind: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = header_only(*shape, kind)

    def fail(_: Any) -> None:
        raise AssertionError("it was decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    found, context = decode([data])
    assert found.shape == (0, SIZE, SIZE, 3)
    assert [row["reason"] for row in context.bad] == ["too-large"]


def test_the_cap_on_pixels_is_64_million_or_as_given() -> None:
    assert Decode(SIZE, 3).max_pixels == 64_000_000
    context = ShardContext("00000", 0)
    images = table_of([encoded(IMAGE), encoded(pixels(1, SIZE + 1)[0])])
    result = Decode(SIZE, 3, max_pixels=SIZE * SIZE)(images, context)
    assert result["key"].to_pylist() == ["k0"]
    assert [(row["key"], row["reason"]) for row in context.bad] == [("k1", "too-large")]


BAD = {
    "truncated JPEG": encoded(pixels(1, 64)[0], "JPEG")[:-900],
    "truncated PNG": encoded(pixels(1, 64)[0])[:-900],
    "empty": b"",
    "text": b"<html>not found</html>",
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "missing": None,
}


def test_unreadable_pictures_are_set_aside_and_the_others_go_on() -> None:
    images: list[bytes | None] = []
    for bad in BAD.values():
        images += [encoded(pixels(1, SIZE, seed=len(images))[0]), bad]
    context = ShardContext("00000", 0)
    result = check_stage(Decode(SIZE, 3), table_of(images), context)
    assert result["label"].to_pylist() == list(range(0, 2 * len(BAD), 2))
    assert result["key"].to_pylist() == [f"k{row}" for row in range(0, 2 * len(BAD), 2)]
    expected = [pixels(1, SIZE, seed=row)[0] for row in range(0, 2 * len(BAD), 2)]
    assert np.array_equal(to_numpy(result["image"]), np.array(expected))
    assert [row["reason"] for row in context.bad] == ["decode-error"] * len(BAD)
    assert [row["key"] for row in context.bad] == [f"k{row}" for row in range(1, 2 * len(BAD), 2)]
    assert all(row["detail"] for row in context.bad)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP"])
def test_whatever_the_bytes_the_stage_goes_on(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    options = {"exif": exif} if kind in {"JPEG", "PNG", "WEBP"} else {}
    good = saved(Image.fromarray(IMAGE), kind, **options)
    rng = random.Random(0)
    images: list[bytes | None] = []
    for _ in range(250):
        data = bytearray(good)
        for _ in range(rng.choice((1, 2, 5))):
            data[rng.randrange(min(len(data), rng.choice((80, 200, len(data)))))] = rng.randrange(
                256
            )
        images.append(bytes(data))
    found, context = decode(images)
    assert len(found) + len(context.bad) == len(images)
    assert {row["reason"] for row in context.bad} <= {"decode-error", "too-large"}
    assert len(found) >= 1


@pytest.mark.parametrize(
    "error",
    [struct.error, EOFError, KeyError, OverflowError, RuntimeError, MemoryError, RecursionError],
)
def test_whatever_a_decoder_raises_the_stage_goes_on(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Any) -> None:
        raise error

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    found, context = decode([encoded(IMAGE), encoded(IMAGE, "JPEG")])
    assert len(found) == 1  # JPEGs do not come that way
    assert [(row["key"], row["reason"]) for row in context.bad] == [("k0", "decode-error")]
    assert context.bad[0]["detail"] == error.__name__


def test_a_slow_picture_is_set_aside_and_the_others_go_on() -> None:
    empty = struct.pack(">I", 0) + b"prVt" + struct.pack(">I", zlib.crc32(b"prVt"))
    good = encoded(IMAGE)
    slow = good[:33] + empty * 1_000_000 + good[33:]  # each chunk is read in Python
    context = ShardContext("00000", 0)
    result = check_stage(Decode(SIZE, 3, seconds=0.5), table_of([good, slow, good]), context)
    assert result["key"].to_pylist() == ["k0", "k2"]
    assert [(row["key"], row["reason"]) for row in context.bad] == [("k1", "too-slow")]


def test_a_jpeg_of_thousands_of_scans_is_too_large() -> None:
    data = encoded(IMAGE, "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    _, context = decode([data[:-2] + data[last:-2] * 5_000 + b"\xff\xd9"])
    assert [row["reason"] for row in context.bad] == ["too-large"]


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("shape", [(40, 40), (41, 77), (90, 33), (64, 300), (501, 400)])
def test_the_square_in_the_middle_is_scaled_as_pillow_scales_it(
    kind: str, shape: tuple[int, int]
) -> None:
    data = encoded(np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8), kind)
    picture = Image.open(io.BytesIO(data))
    picture.draft("RGB", (SIZE, SIZE))
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    square = picture.convert("RGB").crop((left, top, left + side, top + side))
    expected = np.asarray(square.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    assert np.abs(decode_one(data).astype(int) - expected).max() <= 2


def test_missing_tensors_are_set_aside() -> None:
    whole = tensor_column(pixels(3, SIZE))
    images = pa.ExtensionArray.from_storage(
        whole.type,
        pa.array([whole.storage[0].as_py(), None, whole.storage[2].as_py()], whole.storage.type),
    )
    context = ShardContext("0", 0)
    result = Decode(SIZE, 3)(pa.table({"key": ["a", "b", "c"], "image": images}), context)
    assert np.array_equal(to_numpy(result["image"]), pixels(3, SIZE)[[0, 2]])
    assert [row["key"] for row in context.bad] == ["b"]


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_tensors_of_any_number_of_channels(channels: int) -> None:
    images = pixels(2, SIZE, channels)
    table = pa.table({"key": ["a", "b"], "image": tensor_column(images)})
    colour = to_numpy(Decode(SIZE, 3)(table, ShardContext("0", 0))["image"])
    expected = images[..., :1].repeat(3, 3) if channels < 3 else images[..., :3]
    assert np.array_equal(colour, expected)
    gray = to_numpy(Decode(SIZE, 1)(table, ShardContext("0", 0))["image"])
    if channels < 3:
        assert np.array_equal(gray, images[..., :1])
    else:
        luma = images[..., :3].astype(float) @ (0.299, 0.587, 0.114)
        assert np.abs(gray[..., 0] - luma).max() <= 1


def test_tensors_that_are_not_pixels_are_set_aside() -> None:
    table = pa.table({"key": ["a"], "image": tensor_column(np.zeros((1, 8, 8, 3), np.float32))})
    context = ShardContext("0", 0)
    assert len(Decode(SIZE, 3)(table, context)) == 0
    assert "float32" in context.bad[0]["detail"]


def test_other_columns_keep_their_places_and_an_empty_shard_its_type() -> None:
    table = table_of([b"bad", encoded(IMAGE)])
    result = Decode(SIZE, 1)(table, ShardContext("0", 0))
    assert result.column_names == table.column_names
    assert result["label"].to_pylist() == [1]
    assert Decode(SIZE, 1)(table.slice(0, 0), ShardContext("0", 0)).schema == result.schema


def test_real_pictures(real_data: Path) -> None:
    source = open_source(real_data / "imagenette", "test")
    assert source
    table = source.read(source.shards[0]).slice(0, 24)
    result = check_stage(Decode(32, 3), table, ShardContext("00000", 0))
    assert to_numpy(result["image"]).shape == (24, 32, 32, 3)
    assert 60 < to_numpy(result["image"]).mean() < 180
