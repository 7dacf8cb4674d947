"""Fold batch normalisation into the layer before it, after training.

    gamma (W x + b - mu) / sigma + beta  =  (gamma W / sigma) x  +  gamma (b - mu) / sigma + beta

Covers a norm in evaluation mode whose only input is a convolution or linear layer that nothing else uses. Not covered:
norms before a convolution, layers or norms used twice, transposed convolutions, weights that are made from others
(weight norm, standardised weights); they are left as they are.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import fx, nn

Norm = nn.BatchNorm1d | nn.BatchNorm2d
Layer = nn.Conv1d | nn.Conv2d | nn.Linear


def fold_batchnorm(
    module: nn.Module, graph: fx.Graph | None = None, *, example: torch.Tensor | None = None
) -> nn.Module:
    """A copy of a module in evaluation mode without the batch norms that can be folded; outputs agree within 1e-5.

    graph: what the module computes, from the caller's trace; without it plain torch.fx traces the module, and raises
        where it cannot.
    example: an input. Without it linear layers keep their norms: BatchNorm1d normalises axis 1, which holds the
        layer's outputs only in tensors of rank 2.

    A norm that also applies an activation (timm's BatchNormAct2d) leaves that in its place.

        >>> fold_batchnorm(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).eval())[1]
        Identity()
    """
    folded = copy.deepcopy(module)
    if graph is None:
        folded = fx.symbolic_trace(folded)
        graph = folded.graph
    pairs = _pairs(folded, graph)
    flat = _with_rows(folded, {layer for layer, _ in pairs.values() if isinstance(layer, nn.Linear)}, example)
    for path, (layer, norm) in pairs.items():
        if not isinstance(layer, nn.Linear) or layer in flat:
            _fold(layer, norm)
            _replace(folded, path, _what_remains(norm))
    return folded


def _pairs(module: nn.Module, graph: fx.Graph) -> dict[str, tuple[Layer, Norm]]:
    """The layers and norms that belong together, by the path of the norm."""
    called = {n: module.get_submodule(str(n.target)) for n in graph.nodes if n.op == "call_module"}
    calls = Counter(called.values())
    read = {str(n.target).rpartition(".")[0] for n in graph.nodes if n.op == "get_attr"}
    found = {}
    for node, norm in called.items():
        source = node.args[0] if len(node.args) == 1 and not node.kwargs else None
        layer = called.get(source) if isinstance(source, fx.Node) and len(source.users) == 1 else None
        if not isinstance(layer, Layer) or not isinstance(norm, Norm) or calls[norm] > 1 or calls[layer] > 1:
            continue
        if not {str(node.target), str(node.all_input_nodes[0].target)} & read and _foldable(layer, norm):
            found[str(node.target)] = (layer, norm)
    return found


def _foldable(layer: Layer, norm: Norm) -> bool:
    if norm.training or norm.running_mean is None or norm._forward_hooks or norm._forward_pre_hooks:
        return False
    outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    return norm.num_features == outputs and uses_weights_plainly(layer) and _normalises_plainly(norm)


def uses_weights_plainly(layer: nn.Module) -> bool:
    """Whether a convolution or linear layer, of a subclass perhaps, is linear in its own weight and bias.

    One that standardises its weights, makes them from others or goes on with an activation is not; nothing may be
    folded into it or rounded.
    """
    if not isinstance(layer, Layer) or layer._forward_hooks or layer._forward_pre_hooks:
        return False
    if {name for name, _ in layer.named_parameters()} - {"weight", "bias"}:
        return False
    if type(layer) in (nn.Conv1d, nn.Conv2d, nn.Linear):
        return True
    changed = copy.deepcopy(layer).float().cpu()
    x = torch.rand(_least_shape(layer), generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            once = changed(x)
            for parameter in changed.parameters():
                parameter.mul_(-2)
            return torch.allclose(changed(x), -2 * once, rtol=1e-4, atol=1e-6)
    except Exception:  # a forward of its own may want other arguments, and is not plain then
        return False


def _least_shape(layer: Layer) -> tuple[int, ...]:
    if isinstance(layer, nn.Linear):
        return 1, layer.in_features
    return 1, layer.in_channels, *(d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True))


def _normalises_plainly(norm: Norm) -> bool:
    """Whether a norm, of a subclass perhaps, gives what batch norm gives, and then what remains of it."""
    if type(norm) in (nn.BatchNorm1d, nn.BatchNorm2d):
        return True
    x = torch.randn(2, norm.num_features, 2, 2, generator=torch.Generator().manual_seed(0))
    x = x if isinstance(norm, nn.BatchNorm2d) else x[..., 0]
    alone = copy.deepcopy(norm).float().cpu()
    with torch.no_grad():
        plain = F.batch_norm(x, alone.running_mean, alone.running_var, alone.weight, alone.bias, eps=alone.eps)
        return torch.equal(alone(x.clone()), _what_remains(alone)(plain))


def _with_rows(module: nn.Module, layers: Collection[nn.Linear], example: torch.Tensor | None) -> set[nn.Linear]:
    """The linear layers that give tensors of rank 2, from one run on the example."""
    if not layers or example is None:
        return set()
    found: set[nn.Linear] = set()

    def look(layer: nn.Module, inputs: object, output: torch.Tensor) -> None:
        if output.dim() == 2:
            found.add(layer)  # type: ignore[arg-type]

    hooks = [layer.register_forward_hook(look) for layer in layers]
    with torch.no_grad():
        module(example)
    for hook in hooks:
        hook.remove()
    return found


def _fold(layer: Layer, norm: Norm) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    weight, bias = layer.weight, layer.bias
    shift = (bias.double() if bias is not None else 0) - norm.running_mean.double()
    shift = shift * scale + (norm.bias.double() if norm.bias is not None else 0)
    folded = weight.double() * scale.view(-1, *[1] * (weight.dim() - 1))
    layer.weight = nn.Parameter(folded.detach().to(weight.dtype), weight.requires_grad)
    layer.bias = nn.Parameter(shift.detach().to(weight.dtype), weight.requires_grad)


def _what_remains(norm: nn.Module) -> nn.Module:
    parts = [getattr(norm, name) for name in ("drop", "act") if isinstance(getattr(norm, name, None), nn.Module)]
    kept = [part for part in parts if not isinstance(part, nn.Identity)]
    return nn.Sequential(*kept) if kept else nn.Identity()


def _replace(module: nn.Module, path: str, new: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, new.eval())
