"""What one picture file says of itself, in the words that all formats share."""

from __future__ import annotations

from dataclasses import dataclass

from regraft.errors import PictureError

FORMATS = "JPEG, PNG, WEBP, GIF, BMP or TIFF"
MAX_PIXELS = 50_000_000
"""Larger pictures are refused from their header: a file of 20 kB can ask for 169 million pixels."""


class Damaged(Exception):
    """A file contradicts itself or ends early; the message is a clause on "it" that the gate puts into a sentence."""


@dataclass(frozen=True)
class Container:
    """One picture file before decoding.

    format: as Pillow names it.
    width, height: as stored, in pixels, before `orientation` (1 to 8, as in EXIF) is applied.
    parts: the bytes that the decoder needs for the first frame, to be joined.
    notes: one sentence each on what was left out.
    samples: stored samples per pixel where they decide how to decode (JPEG; PNG with grey and alpha), else 0.
    bits: bits of a stored sample.
    white_is_zero: samples of more than 8 bits that run from white to black.
    key: the one colour that is transparent, as stored, one number per sample.
    """

    format: str
    width: int
    height: int
    parts: tuple[bytes | memoryview, ...]
    orientation: int = 1
    notes: tuple[str, ...] = ()
    samples: int = 0
    bits: int = 8
    white_is_zero: bool = False
    key: tuple[int, ...] | None = None


def check_size(width: int, height: int, where: str) -> None:
    """PictureError where a header asks for more than MAX_PIXELS."""
    if width * height > MAX_PIXELS:
        raise PictureError(
            f"{where} must have at most {MAX_PIXELS:,} pixels, but its header says {width} x {height}: "
            "make the picture smaller first."
        )
