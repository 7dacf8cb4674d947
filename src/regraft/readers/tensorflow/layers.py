"""The layers of TensorFlow: convolutions, dense layers, normalisation, pooling, resizing, activations.

Pictures of TensorFlow have their channels last. A layer that wants them second turns its input and turns its output
back, and as turning is only written down, never done, all of that cancels out.

Source: the operation definitions of TensorFlow 2 (`tensorflow/core/api_def/base_api`), whose default values count here:
an attribute that has its default is left out of a SavedModel. Not covered: three dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from regraft.readers.onnx.constants import integers
from regraft.readers.onnx.steps import Known, Live, Value, known
from regraft.readers.tensorflow.einsum import einsum
from regraft.readers.tensorflow.steps import Step, Write


@dataclass(frozen=True)
class _Picture:
    """A picture with its channels second, in a step whose attributes speak of four axes in the order of `form`."""

    x: Live
    form: str

    def two(self, four: Sequence[int], neutral: int = 1) -> list[int]:
        """Height and width out of four numbers; those of batch and channels must be neutral."""
        places, others = ((1, 2), (0, 3)) if self.form == "NHWC" else ((2, 3), (0, 1))
        if len(four) != 4 or any(four[o] != neutral for o in others):
            raise ValueError(f"{list(four)} over batch or channels")
        return [int(four[p]) for p in places]


def _picture(step: Step) -> _Picture:
    form, x = step.text("data_format", "NHWC"), step.live(0)
    if x.rank != 4 or form not in ("NHWC", "NCHW"):
        raise ValueError(f"pictures of {x.rank} axes in the form {form}")
    turned = x if form == "NCHW" else step.do("Transpose", x, perm=[0, 3, 1, 2])
    assert isinstance(turned, Live)
    return _Picture(turned, form)


def _back(step: Step, y: Value) -> Value:
    return y if step.text("data_format", "NHWC") == "NCHW" else step.do("Transpose", y, perm=[0, 2, 3, 1])


def _window(step: Step, picture: _Picture) -> dict[str, Any]:
    """Strides, dilations and padding."""
    mode, found = step.text("padding", "VALID"), {"strides": picture.two(step.attributes["strides"])}
    if "dilations" in step.attributes:
        found["dilations"] = picture.two(step.attributes["dilations"])
    if mode in ("SAME", "VALID"):
        return {**found, "auto_pad": {"SAME": "SAME_UPPER", "VALID": "VALID"}[mode]}
    sides = step.attributes.get("explicit_paddings", [])
    if mode != "EXPLICIT" or len(sides) != 8:
        raise ValueError(f"padding {mode!r} of {sides}")
    return {**found, "pads": picture.two(sides[0::2], 0) + picture.two(sides[1::2], 0)}


def _convolution(step: Step) -> Value:
    """Kernels are (height, width, in, out); the channels may be in groups."""
    picture, kernel = _picture(step), step.constant(1)
    if kernel.ndim != 4 or kernel.size == 0 or picture.x.size(1) % kernel.shape[2]:
        raise ValueError(f"a kernel of shape {list(kernel.shape)} for {picture.x.size(1)} channels")
    turned = step.do("Transpose", step.inputs[1], perm=[3, 2, 0, 1])
    groups = picture.x.size(1) // kernel.shape[2]
    return _back(step, step.do("Conv", picture.x, turned, group=groups, **_window(step, picture)))


def _transposed(step: Step) -> Value:
    """The gradient of a convolution as a layer: inputs are the sizes of the result, a kernel (h, w, out, in) and x.

    What the forward convolution padded is cut off again; where it left rows out at the end, these are made.
    """
    sizes, kernel = step.inputs[0], step.constant(1)
    picture = _picture(replace(step, inputs=step.inputs[2:]))
    window = _window(step, picture)
    if not isinstance(sizes, Known) or kernel.ndim != 4 or "auto_pad" not in window:
        raise ValueError("its size depends on the picture, or its padding is given by number")
    reach = [(k - 1) * d + 1 for k, d in zip(kernel.shape, window.get("dilations", [1, 1]), strict=False)]
    places = (1, 2) if picture.form == "NHWC" else (2, 3)
    begin, end, extra = [], [], []
    for axis, place in enumerate(places):
        wanted = [integers(a)[place] for a in sizes.arrays]
        before = [shape[2 + axis] for shape in picture.x.shapes]
        losses = {(b - 1) * window["strides"][axis] + reach[axis] - w for b, w in zip(before, wanted, strict=True)}
        if len(losses) != 1:
            raise ValueError("its padding varies with the size of the picture")
        loss = losses.pop()
        begin.append(max(loss, 0) // 2)
        end.append(max(loss, 0) - begin[-1])
        extra.append(max(-loss, 0))
    turned = step.do("Transpose", step.inputs[1], perm=[3, 2, 0, 1])
    options = {**window, "auto_pad": "NOTSET", "pads": begin + end, "output_padding": extra}
    return _back(step, step.do("ConvTranspose", picture.x, turned, **options))


def dilated(step: Step, blocks: Sequence[int], pads: Sequence[Sequence[int]]) -> Step:
    """A convolution within blocks of a picture that was taken apart, as one on the whole picture.

    pads: (before, after) of height and width.
    """
    given = step.attributes.get("dilations", [1, 1, 1, 1])
    usual = step.text("padding", "VALID") == "VALID" and step.text("data_format", "NHWC") == "NHWC"
    if not usual or {*step.attributes["strides"], *given} != {1} or min(map(min, pads)) < 0:
        raise ValueError("only a plain convolution may stand between blocks")
    sides = [0, 0, *pads[0], *pads[1], 0, 0]
    own = {"dilations": [1, *blocks, 1], "padding": "EXPLICIT", "explicit_paddings": sides}
    return replace(step, attributes={**step.attributes, **own})


def _depthwise(step: Step) -> Value:
    """Kernels are (height, width, in, multiplier); output c * multiplier + m belongs to channel c, as in torch."""
    picture = _picture(step)
    height, width, channels, multiplier = step.constant(1).shape
    turned = step.do("Transpose", step.inputs[1], perm=[2, 3, 0, 1])
    turned = step.do("Reshape", turned, step.value([channels * multiplier, 1, height, width]))
    return _back(step, step.do("Conv", picture.x, turned, group=channels, **_window(step, picture)))


def _pooling(op: str) -> Write:
    def pooled(step: Step) -> Value:
        picture = _picture(step)
        kernel = picture.two(step.attributes["ksize"])
        return _back(step, step.do(op, picture.x, kernel_shape=kernel, **_window(step, picture)))

    return pooled


def _bias(step: Step) -> Value:
    if step.text("data_format", "NHWC") == "NHWC":
        return step.do("Add", *step.inputs)
    lengths = [-1] + [1] * (step.live(0).rank - 2)
    return step.do("Add", step.inputs[0], step.do("Reshape", step.inputs[1], step.value(lengths)))


def _fused_norm(step: Step) -> Value:
    x, epsilon = _picture(step).x, step.number("epsilon", 1e-4)
    if step.attributes.get("is_training", True):
        return _rows_normed(step, x, epsilon)
    return _back(step, step.do("BatchNormalization", x, *step.inputs[1:5], epsilon=epsilon))


def _rows_normed(step: Step, x: Live, epsilon: float) -> Value:
    """Layer normalisation as Keras 2 writes it: every row as a channel of one picture, normalised as in training."""
    factors, shifts = step.inputs[1:3]
    plain = all(
        isinstance(v, Known) and all(np.all(a == number) for a in v.arrays) for v, number in ((factors, 1), (shifts, 0))
    )
    if not plain or step.text("data_format", "NHWC") != "NCHW" or any(shape[0] != 1 for shape in x.shapes):
        raise ValueError("it normalises by the batch, as in training")
    options = {"normalized_shape": [x.size(2), x.size(3)], "eps": epsilon, "elementwise_affine": False}
    writer = step.setting.writer
    return writer.emit(step.name, "LayerNorm", [writer.plain(x)], options)


def batch_norm(step: Step) -> Value:
    """Batch normalisation that was spelled out: inputs x, factor, shift, mean and variance; attribute epsilon.

    The axis of channels is the one along which the mean is long, or else the last.
    """
    x, mean = step.live(0), step.constant(3)
    lengths = [1] * (x.rank - mean.ndim) + list(mean.shape)
    long = [axis for axis, length in enumerate(lengths) if length != 1] or [x.rank - 1]
    if len(long) != 1 or long == [0] or not 2 <= x.rank <= 4:
        raise ValueError(f"a mean of shape {list(mean.shape)}")
    axes = [0, long[0], *(a for a in range(1, x.rank) if a != long[0])]
    rows = [
        step.value(np.broadcast_to(v.constant.reshape(-1), (mean.size,)))
        for v in step.inputs[1:]
        if isinstance(v, Known)
    ]
    turned = step.do("Transpose", x, perm=axes)
    y = step.do("BatchNormalization", turned, *rows, epsilon=step.number("epsilon", 0.0))
    return step.do("Transpose", y, perm=[axes.index(a) for a in range(x.rank)])


def _local_norm(step: Step) -> Value:
    size = 2 * int(step.attributes.get("depth_radius", 5)) + 1
    numbers = {"alpha": step.number("alpha", 1.0) * size, "beta": step.number("beta", 0.5)}
    return _back(step, step.do("LRN", _picture(step).x, size=size, bias=step.number("bias", 1.0), **numbers))


def _product(step: Step) -> Value:
    """MatMul and its batched forms."""
    sides = []
    for value, names in zip(step.inputs, (("transpose_a", "adj_x"), ("transpose_b", "adj_y")), strict=True):
        rank = value.rank if isinstance(value, Live) else value.constant.ndim
        if any(step.attributes.get(name, False) for name in names):
            value = step.do("Transpose", value, perm=[*range(rank - 2), rank - 1, rank - 2])
        sides.append(value)
    return step.do("MatMul", *sides)


def _resized(mode: str) -> Write:
    def resized(step: Step) -> Value:
        x, sizes = step.live(0), step.inputs[1]
        if not isinstance(sizes, Known):
            raise ValueError("its size depends on the picture")
        corners, halves = (bool(step.attributes.get(n, False)) for n in ("align_corners", "half_pixel_centers"))
        pairs = [integers(a) for a in sizes.arrays]
        shapes = [[shape[0], *pair, shape[3]] for shape, pair in zip(x.shapes, pairs, strict=True)]
        whole = all(n % o == 0 for s, t in zip(x.shapes, shapes, strict=True) for o, n in zip(s, t, strict=True))
        rule = "align_corners" if corners else "half_pixel" if halves else "asymmetric"
        if mode == "nearest" and rule == "half_pixel":
            rule = "asymmetric" if whole else "tf_half_pixel_for_nn"
        wanted = known([np.array(shape) for shape in shapes])
        rounding = "round_prefer_ceil" if corners else "floor"
        rules = {"coordinate_transformation_mode": rule, "nearest_mode": rounding}
        return step.do("Resize", x, None, None, wanted, mode=mode, **rules)

    return resized


def _blocks(op: str) -> Write:
    """Places that become channels, or the other way round."""

    def moved(step: Step) -> Value:
        return _back(step, step.do(op, _picture(step).x, blocksize=int(step.attributes["block_size"]), mode="DCR"))

    return moved


def _activation(kind: str, **options: tuple[str, float]) -> Write:
    """A layer of torch; options: of each of its arguments, the attribute of TensorFlow and its default."""
    return lambda step: step.layer(kind, **{own: step.number(*theirs) for own, theirs in options.items()})


LAYER_STEPS: dict[str, Write] = {
    "AvgPool": _pooling("AveragePool"),
    "BatchMatMul": _product,
    "BatchMatMulV2": _product,
    "BatchMatMulV3": _product,
    "BiasAdd": _bias,
    "Conv2D": _convolution,
    "Conv2DBackpropInput": _transposed,
    "DepthToSpace": _blocks("DepthToSpace"),
    "DepthwiseConv2dNative": _depthwise,
    "Einsum": einsum,
    "FusedBatchNorm": _fused_norm,
    "FusedBatchNormV2": _fused_norm,
    "FusedBatchNormV3": _fused_norm,
    "LRN": _local_norm,
    "MatMul": _product,
    "MaxPool": _pooling("MaxPool"),
    "ResizeBilinear": _resized("linear"),
    "ResizeNearestNeighbor": _resized("nearest"),
    "SpaceToDepth": _blocks("SpaceToDepth"),
    "Elu": _activation("ELU"),
    "LeakyRelu": _activation("LeakyReLU", negative_slope=("alpha", 0.2)),
    "LogSoftmax": lambda step: step.do("LogSoftmax", step.inputs[0], axis=-1),
    "Relu": _activation("ReLU"),
    "Relu6": _activation("ReLU6"),
    "Selu": _activation("SELU"),
    "Sigmoid": _activation("Sigmoid"),
    "Softmax": lambda step: step.do("Softmax", step.inputs[0], axis=-1),
    "Softplus": _activation("Softplus"),
    "Softsign": _activation("Softsign"),
    "Tanh": _activation("Tanh"),
}
"""What each layer is made of."""
