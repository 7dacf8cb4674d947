"""The tensors of an ONNX file as arrays: those inside it, and those in files beside it.

A tensor is believed only as far as there are bytes for it: its shape is compared with what is stored before anything
is made. Files beside the model are opened from its folder downwards, part by part, following no link, so that a model
cannot name a file of somebody else, and a folder that is changed meanwhile cannot lead out.

Knows tensors of the format, nothing of graphs. Not covered: text, sparse tensors, check sums of external data.
"""

from __future__ import annotations

import math
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from regraft.errors import ReaderError
from regraft.printable import printable

_TYPED_FIELDS = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data")
# Of each element type: the bits of one element in raw bytes.
_BITS = {
    "FLOAT": 32,
    "DOUBLE": 64,
    "FLOAT16": 16,
    "BFLOAT16": 16,
    "BOOL": 8,
    "INT4": 4,
    "UINT4": 4,
    "INT8": 8,
    "UINT8": 8,
    "INT16": 16,
    "UINT16": 16,
    "INT32": 32,
    "UINT32": 32,
    "INT64": 64,
    "UINT64": 64,
}
_SPARE = 64 << 20
_TIMES = 24


@dataclass
class Allowance:
    """How many bytes may still be made on the word of a file: so many times its own size, and some for sizes and such.

    What is read must be there anyway; what is computed from it (a row repeated, a range) need not be. Eight-bit
    weights become sixteen times as large when they are scaled, turned and kept as float32.
    """

    path: Path
    left: int = _SPARE
    _files: set[tuple[int, int]] = field(default_factory=set)

    def grant(self, seen: os.stat_result) -> None:
        """Count a file in, once."""
        if (seen.st_dev, seen.st_ino) not in self._files:
            self._files.add((seen.st_dev, seen.st_ino))
            self.left += _TIMES * seen.st_size

    def spend(self, count: int) -> None:
        """Raises ReaderError when `count` bytes are more than is left."""
        self.left -= count
        if self.left < 0:
            raise ReaderError(
                f"{self.path} asks for constants far larger than the file itself, so it is damaged or made to exhaust "
                "memory: get it from its source again."
            )


def read_tensor(proto: Any, path: Path, allowed: Allowance) -> np.ndarray:
    """One TensorProto of the model at `path` as an array of its own; bfloat16 and float16 become float32.

    Raises ReaderError when bytes and shape do not agree, when the type is not one of numbers, and when the data lie
    in another file that is missing, outside the model's folder or not a plain file.
    """
    import onnx

    name = _name(proto)
    kind = onnx.TensorProto.DataType.Name(proto.data_type) if _is_known(proto.data_type) else str(proto.data_type)
    if kind not in _BITS or proto.HasField("segment"):
        raise ReaderError(f"The tensors of {path} must hold plain numbers; {name!r} is of type {kind}.")
    dims = [int(d) for d in proto.dims]
    if any(d < 0 for d in dims):
        raise ReaderError(f"The shapes in {path} must not be negative; tensor {name!r} says {dims}.")
    count = math.prod(dims)
    needed = (count * _BITS[kind] + 7) // 8
    if proto.data_location == onnx.TensorProto.EXTERNAL:
        raw: bytes | None = _external(proto, path, needed, allowed)
    else:
        raw = proto.raw_data if proto.HasField("raw_data") else None
    if raw is None:
        stored = sum(len(getattr(proto, part)) for part in _TYPED_FIELDS)
        wanted = (count + 1) // 2 if _BITS[kind] == 4 else count
        if stored != wanted:
            raise _disagree(path, name, dims, f"{stored} numbers")
    elif len(raw) != needed:
        raise _disagree(path, name, dims, f"{len(raw)} bytes")
    return _array(onnx.TensorProto(data_type=proto.data_type, dims=dims, raw_data=raw) if raw is not None else proto)


def _array(proto: Any) -> np.ndarray:
    import onnx.numpy_helper

    array = np.array(onnx.numpy_helper.to_array(proto))
    if array.dtype.name in ("float16", "bfloat16"):
        return array.astype(np.float32)
    return array.astype(np.int8) if array.dtype.name in ("int4", "uint4") else array


def _external(proto: Any, path: Path, needed: int, allowed: Allowance) -> bytes:
    """The bytes of a tensor that lies in a file beside the model."""
    entries = {entry.key: entry.value for entry in proto.external_data}
    location, name = entries.get("location", ""), _name(proto)
    try:
        offset, length = int(entries.get("offset") or 0), int(entries.get("length") or needed)
    except ValueError:
        offset = length = -1
    if offset < 0 or length != needed:
        raise _disagree(path, name, list(proto.dims), f"offset {offset} and length {length}")
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    descriptor = _open_below(folder, location, path)
    try:
        allowed.grant(os.fstat(descriptor))
        size = os.fstat(descriptor).st_size
        if offset + length > size:
            found = f"{size} bytes in {printable(location)!r}, of which it wants those from {offset} on"
            raise _disagree(path, name, list(proto.dims), found)
        allowed.spend(length)
        with os.fdopen(os.dup(descriptor), "rb") as file:
            file.seek(offset)
            data = file.read(length)
    finally:
        os.close(descriptor)
    if len(data) != length:
        raise _disagree(path, name, list(proto.dims), f"{len(data)} bytes in {printable(location)!r}")
    return data


def _open_below(folder: int, location: str, path: Path) -> int:
    """Open a plain file below `folder`, which is closed; every part of the way must be what it seems."""
    shown = printable(location)[:200]
    parts = location.split("/")
    while parts[:1] == ["."]:
        parts = parts[1:]
    try:
        if not parts or any(part in ("", ".", "..") or "\\" in part or "\0" in part for part in parts):
            raise ReaderError(f"The data of {path} must lie in its own folder; it names {shown!r}.")
        for part in parts[:-1]:
            below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
            os.close(folder)
            folder = below
        descriptor = os.open(parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    except FileNotFoundError as e:
        raise ReaderError(
            f"The data of {path} lie in {shown!r}, which is not beside it: put that file there, or save both as one."
        ) from e
    except (OSError, UnicodeError) as e:
        raise ReaderError(f"The data of {path} must lie in plain files without links; {shown!r} is none: {e}.") from e
    finally:
        os.close(folder)
    seen = os.fstat(descriptor)
    if not stat.S_ISREG(seen.st_mode) or seen.st_nlink != 1:
        os.close(descriptor)
        what = "has several hard links" if stat.S_ISREG(seen.st_mode) else "is none"
        raise ReaderError(f"The data of {path} must lie in a plain file of its own; {shown!r} {what}: copy it.")
    return descriptor


def _disagree(path: Path, name: str, dims: list[int], found: str) -> ReaderError:
    return ReaderError(
        f"The shape and the data of a tensor must agree; in {path}, {name!r} of shape {dims} has {found}: the file is "
        "cut short or damaged."
    )


def _name(proto: Any) -> str:
    return printable(proto.name)[:100]


def _is_known(data_type: int) -> bool:
    import onnx

    return data_type in onnx.TensorProto.DataType.values()
