"""The attributes of an HDF5 group as they lie in the file, looked at before HDF5 is asked to read them.

A text of any length lies in a heap, and the attribute holds its length, the address of the heap and a number there.
HDF5 makes room for whatever the length says, and looks for the end of a damaged heap for ever; so both are held
against the file first.

    object header   version 1: 16 bytes, then messages; version 2: OHDR, then messages; either goes on elsewhere
    attribute       message 12: version, sizes of name, type and space, then those, then the values
    heap            GCOL: size, then entries of number, count, length and content; number 0 is the free rest

Knows the format (HDF5 File Format Specification 3.0), not what the texts mean. Not covered: attributes in a heap of
their own, which HDF5 makes for more than eight large ones; they are refused.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator

Data = bytes | mmap.mmap
NOWHERE = (1 << 64) - 1
BLOCKS = 1000
CONTINUED, ATTRIBUTE, ATTRIBUTE_INFO = 0x10, 0x0C, 0x15
SHARED = 2
VARIABLE_LENGTH = 9


class Damaged(Exception):
    """A structure that does not fit the file; the words say which."""


def check_file(data: Data) -> None:
    """Raises Damaged for a file whose addresses are not 8 bytes long or do not count from its start."""
    at = {0: (13, 24), 1: (13, 28), 2: (9, 12), 3: (9, 12)}.get(data[8])
    if at is None or data[at[0] : at[0] + 2] != b"\x08\x08" or data[at[1] : at[1] + 8] != bytes(8):
        raise Damaged("its addresses must be 8 bytes long and count from its start")


def check_texts(data: Data, address: int) -> None:
    """Raises Damaged when a text among the attributes of the object at `address` does not lie in the file."""
    for kind, flags, body in _messages(data, address):
        try:
            if kind == ATTRIBUTE_INFO and _has_heap(body):
                raise Damaged("its attributes lie in a heap of their own, which is not read")
            if kind == ATTRIBUTE:
                if flags & SHARED:
                    raise Damaged("an attribute is shared, which is not read")
                _check_attribute(data, body)
        except (struct.error, IndexError) as e:
            raise Damaged(f"the header at byte {address} is damaged") from e


def _messages(data: Data, address: int) -> Iterator[tuple[int, int, bytes]]:
    """Kind, flags and content of the messages of an object header."""
    new = data[address : address + 4] == b"OHDR"
    head, ordered = struct.Struct("<BHB" if new else "<HHB3x"), 0
    try:
        if new:
            flags = data[address + 5]
            ordered = 2 if flags & 4 else 0
            start = address + 6 + (16 if flags & 0x20 else 0) + (4 if flags & 0x10 else 0)
            width = 1 << (flags & 3)
            blocks = [(start + width, int.from_bytes(data[start : start + width], "little"))]
        else:
            blocks = [(address + 16, struct.unpack("<I", data[address + 8 : address + 12])[0])]
    except (struct.error, IndexError) as e:
        raise Damaged(f"the header at byte {address} is damaged") from e
    for place, size in blocks:
        end = place + size
        if end > len(data) or len(blocks) > BLOCKS:
            raise Damaged(f"the header at byte {address} is longer than the file")
        while place + head.size + ordered <= end:
            kind, length, flags = head.unpack(data[place : place + head.size])
            place += head.size + ordered
            if place + length > end:
                raise Damaged(f"the header at byte {address} is damaged")
            body = bytes(data[place : place + length])
            place += length
            if kind == CONTINUED and length >= 16:
                at, more = struct.unpack("<QQ", body[:16])
                blocks.append((at + 4, max(0, more - 8)) if new else (at, more))
            yield kind, flags, body


def _has_heap(body: bytes) -> bool:
    start = 4 if body[1] & 1 else 2
    return bool(struct.unpack("<Q", body[start : start + 8])[0] != NOWHERE)


def _check_attribute(data: Data, body: bytes) -> None:
    version, flags, name, kind, space = struct.unpack("<BBHHH", body[:8])
    if version not in (1, 2, 3) or (version > 1 and flags):
        raise Damaged("an attribute is of a kind that is not read")
    if version == 1:  # each part is filled up to 8 bytes
        name, kind, space = (-(-size // 8) * 8 for size in (name, kind, space))
    start = (9 if version == 3 else 8) + name
    if body[start] & 15 != VARIABLE_LENGTH:
        return
    values = body[start + kind + space :]
    for at in range(0, len(values) - 15, 16):
        length, heap, _ = struct.unpack("<IQI", values[at : at + 16])
        if length > len(data):
            raise Damaged(f"a text declares {length:,} bytes in a file of {len(data):,}")
        if length:
            _check_heap(data, heap)


def _check_heap(data: Data, heap: int) -> None:
    """Its entries must follow each other to its end."""
    if heap + 16 > len(data) or data[heap : heap + 4] != b"GCOL":
        raise Damaged(f"there is no heap of texts at byte {heap}")
    end = heap + int(struct.unpack("<Q", data[heap + 8 : heap + 16])[0])
    if end > len(data):
        raise Damaged(f"the heap of texts at byte {heap} is longer than the file")
    place = heap + 16
    while place + 16 <= end:
        number, length = struct.unpack("<H6xQ", data[place : place + 16])
        step = 16 + -(-length // 8) * 8 if number else length
        if step < 16 or place + step > end:
            raise Damaged(f"the heap of texts at byte {heap} is damaged")
        place += step
