"""GIF files (GIF89a): screen, palette, graphic control and picture of the first frame.

One look behind the first frame tells whether there are more; the others are not walked.
"""

from __future__ import annotations

import struct

from regraft.picture_files.container import Container, Damaged, check_size

_EXTENSION, _PICTURE, _GRAPHIC_CONTROL = 0x21, 0x2C, 0xF9


def read_gif(data: bytes, where: str) -> Container:
    """The size is that of the screen, or larger where the first frame reaches beyond it."""
    view = memoryview(data)
    width, height = struct.unpack_from("<HH", data, 6)
    at = screen = 13 + _palette_size(data[10])
    control = view[:0]
    while data[at] == _EXTENSION:
        end = _end_of_blocks(data, at + 2)
        if data[at + 1] == _GRAPHIC_CONTROL:
            control = view[at:end]
        at = end
    if data[at] != _PICTURE:
        raise Damaged("its blocks do not follow each other")
    left, top, frame_width, frame_height, flags = struct.unpack_from("<HHHHB", data, at + 1)
    width, height = max(width, left + frame_width), max(height, top + frame_height)
    check_size(width, height, where)
    end = _end_of_blocks(data, at + 11 + _palette_size(flags))
    notes = ("first of several frames used",) if _has_more(data, end) else ()
    return Container("GIF", width, height, (view[:screen], control, view[at:end], b";"), notes=notes)


def _palette_size(flags: int) -> int:
    """Bytes of the colour table that the flags announce."""
    return 6 << (flags & 7) if flags & 0x80 else 0


def _end_of_blocks(data: bytes, at: int) -> int:
    while length := data[at]:
        at += length + 1
    return at + 1


def _has_more(data: bytes, at: int) -> bool:
    try:
        while data[at] == _EXTENSION:
            at = _end_of_blocks(data, at + 2)
        return data[at] == _PICTURE
    except IndexError:
        return False
