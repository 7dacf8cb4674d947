"""Steps for the operations of an ATen graph, by a written list; every other operation is refused by its name.

Operations that carry stored tensors become layers (convolution, batch norm, linear), so that the network is an
ordinary one to train and fold; operations that change a tensor in place become ones that do not, where nothing still
reads the old values. Numbers are float32 throughout: conversions between kinds of floating point are left out.
Not covered: loops, branches, indexing by tensors, random numbers, several outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from regraft.errors import ReaderError
from regraft.operations import INPUT, Network, Operations
from regraft.readers.exported import layers, shapes
from regraft.readers.exported.graph import INSTEAD, Graph, Held, Node, Ref, Translate


@dataclass(frozen=True)
class Exported:
    """used: names of the stored tensors that a step took."""

    operations: Operations
    tensors: dict[str, torch.Tensor]
    used: frozenset[str]
    input_shape: tuple[int, ...] | None


def to_operations(program: Mapping[str, Any], stored: Mapping[str, torch.Tensor], origin: str) -> Exported:
    """The exported program as steps, and its tensors by the names of these.

    Raises ReaderError for what is not on the list; for JSON that is not as torch.export writes it whatever kind of
    error comes of that.
    """
    module = program["graph_module"]
    graph = Graph(origin, module["graph"], stored)
    entry = _inputs(graph, module["signature"]["input_specs"])
    output = _output(graph, module["signature"]["output_specs"])
    last = _last_uses(graph.nodes, output)
    roots: dict[str, str] = {}
    for i, node in enumerate(graph.nodes):
        _translate(graph, node)
        _follow_writes(graph, node, i, roots, last)
    held = graph.held.get(output)
    if held is None or held.step is None or held.batch != 0 or held.outer != 1:
        raise ReaderError(f"{origin} must end in one row for every picture; it does not: {INSTEAD}.")
    operations = Operations(tuple(graph.steps), held.step)
    shape = graph.shapes[entry]
    _try(operations, shape, graph.shapes[output], graph)
    known = tuple(size for size in shape[1:] if size is not None)
    return Exported(operations, graph.tensors, frozenset(graph.owner), known if len(known) + 1 == len(shape) else None)


def _inputs(graph: Graph, specs: Sequence[Mapping[str, Any]]) -> str:
    """Note what the graph starts from; returns the name of the input."""
    entries: list[str] = []
    for spec in specs:
        ((kind, about),) = spec.items()
        arg = about.get("arg", {})
        if kind == "user_input":
            if "as_tensor" not in arg:
                raise ReaderError(f"{graph.origin} must take one batch of pictures; it takes more: {INSTEAD}.")
            entries.append(str(arg["as_tensor"]["name"]))
        elif kind in ("parameter", "buffer", "tensor_constant"):
            name = str(about[f"{kind}_name"])
            if name in graph.stored:
                graph.held[str(arg["name"])] = Held(tuple(graph.stored[name].shape), stored=name)
                graph.trained |= {name} if kind == "parameter" else set()
        elif kind != "token":
            raise ReaderError(f"{graph.origin} must be made of tensors; it takes a {kind[:30]}: {INSTEAD}.")
    if len(entries) != 1:
        raise ReaderError(f"{graph.origin} must take one batch of pictures; it takes {len(entries)} inputs: {INSTEAD}.")
    shape = graph.shapes[entries[0]]
    graph.batch = shape[0]
    graph.held[entries[0]] = Held(shape, 0, INPUT)
    return entries[0]


def _output(graph: Graph, specs: Sequence[Mapping[str, Any]]) -> str:
    kinds = [next(iter(spec)) for spec in specs]
    if "buffer_mutation" in kinds:
        raise ReaderError(f"{graph.origin} must be exported for use; it counts batches: export after `model.eval()`.")
    if kinds != ["user_output"] or "as_tensor" not in specs[0]["user_output"]["arg"]:
        raise ReaderError(f"{graph.origin} must give one tensor; it gives {len(kinds)} outputs: {INSTEAD}.")
    return str(specs[0]["user_output"]["arg"]["as_tensor"]["name"])


def _translate(graph: Graph, node: Node) -> None:
    if not node.outputs:
        return  # sizes and assertions
    op = node.op[:-1] if node.op.endswith("_") and not node.op.endswith("__") else node.op
    if op not in STEPS:
        graph.refuse(node, "is not on its list")
    STEPS[op](graph, node)


def _last_uses(nodes: Sequence[Node], output: str) -> dict[str, int]:
    """For every value the place of the last node that reads it."""
    last: dict[str, int] = {}
    for i, node in enumerate(nodes):
        for argument in node.arguments.values():
            for one in argument if isinstance(argument, list) else [argument]:
                if isinstance(one, Ref):
                    last[one.name] = i
    return {**last, output: len(nodes)}


def _follow_writes(graph: Graph, node: Node, place: int, roots: dict[str, str], last: Mapping[str, int]) -> None:
    """Let a value that was written into be what it became; refuse where another view of it is read afterwards."""
    first = next(iter(node.arguments.values()), None)
    if not isinstance(first, Ref) or not node.outputs:
        return
    writes = node.op.endswith("_") and not node.op.endswith("__") and node.op != "detach_"
    if writes or node.op in VIEWS:
        root = roots.setdefault(first.name, first.name)
        roots.update(dict.fromkeys(node.outputs, root))
    if not writes:
        return
    if graph.held[first.name].stored is not None or graph.held[first.name].step == INPUT:
        graph.refuse(node, "writes into what the network keeps or is given", "export after `model.eval()`")
    views = [n for n, root in roots.items() if root == roots[first.name] and n not in (first.name, *node.outputs)]
    if any(last.get(name, -1) > place for name in views):
        graph.refuse(node, "writes into a tensor of which other views are read later")
    graph.held[first.name] = graph.held[node.outputs[0]]


def _try(operations: Operations, taken: Sequence[int | None], given: Sequence[int | None], graph: Graph) -> None:
    """Run the steps on shapes alone, for as many pictures as were exported and for more."""
    if None in taken[1:]:
        return
    first = graph.batch or 2
    try:
        with torch.device("meta"):
            network = Network(operations).eval()
            for count in (first, first + 1):
                found = tuple(network(torch.empty(count, *(int(s or 0) for s in taken[1:]))).shape)
                if found[0] * first != count * (given[0] or first) or found[1:] != tuple(given[1:]):
                    raise ReaderError(f"{found} comes out for {count} pictures")
    except (RuntimeError, ReaderError, TypeError, ValueError, IndexError, NotImplementedError) as e:
        reason = next(iter(str(e).splitlines()), "")[:160]
        raise ReaderError(
            f"{graph.origin} must describe a network that runs; it does not ({reason}): {INSTEAD}."
        ) from e


STEPS: dict[str, Translate] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv_transpose2d", "convolution"), layers.convolution),
    **dict.fromkeys(
        ("batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training"), layers.batch_norm
    ),
    **dict.fromkeys(("layer_norm", "native_layer_norm"), layers.layer_norm),
    **dict.fromkeys(("group_norm", "native_group_norm"), layers.group_norm),
    **dict.fromkeys(("matmul", "mm", "bmm"), layers.matmul),
    "instance_norm": layers.instance_norm,
    "linear": layers.linear,
    "addmm": layers.addmm,
    "prelu": layers.prelu,
    "_prelu_kernel": layers.prelu,
    "scaled_dot_product_attention": layers.attention,
    "relu": layers.alone("ReLU"),
    "relu6": layers.alone("ReLU6"),
    "silu": layers.alone("SiLU"),
    "sigmoid": layers.alone("Sigmoid"),
    "tanh": layers.alone("Tanh"),
    "hardswish": layers.alone("Hardswish"),
    "hardsigmoid": layers.alone("Hardsigmoid"),
    "mish": layers.alone("Mish"),
    "selu": layers.alone("SELU"),
    "elu": layers.elu,
    "hardtanh": layers.hardtanh,
    "gelu": layers.with_options("GELU", {"approximate": "approximate"}, approximate="none"),
    "leaky_relu": layers.with_options("LeakyReLU", {"negative_slope": "negative_slope"}, negative_slope=0.01),
    "softplus": layers.with_options("Softplus", {"beta": "beta", "threshold": "threshold"}, beta=1, threshold=20),
    **dict.fromkeys(("softmax", "_softmax"), layers.softmax("Softmax")),
    **dict.fromkeys(("log_softmax", "_log_softmax"), layers.softmax("LogSoftmax")),
    **{name: layers.alone(name) for name in ("abs", "erf", "exp", "log", "neg", "rsqrt", "sqrt")},
    "pow": layers.with_options("pow", {"exponent": "exponent"}),
    "clamp": layers.with_options("clamp", {"min": "min", "max": "max"}),
    "clamp_min": layers.with_options("clamp", {"min": "min"}),
    "add": layers.binary("add", lambda c: (1.0, c), lambda c: (1.0, c)),
    "sub": layers.binary("sub", lambda c: (1.0, -c), lambda c: (-1.0, c)),
    "rsub": layers.binary("sub", lambda c: (-1.0, c)),
    "mul": layers.binary("mul", lambda c: (c, 0.0), lambda c: (c, 0.0)),
    "div": layers.binary("div", lambda c: (1.0 / c, 0.0)),
    "maximum": layers.binary("maximum"),
    "minimum": layers.binary("minimum"),
    **dict.fromkeys(("max_pool2d", "max_pool2d_with_indices"), layers.pool("MaxPool2d")),
    "avg_pool2d": layers.pool("AvgPool2d"),
    **dict.fromkeys(("adaptive_avg_pool2d", "_adaptive_avg_pool2d"), layers.adaptive("AdaptiveAvgPool2d")),
    "adaptive_max_pool2d": layers.adaptive("AdaptiveMaxPool2d"),
    "mean": shapes.reduction("mean"),
    "amax": shapes.reduction("amax"),
    "sum": shapes.reduction("sum"),
    **dict.fromkeys(("view", "reshape", "view_as", "reshape_as", "_unsafe_view", "unflatten"), shapes.reshape),
    "flatten": shapes.flatten,
    "permute": shapes.permute,
    "transpose": shapes.transpose,
    "t": shapes.transpose,
    "unsqueeze": shapes.unsqueeze,
    "squeeze": shapes.squeeze,
    "select": shapes.select,
    "slice": shapes.slice_axis,
    **dict.fromkeys(("expand", "expand_as"), shapes.expand),
    "addcmul": layers.addcmul,
    **dict.fromkeys(("split", "split_with_sizes", "chunk"), shapes.split),
    "unbind": shapes.unbind,
    "as_strided": shapes.as_strided,
    "index": shapes.index,
    "roll": shapes.roll,
    "cat": shapes.cat,
    "stack": shapes.stack,
    "einsum": layers.einsum,
    "linalg_vector_norm": shapes.vector_norm,
    **dict.fromkeys(("var", "var_mean"), shapes.variance),
    "pixel_shuffle": layers.shuffle("pixel_shuffle", "upscale_factor"),
    "pixel_unshuffle": layers.shuffle("pixel_unshuffle", "downscale_factor"),
    **{f"upsample_{mode}2d": layers.upsample(mode) for mode in ("nearest", "bilinear", "bicubic")},
    "_upsample_nearest_exact2d": layers.upsample("nearest-exact"),
    "dropout": layers.dropout("Dropout"),
    "feature_dropout": layers.dropout("Dropout2d"),
    **dict.fromkeys(("clone", "contiguous", "alias", "detach", "lift_fresh_copy", "_to_copy", "to"), shapes.same),
    **dict.fromkeys(("pad", "constant_pad_nd"), shapes.pad),
}
"""How each operation of ATen is turned into steps."""
VIEWS = frozenset(
    (
        *("view", "reshape", "flatten", "unflatten", "permute", "transpose", "t", "unsqueeze", "squeeze", "select"),
        *(
            "view_as",
            "reshape_as",
            "as_strided",
            "slice",
            "expand",
            "expand_as",
            "split",
            "split_with_sizes",
            "chunk",
            "unbind",
        ),
        *("alias", "detach", "contiguous", "to", "dropout"),
    )
)
"""Operations whose result may share memory with what they are given."""
