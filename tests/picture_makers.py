"""Pictures made for the tests of the gate, and the two simple formats written by hand."""

from __future__ import annotations

import io
import struct
import time
import warnings
import zlib

import numpy as np
from PIL import Image

from regraft.errors import PictureError
from regraft.pictures import decode


def photograph(height=60, width=80, channels=3):
    """Waves, edges and a little noise: what a codec meets in a photograph."""
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(height * width + channels)
    planes = [
        128
        + 60 * np.sin(x / (7 + k) + y / 11)
        + 30 * ((x // 13 + y // (9 + k)) % 2)
        + noise.normal(0, 4, (height, width))
        for k in range(channels)
    ]
    pixels = np.clip(np.stack(planes, -1), 0, 255).astype(np.uint8)
    return pixels[:, :, 0] if channels == 1 else pixels


def encode(image, kind, **options):
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels_of(data, **options):
    return decode(data, where="a.jpg", **options).pixels


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, bits, colour, rows, *before, after=b"", interlace=0):
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlace))
    pixels = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(before) + pixels + after + chunk(b"IEND", b"")


def tiff(width, height, bits, content, *, order="<", photometric=1, more=(), big=False):
    """A picture in one uncompressed strip; `more` holds further (tag, type, value) entries."""
    entries = [(256, 4, width), (257, 4, height), (258, 3, bits), (259, 3, 1), (262, 3, photometric)]
    entries += [(273, 4, 16 if big else 8), (277, 3, 1), (278, 4, height), (279, 4, len(content)), *more]
    entries.sort()
    field = {
        (kind, n): order + code + pad
        for kind, code, n, pad in [(3, "H", 4, "2x"), (4, "I", 4, ""), (3, "H", 8, "6x"), (4, "I", 8, "4x")]
    }
    mark = b"II" if order == "<" else b"MM"
    if big:
        rows = b"".join(struct.pack(order + "HHQ", t, k, 1) + struct.pack(field[k, 8], v) for t, k, v in entries)
        head = mark + struct.pack(order + "HHHQ", 43, 8, 0, 16 + len(content))
        return head + content + struct.pack(order + "Q", len(entries)) + rows + b"\0" * 8
    rows = b"".join(struct.pack(order + "HHI", t, k, 1) + struct.pack(field[k, 4], v) for t, k, v in entries)
    head = mark + struct.pack(order + "HI", 42, 8 + len(content))
    return head + content + struct.pack(order + "H", len(entries)) + rows + b"\0" * 4


def exif(orientation):
    block = Image.Exif()
    block[274] = orientation
    return block.tobytes()


COLOUR, GREY = photograph(), photograph(channels=1)
UPRIGHT = photograph(20, 30)
FRAMES = [Image.fromarray(photograph(30, 40)), Image.fromarray(255 - photograph(30, 40))]
WHOLE = {
    "jpeg": encode(COLOUR, "JPEG"),
    "jpeg-progressive": encode(COLOUR, "JPEG", progressive=True),
    "jpeg-grey": encode(GREY, "JPEG"),
    "jpeg-exif": encode(COLOUR, "JPEG", exif=exif(6)),
    "png": encode(COLOUR, "PNG"),
    "png-grey": encode(GREY, "PNG"),
    "png-palette": encode(Image.fromarray(COLOUR).quantize(16), "PNG", transparency=3),
    "png-16": encode(GREY.astype(np.uint16) * 257, "PNG"),
    "png-animated": encode(FRAMES[0], "PNG", save_all=True, append_images=FRAMES[1:]),
    "webp": encode(COLOUR, "WEBP", quality=80),
    "webp-lossless": encode(COLOUR, "WEBP", lossless=True),
    "webp-alpha": encode(np.dstack([COLOUR, GREY]), "WEBP", quality=80, exif=exif(3)),
    "webp-animated": encode(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:]),
    "gif": encode(COLOUR, "GIF"),
    "gif-animated": encode(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]),
    "bmp": encode(COLOUR, "BMP"),
    "bmp-palette": encode(Image.fromarray(COLOUR).quantize(16), "BMP"),
    "tiff": encode(COLOUR, "TIFF"),
    "tiff-lzw": encode(COLOUR, "TIFF", compression="tiff_lzw"),
    "tiff-deflate": encode(COLOUR, "TIFF", compression="tiff_adobe_deflate"),
    "tiff-jpeg": encode(COLOUR, "TIFF", compression="jpeg"),
    "tiff-group4": encode(Image.fromarray(GREY).convert("1"), "TIFF", compression="group4"),
    "tiff-pages": encode(FRAMES[0], "TIFF", save_all=True, append_images=FRAMES[1:]),
    "tiff-big": tiff(80, 60, 8, GREY.tobytes(), big=True),
}


def mutated(data, random):
    """A few bytes changed, most often near the front; at times a piece cut out or doubled."""
    damaged = bytearray(data)
    for _ in range(random.integers(1, 6)):
        at = int(len(damaged) * random.random() ** 3)
        damaged[at] = random.integers(256)
    if random.random() < 0.2:
        a, b = sorted(random.integers(0, len(damaged), 2))
        damaged[a:b] = b"" if random.random() < 0.5 else damaged[a:b] * 2
    return bytes(damaged)


def fuzz(data, seconds, seed):
    """Tried, refused, slowest in seconds; any exception but PictureError and any warning fails."""
    random = np.random.default_rng(seed)
    tried, refused, slowest, end = 0, 0, 0.0, time.perf_counter() + seconds
    with warnings.catch_warnings(record=True) as leaked:
        warnings.simplefilter("always")
        while time.perf_counter() < end:
            start = time.perf_counter()
            try:
                pixels = pixels_of(mutated(data, random))
            except PictureError:
                refused += 1
            else:
                assert pixels.dtype == np.uint8
            tried, slowest = tried + 1, max(slowest, time.perf_counter() - start)
    assert leaked == []
    return tried, refused, slowest
