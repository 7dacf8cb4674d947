"""A graph of TensorFlow, once its calls are replaced, as steps of regraft with their weights.

Every node that the output needs is looked at once, inputs first: constants and sizes are worked out, everything else
is written as steps. Batch normalisation that was spelled out becomes a layer again, so that it can be trained, frozen
and folded like any other. What nothing reads in the end is left out.

Knows nodes and where their variables are, nothing of files.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from regraft.errors import ReaderError, first_line
from regraft.operations import INPUT, Operations
from regraft.printable import printable
from regraft.readers.onnx.steps import Known, Live, Value, Writer, safe_name
from regraft.readers.onnx.tensors import Allowance
from regraft.readers.tensorflow.arithmetic import ARITHMETIC_STEPS
from regraft.readers.tensorflow.axes import AXIS_STEPS
from regraft.readers.tensorflow.draws import DRAWS, Drawn, follow
from regraft.readers.tensorflow.layers import LAYER_STEPS, batch_norm, dilated
from regraft.readers.tensorflow.nodes import SWITCHES, Graph, GraphNode, Ref
from regraft.readers.tensorflow.patterns import find_curve, find_norm
from regraft.readers.tensorflow.steps import Setting, Step
from regraft.readers.tensorflow.tensors import FLOATS, STRING, Array, read_array

STEPS = {**LAYER_STEPS, **AXIS_STEPS, **ARITHMETIC_STEPS}
"""An operation that is not in this list is refused: so are all that touch files, run Python or hash, and those that
draw or branch, but for draws that cannot matter and ways that a constant decides."""

VARIABLES = ("VarHandleOp", "VariableV2", "Variable")
LEAVES = ("ReadVariableOp", "Placeholder", "Const", *VARIABLES)
BATCHES = (2, 3, 2)
"""The batches to watch; of the first two sights nothing else differs, which shows where the pictures lie."""
OPEN_SIZES = ((320, 288), (320, 288), (353, 417))
"""Heights and widths to watch where the file leaves them open; odd ones too, which halve and double to other sizes."""
LARGEST_VALUE = 1 << 28
"""The most numbers that one value may hold for one picture."""
CHANNELS = (1, 3, 4)
CONVOLUTIONS = ("Conv2D", "DepthwiseConv2dNative")

_TROUBLE = (ValueError, TypeError, KeyError, IndexError, RuntimeError, AttributeError, ArithmeticError)


@dataclass(frozen=True)
class Source:
    """The graph to read and what lies around it.

    input: the placeholder for pictures; shape: its shape, the batch first, None for what is left open. variable: the
    stored tensor of a variable, by the name of its node. named: whether constants are weights, and named after nodes.
    """

    graph: Graph
    input: str
    shape: tuple[int | None, ...]
    output: Ref
    variable: Callable[[str], Array]
    named: bool
    path: str
    allowed: Allowance


@dataclass
class _Reading:
    """One pass over a graph: what was written, and what each output of a node is.

    untaken: the nodes on ways that are not gone; drawn: those whose numbers are drawn at random.
    """

    source: Source
    setting: Setting
    values: dict[Ref, Value] = field(default_factory=dict)
    untaken: set[str] = field(default_factory=set)
    drawn: dict[str, Drawn] = field(default_factory=dict)


def write_network(source: Source) -> tuple[Operations, dict[str, torch.Tensor], tuple[int, ...] | None]:
    """The steps of the network, its state, and what it takes without the batch, (channels, height, width) of pictures.

    Raises ReaderError naming the step that cannot be followed.
    """
    graph, writer = source.graph, Writer(source.allowed)
    fixed = source.shape[0] if source.shape else None
    reading = _Reading(source, Setting(writer, source.allowed, BATCHES, fixed))
    try:
        order = list(graph.in_order(source.output, LEAVES))
        last = graph.resolve(source.output)
    except ValueError as e:
        raise ReaderError(f"{source.path} must hold a graph that can be followed; {printable(str(e))}.") from e
    uses = Counter(graph.resolve(ref) for node in order if node.op not in LEAVES for ref in node.inputs)
    layout = _layout(source, order)
    reading.values[(source.input, 0)] = entry = _entry(source, layout)
    for node in order:
        try:
            for number, value in enumerate(_outputs(reading, node)):
                reading.values[(node.name, number)] = _used(value, uses[(node.name, number)])
        except _TROUBLE as e:
            raise _refused(source, node, e) from e
    result = reading.values.get(last)
    if not isinstance(result, Live) or result.step == INPUT or [shape[:1] for shape in result.shapes] != _rows():
        raise ReaderError(
            f"The graph of {source.path} must compute {printable(source.output[0])!r} for every picture of the input "
            f"{printable(source.input)!r}; it does not: choose another output."
        )
    result = writer.arranged(result, _standard(result.rank, layout))
    shapes = {tuple(seen.shape[1:]) for seen in entry.seen}
    return (*_pruned(writer, result.step), shapes.pop() if len(shapes) == 1 else None)


def _rows() -> list[tuple[int, ...]]:
    return [(batch,) for batch in BATCHES]


def _layout(source: Source, order: list[GraphNode]) -> str:
    """Whether pictures come in with the channels last or second."""
    if len(source.shape) == 4:
        last, second = (source.shape[i] in CHANNELS for i in (3, 1))
        if last != second:
            return "NHWC" if last else "NCHW"
    forms = [
        node.attributes.get("data_format", "NHWC") for node in order if node.op in ("Conv2D", "MaxPool", "AvgPool")
    ]
    return str(forms[0]) if forms else "NHWC"


def _standard(rank: int, layout: str) -> tuple[int, ...]:
    """The order of axes in which values go in and come out: that of the graph, but for pictures."""
    return (0, 2, 3, 1) if rank == 4 and layout == "NHWC" else tuple(range(rank))


def _entry(source: Source, layout: str) -> Live:
    """The input as the network takes it: pictures with their channels second."""
    rank = len(source.shape)
    order = _standard(rank, layout)
    sizes = [max(max(OPEN_SIZES)) if size is None else size for size in source.shape[1:]]
    known = 2 <= rank <= 4 and source.shape[1 if layout == "NCHW" else rank - 1] is not None
    if not known or min(sizes) < 1 or math.prod(sizes) > LARGEST_VALUE:
        raise ReaderError(
            f"The input {printable(source.input)!r} of {source.path} must be pictures of a known number of channels, "
            f"or rows of a known length; its shape is {list(source.shape)}."
        )
    seen = []
    for batch, sides in zip(BATCHES, OPEN_SIZES, strict=True):
        stored, left = [0] * rank, list(sides)
        for axis, size in enumerate([batch, *source.shape[1:]]):
            stored[order[axis]] = left.pop() if size is None else size
        seen.append(torch.empty(stored, device="meta"))
    return Live(INPUT, order, tuple(seen), raw=True)


def _outputs(reading: _Reading, node: GraphNode) -> list[Value]:
    """The values of all outputs of a node that can be had."""
    source = reading.source
    if node.name == source.input:
        return [reading.values[(node.name, 0)]]
    if node.op == "Const":
        return [_constant(reading, node)]
    if node.op in (*VARIABLES, "ReadVariableOp"):
        return [_variable(reading, node)]
    if node.op == "Placeholder":
        raise ValueError("a second input")
    for special in (_untaken, _drawn, _between_blocks):
        aside = special(reading, node)
        if aside is not None:
            return aside
    if node.op not in STEPS:
        raise ValueError("not one of the operations that regraft knows")
    inputs = tuple(_read(reading, ref) for ref in node.inputs)
    step = Step(_step_name(node.name), node.op, node.attributes, inputs, reading.setting)
    written = _norm(reading, node, step) or _curve(reading, node, step) or STEPS[node.op](step)
    found = written if isinstance(written, list) else [written]
    for value in found:
        if isinstance(value, Live) and max(t.numel() for t in value.seen) > LARGEST_VALUE * max(BATCHES):
            raise ValueError(f"a value of shape {value.shapes[0]}")
    return found


def _read(reading: _Reading, ref: Ref) -> Value:
    found = reading.source.graph.resolve(ref)
    if found not in reading.values:
        raise ValueError(f"output {found[1]} of the step {found[0]!r} is needed")
    return reading.values[found]


def _constant(reading: _Reading, node: GraphNode) -> Known:
    proto = node.attributes["value"]
    if node.attributes["dtype"] == STRING:
        raise ValueError("text")
    array = read_array(proto, reading.source.allowed)
    name = node.name if reading.source.named and int(node.attributes["dtype"]) in FLOATS else ""
    return Known((array,) * len(BATCHES), name)


def _variable(reading: _Reading, node: GraphNode) -> Known:
    if node.op == "VarHandleOp":
        return Known((np.zeros(0, np.float32),) * len(BATCHES))  # only who reads it wants its tensor
    graph = reading.source.graph
    name = graph.origin(node.inputs[0])[0] if node.op == "ReadVariableOp" else node.name
    if graph.node(name).op not in VARIABLES:
        raise ValueError("a variable that is not in the file")
    return Known((reading.source.variable(name),) * len(BATCHES), name)


def _used(value: Value, times: int) -> Value:
    return replace(value, sole=value.sole and times <= 1) if isinstance(value, Live) else value


def _step_name(name: str) -> str:
    """What a step is called: the names of the calls that it lay in are left out where they say no more than that."""
    scopes = [s for s in name.split("/") if not re.fullmatch(r"(Stateful)?PartitionedCall(_\d+)?", s)]
    return safe_name("/".join(scopes) or name)


# ---- ways, draws and blocks ---------------------------------------------------------------------------------------


def _below(reading: _Reading, node: GraphNode) -> list[str]:
    """The nodes that a node reads."""
    return [reading.source.graph.resolve(ref)[0] for ref in node.inputs]


def _untaken(reading: _Reading, node: GraphNode) -> list[Value] | None:
    """What a node gives that stands on a way that is not gone, or where ways meet; None for all others."""
    below = _below(reading, node)
    if node.op in ("Merge", "RefMerge"):
        taken = [ref for ref, name in zip(node.inputs, below, strict=True) if name not in reading.untaken]
        if len(taken) > 1:
            raise ValueError("which way it goes depends on the picture")
        if taken:
            return [_read(reading, taken[0])]
    if node.op in SWITCHES and reading.source.graph.choice(node.inputs[1]) is None:
        raise ValueError("which way it goes depends on the picture")
    if node.op not in SWITCHES and reading.untaken.isdisjoint(below):  # a switch is met by the way that it does not go
        return None
    reading.untaken.add(node.name)
    return []


def _drawn(reading: _Reading, node: GraphNode) -> list[Value] | None:
    """What a node makes of numbers drawn at random; None where it has none. ReaderError where they matter."""
    found = [reading.drawn.get(name) for name in _below(reading, node)]
    if node.op in DRAWS:
        reading.drawn[node.name] = Drawn(node)
        return []
    first = next((d for d in found if d is not None), None)
    if first is None:
        return None
    made = follow(node.op, [d or _read(reading, ref) for d, ref in zip(found, node.inputs, strict=True)])
    if made is None:
        raise _refused(reading.source, first.node, ValueError("it draws at random"))
    if isinstance(made, Drawn):
        reading.drawn[node.name] = made
        return []
    return [Known((np.asarray(made),) * len(BATCHES))]


def _between_blocks(reading: _Reading, node: GraphNode) -> list[Value] | None:
    """A dilated convolution, which TensorFlow writes as one within blocks; all of it where the blocks are joined."""
    graph = reading.source.graph
    if node.op == "SpaceToBatchND":
        return []
    under = graph.node(_below(reading, node)[0]) if node.inputs else None
    if node.op in CONVOLUTIONS and under is not None and under.op == "SpaceToBatchND":
        return []
    if node.op != "BatchToSpaceND" or under is None:
        return None
    first = graph.node(_below(reading, under)[0]) if under.op in CONVOLUTIONS else under
    if first.op != "SpaceToBatchND":
        raise ValueError("only a convolution may stand between blocks")
    inputs = (_read(reading, first.inputs[0]), _read(reading, under.inputs[1]))
    blocks, sides = (_known(reading, ref) for ref in first.inputs[1:])
    again, cut = (_known(reading, ref) for ref in node.inputs[1:])
    pads = [(a - b).tolist() for a, b in zip(sides.arrays, cut.arrays, strict=True)]
    same = np.array_equal(blocks.constant, again.constant) and pads == pads[:1] * len(pads)
    if not same or blocks.constant.shape != (2,):
        raise ValueError("its blocks must be of height and width, the same for every size of picture")
    step = Step(_step_name(under.name), under.op, under.attributes, inputs, reading.setting)
    written = STEPS[under.op](dilated(step, blocks.constant.tolist(), pads[0]))
    return written if isinstance(written, list) else [written]


def _known(reading: _Reading, ref: Ref) -> Known:
    found = _read(reading, ref)
    if not isinstance(found, Known):
        raise ValueError("its blocks depend on the picture")
    return found


# ---- what is spelled out ----------------------------------------------------------------------------------------


def _norm(reading: _Reading, node: GraphNode, step: Step) -> Value | None:
    """Batch normalisation, where this node ends the arithmetic for it and its statistics are constants."""
    found = find_norm(reading.source.graph, node)
    if found is None:
        return None
    x = _read(reading, found.x)
    under = [_read(reading, ref) for ref in found.under]
    mean = _read(reading, found.mean)
    factor = _read(reading, found.factor) if found.factor else step.value(np.float32(1))
    shift = _read(reading, found.shift) if found.shift else step.value(np.float32(0))
    known = [v for v in (mean, *under, factor, shift) if isinstance(v, Known)]
    if not isinstance(x, Live) or len(known) < 5:
        return None
    variance, epsilon = sorted(known[1:3], key=lambda v: v.constant.size == 1)
    if epsilon.constant.size != 1:
        return None
    attributes = {"epsilon": float(epsilon.constant.reshape(-1)[0])}
    return batch_norm(replace(step, attributes=attributes, inputs=(x, factor, shift, mean, variance)))


def _curve(reading: _Reading, node: GraphNode, step: Step) -> Value | None:
    """SiLU or GELU, where this node is the last one of the arithmetic for it."""
    for found in find_curve(reading.source.graph, node):
        x = _read(reading, found.x)
        numbers = [(_read(reading, ref), wanted) for ref, wanted in found.numbers]
        if isinstance(x, Live) and all(isinstance(v, Known) and _is_number(v, wanted) for v, wanted in numbers):
            return replace(step, inputs=(x,)).layer(found.kind)
    return None


def _is_number(value: Known, wanted: float) -> bool:
    return value.constant.size == 1 and abs(float(value.constant.reshape(-1)[0]) - wanted) < 1e-6


# ---- the end ----------------------------------------------------------------------------------------------------


def _pruned(writer: Writer, last: str) -> tuple[Operations, dict[str, torch.Tensor]]:
    """The steps that the last one needs, and their tensors."""
    needed, steps = {last}, []
    for step in reversed(writer.steps):
        if step.name in needed:
            needed.update(step.inputs)
            steps.append(step)
    owners = tuple(step.name for step in steps)
    tensors = {n: t for n, t in writer.tensors.items() if n in needed or n.rpartition(".")[0] in needed}
    return Operations(tuple(reversed(steps)), owners[0]), tensors


def _refused(source: Source, node: GraphNode, why: Exception) -> ReaderError:
    reason = printable(first_line(why)[:200])
    return ReaderError(
        f"The graph of {source.path} must be one that regraft can follow; the step {printable(node.name)!r} does "
        f"{printable(node.op)} ({reason}): export the network for inference, or up to the step before it."
    )
