"""What an ONNX graph computes from constants and sizes alone, worked out with numpy when the file is read.

Exporters write shape arithmetic, positions, masks and dequantised weights as steps of the graph. None of it depends on
the picture, so none of it needs to be a step of the network.

Knows arrays and attributes, nothing of the network. Not covered: random numbers, text, control flow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from regraft.readers.onnx.tensors import Allowance

Array = np.ndarray[Any, Any]
Attributes = Mapping[str, Any]


def fold(
    op: str, attributes: Attributes, inputs: Sequence[Array | None], opset: int, allowed: Allowance
) -> tuple[Array, ...] | None:
    """The outputs of one step on constant inputs; None where the step is not one of these.

    Raises ReaderError when the result is too large for the file, and what numpy raises for inputs that do not fit.
    """
    arrays = [a for a in inputs if a is not None]
    if op in _POINTWISE:
        shape = np.broadcast_shapes(*(a.shape for a in arrays))
        allowed.spend(math.prod(shape) * 8)
        with np.errstate(all="ignore"):
            return (np.asarray(_POINTWISE[op](*arrays)),)
    if op not in _MOVES:
        return None
    with np.errstate(all="ignore"):
        found = _MOVES[op](attributes, inputs, opset, allowed)
    results = found if isinstance(found, tuple) else (found,)
    if op not in _SPENDING:
        allowed.spend(sum(a.nbytes for a in results))
    return tuple(np.asarray(a) for a in results)


def integers(value: Array) -> list[int]:
    """A constant of whole numbers as a list; ValueError where it holds others."""
    flat = np.asarray(value).reshape(-1)
    if flat.size and not np.all(np.equal(np.mod(flat.astype(np.float64), 1), 0)):
        raise ValueError(f"whole numbers are needed, not {flat[:4].tolist()}")
    return [int(v) for v in flat]


def axes_of(attributes: Attributes, inputs: Sequence[Array | None], position: int) -> list[int] | None:
    """`axes` from an input, as newer versions of the format have it, or from an attribute; None where not given."""
    given = inputs[position] if len(inputs) > position else None
    if given is not None:
        return integers(given)
    found = attributes.get("axes")
    return None if found is None else [int(a) for a in found]


def slices(attributes: Attributes, inputs: Sequence[Array | None], rank: int) -> dict[int, tuple[int, int, int]]:
    """(start, end, step) of each axis that a Slice names, as the file has them."""
    if len(inputs) > 1:
        given = [None if a is None else integers(a) for a in [*inputs[1:], None, None, None, None][:4]]
        starts, ends, axes, steps = given
    else:
        starts, ends, axes, steps = (attributes.get(k) for k in ("starts", "ends", "axes", "steps"))
    if starts is None or ends is None:
        raise ValueError("a slice needs starts and ends")
    axes = list(range(len(starts))) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    whole = zip(axes, starts, ends, steps, strict=True)
    return {axis % rank: (start, end, step) for axis, start, end, step in whole}


def split_sizes(attributes: Attributes, inputs: Sequence[Array | None], size: int, parts: int) -> list[int]:
    """The sizes that a Split cuts an axis of `size` into."""
    given = integers(inputs[1]) if len(inputs) > 1 and inputs[1] is not None else attributes.get("split")
    if given is not None:
        if sum(given) != size or min(given) < 0:
            raise ValueError(f"parts {given} of an axis of {size}")
        return [int(g) for g in given]
    parts = int(attributes.get("num_outputs", parts))
    each = -(-size // parts)
    return [min(each, size - i * each) for i in range(parts)]


def _divide(a: Array, b: Array) -> Array:
    if a.dtype.kind not in "iu":
        return np.asarray(a / b)
    if not np.all(b):
        raise ValueError("a division by zero")
    return (np.abs(a) // np.abs(b) * np.sign(a) * np.sign(b)).astype(a.dtype)


_POINTWISE: dict[str, Callable[..., Any]] = {
    "Abs": np.abs,
    "Add": np.add,
    "And": np.logical_and,
    "Ceil": np.ceil,
    "Cos": np.cos,
    "Div": _divide,
    "Equal": np.equal,
    "Exp": np.exp,
    "Floor": np.floor,
    "Greater": np.greater,
    "GreaterOrEqual": np.greater_equal,
    "Identity": lambda a: a,
    "Less": np.less,
    "LessOrEqual": np.less_equal,
    "Log": np.log,
    "Max": lambda *a: np.maximum.reduce(np.broadcast_arrays(*a)),
    "Min": lambda *a: np.minimum.reduce(np.broadcast_arrays(*a)),
    "Mod": np.mod,
    "Mul": np.multiply,
    "Neg": np.negative,
    "Not": np.logical_not,
    "Or": np.logical_or,
    "Pow": lambda a, b: np.power(a, b.astype(a.dtype)),
    "Reciprocal": lambda a: np.asarray(1 / a, a.dtype),
    "Round": np.rint,
    "Sign": np.sign,
    "Sin": np.sin,
    "Sqrt": np.sqrt,
    "Sub": np.subtract,
    "Sum": lambda *a: sum(a[1:], a[0]),
    "Tanh": np.tanh,
    "Where": np.where,
}


def _batch_norm(attributes: Attributes, inputs: Sequence[Any], opset: int, allowed: Allowance) -> Array:
    """Normalisation of weights (weight standardisation); in training mode the statistics are those of x itself."""
    x, scale, shift, mean, var = inputs
    if any(v.shape != (x.shape[1],) for v in inputs[1:]):
        raise ValueError(f"normalisation of shape {list(x.shape)} by {list(scale.shape)} factors")
    axes = tuple(axis for axis in range(x.ndim) if axis != 1)
    if attributes.get("training_mode", 0):
        mean, var = x.mean(axes, dtype=np.float64), x.var(axes, dtype=np.float64)
    scale, shift, mean, var = (np.reshape(v, [-1] + [1] * (x.ndim - 2)) for v in (scale, shift, mean, var))
    found = (x - mean) / np.sqrt(var + float(attributes.get("epsilon", 1e-5))) * scale + shift
    return np.asarray(found, dtype=x.dtype)


def _cast(attributes: Attributes, inputs: Sequence[Any], opset: int, allowed: Allowance) -> Array:
    import onnx.helper

    wanted = onnx.helper.tensor_dtype_to_np_dtype(int(attributes["to"]))
    if wanted.kind not in "fiub":  # the small floating types of other packages
        wanted = np.dtype(np.float32)
    return np.asarray(inputs[0].astype(wanted))


def _cast_like(attributes: Attributes, inputs: Sequence[Any], opset: int, allowed: Allowance) -> Array:
    return np.asarray(inputs[0].astype(inputs[1].dtype))


def _concat(attributes: Attributes, inputs: Sequence[Any], opset: int, allowed: Allowance) -> Array:
    allowed.spend(sum(a.nbytes for a in inputs))
    return np.concatenate(list(inputs), int(attributes.get("axis", 1)))


def _constant_of_shape(attributes: Attributes, inputs: Sequence[Any], opset: int, allowed: Allowance) -> Array:
    value = attributes.get("value", np.zeros(1, np.float32))
    shape = integers(inputs[0])
    allowed.spend(_bytes(shape, value))
    return np.asarray(np.full(shape, value.reshape(-1)[0], value.dtype))


def _cumulated(attributes: Attributes, inputs: Sequence[Any], opset: int, allowed: Allowance) -> Array:
    if attributes.get("exclusive", 0) or attributes.get("reverse", 0):
        raise ValueError("a sum of all that comes after, or without the last")
    return np.asarray(np.cumsum(inputs[0], integers(inputs[1])[0], inputs[0].dtype))


def _dequantize(attributes: Attributes, inputs: Sequence[Any], opset: int, allowed: Allowance) -> Array:
    values, scale, zero = (*inputs, None)[:3]
    axis = int(attributes.get("axis", 1))
    shifted = values.astype(np.float64) - (0 if zero is None else _along(zero, values, axis).astype(np.float64))
    return np.asarray(shifted * _along(scale, values, axis).astype(np.float64), dtype=np.float32)


def _quantize(attributes: Attributes, inputs: Sequence[Any], opset: int, allowed: Allowance) -> Array:
    values, scale, zero = (*inputs, None)[:3]
    axis = int(attributes.get("axis", 1))
    kind = np.dtype(np.uint8) if zero is None else zero.dtype
    info = np.iinfo(kind)
    scaled = np.rint(values / _along(scale, values, axis))
    shifted = scaled + (0 if zero is None else _along(zero, values, axis).astype(np.float64))
    return np.asarray(np.clip(shifted, info.min, info.max), dtype=kind)


def _along(parameter: Array, values: Array, axis: int) -> Array:
    """Scales or zero points, one for all, one per place on `axis`, or one per block of such places."""
    if parameter.size == 1:
        return np.asarray(parameter.reshape(()))
    if parameter.ndim == 1:
        return parameter.reshape([-1 if i == axis % values.ndim else 1 for i in range(values.ndim)])
    spread = np.repeat(parameter, -(-values.shape[axis] // parameter.shape[axis]), axis)
    return np.take(spread, range(values.shape[axis]), axis)


def _expand(attributes: Attributes, inputs: Sequence[Any], opset: int, allowed: Allowance) -> Array:
    shape = np.broadcast_shapes(inputs[0].shape, tuple(integers(inputs[1])))
    allowed.spend(_bytes(shape, inputs[0]))
    return np.array(np.broadcast_to(inputs[0], shape))


def _flatten(attributes: Attributes, inputs: Sequence[Any], opset: int, allowed: Allowance) -> Array:
    axis = int(attributes.get("axis", 1))
    shape = inputs[0].shape
    axis = axis + len(shape) if axis < 0 else axis
    return np.asarray(inputs[0].reshape(math.prod(shape[:axis]), math.prod(shape[axis:])))


def _gather(attributes: Attributes, inputs: Sequence[Any], opset: int, allowed: Allowance) -> Array:
    data, index = inputs[0], inputs[1].astype(np.int64)
    axis = int(attributes.get("axis", 0)) % max(1, data.ndim)
    allowed.spend(_bytes(data.shape[:axis] + index.shape + data.shape[axis + 1 :], data))
    return np.asarray(np.take(data, index, axis))


def _matmul(attributes: Attributes, inputs: Sequence[Any], opset: int, allowed: Allowance) -> Array:
    a, b = inputs
    allowed.spend(_bytes([*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), *a.shape[-2:-1], *b.shape[-1:]], a))
    return np.asarray(np.matmul(a, b))


def _range(attributes: Attributes, inputs: Sequence[Any], opset: int, allowed: Allowance) -> Array:
    start, limit, delta = (a.reshape(-1)[0] for a in inputs)
    allowed.spend(8 * max(0, math.ceil((float(limit) - float(start)) / float(delta))))
    return np.arange(start, limit, delta, dtype=inputs[0].dtype)


def _reduce(function: Callable[..., Any]) -> Callable[..., Array]:
    def reduced(attributes: Attributes, inputs: Sequence[Any], opset: int, allowed: Allowance) -> Array:
        axes = axes_of(attributes, inputs, 1)
        if not axes and attributes.get("noop_with_empty_axes"):
            return np.asarray(inputs[0])
        keep = bool(attributes.get("keepdims", 1))
        found = function(inputs[0], axis=tuple(axes) if axes else None, keepdims=keep)
        return np.asarray(found, inputs[0].dtype)

    return reduced


def _reshape(attributes: Attributes, inputs: Sequence[Any], opset: int, allowed: Allowance) -> Array:
    wanted = integers(inputs[1]) if len(inputs) > 1 else [int(s) for s in attributes["shape"]]
    return np.asarray(inputs[0].reshape(reshaped(inputs[0].shape, wanted, bool(attributes.get("allowzero")))))


def reshaped(shape: Sequence[int], wanted: Sequence[int], allow_zero: bool) -> list[int]:
    """The shape that a Reshape gives: 0 keeps an axis, -1 is what is left; ValueError where it does not fit."""
    found = [shape[i] if size == 0 and not allow_zero else size for i, size in enumerate(wanted)]
    count, rest = math.prod(shape), math.prod(size for size in found if size != -1)
    if found.count(-1) == 1 and rest and count % rest == 0:
        found[found.index(-1)] = count // rest
    if min(found, default=0) < 0 or math.prod(found) != count:
        raise ValueError(f"a tensor of shape {list(shape)} does not fit into {list(wanted)}")
    return found


def _slice(attributes: Attributes, inputs: Sequence[Any], opset: int, allowed: Allowance) -> Array:
    index = [slice(None)] * inputs[0].ndim
    for axis, (start, end, step) in slices(attributes, inputs, inputs[0].ndim).items():
        index[axis] = slice(start, None if step < 0 and end < -inputs[0].shape[axis] else end, step)
    return np.asarray(inputs[0][tuple(index)])


def _split(attributes: Attributes, inputs: Sequence[Any], opset: int, allowed: Allowance) -> tuple[Array, ...]:
    axis = int(attributes.get("axis", 0))
    sizes = split_sizes(attributes, inputs, inputs[0].shape[axis], int(attributes["outputs"]))
    return tuple(np.split(inputs[0], np.cumsum(sizes)[:-1], axis))


def _squeeze(attributes: Attributes, inputs: Sequence[Any], opset: int, allowed: Allowance) -> Array:
    axes = axes_of(attributes, inputs, 1)
    return np.asarray(np.squeeze(inputs[0], None if axes is None else tuple(axes)))


def _tile(attributes: Attributes, inputs: Sequence[Any], opset: int, allowed: Allowance) -> Array:
    repeats = integers(inputs[1])
    allowed.spend(_bytes([s * r for s, r in zip(inputs[0].shape, repeats, strict=True)], inputs[0]))
    return np.tile(inputs[0], repeats)


def _transpose(attributes: Attributes, inputs: Sequence[Any], opset: int, allowed: Allowance) -> Array:
    return np.asarray(np.transpose(inputs[0], attributes.get("perm")))


def _unsqueeze(attributes: Attributes, inputs: Sequence[Any], opset: int, allowed: Allowance) -> Array:
    axes = axes_of(attributes, inputs, 1) or []
    return np.asarray(np.expand_dims(inputs[0], tuple(axes)))


def _bytes(shape: Sequence[int], like: Array) -> int:
    if min(shape, default=0) < 0:
        raise ValueError(f"a shape must not be negative: {list(shape)}")
    return math.prod(shape) * int(like.dtype.itemsize)


_MOVES: dict[str, Callable[[Attributes, Sequence[Any], int, Allowance], Array | tuple[Array, ...]]] = {
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "CastLike": _cast_like,
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "CumSum": _cumulated,
    "DequantizeLinear": _dequantize,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "MatMul": _matmul,
    "QuantizeLinear": _quantize,
    "Range": _range,
    "ReduceMax": _reduce(np.max),
    "ReduceMean": _reduce(np.mean),
    "ReduceMin": _reduce(np.min),
    "ReduceProd": _reduce(np.prod),
    "ReduceSum": _reduce(np.sum),
    "Reshape": _reshape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
_SPENDING = {"Concat", "ConstantOfShape", "Expand", "Gather", "MatMul", "Range", "Tile"}
