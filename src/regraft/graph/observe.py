"""Run a graph on a few inputs and write down what each of its values is: shape, type, who writes into it.

A cut needs facts that no single look at the operations gives. Does a value depend on the content of the input, on its
size alone, or on nothing but the weights? Is it overwritten in place later? Does making it draw random numbers?

Knows graphs, not cuts or layers. Not covered: values that differ only for inputs other than those run here.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal

import torch
from torch import fx, nn

from regraft.errors import TraceError, first_line
from regraft.graph.kept import kept, put_back
from regraft.graph.twins import twin

Varies = Literal["", "batch", "size", "mode"]
_SIZE_ATTRIBUTES = {"shape", "ndim", "dtype", "device", "layout", "is_cuda"}
_SIZE_METHODS = {"size", "dim", "ndimension", "numel", "nelement", "stride", "is_floating_point", "get_device"}
_SIZE_FUNCTIONS = {torch.numel, torch.is_floating_point, builtins.len}


class Depends(IntEnum):
    """What of the input a value depends on."""

    NOTHING = 0
    SIZES = 1
    CONTENT = 2


@dataclass(frozen=True)
class Pass:
    """One pass of the whole network: its input, its output (if compared), and what is unlike the first pass.

    "mode" is a pass in training; the others are in evaluation.
    """

    x: torch.Tensor
    output: object
    varies: Varies

    @property
    def train(self) -> bool:
        return self.varies == "mode"


@dataclass(frozen=True)
class Tensor:
    """What is kept of a tensor: never its numbers."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Sight:
    """What is known of the value of one node.

    `seen` has one entry per pass: a Tensor, a number, a size, a type, a tuple of such, or the class of anything else.
    `overwritten` holds the places in the order of computation of later nodes that write into the value's memory.
    `effect`: making the value draws random numbers, writes into another one or may change a layer whose result nobody
    uses, so it must happen exactly once.
    """

    place: int
    depends: Depends
    seen: tuple[object, ...]
    overwritten: tuple[int, ...]
    effect: bool


def observe(
    graph: fx.Graph, module: nn.Module, part: nn.Module, example: torch.Tensor
) -> tuple[dict[str, Sight], list[Pass]]:
    """What each node of `graph` was over some passes like `example`, and these passes.

    `part` runs the graph and shares the tensors of `module`. Passes start from seed 0, without gradients; running
    statistics and random state are put back. Raises TraceError when the network does not take such input, or the graph
    does not give bit for bit what the network gives.
    """
    if example.ndim < 2:
        raise TraceError(f"An example must be a batch, of rank 2 or more; found shape {tuple(example.shape)}.")
    place = {node.name: i for i, node in enumerate(graph.nodes)}
    watchers: list[_Watcher] = []
    passes: list[Pass] = []
    for one in _plan(module, example):
        if one.varies in {done.varies for done in passes}:
            continue
        watcher = _Watcher(part, graph, place)
        try:
            output = _output(part.train(one.train), one.x, watcher.run)
        except Exception as e:  # the operations of any network
            if one.varies == "size":
                continue
            raise TraceError(
                f"{type(module).__name__} cannot be run one operation at a time: {first_line(e, kind=True)}."
            ) from e
        if one.varies in ("", "mode"):
            _require_equal(one, output, type(module).__name__)
        watchers.append(watcher)
        passes.append(one)
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
    }, passes


def _plan(module: nn.Module, example: torch.Tensor) -> Iterator[Pass]:
    """The plain case, another batch size, another picture size if the network takes one, training if it can be had.

    A size that agrees with another one in all of them agrees for good reason. What the graph gives is compared with
    what the network gives once in each mode.
    """
    whole = twin(module).eval()
    x = _like(example, 2)
    try:
        output = _output(whole, x, whole)
    except Exception as e:  # any network may raise anything
        raise TraceError(
            f"{type(module).__name__} must take a batch of 2 like the example, of shape {tuple(x.shape)}; "
            f"it raised {first_line(e, kind=True)}."
        ) from e
    yield Pass(x, output, "")
    yield Pass(_like(example, 3), None, "batch")
    for size in other_sizes(example):
        yield Pass(_like(example, 2, size), None, "size")
    try:
        output = _output(whole.train(), x, whole)
    except Exception:  # it cannot be trained as it is; whatever it raises, there is nothing to compare with
        return
    yield Pass(x, output, "mode")


def _output(part: nn.Module, x: torch.Tensor, run: Callable[[torch.Tensor], Any]) -> Any:
    with left_alone(part, x), torch.no_grad():
        torch.manual_seed(0)
        return run(x.clone())


def _like(example: torch.Tensor, batch: int, size: tuple[int, int] | None = None) -> torch.Tensor:
    """A batch like the example: noise, where its numbers are real ones."""
    shape = (batch, *example.shape[1:]) if size is None else (batch, example.shape[1], *size)
    if not example.is_floating_point():
        return example[:1].expand(shape).clone()
    return torch.randn(shape, generator=torch.Generator().manual_seed(batch)).to(example)


def other_sizes(example: torch.Tensor) -> list[tuple[int, int]]:
    """Other picture sizes to try: first those of another shape, so that height and width can be told apart.

    The smaller one, at less cost, comes first where a network that halves its maps five times has something left.
    """
    if example.ndim != 4 or not example.is_floating_point():
        return []
    height, width = example.shape[2:]

    def scaled(length: int, factor: float) -> int:
        step = 32 if factor > 1 else -32
        return round(length * factor / 32) * 32 if abs(length * factor - length) >= 32 else length + step

    def both(tall: int, wide: int, step: int) -> tuple[int, int]:
        return tall, wide + step if tall * width == wide * height else wide

    smaller = [both(scaled(height, 0.85), scaled(width, 0.75), -32)] if min(height, width) >= 160 else []
    larger = both(scaled(height, 1.25), scaled(width, 1.5), 32)
    return [*smaller, larger, (scaled(height, 1.5), scaled(width, 1.5)), (2 * height, 2 * width)]


@contextmanager
def left_alone(module: nn.Module, example: torch.Tensor) -> Iterator[None]:
    """Put back running statistics, attributes (a layer may adapt itself to the size it sees) and random state."""
    attributes = [(kept(m), m) for m in module.modules()]
    statistics = [
        (m, name, b, None if b is None else b.clone()) for m in module.modules() for name, b in m._buffers.items()
    ]
    devices = [example.device] if example.is_cuda else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for then, m in attributes:
            put_back(then, m)
        for m, name, buffer, value in statistics:
            m._buffers[name] = buffer
            if buffer is not None and value is not None:
                buffer.copy_(value)


def _require_equal(one: Pass, output: object, name: str) -> None:
    if not _equal(one.output, output):
        raise TraceError(
            f"{name} must compute the same whenever it runs; in {'training' if one.train else 'evaluation'} mode on "
            f"input {tuple(one.x.shape)} its operations, run one by one, give another output: it may draw random "
            "numbers outside PyTorch or keep state; name the class of that submodule in leaf_modules."
        )


def _equal(a: object, b: object) -> bool:
    """Bit for bit; lists and tuples, or kinds of dictionaries, are not told apart."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b)


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
