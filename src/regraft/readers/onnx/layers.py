"""The layers of ONNX as steps: convolutions, dense layers, normalisations, pooling.

Each function takes the writer and one step of the graph and writes what stands for it; what torch has no like of is
refused with a ValueError that says why, which the reader makes a sentence of.

Sources: the operator definitions of onnx.ai up to opset 25.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from regraft.operations import INPUT
from regraft.readers.onnx.constants import Array
from regraft.readers.onnx.steps import Live, Node, Writer

_MOST_CHANNELS = 1 << 20
LOWEST = -3.4028234663852886e38
"""The least float32: below every value a window can hold, and a number in JSON, as minus infinity is not."""


# ---- convolutions -----------------------------------------------------------------------------------------------


def _convolution(writer: Writer, node: Node) -> Live:
    x, weight, bias = writer.plain(node.live()), node.given(1), node.constant(2)
    if weight.ndim not in (3, 4) or weight.ndim != x.rank:
        raise ValueError(f"convolutions have one or two axes of places here, not {weight.ndim - 2}")
    group = int(node.attributes.get("group", 1))
    options = _window(node, weight.shape[2:])
    x, padding = _padded(writer, node, x, options)
    name = node.owner(1)
    return writer.emit(
        name,
        f"Conv{weight.ndim - 2}d",
        [x],
        {
            "in_channels": int(weight.shape[1]) * group,
            "out_channels": int(weight.shape[0]),
            "kernel_size": options["kernel_size"],
            "stride": options["stride"],
            "padding": padding,
            "dilation": options["dilation"],
            "groups": group,
            "bias": bias is not None,
        },
        weight=weight,
        bias=bias,
    )


def _transposed(writer: Writer, node: Node) -> Live:
    """Transposed convolution; padding that is not the same on both sides is cut off afterwards."""
    x, weight, bias = writer.plain(node.live()), node.given(1), node.constant(2)
    if weight.ndim != 4 or x.rank != 4:
        raise ValueError("transposed convolutions have two axes of places here")
    group = int(node.attributes.get("group", 1))
    options = _window(node, weight.shape[2:])
    extra = [int(e) for e in node.attributes.get("output_padding", [0, 0])]
    begin, end = _cropped(node, x, options, extra)
    padding = begin if begin == end else [0, 0]
    y = writer.emit(
        node.owner(1),
        "ConvTranspose2d",
        [x],
        {
            "in_channels": int(weight.shape[0]),
            "out_channels": int(weight.shape[1]) * group,
            "kernel_size": options["kernel_size"],
            "stride": options["stride"],
            "padding": padding,
            "output_padding": extra,
            "groups": group,
            "dilation": options["dilation"],
            "bias": bias is not None,
        },
        weight=weight,
        bias=bias,
    )
    if begin == end:
        return y
    for axis in range(2):
        cut = {"dim": axis + 2, "start": begin[axis], "stop": -end[axis] or None}
        y = writer.emit(f"{node.name}_cropped", "slice", [y], cut)
    return y


def _cropped(node: Node, x: Live, options: Mapping[str, Any], extra: Sequence[int]) -> tuple[list[int], list[int]]:
    """How much a transposed convolution loses (before, after) on each axis."""
    wanted = node.attributes.get("output_shape")
    mode = node.attributes.get("auto_pad", "NOTSET")
    if wanted is None and mode not in ("SAME_UPPER", "SAME_LOWER"):
        pads = [int(p) for p in node.attributes.get("pads", [0, 0, 0, 0])] if mode != "VALID" else [0, 0, 0, 0]
        if min(pads) < 0:
            raise ValueError(f"padding {pads} of a transposed convolution")
        return pads[:2], pads[2:]
    kernel, stride, dilation = options["kernel_size"], options["stride"], options["dilation"]
    begin, end = [], []
    for axis in range(2):
        size = x.size(2 + axis)
        full = stride[axis] * (size - 1) + extra[axis] + (kernel[axis] - 1) * dilation[axis] + 1
        loss = full - (int(wanted[-2 + axis]) if wanted is not None else size * stride[axis])
        if loss < 0:
            raise ValueError("the output of a transposed convolution must not be larger than what it computes")
        first = loss // 2 if mode == "SAME_UPPER" else loss - loss // 2
        begin.append(first)
        end.append(loss - first)
    return begin, end


def _window(node: Node, kernel: Sequence[int]) -> dict[str, list[int]]:
    """Kernel, stride and dilation of a layer that slides."""
    axes = len(kernel)
    stated = [int(k) for k in node.attributes.get("kernel_shape", kernel)]
    if stated != [int(k) for k in kernel]:
        raise ValueError(f"the kernel is {list(kernel)} and not {stated} as stated")
    stride = [int(s) for s in node.attributes.get("strides", [1] * axes)]
    dilation = [int(d) for d in node.attributes.get("dilations", [1] * axes)]
    if min([*stated, *stride, *dilation]) < 1 or len(stride) != axes or len(dilation) != axes:
        raise ValueError(f"kernel {stated}, strides {stride} and dilations {dilation} must be 1 or more for each axis")
    return {"kernel_size": stated, "stride": stride, "dilation": dilation}


def _pads(node: Node, x: Live, options: Mapping[str, list[int]]) -> list[int] | None:
    """What stands in front of and behind each axis, (before, ..., after, ...); None where it follows the size."""
    axes = len(options["kernel_size"])
    mode = node.attributes.get("auto_pad", "NOTSET")
    if mode in ("NOTSET", "", "VALID"):
        pads = [int(p) for p in node.attributes.get("pads", [0] * 2 * axes)] if mode != "VALID" else [0] * 2 * axes
        if len(pads) != 2 * axes or min(pads) < 0:
            raise ValueError(f"padding {pads} of {axes} axes")
        return pads
    if mode not in ("SAME_UPPER", "SAME_LOWER"):
        raise ValueError(f"auto_pad {mode!r}")
    reach = [(k - 1) * d for k, d in zip(options["kernel_size"], options["dilation"], strict=True)]
    if all(s == 1 for s in options["stride"]) and all(r % 2 == 0 for r in reach):
        return [r // 2 for r in reach] * 2
    if axes == 2:
        return None
    return _same(x, options, lower=mode == "SAME_LOWER")


def _same(x: Live, options: Mapping[str, list[int]], *, lower: bool) -> list[int]:
    """The padding of SAME for the sizes that x has."""
    before, after = [], []
    for axis, (k, s, d) in enumerate(zip(*(options[o] for o in ("kernel_size", "stride", "dilation")), strict=True)):
        size = x.size(2 + axis)
        missing = max(0, (-(-size // s) - 1) * s + (k - 1) * d + 1 - size)
        before.append(missing - missing // 2 if lower else missing // 2)
        after.append(missing - before[-1])
    return before + after


def _padded(
    writer: Writer, node: Node, x: Live, options: Mapping[str, list[int]], value: float = 0.0, *, pooled: bool = False
) -> tuple[Live, list[int]]:
    """x with the padding that a layer cannot do by itself, and the one that it can."""
    pads = _pads(node, x, options)
    axes = len(options["kernel_size"])
    if pads is None:
        lower = node.attributes["auto_pad"] == "SAME_LOWER"
        wanted = {"kernel": options["kernel_size"], "stride": options["stride"], "dilation": options["dilation"]}
        return writer.emit(f"{node.name}_pad", "SamePadding", [x], {**wanted, "value": value, "before": lower}), [0, 0]
    if pads[:axes] == pads[axes:] and (not pooled or _within(pads, options)):
        return x, pads[:axes]
    flat = [side for axis in range(axes - 1, -1, -1) for side in (pads[axis], pads[axes + axis])]
    return writer.emit(f"{node.name}_pad", "pad", [x], {"pads": flat, "value": value}), [0] * axes


def _within(pads: Sequence[int], options: Mapping[str, list[int]]) -> bool:
    """Whether torch's pooling takes such padding: at most half a window."""
    return all(2 * p <= k for p, k in zip(pads, options["kernel_size"] * 2, strict=True))


# ---- pooling ----------------------------------------------------------------------------------------------------


def _max_pool(writer: Writer, node: Node) -> Live:
    x, options = _pooled(writer, node)
    padding, rounded = _by_ceiling(node, x, options), bool(node.attributes.get("ceil_mode", 0))
    if padding is None or rounded:
        x, padding = _padded(writer, node, x, options, LOWEST, pooled=True)
    else:
        rounded = True
    return writer.emit(node.name, "MaxPool2d", [x], {**options, "padding": padding, "ceil_mode": rounded})


def _average_pool(writer: Writer, node: Node) -> Live:
    """Average pooling; whether padding counts matters, so what torch cannot do is refused."""
    if len(node.attributes.get("kernel_shape", ())) == 3:
        return _average_of_planes(writer, node)
    x, options = _pooled(writer, node)
    if options["dilation"] != [1, 1]:
        raise ValueError("an average over dilated windows")
    window: dict[str, Any] = {"kernel_size": options["kernel_size"], "stride": options["stride"]}
    rounded, counts = bool(node.attributes.get("ceil_mode", 0)), bool(node.attributes.get("count_include_pad", 0))
    if counts:
        x, padding = _padded(writer, node, x, options, pooled=True)
        return writer.emit(node.name, "AvgPool2d", [x], {**window, "padding": padding, "ceil_mode": rounded})
    pads, by_ceiling = _pads(node, x, options), _by_ceiling(node, x, options)
    window["count_include_pad"] = False
    if pads is not None and pads[:2] == pads[2:] and _within(pads, options):
        return writer.emit(node.name, "AvgPool2d", [x], {**window, "padding": pads[:2], "ceil_mode": rounded})
    if by_ceiling is not None and not rounded:
        return writer.emit(node.name, "AvgPool2d", [x], {**window, "padding": by_ceiling, "ceil_mode": True})
    lower = node.attributes.get("auto_pad") == "SAME_LOWER"
    for before in (lower,) if pads is None else (False, True):
        if not rounded and (pads is None or pads == _same(x, options, lower=before)):
            same = {"kernel": options["kernel_size"], "stride": options["stride"], "before": before}
            return writer.emit(node.name, "AverageSame", [x], same)
    raise ValueError(f"an average that leaves out padding of {pads}")


def _average_of_planes(writer: Writer, node: Node) -> Live:
    """The mean over neighbouring channels in PyTorch's local response normalisation, where x is (n, 1, c, h, w)."""
    x, kernel = writer.plain(node.live()), [int(k) for k in node.attributes["kernel_shape"]]
    window = _window(node, kernel)
    still = window["stride"] == window["dilation"] == [1, 1, 1] and _pads(node, x, window) == [0] * 6
    if x.rank != 5 or x.size(1) != 1 or kernel[1:] != [1, 1] or not still:
        raise ValueError("pooling has two axes of places here, or goes over neighbouring channels")
    y = writer.emit(f"{node.name}_planes", "squeeze", [x], {"dim": 1}, range(4))
    y = writer.emit(f"{node.name}_planes", "transpose", [y], {"dim0": 1, "dim1": 2})
    y = writer.emit(node.name, "AvgPool2d", [y], {"kernel_size": [kernel[0], 1], "stride": [1, 1]})
    y = writer.emit(f"{node.name}_channels", "transpose", [y], {"dim0": 1, "dim1": 2})
    return writer.emit(f"{node.name}_channels", "unsqueeze", [y], {"dim": 1}, range(5))


def _pooled(writer: Writer, node: Node) -> tuple[Live, dict[str, list[int]]]:
    x = writer.plain(node.live())
    if x.rank != 4 or any(node.wanted[1:]) or node.attributes.get("storage_order", 0):
        raise ValueError("pooling has two axes of places and one output here")
    kernel = node.attributes.get("kernel_shape", ())
    if len(kernel) != 2:
        raise ValueError(f"a window of {list(kernel)} for two axes")
    return x, _window(node, kernel)


def _by_ceiling(node: Node, x: Live, options: Mapping[str, list[int]]) -> list[int] | None:
    """The padding with which rounding the output size up does what the padding of the file does, for every size.

    One row less than a stride more behind than in front is what rounding up allows for: exporters write it for
    TensorFlow's SAME. It needs no step of its own.
    """
    pads = _pads(node, x, options)
    if pads is None or not _within(pads[:2] * 2, options):
        return None
    for axis in range(2):
        before, after, stride = pads[axis], pads[axis + 2], options["stride"][axis]
        window = (options["kernel_size"][axis] - 1) * options["dilation"][axis] + 1
        if after != before + stride - 1 or window <= after or stride == 1:
            return None
    return pads[:2]


def _global_average(writer: Writer, node: Node) -> Live:
    x = writer.plain(node.live())
    if x.rank == 4:
        return writer.emit(node.name, "AdaptiveAvgPool2d", [x], {"output_size": 1})
    return writer.emit(node.name, "mean", [x], {"dim": list(range(2, x.rank)), "keepdim": True})


def _global_max(writer: Writer, node: Node) -> Live:
    x = writer.plain(node.live())
    return writer.emit(node.name, "amax", [x], {"dim": list(range(2, x.rank)), "keepdim": True})


# ---- dense layers -----------------------------------------------------------------------------------------------


def _gemm(writer: Writer, node: Node) -> Live:
    """alpha * A * B + beta * C with constant B and C, as a dense layer."""
    x = node.live()
    if node.attributes.get("transA", 0):
        x = Live(x.step, x.order[::-1], x.seen, x.raw)
    if x.rank != 2:
        raise ValueError(f"a Gemm of a tensor with {x.rank} axes")
    weight = node.given(1)
    weight = weight if node.attributes.get("transB", 0) else weight.T
    alpha, beta = node.number("alpha", 1.0), node.number("beta", 1.0)
    bias = node.constant(2)
    if bias is not None:
        bias = np.broadcast_to(bias, (1, weight.shape[0])).reshape(-1) * np.float32(beta)
    return _linear(writer, node, x, weight if alpha == 1 else weight * np.float32(alpha), bias)


def _matmul(writer: Writer, node: Node) -> Live:
    left, right = node.inputs[:2]
    if isinstance(left, Live) and isinstance(right, Live):
        return writer.emit(node.name, "matmul", [writer.plain(left), writer.plain(right)], order=_ranks(left, right))
    if isinstance(left, Live):
        weight = node.given(1)
        if weight.ndim == 2:
            return _linear(writer, node, left, weight.T, None)
        other = writer.constant(node.name, weight, left, source=_source(node, 1), trained=bool(_source(node, 1)))
        return writer.emit(node.name, "matmul", [writer.plain(left), other], order=_ranks(left, other))
    live, weight = node.live(1), node.given(0)
    other = writer.constant(node.name, weight, live, source=_source(node, 0), trained=bool(_source(node, 0)))
    return writer.emit(node.name, "matmul", [other, writer.plain(live)], order=_ranks(other, live))


def _linear(writer: Writer, node: Node, x: Live, weight: Array, bias: Array | None) -> Live:
    """weight: (out, in)."""
    sizes = {"in_features": int(weight.shape[1]), "out_features": int(weight.shape[0]), "bias": bias is not None}
    return writer.emit(node.owner(1), "Linear", [writer.plain(x)], sizes, range(x.rank), weight=weight, bias=bias)


def _ranks(a: Live, b: Live) -> range:
    """The axes of a product."""
    if min(a.rank, b.rank) < 2:
        raise ValueError("a product with a vector")
    if any(value.pictures(axis) for value, axis in ((a, -1), (b, -2))):
        raise ValueError("it goes over the pictures of the batch")
    return range(max(a.rank, b.rank))


def _source(node: Node, index: int) -> str:
    return getattr(node.inputs[index], "name", "")


def absorb_bias(writer: Writer, value: Live, added: Array) -> Live | None:
    """The layer behind `value` with `added` as its bias, where it has none and nothing else uses what it makes.

    added: with the axes of the layer's output.
    """
    axis = {"Linear": value.rank - 1, "Conv1d": 1, "Conv2d": 1, "ConvTranspose2d": 1}
    if value.step == INPUT:
        return None
    layer = writer.last(value)
    if layer.kind not in axis or layer.options["bias"] or not value.sole:
        return None
    channels = int(value.seen[0].shape[axis[layer.kind]])
    lengths = [1] * (value.rank - added.ndim) + list(added.shape)
    if any(length != 1 for i, length in enumerate(lengths) if i != axis[layer.kind]):
        return None
    writer.change(layer, {"bias": True}, bias=np.broadcast_to(added.reshape(-1), (channels,)))
    return value


# ---- normalisation ----------------------------------------------------------------------------------------------


def _batch_norm(writer: Writer, node: Node) -> Live:
    x = writer.plain(node.live())
    if node.attributes.get("training_mode", 0) or any(node.wanted[1:]) or not node.attributes.get("spatial", 1):
        raise ValueError("batch normalisation must be that of inference, over channels")
    scale, shift, mean, var = (node.given(i) for i in range(1, 5))
    if scale.size != x.size(1):
        raise ValueError(f"{scale.size} factors for {x.size(1)} channels")
    options = {
        "num_features": int(scale.size),
        "eps": node.number("epsilon", 1e-5),
        "momentum": round(1 - node.number("momentum", 0.9), 6),
    }
    kind = "BatchNorm2d" if x.rank == 4 else "BatchNorm1d"
    return writer.emit(node.owner(1), kind, [x], options, weight=scale, bias=shift, running_mean=mean, running_var=var)


def _instance_norm(writer: Writer, node: Node) -> Live:
    """Normalisation of each channel of each picture: group normalisation with a group for every channel."""
    x, scale, shift = writer.plain(node.live()), node.given(1), node.given(2)
    channels = int(scale.size)
    options = {"num_groups": channels, "num_channels": channels, "eps": node.number("epsilon", 1e-5)}
    return writer.emit(node.owner(1), "GroupNorm", [x], options, weight=scale, bias=shift)


def _group_norm(writer: Writer, node: Node) -> Live:
    x, scale, shift = writer.plain(node.live()), node.given(1), node.given(2)
    groups, channels = int(node.attributes["num_groups"]), x.size(1)
    if channels > _MOST_CHANNELS:
        raise ValueError(f"{channels} channels")
    if scale.size != channels:  # before version 21 of the operators, one factor for each group
        scale, shift = (np.repeat(t, channels // groups) for t in (scale, shift))
    options = {"num_groups": groups, "num_channels": channels, "eps": node.number("epsilon", 1e-5)}
    return writer.emit(node.owner(1), "GroupNorm", [x], options, weight=scale, bias=shift)


def _layer_norm(writer: Writer, node: Node) -> Live:
    x = writer.plain(node.live())
    if any(node.wanted[1:]):
        raise ValueError("only the first output of a layer normalisation")
    axis = int(node.attributes.get("axis", -1)) % x.rank
    shape = [x.size(i) for i in range(axis, x.rank)]
    scale, shift = np.broadcast_to(node.given(1), shape), node.constant(2)
    shift = None if shift is None else np.broadcast_to(shift, shape)
    options = {"normalized_shape": shape, "eps": node.number("epsilon", 1e-5), "bias": shift is not None}
    return writer.emit(node.owner(1), "LayerNorm", [x], options, weight=scale, bias=shift)


def _local_norm(writer: Writer, node: Node) -> Live:
    size = int(node.attributes["size"])
    if size % 2 == 0:
        raise ValueError(f"a normalisation over {size} channels, an even number")
    numbers = {"alpha": node.number("alpha", 1e-4), "beta": node.number("beta", 0.75), "k": node.number("bias", 1.0)}
    return writer.emit(node.name, "local_response_norm", [writer.plain(node.live())], {"size": size, **numbers})


LAYER_STEPS: dict[str, Callable[[Writer, Node], Live]] = {
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Conv": _convolution,
    "ConvTranspose": _transposed,
    "Gemm": _gemm,
    "GlobalAveragePool": _global_average,
    "GlobalMaxPool": _global_max,
    "GroupNormalization": _group_norm,
    "InstanceNormalization": _instance_norm,
    "LRN": _local_norm,
    "LayerNormalization": _layer_norm,
    "MatMul": _matmul,
    "MaxPool": _max_pool,
}
"""What each layer of ONNX is written as; at least its first input depends on the picture."""
