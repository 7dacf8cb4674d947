"""JPEG files (ITU-T T.81): segments and scan headers up to the end of the first picture.

Knows nothing of Huffman codes. What follows the picture (the further pictures of an MPO, a gain
map, rubbish) is not looked at.
"""

from __future__ import annotations

import re
import struct

from regraft.errors import PictureError
from regraft.picture_files.container import Container, Damaged, check_size
from regraft.picture_files.directory import orientation_of

MAX_SCANS = 100
"""A file of very many tiny scans costs a full pass over the picture for each; encoders write about ten."""

_FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})
_PROGRESSIVE = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
_SCAN, _END, _APP1 = 0xDA, 0xD9, 0xE1
_NEXT_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")


def read_jpeg(data: bytes, where: str) -> Container:
    """Size, samples and orientation; Damaged where scans are missing.

    A progressive file that ends between two scans decodes without a word to a blurred picture, so each coefficient
    of each component must have been sent down to its last bit (T.81, G.1).
    """
    marker, at, scans, frame, exif = 0, 2, 0, b"", b""
    missing: dict[int, list[int]] = {}
    progressive = False
    while marker != _END:
        marker, segment, at = _segment(data, at)
        if marker == _APP1 and segment[:6] == b"Exif\0\0" and not exif:
            exif = segment
        elif marker in _FRAMES and not frame:
            frame, progressive = segment, marker in _PROGRESSIVE
            height, width = struct.unpack_from(">HH", frame, 1)
            check_size(width, height, where)
            missing = {component: [1] * 64 for component in segment[6 : 6 + 3 * segment[5] : 3]}
        elif marker == _SCAN:
            _strike(segment, missing, progressive)
            at, scans = _end_of_scan(data, at), scans + 1
            if scans > MAX_SCANS:
                raise Damaged(f"it has over {MAX_SCANS} scans")
    if missing:
        raise Damaged("its last scans are missing")
    bits, height, width, samples = struct.unpack_from(">BHHB", frame)
    if bits != 8 or samples not in (1, 3, 4):
        raise PictureError(
            f"{where} must have 1, 3 or 4 samples of 8 bits a pixel to be read as JPEG, but it has {samples} of "
            f"{bits} bits: save it as PNG."
        )
    orientation, notes = orientation_of(exif)
    return Container("JPEG", width, height, (data,), orientation, notes, samples)


def _segment(data: bytes, at: int) -> tuple[int, bytes, int]:
    """Marker, content and end of the segment at `at`; fill bytes before a marker are allowed (T.81, B.1.1.2)."""
    if data[at] != 0xFF:
        raise Damaged("its segments do not follow each other")
    while data[at] == 0xFF:
        at += 1
    marker, at = data[at], at + 1
    if 0xD0 <= marker <= 0xD9 or marker == 0x01:
        return marker, b"", at
    end = at + struct.unpack_from(">H", data, at)[0]
    if not at + 2 <= end <= len(data):
        raise Damaged("it ends in the middle of a segment")
    return marker, data[at + 2 : end], end


def _strike(scan: bytes, missing: dict[int, list[int]], progressive: bool) -> None:
    """Strike from `missing` what this scan brings: bits still to come, for each coefficient of each component."""
    n = scan[0]
    first, last, bit = scan[1 + 2 * n], scan[2 + 2 * n], scan[3 + 2 * n] & 15
    for component in scan[1 : 1 + 2 * n : 2]:
        left = missing.get(component, [])
        left[first : last + 1] = [bit] * len(left[first : last + 1])
        if not progressive or not any(left):
            missing.pop(component, None)


def _end_of_scan(data: bytes, at: int) -> int:
    found = _NEXT_MARKER.search(data, at)
    if found is None:
        raise Damaged("it ends in the middle of its pixels")
    return found.start()
