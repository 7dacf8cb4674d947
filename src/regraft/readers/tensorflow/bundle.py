"""The files of a TensorFlow checkpoint: `PREFIX.index` and `PREFIX.data-00000-of-0000N`, or the one file of old.

The index is a table from the name of each tensor to its type, shape, shard, place and checksum. A tensor is read only
when it is asked for, after its place was compared with the length of its shard; what was read is compared with its
checksum. Files are opened where the prefix says, under names made here: nothing in a checkpoint names a file.

Knows stored names, not which of them are weights. Not covered: tensors stored in slices (partitioned variables), which
are refused by name, and checkpoints of big-endian machines.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from regraft.errors import ReaderError
from regraft.printable import printable
from regraft.readers.onnx.tensors import Allowance
from regraft.readers.protobuf_wire import Message, varint
from regraft.readers.tensorflow.crc32c import crc32c, masked
from regraft.readers.tensorflow.table import FOOTER, is_table, read_table
from regraft.readers.tensorflow.tensors import STRING, allowance, dtype_of, fixed_shape, read_values

INDEX = ".index"
LONGEST_INDEX = 1 << 30


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: TensorFlow's number of its type, shape, shard, first byte, bytes, masked CRC-32C."""

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    checksum: int


@dataclass(frozen=True)
class Bundle:
    """A checkpoint whose index was read. `prefix` is the text that its files begin with; its last part may be empty."""

    prefix: str
    shards: int
    entries: Mapping[str, Entry]

    def shard(self, number: int) -> Path:
        """The file of a shard."""
        return Path(f"{self.prefix}.data-{number:05d}-of-{self.shards:05d}")

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """The bytes of each shard; ReaderError where one is missing."""
        return tuple(_size(self.shard(i), self) for i in range(self.shards))


def open_bundle(prefix: str) -> Bundle:
    """Read the index at `prefix`; ReaderError where it or a shard is missing or not what it must be."""
    path = Path(prefix + INDEX)
    try:
        table = read_table(memoryview(_read_whole(path)))
        header = Message(memoryview(table.pop(b"", b"")))
        if header.integer(2) != 0:
            raise ValueError("it was written on a big-endian machine")
        shards = header.integer(1)
        if not 0 < shards < 100_000:
            raise ValueError(f"it speaks of {shards} shards")
        found = {key.decode("utf-8", "replace"): _entry(key, Message(memoryview(v))) for key, v in table.items()}
    except ValueError as e:
        raise _damaged(f"{path} must be the index of a TensorFlow checkpoint", e) from e
    bundle = Bundle(prefix, shards, found)
    _require_places(bundle)
    return bundle


def read_tensor(bundle: Bundle, name: str) -> torch.Tensor:
    """One tensor as stored; ReaderError where its type is not one of numbers or its bytes are not those written."""
    entry = bundle.entries[name]
    path = bundle.shard(entry.shard)
    try:
        dtype = dtype_of(entry.dtype)
        if entry.size != math.prod(entry.shape) * dtype.itemsize:
            raise ValueError(f"it has shape {list(entry.shape)} and {entry.size:,} bytes")
        data = _read_part(path, entry)
    except ValueError as e:
        raise _damaged(f"{path} must hold {printable(name)!r} as it was written", e) from e
    return (torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)).reshape(entry.shape)


def read_string(bundle: Bundle, name: str) -> bytes:
    """A single string; ReaderError as `read_tensor`."""
    entry = bundle.entries[name]
    path = bundle.shard(entry.shard)
    try:
        if entry.dtype != STRING or entry.shape != ():
            raise ValueError("it must be one string")
        data = memoryview(_read_bytes(path, entry))
        size, at = varint(data, 0)  # then the checksum of the size, 4 bytes, and the string itself
        if at + 4 + size != len(data):
            raise ValueError(f"it says {size:,} bytes and has {len(data) - at - 4:,}")
        plain = bytes(data[at + 4 :])
        if masked(crc32c(size.to_bytes(4, "little") + bytes(data[at : at + 4]) + plain)) != entry.checksum:
            raise ValueError("its checksum is wrong")
        return plain
    except ValueError as e:
        raise _damaged(f"{path} must hold {printable(name)!r} as it was written", e) from e


def is_old_checkpoint(path: Path) -> bool:
    """Whether this is a file of the format before 2016, which holds a whole checkpoint."""
    try:
        with open(path, "rb") as f:
            f.seek(-FOOTER, os.SEEK_END)
            return is_table(f.read())
    except OSError:
        return False


def read_old_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of numbers in a checkpoint of the old format; ReaderError where it is damaged or in slices."""
    try:
        table = read_table(memoryview(_read_whole(path)))
        allowed = allowance(path)
        listed = {meta.text(1): meta for meta in Message(memoryview(table.pop(b"", b""))).message(1).messages(1)}
        found: dict[str, torch.Tensor] = {}
        for value in table.values():
            part = Message(memoryview(value)).message(2)
            found[part.text(1)] = _old_tensor(part, listed.get(part.text(1)), allowed)
    except ValueError as e:
        raise _damaged(f"{path} must be a TensorFlow checkpoint of the old format", e) from e
    if missing := sorted(listed.keys() - found.keys()):
        raise ReaderError(f"{path} must hold every tensor that it lists; {printable(missing[0])!r} is not there.")
    return found


def _old_tensor(part: Message, listed: Message | None, allowed: Allowance) -> torch.Tensor:
    """The tensor of a SavedSlice; its shape and type stand in the list of all tensors alone."""
    if listed is None or any(extent.has(2) for extent in part.message(2).messages(1)):
        raise ValueError(f"{part.text(1)!r} is stored in slices or not listed, which cannot be read")
    dtype = dtype_of(listed.integer(3))
    array = read_values(part.message(3), listed.integer(3), fixed_shape(listed.message(2)), allowed)
    return torch.from_numpy(array).to(dtype)


def _entry(key: bytes, proto: Message) -> Entry:
    if proto.has(7):
        raise ValueError(f"{key.decode('utf-8', 'replace')!r} is stored in slices, which cannot be read")
    shape = fixed_shape(proto.message(2))
    return Entry(
        proto.integer(1), shape, proto.integer(3), proto.integer(4), proto.integer(5), proto.unsigned(6) & 0xFFFFFFFF
    )


def _require_places(bundle: Bundle) -> None:
    """Every entry must lie in its shard, and all together be no more than the shards."""
    for name, entry in bundle.entries.items():
        if not 0 <= entry.shard < bundle.shards:
            raise ReaderError(
                f"{bundle.prefix}{INDEX} puts {printable(name)!r} into shard {entry.shard}, a missing one."
            )
        size = bundle.sizes[entry.shard]
        if entry.offset < 0 or entry.size < 0 or entry.offset + entry.size > size:
            raise ReaderError(
                f"{bundle.shard(entry.shard)} must be as long as its index says; it ends at byte {size:,}, and "
                f"{printable(name)!r} at byte {entry.offset + entry.size:,}: get the file from its source again."
            )
    if sum(entry.size for entry in bundle.entries.values()) > sum(bundle.sizes):
        raise ReaderError(f"{bundle.prefix}{INDEX} lists more bytes than its shards have, so it is damaged.")


def _read_part(path: Path, entry: Entry) -> bytearray:
    data = _read_bytes(path, entry)
    if masked(crc32c(data)) != entry.checksum:
        raise ValueError("its checksum is wrong")
    return data


def _read_bytes(path: Path, entry: Entry) -> bytearray:
    data = bytearray(entry.size)
    with open(path, "rb") as f:
        f.seek(entry.offset)
        if f.readinto(data) != entry.size:
            raise ValueError("the file is shorter than it was")
    return data


def _read_whole(path: Path) -> bytes:
    try:
        status = path.stat()
    except OSError as e:
        raise ReaderError(f"A TensorFlow checkpoint must have an index; {path} is not there.") from e
    if not stat.S_ISREG(status.st_mode) or status.st_size > LONGEST_INDEX:
        raise ReaderError(f"{path} must be a plain file of at most 1 GiB to be the index of a TensorFlow checkpoint.")
    return path.read_bytes()


def _size(path: Path, bundle: Bundle) -> int:
    try:
        status = path.stat()
    except OSError as e:
        raise ReaderError(
            f"The checkpoint {bundle.prefix} consists of {bundle.shards} shard(s) beside its index; {path} is missing: "
            "copy all files of the checkpoint into one folder."
        ) from e
    if not stat.S_ISREG(status.st_mode):
        raise ReaderError(f"{path} must be a plain file to be a shard of a TensorFlow checkpoint.")
    return status.st_size


def _damaged(what: str, why: ValueError) -> ReaderError:
    return ReaderError(f"{what}; {printable(str(why)[:300])}: get the file from its source again.")
