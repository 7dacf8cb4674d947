"""The arithmetic of TensorFlow, and operations that hand on what they are given.

Source: the operation definitions of TensorFlow 2 (`tensorflow/core/api_def/base_api`). Not covered: comparisons of
values that depend on the picture, rounding, complex numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from regraft.readers.onnx.steps import Known, Live, Value
from regraft.readers.tensorflow.steps import Step, Write, same
from regraft.readers.tensorflow.tensors import DTYPES, FLOATS


def _numpy(function: Callable[..., Any]) -> Write:
    """A function for constants and sizes alone."""
    return lambda step: step.computed(function)


def _square(step: Step) -> Value:
    return step.do("Mul", step.inputs[0], step.inputs[0])


def _squared_difference(step: Step) -> Value:
    difference = step.do("Sub", *step.inputs)
    return step.do("Mul", difference, difference)


def _rsqrt(step: Step) -> Value:
    if isinstance(step.inputs[0], Known):
        return step.computed(lambda a: (1 / np.sqrt(a)).astype(a.dtype))
    return step.layer("rsqrt")


def _erfc(step: Step) -> Value:
    return step.do("Sub", step.value(np.float32(1)), step.do("Erf", step.inputs[0]))


def _cast(step: Step) -> Value:
    """Floating numbers of every width stay float32 once they depend on the picture."""
    wanted = int(step.attributes["DstT"])
    if wanted not in DTYPES:
        raise ValueError(f"a type of number {wanted}")
    if isinstance(step.inputs[0], Live):
        if wanted not in FLOATS:
            raise ValueError("it rounds values that depend on the picture")
        return step.inputs[0]
    kind = np.float32 if wanted in FLOATS else np.dtype(str(DTYPES[wanted]).removeprefix("torch."))
    cast = step.computed(lambda a: a.astype(kind))
    return replace(cast, name=step.inputs[0].name)


def _scaled(op: str) -> Write:
    """A product or quotient; one by the number 1, as a dropout that is switched off leaves it, is no step."""

    def scaled(step: Step) -> Value:
        for place in (1, 0) if op == "Mul" else (1,):
            other = step.inputs[1 - place]
            if isinstance(other, Live) and _is(step.inputs[place], 1.0):
                return other
        return step.do(op, *step.inputs)

    return scaled


def _is(value: Value, number: float) -> bool:
    return isinstance(value, Known) and all(a.ndim == 0 and a == number for a in value.arrays)


def _chosen(step: Step) -> Value:
    """One of two values by a mask; one truth value for all leaves that one alone, beside a number."""
    mask, *values = step.inputs
    for truth, (value, other) in ((1.0, values), (0.0, values[::-1])):
        number = isinstance(other, Known) and all(a.ndim == 0 for a in other.arrays)
        if _is(mask, truth) and (
            number or (isinstance(other, Live) and other.shapes == getattr(value, "shapes", None))
        ):
            return value
    return step.do("Where", *step.inputs)


def _first(step: Step) -> Value:
    return step.inputs[0]


ARITHMETIC_STEPS: dict[str, Write] = {
    **dict.fromkeys(
        ("Identity", "StopGradient", "PreventGradient", "Snapshot", "EnsureShape", "CheckNumerics"), _first
    ),
    "PlaceholderWithDefault": _first,
    "IdentityN": lambda step: list(step.inputs),
    "Abs": same("Abs"),
    "Add": same("Add"),
    "AddN": same("Sum"),
    "AddV2": same("Add"),
    "Cast": _cast,
    "ClipByValue": same("Clip"),
    "Div": _scaled("Div"),
    "Equal": _numpy(np.equal),
    "Erf": same("Erf"),
    "Erfc": _erfc,
    "Exp": same("Exp"),
    "FloorDiv": _numpy(np.floor_divide),
    "FloorMod": _numpy(np.mod),
    "Greater": _numpy(np.greater),
    "GreaterEqual": _numpy(np.greater_equal),
    "Less": _numpy(np.less),
    "LessEqual": _numpy(np.less_equal),
    "LogicalAnd": _numpy(np.logical_and),
    "LogicalNot": _numpy(np.logical_not),
    "LogicalOr": _numpy(np.logical_or),
    "Log": same("Log"),
    "Maximum": same("Max"),
    "Minimum": same("Min"),
    "Mul": _scaled("Mul"),
    "Neg": same("Neg"),
    "OnesLike": _numpy(np.ones_like),
    "Pow": same("Pow"),
    "RealDiv": _scaled("Div"),
    "Reciprocal": same("Reciprocal"),
    "Rsqrt": _rsqrt,
    "Select": _chosen,
    "SelectV2": _chosen,
    "Sqrt": same("Sqrt"),
    "Square": _square,
    "SquaredDifference": _squared_difference,
    "ZerosLike": _numpy(np.zeros_like),
    "Sub": same("Sub"),
}
"""What each of these operations is made of."""
