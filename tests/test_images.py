"""Decoding, scaling and encoding single images, and the cap on their time."""

from __future__ import annotations

import contextlib
import io
import signal
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import warnings
import zlib
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps
from samples import encoded

from pipeline.storage import images
from pipeline.storage.images import (
    TimeLimit,
    TooLargeError,
    TooSlowError,
    decode,
    decode_png,
    encode,
    encode_png,
    resize,
)

Array = npt.NDArray[np.uint8]


def saved(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def smooth(height: int, width: int) -> Array:
    """Colours that differ at every place, without edges that JPEG would blur."""
    y, x = np.mgrid[:height, :width]
    planes = (255 * x / width, 255 * y / height, 127 + 120 * np.sin((x + y) / 20))
    return np.stack(planes, axis=2).astype(np.uint8)


def oriented(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def pillow(data: bytes, mode: str = "RGB") -> Array:
    return np.asarray(Image.open(io.BytesIO(data)).convert(mode))


def distance(found: Array, expected: Array) -> int:
    assert found.shape == expected.shape
    return int(np.abs(found.astype(int) - expected).max())


PHOTO = smooth(96, 128)
JPEG = encoded(PHOTO, "JPEG", quality=90)
SCAN = JPEG.index(b"\xff\xda")


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_with(*chunks: bytes, image: Array = PHOTO) -> bytes:
    """A PNG with further chunks before its pixels."""
    data = encoded(image)
    return data[:33] + b"".join(chunks) + data[33:]


# --- what is decoded -------------------------------------------------------------------------


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_is_decoded_as_pillow_does(subsampling: int, progressive: bool) -> None:
    data = encoded(PHOTO, "JPEG", subsampling=subsampling, progressive=progressive)
    # Both are libjpeg-turbo, in versions that may round differently.
    assert distance(decode(data), pillow(data)) <= 1


@pytest.mark.parametrize(
    ("shorter", "side"), [(None, 400), (201, 400), (200, 200), (101, 200), (60, 100), (7, 50)]
)
def test_a_jpeg_is_scaled_while_decoded_and_never_too_far(shorter: int | None, side: int) -> None:
    image = smooth(400, 600)
    data = encoded(image, "JPEG", quality=95, subsampling=0)
    found = decode(data, shorter=shorter)
    assert found.shape == (side, side * 3 // 2, 3)
    reference = Image.fromarray(image).resize((side * 3 // 2, side), Image.Resampling.BOX)
    assert distance(found, np.asarray(reference)) <= 8


def test_gray_of_a_colour_jpeg_is_its_luma_however_it_is_decoded() -> None:
    odd = JPEG[:SCAN] + b"\x12\x34" + JPEG[SCAN:]
    luma = np.asarray(Image.open(io.BytesIO(JPEG)).convert("YCbCr"))[..., :1]
    for data in (JPEG, odd):
        assert distance(decode(data, 1), luma) <= 2
    assert decode(encoded(PHOTO[..., 0], "JPEG")).shape == (96, 128, 1)
    assert decode(encoded(PHOTO[..., 0], "JPEG"), 3).shape == (96, 128, 3)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "I;16"])
def test_channels_follow_the_image_where_none_are_asked_for(mode: str) -> None:
    deep = Image.fromarray(PHOTO[..., 0].astype(np.uint16) << 8)
    picture = deep if mode == "I;16" else Image.fromarray(PHOTO).convert(mode)
    assert decode(saved(picture)).shape == (96, 128, 1)
    assert decode(saved(Image.fromarray(PHOTO).convert("P"))).shape == (96, 128, 3)


ODD_JPEGS = {
    "trailing garbage": JPEG + b"garbage" * 300,
    "bytes before a marker": JPEG[:SCAN] + b"\x12\x34" + JPEG[SCAN:],
    "fill bytes": JPEG[:SCAN] + b"\xff\xff" + JPEG[SCAN:],
    "a comment": JPEG[:2] + b"\xff\xfe\x00\x06text" + JPEG[2:],
    "large EXIF": JPEG[:2] + b"\xff\xe1\xff\xff" + b"Exif\0\0".ljust(65533, b"\x7f") + JPEG[2:],
    "EXIF cut short": JPEG[:2] + b"\xff\xe1\x00\x10Exif\0\0II*\0\xff\xff\xff\x7f" + JPEG[2:],
    "EXIF of rubbish": JPEG[:2] + b"\xff\xe1\x00\x0cExif\0\0\x01\x02\x03\x04" + JPEG[2:],
}


@pytest.mark.parametrize("name", ODD_JPEGS)
def test_an_unusual_jpeg_is_decoded_as_pillow_does(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nobody reads what a worker prints
        found = decode(ODD_JPEGS[name])
    assert distance(found, pillow(JPEG)) <= 1


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_damaged_exif_does_not_fail_a_picture(kind: str) -> None:
    rubbish = b"Exif\0\0II*\0\xff\xff\xff\x7f" if kind == "WEBP" else b"II*\0\xff\xff\xff\x7f"
    options = {"exif": rubbish} if kind != "TIFF" else {}
    lossless = {"lossless": True} if kind == "WEBP" else {}
    data = saved(Image.fromarray(PHOTO), kind, **options, **lossless)
    assert np.array_equal(decode(data), PHOTO)


@pytest.mark.parametrize("transform", ["CMYK", "YCCK"])
def test_four_inks_become_rgb_by_pillow(transform: str) -> None:
    data = saved(Image.fromarray(PHOTO).convert("CMYK"), "JPEG", quality=95, subsampling=0)
    if transform == "YCCK":
        adobe = data.index(b"Adobe")
        data = data[: adobe + 11] + b"\x02" + data[adobe + 12 :]
    assert Image.open(io.BytesIO(data)).mode == "CMYK"
    assert np.array_equal(decode(data), pillow(data))
    if transform == "CMYK":
        assert distance(decode(data), PHOTO) <= 12


def turned(orientation: int, image: Array) -> Array:
    turns: dict[int, Callable[[Array], Array]] = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: a[::-1].swapaxes(0, 1),
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: a.swapaxes(0, 1)[::-1],
    }
    return turns[orientation](image)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_every_orientation_of_a_lossless_picture(kind: str, orientation: int) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    data = saved(Image.fromarray(PHOTO), kind, exif=oriented(orientation), **options)
    assert np.array_equal(decode(data), turned(orientation, PHOTO))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("shorter", [None, 48, 20])
@pytest.mark.parametrize("odd", [False, True])
def test_every_orientation_of_a_jpeg(orientation: int, shorter: int | None, odd: bool) -> None:
    data = saved(Image.fromarray(PHOTO), "JPEG", quality=90, exif=oriented(orientation))
    if odd:  # left to Pillow
        start = data.index(b"\xff\xda")
        data = data[:start] + b"\x12" + data[start:]
    upright = turned(orientation, decode(JPEG, shorter=shorter))
    assert np.array_equal(decode(data, shorter=shorter), upright)
    picture = Image.open(io.BytesIO(data))
    if shorter is None:
        assert distance(upright, np.asarray(ImageOps.exif_transpose(picture))) <= 1


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation_counts(kind: str) -> None:
    frames = [Image.new("RGB", (20, 16), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 3
    assert np.array_equal(decode(data), np.full((16, 20, 3), (255, 0, 0)))


@pytest.mark.parametrize("values", [np.float32, np.int32])
def test_levels_without_a_known_range_are_refused(values: Any) -> None:
    data = saved(Image.fromarray(np.ones((4, 4), values)), "TIFF")
    with pytest.raises(ValueError, match="no known range"):
        decode(data)


def test_one_bit_is_black_and_white() -> None:
    bits = PHOTO[..., 0] > 100
    assert np.array_equal(decode(saved(Image.fromarray(bits)))[..., 0], bits * np.uint8(255))


# --- what is refused -------------------------------------------------------------------------

REFUSED = {
    "nothing": b"",
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "FITS": b"SIMPLE  =                    T".ljust(2880),
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
    "PDF": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n",
    "ICNS": saved(Image.new("RGB", (32, 32)), "ICNS"),
    "ICO": saved(Image.new("RGB", (32, 32)), "ICO"),
    "TGA": saved(Image.new("RGB", (32, 32)), "TGA"),
    "JPEG 2000": saved(Image.new("RGB", (32, 32)), "JPEG2000"),
    "AVIF": saved(Image.new("RGB", (32, 32)), "AVIF"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_kinds_of_file_are_not_opened(name: str) -> None:
    with pytest.raises(ValueError, match="not an image of an accepted kind"):
        decode(REFUSED[name])


def flat_png(width: int, height: int) -> bytes:
    """A whole PNG of zeros, compressed row by row so that it never lies in memory."""
    packer, row = zlib.compressobj(1), bytes(width + 1)
    body = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", body), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("side", [8_001, 9_500, 14_000])
def test_a_picture_of_too_many_pixels_is_refused_by_its_header(
    side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below and above the 89 and 179 megapixels at which Pillow warns and refuses."""
    data = flat_png(side, side)

    def fail(_: Any) -> None:
        raise AssertionError("it was decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    tracemalloc.start()
    with pytest.raises(TooLargeError):
        decode(data)
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP"])
def test_the_cap_counts_pixels_and_not_sides(kind: str) -> None:
    data = encoded(PHOTO, kind)
    assert decode(data, 3, max_pixels=96 * 128).shape == (96, 128, 3)
    with pytest.raises(TooLargeError, match="128 x 96"):
        decode(data, max_pixels=96 * 128 - 1)


def scans_of(data: bytes, times: int) -> bytes:
    """A progressive JPEG whose last scan comes ``times`` times more."""
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * times + b"\xff\xd9"


def test_a_jpeg_of_thousands_of_scans_is_refused() -> None:
    data = encoded(PHOTO, "JPEG", progressive=True)
    for odd in (b"", b"\x12"):  # also where it would be left to Pillow
        many = scans_of(data, 5_000)
        start = many.index(b"\xff\xda")
        with pytest.raises(TooLargeError, match="scans"):
            decode(many[:start] + odd + many[start:])
    assert decode(data).shape == PHOTO.shape


def test_many_scans_of_many_pixels_are_refused() -> None:
    data = scans_of(encoded(PHOTO, "JPEG", progressive=True), 190)
    scans = data.count(b"\xff\xda")
    assert 190 < scans < 210
    needed = -(-scans * 96 * 128 // 100)
    assert decode(data, max_pixels=needed).shape == PHOTO.shape
    start = data.index(b"\xff\xda")
    for odd in (b"", b"\x12"):
        with pytest.raises(TooLargeError, match="128 x 96"):
            decode(data[:start] + odd + data[start:], max_pixels=needed - 2)


def test_a_hidden_bomb_of_scans_is_refused() -> None:
    """Nothing that hides the kind of a JPEG from our reading of its header hides its scans."""
    data = scans_of(encoded(PHOTO, "JPEG", progressive=True), 5_000)
    table = data.index(b"\xff\xdb")
    for prefix in (b"\xff", b"\x00", b"\xff\x01", b"\xff\xc0", b"\xff\xd8", b"\xff\xfe\x00\x00"):
        with pytest.raises(TooLargeError, match="scans"):
            decode(data[:table] + prefix + data[table:])


BOMB = zlib.compress(bytes(100_000_000), 9)


@pytest.mark.parametrize(
    "bomb", [chunk(b"zTXt", b"Comment\0\0" + BOMB), chunk(b"iCCP", b"icc\0\0" + BOMB)]
)
def test_compressed_metadata_is_not_unpacked_without_limit(bomb: bytes) -> None:
    data = png_with(bomb)
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"[Tt]oo large|MAX_TEXT"):
        decode(data)
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_a_file_cut_anywhere_is_an_error(kind: str) -> None:
    data = encoded(PHOTO, kind)
    for end in {*range(0, min(len(data), 700), 23), *range(0, len(data) * 9 // 10, 997)}:
        with pytest.raises((ValueError, OSError, SyntaxError, EOFError)):
            decode(data[:end])


# --- the cap on time -------------------------------------------------------------------------


def slow_png() -> bytes:
    """A small picture behind a million chunks, each of which Pillow reads in Python."""
    return png_with(chunk(b"prVt", b"") * 1_000_000)


def test_a_slow_picture_is_interrupted() -> None:
    data = slow_png()
    progress: list[bool] = []
    with TimeLimit(0.2) as limited, pytest.raises(TooSlowError, match=r"0\.2 s"):
        limited(lambda: progress.append(decode(data).any()))
    assert progress == []


def test_an_interruption_that_is_swallowed_still_ends_in_the_error() -> None:
    def stubborn() -> str:
        with contextlib.suppress(ValueError):
            time.sleep(30)
        return "done"

    began = time.monotonic()
    with TimeLimit(0.5) as limited:
        with pytest.raises(TooSlowError):
            limited(stubborn)
        assert limited(lambda: "the next one goes well") == "the next one goes well"
    assert time.monotonic() - began < 25


def test_an_error_after_the_limit_counts_as_too_slow_and_one_before_does_not() -> None:
    def fail(seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pass
        raise KeyError("damaged")

    with TimeLimit(0.5) as limited:
        with pytest.raises(KeyError):
            limited(fail, 0)
        with pytest.raises(TooSlowError):
            limited(fail, 0.6)


def test_other_threads_are_measured() -> None:
    found: list[str] = []

    def work() -> None:
        with TimeLimit(0.5) as limited:
            try:
                limited(time.sleep, 0.6)
            except TooSlowError:
                found.append("too slow")
            limited(found.append, "next")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == ["too slow", "next"]


def test_timer_and_handler_are_as_before() -> None:
    def mine(*_: Any) -> None: ...

    before = signal.signal(signal.SIGALRM, mine)
    signal.setitimer(signal.ITIMER_REAL, 500, 7)
    try:
        with pytest.raises(TooSlowError), TimeLimit(0.05) as limited:
            limited(time.sleep, 5)
        assert signal.getsignal(signal.SIGALRM) is mine
        left, interval = signal.getitimer(signal.ITIMER_REAL)
        assert 400 < left <= 500
        assert interval == 7
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_between_calls_nothing_is_interrupted() -> None:
    with TimeLimit(0.04) as limited:
        limited(int)
        time.sleep(0.2)
        with pytest.raises(KeyError):
            limited({}.__getitem__, "missing")
        time.sleep(0.2)


# --- scaling ---------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", [(256, 256), (32, 64), (96, 40), (300, 7), (1, 1)])
def test_scaling_is_pillows_bicubic_within_a_level(channels: int, shape: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (96, 128, channels), np.uint8)
    flat = Image.fromarray(image[..., 0] if channels == 1 else image)
    expected = np.asarray(flat.resize(shape[::-1], Image.Resampling.BICUBIC))
    assert distance(resize(image, shape), expected.reshape(*shape, channels)) <= 1


@pytest.mark.parametrize("channels", [1, 3])
def test_crops_read_only_arrays_and_given_results(channels: int) -> None:
    image = smooth(90, 120)[..., :channels]
    crop = image[10:70, 20:95]
    expected = resize(np.ascontiguousarray(crop), (50, 40))
    frozen = image.copy()
    frozen.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(resize(frozen[10:70, 20:95], (50, 40)), expected)
    out = np.zeros((3, 50, 40, channels), np.uint8)
    assert resize(crop, (50, 40), out[1]) is not None
    assert np.array_equal(out[1], expected)
    assert not out[[0, 2]].any()
    resize(crop[:50, :40], (50, 40), out[2])
    assert np.array_equal(out[2], crop[:50, :40])


def test_scaling_does_not_depend_on_the_number_of_threads() -> None:
    image = np.random.default_rng(1).integers(0, 256, (500, 700, 3), np.uint8)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        found += [resize(image, (256, 256)).tobytes() for _ in range(2)]
    torch.set_num_threads(before)
    assert len(set(found)) == 1


def test_the_module_does_not_load_torch() -> None:
    command = "import sys, pipeline.storage.images; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], check=False).returncode == 0


# --- encoding --------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_png_and_lossless_webp_give_the_pixels_back(channels: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (33, 47, channels), np.uint8)
    assert np.array_equal(decode(encode(image, "png")), image)
    assert np.array_equal(decode_png(encode_png(image)), image)
    assert np.array_equal(decode(encode(image, "webp-lossless"), 3), image.repeat(3 // channels, 2))


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_quality_counts(kind: Literal["jpeg", "webp"]) -> None:
    files = [encode(PHOTO, kind, quality) for quality in (10, 50, 95)]
    assert len(files[0]) < len(files[1]) < len(files[2])
    assert distance(decode(files[2]), PHOTO) <= 12


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "webp-lossless"])
def test_files_hold_no_metadata_and_are_the_same_every_time(kind: Any) -> None:
    data = encode(PHOTO, kind)
    assert encode(np.asfortranarray(PHOTO), kind) == data
    picture = Image.open(io.BytesIO(data))
    assert picture.format == kind.split("-")[0].upper()
    assert not {"exif", "icc_profile", "xmp", "comment", "dpi"} & set(picture.info)
    assert not picture.getexif()


def test_a_gray_jpeg_has_one_channel() -> None:
    assert decode(encode(PHOTO[..., :1], "jpeg")).shape == (96, 128, 1)


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_a_side_that_a_format_cannot_hold_is_too_large(kind: Literal["jpeg", "webp"]) -> None:
    longest = images._LONGEST_SIDE[kind]
    assert decode(encode(np.zeros((1, longest, 3), np.uint8), kind)).shape == (1, longest, 3)
    with pytest.raises(TooLargeError, match=kind):
        encode(np.zeros((1, longest + 1, 3), np.uint8), kind)


# --- any bytes -------------------------------------------------------------------------------


@settings(max_examples=150)
@given(
    st.sampled_from(
        [b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"II*\0", b"P6 "]
    ),
    st.binary(max_size=400),
    st.sampled_from([None, 1, 3]),
)
def test_any_bytes_give_pixels_or_an_ordinary_error(start: bytes, rest: bytes, c: Any) -> None:
    try:
        found = decode(start + rest, c, shorter=8, max_pixels=1_000_000)
    except Exception:  # noqa: BLE001 - only what is not an Exception would stop a run
        return
    assert found.dtype == np.uint8
    assert found.ndim == 3
    assert found.shape[2] == c or c is None
