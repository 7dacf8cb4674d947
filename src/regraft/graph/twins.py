"""Modules that share tensors with another module, yet have a mode of their own.

A twin holds the very parameters and buffers of the original, so training one trains the other, and their names in
`state_dict` are equal. Its `training` flags and hooks are its own: `.eval()` on one part of a network must not
silence the dropout of another part that happens to hold the same layer. `runnable` makes a module of a graph that way.

Knows tensors and module trees, not cuts. Not covered: scripted modules cannot be doubled and are used as they are.
A buffer that the graph reads directly (not through its layer) does not follow the original to another device: move
the network first, then cut it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import fx, nn


def twin(module: nn.Module) -> nn.Module:
    """A module tree of the same classes on the same tensors, in the same mode; a layer that occurs twice stays one."""
    return _twin(module, {})


def runnable(graph: fx.Graph, module: nn.Module, constants: Mapping[str, object]) -> nn.Module:
    """A module that runs `graph` on twins of the layers, parameters and buffers of `module` that the graph uses.

    `constants` holds what the graph reads under names that `module` does not have.
    """
    part = _Part()
    part.training = module.training
    known: dict[int, nn.Module] = {}
    nodes = list(graph.nodes)
    for target in sorted({str(n.target) for n in nodes if n.op == "call_module"}, key=lambda t: (t.count("."), t)):
        _install_layer(part, module, target, known)
    for target in sorted({str(n.target) for n in nodes if n.op == "get_attr"}):
        _install_value(part, module, target, constants)
    code = graph.python_code("self")
    names = dict(code.globals)
    exec(compile(code.src, f"<regraft: part of {type(module).__name__}>", "exec", dont_inherit=True), names)
    part.run = names["forward"]
    part.code = code.src
    part.graph = graph
    return part


class _Part(nn.Module):
    """Some operations of a network; `code` is their source, in which `self` stands for this module."""

    run: Callable[..., Any]
    code: str
    graph: fx.Graph

    def forward(self, x: torch.Tensor) -> Any:
        return self.run(self, x)

    def extra_repr(self) -> str:
        return f"{self.code.count(chr(10))} lines of code"


def _twin(module: nn.Module, known: dict[int, nn.Module]) -> nn.Module:
    """Shares the dictionaries of parameters and buffers themselves, so that `.to(device)` on one moves both."""
    if isinstance(module, torch.jit.ScriptModule):
        return module
    if id(module) in known:
        return known[id(module)]
    double = known[id(module)] = module.__class__.__new__(module.__class__)
    double.__dict__.update({key: value.copy() if "_hooks" in key else value for key, value in module.__dict__.items()})
    for key, value in module.__dict__.items():
        if isinstance(value, MethodType) and value.__self__ is module:  # a `forward` replaced on the instance
            double.__dict__[key] = MethodType(value.__func__, double)
    double.__dict__["_modules"] = {
        name: child if child is None else _twin(child, known) for name, child in module._modules.items()
    }
    return double


def _install_layer(part: nn.Module, module: nn.Module, target: str, known: dict[int, nn.Module]) -> None:
    holder, owner, name = _holder(part, module, target)
    if name not in holder._modules:
        holder.add_module(name, _twin(owner._modules[name], known))  # type: ignore[arg-type]


def _install_value(part: nn.Module, module: nn.Module, target: str, constants: Mapping[str, object]) -> None:
    """A parameter, a buffer, a mode, or a tensor that `forward` made by itself; the last moves with the part."""
    holder, owner, name = _holder(part, module, target)
    value = constants[target] if target in constants else getattr(owner, name)
    if name == "training" or hasattr(holder, name):
        return
    if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
        kept = name in owner._buffers and name not in owner._non_persistent_buffers_set
        holder.register_buffer(name, value, persistent=kept)
    else:
        setattr(holder, name, value)


def _holder(part: nn.Module, module: nn.Module, target: str) -> tuple[nn.Module, nn.Module, str]:
    """The submodule of `part` that holds the last name of a dotted path, and its counterpart in `module`.

    Missing ones are made, empty and in the mode of the original: the graph may read that mode.
    """
    *above, name = target.split(".")
    for step in above:
        module = module.get_submodule(step)
        if step not in part._modules:
            part.add_module(step, _Empty(module.training))
        part = part.get_submodule(step)
    return part, module, name


class _Empty(nn.Module):
    """Holds what is left of a module that the graph runs step by step: its mode and the tensors used directly."""

    def __init__(self, training: bool) -> None:
        super().__init__()
        self.training = training
