"""The sorted table of keys and values that TensorFlow keeps the index of a checkpoint in (LevelDB's table format).

    file = block* index footer      block = entry* restarts, type (1 byte), masked CRC-32C (4 bytes)
    entry = shared, unshared, size (varints), the key from `shared` on, the value
    footer = places of two blocks, padding, magic (48 bytes); the second block lists the places of all others

Knows bytes, not what keys and values mean. Not covered: blocks compressed with Snappy, which TensorFlow never writes
for checkpoints; lookup of a single key.

Source: LevelDB, doc/table_format.md.
"""

from __future__ import annotations

from collections.abc import Iterator

from regraft.readers.protobuf_wire import varint
from regraft.readers.tensorflow.crc32c import crc32c, masked

MAGIC = 0xDB4775248B80FB57
FOOTER = 48
TRAILER = 5
SHARING = 64
"""Keys name only what differs from the key before; all of them together may be so many times as long as the file."""


def is_table(tail: bytes) -> bool:
    """Whether the last bytes of a file are those of a table."""
    return len(tail) >= FOOTER and int.from_bytes(tail[-8:], "little") == MAGIC


def read_table(data: memoryview) -> dict[bytes, bytes]:
    """All keys and values of a table, in their order.

    Raises ValueError where the bytes are no table, a block is damaged or compressed, or blocks lie on one another.
    """
    if not is_table(bytes(data[-FOOTER:])):
        raise ValueError("the end of a table is missing")
    footer = data[-FOOTER:]
    _, at = _place(footer, 0)
    place, _ = _place(footer, at)
    found: dict[bytes, bytes] = {}
    end, left = 0, SHARING * len(data)
    for _, value in _entries(_block(data, place)):
        start, size = _place(memoryview(value), 0)[0]
        if start < end:
            raise ValueError(f"the block at byte {start:,} lies on the one before it")
        end = start + size
        for key, content in _entries(_block(data, (start, size))):
            found[key] = content
            left -= len(key)
            if left < 0:
                raise ValueError("the keys are far longer than the file")
    return found


def _place(data: memoryview, at: int) -> tuple[tuple[int, int], int]:
    start, at = varint(data, at)
    size, at = varint(data, at)
    return (start, size), at


def _block(data: memoryview, place: tuple[int, int]) -> memoryview:
    start, size = place
    if start + size + TRAILER > len(data) - FOOTER:
        raise ValueError(f"a block of {size:,} bytes at byte {start:,} ends outside the file")
    kind = data[start + size]
    if masked(crc32c(data[start : start + size + 1])) != _word(data, start + size + 1):
        raise ValueError(f"the checksum of the block at byte {start:,} is wrong")
    if kind != 0:
        raise ValueError(f"the block at byte {start:,} is compressed (type {kind}), which TensorFlow does not write")
    return data[start : start + size]


def _entries(block: memoryview) -> Iterator[tuple[bytes, bytes]]:
    if len(block) < 4 or (end := len(block) - 4 - 4 * _word(block, len(block) - 4)) < 0:
        raise ValueError("a block without its restarts")
    block, at, key = block[:end], 0, b""
    while at < end:
        shared, at = varint(block, at)
        unshared, at = varint(block, at)
        size, at = varint(block, at)
        if shared > len(key) or unshared + size > end - at:
            raise ValueError("an entry that ends outside its block")
        key = key[:shared] + bytes(block[at : at + unshared])
        yield key, bytes(block[at + unshared : at + unshared + size])
        at += unshared + size


def _word(data: memoryview, at: int) -> int:
    return int.from_bytes(data[at : at + 4], "little")
