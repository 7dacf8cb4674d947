"""HDF5 files of weights, read whole and suspiciously.

Admitted are groups and plain arrays of numbers of the file itself, stored as they are or packed with gzip (and
shuffled). Refused are soft and external links, data of other files (external storage, virtual data sets), other
filters, text and compound types as arrays, groups inside themselves, and arrays for which the file is too short.
Nothing is allocated before that is known.

Knows HDF5 through h5py, nothing of networks. Not covered: flipped bits, which the format does not notice.
"""

from __future__ import annotations

import contextlib
import io
import math
import mmap
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from regraft.errors import ReaderError
from regraft.printable import printable
from regraft.readers.keras.hdf5_headers import Damaged, Data, check_file, check_texts

MAGIC = b"\x89HDF\r\n\x1a\n"
GROWTH = 64
"""At most so many times its size a file may become by unpacking: weights hardly shrink at all."""
DEFLATE, SHUFFLE = 1, 2
LARGEST_ITEM = 8
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Tree:
    """What a file holds, by path (`layers/conv2d/vars/0`; the root is the empty path).

    arrays: numbers in the byte order of this machine, in the order in which they lie in the file, which is that of
    writing; skipped: arrays that were not wanted; attributes: of groups, those that are text or lists of text.
    """

    groups: frozenset[str]
    arrays: Mapping[str, Array] = field(repr=False)
    skipped: tuple[str, ...] = ()
    attributes: Mapping[str, Mapping[str, str | tuple[str, ...]]] = field(default_factory=dict, repr=False)

    def text(self, group: str, name: str) -> str | None:
        """An attribute that is one text; None where there is none."""
        value = self.attributes.get(group, {}).get(name)
        return value if isinstance(value, str) else None

    def texts(self, group: str, name: str) -> tuple[str, ...] | None:
        """An attribute that is a list of texts, also where its length made the writer split it into name0, name1."""
        found = self.attributes.get(group, {})
        value = found.get(name)
        if value is None and f"{name}0" in found:
            parts = [found.get(f"{name}{i}") for i in range(len(found))]
            return tuple(text for part in parts if part for text in ((part,) if isinstance(part, str) else part))
        return (value,) if isinstance(value, str) else value


def read_tree(path: Path, content: bytes | None = None, *, skip: Callable[[str], bool] = lambda _: False) -> Tree:
    """All groups, arrays and attributes of the file at `path`, or of its `content` where that was read already.

    skip: arrays, by path, that are checked but not read. Raises ReaderError naming the file and the entry.
    """
    try:
        import h5py
    except ImportError as e:
        raise ReaderError("Reading HDF5 needs the package h5py: run `pip install regraft[keras]`.") from e
    shown = printable(str(path))
    try:
        with _raw(path, content) as data:
            check_file(data)
            with h5py.File(path if content is None else io.BytesIO(content), "r") as file:
                return _read(h5py, file, data, skip)
    except (_Refused, Damaged) as e:
        raise ReaderError(f"{shown} must hold plain arrays of its own; {printable(str(e))}.") from e
    except MemoryError as e:
        raise ReaderError(f"Reading {shown} needs more memory than there is: its arrays are too large.") from e
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, OverflowError, AttributeError, zlib.error) as e:
        raise ReaderError(f"{shown} must be a whole HDF5 file; it cannot be read: {_first(e)}.") from e


class _Refused(Exception):
    """An entry that is not admitted; the words say which and why."""


class _Allowance:
    """How many bytes the arrays may still claim to occupy in the file, and to be worth when unpacked."""

    def __init__(self, size: int) -> None:
        self.size, self.stored, self.unpacked = size, size, GROWTH * size

    def take(self, name: str, stored: int, unpacked: int) -> None:
        self.stored -= stored
        self.unpacked -= unpacked
        if min(self.stored, self.unpacked) < 0:
            raise _Refused(f"{name} declares {unpacked:,} bytes, more than a file of {self.size:,} bytes has room for")


@contextlib.contextmanager
def _raw(path: Path, content: bytes | None) -> Iterator[Data]:
    """The bytes of the file, without reading them all."""
    if content is not None:
        yield content
        return
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield data


def _read(h5py: Any, file: Any, data: Data, skip: Callable[[str], bool]) -> Tree:
    allowance = _Allowance(len(data))
    arrays: dict[str, Array] = {}
    skipped: list[str] = []
    attributes: dict[str, Mapping[str, str | tuple[str, ...]]] = {}
    for address, name, entry in sorted(_entries(h5py, file), key=lambda found: found[0]):
        if isinstance(entry, h5py.Group):
            check_texts(data, address)
            attributes[name] = _attributes(h5py, entry, name, len(data))
            continue
        _check(entry, name, allowance)
        if skip(name):
            skipped.append(name)
        else:
            arrays[name] = _array(entry, name)
    return Tree(frozenset(attributes), arrays, tuple(skipped), attributes)


def _entries(h5py: Any, file: Any) -> Iterator[tuple[int, str, Any]]:
    """Groups and data sets with their address and path; each is reached by one hard link."""
    waiting: list[tuple[str, Any]] = [("", file["/"])]
    seen = {h5py.h5o.get_info(file["/"].id).addr}
    yield min(seen), "", file["/"]
    while waiting:
        path, group = waiting.pop()
        for own in group:
            name = f"{path}/{own}" if path else own
            link = group.get(own, getlink=True)
            if not isinstance(link, h5py.HardLink):
                raise _Refused(f"{name} is a {type(link).__name__}, which leads elsewhere")
            entry = group[own]
            address = h5py.h5o.get_info(entry.id).addr
            if address in seen:
                raise _Refused(f"{name} is another name of an entry that was there before")
            seen.add(address)
            if isinstance(entry, h5py.Group):
                waiting.append((name, entry))
            elif not isinstance(entry, h5py.Dataset):
                raise _Refused(f"{name} is a {type(entry).__name__}, not an array")
            yield address, name, entry


def _check(dataset: Any, name: str, allowance: _Allowance) -> None:
    """Refuse what is no plain array of numbers, or larger than what the file stores for it."""
    plan = dataset.id.get_create_plist()
    if dataset.is_virtual or plan.get_external_count():
        raise _Refused(f"the numbers of {name} lie in other files")
    if dataset.shape is None or dataset.dtype.kind not in "fiub" or dataset.dtype.itemsize > LARGEST_ITEM:
        raise _Refused(f"{name} holds {dataset.dtype}, not numbers of up to 64 bits")
    filters = [plan.get_filter(i)[0] for i in range(plan.get_nfilters())]
    if filters not in ([], [DEFLATE], [SHUFFLE], [SHUFFLE, DEFLATE]):
        raise _Refused(f"{name} is packed with a filter other than gzip")
    stored = dataset.id.get_storage_size()
    whole = math.prod(dataset.shape) * dataset.dtype.itemsize
    chunk = math.prod(dataset.chunks or ()) * dataset.dtype.itemsize if dataset.chunks else 0
    if DEFLATE not in filters and max(whole, chunk) > stored:
        raise _Refused(f"{name} declares {max(whole, chunk):,} bytes and stores {stored:,}")
    allowance.take(name, stored, max(whole, chunk))


def _array(dataset: Any, name: str) -> Array:
    plan = dataset.id.get_create_plist()
    packed = any(plan.get_filter(i)[0] == DEFLATE for i in range(plan.get_nfilters()))
    value = _unpacked(dataset, name, plan.get_nfilters() > 1) if packed else np.asarray(dataset[()])
    return np.ascontiguousarray(value, value.dtype.newbyteorder("=")).reshape(value.shape)


def _unpacked(dataset: Any, name: str, shuffled: bool) -> Array:
    """The array from its chunks. zlib stops at the size of a chunk; HDF5's own filter would grow without end."""
    item = dataset.dtype.itemsize
    chunk = math.prod(dataset.chunks) * item
    result = np.zeros(dataset.shape, dataset.dtype)
    for i in range(dataset.id.get_num_chunks()):
        start = dataset.id.get_chunk_info(i).chunk_offset
        mask, raw = dataset.id.read_direct_chunk(start)
        unpacker = zlib.decompressobj()
        data = unpacker.decompress(raw, chunk)
        if mask or len(data) != chunk or unpacker.unconsumed_tail:
            raise _Refused(f"a part of {name} does not unpack to {chunk:,} bytes")
        if shuffled:
            data = np.frombuffer(data, np.uint8).reshape(item, -1).T.tobytes()
        places = tuple(slice(a, a + b) for a, b in zip(start, dataset.chunks, strict=True))
        part = np.frombuffer(data, dataset.dtype).reshape(dataset.chunks)
        room = result[places]
        room[...] = part[tuple(slice(0, n) for n in room.shape)]
    return result


def _attributes(h5py: Any, group: Any, name: str, size: int) -> dict[str, str | tuple[str, ...]]:
    found: dict[str, str | tuple[str, ...]] = {}
    for own in group.attrs:
        stored = h5py.h5a.open(group.id, own.encode())
        if not isinstance(stored.get_type(), h5py.h5t.TypeStringID):
            continue
        if stored.get_storage_size() > size:
            raise _Refused(f"the attribute {own} of {name or 'the file'} declares more than the file has room for")
        value = group.attrs[own]
        if isinstance(value, bytes | str):
            found[own] = _text(value)
        elif isinstance(value, np.ndarray):
            found[own] = tuple(_text(text) for text in value.ravel().tolist())
    return found


def _text(value: bytes | str) -> str:
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value


def _first(error: BaseException) -> str:
    return printable((str(error).splitlines() or [type(error).__name__])[0].rstrip("."))[:200]
