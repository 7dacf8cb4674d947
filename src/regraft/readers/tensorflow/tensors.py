"""The tensors of TensorFlow's files: element types, shapes, and the TensorProto that graphs and old checkpoints hold.

A tensor is believed only as far as there are bytes for it; a constant that is written as one value for many is made
only while the reader's allowance lasts. Knows messages, nothing of graphs or files. Not covered: complex and quantised
numbers, resources and variants.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from regraft.readers.onnx.tensors import Allowance
from regraft.readers.protobuf_wire import Message

Array = np.ndarray[Any, Any]

STRING = 7
DTYPES: dict[int, torch.dtype] = {
    1: torch.float32,
    2: torch.float64,
    14: torch.bfloat16,
    19: torch.float16,
    10: torch.bool,
    3: torch.int32,
    5: torch.int16,
    6: torch.int8,
    9: torch.int64,
    4: torch.uint8,
    17: torch.uint16,
    22: torch.uint32,
    23: torch.uint64,
}
"""Torch's types by TensorFlow's number (`types.proto`)."""

FLOATS = {1, 2, 14, 19}

# Where a TensorProto keeps values of a type when they are not raw bytes: field, and their form there (None: varints).
_FIELDS = {
    1: (5, "<f4"),
    2: (6, "<f8"),
    14: (13, None),
    19: (13, None),
    10: (11, None),
    9: (10, None),
    3: (7, None),
    4: (7, None),
    5: (7, None),
    6: (7, None),
    17: (7, None),
    22: (16, None),
    23: (17, None),
}


def allowance(*files: Path) -> Allowance:
    """What may be made on the word of these files, of which the first is named where it asks for too much."""
    allowed = Allowance(files[0])
    for file in files:
        allowed.grant(file.stat())
    return allowed


def shape_of(proto: Message) -> tuple[int | None, ...] | None:
    """A TensorShapeProto: None for an unknown size, and for a shape of unknown rank."""
    if proto.integer(3):
        return None
    sizes = [dim.integer(1) for dim in proto.messages(2)]
    return tuple(None if size < 0 else size for size in sizes)


def fixed_shape(proto: Message) -> tuple[int, ...]:
    """A TensorShapeProto without unknown sizes; ValueError otherwise."""
    shape = shape_of(proto)
    if shape is None or None in shape or len(shape) > 32:
        raise ValueError(f"a tensor of the shape {shape}")
    return tuple(size for size in shape if size is not None)


def dtype_of(number: int) -> torch.dtype:
    """Torch's type; ValueError for one that is not of numbers."""
    if number not in DTYPES:
        raise ValueError(f"a tensor of TensorFlow's type number {number}, which is not one of plain numbers")
    return DTYPES[number]


def read_array(proto: Message, allowed: Allowance) -> Array:
    """A TensorProto as an array of its own; bfloat16 and float16 become float32.

    Raises ValueError when values and shape do not agree or the type is not one of numbers, and ReaderError when more
    is asked for than the file can be believed to hold.
    """
    return read_values(proto, proto.integer(1), fixed_shape(proto.message(2)), allowed)


def read_values(proto: Message, number: int, shape: tuple[int, ...], allowed: Allowance) -> Array:
    """The values of a TensorProto whose type, by TensorFlow's number, and shape are said elsewhere; as `read_array`."""
    dtype_of(number)
    kind, count = _stored(number), math.prod(shape)
    allowed.spend(count * max(4, kind.itemsize))
    values = _values(proto, number, kind)
    if len(values) > count or (proto.has(4) and len(values) < count):
        raise ValueError(f"a tensor of shape {list(shape)} with {len(values):,} values")
    if len(values) < count:  # the last value stands for all that follow
        filled = np.empty(count, kind)
        filled[: len(values)] = values
        filled[len(values) :] = values[-1] if len(values) else 0
        values = filled
    return _widened(values, number).reshape(shape)


def read_strings(proto: Message) -> list[str]:
    """The strings of a TensorProto."""
    return proto.texts(8)


def _values(proto: Message, number: int, kind: np.dtype[Any]) -> Array:
    if proto.has(4):
        content = proto.content(4)
        if len(content) % kind.itemsize:
            raise ValueError(f"{len(content):,} bytes for values of {kind.itemsize}")
        return np.frombuffer(content, kind)
    field, form = _FIELDS[number]
    if form is not None:
        return np.frombuffer(proto.packed(field, np.dtype(form).itemsize), form)
    whole = np.array(proto.integers(field), np.int64)
    return whole.astype(np.uint64 if number == 23 else kind)


def _stored(number: int) -> np.dtype[Any]:
    """The form of one element in raw bytes."""
    if number == 14:
        return np.dtype("<u2")
    if number == 19:
        return np.dtype("<u2")
    return np.dtype(str(DTYPES[number]).removeprefix("torch.")).newbyteorder("<")


def _widened(values: Array, number: int) -> Array:
    if number == 14:  # the upper half of a float32
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if number == 19:
        return values.view(np.float16).astype(np.float32)
    return np.array(values, _stored(number).newbyteorder("="))
