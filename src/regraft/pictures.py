"""The gate that every picture passes: bytes or an array in, faithful 8-bit pixels out, or one sentence why not.

Faithful means: the whole picture or none of it, upright as EXIF says, deep samples scaled and never clipped, what is
transparent laid on a background so that hidden colours have no effect, grey kept as one channel. Only six formats
are opened, found by their content; the size is checked before a pixel is allocated. Thread-safe: no setting of
Pillow or of `warnings` is touched.
Knows nothing of networks or resizing. Not covered: colour profiles (pixels are taken as sRGB), 16 bits per colour
beyond the upper 8, and damage inside JPEG or WebP data that still decodes, for which these formats have no checksum.
"""

from __future__ import annotations

import io
import math
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, UnidentifiedImageError

from regraft.errors import PictureError, first_line
from regraft.picture_files import MAX_PIXELS, Container, Damaged, check_rows, find_format, read_container

__all__ = ["MAX_PIXELS", "SUFFIXES", "Picture", "decode", "from_array"]

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
)
"""Suffixes, in lower case, of the files that a folder offers as pictures; what they hold is found by content."""

WHITE = 255
_ROWS_AT_ONCE = 256

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Picture:
    """Pixels as they should be seen: uint8 of (height, width, 3) RGB or (height, width, 1) grey; own, writable memory.

    notes: one sentence each on what was left out, such as "first of 12 frames used".
    """

    pixels: Pixels
    notes: tuple[str, ...]


def decode(data: bytes, *, where: str, background: int = WHITE) -> Picture:
    """The picture in the bytes of one file; `background` is the grey level, 0 to 255, behind what is transparent.

    Raises PictureError, which names `where`, for all that is not one whole picture of at most MAX_PIXELS pixels in
    an allowed format, whatever the decoders raise.
    """
    if not 0 <= background <= 255:
        raise PictureError(f"The background must be a grey level from 0 to 255; found {background}.")
    kind = find_format(data, where)
    try:
        container = read_container(data, where)
        pixels, alpha, notes = _jpeg_pixels(data, container) if kind == "JPEG" else _pillow_pixels(container, where)
        if alpha is not None:
            _lay_on(pixels, alpha, background)
        return Picture(_upright(pixels, container.orientation), (*container.notes, *notes))
    except PictureError:
        raise
    except Exception as e:  # decoders raise a dozen classes on damaged data, MemoryError and SyntaxError among them
        raise PictureError(
            f"{where} must be a whole {kind} picture, but {_reason(e)}: copy or download it again, or leave it out."
        ) from e


def from_array(array: npt.NDArray[Any], *, where: str) -> Picture:
    """A picture from an array of (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) with alpha, which is laid on white.

    uint8 is taken as it is, uint16 scaled from 0..65535, floats from 0..1. Raises PictureError for all else.
    """
    array = np.asarray(array)
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or array.size == 0:
        raise PictureError(
            f"{where} must have the shape (height, width) or (height, width, 1, 3 or 4), channels last; "
            f"found {array.shape}."
        )
    samples = _levels_of_array(array, where)
    pixels = np.ascontiguousarray(samples[:, :, :3])
    if array.shape[2] == 4:
        _lay_on(pixels, samples[:, :, 3], WHITE)
    return Picture(pixels, ())


def _levels_of_array(array: npt.NDArray[Any], where: str) -> Pixels:
    if array.dtype == np.uint8:
        return np.array(array)
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        return _scaled(array, 65535)
    if array.dtype.kind != "f":
        raise PictureError(
            f"{where} must hold uint8, uint16 or floats from 0 to 1; found {array.dtype}: convert it, scaling its "
            "range to one of these."
        )
    low, high = float(array.min()), float(array.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise PictureError(f"{where} must hold floats from 0 to 1; it holds NaN or infinity: leave it out.")
    if not (low >= 0 and high <= 1):
        raise PictureError(
            f"{where} must hold floats from 0 to 1; found {low:g} to {high:g}: divide by the largest possible value."
        )
    return np.rint(array.astype(np.float64) * 255).astype(np.uint8)


def _reason(error: Exception) -> str:
    """Why a file is no whole picture, as one clause without addresses of objects."""
    if isinstance(error, Damaged):
        return str(error)
    if isinstance(error, IndexError | struct.error):
        return "it ends early"
    if isinstance(error, UnidentifiedImageError):
        return "its header makes no sense"
    return f"its decoder says '{first_line(error)[:200]}'"


def _jpeg_pixels(data: bytes, container: Container) -> tuple[Pixels, None, tuple[str, ...]]:
    """Strict: libjpeg's warnings are how it tells of missing data. The settings are those of Pillow, bit for bit."""
    space = {1: "GRAY", 3: "RGB", 4: "CMYK"}[container.samples]
    pixels = simplejpeg.decode_jpeg(data, space, fastdct=False, fastupsample=False, strict=True)
    if pixels.shape[:2] != (container.height, container.width):
        raise Damaged("its header contradicts itself")
    if space == "CMYK":
        # As Adobe's programs write them and Pillow reads them: the inks are stored inverted.
        size = (container.width, container.height)
        pixels = np.array(Image.frombytes("CMYK", size, pixels.tobytes(), "raw", "CMYK;I").convert("RGB"))
    return pixels, None, ()


def _pillow_pixels(container: Container, where: str) -> tuple[Pixels, Pixels | None, tuple[str, ...]]:
    """Pixels, alpha if there is any, and notes; the stored mode decides how samples become 8-bit levels."""
    with Image.open(io.BytesIO(b"".join(container.parts)), formats=(container.format,)) as image:
        if image.size != (container.width, container.height):
            raise Damaged("its header contradicts itself")
        image.load()
        if container.format == "PNG" and _ends_in_zeros(image):
            check_rows(container)
        if image.mode in ("1", "L", "RGB"):
            return _with_key(image, container)
        if image.mode.startswith("I") or image.mode == "F":
            return _deep(np.asarray(image), container, where)
        if image.mode in ("RGBA", "LA", "La", "RGBa", "PA") or "transparency" in image.info:
            grey = image.mode in ("LA", "La") or container.samples == 2
            samples = np.asarray(image if image.mode in ("RGBA", "LA") else image.convert("LA" if grey else "RGBA"))
            return np.array(samples[:, :, : 1 if grey else 3]), samples[:, :, -1], ()
        return np.array(image.convert("RGB")), None, ()


def _ends_in_zeros(image: Image.Image) -> bool:
    """Whether one of the last two rows is zero; two, for an interlaced file sends every other row last."""
    rows = image.crop((0, max(image.height - 2, 0), *image.size)).tobytes()
    half = len(rows) // 2
    return image.height == 1 or not rows[:half].strip(b"\0") or not rows[half:].strip(b"\0")


def _with_key(image: Image.Image, container: Container) -> tuple[Pixels, Pixels | None, tuple[str, ...]]:
    """1, L and RGB, where one colour may be marked as transparent: by PNG as stored, by GIF as a grey level."""
    pixels = np.array(image if image.mode == "RGB" else image.convert("L"))
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    key: Any = image.info.get("transparency")
    if container.key is not None:
        key = [value * 255 // (2**container.bits - 1) for value in container.key]
    if key is None:
        return pixels, None, ()
    return pixels, np.where((pixels == key).all(axis=2), 0, 255).astype(np.uint8), ()


def _deep(values: npt.NDArray[Any], container: Container, where: str) -> tuple[Pixels, Pixels | None, tuple[str, ...]]:
    """Grey samples of more than 8 bits, as levels."""
    if values.dtype.kind == "f":
        levels = _levels_of_floats(values, where)
        notes: tuple[str, ...] = ()
    else:
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > 65535:
            raise PictureError(
                f"{where} must hold samples from 0 to 65535 to be read as grey, but holds {low} to {high}: "
                "scale them and save it as a 16-bit picture."
            )
        notes = (f"{container.bits}-bit samples read as 16-bit ones",) if container.bits > 16 else ()
        levels = _scaled(values, 2 ** min(container.bits, 16) - 1 if container.bits > 8 else 65535)
    alpha = None
    if container.key is not None:
        alpha = np.where(values == container.key[0], 0, 255).astype(np.uint8)
    return (255 - levels if container.white_is_zero else levels)[:, :, None], alpha, notes


def _levels_of_floats(values: npt.NDArray[np.floating[Any]], where: str) -> Pixels:
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 255):  # false for NaN too
        raise PictureError(
            f"{where} must hold floats from 0 to 1 or from 0 to 255, but holds {low:g} to {high:g}: "
            "scale them and save it as a 16-bit picture."
        )
    levels: Pixels = np.rint(values * 255 if high <= 1 else values).astype(np.uint8)
    return levels


def _scaled(values: npt.NDArray[Any], maximum: int) -> Pixels:
    """Integers from 0 to `maximum`, at most 65535, as the nearest of 256 levels."""
    steps = np.arange(maximum + 1, dtype=np.uint32)
    levels: Pixels = ((steps * 255 + maximum // 2) // maximum).astype(np.uint8)[values]
    return levels


def _lay_on(pixels: Pixels, alpha: Pixels, background: int) -> None:
    """Composite in place: p becomes (p alpha + background (255 - alpha)) / 255, rounded (Porter and Duff's "over").

    The sum stays below 2^16, so blocks of rows in 16 bits do.
    """
    for top in range(0, len(pixels), _ROWS_AT_ONCE):
        rows = slice(top, top + _ROWS_AT_ONCE)
        weight = alpha[rows, :, None].astype(np.uint16)
        if weight.min() < 255:
            pixels[rows] = (pixels[rows] * weight + background * (255 - weight) + 127) // 255


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    """Undo the EXIF orientation (1 to 8) of the camera; contiguous again."""
    if orientation >= 5:  # rows are columns
        pixels = pixels.swapaxes(0, 1)
    flip_rows, flip_columns = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    pixels = pixels[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]
    return np.ascontiguousarray(pixels)
