"""Where a tensor inside a network keeps its channels: the layout, and the tokens that are not places of the picture.

Two sources. An axis whose length changes with the size of the picture is a place, not a channel. Where no other size
is accepted, the axis is followed from operation to operation: a convolution puts channels on axis 1, a linear layer
on the last one, a transpose moves them.

Knows graphs and shapes, not cuts. Not covered: positions and channels merged into one axis.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from regraft.graph.observe import Sight, Tensor

Layout = Literal["NCHW", "NHWC", "tokens", "vector"]

_MIXING = ("view", "reshape", "einsum", "movedim", "moveaxis", "matmul", "bmm")
_BY_AXIS: dict[tuple[int, int | None], Layout] = {
    (2, None): "vector",
    (2, 1): "vector",
    (3, 2): "tokens",
    (3, None): "tokens",
    (4, 1): "NCHW",
    (4, 3): "NHWC",
}


def layouts(
    graph: fx.Graph, module: nn.Module, sights: Mapping[str, Sight], *, base: int, other: int | None
) -> dict[str, Layout | None]:
    """The layout of every tensor of the graph; None where the channels lie elsewhere or cannot be told.

    `base` and `other` are the indices of two passes that differ in picture size; `other` may be None.
    """
    found: dict[str, Layout | None] = {}
    axes: dict[str, int | None] = {}
    for node in graph.nodes:
        now = sights[node.name].seen[base]
        if not isinstance(now, Tensor):
            continue
        axis = _by_size(now, sights[node.name].seen[other]) if other is not None else None
        axes[node.name] = axis if axis is not None else _by_operation(node, module, axes, sights, base)
    for node in reversed(graph.nodes):
        now = sights[node.name].seen[base]
        if isinstance(now, Tensor):
            if axes[node.name] is None:
                axes[node.name] = _by_use(node, now, module, axes, sights, base)
            found[node.name] = _BY_AXIS.get((len(now.shape), axes[node.name] if len(now.shape) > 2 else None))
    return found


def prefix_tokens(seen: Sequence[tuple[int, tuple[int, int]]], stated: int) -> int:
    """How many of N tokens are not places of the picture (class and register tokens, in front).

    `seen` holds (N, (height, width) of the input) for some passes; `stated` is what the network says (0: nothing). The
    rest must fill a grid of the shape of the picture in every pass; of several answers, the stated one, then the least.
    """
    for prefix in [stated, *range(6)] if stated else range(6):
        if all(n - prefix >= 4 and _fills_grid(n - prefix, size) for n, size in seen):
            return prefix
    return 0


def _fills_grid(n: int, size: tuple[int, int]) -> bool:
    height, width = size
    return any(n % rows == 0 and rows * width == n // rows * height for rows in range(1, n + 1))


def _by_size(now: Tensor, then: object) -> int | None:
    """The channel axis, from the axes whose length changed with the picture."""
    if not isinstance(then, Tensor) or len(then.shape) != len(now.shape):
        return None
    changed = {i for i in range(1, len(now.shape)) if now.shape[i] != then.shape[i]}
    rank = len(now.shape)
    if rank == 3 and len(changed) == 1:
        return 3 - changed.pop()
    if rank == 4 and len({1, 3} & changed) == 1:
        return 1 if 3 in changed else 3
    return None


def _by_use(
    node: fx.Node,
    now: Tensor,
    module: nn.Module,
    axes: Mapping[str, int | None],
    sights: Mapping[str, Sight],
    base: int,
) -> int | None:
    """The channel axis, from what the next operations expect."""
    for user in node.users:
        axis = _by_layer(user, module, now)
        result = sights[user.name].seen[base]
        if axis is None and isinstance(result, Tensor) and result.shape == now.shape:
            axis = axes[user.name]
        if axis is not None:
            return axis
    return None


def _by_layer(node: fx.Node, module: nn.Module, now: Tensor) -> int | None:
    """The axis on which an operation expects and leaves the channels; None if it does not care."""
    if node.op == "call_module":
        layer = module.get_submodule(str(node.target))
        if isinstance(layer, (_ConvNd, _NormBase)):
            return 1
        if isinstance(layer, nn.LayerNorm) and len(layer.normalized_shape) == 1:
            fitting = [i for i in (1, len(now.shape) - 1) if now.shape[i] == layer.normalized_shape[0]]
            return fitting[0] if len(set(fitting)) == 1 else None
        return len(now.shape) - 1 if isinstance(layer, nn.Linear) else None
    if node.target in (F.conv2d, F.batch_norm, torch.conv2d):
        return 1
    return len(now.shape) - 1 if node.target in (F.linear, F.layer_norm) else None


def _by_operation(
    node: fx.Node, module: nn.Module, axes: Mapping[str, int | None], sights: Mapping[str, Sight], base: int
) -> int | None:
    """The channel axis of the result, from that of the first tensor that goes in."""
    now = sights[node.name].seen[base]
    assert isinstance(now, Tensor)
    rank = len(now.shape)
    if node.op == "placeholder":
        return 1 if rank == 4 else None
    source = next((m for m in node.all_input_nodes if axes.get(m.name) is not None), None)
    axis = _by_layer(node, module, now)
    if axis is not None or source is None:
        return axis
    before, axis = sights[source.name].seen[base], axes[source.name]
    assert isinstance(before, Tensor)
    assert axis is not None
    return _moved(node, axis, before.shape, now.shape)


def _moved(node: fx.Node, axis: int, before: tuple[int, ...], now: tuple[int, ...]) -> int | None:
    """Where an axis goes: through operations that move axes by name, and otherwise by its length, if that is clear."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    rest = _flat(node.args[1:])
    if name in ("transpose", "swapaxes") and len(rest) == 2:
        a, b = (int(i) % len(before) for i in rest)
        return {a: b, b: a}.get(axis, axis)
    if name == "permute" and len(rest) == len(before):
        return [int(i) % len(before) for i in rest].index(axis)
    if len(before) == len(now) and name not in _MIXING:
        return axis
    if name == "flatten" and len(now) == 3 and len(before) == 4:
        return 1 if axis == 1 else 2
    if node.target is operator.getitem or name in ("select", "squeeze", "mean"):
        return None
    same = [i for i in range(1, len(now)) if now[i] == before[axis]]
    return same[0] if len(same) == 1 else None


def _flat(args: Sequence[Any]) -> list[int]:
    """Axis numbers given one by one or as one tuple; empty where one of them is not a plain number."""
    if len(args) == 1 and isinstance(args[0], (tuple, list)):
        args = args[0]
    return [int(a) for a in args] if all(isinstance(a, int) for a in args) else []
