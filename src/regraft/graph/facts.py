"""What sizes and types are while a network is followed: answers to code that branches on them.

A stand-in has no numbers, so `if x.dtype != self.dtype` or `if height % 4` stops plain tracing. Yet such a question has
an answer for every input like the example. It is found by running the graph written so far on fake tensors (shapes and
types without memory), in several worlds:

    batch of 3, batch of 1 ----> must agree; else the code depends on the size of the batch
    another picture size ------> may differ; then the graph holds for the size of the example alone

A value that hangs on the content of the input has no answer: fake tensors hold no numbers.

Knows graphs, not what a module means. Not covered: operations that cannot be run on fake tensors, and conditions that
hold in all of these worlds but not in others; the graph checks every answer about sizes again when it runs.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from regraft.errors import TraceError
from regraft.graph.observe import left_alone, other_sizes


def require_same_way(condition: object, seen: bool) -> None:
    """Part of graphs: refuse an input for which the network's code would go another way; raises TraceError."""
    if bool(condition) != seen:
        raise TraceError(
            "A traced network keeps to the way through its code that the example took; this input, of another size, "
            "would take another one: trace with an example of that size."
        )


@dataclass(frozen=True, eq=False)
class _World:
    """One input, and what the nodes are for it so far."""

    x: torch.Tensor
    values: dict[fx.Node, Any]


class Facts:
    """Values of a growing graph of `root` for inputs like `example`, as far as they hang on no content."""

    def __init__(self, root: nn.Module, example: torch.Tensor) -> None:
        self.root = root
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        sizes = [tuple(example.shape[1:]), *[(example.shape[1], *size) for size in other_sizes(example)[:1]]]
        shapes = [(3, *sizes[0]), (1, *sizes[0]), *[(3, *size) for size in sizes[1:]]]
        with self.mode:
            inputs = [torch.empty(shape, dtype=example.dtype, device=example.device) for shape in shapes]
        self.worlds = [_World(x, {}) for x in inputs]

    def of(self, node: fx.Node) -> list[Any] | None:
        """The value of a node in every world that is left, the example's first; None if it cannot be told."""
        values: list[Any] = []
        for world in list(self.worlds):
            try:
                with _silent(), torch.no_grad():
                    self._evaluate(node, world)
            except Exception:  # operations of any network, on inputs that it may not take
                if world in self.worlds[:2]:
                    return None
                self.worlds.remove(world)
            else:
                values.append(world.values[node])
        return values

    def leave_others(self) -> None:
        """From now on, hold for the size of the example alone."""
        del self.worlds[2:]

    def _evaluate(self, wanted: fx.Node, world: _World) -> None:
        needed: set[fx.Node] = set()
        left = [wanted]
        while left:
            node = left.pop()
            if node not in needed and node not in world.values:
                needed.add(node)
                left += node.all_input_nodes
        for node in wanted.graph.nodes:
            if node in needed:
                world.values[node] = self._value(node, world)

    def _value(self, node: fx.Node, world: _World) -> Any:
        if node.op == "placeholder":
            return world.x
        if node.op == "get_attr":
            return functools.reduce(getattr, str(node.target).split("."), self.root)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), world.values.__getitem__)
        if node.op == "call_module":
            layer = self.root.get_submodule(str(node.target))
            if not type(layer).__module__.startswith("torch.nn."):
                return self._of_piece(layer, args, kwargs)
        with self.mode:
            if node.op == "call_module":
                return layer(*args, **kwargs)
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            assert callable(node.target)
            return node.target(*args, **kwargs)

    def _of_piece(self, piece: nn.Module, args: Any, kwargs: Any) -> Any:
        """What foreign code gives: for noise, not for fake tensors, because it may keep in a cache what it computes."""
        args, kwargs = pytree.tree_map_only(FakeTensor, _noise, (args, kwargs))
        with left_alone(piece, self.worlds[0].x):
            result = piece(*args, **kwargs)
        return pytree.tree_map_only(torch.Tensor, self.mode.from_tensor, result)


@contextmanager
def _silent() -> Iterator[None]:
    """Keep torch from printing a traceback where an operation does not take fake tensors of some size."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _noise(like: torch.Tensor) -> torch.Tensor:
    if not like.dtype.is_floating_point:
        return torch.zeros(like.shape, dtype=like.dtype, device=like.device)
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(like.numel())).to(like.device, like.dtype)
