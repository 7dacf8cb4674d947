"""PNG files (W3C PNG, third edition): the header, palette and pixel chunks, each with its checksum verified.

Text, profiles and the frames of an animation stay behind. The transparent colour of pictures without a palette is
handed on as a number, because Pillow compares it with samples that it has already scaled.
"""

from __future__ import annotations

import struct
import zlib

from regraft.errors import PictureError
from regraft.picture_files.container import Container, Damaged, check_size
from regraft.picture_files.directory import orientation_of

_GREY, _RGB, _PALETTE, _GREY_ALPHA = 0, 2, 3, 4
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_ONE_PASS = ((0, 0, 1, 1),)
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_PIECE = 1 << 20
_END = b"\0\0\0\0IEND\xaeB`\x82"


def read_png(data: bytes, where: str) -> Container:
    """Of an animation the still picture, which most often is also its first frame."""
    view = memoryview(data)
    width, height, bits, colour = struct.unpack_from(">IIBB", data, 16)
    check_size(width, height, where)
    parts: list[bytes | memoryview] = [view[:8]]
    key, exif, frames, pixels = b"", b"", 1, False
    needed = (b"IHDR", b"PLTE", b"tRNS", b"IDAT") if colour == _PALETTE else (b"IHDR", b"IDAT")
    kind, at = b"", 8
    while kind != b"IEND" and not (pixels and kind in (b"fcTL", b"fdAT")):
        kind, content, end = _chunk(view, at)
        if kind in needed:
            _check(kind, view[at + 4 : end])
            parts.append(view[at:end])
            pixels |= kind == b"IDAT"
        elif kind == b"tRNS" and colour in (_GREY, _RGB):
            _check(kind, view[at + 4 : end])
            key = bytes(content)
        elif kind == b"eXIf":
            exif = bytes(content)
        elif kind == b"acTL":
            frames = int.from_bytes(content[:4], "big")
        at = end
    if colour == _RGB and bits == 16 and key:
        raise PictureError(
            f"{where} must not mark a transparent colour in 16 bits, which cannot be compared exactly: "
            "save it with an alpha channel."
        )
    orientation, notes = orientation_of(exif)
    return Container(
        "PNG",
        width,
        height,
        (*parts, _END),
        orientation,
        (*notes, f"first of {frames} frames used") if frames > 1 else notes,
        samples=2 if colour == _GREY_ALPHA else 0,
        bits=bits,
        key=struct.unpack(">HHH" if colour == _RGB else ">H", key) if key else None,
    )


def check_rows(container: Container) -> None:
    """Damaged where the compressed data end before the last row, which Pillow fills with zeros without a word.

    Costs as much as decoding: call it where the decoded picture ends in zeros.
    """
    wanted, got = _inflated_size(bytes(container.parts[1])[8:-4]), 0
    inflate = zlib.decompressobj()
    for part in container.parts:
        rest = bytes(part[8:-4]) if part[4:8] == b"IDAT" else b""
        while rest and got < wanted:
            got += len(inflate.decompress(rest, _PIECE))
            rest = inflate.unconsumed_tail
    if got < wanted:
        raise Damaged("its pixels end before its last row")


def _inflated_size(header: bytes) -> int:
    """Bytes of all rows, each with one byte for its filter; interlaced files send seven small pictures."""
    width, height, bits, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    size = 0
    for left, top, across, down in _ADAM7 if interlaced else _ONE_PASS:
        columns, rows = (width - left + across - 1) // across, (height - top + down - 1) // down
        if columns > 0:
            size += rows * (1 + (columns * bits * _CHANNELS[colour] + 7) // 8)
    return size


def _chunk(view: memoryview, at: int) -> tuple[bytes, memoryview, int]:
    """Name, content and end of the chunk at `at`."""
    (length,) = struct.unpack_from(">I", view, at)
    end = at + 12 + length
    if end > len(view):
        raise Damaged("it ends in the middle of a chunk")
    return bytes(view[at + 4 : at + 8]), view[at + 8 : end - 4], end


def _check(kind: bytes, named: memoryview) -> None:
    """`named` is the name, the content and the checksum of a chunk."""
    if zlib.crc32(named[:-4]) != int.from_bytes(named[-4:], "big"):
        raise Damaged(f"its {kind.decode('ascii')} chunk fails its checksum")
