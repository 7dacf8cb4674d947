"""The graph of an ONNX model as a network of regraft: which steps are needed, in what order they are written.

A step whose inputs are all known is worked out at once; the others are written as layers and functions. The batch is
left open, also where the file was written for one picture at a time.

Knows the messages of the format, not what single operators mean.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from regraft.errors import ReaderError, first_line
from regraft.operations import INPUT, Operations
from regraft.printable import printable
from regraft.readers.onnx.activations import ACTIVATION_STEPS
from regraft.readers.onnx.arithmetic import ARITHMETIC_STEPS
from regraft.readers.onnx.axes import AXIS_STEPS
from regraft.readers.onnx.constants import Array, fold
from regraft.readers.onnx.input import Picture, picture_of
from regraft.readers.onnx.layers import LAYER_STEPS
from regraft.readers.onnx.resize import RESIZE_STEPS
from regraft.readers.onnx.steps import Known, Live, Node, Value, Writer, known, safe_name
from regraft.readers.onnx.tensors import Allowance, read_tensor

STEPS: dict[str, Callable[[Writer, Node], Any]] = {
    **LAYER_STEPS,
    **ACTIVATION_STEPS,
    **ARITHMETIC_STEPS,
    **AXIS_STEPS,
    **RESIZE_STEPS,
}
_DOMAINS = ("", "ai.onnx")
_OPEN_BATCH = "export it with an open batch (dynamic_axes or dynamic_shapes)"
_LEARN = {"ZipMap": "Identity", "Scaler": "Scaler"}
"""Of scikit-learn's operators: probabilities by class, which stay a row of numbers, and the scaling of inputs."""


@dataclass(frozen=True)
class Graph:
    """What a graph became; input_shape without the batch, None where it is left open."""

    operations: Operations
    tensors: dict[str, torch.Tensor]
    input_shape: tuple[int, ...] | None
    passed_over: tuple[str, ...]


@dataclass
class _Reading:
    """A graph being read: values by name, and what was asked of the initializers."""

    path: Path
    opset: int
    allowed: Allowance
    picture: Picture
    initializers: Mapping[str, Any]
    values: dict[str, Value]
    uses: Counter[str]
    writer: Writer
    read: set[str]


def read_graph(graph: Any, path: Path, opset: int, allowed: Allowance, output: str | None) -> Graph:
    """The network that a GraphProto describes; ReaderError where it cannot be followed."""
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    wanted = _output(graph, path, output)
    nodes, uses = _needed(graph, wanted)
    picture = picture_of(graph, initializers, nodes, path)
    start = Live(INPUT, picture.order, picture.sights, raw=True, sole=uses[picture.name] < 2)
    writer = Writer(allowed)
    reading = _Reading(path, opset, allowed, picture, initializers, {picture.name: start}, uses, writer, set())
    for node in nodes:
        _run(reading, node)
    last = _ended(reading, wanted)
    return Graph(
        Operations(tuple(writer.steps), last),
        writer.tensors,
        picture.shape,
        tuple(sorted(initializers.keys() - reading.read)),
    )


def _output(graph: Any, path: Path, wanted: str | None) -> str:
    """The name of the output that is meant: the only one, or the only one that holds floating numbers."""
    import onnx

    names = [o.name for o in graph.output]
    floats = (0, onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE, onnx.TensorProto.BFLOAT16)
    fitting = [o.name for o in graph.output if o.type.tensor_type.elem_type in floats]
    chosen = fitting if wanted is None else [name for name in names if name == wanted]
    if len(chosen) == 1:
        return str(chosen[0])
    listed = ", ".join(repr(printable(name)[:60]) for name in names[:8]) or "nothing"
    raise ReaderError(f"A network must give one output; {path} gives {listed}: say which one is meant.")


def _needed(graph: Any, wanted: str) -> tuple[list[Any], Counter[str]]:
    """The nodes that the output depends on, in the order of the file, and how many of them use each value."""
    makers = {name: i for i, node in enumerate(graph.node) for name in node.output if name}
    found: set[int] = set()
    ahead = [wanted]
    while ahead:
        maker = makers.get(ahead.pop())
        if maker is not None and maker not in found:
            found.add(maker)
            ahead.extend(_reads(graph.node[maker]))
    nodes = [graph.node[i] for i in sorted(found)]
    return nodes, Counter([wanted, *(name for node in nodes for name in _reads(node))])


def _reads(node: Any) -> Iterator[str]:
    """The names that a node and the graphs inside it read."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        for graph in [attribute.g, *attribute.graphs]:
            yield from (output.name for output in graph.output)
            for inner in graph.node:
                yield from _reads(inner)


def _ended(reading: _Reading, wanted: str) -> str:
    """The step that makes the output."""
    value = _value(reading, wanted)
    if not isinstance(value, Live):
        raise ReaderError(f"The output of a network must depend on its input; that of {reading.path} does not.")
    if not any(t.is_floating_point() for t in reading.writer.tensors.values()):
        raise ReaderError(f"A network must hold weights; {reading.path} holds none.")
    if value.rank != 4 or value.order != reading.picture.order:  # maps of a channels-last graph come out as they go in
        value = reading.writer.plain(value)
    if any(shape[:1] != (batch,) for shape, batch in zip(value.shapes, reading.picture.batches, strict=True)):
        raise ReaderError(
            f"A network must give a row for every picture; the output of {reading.path} is {list(value.shapes[0])} for "
            f"{reading.picture.batches[0]} pictures: {_OPEN_BATCH}."
        )
    return value.step


def _value(reading: _Reading, name: str) -> Value:
    """A value that was computed, or an initializer, read when it is first asked for."""
    if name in reading.values:
        return reading.values[name]
    if name not in reading.initializers:
        shown = printable(name)[:100]
        raise ReaderError(f"The steps of {reading.path} must stand in order; {shown!r} is used before it is made.")
    reading.read.add(name)
    array = read_tensor(reading.initializers[name], reading.path, reading.allowed)
    reading.values[name] = Known((array,) * len(reading.picture.sights), printable(name))
    return reading.values[name]


# ---- one step ---------------------------------------------------------------------------------------------------


def _run(reading: _Reading, proto: Any) -> None:
    """Work out one node, or write it, and keep what it gives."""
    op = _operator(reading, proto)
    inputs = tuple(_value(reading, name) if name else None for name in proto.input)
    try:
        with np.errstate(all="ignore"):
            results = _results(reading, proto, op, inputs)
    except ReaderError:
        raise
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as e:
        raise _refused(reading, proto, printable(first_line(e))[:200]) from e
    for name, value in zip(proto.output, results, strict=False):
        if name and value is not None:
            alone = reading.uses[name] < 2
            reading.values[name] = replace(value, sole=value.sole and alone) if isinstance(value, Live) else value


def _results(reading: _Reading, proto: Any, op: str, inputs: tuple[Value | None, ...]) -> Sequence[Value | None]:
    """What a node gives."""
    attributes = _attributes(reading, proto)
    if op == "If":
        return _branch(reading, proto, inputs)
    if op == "Constant":
        array = _constant(attributes)
        return [Known((array,) * len(reading.picture.sights), printable(proto.output[0]))]
    if op in ("Shape", "Size"):
        return [_sizes(op, attributes, inputs)]
    if any(isinstance(value, Live) for value in inputs):
        return _written(reading, proto, op, attributes, inputs)
    return _folded(reading, op, attributes, inputs)


def _operator(reading: _Reading, proto: Any) -> str:
    """The operator of a node, where it is one that is known."""
    op = str(proto.op_type)
    if proto.domain == "ai.onnx.ml" and op in _LEARN:
        return _LEARN[op]
    if proto.domain not in _DOMAINS:
        raise _refused(reading, proto, f"it belongs to {printable(proto.domain)[:60]!r} and not to onnx.ai")
    return op


def _folded(reading: _Reading, op: str, attributes: Mapping[str, Any], inputs: Sequence[Value | None]) -> list[Value]:
    """The values of a step on known inputs; worked out once where these are constants."""
    givens = [v for v in inputs if isinstance(v, Known)]
    count = len(reading.picture.sights)
    constant = all(a is v.arrays[0] for v in givens for a in v.arrays)
    rows = []
    for sight in range(1 if constant else count):
        arrays = [v.arrays[sight] if isinstance(v, Known) else None for v in inputs]
        found = fold(op, attributes, arrays, reading.opset, reading.allowed)
        if found is None:
            alone = "it works on constants alone, which only simple operators may"
            raise ValueError(alone if op in STEPS else "it is not among the operators that regraft knows")
        rows.append(found)
    name = max(givens, key=lambda v: v.arrays[0].size).name if givens else ""
    return [known(each * count if constant else each, name) for each in zip(*rows, strict=True)]


def _written(
    reading: _Reading, proto: Any, op: str, attributes: Mapping[str, Any], inputs: tuple[Value | None, ...]
) -> list[Value | None]:
    """The values of a step that depends on the picture."""
    if op not in STEPS:
        rounding = "Quantize" in op or "Integer" in op or op.startswith("QLinear")
        raise ValueError(
            "it rounds what depends on the picture to whole numbers"
            if rounding
            else "it is not among the operators that regraft knows"
        )
    wanted = tuple(reading.uses[name] > 0 for name in proto.output)
    picture = reading.picture
    node = Node(
        _path(proto), op, reading.opset, attributes, inputs, wanted, batches=picture.batches, fixed=picture.fixed
    )
    found = STEPS[op](reading.writer, node)
    return list(found) if isinstance(found, list) else [found]


def _sizes(op: str, attributes: Mapping[str, Any], inputs: Sequence[Value | None]) -> Known:
    """Shape or Size of a value, for every sight."""
    value = inputs[0]
    if value is None:
        raise ValueError("input 0 is missing")
    shapes = value.shapes if isinstance(value, Live) else [a.shape for a in value.arrays]
    if op == "Size":
        return known([np.array(np.prod(s, dtype=np.int64)) for s in shapes])
    part = slice(attributes.get("start"), attributes.get("end"))
    return known([np.array(s, np.int64)[part] for s in shapes])


def _branch(reading: _Reading, proto: Any, inputs: Sequence[Value | None]) -> list[Value | None]:
    """The outputs of an If whose condition is known: those of the graph that it takes."""
    if not isinstance(inputs[0], Known):
        raise ValueError("which way it goes depends on the picture")
    wanted = "then_branch" if inputs[0].constant.reshape(-1)[0] else "else_branch"
    graph = next(a.g for a in proto.attribute if a.name == wanted)
    for tensor in graph.initializer:
        array = read_tensor(tensor, reading.path, reading.allowed)
        reading.values[tensor.name] = Known((array,) * len(reading.picture.sights), printable(tensor.name))
    for node in graph.node:
        _run(reading, node)
    return [_value(reading, output.name) for output in graph.output]


def _constant(attributes: Mapping[str, Any]) -> Array:
    """What a Constant holds."""
    for name, kind in (("value_float", np.float32), ("value_floats", np.float32), ("value_int", np.int64)):
        if name in attributes:
            return np.array(attributes[name], kind)
    if "value_ints" in attributes:
        return np.array(attributes["value_ints"], np.int64)
    if not isinstance(attributes.get("value"), np.ndarray):
        raise ValueError("a constant that is no array of numbers")
    return np.asarray(attributes["value"])


def _attributes(reading: _Reading, proto: Any) -> dict[str, Any]:
    """The attributes of a node as numbers, text, lists and arrays; the graphs inside are left out."""
    import onnx.helper

    found: dict[str, Any] = {"outputs": len(proto.output)}
    for attribute in proto.attribute:
        if attribute.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS):
            continue
        value = onnx.helper.get_attribute_value(attribute)
        if isinstance(value, onnx.TensorProto):
            value = read_tensor(value, reading.path, reading.allowed)
        found[attribute.name] = value.decode("utf-8") if isinstance(value, bytes) else value
    return found


def _path(proto: Any) -> str:
    """A path for a step: the scope that PyTorch notes down, or the name of the node, or that of what it makes."""
    noted = {entry.key: entry.value for entry in proto.metadata_props}.get("pkg.torch.onnx.name_scopes", "")
    scopes = re.findall(r"'([^']*)'", noted)
    if len(scopes) > 1:
        return safe_name(".".join([scopes[-2], re.sub(r"_\d+$", "", scopes[-1])]))
    return safe_name(proto.name) or safe_name(proto.output[0] if proto.output else "") or proto.op_type.lower()


def _refused(reading: _Reading, proto: Any, reason: str) -> ReaderError:
    name, op = printable(proto.name or "".join(proto.output[:1]))[:100], printable(proto.op_type)[:40]
    remedy = "export the network for inference, in floating numbers and with plain onnx.ai operators"
    live = any(isinstance(reading.values.get(source), Live) for source in proto.input)
    if reading.picture.fixed is not None and live and proto.op_type in STEPS and proto.domain in _DOMAINS:
        remedy = f"it was written for a batch of {reading.picture.fixed}, so {_OPEN_BATCH}"
    return ReaderError(
        f"Every step of {reading.path} must be one that regraft can follow; {name!r} ({op}) is not ({reason}): "
        f"{remedy}, or choose another one."
    )
