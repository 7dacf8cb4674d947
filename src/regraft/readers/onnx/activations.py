"""The activations of ONNX as steps.

Source: the operator definitions of onnx.ai up to opset 25.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from regraft.readers.onnx.steps import Live, Node, Writer


def _prelu(writer: Writer, node: Node) -> Live:
    """Slopes for all, or one for each place on one axis, which must stand second for torch."""
    x, slope = node.live(), node.given(1)
    lengths = [1] * (x.rank - slope.ndim) + list(slope.shape)
    long = [axis for axis, length in enumerate(lengths) if length != 1]
    if len(long) > 1 or long == [0] or len(lengths) > x.rank:
        raise ValueError(f"slopes of shape {list(slope.shape)}")
    if long and x.stored(long[0]) != 1:
        axes = [0, long[0], *(a for a in range(1, x.rank) if a != long[0])]
        x = writer.arranged(x, [axes.index(a) for a in range(x.rank)])
    return writer.emit(node.owner(1), "PReLU", [x], {"num_parameters": int(slope.size)}, weight=slope.reshape(-1))


def _hard_sigmoid(writer: Writer, node: Node) -> Live:
    alpha, beta = node.number("alpha", 0.2), node.number("beta", 0.5)
    x = node.live()
    if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5:
        return writer.emit(node.name, "Hardsigmoid", [x])
    for number, kind in ((alpha, "mul"), (beta, "add")):
        value = writer.constant(f"{node.name}_{kind}", np.array(number, np.float32), x)
        x = writer.emit(f"{node.name}_{kind}", kind, [x, value])
    return writer.emit(node.name, "clamp", [x], {"min": 0.0, "max": 1.0})


def _selu(writer: Writer, node: Node) -> Live:
    known = (1.6732632423543772, 1.0507009873554805)
    found = (node.number("alpha", known[0]), node.number("gamma", known[1]))
    if max(abs(a - b) for a, b in zip(known, found, strict=True)) > 1e-5:
        raise ValueError(f"a Selu of {found}")
    return writer.emit(node.name, "SELU", [node.live()])


def _gelu(writer: Writer, node: Node) -> Live:
    return writer.emit(node.name, "GELU", [node.live()], {"approximate": node.attributes.get("approximate", "none")})


def _swish(writer: Writer, node: Node) -> Live:
    if node.number("alpha", 1.0) != 1:
        raise ValueError("a Swish with a factor")
    return writer.emit(node.name, "SiLU", [node.live()])


def _softmax(writer: Writer, node: Node) -> Live:
    """Over one axis; before version 13 of the operators, over all axes from there on, of which one may be long."""
    x = node.live()
    axis = int(node.attributes.get("axis", -1 if node.opset >= 13 else 1)) % x.rank
    if x.pictures(axis):
        raise ValueError("it goes over the pictures of the batch")
    if node.opset < 13 and any(size != 1 for shape in x.shapes for size in shape[axis + 1 :]):
        raise ValueError(f"a {node.op} over several axes at once")
    return writer.emit(node.name, node.op, [x], {"dim": x.stored(axis)})


def _activation(kind: str, **options: tuple[str, float]) -> Callable[[Writer, Node], Live]:
    """An activation of torch; options: of each of its arguments, the attribute of ONNX and its default."""

    def written(writer: Writer, node: Node) -> Live:
        given = {own: node.number(theirs, default) for own, (theirs, default) in options.items()}
        return writer.emit(node.name, kind, [node.live()], given)

    return written


ACTIVATION_STEPS: dict[str, Callable[[Writer, Node], Live]] = {
    "Elu": _activation("ELU", alpha=("alpha", 1.0)),
    "Gelu": _gelu,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _activation("Hardswish"),
    "LeakyRelu": _activation("LeakyReLU", negative_slope=("alpha", 0.01)),
    "LogSoftmax": _softmax,
    "Mish": _activation("Mish"),
    "PRelu": _prelu,
    "Relu": _activation("ReLU"),
    "Selu": _selu,
    "Sigmoid": _activation("Sigmoid"),
    "Softmax": _softmax,
    "Softplus": _activation("Softplus"),
    "Swish": _swish,
    "Tanh": _activation("Tanh"),
}
"""What each activation of ONNX is written as; its first input depends on the picture."""
