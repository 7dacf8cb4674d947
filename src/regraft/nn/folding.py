"""Fold batch normalisation into the layer before or after it, after training.

    gamma (W x + b - mu) / sigma + beta  =  (gamma W / sigma) x  +  gamma (b - mu) / sigma + beta
    W (gamma (x - mu) / sigma + beta) + b  =  (W gamma / sigma) x  +  W (beta - gamma mu / sigma) + b

Back: a norm in evaluation mode whose only input is a convolution or linear layer that nothing else uses. Forward: one
that only a linear layer, or a convolution without padding, reads, and so the layer that standardises inputs. Not
covered: norms before a padded convolution, layers or norms used twice, transposed convolutions, weights that are made
from others (weight norm, standardised weights); `unfolded` lists them.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx, nn

from regraft.nn.standardise import Standardise

Norm = nn.BatchNorm1d | nn.BatchNorm2d
Scaling = Norm | Standardise
Layer = nn.Conv1d | nn.Conv2d | nn.Linear
FAR_OFF = 6e-6
"""The most that folding forward may lose of an input of deviation 1."""


def fold_batchnorm(
    module: nn.Module, graph: fx.Graph | None = None, *, example: torch.Tensor | None = None
) -> nn.Module:
    """A copy of a module in evaluation mode without the batch norms that can be folded; outputs agree within 1e-5.

    graph: what the module computes, from the caller's trace; without it plain torch.fx traces the module, and raises
        where it cannot.
    example: an input. BatchNorm1d normalises axis 1, which holds a linear layer's outputs only in tensors of rank 2;
        without an example, linear layers keep their norms unless rows are all that the module can take.

    A norm that also applies an activation (timm's BatchNormAct2d) leaves that in its place.

        >>> fold_batchnorm(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).eval())[1]
        Identity()
    """
    folded, graph = _copied(module, graph)
    plan = _plan(folded, graph, example)
    for path, fold in plan.folds.items():
        (_fold_back if fold.back else _fold_forward)(fold.layer, fold.norm)
        _replace(folded, path, _what_remains(fold.norm))
    return folded


def unfolded(
    module: nn.Module, graph: fx.Graph | None = None, *, example: torch.Tensor | None = None
) -> dict[str, str]:
    """The norms that `fold_batchnorm` leaves in the module, by path, and why; arguments as there."""
    return dict(_plan(*_copied(module, graph), example).left)


@dataclass(frozen=True)
class _Fold:
    """A norm and the layer that takes it up, which stands before it (`back`) or after it."""

    layer: Layer
    norm: Scaling
    back: bool


@dataclass(frozen=True)
class _Plan:
    """What is folded and what is left and why, by the path of the norm."""

    folds: dict[str, _Fold]
    left: dict[str, str]


def _copied(module: nn.Module, graph: fx.Graph | None) -> tuple[nn.Module, fx.Graph]:
    folded = copy.deepcopy(module)
    if graph is not None:
        return folded, graph
    return folded, _Tracer().trace(folded)


class _Tracer(fx.Tracer):
    """Keeps the layer that standardises inputs in one piece."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Standardise) or super().is_leaf_module(m, module_qualified_name)


def _plan(module: nn.Module, graph: fx.Graph, example: torch.Tensor | None) -> _Plan:
    called = {n: module.get_submodule(str(n.target)) for n in graph.nodes if n.op == "call_module"}
    calls = Counter(called.values())
    read = {str(n.target).rpartition(".")[0] for n in graph.nodes if n.op == "get_attr"}
    flat = _with_rows(module, [layer for layer in called.values() if isinstance(layer, nn.Linear)], example)
    plan = _Plan({}, {})

    def neighbour(node: object) -> Layer | None:
        """The layer that a node calls, if it may be changed."""
        layer = called.get(node) if isinstance(node, fx.Node) else None
        if not isinstance(layer, Layer) or calls[layer] > 1 or (isinstance(layer, nn.Linear) and layer not in flat):
            return None
        shared = isinstance(node, fx.Node) and str(node.target) in read
        return layer if not shared and uses_weights_plainly(layer) else None

    for node, norm in called.items():
        path = str(node.target)
        if not isinstance(norm, Scaling):
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                plan.left[path] = f"a {type(norm).__name__} is not folded"
            continue
        alone = calls[norm] == 1 and path not in read and len(node.args) == 1 and not node.kwargs
        why = _unusable(norm) or ("" if alone else "it is used in several places")
        if why:
            plan.left[path] = why
            continue
        before = node.args[0]
        source = neighbour(before) if isinstance(before, fx.Node) and len(before.users) == 1 else None
        target = neighbour(_reader(node, called))
        if source is not None and not isinstance(norm, Standardise) and _outputs(source) == _width(norm):
            plan.folds[path] = _Fold(source, norm, back=True)
        elif target is not None and _takes(target, norm) and _is_far_off(norm, target.weight.dtype):
            plan.left[path] = "its means lie far from 0, and digits would be lost"
        elif target is not None and _takes(target, norm) and isinstance(_what_remains(norm), nn.Identity):
            plan.folds[path] = _Fold(target, norm, back=False)
        else:
            plan.left[path] = "neither the layer before it nor the one after it can take it up alone"
    return plan


def _reader(node: fx.Node, called: dict[fx.Node, nn.Module]) -> fx.Node | None:
    """What alone reads the output, past layers that do nothing in evaluation."""
    while len(node.users) == 1:
        (node,) = node.users
        if not isinstance(called.get(node), nn.Dropout | nn.AlphaDropout | nn.Identity):
            return node
    return None


def _width(norm: Scaling) -> int:
    return norm.features if isinstance(norm, Standardise) else norm.num_features


def _outputs(layer: Layer) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def _takes(layer: Layer, norm: Scaling) -> bool:
    """Whether what the norm adds reaches every place of the layer's input; padding would be zeros beside it."""
    if isinstance(layer, nn.Linear):
        return layer.in_features == _width(norm)
    padded = layer.padding != "valid" if isinstance(layer.padding, str) else any(layer.padding)
    return layer.in_channels == _width(norm) and not padded


def _is_far_off(norm: Scaling, dtype: torch.dtype) -> bool:
    """Whether mean / deviation is so large that W x / s - W m / s cancels most digits."""
    mean = norm.mean if isinstance(norm, Standardise) else norm.running_mean
    assert mean is not None
    return float((mean.double() / _deviations(norm)).abs().max()) * torch.finfo(dtype).eps > FAR_OFF


def _deviations(norm: Scaling) -> torch.Tensor:
    if isinstance(norm, Standardise):
        return norm.deviation.double()
    assert norm.running_var is not None
    return (norm.running_var.double() + norm.eps).sqrt()


def _unusable(norm: Scaling) -> str:
    """Why a norm is no fixed function of its input, empty where it is one."""
    if norm._forward_hooks or norm._forward_pre_hooks:
        return "it has hooks"
    if isinstance(norm, Standardise):
        return ""
    if norm.training or norm.running_mean is None:
        return "it normalises each batch by itself: it is in training mode or keeps no running statistics"
    return "" if _normalises_plainly(norm) else "it does more than batch norm"


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


def _with_rows(module: nn.Module, layers: Sequence[nn.Linear], example: torch.Tensor | None) -> set[nn.Linear]:
    """The linear layers that put out rows of features, (n, features)."""
    if not layers:
        return set()
    example = _rows_for(module, layers[0]) if example is None else example
    found: set[nn.Linear] = set()
    if example is None:
        return found

    def look(layer: nn.Module, inputs: object, output: torch.Tensor) -> None:
        if output.dim() == 2:
            found.add(layer)  # type: ignore[arg-type]

    hooks = [layer.register_forward_hook(look) for layer in set(layers)]
    try:
        with torch.no_grad():
            module(example)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _rows_for(module: nn.Module, first: nn.Linear) -> torch.Tensor | None:
    """Rows that the module takes, where it takes no sequences of rows, of whatever length its norms allow."""
    widths = {_width(m) for m in module.modules() if isinstance(m, nn.BatchNorm1d | Standardise)}
    weight = first.weight

    def runs(*shape: int) -> bool:
        try:
            with torch.no_grad():
                module(weight.new_zeros(shape))
        except Exception:  # whatever a network raises for inputs that are not its own
            return False
        return True

    if any(runs(2, length, first.in_features) for length in widths) or not runs(2, first.in_features):
        return None
    return weight.new_zeros(2, first.in_features)


def _affine(norm: Scaling) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift of each channel, float64."""
    if isinstance(norm, Standardise):
        scale = 1 / norm.deviation.double()
        return scale, -norm.mean.double() * scale
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.double()


def _fold_back(layer: Layer, norm: Scaling) -> None:
    scale, shift = _affine(norm)
    weight = layer.weight.double()
    bias = 0 if layer.bias is None else layer.bias.double() * scale
    _set(layer, weight * scale.view(-1, *[1] * (weight.dim() - 1)), bias + shift)


def _fold_forward(layer: Layer, norm: Scaling) -> None:
    scale, shift = _affine(norm)
    weight = layer.weight.double()
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    own = (torch.arange(len(weight)) // (len(weight) // groups)).to(scale.device)
    inner = [-1, weight.shape[1], *[1] * (weight.dim() - 2)]  # the channels that each output of a group reads
    scale, shift = (v.view(groups, -1)[own].view(inner) for v in (scale, shift))
    bias = 0 if layer.bias is None else layer.bias.double()
    _set(layer, weight * scale, bias + (weight * shift).flatten(1).sum(1))


def _set(layer: Layer, weight: torch.Tensor, bias: torch.Tensor) -> None:
    old = layer.weight
    layer.weight = nn.Parameter(weight.detach().to(old.dtype), old.requires_grad)
    layer.bias = nn.Parameter(bias.detach().to(old.dtype), old.requires_grad)


def _what_remains(norm: nn.Module) -> nn.Module:
    parts = [getattr(norm, name) for name in ("drop", "act") if isinstance(getattr(norm, name, None), nn.Module)]
    kept = [part for part in parts if not isinstance(part, nn.Identity)]
    return nn.Sequential(*kept) if kept else nn.Identity()


def _replace(module: nn.Module, path: str, new: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, new.eval())
