"""Run a graph on a few inputs and write down what each of its values is: shape, type, who writes into it.

A cut needs facts that no single look at the operations gives. Does a value depend on the content of the input, on its
size alone, or on nothing but the weights? Is it overwritten in place later? Does making it draw random numbers?

Knows graphs, not cuts or layers. Not covered: values that differ only for inputs other than those run here.
"""

from __future__ import annotations

import builtins
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import fx, nn

_SIZE_ATTRIBUTES = {"shape", "ndim", "dtype", "device", "layout", "is_cuda"}
_SIZE_METHODS = {"size", "dim", "ndimension", "numel", "nelement", "stride", "is_floating_point", "get_device"}
_SIZE_FUNCTIONS = {torch.numel, torch.is_floating_point, builtins.len}


class Depends(IntEnum):
    """What of the input a value depends on."""

    NOTHING = 0
    SIZES = 1
    CONTENT = 2


@dataclass(frozen=True)
class Run:
    """One input to observe, and the mode to run it in."""

    x: torch.Tensor
    train: bool


@dataclass(frozen=True)
class Tensor:
    """What is kept of a tensor: never its numbers."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Sight:
    """What is known of the value of one node.

    `seen` has one entry per run: a Tensor, a number, a size, a type, a tuple of such, or the class of anything else.
    `overwritten` holds the places in the order of computation of later nodes that write into the value's memory.
    `effect`: making the value draws random numbers, writes into another one or may change a layer whose result nobody
    uses, so it must happen exactly once.
    """

    place: int
    depends: Depends
    seen: tuple[object, ...]
    overwritten: tuple[int, ...]
    effect: bool


def observe(graph: fx.Graph, part: nn.Module, runs: Sequence[Run]) -> tuple[dict[str, Sight], list[Any]]:
    """What each node of `graph` was over `runs` on the module `part`, and the output of each run.

    Each run starts from seed 0, without gradients; the random generator and the buffers are the caller's to keep.
    """
    place = {node.name: i for i, node in enumerate(graph.nodes)}
    watchers = [_Watcher(part, graph, place) for _ in runs]
    outputs = []
    for watcher, run in zip(watchers, runs, strict=True):
        part.train(run.train)
        torch.manual_seed(0)
        with torch.no_grad():
            outputs.append(watcher.run(run.x.clone()))
    depends = _dependence(graph, watchers[0].seen)
    return {
        node.name: Sight(
            place=place[node.name],
            depends=depends[node.name],
            seen=tuple(w.seen[node.name] for w in watchers),
            overwritten=tuple(sorted({p for w in watchers for p in w.overwritten(node.name)})),
            effect=any(node.name in w.effects for w in watchers),
        )
        for node in graph.nodes
    }, outputs


class _Watcher(fx.Interpreter):
    """Runs the graph node by node; each value is freed after its last use.

    Values that share memory are of one family (a view and its base). PyTorch counts the writes into each piece of
    memory (`_version`), so a count that grows while a node runs tells that the node writes into that family.
    """

    def __init__(self, part: nn.Module, graph: fx.Graph, place: Mapping[str, int]) -> None:
        super().__init__(part, garbage_collect_values=True, graph=graph)
        self.extra_traceback = False
        self.place = place
        self.seen: dict[str, object] = {}
        self.effects: set[str] = set()
        self.families: dict[str, set[str]] = {}
        self.writes: dict[str, list[int]] = {}

    def run_node(self, n: fx.Node) -> Any:
        inputs = [(m.name, t) for m in n.all_input_nodes for t in _tensors(self.env[m])]
        versions = [t._version for _, t in inputs]
        dice = _dice(inputs)
        value = super().run_node(n)
        if n.op == "output":
            self.seen[n.name] = None
            self.families[n.name] = set()
            return value
        for (name, t), version in zip(inputs, versions, strict=True):
            if t._version != version:
                self.effects.add(n.name)
                for family in self.families[name]:
                    self.writes.setdefault(family, []).append(self.place[n.name])
        if _dice(inputs) != dice or (n.op == "call_module" and not n.users):
            self.effects.add(n.name)
        memory = {t.untyped_storage().data_ptr() for t in _tensors(value) if t.numel()}
        shared = [self.families[name] for name, t in inputs if t.untyped_storage().data_ptr() in memory]
        self.families[n.name] = set().union(*shared) or {str(n.target) if n.op == "get_attr" else n.name}
        self.seen[n.name] = _look(value)
        return value

    def overwritten(self, name: str) -> list[int]:
        written = (p for family in self.families[name] for p in self.writes.get(family, ()))
        return [p for p in written if p > self.place[name]]


def _dependence(graph: fx.Graph, seen: Mapping[str, object]) -> dict[str, Depends]:
    depends: dict[str, Depends] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            depends[node.name] = Depends.CONTENT
        elif _reads_size(node) and not _tensors(seen[node.name]):
            depends[node.name] = max(min(depends[m.name], Depends.SIZES) for m in node.all_input_nodes)
        else:
            depends[node.name] = max((depends[m.name] for m in node.all_input_nodes), default=Depends.NOTHING)
    return depends


def _reads_size(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in _SIZE_METHODS
    if node.op != "call_function":
        return False
    return node.target in _SIZE_FUNCTIONS or (node.target is builtins.getattr and node.args[1] in _SIZE_ATTRIBUTES)


def _tensors(value: object) -> list[Any]:
    """The tensors in a value, or what `_look` kept of them."""
    if isinstance(value, (torch.Tensor, Tensor)):
        return [value]
    if isinstance(value, Mapping):
        value = tuple(value.values())
    return [t for v in value for t in _tensors(v)] if isinstance(value, (tuple, list)) else []


def _look(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return Tensor(tuple(value.shape), value.dtype, value.device)
    if isinstance(value, Mapping):
        return tuple(_look(v) for v in value.values())
    if isinstance(value, torch.Size):
        return value
    if isinstance(value, (tuple, list)):
        return tuple(_look(v) for v in value)
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        return value
    return type(value)


def _dice(inputs: list[tuple[str, torch.Tensor]]) -> tuple[bytes, ...]:
    """The state of the generators that an operation on these tensors may draw from."""
    devices = {t.device for _, t in inputs if t.is_cuda}
    states = [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in devices)]
    return tuple(state.numpy().tobytes() for state in states)
