"""Layers that a TensorFlow graph spells out as arithmetic, found by their form.

    batch normalisation   k = rsqrt(variance + epsilon) [* factor]    x * k + (shift - mean * k)    x * k + (-mean) * k
    SiLU                  x * sigmoid([beta *] x)
    GELU                  (half * x) * erfc(-x * root)                (half * x) * (one + erf(x / root))

Layer normalisation has the form of the first; whether statistics are constants, and which numbers the others have, is
for the caller to see. Knows nodes, not values. Not covered: other spellings, which stay arithmetic.

Source: `tf.nn.batch_normalization`, `tf.nn.silu` and `tf.nn.gelu`, on which Keras 2 and 3 stand.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from regraft.readers.tensorflow.nodes import Graph, GraphNode, Ref

HOPS = 16
HANDED_ON = ("Identity", "Cast", "StopGradient")


@dataclass(frozen=True)
class Norm:
    """What goes into a normalisation, by reference; `under` are variance and epsilon as they are summed."""

    x: Ref
    mean: Ref
    under: tuple[Ref, Ref]
    factor: Ref | None
    shift: Ref | None


def find_norm(graph: Graph, node: GraphNode) -> Norm | None:
    """The normalisation whose last operation is this one; ValueError where a reference leads nowhere."""
    if node.op not in ("Add", "AddV2", "Sub") or len(node.inputs) != 2:
        return None
    first, second = node.inputs
    for scaled, rest in ((first, second),) if node.op == "Sub" else ((first, second), (second, first)):
        for x, k in _products(graph, scaled):
            for under, factor in _scales(graph, k):
                for shift, mean, again in _shifts(graph, rest, minus=node.op == "Sub"):
                    if _see(graph, again) == _see(graph, k):
                        return Norm(x, mean, under, factor, shift)
    return None


@dataclass(frozen=True)
class Curve:
    """An activation of x, by torch's name for it, and the numbers in its spelling as they are to be."""

    kind: str
    x: Ref
    numbers: tuple[tuple[Ref, float], ...]


def find_curve(graph: Graph, node: GraphNode) -> Iterator[Curve]:
    """The activations of which this may be the last operation; ValueError where a reference leads nowhere."""
    if node.op != "Mul" or len(node.inputs) != 2:
        return
    for left, right in (node.inputs, node.inputs[::-1]):
        for inner in _inputs(graph, right, "Sigmoid", 1):
            for x, numbers in _times(graph, inner[0]):
                if _see(graph, x) == _see(graph, left):
                    yield Curve("SiLU", left, numbers)
        for half, x in _products(graph, left):
            for other, numbers in _errors(graph, right):
                if _see(graph, other) == _see(graph, x):
                    yield Curve("GELU", x, ((half, 0.5), *numbers))


def _times(graph: Graph, ref: Ref) -> Iterator[tuple[Ref, tuple[tuple[Ref, float], ...]]]:
    yield ref, ()
    for beta, x in _products(graph, ref):
        yield x, ((beta, 1.0),)


def _errors(graph: Graph, ref: Ref) -> Iterator[tuple[Ref, tuple[tuple[Ref, float], ...]]]:
    """x in erfc(-x / sqrt(2)) or 1 + erf(x / sqrt(2))."""
    for inner in _inputs(graph, ref, "Erfc", 1):
        for negated, root in _products(graph, inner[0]):
            yield from ((x[0], ((root, math.sqrt(0.5)),)) for x in _inputs(graph, negated, "Neg", 1))
    for one, error in _sums(graph, ref):
        for inner in _inputs(graph, error, "Erf", 1):
            yield from ((x, ((one, 1.0), (root, math.sqrt(2)))) for x, root in _pairs(graph, inner[0], "RealDiv"))
            yield from ((x, ((one, 1.0), (root, math.sqrt(0.5)))) for x, root in _products(graph, inner[0]))


def _scales(graph: Graph, k: Ref) -> Iterator[tuple[tuple[Ref, Ref], Ref | None]]:
    for root, factor in ((k, None), *_products(graph, k)):
        for inner in _inputs(graph, root, "Rsqrt", 1):
            yield from ((pair, factor) for pair in _sums(graph, inner[0]))


def _shifts(graph: Graph, ref: Ref, *, minus: bool) -> Iterator[tuple[Ref | None, Ref, Ref]]:
    """shift (None where there is none), mean and k."""
    if minus:
        yield from ((None, mean, k) for mean, k in _products(graph, ref))
        return
    for shift, taken in _pairs(graph, ref, "Sub"):
        yield from ((shift, mean, k) for mean, k in _products(graph, taken))
    for negated in _inputs(graph, ref, "Neg", 1):
        yield from ((None, mean, k) for mean, k in _products(graph, negated[0]))
    for left, k in _products(graph, ref):
        yield from ((None, mean[0], k) for mean in _inputs(graph, left, "Neg", 1))


def _products(graph: Graph, ref: Ref) -> Iterator[tuple[Ref, Ref]]:
    """The two sides of a product, either way round."""
    for a, b in _pairs(graph, ref, "Mul"):
        yield a, b
        yield b, a


def _sums(graph: Graph, ref: Ref) -> Iterator[tuple[Ref, Ref]]:
    """The two sides of a sum, either way round."""
    for op in ("AddV2", "Add"):
        for a, b in _pairs(graph, ref, op):
            yield a, b
            yield b, a


def _pairs(graph: Graph, ref: Ref, op: str) -> Iterator[tuple[Ref, Ref]]:
    for inputs in _inputs(graph, ref, op, 2):
        yield inputs[0], inputs[1]


def _inputs(graph: Graph, ref: Ref, op: str, count: int) -> Iterator[tuple[Ref, ...]]:
    node = graph.node(_see(graph, ref)[0])
    if node.op == op and len(node.inputs) == count:
        yield node.inputs


def _see(graph: Graph, ref: Ref) -> Ref:
    """What a value is before it was handed on."""
    for _ in range(HOPS):
        ref = graph.resolve(ref)
        node = graph.node(ref[0])
        if node.op not in HANDED_ON or not node.inputs:
            break
        ref = node.inputs[0]
    return ref
