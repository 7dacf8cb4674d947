"""One operation of TensorFlow, and what it can be made of: the operations that regraft writes already (those of ONNX).

An operation on constants and sizes alone is worked out at once; any other becomes steps. The modules
`layers`, `axes` and `arithmetic` say of each operation what it is made of.

Knows one operation at a time, and nothing of graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from regraft.readers.onnx.constants import fold, integers
from regraft.readers.onnx.graph import STEPS
from regraft.readers.onnx.steps import Known, Live, Node, Value, Writer, known
from regraft.readers.onnx.tensors import Allowance
from regraft.readers.tensorflow.tensors import Array

OPSET = 18
MOVED = ("Reshape", "Squeeze", "Transpose", "Unsqueeze")
"""A weight that was only moved is still that weight."""


@dataclass(frozen=True)
class Setting:
    """What all steps of a network share: where they are written, and the batches for which shapes are watched.

    fixed: the batch that the file was written for, None where it is left open.
    """

    writer: Writer
    allowed: Allowance
    batches: tuple[int, ...]
    fixed: int | None = None


@dataclass(frozen=True)
class Step:
    """One operation: a safe name, TensorFlow's name for what it does, attributes, and the values that go in."""

    name: str
    op: str
    attributes: Mapping[str, Any]
    inputs: tuple[Value, ...]
    setting: Setting = field(repr=False)

    def do(self, op: str, *inputs: Value | None, **attributes: Any) -> Value:
        """The first output of an operation of ONNX: worked out where everything is known, else written as steps."""
        if all(v is None or isinstance(v, Known) for v in inputs):
            rows = [[v.arrays[i] if isinstance(v, Known) else None for v in inputs] for i in self.sights(inputs)]
            found = [self._folded(op, attributes, row) for row in rows]
            first = inputs[0] if inputs and op in MOVED else None
            name = first.name if isinstance(first, Known) else ""
            return known(found * (len(self.setting.batches) if len(found) == 1 else 1), name)
        if op not in STEPS:
            raise ValueError("it depends on the picture")
        values = tuple(inputs)
        batches, fixed = self.setting.batches, self.setting.fixed
        result: Any = STEPS[op](
            self.setting.writer, Node(self.name, op, OPSET, attributes, values, (True,), batches, fixed)
        )
        output: Value | None = result[0] if isinstance(result, list) else result
        if output is None:
            raise ValueError("it has no output")
        return output

    def layer(self, kind: str, **options: float) -> Live:
        """A layer or function of torch on the first input."""
        return self.setting.writer.emit(self.name, kind, [self.live(0)], options)

    def live(self, index: int) -> Live:
        """An input that depends on the picture."""
        value = self.inputs[index]
        if not isinstance(value, Live):
            raise ValueError("it works on constants alone")
        return value

    def constant(self, index: int) -> Array:
        """An input that does not depend on the picture, nor on the size of the batch."""
        value = self.inputs[index]
        if not isinstance(value, Known):
            raise ValueError(f"input {index} depends on the picture")
        return value.constant

    def whole(self, index: int) -> list[int]:
        """Such an input as a list of whole numbers."""
        return integers(self.constant(index))

    def value(self, array: Any) -> Known:
        """A constant made here."""
        return Known((np.asarray(array),) * len(self.setting.batches))

    def computed(self, function: Callable[..., Any]) -> Known:
        """A numpy function of inputs that are all known."""
        rows = []
        for i in self.sights(self.inputs):
            arrays = [v.arrays[i] for v in self.inputs if isinstance(v, Known)]
            if len(arrays) < len(self.inputs):
                raise ValueError("it depends on the picture")
            self.setting.allowed.spend(8 * int(np.prod(np.broadcast_shapes(*(a.shape for a in arrays)), dtype=object)))
            with np.errstate(all="ignore"):
                rows.append(np.asarray(function(*arrays)))
        return known(rows * (len(self.setting.batches) if len(rows) == 1 else 1))

    def sights(self, inputs: Sequence[Value | None]) -> range:
        """The sights to look at: one where no input varies."""
        varies = any(isinstance(v, Known) and any(a is not v.arrays[0] for a in v.arrays) for v in inputs)
        return range(len(self.setting.batches) if varies else 1)

    def text(self, name: str, default: str) -> str:
        """An attribute that is text."""
        return str(self.attributes.get(name, default))

    def number(self, name: str, default: float) -> float:
        """An attribute that is a number: the shortest one that is the same float32."""
        return float(str(np.float32(self.attributes.get(name, default))))

    def _folded(self, op: str, attributes: Mapping[str, Any], row: Sequence[Array | None]) -> Array:
        found = fold(op, attributes, row, OPSET, self.setting.allowed)
        if found is None:
            raise ValueError("it works on constants alone")
        return found[0]


Write = Callable[[Step], Value | list[Value]]
"""What writes an operation: from the values that go in to its first output, or to all outputs."""


def same(op: str) -> Write:
    """An operation of ONNX of the same meaning."""
    return lambda step: step.do(op, *step.inputs)
