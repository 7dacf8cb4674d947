"""TIFF and BigTIFF files: the first page, with a directory that holds only what makes pixels.

Old-style JPEG in TIFF, which no two programs read alike, is refused; so are pages that are thumbnails.
"""

from __future__ import annotations

import struct

from regraft.errors import PictureError
from regraft.picture_files.container import Container, Damaged, check_size
from regraft.picture_files.directory import Directory, Entry, orientation_of, read_directory

_SUBFILE, _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC = 254, 256, 257, 258, 259, 262
_STRIPS, _SAMPLES, _ROWS, _STRIP_BYTES, _PLANAR = 273, 277, 278, 279, 284
_TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_BYTES = 322, 323, 324, 325
_FILL_ORDER, _FAX3, _FAX4, _PREDICTOR, _COLOUR_MAP, _EXTRA_SAMPLES, _SAMPLE_FORMAT = 266, 292, 293, 317, 320, 338, 339
_JPEG_TABLES, _YCBCR_SAMPLING, _YCBCR_POSITION, _BLACK_WHITE = 347, 530, 531, 532
_SINGLE = frozenset({_WIDTH, _HEIGHT, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER, _SAMPLES, _ROWS, _PLANAR})
_SINGLE |= {_FAX3, _FAX4, _PREDICTOR, _TILE_WIDTH, _TILE_HEIGHT, _YCBCR_POSITION}
_SEVERAL = frozenset({_BITS, _STRIPS, _STRIP_BYTES, _COLOUR_MAP, _TILES, _TILE_BYTES, _EXTRA_SAMPLES})
_SEVERAL |= {_SAMPLE_FORMAT, _JPEG_TABLES, _YCBCR_SAMPLING, _BLACK_WHITE}
_RAW, _OLD_JPEG, _THUMBNAIL, _WHITE_IS_ZERO, _BLACK_IS_ZERO, _SEPARATE, _SIGNED, _SHORT = 1, 6, 1, 0, 1, 2, 2, 3


def read_tiff(data: bytes, where: str) -> Container:
    """The page as libtiff will see it: tags that make pixels, each whole, and every strip inside the file."""
    page = read_directory(data)
    if page.number(_SUBFILE, 0) & _THUMBNAIL or page.number(_COMPRESSION, _RAW) == _OLD_JPEG:
        raise PictureError(
            f"{where} must begin with the picture itself, but its first page is a thumbnail or old-style JPEG: "
            "export it as TIFF or PNG from an image program."
        )
    width, height = page.number(_WIDTH), page.number(_HEIGHT)
    check_size(width, height, where)
    _check_strips(page, width, height)
    bits = int(page.numbers(_BITS).max(initial=1))
    if bits <= 8 and _SIGNED in page.numbers(_SAMPLE_FORMAT):
        raise PictureError(
            f"{where} must hold unsigned samples, but its {bits} bits have a sign: scale and save it again."
        )
    kept = _pixel_entries(page)
    inverted = bits > 8 and page.number(_PHOTOMETRIC, _WHITE_IS_ZERO) == _WHITE_IS_ZERO
    if inverted:
        # Pillow inverts samples of up to 8 bits only, so deeper ones are read as they stand and inverted later.
        value = struct.pack(page.order + "H", _BLACK_IS_ZERO)
        kept[_PHOTOMETRIC] = (_SHORT, 1, value.ljust(8 if page.big else 4, b"\0"))
    orientation, notes = orientation_of(data)
    if page.following:
        notes = (*notes, "first of several pages used")
    parts = _with_directory(page, kept)
    return Container("TIFF", width, height, parts, orientation, notes, bits=bits, white_is_zero=inverted)


def _check_strips(page: Directory, width: int, height: int) -> None:
    """Every strip or tile must lie inside the file, and there must be enough of them for the whole picture."""
    size, tiled = len(page.data), _TILE_WIDTH in page.entries
    if tiled:
        across, down = page.number(_TILE_WIDTH), page.number(_TILE_HEIGHT)
        start, length = page.numbers(_TILES), page.numbers(_TILE_BYTES)
    else:
        across, down = width, min(page.number(_ROWS, height), height)
        start, length = page.numbers(_STRIPS), page.numbers(_STRIP_BYTES)
    if min(width, height, across, down) < 1 or across > width + 4096 or down > height + 4096:
        raise Damaged(f"its size is {width} x {height} in pieces of {across} x {down}")
    planes = page.number(_SAMPLES, 1) if page.number(_PLANAR, 1) == _SEPARATE else 1
    if len(start) < -(-width // across) * -(-height // down) * planes or len(length) != len(start):
        raise Damaged("it has too few strips for its size")
    if not tiled and page.number(_COMPRESSION, _RAW) == _RAW:
        # Some writers count the last strip as a full one; what is needed of it may be less.
        row = -(-width * int(page.numbers(_BITS).sum()) // 8)
        length[-1] = min(int(length[-1]), row * ((height - 1) % down + 1))
    if (length > size).any() or (start > size - length).any():
        raise Damaged("it ends in the middle of its pixels")


def _pixel_entries(page: Directory) -> dict[int, Entry]:
    kept = {tag: entry for tag, entry in page.entries.items() if tag in _SINGLE or tag in _SEVERAL}
    for tag, (_, count, _) in kept.items():
        page.content(tag)
        if tag in _SINGLE and count != 1:
            raise Damaged(f"its tag {tag} must hold one number")
    return kept


def _with_directory(page: Directory, kept: dict[int, Entry]) -> tuple[bytes | memoryview, ...]:
    """The file with a directory of `kept` entries at its end; their values stay where they are."""
    at = len(page.data) + len(page.data) % 2
    word, count_word, row = ("Q", "Q", "HHQ8s") if page.big else ("I", "H", "HHI4s")
    head = page.data[: 8 if page.big else 4] + struct.pack(page.order + word, at)
    rows = b"".join(struct.pack(page.order + row, tag, *kept[tag]) for tag in sorted(kept))
    directory = struct.pack(page.order + count_word, len(kept)) + rows + struct.pack(page.order + word, 0)
    return head, memoryview(page.data)[len(head) :], b"\0" * (at - len(page.data)), directory
