"""Fold batch normalisation into the layer before it, after training.

    gamma (W x + b - mu) / sigma + beta  =  (gamma W / sigma) x  +  gamma (b - mu) / sigma + beta

Covers a norm in evaluation mode whose only input is a convolution or linear layer with no other user. Not covered:
norms before a convolution, norms used twice, transposed convolutions; they are left as they are.
"""

from __future__ import annotations

import copy
from collections import Counter

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights


def fold_batchnorm(module: nn.Module, graph: fx.Graph | None = None) -> nn.Module:
    """Fold, in place, every batch norm of a module in evaluation mode that can be folded; returns the module.

    graph: what the module computes, from the caller's trace; without it the module is traced with plain torch.fx.
    A norm that also applies an activation (timm's BatchNormAct2d) keeps it. Outputs agree within rounding, 1e-5.
    """
    traced = module if graph is not None else fx.symbolic_trace(module)
    nodes = graph.nodes if graph is not None else traced.graph.nodes  # type: ignore[union-attr]
    uses = Counter(node.target for node in nodes if node.op == "call_module")
    for node in nodes:
        source = node.args[0] if node.op == "call_module" and len(node.args) == 1 else None
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) > 1:
            continue
        norm, layer = traced.get_submodule(node.target), traced.get_submodule(str(source.target))
        if not _foldable(norm, layer) or uses[node.target] > 1 or uses[source.target] > 1:
            continue
        _fold(norm, layer)
        _replace(traced, node.target, _what_remains(norm))
    return traced


def _foldable(norm: nn.Module, layer: nn.Module) -> bool:
    if not isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d) or norm.training or norm.running_mean is None:
        return False
    return isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Linear) and uses_weights_plainly(layer)


def uses_weights_plainly(layer: nn.Module) -> bool:
    """Whether a convolution or linear layer, of a subclass perhaps, gives twice the output for twice its tensors.

    A layer that standardises or normalises its weights first does not; nothing may be folded into it or rounded.
    """
    if type(layer) in (nn.Conv1d, nn.Conv2d, nn.Linear):
        return True
    if not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Linear):
        return False
    if isinstance(layer, nn.Linear):
        x = torch.ones(1, layer.in_features)
    else:
        reach = (d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
        x = torch.ones(1, layer.in_channels, *reach)
    double = copy.deepcopy(layer).float().cpu()
    with torch.no_grad():
        once = double(x)
        for parameter in double.parameters():
            parameter.mul_(2)
        return torch.allclose(double(x), 2 * once)


def _fold(norm: nn.Module, layer: nn.Module) -> None:
    fuse = fuse_linear_bn_weights if isinstance(layer, nn.Linear) else fuse_conv_bn_weights
    layer.weight, layer.bias = fuse(
        layer.weight, layer.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )  # type: ignore[arg-type]
    for parameter in (layer.weight, layer.bias):
        parameter.requires_grad_(False)


def _what_remains(norm: nn.Module) -> nn.Module:
    parts = [getattr(norm, name) for name in ("drop", "act") if isinstance(getattr(norm, name, None), nn.Module)]
    kept = [part for part in parts if not isinstance(part, nn.Identity)]
    return nn.Sequential(*kept) if kept else nn.Identity()


def _replace(module: nn.Module, path: str, new: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, new.eval())


