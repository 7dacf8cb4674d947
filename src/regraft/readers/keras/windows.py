"""Layers of Keras that move a window over a picture, and dense ones: convolutions, pooling, sizes.

    kernels   Keras (height, width, in, out), depthwise (height, width, in, multiplier), transposed (h, w, out, in)
              torch (out, in, height, width), depthwise (in * multiplier, 1, h, w), transposed (in, out, h, w)
    same      ceil(size / stride) outputs; the odd pixel that is missing comes after. Averages do not count it.

Knows one layer at a time. Not covered: `causal` padding, one and three dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from regraft.readers.keras.activations import activated
from regraft.readers.keras.steps import Array, Steps, Use, Value

LOWEST = float(np.finfo(np.float32).min)
"""What padding before a maximum holds: -inf would not survive as JSON, and no window is padding alone."""


def convolution(use: Use, to: Steps, xs: Sequence[Value]) -> Value:
    """The layer Conv2D."""
    height, width = use.pair("kernel_size")
    filters, groups = use.whole("filters", 0), use.whole("groups", 1)
    kernel = _turned(use, use.weight("kernel", height, width, None, filters))
    stride, dilation = use.pair("strides"), use.pair("dilation_rate")
    x, padding = _padded(use, to, use.placed(to, xs[0]), (height, width), stride, dilation)
    y = to.add(
        *(use.name, "Conv2d", x),
        tensors={"weight": kernel.transpose(3, 2, 0, 1), "bias": _bias(use, filters)},
        in_channels=kernel.shape[2] * groups,
        out_channels=filters,
        kernel_size=[height, width],
        stride=list(stride),
        padding=padding,
        dilation=list(dilation),
        groups=groups,
        bias=_has_bias(use),
    )
    return activated(use, to, y)


def depthwise(use: Use, to: Steps, xs: Sequence[Value]) -> Value:
    """The layer DepthwiseConv2D."""
    y = _depthwise(use, to, xs[0], use.name, "kernel", _has_bias(use))
    return activated(use, to, y)


def separable(use: Use, to: Steps, xs: Sequence[Value]) -> Value:
    """The layer SeparableConv2D: a depthwise convolution, then one of 1 x 1 that carries the bias."""
    y = _depthwise(use, to, xs[0], f"{use.name}_depthwise", "depthwise_kernel", False)
    filters = use.whole("filters", 0)
    kernel = use.weight("pointwise_kernel", 1, 1, None, filters)
    y = to.add(
        *(use.name, "Conv2d", y),
        tensors={"weight": kernel.transpose(3, 2, 0, 1), "bias": _bias(use, filters)},
        in_channels=kernel.shape[2],
        out_channels=filters,
        kernel_size=[1, 1],
        bias=_has_bias(use),
    )
    return activated(use, to, y)


def transposed(use: Use, to: Steps, xs: Sequence[Value]) -> Value:
    """The layer Conv2DTranspose: with n inputs n * stride outputs for `same`, (n - 1) * stride + reach for `valid`.

    What the plain operation gives too much is cut off, half before and the larger half after.
    """
    _ungrouped(use)
    size, filters = use.pair("kernel_size"), use.whole("filters", 0)
    kernel = _turned(use, use.weight("kernel", *size, filters, None))
    stride, dilation = use.pair("strides"), use.pair("dilation_rate")
    same = use.choice("padding", ("valid", "same"), "valid") == "same"
    said = use.config.get("output_padding")
    extra = (None, None) if said is None else tuple(said) if isinstance(said, list) else (said, said)
    before, more, after = [], [], []
    for k, s, d, op in zip(size, stride, dilation, extra, strict=True):
        reach = (k - 1) * d + 1
        if op is None:
            missing = reach - s if same else min(reach - s, 0)
        else:
            missing = (2 * (reach // 2) if same else 0) - int(op)
        before.append(max(missing, 0) // 2)
        more.append(max(-missing, 0))
        after.append(max(missing, 0) % 2)
    x = use.placed(to, xs[0])
    y = to.add(
        *(use.name, "ConvTranspose2d", x),
        tensors={"weight": kernel.transpose(3, 2, 0, 1), "bias": _bias(use, filters)},
        in_channels=kernel.shape[3],
        out_channels=filters,
        kernel_size=list(size),
        stride=list(stride),
        padding=before,
        output_padding=more,
        dilation=list(dilation),
        bias=_has_bias(use),
    )
    if any(after):
        y = to.add(f"{use.name}_cut", "pad", y, pads=[0, -after[1], 0, -after[0]])
    return activated(use, to, y)


def dense(use: Use, to: Steps, xs: Sequence[Value]) -> Value:
    """The layer Dense, on the last axis whatever stands before it."""
    units = use.whole("units", 0)
    kernel = use.weight("kernel", None, units)
    y = to.add(
        *(use.name, "Linear", to.plain(use.name, xs[0])),
        tensors={"weight": kernel.T, "bias": _bias(use, units)},
        in_features=kernel.shape[0],
        out_features=units,
        bias=_has_bias(use),
    )
    return activated(use, to, y)


def pooling(use: Use, to: Steps, xs: Sequence[Value]) -> Value:
    """The layers MaxPooling2D and AveragePooling2D."""
    size = use.pair("pool_size", (2, 2))
    stride = use.pair("strides", size)
    same = use.choice("padding", ("valid", "same"), "valid") == "same"
    x = use.placed(to, xs[0])
    if use.kind == "AveragePooling2D":
        if same:
            return to.add(use.name, "AverageSame", x, kernel=list(size), stride=list(stride))
        return to.add(use.name, "AvgPool2d", x, kernel_size=list(size), stride=list(stride))
    if same:
        x = to.add(f"{use.name}_pad", "SamePadding", x, kernel=list(size), stride=list(stride), value=LOWEST)
    return to.add(use.name, "MaxPool2d", x, kernel_size=list(size), stride=list(stride))


def global_pooling(use: Use, to: Steps, xs: Sequence[Value]) -> Value:
    """The layers GlobalAveragePooling2D and GlobalMaxPooling2D."""
    x, keep = use.placed(to, xs[0]), bool(use.config.get("keepdims"))
    y = to.add(use.name, "amax" if "Max" in use.kind else "mean", x, dim=[2, 3], keepdim=keep)
    return Value(y.step, 4, x.moved) if keep else Value(y.step, 2)


def zero_padding(use: Use, to: Steps, xs: Sequence[Value]) -> Value:
    """The layer ZeroPadding2D."""
    (top, bottom), (left, right) = _sides(use, "padding")
    return to.add(use.name, "pad", use.placed(to, xs[0]), pads=[left, right, top, bottom])


def cropping(use: Use, to: Steps, xs: Sequence[Value]) -> Value:
    """The layer Cropping2D: padding by less than nothing."""
    (top, bottom), (left, right) = _sides(use, "cropping")
    return to.add(use.name, "pad", use.placed(to, xs[0]), pads=[-left, -right, -top, -bottom])


def center_crop(use: Use, to: Steps, xs: Sequence[Value]) -> Value:
    """The layer CenterCrop, on pictures of a known size that is not smaller."""
    x = use.placed(to, xs[0])
    found = to.sizes(x)
    if found is None:
        raise use.refused("must be called on pictures of a known size")
    height, width = found[2] - use.whole("height", 0), found[3] - use.whole("width", 0)
    if height < 0 or width < 0:
        raise use.refused("must be called on pictures that are not smaller than what it leaves")
    top, left = height // 2, width // 2
    return to.add(use.name, "pad", x, pads=[-left, left - width, -top, top - height])


def up_sampling(use: Use, to: Steps, xs: Sequence[Value]) -> Value:
    """The layer UpSampling2D."""
    height, width = use.pair("size", (2, 2))
    mode = use.choice("interpolation", ("nearest", "bilinear"), "nearest")
    x = use.placed(to, xs[0])
    if height == width:
        return to.add(use.name, "Upsample", x, scale_factor=height, mode=mode)
    return to.add(use.name, "upsample", x, scale=[height, width], mode=mode)


def resizing(use: Use, to: Steps, xs: Sequence[Value]) -> Value:
    """The layer Resizing, without smoothing, as Keras does it; `nearest` takes the nearest centre."""
    mode = use.choice("interpolation", ("nearest", "bilinear"), "bilinear")
    size = [use.whole("height", 0), use.whole("width", 0)]
    x = use.placed(to, xs[0])
    return to.add(use.name, "Upsample", x, size=size, mode="nearest-exact" if mode == "nearest" else mode)


def _depthwise(use: Use, to: Steps, x: Value, name: str, role: str, bias: bool) -> Value:
    _ungrouped(use)
    if use.turned:
        raise use.refused("was trained with Theano, for which depthwise kernels are not known to be right")
    height, width = use.pair("kernel_size")
    kernel = use.weight(role, height, width, None, use.whole("depth_multiplier", 1))
    channels, multiplier = kernel.shape[2:]
    stride, dilation = use.pair("strides"), use.pair("dilation_rate")
    x, padding = _padded(use, to, use.placed(to, x), (height, width), stride, dilation)
    outputs = channels * multiplier
    weight = kernel.transpose(2, 3, 0, 1).reshape(outputs, 1, height, width)
    return to.add(
        *(name, "Conv2d", x),
        tensors={"weight": weight, "bias": _bias(use, outputs) if bias else None},
        in_channels=channels,
        out_channels=outputs,
        kernel_size=[height, width],
        stride=list(stride),
        padding=padding,
        dilation=list(dilation),
        groups=channels,
        bias=bias,
    )


def _padded(
    use: Use, to: Steps, x: Value, size: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]
) -> tuple[Value, list[int]]:
    """x and the padding that the convolution itself does; a step pads x where that differs from side to side."""
    if use.choice("padding", ("valid", "same"), "valid") == "valid" or size == (1, 1):
        return x, [0, 0]
    missing = [(k - 1) * d for k, d in zip(size, dilation, strict=True)]
    if stride == (1, 1) and not any(m % 2 for m in missing):
        return x, [m // 2 for m in missing]
    options: dict[str, Any] = {"kernel": list(size), "stride": list(stride), "dilation": list(dilation)}
    return to.add(f"{use.name}_pad", "SamePadding", x, **options), [0, 0]


def _ungrouped(use: Use) -> None:
    """Refuse groups where Keras has none, though Keras 2 writes that there is one."""
    if use.whole("groups", 1) != 1:
        raise use.refused(f"must have one group; found {use.config['groups']!r}")


def _has_bias(use: Use) -> bool:
    return bool(use.config.get("use_bias", True))


def _bias(use: Use, size: int) -> Array | None:
    return use.weight("bias", size) if _has_bias(use) else None


def _turned(use: Use, kernel: Array) -> Array:
    return kernel[::-1, ::-1] if use.turned else kernel


def _sides(use: Use, key: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """((top, bottom), (left, right)) of an option that may be shorter."""
    found = use.config[key]
    pairs = [found, found] if isinstance(found, int) else list(found)
    sides = [(one, one) if isinstance(one, int) else tuple(one) for one in pairs]
    if len(sides) != 2 or any(len(s) != 2 or not all(type(n) is int and n >= 0 for n in s) for s in sides):
        raise use.refused(f"must have whole numbers as {key}; found {found!r:.60}")
    return sides[0], sides[1]
