"""Random numbers whose outcome does not matter: a dropout that keeps everything, as graphs for inference hold it.

    uniform() >= rate           is true for a rate of 0
    floor(keep + uniform())     is 1 where everything is kept

Knows the range of a number that is drawn. Not covered: what truly depends on it, which the caller refuses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from regraft.readers.onnx.steps import Known, Value
from regraft.readers.tensorflow.nodes import GraphNode

DRAWS = ("RandomUniform", "StatelessRandomGetKeyCounter", "StatelessRandomUniform", "StatelessRandomUniformV2")


@dataclass(frozen=True)
class Drawn:
    """Numbers from low up to, but not including, high, and the step that draws them."""

    node: GraphNode
    low: float = 0.0
    high: float = 1.0


def follow(op: str, inputs: list[Value | Drawn]) -> Drawn | np.generic | None:
    """What a step makes of numbers drawn at random: others, one constant, or None where it depends on them."""
    drawn = next(v for v in inputs if isinstance(v, Drawn))
    if len(inputs) == 1:
        return _alone(op, drawn)
    other = inputs[0] if inputs[1] is drawn else inputs[1]
    if len(inputs) != 2 or not isinstance(other, Known) or other.constant.size != 1:
        return None
    number, first = float(other.constant.reshape(-1)[0]), inputs[0] is drawn
    if op in ("Add", "AddV2") or (op == "Sub" and first):
        by = -number if op == "Sub" else number
        return replace(drawn, low=drawn.low + by, high=drawn.high + by)
    if op == "Mul" and number > 0:
        return replace(drawn, low=drawn.low * number, high=drawn.high * number)
    return _compared(op, drawn, number) if first else None


def _alone(op: str, drawn: Drawn) -> Drawn | np.generic | None:
    if op in ("Identity", "Cast"):
        return drawn
    if op == "Floor" and math.floor(drawn.low) == math.ceil(drawn.high) - 1:
        return np.float32(math.floor(drawn.low))
    return None


def _compared(op: str, drawn: Drawn, number: float) -> np.generic | None:
    if op not in ("GreaterEqual", "Greater", "Less", "LessEqual"):
        return None
    if drawn.high <= number:
        return np.bool_(op.startswith("Less"))
    above = drawn.low > number if op in ("Greater", "LessEqual") else drawn.low >= number
    return np.bool_(op.startswith("Greater")) if above else None
