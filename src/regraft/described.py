"""A network written in Python as a list of operations, so that a saved model can be opened without its code.

Only what the written list of operations can say is turned over, and only when the result computes the same; anything
else stays a module that its owner builds again.

Knows graphs and operations. Not covered: networks whose layers are functions of their own, and sizes that are
computed, except the batch size in a `view`.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from regraft.errors import ReaderError
from regraft.graph import Trace
from regraft.operations import INPUT, LAYERS, Network, Operation, Operations, build

ACTIVATIONS: dict[Callable[..., Any] | str, type[nn.Module]] = {
    torch.relu: nn.ReLU,
    F.relu: nn.ReLU,
    "relu": nn.ReLU,
    torch.sigmoid: nn.Sigmoid,
    "sigmoid": nn.Sigmoid,
    torch.tanh: nn.Tanh,
    "tanh": nn.Tanh,
    F.elu: nn.ELU,
    F.selu: nn.SELU,
    torch.selu: nn.SELU,
    F.silu: nn.SiLU,
    F.mish: nn.Mish,
    F.gelu: nn.GELU,
    F.leaky_relu: nn.LeakyReLU,
    F.hardswish: nn.Hardswish,
    F.hardsigmoid: nn.Hardsigmoid,
    F.softplus: nn.Softplus,
    F.dropout: nn.Dropout,
    F.max_pool2d: nn.MaxPool2d,
    torch.max_pool2d: nn.MaxPool2d,
    F.avg_pool2d: nn.AvgPool2d,
    F.adaptive_avg_pool2d: nn.AdaptiveAvgPool2d,
    F.softmax: nn.Softmax,
    torch.softmax: nn.Softmax,
    F.log_softmax: nn.LogSoftmax,
    torch.log_softmax: nn.LogSoftmax,
    torch.flatten: nn.Flatten,
    "flatten": nn.Flatten,
}
"""Functions and methods of a tensor, and the layers that do the same with the same arguments."""
ARITHMETIC: dict[Callable[..., Any] | str, str] = {
    **dict.fromkeys((operator.add, operator.iadd, torch.add), "add"),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul), "mul"),
    **dict.fromkeys((operator.sub, torch.sub), "sub"),
    **dict.fromkeys((operator.truediv, torch.div), "div"),
}


def as_operations(trace: Trace, example: torch.Tensor) -> Network | None:
    """The traced network rebuilt from operations with the same tensors, None where that cannot be said or differs.

    example: (n, ...) float32, on which both must give equal outputs within 1e-5.
    """
    try:
        steps = _steps(trace)
        state = trace.module.state_dict()
        network = build(steps)
        network = build(steps, {name: state[name] for name in network.state_dict()})
    except (ReaderError, KeyError, NotSayable):
        return None
    with torch.no_grad():
        ours, theirs = network(example), trace.module.eval()(example)
    same = isinstance(theirs, torch.Tensor) and ours.shape == theirs.shape and torch.allclose(ours, theirs, atol=1e-5)
    return network if same else None


class NotSayable(Exception):
    """A node that the list of operations has no word for."""


def _steps(trace: Trace) -> Operations:
    names: dict[fx.Node, str] = {}
    steps: list[Operation] = []
    output = ""
    for node in trace.graph.nodes:
        if node.op == "placeholder":
            names.setdefault(node, INPUT)
        elif node.op == "output":
            (result,) = node.args
            output = names[result]
        elif not _is_mode(node) and not _is_batch_size(node) and any(_holds(user) for user in node.users):
            step = _step(trace, node, names)
            names[node] = step.name
            steps.append(step)
    return Operations(tuple(steps), output)


def _is_mode(node: fx.Node) -> bool:
    return node.op == "get_attr" and str(node.target).rpartition(".")[2] == "training"


def _holds(user: fx.Node) -> bool:
    """Whether a user takes the value itself and not just its size."""
    return not (user.op == "call_function" and user.target is getattr)


def _step(trace: Trace, node: fx.Node, names: dict[fx.Node, str]) -> Operation:
    if node.op == "call_module":
        path = str(node.target)
        layer = trace.module.get_submodule(path)
        return Operation(path, type(layer).__name__, _inputs(node.args, names), _options(layer))
    if node.op == "get_attr":
        path = str(node.target)
        value = trace.module.state_dict()[path]
        kind = "parameter" if path in dict(trace.module.named_parameters()) else "buffer"
        return Operation(path, kind, (), {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")})
    target = node.target
    if target in ACTIVATIONS:
        return Operation(node.name, ACTIVATIONS[target].__name__, _inputs(node.args[:1], names), _called(node))
    if target in ARITHMETIC and all(isinstance(a, fx.Node) for a in node.args):
        return Operation(node.name, ARITHMETIC[target], _inputs(node.args, names))
    if target in ("view", "reshape"):
        first, *sizes = node.args
        if len(sizes) == 1 and isinstance(sizes[0], tuple | list):
            sizes = list(sizes[0])
        shape = [0 if isinstance(s, fx.Node) and _is_batch_size(s) else s for s in sizes]
        if all(isinstance(s, int) for s in shape):
            return Operation(node.name, "reshape", _inputs((first,), names), {"shape": shape})
    if target in ("mean", torch.mean):
        dim, keep = (*node.args[1:], *node.kwargs.values(), False)[:2]
        dims = [dim] if isinstance(dim, int) else list(dim)  # type: ignore[arg-type]
        return Operation(node.name, "mean", _inputs(node.args[:1], names), {"dim": dims, "keepdim": bool(keep)})
    if target in (torch.cat, torch.concat):
        tensors, *rest = node.args
        dim = rest[0] if rest else node.kwargs.get("dim", 0)
        return Operation(node.name, "concat", _inputs(tuple(tensors), names), {"dim": dim})  # type: ignore[arg-type]
    raise NotSayable(node.format_node())


def _inputs(arguments: tuple[Any, ...], names: dict[fx.Node, str]) -> tuple[str, ...]:
    if not all(isinstance(a, fx.Node) and a in names for a in arguments):
        raise NotSayable(str(arguments))
    return tuple(names[a] for a in arguments)


def _options(layer: nn.Module) -> dict[str, Any]:
    """The arguments that make such a layer, read off its attributes."""
    if LAYERS.get(type(layer).__name__) is not type(layer):
        raise NotSayable(type(layer).__name__)
    options: dict[str, Any] = {}
    for name, parameter in inspect.signature(type(layer)).parameters.items():
        if name in ("device", "dtype", "inplace", "padding_mode") or parameter.kind is parameter.VAR_POSITIONAL:
            continue
        value = getattr(layer, name, parameter.default)
        value = value is not None if name == "bias" else value
        value = list(value) if isinstance(value, tuple) else value
        if not isinstance(value, bool | int | float | str | list | None):
            raise NotSayable(f"{type(layer).__name__}.{name}")
        options[name] = value
    if getattr(layer, "padding_mode", "zeros") != "zeros":
        raise NotSayable("padding_mode")
    return options


def _called(node: fx.Node) -> dict[str, Any]:
    """The arguments of a function as options of the layer that does the same."""
    layer = ACTIVATIONS[node.target]
    order = [name for name in inspect.signature(layer).parameters if name not in ("device", "dtype")]
    given = dict(zip(order, node.args[1:], strict=False)) | dict(node.kwargs)
    known = {k: v for k, v in given.items() if k in order and k != "inplace"}
    if layer is nn.Flatten:
        known = {"start_dim": given.get("start_dim", 0), "end_dim": given.get("end_dim", -1)}
    if layer is nn.Dropout:
        known = {"p": given.get("p", 0.5)}
    if any(isinstance(v, fx.Node) for v in known.values()):
        raise NotSayable(node.format_node())
    return {k: list(v) if isinstance(v, tuple) else v for k, v in known.items()}


def _is_batch_size(node: fx.Node) -> bool:
    """x.size(0), x.shape[0], and the shape that it is taken of."""
    if node.op == "call_method" and node.target == "size":
        return node.args[1:] == (0,)
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] == "shape" and all(_is_batch_size(user) for user in node.users)
    return node.op == "call_function" and node.target is operator.getitem and bool(node.args[1] == 0)
