"""Bare operations on tensors that Keras records beside its layers, for `x + y`, `1 - x` or `keras.ops.mean(x)`.

They are called as in Keras 3; what Keras 2 records, functions of TensorFlow, has the same names here. Axes that are
named count as in Keras. Knows one operation at a time. Not covered: anything across the examples of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from regraft.readers.keras.activations import BY_NAME
from regraft.readers.keras.joins import alike
from regraft.readers.keras.steps import Steps, Use, Value

Write = Callable[[Use, Steps, Sequence[Any]], Value]
ACTIVATIONS = {
    "Relu": "relu",
    "Relu6": "relu6",
    "Silu": "silu",
    "Sigmoid": "sigmoid",
    "Tanh": "tanh",
    "Exp": "exponential",
    "HardSigmoid": "hard_sigmoid",
    "HardSilu": "hard_silu",
    "Softplus": "softplus",
    "Softsign": "softsign",
}
"""Operations that are activations without options, and their names as such."""


def _two(function: str) -> Write:
    """A function of two tensors, of which either may be a number, or numbers along the last axis."""

    def write(use: Use, to: Steps, xs: Sequence[Any]) -> Value:
        one, other = xs
        if isinstance(one, Value) and isinstance(other, float):
            return _by_number(use, to, function, one, other)
        if isinstance(one, float) and isinstance(other, Value):
            return _of_number(use, to, function, one, other)
        return to.add(use.name, function, *_spread(use, to, one, other))

    return write


def _spread(use: Use, to: Steps, one: Any, other: Any) -> list[Value]:
    """Two tensors lying the same way round, where one may be numbers along the last axis."""
    if isinstance(one, Value) and isinstance(other, Value):
        if one.rank != other.rank:
            raise use.refused("must be called on tensors with as many axes; found different ones")
        return alike(use, to, [one, other])
    x = one if isinstance(one, Value) else other
    if not isinstance(x, Value):
        raise use.refused("must be called on a tensor; found numbers alone")
    numbers = other if isinstance(one, Value) else one
    constant = to.constant(f"{use.name}_constant", np.asarray(numbers, np.float32), x)
    return [x, constant] if isinstance(one, Value) else [constant, x]


def _by_number(use: Use, to: Steps, function: str, x: Value, number: float) -> Value:
    if function == "div":
        return to.add(use.name, "affine", x, scale=1 / number)
    options: dict[str, tuple[str, dict[str, Any]]] = {
        "add": ("affine", {"shift": number}),
        "sub": ("affine", {"shift": -number}),
        "mul": ("affine", {"scale": number}),
        "maximum": ("clamp", {"min": number}),
        "minimum": ("clamp", {"max": number}),
        "pow": ("pow", {"exponent": number}),
    }
    kind, given = options[function]
    return to.add(use.name, kind, x, **given)


def _of_number(use: Use, to: Steps, function: str, number: float, x: Value) -> Value:
    if function == "sub":
        return to.add(use.name, "affine", x, scale=-1.0, shift=number)
    if function == "div":
        inverse = to.add(f"{use.name}_inverse", "pow", x, exponent=-1.0)
        return to.add(use.name, "affine", inverse, scale=number)
    if function == "pow":
        raise use.refused("raises a number to the power of a tensor, which is not rebuilt")
    return _by_number(use, to, function, x, number)


OF_TWO: dict[str, Write] = {
    "Add": _two("add"),
    "Subtract": _two("sub"),
    "Multiply": _two("mul"),
    "Divide": _two("div"),
    "TrueDivide": _two("div"),
    "Maximum": _two("maximum"),
    "Minimum": _two("minimum"),
    "Power": _two("pow"),
}


def bias_add(use: Use, to: Steps, xs: Sequence[Any]) -> Value:
    """TensorFlow's bias_add, with constants along the last axis."""
    use.choice("data_format", ("NHWC",), "NHWC")
    return OF_TWO["Add"](use, to, xs)


OF_NUMBERS: tuple[Write, ...] = (*OF_TWO.values(), bias_add)
"""What may be called on numbers too."""


def activation(name: str) -> Write:
    """An activation by itself."""

    def write(use: Use, to: Steps, xs: Sequence[Value]) -> Value:
        ((kind, options),) = BY_NAME[name]
        return to.add(use.name, kind, xs[0], **options)

    return write


def gelu(use: Use, to: Steps, xs: Sequence[Value]) -> Value:
    """GELU, by the error function or by tanh."""
    return to.add(use.name, "GELU", xs[0], approximate="tanh" if use.config.get("approximate") else "none")


def leaky_relu(use: Use, to: Steps, xs: Sequence[Value]) -> Value:
    """A slope below zero; not the slope that the layer of this name has."""
    slope = use.number("negative_slope", use.number("alpha", 0.2))
    return to.add(use.name, "LeakyReLU", xs[0], negative_slope=slope)


def negative(use: Use, to: Steps, xs: Sequence[Value]) -> Value:
    """-x."""
    return to.add(use.name, "neg", xs[0])


def mean(use: Use, to: Steps, xs: Sequence[Value]) -> Value:
    """The mean over axes, none of which is the batch."""
    x, axis, keep = xs[0], use.config.get("axis"), bool(use.config.get("keepdims"))
    axes: list[int] = [] if axis is None else axis if isinstance(axis, list) else [axis]
    if not axes or 0 in [range(x.rank)[one] for one in axes]:
        raise use.refused("must be over axes beside the batch")
    y = to.add(use.name, "mean", x, dim=[x.axis(one) for one in axes], keepdim=keep)
    return y if keep else y.without(axes)


def stack(use: Use, to: Steps, xs: Sequence[Value]) -> Value:
    """Tensors side by side along an axis of their own."""
    rank = xs[0].rank + 1
    axis = range(rank)[use.config.get("axis", 0)]
    if axis == 0 or any(x.rank + 1 != rank for x in xs):
        raise use.refused("must join tensors with as many axes, along an axis beside the batch")
    parts = [to.add(f"{use.name}_{i}", "unsqueeze", to.plain(use.name, x), dim=axis) for i, x in enumerate(xs)]
    return Value(to.add(use.name, "concat", *parts, dim=axis).step, rank)


def reshape(use: Use, to: Steps, xs: Sequence[Value]) -> Value:
    """Another shape, which leaves the first axis to the batch."""
    shape = use.config.get("newshape", use.config.get("shape"))
    whole = isinstance(shape, list) and all(type(n) is int and n > 0 for n in shape[1:])
    if not isinstance(shape, list) or len(shape) < 2 or shape[0] not in (-1, None) or not whole:
        raise use.refused(f"must keep the batch, with whole numbers for other axes; found {shape!r:.60}")
    x = to.turned(f"{use.name}_last", xs[0], range(xs[0].rank), order_alone=True)
    return Value(to.add(use.name, "reshape", x, shape=[0, *shape[1:]]).step, len(shape))


def get_item(use: Use, to: Steps, xs: Sequence[Value]) -> Value:
    """x[...] by pieces, by whole axes turned round, and by places, none of them along the batch."""
    x = xs[0]
    asked = [(axis, one) for axis, one in enumerate(_pieces(use, x.rank)) if one != (None, None, None)]
    if any(axis == 0 for axis, _ in asked):
        raise use.refused("must take every example of a batch")
    for i, (axis, one) in enumerate((axis, one) for axis, one in asked if not isinstance(one, int)):
        name = f"{use.name}_{i}" if i < len(asked) - 1 else use.name
        x = _cut(use, to, x, name, axis, one)
    for axis, one in reversed([(axis, one) for axis, one in asked if isinstance(one, int)]):
        x = to.add(use.name, "select", x, dim=x.axis(axis), index=one).without([axis])
    return x


def _cut(use: Use, to: Steps, x: Value, name: str, axis: int, piece: Any) -> Value:
    start, stop, step = piece
    if (start, stop, step) == (None, None, -1):
        return to.add(name, "flip", x, dims=[x.axis(axis)])
    if step is not None and step < 1:
        raise use.refused("turns a part of an axis round, which is not rebuilt")
    return to.add(name, "slice", x, dim=x.axis(axis), start=start, stop=stop, step=step or 1)


def _pieces(use: Use, rank: int) -> list[Any]:
    """For every axis a place, or (start, stop, step)."""
    spec = use.config.get("slice_spec")
    spec = spec if isinstance(spec, list) else [spec]
    found: list[Any] = []
    for one in spec:
        said = one if isinstance(one, Mapping) else {}
        if said.get("class_name") == "__ellipsis__":
            found += [(None, None, None)] * (rank - len(spec) + 1)
            continue
        piece = said.get("config", said)
        ends = tuple(piece.get(key) for key in ("start", "stop", "step")) if said else (one,)
        if any(type(n) is not int and (n is not None or not said) for n in ends):
            raise use.refused(f"must be cut out by whole numbers; found {one!r:.60}")
        found.append(ends if said else one)
    return found + [(None, None, None)] * (rank - len(found))
