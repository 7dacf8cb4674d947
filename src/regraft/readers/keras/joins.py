"""Layers of Keras that are neither windows nor activations: normalisation, shapes, and what joins tensors.

Knows one layer at a time. Not covered: normalisation over axes other than the channels or the last ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from regraft.readers.keras.steps import Array, Steps, Use, Value, unwrapped

Write = Callable[[Use, Steps, Sequence[Any]], Value]
EPSILON = 1e-7
"""What Keras' Normalization takes for the least deviation."""


def same(use: Use, to: Steps, xs: Sequence[Value]) -> Value:
    """A layer that does nothing in evaluation."""
    return xs[0]


def dropout(use: Use, to: Steps, xs: Sequence[Value]) -> Value:
    """The layers Dropout and SpatialDropout2D."""
    x, rate = xs[0], use.number("rate", 0.5)
    if use.config.get("noise_shape") is not None:  # whole pictures are dropped: not what torch's layer would do
        return x
    if use.kind == "SpatialDropout2D":
        return to.add(use.name, "Dropout2d", use.placed(to, x), p=rate)
    return to.add(use.name, "Dropout", x, p=rate)


def batch_norm(use: Use, to: Steps, xs: Sequence[Value]) -> Value:
    """The layers BatchNormalization and SyncBatchNormalization."""
    x = _with_channels(use, to, xs[0])
    mean = use.weight("moving_mean", None)
    size = mean.shape[0]
    tensors = {
        "weight": use.weight("gamma", size) if "gamma" in use.weights else np.ones(size),
        "bias": use.weight("beta", size) if "beta" in use.weights else np.zeros(size),
        "running_mean": mean,
        "running_var": use.weight("moving_variance", size),
    }
    momentum = 1 - (use.number("momentum", 0.99) or 0.0)
    kind = "BatchNorm2d" if x.rank == 4 else "BatchNorm1d"
    return to.add(
        use.name, kind, x, tensors=tensors, num_features=size, eps=use.number("epsilon", 1e-3), momentum=momentum
    )


def layer_norm(use: Use, to: Steps, xs: Sequence[Value]) -> Value:
    """The layer LayerNormalization, over the last axes."""
    x = to.plain(use.name, xs[0])
    axes = use.config.get("axis", -1)
    axes = [range(x.rank)[axis] for axis in (axes if isinstance(axes, list) else [axes])]
    given = {name: use.weights[name] for name in ("gamma", "beta") if name in use.weights}
    if axes != list(range(x.rank - len(axes), x.rank)) or not given:
        raise use.refused("must have a scale or an offset, and be over the last axes: others are not rebuilt")
    shape = next(iter(given.values())).shape
    tensors = {"weight": given.get("gamma", np.ones(shape)), "bias": given.get("beta", np.zeros(shape))}
    return to.add(
        use.name, "LayerNorm", x, tensors=tensors, normalized_shape=list(shape), eps=use.number("epsilon", 1e-3)
    )


def group_norm(use: Use, to: Steps, xs: Sequence[Value]) -> Value:
    """The layer GroupNormalization; -1 groups are one for each channel."""
    x = _with_channels(use, to, xs[0])
    sizes = [weight.shape[0] for weight in use.weights.values()]
    if not sizes:
        raise use.refused("must have a scale or an offset: others are not rebuilt")
    groups = use.config.get("groups", 32)
    tensors = {
        "weight": use.weights.get("gamma", np.ones(sizes[0])),
        "bias": use.weights.get("beta", np.zeros(sizes[0])),
    }
    options = {"num_groups": sizes[0] if groups == -1 else groups, "num_channels": sizes[0]}
    return to.add(use.name, "GroupNorm", x, tensors=tensors, eps=use.number("epsilon", 1e-3), **options)


def layer_scale(use: Use, to: Steps, xs: Sequence[Value]) -> Value:
    """The layer of Keras' own ConvNeXt: a trained factor for every channel."""
    gamma = to.constant(f"{use.name}_gamma", use.weight("gamma", None), xs[0], "parameter")
    return to.add(use.name, "mul", xs[0], gamma)


def _with_channels(use: Use, to: Steps, x: Value) -> Value:
    """x with the axis that the layer normalises over at place 1."""
    axis = use.config.get("axis", -1)
    axis = axis[0] if isinstance(axis, list) and len(axis) == 1 else axis
    if range(x.rank)[axis] == x.rank - 1:
        return to.moved(use.name, x)
    if axis != 1:
        raise use.refused(f"must have the channels as its axis, the first or the last; found {axis!r}")
    return to.plain(use.name, x)


def rescaling(use: Use, to: Steps, xs: Sequence[Value]) -> Value:
    """The layer Rescaling: x * scale + offset, by numbers or one for each channel."""
    x, name = xs[0], use.name
    scale, offset = (np.asarray(unwrapped(use.config.get(k, d)), np.float32) for k, d in (("scale", 1), ("offset", 0)))
    if not scale.ndim and not offset.ndim:
        return to.add(name, "affine", x, scale=use.number("scale", 1.0), shift=use.number("offset", 0.0))
    x = to.add(f"{name}_scaled", "mul", x, to.constant(f"{name}_scale", scale, x))
    return to.add(name, "add", x, to.constant(f"{name}_offset", offset, x))


def normalization(use: Use, to: Steps, xs: Sequence[Value]) -> Value:
    """The layer Normalization: (x - mean) / deviation, or back."""
    x, name = xs[0], use.name
    axis = use.config.get("axis", -1)
    axes = [range(x.rank)[a] for a in ([] if axis is None else axis if isinstance(axis, list) else [axis])]
    if 0 in axes or axes != sorted(set(axes)):
        raise use.refused(f"must be over axes beside the batch, in their order; found {axis!r:.60}")
    stored = (use.weights.get(k, unwrapped(use.config.get(k))) for k in ("mean", "variance"))
    mean, variance = (_over(use, np.asarray(value, np.float32), axes, x.rank) for value in stored)
    deviation = np.maximum(np.sqrt(variance), EPSILON)
    by, shift = to.constant(f"{name}_deviation", deviation, x), to.constant(f"{name}_mean", mean, x)
    if use.config.get("invert"):
        return to.add(name, "add", to.add(f"{name}_scaled", "mul", x, by), shift)
    return to.add(name, "div", to.add(f"{name}_shifted", "sub", x, shift), by)


def _over(use: Use, value: Array, axes: Sequence[int], rank: int) -> Array:
    """Statistics for each place along `axes`, with the other axes but the batch as 1."""
    value = value.reshape(-1) if value.ndim > 1 and len(axes) < 2 else value
    if value.size == 1:
        return value.reshape(())
    if value.ndim != len(axes):
        raise use.refused(f"must have a mean and a variance for each of {len(axes)} axes; found {value.ndim}")
    sizes = dict(zip(axes, value.shape, strict=True))
    return value.reshape([sizes.get(axis, 1) for axis in range(1, rank)])


def unit_normalization(use: Use, to: Steps, xs: Sequence[Value]) -> Value:
    """The layer UnitNormalization: x by its length along axes."""
    x, name = xs[0], use.name
    axis = use.config.get("axis", -1)
    dims = [x.axis(one) for one in (axis if isinstance(axis, list) else [axis])]
    least = 1e-24 if use.version > 2 else 1e-12  # of the squares; TensorFlow's own function means it so
    squares = to.add(f"{name}_squares", "sum", to.add(f"{name}_square", "mul", x, x), dim=dims, keepdim=True)
    inverse = to.add(f"{name}_inverse", "rsqrt", to.add(f"{name}_least", "clamp", squares, min=least))
    return to.add(name, "mul", x, inverse)


def custom_scale(use: Use, to: Steps, xs: Sequence[Value]) -> Value:
    """The layer of Keras' own InceptionResNetV2: x + y * scale."""
    x, y = alike(use, to, xs)
    return to.add(use.name, "add", x, to.add(f"{use.name}_scaled", "affine", y, scale=use.number("scale", 1.0)))


def flatten(use: Use, to: Steps, xs: Sequence[Value]) -> Value:
    """The layer Flatten: numbers in Keras' order, whichever way the picture lies."""
    x = xs[0]
    if x.rank <= 2:
        return x
    axes = [0, *range(2, x.rank), 1] if use.config.get("data_format") == "channels_first" else list(range(x.rank))
    return Value(to.add(use.name, "Flatten", to.turned(f"{use.name}_last", x, axes, order_alone=True)).step, 2)


def reshape(use: Use, to: Steps, xs: Sequence[Value]) -> Value:
    """The layer Reshape."""
    shape = use.config["target_shape"]
    if not all(type(size) is int and (size > 0 or size == -1) for size in shape):
        raise use.refused(f"must have whole numbers as target_shape; found {shape!r:.60}")
    x = to.turned(f"{use.name}_last", xs[0], range(xs[0].rank), order_alone=True)
    return Value(to.add(use.name, "reshape", x, shape=[0, *shape]).step, len(shape) + 1)


def permute(use: Use, to: Steps, xs: Sequence[Value]) -> Value:
    """The layer Permute, which counts axes from 1."""
    dims = use.config["dims"]
    if sorted(dims) != list(range(1, xs[0].rank)):
        raise use.refused(f"must name every axis once; found {dims!r:.60}")
    return to.turned(use.name, xs[0], [0, *dims])


def concatenate(use: Use, to: Steps, xs: Sequence[Value]) -> Value:
    """The layer Concatenate."""
    xs = alike(use, to, xs)
    return to.add(use.name, "concat", *xs, dim=xs[0].axis(use.config.get("axis", -1)))


def merged(function: str) -> Write:
    """A layer that joins tensors, two at a time, by one of the functions of operations."""

    def write(use: Use, to: Steps, xs: Sequence[Value]) -> Value:
        x, *rest = alike(use, to, xs)
        for i, other in enumerate(rest, 2):
            x = to.add(use.name if i == len(xs) else f"{use.name}_{i}", function, x, other)
        return x

    return write


def average(use: Use, to: Steps, xs: Sequence[Value]) -> Value:
    """The layer Average."""
    total = merged("add")(replace(use, name=f"{use.name}_sum"), to, xs)
    return to.add(use.name, "affine", total, scale=1 / len(xs))


def alike(use: Use, to: Steps, xs: Sequence[Value]) -> list[Value]:
    """Tensors lying the same way round, vectors beside pictures as pictures of one place."""
    rank = max(x.rank for x in xs)
    if any(x.rank not in (rank, 2) for x in xs) or (rank != 4 and len({x.rank for x in xs}) > 1):
        raise use.refused("must be called on tensors with as many axes; found different ones")
    spread = []
    for x in xs:
        if x.rank < rank:
            x = to.add(f"{use.name}_row", "unsqueeze", x, dim=-1)
            x = Value(to.add(f"{use.name}_place", "unsqueeze", x, dim=-1).step, 4, True)
        spread.append(x)
    if any(x.moved for x in spread):
        return [to.moved(use.name, x) for x in spread]
    return spread
