"""What can be made anew above a cut, so that it need not be carried across it.

Only tensors with content count as alive at a cut. Two other sorts of values cross it for free. What depends on the
weights alone is computed on both sides. A size (batch, height, number of tokens) is read off the tensor at the cut,
if it was equal to one of its axes, or always the same, in every observed pass; or it is computed from such sizes.

    size alive across the cut ---- equals h.shape[i] in all passes ----> h.size(i)
                              `--- the same number in all passes ------> that number
                              `--- made of sizes that can be had ----> computed again
                              `--- the same for pictures of one size -> that number, for that size only

The last way is for networks that carry height and width beside their tokens: 196 tokens may be 14 x 14 or 7 x 28.

Knows graphs and what was observed of them, not how a part of a network is put together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from regraft.graph.observe import Depends, Sight, Tensor


@dataclass(frozen=True)
class Axis:
    """Length of axis `index` of the tensor at the cut."""

    index: int


@dataclass(frozen=True)
class Trait:
    """`dtype` or `device` of the tensor at the cut."""

    name: str


@dataclass(frozen=True)
class Sizes:
    """Several at once; `shape` says that the code expects a torch.Size rather than a tuple."""

    parts: tuple[Recipe, ...]
    shape: bool


@dataclass(frozen=True)
class Same:
    """A value that never changed."""

    value: object


@dataclass(frozen=True)
class Fixed:
    """A value that never changed for pictures of the size of the example; the cut then holds for that size alone."""

    value: object


@dataclass(frozen=True)
class Again:
    """The same operation once more, on arguments that can be had above the cut."""


Recipe = Axis | Trait | Sizes | Same | Fixed | Again


def recipes(nodes: Sequence[fx.Node], sights: Mapping[str, Sight], cut: fx.Node) -> dict[str, Recipe] | None:
    """For each value without content that the nodes above `cut` need: how to have it there. None: there is no way."""
    found: dict[str, Recipe | None] = {}
    place = sights[cut.name].place
    for node in nodes[place + 1 :]:
        if sights[node.name].depends is Depends.CONTENT or sights[node.name].effect:
            for value in node.all_input_nodes:
                if not _to_be_had(value, sights, cut, found):
                    return None
    return {name: recipe for name, recipe in found.items() if recipe is not None}


def reachable(node: fx.Node, sights: Mapping[str, Sight], cut: fx.Node, known: dict[str, Recipe]) -> bool:
    """Whether a node that nothing depends on (a check) can run above the cut; adds what it needs to `known`."""
    found: dict[str, Recipe | None] = dict(known)
    if not all(_to_be_had(value, sights, cut, found) for value in node.all_input_nodes):
        return False
    known.update({name: recipe for name, recipe in found.items() if recipe is not None})
    return True


def _to_be_had(node: fx.Node, sights: Mapping[str, Sight], cut: fx.Node, found: dict[str, Recipe | None]) -> bool:
    sight = sights[node.name]
    above = sight.place > sights[cut.name].place
    if node is cut:
        return True
    if sight.depends is Depends.CONTENT:
        return above
    once = sight.effect or sight.overwritten  # must happen exactly once, on its side of the cut
    if once and not above:
        return False
    if node.name not in found:
        found[node.name] = None
        found[node.name] = _recipe(node, sights, cut, found, above)
    return found[node.name] is not None


def _recipe(
    node: fx.Node, sights: Mapping[str, Sight], cut: fx.Node, found: dict[str, Recipe | None], above: bool
) -> Recipe | None:
    if not above and sights[node.name].depends is Depends.SIZES:
        read = _read_off(sights[node.name].seen, sights[cut.name].seen)
        if read is not None:
            return read
    if all(_to_be_had(value, sights, cut, found) for value in node.all_input_nodes):
        return Again()
    return _read_off(sights[node.name].seen, sights[cut.name].seen, _one_size(node.graph, sights))


def _one_size(graph: fx.Graph, sights: Mapping[str, Sight]) -> tuple[int, ...]:
    """Indices of the passes on pictures of the size of the first one."""
    x = [t for t in sights[next(iter(graph.nodes)).name].seen if isinstance(t, Tensor)]
    return tuple(i for i, t in enumerate(x) if t.shape[1:] == x[0].shape[1:])


def _read_off(seen: Sequence[object], h: Sequence[object], one_size: Sequence[int] = ()) -> Recipe | None:
    """How values seen in several passes follow from the tensor at the cut in the same passes.

    `one_size` names passes in which agreement is enough if there is no other way.
    """
    tensors = [t for t in h if isinstance(t, Tensor)]
    if isinstance(seen[0], torch.dtype) and all(v == t.dtype for v, t in zip(seen, tensors, strict=True)):
        return Trait("dtype")
    if isinstance(seen[0], torch.device) and all(v == t.device for v, t in zip(seen, tensors, strict=True)):
        return Trait("device")
    if isinstance(seen[0], tuple):
        return _read_off_each(seen, h, one_size)
    if isinstance(seen[0], (Tensor, type)):
        return None
    if all(v == seen[0] for v in seen):
        return Same(seen[0])
    for axis in range(min(len(t.shape) for t in tensors)):
        if all(v == t.shape[axis] for v, t in zip(seen, tensors, strict=True)):
            return Axis(axis)
    if one_size and all(seen[i] == seen[0] for i in one_size):
        return Fixed(seen[0])
    return None


def _read_off_each(seen: Sequence[object], h: Sequence[object], one_size: Sequence[int]) -> Recipe | None:
    rows = [v for v in seen if isinstance(v, tuple)]
    if len({len(row) for row in rows}) != 1 or len(rows) != len(seen):
        return None
    parts = [_read_off(column, h, one_size) for column in zip(*rows, strict=True)]
    if any(part is None for part in parts):
        return None
    return Sizes(tuple(p for p in parts if p is not None), isinstance(seen[0], torch.Size))
