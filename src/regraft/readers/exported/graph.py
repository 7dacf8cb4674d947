"""A graph of ATen operations as torch.export writes it, while it is turned into steps.

Keeps what each value of the graph is: a step, or a stored tensor that no step has taken yet; its shape as it was
exported; and which axis counts the pictures. A graph that was exported for a fixed number of pictures says this number
wherever a shape is written, so the axis is followed from the input on and written as free. Names of steps are those of
the modules. Knows nothing of single operations: those are in `steps`. Schema: torch/_export/serde/schema.py.
Not covered: a factor that was worked out from the number of pictures, of which such a graph keeps the number alone.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import nn

from regraft.errors import ReaderError
from regraft.operations import INPUT, LAYERS, Operation
from regraft.printable import printable

INSTEAD = "save a state_dict with torch.save, or export the network to ONNX"
RESERVED = frozenset((*dir(nn.Module()), INPUT, "operations"))
ASPECTS = re.compile(r"torch\.ops\.aten\.(\w+)\.(\w+)")

Shape = tuple[int | None, ...]
"""Sizes as exported, None where they were left free."""


@dataclass(frozen=True)
class Ref:
    """A value of the graph, by its name there."""

    name: str


@dataclass(frozen=True)
class Kind:
    """A kind of number, memory or device, by its code: nothing that a step depends on."""


FREE = None
"""A number in the graph that follows from the input."""


@dataclass(frozen=True)
class Held:
    """What a value is.

    step: the name of the step that makes it; stored: else the name of the tensor that it is, transposed if `turned`.
    batch: the axis that counts the pictures, None where the value does not depend on the input.
    outer: how many other numbers that axis counts, slower than the pictures. lent: the first axis, of length 1,
    stands for one row for every picture.
    """

    shape: Shape
    batch: int | None = None
    step: str | None = None
    stored: str | None = None
    turned: bool = False
    lent: bool = False
    outer: int = 1


@dataclass(frozen=True)
class Node:
    """One operation of the graph: `op` without its overload, `path` of the module that it ran in."""

    op: str
    overload: str
    name: str
    path: str
    arguments: Mapping[str, Any]
    outputs: tuple[str, ...]

    def get(self, name: str, default: Any = None) -> Any:
        """The argument of this name, as the operation's signature calls it."""
        return self.arguments.get(name, default)


def read_node(value: Mapping[str, Any]) -> Node:
    """The node that a JSON object describes."""
    match = ASPECTS.fullmatch(value["target"])
    op, overload = match.groups() if match else (str(value["target"]), "")
    outputs: list[str] = []
    for one in value["outputs"]:
        found = _argument(one)
        outputs += [ref.name for ref in (found if isinstance(found, list) else [found]) if isinstance(ref, Ref)]
    path = _path(str(value.get("metadata", {}).get("nn_module_stack", "")))
    name = str(value.get("name") or (outputs[0] if outputs else op))
    arguments = {str(one["name"]): _argument(one["arg"]) for one in value["inputs"]}
    return Node(op, overload, name, path, arguments, tuple(outputs))


def _argument(value: Mapping[str, Any]) -> Any:
    """An argument: a Ref, a number, a word, None, or a list of such; FREE for a number that follows from the input."""
    ((kind, inner),) = value.items()
    if kind == "as_tensor":
        return Ref(str(inner["name"]))
    if kind in ("as_tensors",):
        return [Ref(str(one["name"])) for one in inner]
    if kind in ("as_optional_tensors",):
        return [_argument(one) for one in inner]
    if kind == "as_optional_tensor":
        return _argument(inner)
    if kind in ("as_sym_int", "as_sym_float", "as_sym_bool"):
        return next((inner[k] for k in ("as_int", "as_float", "as_bool") if k in inner), FREE)
    if kind in ("as_sym_ints", "as_sym_floats"):
        return [next((one[k] for k in ("as_int", "as_float") if k in one), FREE) for one in inner]
    if kind == "as_float":
        return float(inner)
    if kind in ("as_int", "as_ints", "as_floats", "as_bool", "as_bools", "as_string"):
        return inner
    return None if kind == "as_none" else Kind()


def _path(stack: str) -> str:
    """The innermost module of `KEY,PATH,TYPE;KEY,PATH,TYPE`; its second and later calls carry `@1`, `@2`."""
    parts = stack.rpartition(";")[2].split(",")
    return parts[1] if len(parts) == 3 and not parts[1].startswith("_empty") else ""


class Graph:
    """The graph and the steps made of it so far."""

    def __init__(self, origin: str, graph: Mapping[str, Any], stored: Mapping[str, torch.Tensor]) -> None:
        self.origin, self.stored = origin, stored
        self.nodes = [read_node(node) for node in graph["nodes"]]
        self.shapes = {name: _shape(about["sizes"]) for name, about in graph["tensor_values"].items()}
        self.strides = {name: _shape(about["strides"]) for name, about in graph["tensor_values"].items()}
        self.held: dict[str, Held] = {}
        self.steps: list[Operation] = []
        self.tensors: dict[str, torch.Tensor] = {}
        self.owner: dict[str, str] = {}
        self.trained: set[str] = set()
        self.names = {INPUT}
        self.registered: set[str] = set()
        self.batch: int | None = None
        self._calls = Counter(node.path for node in self.nodes)
        self._inside = {p for path in (*self._calls, *stored) for p in _above(path)}

    def refuse(self, node: Node, why: str, mend: str = INSTEAD) -> NoReturn:
        """Raise the ReaderError that says which operation of which file cannot be read, and what to do."""
        what = printable(node.op)[:60] + (f" ({printable(node.name)[:60]})" if node.name != node.op else "")
        raise ReaderError(
            f"Every operation of {self.origin} must be one that regraft can follow; {what} {why}: {mend}."
        )

    def refuse_mixing(self, node: Node) -> NoReturn:
        """Refuse an operation that is not done to every picture by itself."""
        one = self.batch == 1
        hint = "it was exported for one picture, which hides which axis that is: export for two" if one else INSTEAD
        self.refuse(node, "works across the pictures of a batch", hint)

    def value(self, node: Node, name: str) -> Held:
        """The tensor that goes into the node under this name; refused where it is missing."""
        found = self.optional(node, name)
        return found if found else self.refuse(node, f"has no {name}")

    def optional(self, node: Node, name: str) -> Held | None:
        """The tensor that goes into the node under this name, None where there is none."""
        ref = node.get(name)
        if ref is None:
            return None
        return self.of(node, ref)

    def of(self, node: Node, ref: Any) -> Held:
        """What a Ref stands for."""
        if not isinstance(ref, Ref) or ref.name not in self.held:
            self.refuse(node, "takes something that is no tensor of the graph")
        return self.held[ref.name]

    def out(self, node: Node, place: int = 0) -> Shape:
        """The shape of what the node makes, as it was exported."""
        if place >= len(node.outputs) or node.outputs[place] not in self.shapes:
            self.refuse(node, "says no shape of what it makes")
        return self.shapes[node.outputs[place]]

    def is_batch(self, size: int | None) -> bool:
        """Whether a size that was exported can count pictures."""
        return size is None or (self.batch is not None and size > 0 and size % self.batch == 0)

    def put(self, node: Node, held: Held, place: int = 0) -> None:
        """Note what the node makes."""
        self.held[node.outputs[place]] = held

    def step_of(self, held: Held) -> str:
        """The step that makes a value; a stored tensor becomes a step of its own."""
        if held.step is not None:
            return held.step
        assert held.stored is not None, "a value is a step or stored"
        name = self._stored_step(held.stored)
        return self.add("transpose", [name], {"dim0": 0, "dim1": 1}, f"{name}_turned") if held.turned else name

    def add(self, kind: str, inputs: Sequence[str], options: Mapping[str, Any], name: str) -> str:
        """A step of any kind; returns its name, which may differ a little from the one wished."""
        unique = safe(name)
        while unique in self.names or (kind in LAYERS and any(n.startswith(f"{unique}.") for n in self.registered)):
            unique += "_"
        self.names.add(unique)
        if kind in LAYERS or kind in ("parameter", "buffer"):
            self.registered.add(unique)
        self.steps.append(Operation(unique, kind, tuple(inputs), dict(options)))
        return unique

    def compute(
        self,
        node: Node,
        kind: str,
        inputs: Sequence[Held],
        options: Mapping[str, Any],
        batch: int | None,
        place: int = 0,
        *,
        outer: int | None = None,
    ) -> None:
        """A function or a layer without tensors, as the next step, for what the node makes."""
        outers = {held.outer for held in inputs if held.batch is not None} or {1}
        if len(outers) > 1:
            self.refuse_mixing(node)
        name = self.name_of(node) + (f"_{place}" if place else "")
        step = self.add(kind, [self.step_of(held) for held in inputs], options, name)
        self.put(node, Held(self.out(node, place), batch, step, outer=outer or outers.pop()), place)

    def layer(self, node: Node, kind: str, x: Held, options: Mapping[str, Any], own: Mapping[str, Held | None]) -> None:
        """A layer with tensors of its own (by their names in the layer), which take the names of the module."""
        taken = {part: held for part, held in own.items() if held is not None}
        for part, held in taken.items():
            if held.stored is None:
                self.refuse(node, f"has a {part} that is computed")
            if held.stored in self.owner:
                self.refuse(node, f"shares {held.stored} with {self.owner[held.stored]}")
        paths = {str(held.stored).rpartition(".") for held in taken.values()}
        prefixes = {path for path, _, _ in paths}
        as_named = all(str(held.stored).rpartition(".")[2] == part for part, held in taken.items())
        wished = next(iter(prefixes)) if len(prefixes) == 1 and as_named else ""
        name = self.add(kind, [self.step_of(x)], options, wished or self.name_of(node))
        for part, held in taken.items():
            self.owner[str(held.stored)] = name
            self.tensors[f"{name}.{part}"] = plain(self.stored[str(held.stored)])
        self.put(node, Held(self.out(node), x.batch, name, outer=x.outer))

    def name_of(self, node: Node) -> str:
        """The module that a node ran in, where it is all that the module does; else with the name of the node."""
        if f"{node.path}.weight" in self.stored:
            return f"{node.path}_{node.name}"  # beside the layer that gets the name of the module
        if not node.path or node.path in self._inside or self._calls[node.path] > 1:
            return f"{node.path}.{node.name}" if node.path else node.name
        return node.path

    def tensor(self, held: Held) -> torch.Tensor:
        """A stored tensor itself."""
        return self.stored[str(held.stored)]

    def _stored_step(self, stored: str) -> str:
        if stored in self.owner:
            if self.owner[stored] in self.tensors:
                return self.owner[stored]
            raise ReaderError(
                f"Every tensor of {self.origin} must belong to one layer; {stored} is used by {self.owner[stored]} and "
                f"beside it: {INSTEAD}."
            )
        tensor = plain(self.stored[stored])
        kind = "parameter" if stored in self.trained else "buffer"
        name = self.add(
            kind, [], {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}, stored
        )
        self.owner[stored], self.tensors[name] = name, tensor
        return name


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """Floating point as float32, all else as it is."""
    return tensor.float() if tensor.is_floating_point() else tensor


def safe(name: str) -> str:
    """A name whose parts are names of attributes that a module has not yet."""
    parts = [re.sub(r"\W", "_", part, flags=re.ASCII) for part in name.split(".") if part]
    return ".".join(f"{part}_" if part in RESERVED else part for part in parts) or "step"


Translate = Callable[[Graph, Node], None]
"""Adds the steps for a node to the graph, and says what the values are that the node makes."""


def reshaped(graph: Graph, node: Node, x: Held, shape: Shape) -> tuple[list[int], int | None, int]:
    """The shape to write for `x` in another shape; which axis counts the pictures then; `outer`.

    That axis is written as 0, kept, where it stays what it is, so that pictures of another size cannot become more
    pictures; else as -1. Numbers keep their order, so the product of all that is counted slower stays the same.
    """
    if x.batch is None:
        if None in shape:
            graph.refuse(node, "gives a constant a size of the input")
        return [int(size or 0) for size in shape], None, 1
    if None in x.shape[: x.batch] or shape.count(None) > 1:
        graph.refuse(node, "reshapes more than one free axis", "export with a fixed height and width")
    slower = math.prod(size or 1 for size in x.shape[: x.batch]) * x.outer
    found: list[tuple[int, int]] = []
    for axis, size in enumerate(shape):
        before = math.prod(s or 1 for s in shape[:axis])
        fits = slower % before == 0 and (size is None or size % (slower // before * (graph.batch or 1)) == 0)
        if None not in shape[:axis] and None not in shape[axis + 1 :] and fits and (graph.batch or size is None):
            found.append((slower // before, axis))
    if not found:
        graph.refuse_mixing(node)
    outer, axis = min(found)
    free = 0 if axis == x.batch and _others(x.shape, axis) == _others(shape, axis) else -1
    return [free if i == axis else int(size or 0) for i, size in enumerate(shape)], axis, outer


def _others(shape: Shape, axis: int) -> list[int | None] | int:
    """The product of all sizes but one; the sizes where they are not all known."""
    rest = [*shape[:axis], *shape[axis + 1 :]]
    return rest if None in rest else math.prod(size or 0 for size in rest)


def only(graph: Graph, node: Node, name: str, allowed: tuple[Any, ...]) -> None:
    """Refuse an argument that is none of those that are known."""
    if node.get(name) is not None and node.get(name) not in allowed:
        graph.refuse(node, f"has {name}={str(node.get(name))[:40]}")


def from_front(value: Any, rank: int) -> int:
    """The number of an axis that may be counted from the end."""
    return int(value) + rank if value < 0 else int(value)


def free_of(graph: Graph, node: Node, x: Held, axes: Sequence[int]) -> None:
    """Refuse an operation along the axis of the pictures."""
    if x.batch in axes:
        graph.refuse_mixing(node)


def leading(graph: Graph, node: Node, x: Held) -> None:
    """Refuse a tensor whose first axis does not count pictures."""
    if x.batch != 0:
        graph.refuse(node, "takes pictures that are not along the first axis")


def single(graph: Graph, node: Node) -> Held:
    """The tensor that an operation of one tensor takes."""
    return graph.value(node, "input" if "input" in node.arguments else "self")


def joint(graph: Graph, node: Node, inputs: Sequence[Held]) -> int | None:
    """The axis of the pictures in what comes of several tensors that are broadcast."""
    rank = len(graph.out(node))
    places = {rank - len(held.shape) + held.batch for held in inputs if held.batch is not None}
    if len(places) > 1:
        graph.refuse_mixing(node)
    for held in inputs:
        for place in places:
            own = place - rank + len(held.shape)
            if held.batch is None and not held.lent and own >= 0 and held.shape[own] != 1:
                graph.refuse(node, "has a constant for every picture of a batch")
    return places.pop() if places else None


def _shape(sizes: Sequence[Mapping[str, Any]]) -> Shape:
    return tuple(size.get("as_int") for size in sizes)


def _above(path: str) -> list[str]:
    """All modules that hold the one at `path`."""
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]
