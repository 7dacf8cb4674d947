"""Steps for operations of ATen that move numbers: shapes, axes, pieces, constants once for every picture.

The axis that counts the pictures is followed through all of them; what would mix it with another is refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from regraft.readers.exported.graph import (
    Graph,
    Held,
    Kind,
    Node,
    Ref,
    Translate,
    free_of,
    from_front,
    reshaped,
    single,
)

LAST = 1 << 62
"""Ends of slices from here on mean: to the end."""


def reduction(kind: str) -> Translate:
    """A mean, sum or largest value over axes that are named."""

    def translate(graph: Graph, node: Node) -> None:
        x = graph.value(node, "self")
        axes, keep, batch = _reduced(graph, node, x)
        graph.compute(node, kind, [x], {"dim": axes, "keepdim": keep}, batch)

    return translate


def _reduced(graph: Graph, node: Node, x: Held) -> tuple[list[int], bool, int | None]:
    """The axes over which a node works, whether they stay with length 1, and the axis of the pictures then."""
    dim, keep = node.get("dim"), bool(node.get("keepdim", False))
    axes = [from_front(d, len(x.shape)) for d in (dim if isinstance(dim, list) else [] if dim is None else [dim])]
    if not axes:
        graph.refuse_mixing(node)
    free_of(graph, node, x, axes)
    return axes, keep, None if x.batch is None else x.batch - (0 if keep else sum(axis < x.batch for axis in axes))


def vector_norm(graph: Graph, node: Node) -> None:
    """The length of vectors along axes."""
    x = graph.value(node, "self")
    axes, keep, batch = _reduced(graph, node, x)
    order = node.get("ord", node.get("p", 2))
    if order is not None and (isinstance(order, bool) or not isinstance(order, (int, float)) or not 0 < order < 100):
        graph.refuse(node, f"has ord={str(order)[:40]}")
    options = {"ord": 2 if order is None else order, "dim": axes, "keepdim": keep}
    graph.compute(node, "vector_norm", [x], options, batch)


def variance(graph: Graph, node: Node) -> None:
    """The variance over axes, and for var_mean their mean too."""
    x = graph.value(node, "self")
    axes, keep, batch = _reduced(graph, node, x)
    correction = node.get("correction", 1 if node.get("unbiased", True) else 0)
    options = {"dim": axes, "correction": 1 if correction is None else correction, "keepdim": keep}
    graph.compute(node, "var", [x], options, batch)
    if len(node.outputs) > 1:
        graph.compute(node, "mean", [x], {"dim": axes, "keepdim": keep}, batch, 1)


def reshape(graph: Graph, node: Node) -> None:
    """view, reshape, unflatten; what flattens everything becomes a Flatten."""
    x, out = graph.value(node, "self"), graph.out(node)
    shape, batch, outer = reshaped(graph, node, x, out)
    whole = None not in x.shape[1:] and shape[1:] == [math.prod(size or 0 for size in x.shape[1:])]
    if x.batch == batch == 0 and x.outer == outer and whole and len(x.shape) > 2:
        graph.compute(node, "Flatten", [x], {}, 0)
    else:
        graph.compute(node, "reshape", [x], {"shape": shape}, batch, outer=outer)


def flatten(graph: Graph, node: Node) -> None:
    """flatten over some axes."""
    x = graph.value(node, "self")
    start, end = (
        from_front(node.get(name, default), len(x.shape)) for name, default in (("start_dim", 0), ("end_dim", -1))
    )
    if x.batch is not None and x.batch < start:
        graph.compute(node, "Flatten", [x], {"start_dim": start, "end_dim": end}, x.batch)
    else:
        reshape(graph, node)


def _reorder(graph: Graph, node: Node, x: Held, dims: Sequence[int]) -> None:
    if x.stored is not None and list(dims) == [1, 0]:
        graph.put(node, replace(x, shape=x.shape[::-1], turned=not x.turned))
        return
    batch = None if x.batch is None else list(dims).index(x.batch)
    graph.compute(node, "permute", [x], {"dims": list(dims)}, batch)


def permute(graph: Graph, node: Node) -> None:
    """Axes in another order."""
    x = graph.value(node, "self")
    _reorder(graph, node, x, [from_front(d, len(x.shape)) for d in node.get("dims")])


def transpose(graph: Graph, node: Node) -> None:
    """Two axes swapped."""
    x = graph.value(node, "self")
    dims = list(range(len(x.shape)))
    if len(dims) > 1:
        one, two = (from_front(node.get(name, default), len(dims)) for name, default in (("dim0", 0), ("dim1", 1)))
        dims[one], dims[two] = dims[two], dims[one]
    _reorder(graph, node, x, dims)


def unsqueeze(graph: Graph, node: Node) -> None:
    """An axis of length 1 more."""
    x, dim = graph.value(node, "self"), from_front(node.get("dim"), len(graph.out(node)))
    batch = None if x.batch is None else x.batch + (dim <= x.batch)
    graph.compute(node, "unsqueeze", [x], {"dim": dim}, batch)


def squeeze(graph: Graph, node: Node) -> None:
    """Named axes of length 1 less."""
    x, dim = graph.value(node, "self"), node.get("dim")
    if dim is None:
        graph.refuse(node, "names no axis")
    wanted = [from_front(d, len(x.shape)) for d in (dim if isinstance(dim, list) else [dim])]
    axes = sorted(axis for axis in wanted if x.shape[axis] == 1)
    free_of(graph, node, x, axes)
    batch = None if x.batch is None else x.batch - sum(axis < x.batch for axis in axes)
    graph.compute(node, "squeeze", [x], {"dim": axes}, batch)


def select(graph: Graph, node: Node) -> None:
    """One place along an axis, which goes away."""
    x, index = graph.value(node, "self"), node.get("index")
    dim = from_front(node.get("dim", 0), len(x.shape))
    free_of(graph, node, x, [dim])
    if index is None:
        graph.refuse(node, "has an index that follows from the input")
    _pick(graph, node, x, dim, int(index), 0)


def _pick(graph: Graph, node: Node, x: Held, dim: int, index: int, place: int) -> None:
    batch = None if x.batch is None else x.batch - (dim < x.batch)
    graph.compute(node, "select", [x], {"dim": dim, "index": index}, batch, place)


def slice_axis(graph: Graph, node: Node) -> None:
    """A piece along an axis; the whole of it is no step."""
    x, step = graph.value(node, "self"), node.get("step", 1)
    dim = from_front(node.get("dim", 0), len(x.shape))
    free = {name for name in ("start", "end") if name in node.arguments and node.get(name) is None}
    start, end = node.get("start") or 0, node.get("end")
    if start == 0 and step == 1 and "end" not in free and (end is None or end >= LAST or end == x.shape[dim]):
        graph.put(node, x)
        return
    free_of(graph, node, x, [dim])
    if x.shape[dim] is None or graph.out(node)[dim] is None:
        graph.refuse(node, "has ends that follow from the input")
    _cut_out(graph, node, x, dim, (start, None if end is None or end >= LAST else end, step), 0)


def _cut_out(graph: Graph, node: Node, x: Held, dim: int, ends: tuple[int, int | None, int], place: int) -> None:
    start, stop, step = ends
    graph.compute(node, "slice", [x], {"dim": dim, "start": start, "stop": stop, "step": step}, x.batch, place)


def split(graph: Graph, node: Node) -> None:
    """split, split_with_sizes, chunk: slices, as long as they were exported."""
    x = graph.value(node, "self")
    dim, start = from_front(node.get("dim", 0), len(x.shape)), 0
    free_of(graph, node, x, [dim])
    for place in range(len(node.outputs)):
        size = graph.out(node, place)[dim]
        if size is None:
            graph.refuse(node, "has sizes that follow from the input")
        _cut_out(graph, node, x, dim, (start, start + size, 1), place)
        start += size


def unbind(graph: Graph, node: Node) -> None:
    """Every place along an axis by itself."""
    x = graph.value(node, "self")
    dim = from_front(node.get("dim", 0), len(x.shape))
    free_of(graph, node, x, [dim])
    for place in range(len(node.outputs)):
        _pick(graph, node, x, dim, place, place)


def expand(graph: Graph, node: Node) -> None:
    """Repeated along axes of length 1; a constant once for every picture waits until it must be."""
    x, out = graph.value(node, "self"), graph.out(node)
    grown = [
        axis for axis, size in enumerate(out) if axis < len(out) - len(x.shape) or x.shape[axis - len(out)] != size
    ]
    if (
        x.batch is None
        and grown in ([], [0])
        and len(out) == len(x.shape)
        and graph.is_batch(out[0])
        and x.shape[0] == 1
    ):
        graph.put(node, replace(x, lent=True))
        return
    batch = None if x.batch is None else len(out) - len(x.shape) + x.batch
    if batch is None and (None in out or x.lent):
        graph.refuse(node, "repeats a constant in a way that follows from the input")
    free_of(graph, node, Held(out, batch), grown)
    kept = [-1 if axis == batch else size for axis, size in enumerate(out)]
    if None in kept:
        graph.refuse(node, "has sizes that follow from the input")
    graph.compute(node, "expand", [x], {"shape": kept}, batch)


def cat(graph: Graph, node: Node) -> None:
    """Tensors side by side."""
    parts = [graph.of(node, ref) for ref in node.get("tensors")]
    rank = len(graph.out(node))
    dim = from_front(node.get("dim", 0), rank)
    batches = {part.batch for part in parts if part.batch is not None}
    if len(batches) > 1 or dim in batches:
        graph.refuse_mixing(node)
    if batches:
        like = next(part for part in parts if part.batch is not None)
        parts = [part if part.batch is not None else _lend(graph, node, part, like) for part in parts]
    graph.compute(node, "concat", parts, {"dim": dim}, next(iter(batches), None))


def stack(graph: Graph, node: Node) -> None:
    """Tensors side by side along an axis of their own."""
    parts = [graph.of(node, ref) for ref in node.get("tensors")]
    dim, batches = from_front(node.get("dim", 0), len(graph.out(node))), {part.batch for part in parts}
    if len(batches) > 1:
        graph.refuse(node, "stacks constants on what follows from the input, or pictures along several axes")
    name, (batch,) = graph.name_of(node), batches
    if batch is None and any(part.lent for part in parts):
        graph.refuse(node, "has a constant for every picture of a batch")
    batch = None if batch is None else batch + (dim <= batch)
    spread = [
        graph.add("unsqueeze", [graph.step_of(part)], {"dim": dim}, f"{name}_{i}") for i, part in enumerate(parts)
    ]
    held = [replace(part, step=step, stored=None, batch=batch) for part, step in zip(parts, spread, strict=True)]
    graph.compute(node, "concat", held, {"dim": dim}, batch)


def _lend(graph: Graph, node: Node, constant: Held, like: Held) -> Held:
    """A constant once for every picture."""
    if like.batch != 0 or constant.shape[0] != 1 or not (constant.lent or graph.batch == 1):
        graph.refuse(node, "has a constant for every picture of a batch")
    inputs, rank = [graph.step_of(constant), graph.step_of(like)], len(constant.shape)
    step = graph.add("expand_batch", inputs, {"rank": rank}, f"{graph.name_of(node)}_batch")
    return Held((like.shape[0], *constant.shape[1:]), 0, step)


def same(graph: Graph, node: Node) -> None:
    """What changes nothing but memory, or one kind of floating point into another."""
    held = single(graph, node)
    about = [node.get("dtype")]
    if any(isinstance(kind, Kind) for kind in about) and held.stored and not graph.tensor(held).is_floating_point():
        graph.refuse(node, "makes other numbers of stored ones")
    graph.put(node, held)


def as_strided(graph: Graph, node: Node) -> None:
    """Other strides for the same numbers, which is no step; any other use is refused."""
    x, before = graph.value(node, "self"), graph.strides[node.get("self").name]
    after = graph.strides[node.outputs[0]]
    kept = [old == new or size == 1 for old, new, size in zip(before, after, x.shape, strict=False)]
    if graph.out(node) != x.shape or not all(kept) or node.get("storage_offset"):
        graph.refuse(node, "reads a tensor by other strides")
    graph.put(node, x)


def index(graph: Graph, node: Node) -> None:
    """Places along an axis of a constant, by stored whole numbers of any shape."""
    x, places, out = graph.value(node, "self"), node.get("indices"), graph.out(node)
    dims = [dim for dim, place in enumerate(places) if isinstance(place, Ref)]
    if x.batch is not None or len(dims) != 1:
        graph.refuse(node, "takes more than places along one axis of a constant")
    which = graph.of(node, places[dims[0]])
    if which.batch is not None or None in (*which.shape, *out):
        graph.refuse(node, "takes places that follow from the input")
    name = graph.name_of(node)
    flat = graph.add("reshape", [graph.step_of(which)], {"shape": [-1]}, f"{name}_places")
    taken = graph.add("take", [graph.step_of(x), flat], {"dim": dims[0]}, f"{name}_taken")
    graph.compute(node, "reshape", [Held(x.shape, None, taken)], {"shape": list(out)}, None)


def roll(graph: Graph, node: Node) -> None:
    """Numbers moved around along axes."""
    x, dims = graph.value(node, "self"), [from_front(d, len(graph.out(node))) for d in node.get("dims", [])]
    free_of(graph, node, x, dims)
    if not dims or None in node.get("shifts"):
        graph.refuse(node, "rolls a tensor as a whole, or by what follows from the input")
    graph.compute(node, "roll", [x], {"shifts": node.get("shifts"), "dims": dims}, x.batch)


def pad(graph: Graph, node: Node) -> None:
    """Numbers around a tensor, not around the batch."""
    x, pads = graph.value(node, "self"), [int(n) for n in node.get("pad")]
    free_of(graph, node, x, range(len(x.shape) - len(pads) // 2, len(x.shape)))
    value = node.get("value")
    options = {"pads": pads, "mode": node.get("mode", "constant"), "value": 0.0 if value is None else value}
    graph.compute(node, "pad", [x], options, x.batch)
