"""Einsum of TensorFlow: products of two tensors by named axes, as transposes, reshapes and one matrix product.

    axes of both sides and the result   lead the product (heads, the batch)
    axes of both sides alone            are summed over
    axes of one side and the result     stay

Knows one step. Not covered: one tensor alone, or three; an axis that is summed over on one side; a diagonal.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from regraft.readers.onnx.steps import Known, Live, Value, known
from regraft.readers.tensorflow.steps import Step


@dataclass(frozen=True)
class _Side:
    """A tensor with a letter for each axis."""

    value: Value
    letters: str

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return self.value.shapes if isinstance(self.value, Live) else [tuple(a.shape) for a in self.value.arrays]


def einsum(step: Step) -> Value:
    """The product of two sides; a weight is taken as the right one, so that a dense layer comes out as one."""
    sides, result = _parsed(step)
    left, right = sides[::-1] if isinstance(sides[0].value, Known) else sides
    both = [c for c in left.letters if c in right.letters]
    lead, summed = [c for c in both if c in result], [c for c in both if c not in result]
    rows, columns = ([c for c in side.letters if c not in both] for side in (left, right))
    if sorted(result) != sorted([*lead, *rows, *columns]):
        raise ValueError(f"the equation {step.text('equation', '')!r}")
    sizes = [dict(zip(left.letters + right.letters, a + b, strict=True)) for a, b in _pairs(left, right)]
    apart = isinstance(right.value, Known) and not lead  # the rows of a dense layer may stay as they are
    product = step.do(
        "MatMul",
        _arranged(step, left, [[c] for c in lead + rows] + [summed] if apart else [*([c] for c in lead), rows, summed]),
        _arranged(step, right, [*([c] for c in lead), summed, columns]),
    )
    shape = [[size[c] for c in (*lead, *rows, *columns)] for size in sizes]
    if len(columns) != 1 or not (apart or len(rows) == 1):
        product = step.do("Reshape", product, known([np.array(s, np.int64) for s in shape]), allowzero=1)
    return _transposed(step, _Side(product, "".join([*lead, *rows, *columns])), result)


def _parsed(step: Step) -> tuple[list[_Side], str]:
    """Both sides with their letters, and those of the result; dots become letters of their own."""
    given, arrow, result = step.text("equation", "").replace(" ", "").partition("->")
    names = given.split(",")
    if not arrow or len(names) != 2 or len(step.inputs) != 2:
        raise ValueError(f"the equation {step.text('equation', '')!r}")
    spare = [c for c in string.ascii_letters if c not in given]
    sides, dots = [], ""
    for name, value in zip(names, step.inputs, strict=True):
        rank = value.rank if isinstance(value, Live) else value.arrays[0].ndim
        missing = rank - len(name.replace("...", ""))
        if "..." in name:
            own = "".join(spare[:missing])
            if dots and own:
                raise ValueError("dots on both sides")
            dots, name = dots or own, name.replace("...", own)
        if len(set(name)) != rank or len(name) != rank:
            raise ValueError(f"the axes {name!r} of a tensor with {rank}")
        sides.append(_Side(value, name))
    return sides, result.replace("...", dots)


def _pairs(left: _Side, right: _Side) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return list(zip(left.shapes, right.shapes, strict=True))


def _transposed(step: Step, side: _Side, letters: Sequence[str]) -> Value:
    places = [side.letters.index(c) for c in letters]
    return side.value if places == sorted(places) else step.do("Transpose", side.value, perm=places)


def _arranged(step: Step, side: _Side, groups: Sequence[Sequence[str]]) -> Value:
    """The axes in this order, those of a group as one."""
    turned = _transposed(step, side, [c for group in groups for c in group])
    if all(len(group) == 1 for group in groups):
        return turned
    shapes = []
    for shape in side.shapes:
        sizes = dict(zip(side.letters, shape, strict=True))
        shapes.append(np.array([int(np.prod([sizes[c] for c in group])) for group in groups], np.int64))
    return step.do("Reshape", turned, known(shapes), allowzero=1)
