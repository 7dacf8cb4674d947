"""The network that an ONNX graph becomes, step by step, while its shapes are watched.

Every value of the graph is either known when the file is read (a constant, or sizes) or live (it depends on the
picture). Live values are followed without numbers: each step is run at once on tensors of torch's `meta` device, for
a few sizes of batch and picture ("sights"), so a step that does not fit is found where it stands, and a size that is
the same in all sights is a constant of the network, while one that is not is the batch.

The axes of a live value may stand in another order than the graph believes: a Transpose only writes down the new
order, and a step that can do its work in the old one does. So the transposes that exporters put around everything
cancel out, and a network for channels-last pictures becomes one for channels-first.

Knows operations of regraft, not those of ONNX.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from regraft.files import digest
from regraft.operations import FUNCTIONS, INPUT, LAYERS, TENSORS, Operation
from regraft.readers.onnx.constants import Array
from regraft.readers.onnx.tensors import Allowance

CHANNELS_LAST = (0, 2, 3, 1)
_TAKEN = frozenset(dir(nn.Module())) | {"operations", "T_destination"}
_DEEPEST = 24
_LONGEST = 80


@dataclass(frozen=True)
class Known:
    """A value that does not depend on the picture: one array per sight, the same object where it is a constant.

    name: what the file calls the tensor that it was made from; empty for what is computed from sizes.
    """

    arrays: tuple[Array, ...]
    name: str = ""

    @property
    def constant(self) -> Array:
        """The array; ValueError where it varies with the batch."""
        if any(a is not self.arrays[0] for a in self.arrays):
            raise ValueError("a size that varies with the batch stands where a constant is needed")
        return self.arrays[0]


def known(arrays: Sequence[Array], name: str = "") -> Known:
    """The arrays of each sight, as one where they are equal."""
    first = arrays[0]
    same = all(a is first or (a.shape == first.shape and np.array_equal(a, first)) for a in arrays[1:])
    return Known((first,) * len(arrays) if same else tuple(arrays), name)


@dataclass(frozen=True)
class Live:
    """A value that depends on the picture: the step that makes it, and its tensors without numbers, one per sight.

    order: axis i of the graph's tensor is axis order[i] of the step's. raw: nothing trained lies below it.
    sole: at most one step of the graph uses it, under all its names.
    """

    step: str
    order: tuple[int, ...]
    seen: tuple[torch.Tensor, ...]
    raw: bool = False
    sole: bool = True

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shape that the graph believes in, for every sight."""
        return [tuple(t.shape[o] for o in self.order) for t in self.seen]

    @property
    def rank(self) -> int:
        return len(self.order)

    def stored(self, axis: int) -> int:
        """Where the step has an axis of the graph's tensor."""
        return self.order[range(self.rank)[axis]]

    def pictures(self, axis: int) -> bool:
        """Whether the pictures of a batch lie along an axis."""
        first, second = self.shapes[:2]
        return first[axis] != second[axis]

    def size(self, axis: int) -> int:
        """The length of an axis; ValueError where it varies."""
        sizes = {shape[axis] for shape in self.shapes}
        if len(sizes) > 1:
            raise ValueError(f"axis {axis} varies with the batch where its length must be known")
        return sizes.pop()


Value = Known | Live


@dataclass(frozen=True)
class Node:
    """One step of the graph with the values that go in.

    name: a safe path after what the file calls it. wanted: for each output, whether anything uses it. fixed: the
    batch that the file was written for, None where it is left open; batches: those of the sights.
    """

    name: str
    op: str
    opset: int
    attributes: Mapping[str, Any]
    inputs: tuple[Value | None, ...]
    wanted: tuple[bool, ...] = (True,)
    batches: tuple[int, ...] = ()
    fixed: int | None = None

    def live(self, index: int = 0) -> Live:
        """A live input; ValueError where it is none."""
        value = self.inputs[index] if index < len(self.inputs) else None
        if not isinstance(value, Live):
            raise ValueError(f"input {index} must depend on the picture")
        return value

    def constant(self, index: int) -> Array | None:
        """A constant input, None where it is not given; ValueError where it depends on the picture."""
        value = self.inputs[index] if index < len(self.inputs) else None
        if isinstance(value, Live):
            raise ValueError(f"input {index} must be a constant")
        return None if value is None else value.constant

    def given(self, index: int) -> Array:
        """A constant input that must be there."""
        found = self.constant(index)
        if found is None:
            raise ValueError(f"input {index} is missing")
        return found

    def arrays(self) -> list[Array | None]:
        """All inputs as constants, None for those that depend on the picture."""
        return [v.constant if isinstance(v, Known) else None for v in self.inputs]

    def owner(self, index: int) -> str:
        """The path of a layer, after its weight where that is called PATH.weight, and after the step otherwise."""
        value = self.inputs[index] if index < len(self.inputs) else None
        source = value.name if isinstance(value, Known) else ""
        return safe_name(source.removesuffix(".weight")) if source.endswith(".weight") else self.name

    def number(self, name: str, default: float) -> float:
        """An attribute that is a number: the shortest one that is the same float32."""
        return float(str(np.float32(self.attributes.get(name, default))))


@dataclass
class Writer:
    """The steps written so far, and the tensors that they own."""

    allowed: Allowance
    steps: list[Operation] = field(default_factory=list)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    _names: set[str] = field(default_factory=lambda: {INPUT})
    _above: set[str] = field(default_factory=set)
    _held: dict[tuple[object, ...], Live] = field(default_factory=dict)
    _turned: dict[tuple[str, tuple[int, ...]], Live] = field(default_factory=dict)

    def emit(
        self,
        name: str,
        kind: str,
        inputs: Sequence[Live],
        options: Mapping[str, Any] | None = None,
        order: Sequence[int] | None = None,
        **tensors: Array | None,
    ) -> Live:
        """Add a step; `tensors` are those of its layer, None for one it has not got. order: that of the first input.

        Raises what torch raises where options or shapes do not fit, and ValueError for numbers that are none.
        """
        options = dict(options or {})
        json.dumps(options, allow_nan=False)
        step = Operation(self._name(name), kind, tuple(i.step for i in inputs), options)
        owned = {part: array for part, array in tensors.items() if array is not None}
        seen = _run(step, [i.seen for i in inputs], {part: array.shape for part, array in owned.items()})
        self.steps.append(step)
        self.tensors |= {f"{step.name}.{part}": self._kept(array) for part, array in owned.items()}
        order = inputs[0].order if order is None else order
        return Live(step.name, tuple(order), seen, all(i.raw for i in inputs) and not tensors)

    def plain(self, value: Live) -> Live:
        """The value with its axes as the graph believes them to be."""
        return self.arranged(value, tuple(range(value.rank)))

    def arranged(self, value: Live, order: Sequence[int]) -> Live:
        """The value with its axes in that order; one step for all who want it, none where it is so already."""
        if value.order == tuple(order):
            return value
        dims = [value.order[list(order).index(s)] for s in range(value.rank)]
        key = (value.step, tuple(dims))
        if key not in self._turned:
            self._turned[key] = self.emit(f"{value.step}_permuted", "permute", [value], {"dims": dims})
        turned = self._turned[key]
        return replace(turned, order=tuple(order), sole=value.sole)

    def constant(self, name: str, array: Array, like: Live, *, source: str = "", trained: bool = False) -> Live:
        """A tensor that no layer owns: `array` with the axes of the step, named after `source`, one for all its uses.

        trained: it is a parameter.
        """
        value = np.ascontiguousarray(array).reshape(array.shape)
        key = (source, value.shape, value.dtype.str, digest(value.tobytes()), trained)
        if key not in self._held:
            found = self._kept(value)
            options = {"shape": list(found.shape), "dtype": str(found.dtype).removeprefix("torch.")}
            step = Operation(
                self._name(safe_name(source) or f"{name}_constant"),
                "parameter" if trained else "buffer",
                (),
                options,
            )
            self.steps.append(step)
            self.tensors[step.name] = found
            seen = (torch.empty(found.shape, dtype=found.dtype, device="meta"),) * len(like.seen)
            self._held[key] = Live(step.name, tuple(range(found.dim())), seen, True)
        return self._held[key]

    def last(self, value: Live) -> Operation:
        """The step that makes a value."""
        return next(step for step in reversed(self.steps) if step.name == value.step)

    def change(self, step: Operation, options: Mapping[str, Any], **tensors: Array) -> None:
        """Give a layer that is there already other options and more tensors; what it makes keeps its shape."""
        self.steps[self.steps.index(step)] = replace(step, options={**step.options, **options})
        for part, array in tensors.items():
            self.tensors[f"{step.name}.{part}"] = self._kept(array)

    def drop(self, value: Live) -> None:
        """Leave out the step that made a value, which nothing uses any more."""
        self.steps.remove(self.last(value))

    def _kept(self, array: Array) -> torch.Tensor:
        self.allowed.spend(array.size * 4)
        return tensor(array)

    def _name(self, wanted: str) -> str:
        """A name of its own that neither lies inside that of another step nor holds one: a place for a module."""
        name = base = wanted or "step"
        number = 1
        while True:
            inside = next((path for path in _above(name) if path in self._names), None)
            if inside is not None:
                name = base = f"{inside}_{name.removeprefix(inside)}"
            elif name in self._names or name in self._above:
                number += 1
                name = f"{base}_{number}"
            else:
                break
        self._names.add(name)
        self._above.update(_above(name))
        return name


def common_order(values: Sequence[Live]) -> tuple[int, ...]:
    """The order of axes for values of one rank that are to be joined.

    Where they differ, it is that of channels-last pictures whose steps have channels first, if that is among them, and
    else the plain one.
    """
    orders = {value.order for value in values}
    if len(orders) == 1:
        return orders.pop()
    return CHANNELS_LAST if CHANNELS_LAST in orders else tuple(range(values[0].rank))


def safe_name(wanted: str) -> str:
    """A dotted path that modules can have, after what a file calls a step or a tensor.

    A scope that the next one repeats in full (PyTorch writes `/layer1/layer1.0/conv1`) is left out.
    """
    scopes = [scope for scope in wanted.removesuffix(":0").split("/") if scope]
    scopes = [s for s, below in zip(scopes, [*scopes, ""][1:], strict=True) if not below.startswith(f"{s}.")]
    parts = [re.sub(r"\W", "_", part, flags=re.ASCII) for scope in scopes for part in scope.split(".") if part]
    if len(parts) > _DEEPEST:
        parts = [*parts[: _DEEPEST - 1], "_".join(parts[_DEEPEST - 1 :])]
    return ".".join(f"{part}_" if part in _TAKEN else part for part in (p[:_LONGEST] for p in parts))


def tensor(array: Array) -> torch.Tensor:
    """The array as a tensor of its own memory: whole numbers as int64, others as float32."""
    kind = np.int64 if array.dtype.kind in "iu" else np.bool_ if array.dtype.kind == "b" else np.float32
    return torch.from_numpy(np.array(array, kind, order="C"))


def _above(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _run(
    step: Operation, inputs: Sequence[tuple[torch.Tensor, ...]], owned: Mapping[str, tuple[int, ...]]
) -> tuple[torch.Tensor, ...]:
    """What the step gives for each sight, without numbers; ValueError where its tensors are of other shapes."""
    assert step.kind not in TENSORS
    if step.kind in FUNCTIONS:
        return tuple(FUNCTIONS[step.kind](*tensors, **step.options) for tensors in zip(*inputs, strict=True))
    with torch.device("meta"):
        layer = LAYERS[step.kind](**step.options).eval()
    shapes = {part: tuple(t.shape) for part, t in layer.state_dict().items() if part != "num_batches_tracked"}
    if shapes != dict(owned):
        raise ValueError(f"its tensors are {dict(owned)} and not {shapes}")
    with torch.no_grad(), torch.device("meta"):
        return tuple(layer(*tensors) for tensors in zip(*inputs, strict=True))
