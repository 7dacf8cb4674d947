"""The directory of tags that TIFF files and EXIF blocks share (TIFF 6.0 section 2; BigTIFF).

Values are read only when asked for, so a broken entry that nobody needs does no harm.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from regraft.picture_files.container import Damaged

_ORIENTATION = 274
_INTEGERS = {1: "u1", 3: "u2", 4: "u4", 16: "u8"}
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}

Entry = tuple[int, int, bytes]
"""Type, count, and the field of 4 (BigTIFF: 8) bytes that holds the value or the place where it lies."""


@dataclass(frozen=True)
class Directory:
    """Entries by tag; `order` is < or > as in struct; `following` is where the next page's directory lies, or 0."""

    data: bytes
    order: str
    big: bool
    entries: dict[int, Entry]
    following: int

    def content(self, tag: int) -> bytes:
        """The bytes under a tag that is there; Damaged where they lie outside the file."""
        kind, count, field = self.entries[tag]
        size = count * _SIZES[kind]
        if size <= len(field):
            return field[:size]
        (at,) = struct.unpack(self.order + ("Q" if self.big else "I"), field)
        if at + size > len(self.data):
            raise Damaged(f"it ends in the middle of tag {tag}")
        return self.data[at : at + size]

    def numbers(self, tag: int) -> npt.NDArray[np.int64]:
        """The integers under `tag`, none if it is absent."""
        if tag not in self.entries:
            return np.zeros(0, np.int64)
        values = np.frombuffer(self.content(tag), self.order + _INTEGERS[self.entries[tag][0]]).astype(np.int64)
        if (values < 0).any():
            raise Damaged(f"its tag {tag} is too large")
        return values

    def number(self, tag: int, default: int | None = None) -> int:
        """The single integer under `tag`, or `default` where it is absent."""
        values = self.numbers(tag)
        if not len(values) and default is not None:
            return default
        if len(values) != 1:
            raise Damaged(f"its tag {tag} must hold one number")
        return int(values[0])


def read_directory(data: bytes) -> Directory:
    """The first directory; Damaged, KeyError or struct.error where there is none."""
    order = {b"II": "<", b"MM": ">"}[data[:2]]
    big = struct.unpack_from(order + "H", data, 2)[0] == 43
    word, count_word, row = ("Q", "Q", "HHQ8s") if big else ("I", "H", "HHI4s")
    (at,) = struct.unpack_from(order + word, data, 8 if big else 4)
    (count,) = struct.unpack_from(order + count_word, data, at)
    at += struct.calcsize(order + count_word)
    end = at + count * struct.calcsize(order + row)
    if end > len(data):
        raise Damaged("it ends in the middle of its directory")
    entries = {tag: (kind, n, field) for tag, kind, n, field in struct.iter_unpack(order + row, data[at:end])}
    tail = data[end : end + struct.calcsize(order + word)]
    return Directory(data, order, big, entries, int.from_bytes(tail, "little" if order == "<" else "big"))


def orientation_of(exif: bytes) -> tuple[int, tuple[str, ...]]:
    """Orientation 1 to 8 of an EXIF block (1 if there is none), and a note if the block is broken."""
    if not exif:
        return 1, ()
    try:
        value = read_directory(exif.removeprefix(b"Exif\0\0")).number(_ORIENTATION, 1)
    except (Damaged, KeyError, struct.error):
        return 1, ("broken EXIF block ignored",)
    if value > 8:
        return 1, (f"unknown orientation {value} ignored",)
    return max(value, 1), ()  # some cameras write 0 for "not known"
