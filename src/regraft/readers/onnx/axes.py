"""What moves, cuts or joins axes in ONNX, as steps: shapes, slices, padding, sums along axes.

A Transpose, and what leaves everything as it is, becomes no step at all; the others work on the axes where they stand,
as long as that is possible.

Sources: the operator definitions of onnx.ai up to opset 25.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from regraft.readers.onnx.arithmetic import rows_alike
from regraft.readers.onnx.constants import axes_of, integers, reshaped, slices, split_sizes
from regraft.readers.onnx.layers import LOWEST
from regraft.readers.onnx.steps import Known, Live, Node, Value, Writer, common_order, known

_FAR = 2**31 - 1
_MOST_CHANNELS = 1 << 20

# ---- order and shape --------------------------------------------------------------------------------------------


def _transpose(writer: Writer, node: Node) -> Live:
    x = node.live()
    dims = [int(d) for d in node.attributes.get("perm", range(x.rank)[::-1])]
    if sorted(dims) != list(range(x.rank)):
        raise ValueError(f"an order of axes {dims} of {x.rank}")
    return replace(x, order=tuple(x.order[d] for d in dims))


def _reshape(writer: Writer, node: Node) -> Live:
    x = node.live()
    wanted = node.inputs[1] if len(node.inputs) > 1 else None
    if isinstance(wanted, Live):
        raise ValueError("a shape that depends on the picture")
    count = len(x.seen)
    given = [integers(a) for a in wanted.arrays] if wanted else [list(node.attributes["shape"])] * count
    zero = bool(node.attributes.get("allowzero", 0))
    if node.fixed is not None and all(g == given[0] for g in given):
        return _shaped(writer, node, x, _of_batches(node, x, given[0], zero, node.fixed))
    return _shaped(writer, node, x, [reshaped(s, g, zero) for s, g in zip(x.shapes, given, strict=True)])


def _of_batches(node: Node, x: Live, wanted: Sequence[int], zero: bool, fixed: int) -> list[list[int]]:
    """What a shape that was written for a fixed batch becomes for the batch of each sight.

    Numbers keep their sequence, so the axis that begins where the batch axis began grows as that one does: the product
    of the lengths in front of it tells which one that is.
    """
    axis = next((i for i, (a, b) in enumerate(zip(*x.shapes[:2], strict=True)) if a != b), None)
    if axis is None:
        return [reshaped(shape, wanted, zero) for shape in x.shapes]
    results = []
    for shape, batch in zip(x.shapes, node.batches, strict=True):
        alone = [*shape[:axis], shape[axis] * fixed // batch, *shape[axis + 1 :]]
        found = reshaped(alone, wanted, zero)
        front = math.prod(shape[:axis])
        place = next((i for i in range(len(found)) if math.prod(found[:i]) == front), None)
        if place is None or found[place] % fixed:
            raise ValueError(f"a shape {list(wanted)} that is for a batch of {fixed} alone")
        found[place] = found[place] // fixed * batch
        results.append(found)
    return results


def _flatten(writer: Writer, node: Node) -> Live:
    x = node.live()
    axis = int(node.attributes.get("axis", 1))
    axis = axis + x.rank if axis < 0 else axis
    return _shaped(writer, node, x, [[math.prod(s[:axis]), math.prod(s[axis:])] for s in x.shapes])


def _shaped(writer: Writer, node: Node, x: Live, wanted: Sequence[Sequence[int]]) -> Live:
    """x with these shapes, one for each sight: a length that varies is the batch, or what is left beside it."""
    turned = _relabelled(x, wanted)
    if turned is not None:
        return replace(x, order=turned)
    long = [o for o in x.order if any(t.shape[o] != 1 for t in x.seen)]
    if long != sorted(long):  # else the sequence of the numbers does not depend on the order of the axes
        x = writer.plain(x)
    rank = len(wanted[0])
    lengths = [tuple(shape[i] for shape in wanted) for i in range(rank)]
    kept = [i < x.seen[0].dim() and lengths[i] == tuple(t.shape[i] for t in x.seen) for i in range(rank)]
    if rank == 2 and kept[0]:
        return writer.emit(node.name, "Flatten", [x], order=(0, 1))
    varies = [len(set(each)) > 1 for each in lengths]
    sizes = [0 if v and k else -1 if v else each[0] for v, k, each in zip(varies, kept, lengths, strict=True)]
    if sizes.count(-1) > 1:
        raise ValueError("a shape in which several lengths vary")
    return writer.emit(node.name, "reshape", [x], {"shape": sizes}, range(rank))


def _relabelled(x: Live, wanted: Sequence[Sequence[int]]) -> tuple[int, ...] | None:
    """The order of axes by which x has these shapes already, where only axes of length 1 move; else None."""
    if len(wanted[0]) != x.rank:
        return None
    before, after = ([i for i in range(x.rank) if any(s[i] != 1 for s in shapes)] for shapes in (x.shapes, wanted))
    if any([s[i] for i in before] != [w[i] for i in after] for s, w in zip(x.shapes, wanted, strict=True)):
        return None
    order = dict(zip(after, (x.order[i] for i in before), strict=True))
    rest = iter(sorted(set(range(x.rank)) - set(order.values())))
    return tuple(order[i] if i in order else next(rest) for i in range(x.rank))


def _squeeze(writer: Writer, node: Node) -> Live:
    x = node.live()
    axes = axes_of(node.attributes, node.arrays(), 1)
    if axes is None:
        axes = [i for i in range(x.rank) if all(shape[i] == 1 for shape in x.shapes)]
    gone = sorted(range(x.rank)[axis] for axis in axes)
    if any(shape[axis] != 1 for shape in x.shapes for axis in gone):
        raise ValueError(f"axes {gone} of shape {list(x.shapes[0])} to be left out")
    if not gone:
        return x
    return writer.emit(node.name, "squeeze", [x], {"dim": sorted(x.stored(a) for a in gone)}, _without(x, gone))


def _without(x: Live, gone: Sequence[int]) -> list[int]:
    """The order of the axes that are left."""
    left = [x.order[i] for i in range(x.rank) if i not in gone]
    return [sorted(left).index(o) for o in left]


def _unsqueeze(writer: Writer, node: Node) -> Live:
    x = writer.plain(node.live())
    axes = axes_of(node.attributes, node.arrays(), 1) or []
    rank = x.rank + len(axes)
    for axis in sorted(range(rank)[axis] for axis in axes):
        x = writer.emit(node.name, "unsqueeze", [x], {"dim": axis}, range(x.rank + 1))
    return x


def _expand(writer: Writer, node: Node) -> Live:
    x, wanted = node.live(), node.inputs[1]
    if not isinstance(wanted, Known):
        raise ValueError("a shape that depends on the picture")
    shapes = [np.broadcast_shapes(s, integers(a)) for s, a in zip(x.shapes, wanted.arrays, strict=True)]
    if shapes == x.shapes:
        return x
    rank, x = len(shapes[0]), writer.plain(x)
    before = [(1,) * (rank - x.rank) + shape for shape in x.shapes]
    sizes = [
        -1 if all(b[i] == s[i] for b, s in zip(before, shapes, strict=True)) else shapes[0][i] for i in range(rank)
    ]
    if any(size not in (-1, shape[i]) for shape in shapes for i, size in enumerate(sizes)):
        raise ValueError("a length that varies with the batch")
    sizes = [1 if size == -1 and i < rank - x.rank else size for i, size in enumerate(sizes)]
    return writer.emit(node.name, "expand", [x], {"shape": sizes}, range(rank))


def _tile(writer: Writer, node: Node) -> Live:
    x, repeats = node.live(), integers(node.given(1))
    if all(r == 1 for r in repeats):
        return x
    return writer.emit(node.name, "tile", [writer.plain(x)], {"dims": repeats}, range(x.rank))


def _same(writer: Writer, node: Node) -> Live:
    return node.live()


def _cast(writer: Writer, node: Node) -> Live:
    """Numbers stay float32, whichever kind of floating numbers the file asks for."""
    import onnx

    if int(node.attributes["to"]) not in (
        onnx.TensorProto.FLOAT,
        onnx.TensorProto.FLOAT16,
        onnx.TensorProto.DOUBLE,
        onnx.TensorProto.BFLOAT16,
    ):
        raise ValueError("rounding to whole numbers")
    return node.live()


def _cast_like(writer: Writer, node: Node) -> Value:
    """Beside a value that depends on the picture, which is float32, a constant becomes float32 too."""
    x, like = node.inputs[:2]
    if isinstance(x, Known):
        return known([a.astype(np.float32) for a in x.arrays], x.name)
    if isinstance(like, Known) and like.arrays[0].dtype.kind in "iub":
        raise ValueError("rounding to whole numbers")
    return node.live()


def _dropout(writer: Writer, node: Node) -> Live:
    if any(node.wanted[1:]):
        raise ValueError("the mask of a dropout")
    given = node.constant(1)
    rate = node.number("ratio", 0.5) if given is None else float(str(np.float32(given.reshape(-1)[0])))
    return writer.emit(node.name, "Dropout", [node.live()], {"p": rate})


# ---- pieces -----------------------------------------------------------------------------------------------------


def _concat(writer: Writer, node: Node) -> Live:
    lives = [v for v in node.inputs if isinstance(v, Live)]
    order = common_order(lives)
    axis = int(node.attributes.get("axis", 1))
    if lives[0].pictures(axis):
        raise ValueError("it goes over the pictures of the batch")
    lead = writer.arranged(lives[0], order)
    parts = []
    for value in node.inputs:
        if isinstance(value, Known):
            parts.append(rows_alike(writer, node, value, lead))
        elif value is not None:
            parts.append(writer.arranged(value, order))
    return writer.emit(node.name, "concat", parts, {"dim": lead.stored(axis)}, order)


def _split(writer: Writer, node: Node) -> list[Value | None]:
    x = node.live()
    axis = int(node.attributes.get("axis", 0))
    sizes = split_sizes(node.attributes, node.arrays(), x.size(axis), len(node.wanted))
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [
        _piece(writer, node, x, axis, start, start + size, 1) if wanted else None
        for start, size, wanted in zip(starts, sizes, node.wanted, strict=True)
    ]


def _slice(writer: Writer, node: Node) -> Live:
    x = node.live()
    for axis, (start, end, step) in slices(node.attributes, node.arrays(), x.rank).items():
        x = _piece(writer, node, x, axis, start, end, step)
    return x


def _piece(writer: Writer, node: Node, x: Live, axis: int, start: int, end: int, step: int) -> Live:
    """x[start:end:step] along an axis; backwards only where its length is known, and never a part of the batch."""
    if x.pictures(axis):
        count = range(node.fixed or _FAR)
        if count[slice(start, min(end, _FAR), step)] != count:
            raise ValueError("it takes a part of the batch")
        return x
    if len({shape[axis] for shape in x.shapes}) > 1:
        if step < 1 or start < 0:
            raise ValueError("a slice that runs backwards over a length that varies")
        options = {"dim": x.stored(axis), "start": start, "stop": None if end >= _FAR else end, "step": step}
        return x if (start, options["stop"], step) == (0, None, 1) else writer.emit(node.name, "slice", [x], options)
    size = x.size(axis)
    places = range(*slice(start, None if step < 0 and end < -size else end, step).indices(size))
    if step < 0:
        return _taken(writer, node, x, axis, list(places))
    if len(places) == size:
        return x
    stop = None if places.stop >= size else places.stop
    return writer.emit(
        node.name, "slice", [x], {"dim": x.stored(axis), "start": places.start, "stop": stop, "step": step}
    )


def _gather(writer: Writer, node: Node) -> Live:
    x, index = node.live(), node.given(1)
    axis = range(x.rank)[int(node.attributes.get("axis", 0))]
    size = x.size(axis)
    places = [i % size for i in integers(index) if -size <= i < size]
    if len(places) != index.size or index.ndim > 1:
        raise ValueError(f"places of shape {list(index.shape)} on an axis of {size}")
    if index.ndim == 0:
        options = {"dim": x.stored(axis), "index": places[0]}
        return writer.emit(node.name, "select", [x], options, _without(x, [axis]))
    if places == list(range(places[0], places[0] + len(places))):
        return _piece(writer, node, x, axis, places[0], places[-1] + 1, 1)
    return _taken(writer, node, x, axis, places)


def _taken(writer: Writer, node: Node, x: Live, axis: int, places: Sequence[int]) -> Live:
    index = writer.constant(f"{node.name}_places", np.array(places, np.int64), x)
    return writer.emit(node.name, "take", [x, index], {"dim": x.stored(axis)})


def _pad(writer: Writer, node: Node) -> Live:
    x = node.live()
    given = node.constant(1)
    pads = integers(given) if given is not None else [int(p) for p in node.attributes["pads"]]
    axes = axes_of(node.attributes, node.arrays(), 3) or list(range(x.rank))
    value = node.constant(2)
    fill = node.number("value", 0.0) if value is None else float(value.reshape(-1)[0])
    mode = node.attributes.get("mode", "constant")
    if mode not in ("constant", "reflect", "edge") or len(pads) != 2 * len(axes):
        raise ValueError(f"padding {mode!r} of {pads}")
    sides = [0] * (2 * x.rank)
    for i, axis in enumerate(axes):
        last = 2 * (x.rank - 1 - x.stored(axis))
        sides[last : last + 2] = [pads[i], pads[i + len(axes)]]
    while sides[-2:] == [0, 0]:
        sides = sides[:-2]
    if not sides:
        return x
    options = {"pads": sides, "mode": {"edge": "replicate"}.get(mode, mode), "value": max(fill, LOWEST)}
    return writer.emit(node.name, "pad", [x], options)


def _depth_to_space(writer: Writer, node: Node) -> Live:
    """Channels laid out as squares of places; torch counts them by channel first (CRD), the default is by place."""
    x, size = writer.plain(node.live()), int(node.attributes["blocksize"])
    channels = x.size(1) // size**2
    if node.attributes.get("mode", "DCR") == "DCR":
        x = _taken(writer, node, x, 1, _turned_grid(size**2, channels))
    return writer.emit(node.name, "pixel_shuffle", [x], {"upscale_factor": size})


def _space_to_depth(writer: Writer, node: Node) -> Live:
    x, size = writer.plain(node.live()), int(node.attributes["blocksize"])
    y = writer.emit(node.name, "pixel_unshuffle", [x], {"downscale_factor": size})
    if node.attributes.get("mode", "DCR") == "CRD":
        return y
    return _taken(writer, node, y, 1, _turned_grid(x.size(1), size**2))


def _turned_grid(rows: int, columns: int) -> list[int]:
    """Where the entries of a transposed table of (rows, columns) were before."""
    if rows * columns > _MOST_CHANNELS:
        raise ValueError(f"{rows * columns} channels")
    return [row * columns + column for column in range(columns) for row in range(rows)]


# ---- sums along axes --------------------------------------------------------------------------------------------


def _reduce(kind: str) -> Callable[[Writer, Node], Live]:
    def written(writer: Writer, node: Node) -> Live:
        return _reduced(writer, node, node.live(), kind)

    return written


def _reduced(writer: Writer, node: Node, x: Live, kind: str) -> Live:
    axes = axes_of(node.attributes, node.arrays(), 1)
    if not axes and node.attributes.get("noop_with_empty_axes"):
        return x
    gone = sorted(range(x.rank)[axis] for axis in (axes or range(x.rank)))
    if any(x.pictures(axis) for axis in gone):
        raise ValueError("it goes over the pictures of the batch")
    keep = bool(node.attributes.get("keepdims", 1))
    options = {"dim": sorted(x.stored(a) for a in gone), "keepdim": keep}
    return writer.emit(node.name, kind, [x], options, x.order if keep else _without(x, gone))


def _squares(writer: Writer, node: Node) -> Live:
    squared = writer.emit(f"{node.name}_squared", "pow", [node.live()], {"exponent": 2.0})
    return _reduced(writer, node, squared, "sum")


def _length(writer: Writer, node: Node) -> Live:
    total = _squares(writer, replace(node, name=f"{node.name}_sum"))
    return writer.emit(node.name, "sqrt", [total])


AXIS_STEPS: dict[str, Callable[[Writer, Node], Value | list[Value | None]]] = {
    "Cast": _cast,
    "CastLike": _cast_like,
    "Concat": _concat,
    "DepthToSpace": _depth_to_space,
    "Dropout": _dropout,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "Identity": _same,
    "Pad": _pad,
    "ReduceL2": _length,
    "ReduceMax": _reduce("amax"),
    "ReduceMean": _reduce("mean"),
    "ReduceMin": _reduce("amin"),
    "ReduceSum": _reduce("sum"),
    "ReduceSumSquare": _squares,
    "Reshape": _reshape,
    "Slice": _slice,
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
"""What the moves of ONNX are written as; at least the first input (of Concat: one) depends on the picture."""
