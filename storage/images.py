"""Encoded images to pixels and back, whatever the bytes are."""

from __future__ import annotations

import io
import math
import signal
import threading
import time
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any, Literal, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt
import simplejpeg  # type: ignore[import-untyped]
from PIL import Image, UnidentifiedImageError

EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm"})

ALLOWED = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""The kinds of file that are ever decoded, as Pillow names them."""

MAX_PIXELS = 64_000_000
MAX_SCANS = 500
"""Most passes over its picture that a JPEG may make; encoders make about ten."""
MAX_FULL_SCANS = 100
"""Most of those over a picture of the most pixels; smaller ones may make more."""
SECONDS = 30.0
"""Longest that one image may take."""

Image8 = npt.NDArray[np.uint8]
Kind = Literal["png", "jpeg", "webp", "webp-lossless"]
P = ParamSpec("P")
T = TypeVar("T")

_LONGEST_SIDE = {"png": 2**31 - 1, "jpeg": 65_500, "webp": 16_383, "webp-lossless": 16_383}
_ORIENTATION = 0x0112
_PLAIN = frozenset({0xC4, 0xDB, 0xDD, 0xE0, *range(0xE2, 0xF0), 0xFE})
"""JPEG's markers of tables, of metadata other than EXIF and XMP, and of comments."""


class TooLargeError(ValueError):
    """More pixels, or more passes over them, than are ever decoded or a format can hold."""


class TooSlowError(ValueError):
    """An image took longer than one may."""


def decode(
    data: bytes,
    channels: Literal[1, 3] | None = None,
    *,
    shorter: int | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Image8:
    """The pixels of an encoded image, upright.

    Pixels are counted in the header before any is decoded. The first frame of an animation
    counts; palettes are looked up; transparency is left off, not blended; CMYK becomes RGB by
    Pillow's formula; of 16-bit gray levels the upper 8 bits are kept; colour profiles are not
    applied. The gray of a colour JPEG is its luma channel. An orientation that EXIF or XMP gives
    is applied; one that cannot be read is passed over.

    Args:
        data: a file of one of the kinds in ``ALLOWED``.
        channels: 3 for RGB, 1 for gray, ``None`` for whichever the image is.
        shorter: smallest shorter side that is of use, in pixels. A JPEG of at least twice that
            is decoded at 1/2, 1/4 or 1/8 of its size, never below ``shorter``.
        max_pixels: most pixels that are decoded. Above 89 million Pillow refuses by itself.

    Returns:
        uint8 array H x W x C, contiguous.

    Raises:
        TooLargeError: the image has more pixels, or is a JPEG of more than ``MAX_SCANS`` scans or
            with more than ``MAX_FULL_SCANS * max_pixels`` pixels in all of its scans.
        ValueError: it is of no accepted kind, or its levels are floating-point numbers or 32-bit
            integers, which have no known range.
        Exception: it is damaged; decoders raise anything.
    """
    if not data.startswith(b"\xff\xd8\xff"):
        return _decode_by_pillow(data, channels, shorter, max_pixels)
    plain = _is_plain(data)
    max_pixels = max_pixels if plain else _capped(data, max_pixels)
    image = _decode_jpeg(data, channels, shorter, max_pixels)
    if image is None:
        return _decode_by_pillow(data, channels, shorter, max_pixels)
    return image if plain else _upright(image, _orientation(data))


def resize(image: Image8, shape: tuple[int, int], out: Image8 | None = None) -> Image8:
    """Scale an image, bicubic and with antialiasing.

    It is done in integers, alike on any number of threads, and is within a level of what Pillow
    does (three at worst, where noise is shrunk one way and stretched the other).

    Args:
        image: uint8, H x W x C with C = 1 or 3; a crop may be given without copying it.
        shape: height and width to scale to, in pixels.
        out: contiguous array of the result's shape to write to.

    Returns:
        ``out``, or a new array of that shape.
    """
    if out is None:
        out = np.empty((*shape, image.shape[2]), np.uint8)
    if image.shape[:2] == shape:
        out[:] = image
        return out
    import torch

    # The function behind interpolate(): only here can a result go where it belongs in the layout
    # of an image, which saves more time than scaling takes.
    scale: Any = torch._C._nn._upsample_bicubic2d_aa  # noqa: SLF001
    if not image.flags.writeable:
        image = image.copy()  # torch warns of arrays that are read-only
    source, target = (torch.from_numpy(a[None]).permute(0, 3, 1, 2) for a in (image, out))
    scale(source, list(shape), False, None, None, out=target)
    return out


def load_resize() -> None:
    """Load what :func:`resize` needs, so that no image's time is spent on it."""
    import torch  # noqa: F401


def encode(image: Image8, kind: Kind, quality: int = 90) -> bytes:
    """An image as the bytes of a file without metadata; equal pixels give equal bytes.

    Args:
        image: uint8, H x W x C with C = 1 or 3. WebP has no gray: it comes back with 3 channels.
        kind: the format; ``jpeg`` halves the resolution of colour (4:2:0).
        quality: 1 to 100, for ``jpeg`` and ``webp``; the others lose nothing.

    Raises:
        TooLargeError: a side is longer than the format can hold.
    """
    height, width, channels = image.shape
    if max(height, width) > _LONGEST_SIDE[kind]:
        raise TooLargeError(f"{width} x {height} pixels; {kind} holds {_LONGEST_SIDE[kind]} a side")
    if kind == "jpeg":
        space, sampling = ("GRAY", "Gray") if channels == 1 else ("RGB", "420")
        image = np.ascontiguousarray(image)
        return bytes(simplejpeg.encode_jpeg(image, quality, space, sampling))
    options: dict[Kind, dict[str, Any]] = {
        "png": {"format": "PNG"},
        "webp": {"format": "WEBP", "quality": quality},
        "webp-lossless": {"format": "WEBP", "lossless": True},
    }
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if channels == 1 else image).save(buffer, **options[kind])
    return buffer.getvalue()


def encode_png(image: Image8) -> bytes:
    """A uint8 image H x W x C, with C = 1 or 3, as PNG bytes without metadata."""
    return encode(image, "png")


def decode_png(data: bytes) -> Image8:
    """The pixels of a PNG written by :func:`encode_png`, H x W x C."""
    pixels = np.asarray(Image.open(io.BytesIO(data)))
    return pixels[..., None] if pixels.ndim == 2 else pixels


class TimeLimit:
    """Calls functions that may take ``seconds`` each: ``with TimeLimit(30) as limited: ...``.

    In the main thread a call is interrupted soon after, as soon as it is back in Python: Pillow is
    after every 64 KB of a file. In any other thread it is measured when it is done.
    """

    def __init__(self, seconds: float = SECONDS) -> None:
        self.seconds = seconds
        self._began = math.inf
        self._late = False

    def __call__(self, function: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        """What ``function`` returns.

        Raises:
            TooSlowError: it took longer, whatever else came of it.
        """
        self._late, self._began = False, time.monotonic()
        try:
            return function(*args, **options)
        finally:
            self._stop()

    def _stop(self) -> None:
        took, self._began = time.monotonic() - self._began, math.inf
        if self._late or took > self.seconds:  # late: a decoder may have swallowed the interruption
            raise TooSlowError(f"it takes more than {self.seconds:g} s")

    def _tick(self, _: int, __: FrameType | None) -> None:
        if time.monotonic() - self._began > self.seconds:
            self._late = True
            self._stop()

    # One ticking timer for all calls: to set it for each would cost as much as to read a header.
    def __enter__(self) -> TimeLimit:
        if threading.current_thread() is threading.main_thread():
            tick = min(1.0, self.seconds / 4)
            self._handler = signal.signal(signal.SIGALRM, self._tick)
            self._timer = signal.setitimer(signal.ITIMER_REAL, tick, tick)
        return self

    def __exit__(self, *_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.setitimer(signal.ITIMER_REAL, *self._timer)
            signal.signal(signal.SIGALRM, self._handler or signal.SIG_DFL)


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise TooLargeError(f"{width} x {height} pixels; at most {max_pixels:,} are decoded")


def _capped(data: bytes, max_pixels: int) -> int:
    """How many pixels a JPEG may have for all of its scans to be passed over in time."""
    # Every scan may touch every pixel, and an empty one takes ten bytes of file. Its marker cannot
    # stand within compressed data, so that counting all FF DA is an upper bound.
    words = (np.frombuffer(data, "<u2", (len(data) - odd) // 2, odd) for odd in (0, 1))
    scans = sum(int(np.count_nonzero(part == 0xDAFF)) for part in words)
    if scans > MAX_SCANS:
        raise TooLargeError(f"a JPEG of {scans:,} scans; at most {MAX_SCANS} are decoded")
    return min(max_pixels, max_pixels * MAX_FULL_SCANS // max(scans, 1))


def _decode_jpeg(
    data: bytes, channels: int | None, shorter: int | None, max_pixels: int
) -> Image8 | None:
    """The pixels by libjpeg-turbo alone; ``None`` where Pillow has to decide."""
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if space not in {"Gray", "YCbCr", "RGB"}:
        return None
    _check_pixels(width, height, max_pixels)
    gray = channels == 1 or (channels is None and space == "Gray")
    # Powers of two have fast transforms, and Pillow scales by the same.
    scale = next((s for s in (8, 4, 2) if shorter and min(height, width) >= s * shorter), 1)
    rows, columns = -(-height // scale), -(-width // scale)
    try:
        image: Image8 = simplejpeg.decode_jpeg(
            data, "GRAY" if gray else "RGB", min_height=rows, min_width=columns
        )
    except ValueError:  # also of what is only a warning in libjpeg
        return None
    return image


def _is_plain(data: bytes) -> bool:
    """Whether a JPEG is of one scan and has no EXIF or XMP (segment APP1) before it.

    Reads its header as libjpeg does; whatever is unusual is not plain.
    """
    place, components = 2, 0
    try:
        while data[place] == 0xFF:
            marker = data[place + 1]
            if marker == 0xDA:
                return data[place + 4] == components
            if marker in {0xC0, 0xC1}:
                components = data[place + 9]
            elif marker not in _PLAIN:
                return False
            place += 2 + (data[place + 2] << 8 | data[place + 3])
    except IndexError:
        pass
    return False


def _decode_by_pillow(
    data: bytes, channels: int | None, shorter: int | None, max_pixels: int
) -> Image8:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            picture = Image.open(io.BytesIO(data), formats=ALLOWED)
            _check_pixels(*picture.size, max_pixels)
            picture.draft("L" if channels == 1 else None, (shorter, shorter) if shorter else None)
            picture.load()
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise TooLargeError(str(error)) from error
        except UnidentifiedImageError as error:
            raise ValueError("the bytes are not an image of an accepted kind") from error
        # After loading: only then is the orientation of a TIFF, which Pillow applies, gone.
        return _upright(_eight_bits(picture, channels), _orientation(picture))


def _eight_bits(picture: Image.Image, channels: int | None) -> Image8:
    mode = picture.mode
    if mode == "F" or (mode == "I" and picture.format != "PPM"):
        raise ValueError("levels of 32 bits have no known range")
    picture.info.pop("transparency", None)
    gray = mode.startswith(("1", "L", "I")) and mode != "LAB"
    if mode.startswith("I"):
        # Pillow cuts deeper levels off at 255 instead of scaling them.
        picture = Image.fromarray((np.asarray(picture) >> 8).clip(0, 255).astype(np.uint8))
    pixels = np.asarray(picture.convert("L" if (channels or (1 if gray else 3)) == 1 else "RGB"))
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _orientation(image: bytes | Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is none or what is there is damaged."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if isinstance(image, bytes):
                image = Image.open(io.BytesIO(image), formats=("JPEG",))
            found = image.getexif().get(_ORIENTATION, 1)
        return int(found) if found in range(1, 9) else 1
    except Exception:  # noqa: BLE001 - the pixels may be fine all the same
        return 1


def _upright(image: Image8, orientation: int) -> Image8:
    if orientation in {3, 4, 6, 7}:
        image = image[::-1]
    if orientation in {2, 3, 7, 8}:
        image = image[:, ::-1]
    return np.ascontiguousarray(image.swapaxes(0, 1) if orientation >= 5 else image)
