"""The wire format of protocol buffers: fields by number, without schemas and without trust.

    message = field*        field = key value        key = varint(number << 3 | type)
    type 0: varint          1: 8 bytes          2: varint length, then as many bytes          5: 4 bytes

Only what is asked for is decoded further; nothing is copied and no length is believed beyond the bytes that are there.
Knows bytes alone, not what the fields mean. Not covered: groups (types 3 and 4, gone since 2008), writing.

Source: "Encoding", protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

FIELDS = 2_000_000
"""The most fields that one message may have: a decoded field takes much more memory than the bytes of an empty one."""

FIXED = {1: 8, 5: 4}

Found = TypeVar("Found")


@dataclass(frozen=True)
class Message:
    """The bytes of a message, decoded one level deep when a field is asked for.

    Of a field that stands several times where one value is meant, the last counts, as protocol buffers have it; a field
    that is absent has the value 0, False, "" or the empty message. Every method raises ValueError when the bytes are
    no message or the field is of another type.
    """

    data: memoryview

    @cached_property
    def fields(self) -> Mapping[int, list[int | memoryview]]:
        """Values by field number, in their order: integers for types 0, 1 and 5, bytes for type 2."""
        found: dict[int, list[int | memoryview]] = {}
        for count, (number, value) in enumerate(_fields(self.data)):
            if count == FIELDS:
                raise ValueError(f"a message with more than {FIELDS:,} fields")
            found.setdefault(number, []).append(value)
        return found

    def integer(self, number: int) -> int:
        """An int32, int64, enum or bool (as signed 64 bits)."""
        return _signed(self._last(number, int, 0))

    def unsigned(self, number: int) -> int:
        """A fixed32, fixed64 or uint64."""
        return self._last(number, int, 0)

    def float32(self, number: int) -> float:
        """A float."""
        return float(struct.unpack("<f", struct.pack("<I", self._last(number, int, 0) & 0xFFFFFFFF))[0])

    def content(self, number: int) -> memoryview:
        """Bytes."""
        return self._last(number, memoryview, memoryview(b""))

    def text(self, number: int) -> str:
        """A string."""
        return bytes(self.content(number)).decode("utf-8", "replace")

    def message(self, number: int) -> Message:
        """A message in this one."""
        return Message(self.content(number))

    def contents(self, number: int) -> list[memoryview]:
        """Repeated bytes."""
        return [_is(value, memoryview, number) for value in self.fields.get(number, [])]

    def texts(self, number: int) -> list[str]:
        """Repeated strings."""
        return [bytes(value).decode("utf-8", "replace") for value in self.contents(number)]

    def messages(self, number: int) -> list[Message]:
        """Repeated messages."""
        return [Message(value) for value in self.contents(number)]

    def integers(self, number: int) -> list[int]:
        """Repeated int32, int64, enum or bool, packed or not."""
        found: list[int] = []
        for value in self.fields.get(number, []):
            found += [value] if isinstance(value, int) else varints(value)
        return [_signed(value) for value in found]

    def packed(self, number: int, size: int) -> bytes:
        """Repeated fixed values of `size` bytes, packed or not, side by side as the file has them."""
        parts = [v.to_bytes(size, "little") if isinstance(v, int) else v for v in self.fields.get(number, [])]
        return b"".join(parts)

    def by_name(self, number: int) -> dict[str, Message]:
        """A map from strings to messages."""
        return {entry.text(1): entry.message(2) for entry in self.messages(number)}

    def has(self, number: int) -> bool:
        """Whether the field is there at all."""
        return number in self.fields

    def _last(self, number: int, kind: type[Found], default: Found) -> Found:
        values = self.fields.get(number)
        return _is(values[-1], kind, number) if values else default


def varint(data: memoryview, at: int) -> tuple[int, int]:
    """The integer of 1 to 10 bytes that begins at `at`, below 2**64, and where it ends; ValueError when it is cut."""
    value = 0
    for count in range(10):
        if at + count >= len(data):
            break
        byte = data[at + count]
        value |= (byte & 0x7F) << (7 * count)
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, at + count + 1
    raise ValueError(f"an integer that has no end at byte {at:,}")


def varints(data: memoryview) -> list[int]:
    """The integers that stand side by side in `data`."""
    return list(_each(data, varint))


def _each(data: memoryview, read: Callable[[memoryview, int], tuple[Found, int]]) -> Iterator[Found]:
    at = 0
    while at < len(data):
        value, at = read(data, at)
        yield value


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    return _each(data, _field)


def _field(data: memoryview, at: int) -> tuple[tuple[int, int | memoryview], int]:
    key, start = varint(data, at)
    number, kind = key >> 3, key & 7
    if number == 0:
        raise ValueError(f"a field without a number at byte {at:,}")
    if kind == 0:
        value, end = varint(data, start)
        return (number, value), end
    if kind == 2:
        size, start = varint(data, start)
    elif kind in FIXED:
        size = FIXED[kind]
    else:
        raise ValueError(f"a field of the unknown type {kind} at byte {at:,}")
    if size > len(data) - start:
        raise ValueError(f"a field of {size:,} bytes at byte {at:,}, where {len(data) - start:,} are left")
    content = data[start : start + size]
    return (number, content if kind == 2 else int.from_bytes(content, "little")), start + size


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _is(value: int | memoryview, kind: type[Found], number: int) -> Found:
    if not isinstance(value, kind):
        raise ValueError(f"field {number} of another type than it must be")
    return value
