"""Follow a network from input to output: a module becomes a graph of operations that still reads its mode when run.

Plain symbolic tracing (`torch.fx`) runs `forward` once with a stand-in for the input and writes down what happens.
Whatever Python decides on the way is frozen into the graph, above all `if self.training`. Here `training` is a value
of the graph like any other, so the graph obeys `.train()` and `.eval()`. A submodule that cannot be followed (it
branches on computed values, draws random numbers in Python, keeps state, has hooks) stays in one piece.

Knows modules and calls, not shapes, cuts or what any layer means. Not covered: attributes other than `training`
(dropout rates that are passed to functions, say) keep the value they had when the network was followed, and other
threads must not run modules meanwhile (a limit of `torch.fx`).
"""

from __future__ import annotations

import operator
import random
import sys
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from regraft.graph.facts import Facts, require_same_way
from regraft.graph.kept import changed, kept, put_back
from regraft.graph.leaves import Leaves, Stopped, timm_leaves

_ONE_AT_A_TIME = threading.RLock()
_MODE = "it branches on self.training"
_DICE = "it draws random numbers that do not depend on its input"


@dataclass(frozen=True)
class Followed:
    """A network as a graph.

    `ends` maps a module path to the names of the nodes in its result, often just one. A path that runs several times
    has one entry per call, `path@1`, `path@2`, ... `scopes` maps a node name to the path of the module that made it.
    `constants` holds the tensors that `forward` made by itself, under the names the graph uses for them.
    """

    graph: fx.Graph
    ends: Mapping[str, tuple[str, ...]]
    scopes: Mapping[str, str]
    constants: Mapping[str, object]


def follow(
    module: nn.Module,
    *,
    example: torch.Tensor | None = None,
    leaf_modules: Collection[type[nn.Module]] = (),
    leaf_functions: Collection[Callable[..., Any]] = (),
) -> Followed:
    """The graph of `module`, whose `forward` takes one tensor; further arguments keep their defaults.

    Where code branches on sizes or types, the way that `example` takes is followed, and the graph raises TraceError on
    sizes that would take another; without an example, and in small modules where the way hangs on the size of the
    picture, the module that branches is kept in one piece.
    `leaf_modules` are classes and `leaf_functions` functions to keep in one piece; what timm declares as such is
    added where timm is imported. The module is left as it was: modes, attributes, random state.
    Raises TraceError, naming file and line, where the outermost `forward` itself cannot be followed.
    """
    kinds, functions = timm_leaves()
    leaves = Leaves(set(kinds) | set(leaf_modules), {f for f in [*functions, *leaf_functions] if callable(f)})
    with _ONE_AT_A_TIME:
        while True:
            try:
                return _settle(module, leaves, example)
            except Stopped as stop:
                leaves.add(module, stop)


def _settle(module: nn.Module, leaves: Leaves, example: torch.Tensor | None) -> Followed:
    """Follow the network and answer its questions about the mode (`if self.training`).

    Every question is answered "no". Where answering "yes" instead gives the same graph, the mode makes no difference
    (attention asks for the rate of a dropout that is 0 anyway); where it gives another one, the module that asked is
    kept in one piece. A module without submodules that gives one tensor loses nothing by that, so it is not tried.
    """
    followed, asked = _attempt(module, leaves, example, say_yes_to=None)
    single = {path.split("@")[0] for path, nodes in followed.ends.items() if len(nodes) == 1}
    alone = [path for path in asked if path in single and not any(True for _ in module.get_submodule(path).children())]
    if alone:
        raise Stopped(alone, _MODE)
    plain = str(followed.graph.python_code("self").src)
    for kind in {type(module.get_submodule(path)): None for path in asked}:
        paths = [path for path in asked if type(module.get_submodule(path)) is kind]
        try:
            other, _ = _attempt(module, leaves, example, say_yes_to=kind)
        except Stopped as stop:
            raise Stopped(paths, _MODE) from stop
        if str(other.graph.python_code("self").src) != plain:
            raise Stopped(paths, _MODE)
    return followed


def _attempt(
    module: nn.Module, leaves: Leaves, example: torch.Tensor | None, *, say_yes_to: type[nn.Module] | None
) -> tuple[Followed, tuple[str, ...]]:
    """One pass through `forward`, and the paths of the modules that asked for the mode."""
    tracer = _Tracer(leaves, say_yes_to, None if example is None else Facts(module, example))
    with _left_as_it_was(module), _mode_as_a_value(tracer):
        dice = _dice()
        known = set(module.__dict__)
        try:
            graph = tracer.trace(module)
        except Stopped:
            raise
        except Exception as e:  # user code runs here: any class may come out
            raise Stopped([tracer.running()], str(e) or type(e).__name__) from e
        if _dice() != dice:
            raise Stopped([""], _DICE)
        constants = {name: value for name, value in module.__dict__.items() if name not in known}
    _drop_unused_parts(graph)
    names = {node.name for node in graph.nodes}
    scopes = {name: scope for name, (scope, _) in tracer.node_name_to_scope.items() if name in names}
    finished = [(path, tuple(name for name in nodes if name in names)) for path, nodes in tracer.finished]
    return Followed(graph, _numbered(finished), scopes, constants), tuple(tracer.asked)


def _drop_unused_parts(graph: fx.Graph) -> None:
    """Forget parts of tuples that are taken and never used, lest the whole tuple seem to be needed for them."""
    for node in reversed(graph.nodes):
        if node.target is operator.getitem and not node.users:
            graph.erase_node(node)


def _is_small(module: nn.Module) -> bool:
    """Nothing but single layers below: kept in one piece, it loses no block."""
    return not any(True for child in module.children() for _ in child.children())


def _numbered(finished: list[tuple[str, tuple[str, ...]]]) -> dict[str, tuple[str, ...]]:
    """Calls by path; the calls of a path that runs several times are numbered from 1."""
    calls = Counter(path for path, _ in finished)
    so_far: Counter[str] = Counter()
    ends: dict[str, tuple[str, ...]] = {}
    for path, nodes in finished:
        so_far[path] += 1
        ends[path if calls[path] == 1 else f"{path}@{so_far[path]}"] = nodes
    return ends


class _Tracer(fx.Tracer):
    """Writes down one pass through `forward`, with modes, parameters and buffers as values."""

    def __init__(self, leaves: Leaves, say_yes_to: type[nn.Module] | None, facts: Facts | None) -> None:
        super().__init__(autowrap_functions=tuple(leaves.functions))
        self.leaves = leaves
        self.say_yes_to = say_yes_to
        self.facts = facts
        self.looking_up = False
        self.thread = threading.get_ident()
        self.finished: list[tuple[str, tuple[str, ...]]] = []
        self.asked: list[str] = []
        self.modes: dict[str, fx.Proxy] = {}
        self.stored: dict[int, str] = {}

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def running(self) -> str:
        """The path of the innermost module whose `forward` is being followed."""
        for path, _ in reversed(self.module_stack.values()):
            if not self.is_leaf_module(self.root.get_submodule(path), path):
                return str(path)
        return ""

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """One stand-in, for the first argument; Python fills in the defaults of the others."""
        for name, tensor in [*self.root.named_parameters(), *self.root.named_buffers()]:
            self.stored.setdefault(id(tensor), name)
        return root_fn, [self.root, self.create_proxy("placeholder", "x", (), {})]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return super().is_leaf_module(m, module_qualified_name) or self.leaves.holds(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self.looking_up:
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        if type(m) is nn.Identity and len(args) == 1 and not m._forward_hooks and not m._forward_pre_hooks:
            result = args[0]  # the same value under another name
        elif self.is_leaf_module(m, path):
            result = super().call_module(m, forward, args, kwargs)
        else:
            dice, before = _dice(), kept(m)
            result = super().call_module(m, forward, args, kwargs)
            if _dice() != dice:
                raise Stopped([path], _DICE)
            if changed(before, m):
                raise Stopped([path], "it changes its own attributes")
        parts = pytree.tree_leaves(result)
        self.finished.append((path, tuple(part.node.name for part in parts if isinstance(part, fx.Proxy))))
        return result

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Parameters and buffers become values of the graph, so that none is baked in."""
        name = self.stored.get(id(attr_val)) if isinstance(attr_val, torch.Tensor) else None
        if name is None or self.looking_up:
            return attr_val
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy(
                "get_attr", name, (), {}, proxy_factory_fn=lambda node: _StoredProxy(node, self, attr_val)
            )
        return parameter_proxy_cache[name]

    def mode_of(self, module: nn.Module) -> Any:
        """What reading `module.training` gives while the network is followed: a value of the graph."""
        path = (self.submodule_paths or {}).get(module)
        if self.looking_up:
            return False
        if path is None or threading.get_ident() != self.thread:
            return module.__dict__["training"]
        if path not in self.modes:
            self.modes[path] = self.create_proxy("get_attr", f"{path}.training".lstrip("."), (), {})
        return self.modes[path]

    def to_bool(self, obj: fx.Proxy) -> bool:
        path = self.running()
        if any(obj is mode for mode in self.modes.values()):
            if path not in self.asked:
                self.asked.append(path)
            return self.say_yes_to is type(self.root.get_submodule(path))
        answers = self.known(obj)
        if not answers or any(isinstance(answer, torch.Tensor) for answer in answers):
            return bool(super().to_bool(obj))
        first, *others = map(bool, answers)
        if others[0] != first:
            raise Stopped([path], "it branches on the size of the batch")
        if not all(other == first for other in others):
            if path and _is_small(self.root.get_submodule(path)):
                raise Stopped([path], "it branches on the size of the picture")
            assert self.facts is not None
            self.facts.leave_others()
        if not self.asks_for_types(obj.node):
            self.create_proxy("call_function", require_same_way, (obj, first), {})
        return first

    def asks_for_types(self, condition: fx.Node) -> bool:
        """Types change when a network is run in another precision; its operations object by themselves."""
        values = [self.known(self.proxy(node)) or [None] for node in condition.all_input_nodes]
        return bool(values) and all(isinstance(value[0], torch.dtype | torch.device) for value in values)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """The parts of a size or another tuple, where their number is known."""
        parts = self.parts(obj)
        return super().iter(obj) if parts is None else iter([obj[i] for i in range(parts)])  # type: ignore[index]

    def parts(self, value: fx.Proxy) -> int | None:
        """How many parts a size or another tuple has; None where it is something else or cannot be told."""
        lengths = {len(answer) if isinstance(answer, tuple) else None for answer in self.known(value) or [None]}
        return lengths.pop() if len(lengths) == 1 else None

    def known(self, value: fx.Proxy) -> list[Any] | None:
        """What the value is for inputs like the example, as `Facts.of` tells."""
        if self.facts is None:
            return None
        self.looking_up = True
        try:
            return self.facts.of(value.node)
        finally:
            self.looking_up = False


class _Value(fx.Proxy):
    """A value of the graph that also notes down `x += y` and `x[i] = y`, which plain stand-ins mistake or refuse."""

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self._write(_add_in_place, other)

    def __isub__(self, other: Any) -> fx.Proxy:
        return self._write(_subtract_in_place, other)

    def __imul__(self, other: Any) -> fx.Proxy:
        return self._write(_multiply_in_place, other)

    def __itruediv__(self, other: Any) -> fx.Proxy:
        return self._write(_divide_in_place, other)

    def __setitem__(self, index: Any, value: Any) -> None:
        self._write(_set_item, index, value)

    def __getattr__(self, k: str) -> fx.proxy.Attribute:
        return _Attribute(self, k)

    def __len__(self) -> int:
        return _length(self)

    def _write(self, operation: Callable[..., Any], *args: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operation, (self, *args), {})


class _Attribute(fx.proxy.Attribute):
    """`x.shape` and the like, which know how many parts they have."""

    def __len__(self) -> int:
        return _length(self)


def _length(value: fx.Proxy) -> int:
    parts = value.tracer.parts(value) if isinstance(value.tracer, _Tracer) else None
    return fx.Proxy.__len__(value) if parts is None else parts


# Functions of their own, because the code that torch.fx writes for operator.iadd changes numbers that are used again.
def _add_in_place(x: Any, y: Any) -> Any:
    x += y
    return x


def _subtract_in_place(x: Any, y: Any) -> Any:
    x -= y
    return x


def _multiply_in_place(x: Any, y: Any) -> Any:
    x *= y
    return x


def _divide_in_place(x: Any, y: Any) -> Any:
    x /= y
    return x


def _set_item(x: Any, index: Any, value: Any) -> None:
    x[index] = value


class _StoredProxy(_Value):
    """A parameter or buffer as a value of the graph; its shape is a fact, so code may branch on it."""

    def __init__(self, node: fx.Node, tracer: fx.Tracer, tensor: torch.Tensor) -> None:
        super().__init__(node, tracer)
        self._tensor = tensor

    @property
    def shape(self) -> torch.Size:
        return self._tensor.shape

    @property
    def ndim(self) -> int:
        return self._tensor.ndim

    def size(self, *axis: int) -> Any:
        return self._tensor.size(*axis)

    def dim(self) -> int:
        return self._tensor.dim()

    def numel(self) -> int:
        return self._tensor.numel()

    def __len__(self) -> int:
        return len(self._tensor)


@contextmanager
def _mode_as_a_value(tracer: _Tracer) -> Iterator[None]:
    """While open, `module.training` is a value of the tracer's graph.

    A property on the class wins over the entry in the instance, so no instance is touched.
    """

    def write(module: nn.Module, mode: bool) -> None:
        module.__dict__["training"] = mode

    setattr(nn.Module, "training", property(tracer.mode_of, write))  # noqa: B010 - mypy forbids the plain form
    try:
        yield
    finally:
        delattr(nn.Module, "training")


@contextmanager
def _left_as_it_was(module: nn.Module) -> Iterator[None]:
    """Put back every attribute that `forward` stores on its modules, and the state of the random generators."""
    before = [(kept(m), m) for m in module.modules()]
    python = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        for then, m in before:
            put_back(then, m)


def _dice() -> tuple[object, ...]:
    """The state of the random generators that `forward` may draw from."""
    numpy = sys.modules.get("numpy")
    drawn = numpy.random.get_state()[1:3] if numpy else ((), 0)
    return random.getstate(), torch.get_rng_state().numpy().tobytes(), bytes(drawn[0]), drawn[1]
