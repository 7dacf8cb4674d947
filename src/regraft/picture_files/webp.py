"""WebP files (RIFF): size from the first chunk, orientation, and of an animation only the first frame."""

from __future__ import annotations

import struct

from regraft.picture_files.container import Container, Damaged, check_size
from regraft.picture_files.directory import orientation_of

_ANIMATED, _EXIF = 0x02, 0x08


def read_webp(data: bytes, where: str) -> Container:
    """The RIFF length must lie within the file; what follows it is not looked at."""
    size, kind = int.from_bytes(data[4:8], "little") + 8, data[12:16]
    if size > len(data):
        raise Damaged("it is shorter than it says")
    view = memoryview(data)[:size]
    if kind == b"VP8X":
        return _extended(view, data[20], where)
    if kind == b"VP8 ":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
    elif kind == b"VP8L":
        (packed,) = struct.unpack_from("<I", data, 21)
        width, height = (packed & 0x3FFF) + 1, (packed >> 14 & 0x3FFF) + 1
    else:
        raise Damaged("its first chunk is unknown")
    check_size(width, height, where)
    return Container("WEBP", width, height, (view,))


def _extended(view: memoryview, flags: int, where: str) -> Container:
    """Chunks are walked only as far as needed: to the second frame, and to the EXIF block if there is one."""
    width, height = (int.from_bytes(view[at : at + 3], "little") + 1 for at in (24, 27))
    check_size(width, height, where)
    exif, frames, at = b"", 0, 12
    parts: list[memoryview] = []
    while at + 8 <= len(view) and ((flags & _ANIMATED and frames < 2) or (flags & _EXIF and not exif)):
        kind, length = bytes(view[at : at + 4]), int.from_bytes(view[at + 4 : at + 8], "little")
        end = at + 8 + length + (length & 1)
        frames += kind == b"ANMF"
        if kind == b"EXIF":
            exif = bytes(view[at + 8 : at + 8 + length])
        elif kind in (b"VP8X", b"ANIM") or (kind == b"ANMF" and frames == 1):
            parts.append(view[at:end])
        at = end
    orientation, notes = orientation_of(exif)
    if not flags & _ANIMATED:
        return Container("WEBP", width, height, (view,), orientation, notes)
    if frames > 1:
        notes = (*notes, "first of several frames used")
    head = b"RIFF" + struct.pack("<I", 4 + sum(map(len, parts))) + b"WEBP"
    return Container("WEBP", width, height, (head, *parts), orientation, notes)
