"""Picture files as containers: what a file says of itself, and the bytes that its first frame needs.

The format is found by the first bytes, whatever the name. Then the file's own structure is walked: size, orientation,
whether there are more frames, which bytes make the first one. Nothing is decompressed and nothing as large as the
picture is allocated. Metadata that is broken, huge or hostile stays behind, so no decoder meets it; a file that ends
early is found by its own lengths, not left to the decoder.
Knows nothing of pixels. Not covered: orientation that stands only in XMP or in text chunks, colour profiles.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from regraft.errors import PictureError
from regraft.picture_files.bmp import BMP_HEADERS, read_bmp
from regraft.picture_files.container import FORMATS, MAX_PIXELS, Container, Damaged
from regraft.picture_files.gif import read_gif
from regraft.picture_files.jpeg import read_jpeg
from regraft.picture_files.png import check_rows, read_png
from regraft.picture_files.tiff import read_tiff
from regraft.picture_files.webp import read_webp

__all__ = ["MAX_PIXELS", "Container", "Damaged", "check_rows", "find_format", "read_container"]

_READERS: dict[str, Callable[[bytes, str], Container]] = {
    "JPEG": read_jpeg,
    "PNG": read_png,
    "WEBP": read_webp,
    "GIF": read_gif,
    "BMP": read_bmp,
    "TIFF": read_tiff,
}
_MAGIC = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
)
_DISGUISES = (
    (b"version https://git-lfs", "is a git-LFS pointer, not the picture itself: run `git lfs pull`"),
    (b"\x93NUMPY", "is a NumPy array: put arrays into an .npz file with `images` and `labels`"),
    (b"%!PS", "is a PostScript document: export it as PNG"),
    (b"\xc5\xd0\xd3\xc6", "is an EPS document: export it as PNG"),
    (b"%PDF", "is a PDF document: export its pictures as PNG"),
    (b"8BPS", "is a Photoshop document: export it as PNG"),
    (b"SIMPLE  =", "is a FITS file: save its array as a 16-bit TIFF"),
    (b"\0\0\0\x0cjP  ", "is a JPEG 2000 picture: save it as PNG"),
    (b"\xff\x0a", "is a JPEG XL picture: save it as PNG"),
    (b"PK\x03\x04", "is a zip archive: unpack it"),
    (b"\x1f\x8b", "is a gzip archive: unpack it"),
)


def find_format(data: bytes, where: str) -> str:
    """JPEG, PNG, WEBP, GIF, BMP or TIFF; PictureError that says what the file is instead."""
    for magic, name in _MAGIC:
        if data.startswith(magic):
            return name
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[:2] == b"BM" and int.from_bytes(data[14:18], "little") in BMP_HEADERS:
        return "BMP"
    raise PictureError(f"{where} must be a picture ({FORMATS}), but it {_disguise(data)}.")


def read_container(data: bytes, where: str) -> Container:
    """What the file says of itself; PictureError for what regraft does not read, other exceptions for damage.

    The other exceptions are Damaged with a reason, or struct.error, IndexError and KeyError where a field points
    outside the file.
    """
    return _READERS[find_format(data, where)](data, where)


def _disguise(data: bytes) -> str:
    if not data:
        return "is empty (0 bytes): copy or download it again"
    for magic, sentence in _DISGUISES:
        if data.startswith(magic):
            return sentence
    if data[4:8] == b"ftyp":
        return "is a HEIC or AVIF picture or a video: save it as PNG or JPEG"
    if not any(data[:65536]):
        return "begins with zero bytes only: copy or download it again"
    text = data[:4096].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(b"<") and b"<svg" in text:
        return "is an SVG drawing: export it as PNG"
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "is an HTML page, as a failed download leaves it: download the picture again"
    if text.startswith((b"{", b"[")):
        return "is a JSON document: give the picture that it speaks of"
    if not re.search(rb"[\0-\x08\x0e-\x1a\x7f]", text):
        return "is text: give the picture that belongs here"
    return f"begins with {data[:8].hex(' ')}, which is none of these: save it again from an image program"
