"""The graph of a TensorFlow file as nodes with plain inputs: calls of functions are replaced by what they do.

    a call node            NODE = PartitionedCall(x, w)        f(a, b) = out: Mul:z:0
    becomes                NODE/Mul = Mul(x, w)                whoever reads NODE:0 reads NODE/Mul:0

An `If`, and the `Switch` of TensorFlow 1, with a constant truth value goes the one way that it can.
Only calls that something reads are replaced, and the whole may not grow beyond MOST nodes. Knows names and edges, not
what an operation does. Edges that only order side effects are dropped: there is nothing here that has any.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from regraft.readers.protobuf_wire import Message
from regraft.readers.tensorflow.tensors import shape_of

MOST = 100_000
HOPS = 256
LONGEST_NAME = 4096
CALLS = ("PartitionedCall", "StatefulPartitionedCall")
BRANCHES = ("If", "StatelessIf")
SWITCHES = ("Switch", "RefSwitch")
BOOL = 10
SAME = ("Identity", "StopGradient", "PreventGradient", "Snapshot", "EnsureShape", "ReadVariableOp")
"""Operations whose first output is their first input; the read of a variable is one when its handle is asked for."""

Ref = tuple[str, int]
"""An output of a node: its name and the number of the output."""

# The outputs of an operation are numbered one after another, but functions name them; all others begin with number 0.
_LATER = {"batch_mean": 1, "batch_variance": 2, "reserve_space_1": 3, "reserve_space_2": 4, "reserve_space_3": 5}


@dataclass(frozen=True)
class GraphNode:
    """An operation with its inputs, by reference; controls are left out."""

    name: str
    op: str
    inputs: tuple[Ref, ...]
    proto: Message = field(repr=False)

    @cached_property
    def attributes(self) -> dict[str, Any]:
        """Plain values; shapes as tuples, types as TensorFlow's numbers, tensors as messages, functions by name.

        An attribute that has its default value may be absent. ValueError where one is damaged.
        """
        return {name: _attribute(value) for name, value in self.proto.by_name(5).items()}


@dataclass(frozen=True)
class Function:
    """The body of a function: names of its inputs, its nodes with their inputs as text, and its outputs as text."""

    inputs: tuple[str, ...]
    bodies: tuple[tuple[GraphNode, tuple[str, ...]], ...]
    outputs: tuple[str, ...]


@dataclass
class Graph:
    """Nodes by name, and functions by name; grows while calls are replaced.

    awaited: the nodes that others only wait for, which are no outputs.
    """

    nodes: dict[str, GraphNode]
    functions: dict[str, Message]
    awaited: set[str] = field(default_factory=set)
    _read: dict[str, Function] = field(default_factory=dict)
    _results: dict[str, tuple[Ref, ...]] = field(default_factory=dict)

    def resolve(self, ref: Ref) -> Ref:
        """The output of an operation that is no call; ValueError where there is none of that name."""
        for _ in range(LONGEST_NAME):
            node = self.node(ref[0])
            if node.op in SWITCHES and len(node.inputs) == 2 and self.choice(node.inputs[1]) == ref[1]:
                ref = node.inputs[0]
                continue
            called = self._called(node)
            if not called:
                return ref
            results = self._results[node.name] if node.name in self._results else self._replace(node, called)
            if not 0 <= ref[1] < len(results):
                raise ValueError(f"the function {called!r} has no output {ref[1]}")
            ref = results[ref[1]]
        raise ValueError("its functions call one another without end")

    def node(self, name: str) -> GraphNode:
        """The node of that name; ValueError where there is none."""
        if name not in self.nodes:
            raise ValueError(f"no step is called {name!r}")
        return self.nodes[name]

    def origin(self, ref: Ref) -> Ref:
        """What a value is, seen through operations that hand on their input."""
        for _ in range(HOPS):
            ref = self.resolve(ref)
            node = self.node(ref[0])
            if node.op not in SAME or not node.inputs:
                return ref
            ref = node.inputs[0]
        raise ValueError(f"the step {ref[0]!r} hands on what {HOPS} others hand on")

    def choice(self, ref: Ref) -> bool | None:
        """The truth value that a constant holds, also one that a caller could have replaced; None for all others."""
        negated = False
        for _ in range(HOPS):
            node = self.node(ref[0])
            tensor = node.attributes.get("value") if node.op == "Const" else None
            if isinstance(tensor, Message) and tensor.integer(1) == BOOL:
                return _truth(tensor) != negated
            if node.op not in (*SAME, *SWITCHES, "PlaceholderWithDefault", "LogicalNot") or not node.inputs:
                break
            negated ^= node.op == "LogicalNot"
            ref = node.inputs[0]
        return None

    def in_order(self, last: Ref, leaves: Collection[str]) -> Iterator[GraphNode]:
        """The nodes that `last` needs, inputs first; nodes of the operations `leaves` count as having no inputs.

        ValueError for a graph that runs in a circle, as one with loops does.
        """
        done: dict[str, bool] = {}
        waiting = [(self.resolve(last)[0], False)]
        while waiting:
            name, ready = waiting.pop()
            if ready:
                done[name] = True
                yield self.node(name)
            elif name not in done:
                done[name] = False
                waiting.append((name, True))
                node = self.node(name)
                below = [] if node.op in leaves else [self.resolve(ref)[0] for ref in node.inputs]
                if circle := next((b for b in below if done.get(b) is False), None):  # False: it waits for this one
                    raise ValueError(f"the step {circle!r} reads itself, as in a loop")
                waiting += [(b, False) for b in reversed(below) if b not in done]

    def open_call(self, name: str) -> None:
        """Replace a call although nothing reads it."""
        node = self.node(name)
        called = self._called(node)
        if called and node.name not in self._results:
            self._replace(node, called)

    def _called(self, node: GraphNode) -> str:
        if node.op in CALLS:
            return str(node.attributes.get("f", ""))
        if node.op in BRANCHES and node.inputs:
            choice = self.choice(node.inputs[0])
            branch = "then_branch" if choice else "else_branch"
            return "" if choice is None else str(node.attributes.get(branch, ""))
        return node.op if node.op in self.functions else ""

    def _replace(self, node: GraphNode, called: str) -> tuple[Ref, ...]:
        """Add the nodes of a function under the name of its call; what its outputs are."""
        if called not in self.functions:
            raise ValueError(f"the function {called!r} is not in the file")
        if len(node.name) > LONGEST_NAME:
            raise ValueError("its functions call one another without end")
        function = self._read.get(called) or _read_function(self.functions[called])
        self._read[called] = function
        given = node.inputs[1:] if node.op in BRANCHES else node.inputs
        if len(function.inputs) != len(given):
            raise ValueError(f"the function {called!r} takes {len(function.inputs)} inputs, not {len(given)}")
        if len(self.nodes) + len(function.bodies) > MOST:
            raise ValueError(f"it has more than {MOST:,} steps")
        arguments = dict(zip(function.inputs, given, strict=True))
        for body, texts in function.bodies:
            inputs = tuple(_in_function(text, arguments, node.name) for text in texts)
            self._add(GraphNode(f"{node.name}/{body.name}", body.op, inputs, body.proto))
        results = tuple(_in_function(text, arguments, node.name) for text in function.outputs)
        self._results[node.name] = results
        return results

    def _add(self, node: GraphNode) -> None:
        if node.name in self.nodes:
            raise ValueError(f"two steps are called {node.name!r}")
        self.nodes[node.name] = node


def read_graph(proto: Message) -> Graph:
    """The graph of a GraphDef; ValueError where it is none or two nodes have one name."""
    graph = Graph({}, {f.message(1).text(1): f for f in proto.message(2).messages(1)})
    bodies = proto.messages(1)
    if len(bodies) > MOST:
        raise ValueError(f"it has more than {MOST:,} steps")
    for body in bodies:
        inputs = tuple(parse_ref(text) for text in body.texts(3) if text[:1] != "^")
        graph._add(GraphNode(body.text(1), body.text(2), inputs, body))
        graph.awaited.update(text[1:] for text in body.texts(3) if text[:1] == "^")
    return graph


def _truth(tensor: Message) -> bool:
    """The one truth value of a tensor."""
    return any(tensor.content(4)) if tensor.has(4) else any(tensor.integers(11))


def _read_function(proto: Message) -> Function:
    signature, returned = proto.message(1), {entry.text(1): entry.text(2) for entry in proto.messages(4)}
    bodies = []
    for body in proto.messages(3):
        texts = tuple(text for text in body.texts(3) if text[:1] != "^")
        bodies.append((GraphNode(body.text(1), body.text(2), (), body), texts))
    names = tuple(argument.text(1) for argument in signature.messages(2))
    return Function(names, tuple(bodies), tuple(returned.get(out.text(1), "") for out in signature.messages(3)))


def parse_ref(text: str) -> Ref:
    """`NAME` or `NAME:2` of the outermost graph."""
    name, colon, number = text.partition(":")
    if not colon:
        return name, 0
    if not number.isdecimal() or len(number) > 6:
        raise ValueError(f"an input {text!r}")
    return name, int(number)


def _in_function(text: str, arguments: dict[str, Ref], call: str) -> Ref:
    """`ARGUMENT`, or `NODE:OUTPUT:2`, in the body of a function."""
    name, colon, rest = text.partition(":")
    if not colon:
        if name not in arguments:
            raise ValueError(f"an input {text!r}")
        return arguments[name]
    output, _, number = rest.partition(":")
    if not number.isdecimal() or len(number) > 6:
        raise ValueError(f"an input {text!r}")
    return f"{call}/{name}", _LATER.get(output, 0) + int(number)


def _attribute(value: Message) -> Any:
    fields = value.fields
    if 2 in fields:
        return value.text(2)
    if 4 in fields:
        return value.float32(4)
    if 5 in fields:
        return bool(value.integer(5))
    if 7 in fields:
        return shape_of(value.message(7))
    if 8 in fields:
        return value.message(8)
    if 10 in fields:
        return value.message(10).text(1)
    if 1 in fields:
        return _listed(value.message(1))
    return value.integer(6) if 6 in fields else value.integer(3)


def _listed(values: Message) -> list[Any]:
    if values.has(2):
        return list(values.texts(2))
    if values.has(4):
        return [found[0] for found in struct.iter_unpack("<f", values.packed(4, 4))]
    if values.has(7):
        return [shape_of(shape) for shape in values.messages(7)]
    return list(values.integers(6 if values.has(6) else 3))
