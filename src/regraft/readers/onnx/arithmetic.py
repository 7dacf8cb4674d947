"""The arithmetic of ONNX as steps: sums and products of values of any order of axes, and functions of one number.

A constant is turned to suit the order in which a value's axes stand, so that what an exporter turned to and fro stays
where it is.

Sources: the operator definitions of onnx.ai up to opset 25.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from regraft.operations import INPUT
from regraft.readers.onnx.constants import Array
from regraft.readers.onnx.layers import LOWEST, absorb_bias
from regraft.readers.onnx.steps import Known, Live, Node, Value, Writer, common_order

_MASKED = -50.0
_GATES = {"Sigmoid": "SiLU", "Hardsigmoid": "Hardswish"}


def operands(writer: Writer, node: Node, values: Sequence[Value]) -> list[Live]:
    """The values as steps that can be broadcast against each other, all in one order of axes."""
    arrays = [_row(v) if isinstance(v, Known) else None for v in values]
    lives = [v for v in values if isinstance(v, Live)]
    rank = max([live.rank for live in lives] + [a.ndim for a in arrays if a is not None])
    plain = tuple(range(rank))
    order = plain if any(live.rank < rank for live in lives) else common_order(lives)
    found = []
    for value, array in zip(values, arrays, strict=True):
        if isinstance(value, Live):
            found.append(writer.plain(value) if order == plain else writer.arranged(value, order))
        elif array is not None:
            found.append(constant(writer, node, array, order, lives[0], source=value.name))
    return found


def constant(writer: Writer, node: Node, array: Array, order: Sequence[int], like: Live, *, source: str = "") -> Live:
    """A constant as a step, with the axes as `order` has them; without the leading axes of length 1.

    It is a parameter where the file names it, unless it is one number, a mask, or stands below everything trained (the
    mean that is taken off a picture).
    """
    stored = stored_array(array, order)
    while stored.ndim and stored.shape[0] == 1:
        stored = stored[0]
    masks = array.dtype.kind not in "f" or (array.size and array.min() <= _MASKED and np.unique(array).size <= 2)
    trained = bool(source) and array.size > 1 and not like.raw and not masks
    floats = stored if stored.dtype.kind == "b" else stored.astype(np.float32)
    return writer.constant(node.name, floats, like, source=source, trained=trained)


def stored_array(array: Array, order: Sequence[int]) -> Array:
    """An array of the graph with its axes where `order` puts them."""
    whole = array.reshape((1,) * (len(order) - array.ndim) + array.shape)
    return whole.transpose([list(order).index(s) for s in range(len(order))])


def _row(value: Known) -> Array:
    """A constant; where it has a row for every picture of the batch and all are alike, one row."""
    if all(a is value.arrays[0] for a in value.arrays):
        return value.arrays[0]
    first = value.arrays[0]
    rows = [a[:1] for a in value.arrays if a.ndim]
    if len(rows) == len(value.arrays) and all(
        a.shape[1:] == first.shape[1:] and a.shape[0] and np.array_equal(a, np.broadcast_to(first[:1], a.shape))
        for a in value.arrays
    ):
        return rows[0]
    return value.constant


def rows_alike(writer: Writer, node: Node, value: Known, like: Live) -> Live:
    """A constant that stands beside `like` in every picture of the batch (a class token)."""
    array = _row(value)
    if array.ndim != like.rank:
        raise ValueError(f"a constant of {array.ndim} axes beside a value of {like.rank}")
    stored = stored_array(array, like.order)
    trained = bool(value.name) and array.size > 1 and array.dtype.kind == "f" and not like.raw
    held = writer.constant(node.name, stored.astype(np.float32), like, source=value.name, trained=trained)
    if stored.shape[0] != 1:
        return Live(held.step, like.order, held.seen)
    return writer.emit(f"{node.name}_rows", "expand_batch", [held, like], {"rank": like.rank}, like.order)


def _binary(kind: str) -> Callable[[Writer, Node], Live]:
    def written(writer: Writer, node: Node) -> Live:
        values = [v for v in node.inputs if v is not None]
        result = {"add": _add_bias, "mul": _gated}.get(kind, _nothing)(writer, node, values)
        if result is not None:
            return result
        found = operands(writer, node, values)
        result = found[0]
        for number, other in enumerate(found[1:]):
            name = node.name if number == len(found) - 2 else f"{node.name}_{number}"
            result = writer.emit(name, kind, [result, other], order=_order(values, found))
        return result

    return written


def _order(values: Sequence[Value], found: Sequence[Live]) -> Sequence[int]:
    """The order of the result: that of the values that depend on the picture, if they have all its axes."""
    live = next(f for v, f in zip(values, found, strict=True) if isinstance(v, Live))
    rank = max(f.rank for f in found)
    return live.order if live.rank == rank else range(rank)


def _nothing(writer: Writer, node: Node, values: Sequence[Value]) -> Live | None:
    return None


def _gated(writer: Writer, node: Node, values: Sequence[Value]) -> Live | None:
    """x * sigmoid(x), hard or soft, as the one activation that it is."""
    if len(values) != 2:
        return None
    for x, gate in (values, values[::-1]):
        if isinstance(x, Live) and isinstance(gate, Live) and gate.sole and x.order == gate.order:
            step = writer.last(gate) if gate.step != INPUT else None
            if step is not None and step.kind in _GATES and step.inputs == (x.step,):
                writer.drop(gate)
                return writer.emit(node.name, _GATES[step.kind], [x])
    return None


def _add_bias(writer: Writer, node: Node, values: Sequence[Value]) -> Live | None:
    """The layer that goes in, with the constant that is added as its bias, where that is what is meant."""
    lives = [v for v in values if isinstance(v, Live)]
    constants = [v for v in values if isinstance(v, Known)]
    if len(lives) != 1 or len(constants) != 1:
        return None
    array = _row(constants[0])
    if array.ndim > lives[0].rank or array.dtype.kind != "f":
        return None
    return absorb_bias(writer, lives[0], stored_array(array, lives[0].order))


def _power(writer: Writer, node: Node) -> Live:
    base, exponent = node.inputs[:2]
    if isinstance(base, Live) and isinstance(exponent, Known) and exponent.constant.size == 1:
        return writer.emit(node.name, "pow", [base], {"exponent": _number(exponent.constant)})
    return _binary("pow")(writer, node)


def _reciprocal(writer: Writer, node: Node) -> Live:
    return writer.emit(node.name, "pow", [node.live()], {"exponent": -1.0})


def _extreme(kind: str) -> Callable[[Writer, Node], Live]:
    """Min or Max; against one number it is a limit."""

    def written(writer: Writer, node: Node) -> Live:
        lives = [v for v in node.inputs if isinstance(v, Live)]
        limits = [v.constant for v in node.inputs if isinstance(v, Known)]
        if len(lives) == 1 and len(limits) == 1 and limits[0].size == 1:
            bound = "min" if kind == "maximum" else "max"
            return _limited(writer, node, lives[0], {bound: _number(limits[0])})
        return _binary(kind)(writer, node)

    return written


def _clip(writer: Writer, node: Node) -> Live:
    bounds = {}
    for index, name in ((1, "min"), (2, "max")):
        given = node.constant(index)
        value = node.attributes.get(name) if given is None else _number(given)
        if value is not None and abs(value) < -LOWEST:
            bounds[name] = float(value)
    return _limited(writer, node, node.live(), bounds)


def _limited(writer: Writer, node: Node, x: Live, bounds: dict[str, float]) -> Live:
    if bounds == {"min": 0.0}:
        return writer.emit(node.name, "ReLU", [x])
    if bounds == {"min": 0.0, "max": 6.0}:
        return writer.emit(node.name, "ReLU6", [x])
    return writer.emit(node.name, "clamp", [x], bounds) if bounds else x


def _where(writer: Writer, node: Node) -> Live:
    if node.constant(0) is None:
        raise ValueError("a choice that depends on the picture")
    values = [v for v in node.inputs if v is not None]
    found = operands(writer, node, values)
    return writer.emit(node.name, "where", found, order=_order(values, found))


def _scaler(writer: Writer, node: Node) -> Live:
    """(x - offset) * scale, as scikit-learn prepares rows of numbers."""
    x = node.live()
    for attribute, kind in (("offset", "sub"), ("scale", "mul")):
        numbers = np.array(node.attributes[attribute], np.float32)
        other = writer.constant(f"{node.name}_{attribute}", numbers, x)
        x = writer.emit(f"{node.name}_{kind}", kind, [x, other])
    return x


def _function(kind: str) -> Callable[[Writer, Node], Live]:
    def written(writer: Writer, node: Node) -> Live:
        return writer.emit(node.name, kind, [node.live()])

    return written


def _number(array: Array) -> float:
    return float(str(np.float32(array.reshape(-1)[0])))


ARITHMETIC_STEPS: dict[str, Callable[[Writer, Node], Live]] = {
    "Abs": _function("abs"),
    "Add": _binary("add"),
    "Clip": _clip,
    "Div": _binary("div"),
    "Erf": _function("erf"),
    "Exp": _function("exp"),
    "Log": _function("log"),
    "Max": _extreme("maximum"),
    "Min": _extreme("minimum"),
    "Mul": _binary("mul"),
    "Neg": _function("neg"),
    "Pow": _power,
    "Reciprocal": _reciprocal,
    "Scaler": _scaler,
    "Sqrt": _function("sqrt"),
    "Sub": _binary("sub"),
    "Sum": _binary("add"),
    "Where": _where,
}
"""What the arithmetic of ONNX is written as; at least one input depends on the picture."""
