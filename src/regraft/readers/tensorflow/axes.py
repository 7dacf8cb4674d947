"""What moves, cuts or joins axes in TensorFlow, and what computes sizes.

A shape may hold the size of the batch: such lists have other values in each sight, and an entry that varies may stand
only where it says that an axis stays whole.

Source: the operation definitions of TensorFlow 2 (`tensorflow/core/api_def/base_api`). Not covered: padding that
repeats the rim (`SYMMETRIC`), scattering, sorting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from regraft.readers.onnx.constants import integers
from regraft.readers.onnx.steps import Known, Live, Value, known
from regraft.readers.tensorflow.steps import Step, Write, same

FAR = 2**31 - 1


def _shape(step: Step) -> Value:
    return known([np.array(shape, np.int64) for shape in _shapes(step.inputs[0])])


def _size(step: Step) -> Value:
    shape = replace(step, inputs=(_shape(step),))
    return shape.computed(lambda a: np.prod(a, dtype=np.int64))


def _rank(step: Step) -> Value:
    return step.computed(np.ndim) if isinstance(step.inputs[0], Known) else step.value(step.live(0).rank)


def _reshape(step: Step) -> Value:
    return step.do("Reshape", *step.inputs[:2], allowzero=1)


def _squeeze(step: Step) -> Value:
    axes = step.attributes.get("squeeze_dims") or step.attributes.get("axis")
    return step.do("Squeeze", step.inputs[0], **({"axes": axes} if axes else {}))


def _expand(step: Step) -> Value:
    return step.do("Unsqueeze", step.inputs[0], axes=step.whole(1))


def _transpose(step: Step) -> Value:
    return step.do("Transpose", step.inputs[0], perm=step.whole(1))


def _concat(step: Step) -> Value:
    """ConcatV2 has the axis last, Concat first."""
    place = -1 if step.op == "ConcatV2" else 0
    parts = step.inputs[:-1] if place else step.inputs[1:]
    return step.do("Concat", *parts, axis=step.whole(place)[0])


def _pack(step: Step) -> Value:
    axis = int(step.attributes.get("axis", 0))
    return step.do("Concat", *(step.do("Unsqueeze", v, axes=[axis]) for v in step.inputs), axis=axis)


def _unpack(step: Step) -> list[Value]:
    axis, count = int(step.attributes.get("axis", 0)), int(step.attributes["num"])
    if count > 10_000:
        raise ValueError(f"{count:,} parts")
    return [step.do("Gather", step.inputs[0], step.value(i), axis=axis) for i in range(count)]


def _split(step: Step) -> list[Value]:
    """Split has the axis first and equal parts; SplitV has it last, and the sizes before it."""
    x = step.inputs[1 if step.op == "Split" else 0]
    axis = step.whole(0 if step.op == "Split" else 2)[0]
    length = x.size(axis) if isinstance(x, Live) else x.constant.shape[axis]
    count = int(step.attributes["num_split"])
    sizes = step.whole(1) if step.op == "SplitV" else [length // count] * min(count, length)
    sizes = [size if size >= 0 else length - sum(s for s in sizes if s >= 0) for size in sizes]
    if len(sizes) != count or sum(sizes) != length:
        raise ValueError(f"parts {sizes} of an axis of {length}")
    starts = [sum(sizes[:i]) for i in range(count)]
    return [_cut(step, x, {axis: (a, a + n, 1)}) for a, n in zip(starts, sizes, strict=True)]


def _cut(step: Step, x: Value, slices: Mapping[int, tuple[int, int, int]]) -> Value:
    """x[start:stop:step] along some axes."""
    if not slices:
        return x
    columns = [[s[i] for s in slices.values()] for i in range(3)]
    starts, stops, strides = (step.value(np.array(c, np.int64)) for c in columns)
    return step.do("Slice", x, starts, stops, step.value(np.array(list(slices), np.int64)), strides)


def _slice(step: Step) -> Value:
    x, starts, sizes = step.inputs
    if not isinstance(starts, Known) or not isinstance(sizes, Known):
        raise ValueError("its place depends on the picture")
    slices = {}
    for axis, (begins, counts) in enumerate(zip(_columns(starts), _columns(sizes), strict=True)):
        start = _one(begins)
        if start != 0 or not _is_whole(step, x, axis, counts):
            size = _one(counts)
            slices[axis] = (start, FAR if size == -1 else start + size, 1)
    return _cut(step, x, slices)


def _strided(step: Step) -> Value:
    """x[a:b:c, ..., None, i]: bits of masks say which entries are special, and which ends of a range are open."""
    x, *bounds = step.inputs
    columns = [_columns(b) for b in bounds if isinstance(b, Known)]
    if len(columns) != 3:
        raise ValueError("its place depends on the picture")
    entries = list(zip(*columns, strict=True))
    named = sum(not (_bit(step, "ellipsis", i) or _bit(step, "new_axis", i)) for i in range(len(entries)))
    slices: dict[int, tuple[int, int, int]] = {}
    gone: list[int] = []
    new: list[int] = []
    axis = 0
    for i, entry in enumerate(entries):
        if _bit(step, "ellipsis", i):
            axis += len(_shapes(x)[0]) - named
        elif _bit(step, "new_axis", i):
            new.append(axis - len(gone) + len(new))
        else:
            if _bit(step, "shrink_axis", i):
                gone.append(axis)
            slices[axis] = _range_of(step, x, axis, i, entry)
            axis += 1
    y = _cut(step, x, {axis: found for axis, found in slices.items() if found != (0, FAR, 1)})
    y = step.do("Squeeze", y, axes=gone) if gone else y
    return step.do("Unsqueeze", y, axes=new) if new else y


def _range_of(step: Step, x: Value, axis: int, i: int, entry: Sequence[list[int]]) -> tuple[int, int, int]:
    """(start, stop, step) of entry i; entry: its begin, end and stride in all sights."""
    begin, end, stride = entry[0], entry[1], _one(entry[2])
    if _bit(step, "shrink_axis", i):
        start = _one(begin)
        return start, start + 1 if start != -1 else FAR, 1
    whole = _bit(step, "end", i) or (stride > 0 and _is_whole(step, x, axis, end))
    start = (0 if stride > 0 else FAR) if _bit(step, "begin", i) else _one(begin)
    return start, (FAR if stride > 0 else -FAR) if whole else _one(end), stride


def _bit(step: Step, mask: str, i: int) -> bool:
    return bool(int(step.attributes.get(f"{mask}_mask", 0)) >> i & 1)


def _is_whole(step: Step, x: Value, axis: int, ends: list[int]) -> bool:
    """Whether an axis ends there in all sights, or would in the batch that the file was written for."""
    lengths = [shape[axis] for shape in _shapes(x)]
    fixed = step.setting.fixed is not None and lengths == list(step.setting.batches)
    return ends == lengths or (fixed and set(ends) == {step.setting.fixed})


def _shapes(x: Value) -> list[tuple[int, ...]]:
    return x.shapes if isinstance(x, Live) else [tuple(a.shape) for a in x.arrays]


def _columns(value: Known) -> list[list[int]]:
    """The entries of a list, each as its values in all sights."""
    return [list(column) for column in zip(*(integers(a) for a in value.arrays), strict=True)]


def _one(column: Sequence[int]) -> int:
    if len(set(column)) != 1:
        raise ValueError("its place varies with the batch")
    return column[0]


def _pad(step: Step) -> Value:
    sides = np.array(step.constant(1)).T.reshape(-1)
    mode = step.text("mode", "CONSTANT")
    if mode not in ("CONSTANT", "REFLECT"):
        raise ValueError(f"padding {mode!r}")
    fill = step.inputs[2] if len(step.inputs) > 2 else None
    return step.do("Pad", step.inputs[0], step.value(sides), fill, mode=mode.lower())


def _reduced(op: str) -> Write:
    def reduced(step: Step) -> Value:
        axes = step.whole(1)
        if not axes:
            return step.inputs[0]
        keep = bool(step.attributes.get("keep_dims", False))
        return step.do(op, step.inputs[0], axes=axes, keepdims=int(keep))

    return reduced


def _gather(step: Step) -> Value:
    axis = step.whole(2)[0] if len(step.inputs) > 2 else 0
    return step.do("Gather", *step.inputs[:2], axis=axis)


def _range(step: Step) -> Value:
    return step.do("Range", *step.inputs)


def _fill(step: Step) -> Value:
    return step.do("Expand", step.inputs[1], step.inputs[0])


AXIS_STEPS: dict[str, Write] = {
    "BroadcastTo": same("Expand"),
    "Concat": _concat,
    "ConcatV2": _concat,
    "ExpandDims": _expand,
    "Fill": _fill,
    "Gather": _gather,
    "GatherV2": _gather,
    "Max": _reduced("ReduceMax"),
    "Mean": _reduced("ReduceMean"),
    "Min": _reduced("ReduceMin"),
    "MirrorPad": _pad,
    "Pack": _pack,
    "Pad": _pad,
    "PadV2": _pad,
    "Prod": _reduced("ReduceProd"),
    "Range": _range,
    "Rank": _rank,
    "Reshape": _reshape,
    "Shape": _shape,
    "Size": _size,
    "Slice": _slice,
    "Split": _split,
    "SplitV": _split,
    "Squeeze": _squeeze,
    "StridedSlice": _strided,
    "Sum": _reduced("ReduceSum"),
    "Tile": same("Tile"),
    "Transpose": _transpose,
    "Unpack": _unpack,
}
"""What each of these operations is made of."""
