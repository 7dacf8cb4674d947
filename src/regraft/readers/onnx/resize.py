"""Resizing of pictures inside an ONNX graph, as steps.

ONNX knows a dozen ways to say which place of the input a place of the output comes from; torch knows three of them.
Where they agree a layer of torch stands for the step; where they do not, and the sizes are known, rows and columns are
taken by number, or mixed by a matrix that holds the weights.

Source: the definition of Resize of onnx.ai, versions 10 to 19. Not covered: cubic other than torch's, antialiasing,
cropping.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from regraft.readers.onnx.constants import Array, integers
from regraft.readers.onnx.steps import Known, Live, Node, Writer

_LONGEST = 1 << 14
_LARGEST = 1 << 23


@dataclass(frozen=True)
class _Change:
    """What becomes of one axis: its lengths (None where they vary with the picture) and the stated scale."""

    before: int | None
    after: int | None
    scale: float

    @property
    def whole(self) -> bool:
        """Whether it grows a whole number of times."""
        return self.scale == int(self.scale) and (self.before is None or self.after == self.before * int(self.scale))


def _resize(writer: Writer, node: Node) -> Live:
    x = node.live()
    changes = _changes(node, x)
    if not changes:
        return x
    if x.rank != 4 or len(changes) > 2 or node.attributes.get("antialias", 0):
        raise ValueError(f"resizing of {len(changes)} of {x.rank} axes")
    if not {x.stored(axis) for axis in changes} <= {2, 3}:
        last = sorted(changes) if len(changes) == 2 else [max(set(range(1, 4)) - set(changes)), *changes]
        places = [*(axis for axis in range(4) if axis not in last), *last]
        x = writer.arranged(x, [places.index(axis) for axis in range(4)])
    by_place = {x.stored(axis): change for axis, change in changes.items()}
    height, width = (by_place.get(place) or _unchanged(x, place) for place in (2, 3))
    options = _as_torch(node, height, width)
    if options is not None:
        return writer.emit(node.name, "Upsample", [x], options)
    for place, change in by_place.items():
        x = _along(writer, node, x, place, change)
    return x


def _unchanged(x: Live, place: int) -> _Change:
    lengths = {t.shape[place] for t in x.seen}
    length = lengths.pop() if len(lengths) == 1 else None
    return _Change(length, length, 1.0)


def _changes(node: Node, x: Live) -> dict[int, _Change]:
    """The axes whose lengths change."""
    first = {"Upsample": 1}.get(node.op, 2 if node.opset >= 11 else 1)
    scales = node.constant(first)
    if scales is None and node.attributes.get("scales") is not None:
        scales = np.array(node.attributes["scales"])
    sizes = node.inputs[3] if len(node.inputs) > 3 else None
    axes = [range(x.rank)[a] for a in node.attributes.get("axes", range(x.rank))]
    found = {}
    for number, axis in enumerate(axes):
        before = [shape[axis] for shape in x.shapes]
        if scales is not None and scales.size:
            scale = float(scales[number])
            after = [math.floor(np.float32(b) * np.float32(scale)) for b in before]  # as runtimes reckon
            share = after[0] / before[0]
            scale = share if np.float32(share) == np.float32(scale) else scale  # .7 in float32 is meant as .7
        elif isinstance(sizes, Known) and node.attributes.get("keep_aspect_ratio_policy", "stretch") == "stretch":
            after = [integers(a)[number] for a in sizes.arrays]
            scale = after[0] / before[0]
        else:
            raise ValueError("sizes that depend on the picture")
        if node.fixed is not None and before == list(node.batches) and set(after) == {node.fixed}:
            after = before  # the batch, stated as a size
        if max(after) > _LONGEST:
            raise ValueError(f"a picture of {max(after)} pixels a side")
        if after != before:
            if len(set(before)) > 1 and any(a != b * scale for a, b in zip(after, before, strict=True)):
                raise ValueError(f"lengths {after} from {before}")
            known = len(set(before)) == 1
            found[axis] = _Change(before[0] if known else None, after[0] if known else None, scale)
    return found


def _mode(node: Node) -> str:
    mode = str(node.attributes.get("mode", "nearest"))
    if mode not in ("nearest", "linear", "bilinear", "cubic"):
        raise ValueError(f"resizing by {mode!r}")
    return mode


def _coordinates(node: Node) -> str:
    """The rule for coordinates; the versions before 11 had one only."""
    old = node.op == "Upsample" or node.opset < 11
    return "asymmetric" if old else str(node.attributes.get("coordinate_transformation_mode", "half_pixel"))


def _rounding(node: Node) -> str:
    old = node.op == "Upsample" or node.opset < 11
    return "floor" if old else str(node.attributes.get("nearest_mode", "round_prefer_floor"))


def _as_torch(node: Node, height: _Change, width: _Change) -> dict[str, object] | None:
    """The options of torch's layer that does the same; None where there is none."""
    both, rule = [c for c in (height, width) if c.scale != 1], _coordinates(node)
    exact = all(c.before is None or c.after == c.before * c.scale for c in both)
    exact = exact and not (
        rule == "pytorch_half_pixel" and any(c.after == 1 for c in both)
    )  # it takes the corner there
    if height.scale == width.scale and height.whole and width.whole:
        size: dict[str, object] = {"scale_factor": height.scale}
    elif height.after is not None and width.after is not None:
        size = {"size": [height.after, width.after]}
    else:
        return None
    match _mode(node):
        case "nearest":
            halves = rule in ("half_pixel", "pytorch_half_pixel") and _rounding(node).startswith("round")
            whole = all(c.whole for c in both)
            like = whole and (halves or (rule == "asymmetric" and _rounding(node) == "floor"))
            return {**size, "mode": "nearest"} if like else None
        case "cubic":
            usual = node.number("cubic_coeff_a", -0.75) == -0.75 and not node.attributes.get("exclude_outside", 0)
            if not usual or not exact or rule not in ("half_pixel", "pytorch_half_pixel", "align_corners"):
                raise ValueError(f"cubic resizing by {rule!r}")
            return {**size, "mode": "bicubic", "align_corners": rule == "align_corners"}
        case _:
            if exact and rule in ("half_pixel", "pytorch_half_pixel"):
                return {**size, "mode": "bilinear", "align_corners": False}
            known = all(c.before is not None for c in (height, width))
            return {**size, "mode": "bilinear", "align_corners": True} if rule == "align_corners" and known else None


def _along(writer: Writer, node: Node, x: Live, place: int, change: _Change) -> Live:
    """One axis of the step resized by number or by matrix."""
    if change.before is None or change.after is None:
        raise ValueError("resizing of pictures whose size is left open")
    source = _sources(_coordinates(node), change.before, change.after, change.scale)
    name = f"{node.name}_{'rows' if place == 2 else 'columns'}"
    if _mode(node) == "nearest":
        index = np.clip(_ROUNDING[_rounding(node)](source), 0, change.before - 1).astype(np.int64)
        return writer.emit(name, "take", [x, writer.constant(name, index, x)], {"dim": place})
    if change.before * change.after > _LARGEST:
        raise ValueError(f"a picture of {change.after} pixels a side")
    mixed = _mixture(np.clip(source, 0, change.before - 1), change.before)
    if place == 2:
        return writer.emit(name, "matmul", [writer.constant(name, mixed, x), x], order=x.order)
    return writer.emit(name, "matmul", [x, writer.constant(name, mixed.T, x)])


def _sources(rule: str, before: int, after: int, scale: float) -> Array:
    """Where in the input each place of the output comes from."""
    i, by = np.arange(after, dtype=np.float32), np.float32(scale)  # as runtimes round: nearest hangs on it
    match rule:
        case "half_pixel":
            return (i + 0.5) / by - 0.5
        case "pytorch_half_pixel":
            return (i + 0.5) / by - 0.5 if after > 1 else i
        case "asymmetric":
            return i / by
        case "tf_half_pixel_for_nn":
            return (i + 0.5) / by
        case "align_corners":
            return i * ((before - 1) / (after - 1)) if after > 1 else i
    raise ValueError(f"resizing by {rule!r}")


def _mixture(source: Array, before: int) -> Array:
    """The matrix (after, before) of linear interpolation."""
    low = np.floor(source).astype(np.int64)
    high = np.minimum(low + 1, before - 1)
    matrix = np.zeros((len(source), before))
    np.add.at(matrix, (np.arange(len(source)), low), 1 - (source - low))
    np.add.at(matrix, (np.arange(len(source)), high), source - low)
    return matrix.astype(np.float32)


_ROUNDING: dict[str, Callable[[Array], Array]] = {
    "ceil": np.ceil,
    "floor": np.floor,
    "round_prefer_ceil": lambda a: np.floor(a + 0.5),
    "round_prefer_floor": lambda a: np.ceil(a - 0.5),
}

RESIZE_STEPS: dict[str, Callable[[Writer, Node], Live]] = {"Resize": _resize, "Upsample": _resize}
"""What resizing is written as."""
