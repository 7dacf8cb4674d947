"""What an ONNX graph takes: which of its inputs is the picture, how its axes stand, and of what sizes it is tried.

A size that the file leaves open is tried in two lengths, and so is the batch.

Knows declarations and the first steps after them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from regraft.errors import ReaderError
from regraft.printable import printable
from regraft.readers.onnx.steps import CHANNELS_LAST

BATCHES = (2, 3)
_SIZE = 224
_OTHER = (288, 256)
_FEW = 4
_THROUGH = {"Add", "Cast", "Clip", "Div", "Dropout", "Identity", "Mul", "Pad", "Sub"}


@dataclass(frozen=True)
class Picture:
    """The input: its name in the graph, how the graph orders the axes of (n, c, h, w), and what it is tried with.

    shape: without the batch, channels first, None where a length is left open. fixed: the batch that the file was
    written for. sights: tensors without numbers; batches: how many pictures each of them holds.
    """

    name: str
    order: tuple[int, ...]
    shape: tuple[int, ...] | None
    fixed: int | None
    sights: tuple[torch.Tensor, ...]
    batches: tuple[int, ...]


def picture_of(graph: Any, initializers: Mapping[str, Any], nodes: Sequence[Any], path: Path) -> Picture:
    """The one input of a graph; ReaderError where there are several, or none that holds pictures or rows."""
    used = {name for node in nodes for name in node.input}
    inputs = [i for i in graph.input if i.name not in initializers]
    inputs = [i for i in inputs if i.name in used] or inputs
    if len(inputs) != 1:
        names = ", ".join(repr(printable(i.name)[:60]) for i in inputs[:6]) or "none"
        raise ReaderError(f"A network must take one input, the picture; {path} takes {names}.")
    declared = inputs[0]
    dims = _lengths(declared, nodes, path)
    if len(dims) != 4:
        return _rows(declared.name, dims, path)
    last, channels = _layout(declared.name, dims, initializers, nodes)
    lengths = [dims[i] for i in (3, 1, 2)] if last else dims[1:]
    channels = channels if lengths[0] is None else lengths[0]
    if channels is None:
        raise ReaderError(f"The input of {path} must say how many channels it has: export it with a declared shape.")
    order = CHANNELS_LAST if last else (0, 1, 2, 3)
    return _picture(declared.name, dims[0], channels, lengths[1], lengths[2], order)


def _lengths(declared: Any, nodes: Sequence[Any], path: Path) -> list[int | None]:
    """The declared lengths of the axes, None where they are left open."""
    import onnx

    kind = declared.type.tensor_type
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE, onnx.TensorProto.BFLOAT16)
    cast = all(node.op_type == "Cast" for node in nodes if declared.name in node.input)
    name = printable(declared.name)[:60]
    if not declared.type.HasField("tensor_type") or (kind.elem_type not in floats and not cast):
        raise ReaderError(f"The input of a network must be an array of floating numbers; {name!r} of {path} is none.")
    dims = [int(d.dim_value) if d.dim_value > 0 else None for d in kind.shape.dim]
    if not 2 <= len(dims) <= 4 or not kind.HasField("shape"):
        raise ReaderError(
            f"The input of a network must have 2 to 4 axes, the batch first; {name!r} of {path} has {len(dims)}: "
            "export it with a declared shape."
        )
    if any(length is not None and length > 1 << 20 for length in dims):
        raise ReaderError(f"The input of a network must have axes below 2**20; {name!r} of {path} is {dims}.")
    return dims


def _layout(
    name: str, dims: Sequence[int | None], initializers: Mapping[str, Any], nodes: Sequence[Any]
) -> tuple[bool, int | None]:
    """Whether channels come last, and how many the first convolution takes, if one follows.

    The few channels stand at one end; where both or neither are few, the first step that cares decides, and where none
    does, they come first, as the format has it.
    """
    few = [dims[axis] is not None and (dims[axis] or 0) <= _FEW for axis in (1, 3)]
    names, turned = {name}, False
    for node in nodes:
        if not names.intersection(node.input):
            continue
        if node.op_type == "Transpose":
            perm = next((list(a.ints) for a in node.attribute if a.name == "perm"), [])
            turned = turned or perm == [0, 3, 1, 2]
            names.update(node.output)
        elif node.op_type == "Conv" and len(node.input) > 1 and node.input[1] in initializers:
            groups = next((int(a.i) for a in node.attribute if a.name == "group"), 1)
            kernel = initializers[node.input[1]].dims
            return (few[1] if few[0] != few[1] else turned), int(kernel[1]) * groups if len(kernel) > 1 else None
        elif node.op_type in _THROUGH:
            names.update(node.output)
    return (few[1] if few[0] != few[1] else turned), None


def _picture(
    name: str, batch: int | None, channels: int, height: int | None, width: int | None, order: tuple[int, ...]
) -> Picture:
    first = (channels, height or _SIZE, width or _SIZE)
    shapes = [(b, *first) for b in BATCHES]
    if height is None or width is None:
        shapes.append((BATCHES[0], channels, height or _OTHER[0], width or _OTHER[1]))
    shape = None if height is None or width is None else first
    sights = tuple(torch.empty(s, device="meta") for s in shapes)
    return Picture(name, order, shape, batch, sights, tuple(s[0] for s in shapes))


def _rows(name: str, dims: Sequence[int | None], path: Path) -> Picture:
    """An input that is no picture: rows of numbers, say."""
    lengths = tuple(length for length in dims[1:] if length is not None)
    if len(lengths) != len(dims) - 1:
        raise ReaderError(f"The input of {path} must say how long its rows are: export it with a declared shape.")
    sights = tuple(torch.empty((b, *lengths), device="meta") for b in BATCHES)
    return Picture(name, tuple(range(len(dims))), lengths, dims[0], sights, BATCHES)
