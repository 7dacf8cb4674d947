"""Steps for operations of ATen that compute: layers with tensors of their own, activations, arithmetic, pooling.

An operation that carries stored tensors becomes the layer that it is in `torch.nn`, so that the network is an ordinary
one to train and fold. Knows the signatures of ATen; shapes alone are changed in `shapes`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from regraft.readers.exported.graph import (
    Graph,
    Held,
    Node,
    Ref,
    Translate,
    free_of,
    from_front,
    joint,
    leading,
    only,
    single,
)

Affine = Callable[[float], tuple[float, float]]
"""Scale and shift for a number."""


def _two(value: Any, rank: int) -> list[int]:
    numbers = [int(n) for n in value]
    return numbers * rank if len(numbers) == 1 else numbers


def convolution(graph: Graph, node: Node) -> None:
    """A convolution of any stride and grouping, transposed ones too."""
    x, weight, bias = graph.value(node, "input"), graph.value(node, "weight"), graph.optional(node, "bias")
    leading(graph, node, x)
    turned = bool(node.get("transposed")) or node.op == "conv_transpose2d"
    rank, groups = len(weight.shape) - 2, int(node.get("groups", 1))
    kinds = {(1, False): "Conv1d", (2, False): "Conv2d", (2, True): "ConvTranspose2d"}
    if (rank, turned) not in kinds or len(x.shape) != rank + 2 or weight.stored is None or weight.turned:
        graph.refuse(node, "is no convolution of pictures with stored kernels")
    ours, theirs, *kernel = graph.tensor(weight).shape
    padding = node.get("padding", [0])
    options = {
        "in_channels": ours if turned else theirs * groups,
        "out_channels": theirs * groups if turned else ours,
        "kernel_size": list(kernel),
        "stride": _two(node.get("stride", [1]), rank),
        "padding": padding if isinstance(padding, str) else _two(padding, rank),
        "dilation": _two(node.get("dilation", [1]), rank),
        "groups": groups,
        "bias": bias is not None,
    }
    if turned:
        options["output_padding"] = _two(node.get("output_padding", [0]), rank)
    graph.layer(node, kinds[rank, turned], x, options, {"weight": weight, "bias": bias})


def linear(graph: Graph, node: Node) -> None:
    """x weightᵀ + bias."""
    _dense(graph, node, graph.value(node, "input"), graph.value(node, "weight"), graph.optional(node, "bias"))


def addmm(graph: Graph, node: Node) -> None:
    """bias + x weightᵀ, as decomposed graphs have it."""
    only(graph, node, "alpha", (1,))
    only(graph, node, "beta", (1,))
    bias, x, weight = (graph.value(node, name) for name in ("self", "mat1", "mat2"))
    if weight.stored is None or not weight.turned:
        graph.refuse(node, "multiplies by something other than stored weights")
    _dense(graph, node, x, replace(weight, turned=False), bias)


def _dense(graph: Graph, node: Node, x: Held, weight: Held, bias: Held | None) -> None:
    """A linear layer; weight (out, in)."""
    free_of(graph, node, x, [len(x.shape) - 1])
    if weight.stored is None or weight.turned or x.batch is None or graph.tensor(weight).dim() != 2:
        graph.refuse(node, "multiplies by something other than stored weights")
    if bias is not None and (bias.stored is None or graph.tensor(bias).dim() != 1):
        graph.refuse(node, "adds something other than a stored bias")
    outs, ins = graph.tensor(weight).shape
    options = {"in_features": ins, "out_features": outs, "bias": bias is not None}
    graph.layer(node, "Linear", x, options, {"weight": weight, "bias": bias})


def matmul(graph: Graph, node: Node) -> None:
    """A product of two tensors; a linear layer where one is a stored weight, transposed."""
    first, second = ("self", "mat2") if "mat2" in node.arguments else ("self", "other")
    x, y = graph.value(node, first), graph.value(node, second)
    if y.stored is not None and y.turned and x.batch is not None:
        _dense(graph, node, x, replace(y, turned=False), None)
        return
    rows = x.batch is not None and y.batch is None and x.batch == len(x.shape) - 2
    if min(len(x.shape), len(y.shape)) < 2 or (not rows and not (_is_outer(x) and _is_outer(y))):
        graph.refuse_mixing(node)
    batch = len(graph.out(node)) - 2 if rows else joint(graph, node, [x, y])
    graph.compute(node, "matmul", [x, y], {}, batch)


def _is_outer(x: Held) -> bool:
    return x.batch is None or x.batch < len(x.shape) - 2


def attention(graph: Graph, node: Node) -> None:
    """Scaled dot product attention."""
    only(graph, node, "dropout_p", (0, 0.0))
    only(graph, node, "is_causal", (False,))
    only(graph, node, "enable_gqa", (False,))
    parts = [graph.value(node, name) for name in ("query", "key", "value")]
    mask = graph.optional(node, "attn_mask")
    if not all(part.batch is not None and _is_outer(part) for part in parts) or len({p.batch for p in parts}) != 1:
        graph.refuse_mixing(node)
    inputs = [*parts, mask] if mask else parts
    graph.compute(node, "attention", inputs, {"scale": node.get("scale")}, parts[0].batch)


def batch_norm(graph: Graph, node: Node) -> None:
    """Batch norm as it is used; refused as it is trained."""
    x = graph.value(node, "input")
    leading(graph, node, x)
    if node.get("training") or node.op == "_native_batch_norm_legit":
        graph.refuse(node, "was exported in training mode", "export after `model.eval()`")
    names = ("weight", "bias", "running_mean", "running_var")
    own = {name: graph.optional(node, name) for name in names}
    if own["running_mean"] is None or own["running_var"] is None or (own["weight"] is None) != (own["bias"] is None):
        graph.refuse(node, "has no stored statistics")
    options = {"num_features": own["running_mean"].shape[0], "eps": node.get("eps"), "momentum": node.get("momentum")}
    if own["weight"] is None:
        options["affine"] = False
    if len(x.shape) not in (2, 3, 4):
        graph.refuse(node, "is for something other than pictures")
    graph.layer(node, "BatchNorm2d" if len(x.shape) == 4 else "BatchNorm1d", x, options, own)


def layer_norm(graph: Graph, node: Node) -> None:
    """Layer norm."""
    x, shape = graph.value(node, "input"), [int(n) for n in node.get("normalized_shape")]
    free_of(graph, node, x, range(len(x.shape) - len(shape), len(x.shape)))
    weight, bias = graph.optional(node, "weight"), graph.optional(node, "bias")
    if weight is None and bias is not None:
        graph.refuse(node, "has a bias and no weight")
    options = {"normalized_shape": shape, "eps": node.get("eps", 1e-5), "elementwise_affine": weight is not None}
    graph.layer(node, "LayerNorm", x, {**options, "bias": bias is not None}, {"weight": weight, "bias": bias})


def group_norm(graph: Graph, node: Node) -> None:
    """Group norm."""
    x, weight, bias = graph.value(node, "input"), graph.optional(node, "weight"), graph.optional(node, "bias")
    leading(graph, node, x)
    if (weight is None) != (bias is None):
        graph.refuse(node, "has a weight or a bias alone")
    groups = node.get("num_groups") or node.get("group")
    options = {"num_groups": groups, "num_channels": x.shape[1], "eps": node.get("eps", 1e-5)}
    graph.layer(node, "GroupNorm", x, {**options, "affine": weight is not None}, {"weight": weight, "bias": bias})


def instance_norm(graph: Graph, node: Node) -> None:
    """Instance norm by what it is given, which is group norm with a group for every channel."""
    x, weight, bias = graph.value(node, "input"), graph.optional(node, "weight"), graph.optional(node, "bias")
    leading(graph, node, x)
    if not node.get("use_input_stats") or graph.optional(node, "running_mean") is not None:
        graph.refuse(node, "uses stored statistics")
    if (weight is None) != (bias is None) or len(x.shape) < 3 or x.shape[1] is None:
        graph.refuse(node, "has a weight or a bias alone, or is for something other than pictures")
    options = {"num_groups": x.shape[1], "num_channels": x.shape[1], "eps": node.get("eps", 1e-5)}
    graph.layer(node, "GroupNorm", x, {**options, "affine": weight is not None}, {"weight": weight, "bias": bias})


def prelu(graph: Graph, node: Node) -> None:
    """Leaky ReLU with stored slopes."""
    x, weight = graph.value(node, "self"), graph.value(node, "weight")
    leading(graph, node, x)
    graph.layer(node, "PReLU", x, {"num_parameters": weight.shape[0]}, {"weight": weight})


def alone(kind: str, **options: Any) -> Translate:
    """A step that works on each number by itself: a layer or a function, with these options."""

    def translate(graph: Graph, node: Node) -> None:
        x = single(graph, node)
        graph.compute(node, kind, [x], options, x.batch)

    return translate


def with_options(kind: str, options: Mapping[str, str], **default: Any) -> Translate:
    """As `alone`, with options (names in torch: names in ATen) that the node gives."""

    def translate(graph: Graph, node: Node) -> None:
        x = single(graph, node)
        given = {ours: node.get(theirs, default.get(ours)) for ours, theirs in options.items()}
        graph.compute(node, kind, [x], given, x.batch)

    return translate


def einsum(graph: Graph, node: Node) -> None:
    """A sum of products by named axes, of which that of the pictures must have one name and stay."""
    parts = [graph.of(node, ref) for ref in node.get("tensors")]
    given, arrow, left = str(node.get("equation")).replace(" ", "").partition("->")
    names = given.split(",")
    if not arrow or "." in given or [len(name) for name in names] != [len(part.shape) for part in parts]:
        graph.refuse(node, "does not name every axis")
    counted = {name[part.batch] for name, part in zip(names, parts, strict=True) if part.batch is not None}
    fixed = "".join(name for name, part in zip(names, parts, strict=True) if part.batch is None)
    if len(counted) > 1 or any(name not in left or name in fixed for name in counted):
        graph.refuse_mixing(node)
    if any(name.count(one) > 1 for name in names for one in counted):
        graph.refuse_mixing(node)
    batch = left.index(counted.pop()) if counted else None
    graph.compute(node, "einsum", parts, {"equation": f"{given}->{left}"}, batch)


def upsample(mode: str) -> Translate:
    """Pictures of another size: the one that was exported, or larger by a factor."""

    def translate(graph: Graph, node: Node) -> None:
        x = single(graph, node)
        leading(graph, node, x)
        if len(x.shape) != 4:
            graph.refuse(node, "is for something other than pictures")
        factors = node.get("scale_factors") or [node.get("scales_h"), node.get("scales_w")]
        align = {} if mode.startswith("nearest") else {"align_corners": bool(node.get("align_corners", False))}
        if None not in factors and factors[0] == factors[1]:
            graph.compute(node, "Upsample", [x], {"scale_factor": factors[0], "mode": mode, **align}, 0)
        elif None not in factors and not align.get("align_corners"):
            graph.compute(node, "upsample", [x], {"scale": list(factors), "mode": mode}, 0)
        elif factors.count(None) == 2 and None not in graph.out(node)[2:]:
            graph.compute(node, "Upsample", [x], {"size": list(graph.out(node)[2:]), "mode": mode, **align}, 0)
        else:
            graph.refuse(node, "gives a size that follows from the input")

    return translate


def shuffle(kind: str, factor: str) -> Translate:
    """Channels as pixels between the others, or back."""

    def translate(graph: Graph, node: Node) -> None:
        x = graph.value(node, "self")
        free_of(graph, node, x, range(len(x.shape) - 3, len(x.shape)))
        graph.compute(node, kind, [x], {factor: int(node.get(factor))}, x.batch)

    return translate


def elu(graph: Graph, node: Node) -> None:
    """ELU, and SELU as ATen has it."""
    x, scale, alpha = graph.value(node, "self"), node.get("scale", 1), node.get("alpha", 1)
    only(graph, node, "input_scale", (1,))
    selu = (1.0507009873554805, 1.6732632423543772)
    if scale != 1 and (scale, alpha) != selu:
        graph.refuse(node, f"has scale={scale}")
    graph.compute(node, *(("ELU", [x], {"alpha": alpha}) if scale == 1 else ("SELU", [x], {})), x.batch)


def hardtanh(graph: Graph, node: Node) -> None:
    """ReLU6, or a clamp."""
    x, low, high = graph.value(node, "self"), node.get("min_val", -1), node.get("max_val", 1)
    kind, options = ("ReLU6", {}) if (low, high) == (0, 6) else ("clamp", {"min": low, "max": high})
    graph.compute(node, kind, [x], options, x.batch)


def softmax(kind: str) -> Translate:
    """Softmax or its logarithm."""

    def translate(graph: Graph, node: Node) -> None:
        x, dim = graph.value(node, "self"), int(node.get("dim"))
        free_of(graph, node, x, [from_front(dim, len(x.shape))])
        graph.compute(node, kind, [x], {"dim": dim}, x.batch)

    return translate


def binary(kind: str, scaled: Affine | None = None, turned: Affine | None = None) -> Translate:
    """A function of two tensors, or of one and a number: x * scale + shift then; `turned` where the number is first."""

    def translate(graph: Graph, node: Node) -> None:
        only(graph, node, "alpha", (1,))
        only(graph, node, "rounding_mode", ())
        one, other = node.get("self"), node.get("other")
        if isinstance(one, Ref) and isinstance(other, Ref):
            order = [
                graph.of(node, other if node.op == "rsub" else one),
                graph.of(node, one if node.op == "rsub" else other),
            ]
            graph.compute(node, kind, order, {}, joint(graph, node, order))
            return
        x, number, how = (one, other, scaled) if isinstance(one, Ref) else (other, one, turned)
        if not how or not isinstance(number, (int, float)):
            graph.refuse(node, "takes something that is no tensor and no number")
        held = graph.of(node, x)
        scale, shift = how(number)
        graph.compute(node, "affine", [held], {"scale": scale, "shift": shift}, held.batch)

    return translate


def addcmul(graph: Graph, node: Node) -> None:
    """x + y * z."""
    only(graph, node, "value", (1,))
    x, y, z = (graph.value(node, name) for name in ("self", "tensor1", "tensor2"))
    batch = joint(graph, node, [x, y, z])
    rank = max(len(y.shape), len(z.shape))
    product = graph.add("mul", [graph.step_of(y), graph.step_of(z)], {}, f"{graph.name_of(node)}_product")
    own = None if y.batch is None and z.batch is None else batch
    outer = next((held.outer for held in (y, z) if held.batch is not None), 1)
    if len({held.outer for held in (y, z) if held.batch is not None}) > 1:
        graph.refuse_mixing(node)
    between = Held(graph.out(node)[-rank:], own, product, outer=outer)
    graph.compute(node, "add", [x, between], {}, batch)


def pool(kind: str) -> Translate:
    """Pooling of (n, c, h, w) with windows."""

    def translate(graph: Graph, node: Node) -> None:
        x = graph.value(node, "self")
        leading(graph, node, x)
        if len(x.shape) != 4:
            graph.refuse(node, "is for something other than pictures")
        kernel = _two(node.get("kernel_size"), 2)
        options: dict[str, Any] = {"kernel_size": kernel, "stride": _two(node.get("stride") or kernel, 2)}
        options |= {"padding": _two(node.get("padding", [0]), 2), "ceil_mode": bool(node.get("ceil_mode", False))}
        if kind == "MaxPool2d":
            options["dilation"] = _two(node.get("dilation", [1]), 2)
        else:
            options["count_include_pad"] = bool(node.get("count_include_pad", True))
            options["divisor_override"] = node.get("divisor_override")
        graph.compute(node, kind, [x], options, 0)

    return translate


def adaptive(kind: str) -> Translate:
    """Pooling of (n, c, h, w) to a fixed size."""

    def translate(graph: Graph, node: Node) -> None:
        x = graph.value(node, "self")
        leading(graph, node, x)
        if len(x.shape) != 4 or None in node.get("output_size"):
            graph.refuse(node, "is for something other than pictures")
        graph.compute(node, kind, [x], {"output_size": _two(node.get("output_size"), 2)}, 0)

    return translate


def dropout(kind: str) -> Translate:
    """Dropout, which does nothing until it is trained."""

    def translate(graph: Graph, node: Node) -> None:
        x = graph.value(node, "input")
        graph.compute(node, kind, [x], {"p": node.get("p", 0.5)}, x.batch)

    return translate
