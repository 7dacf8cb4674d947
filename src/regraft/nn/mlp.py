"""Stacks of dense layers that train: the initializer that suits the activation, norms, dropout, standardised inputs."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from regraft.nn.activations import activation as activation_called
from regraft.nn.initializers import SCHEME_OF, initialize_
from regraft.nn.standardise import Standardise

PLAIN = (nn.Linear, nn.SELU, nn.AlphaDropout, nn.Flatten, nn.Identity, nn.Sequential, Standardise)
NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
APART = 0.1
"""How far the mean and deviation of standardised inputs may lie from 0 and 1."""
VARIANCE = 0.25
"""How far, as a share, the variance of a weight may lie from that of its initializer."""


def mlp(
    sizes: Sequence[int],
    activation: str = "relu",
    *,
    norm: Literal["batch"] | None = None,
    before: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    dropout: float = 0.0,
    standardise: bool = False,
    **options: Any,
) -> nn.Sequential:
    """Dense layers from sizes[0] features to sizes[-1] outputs, without an activation after the last.

    activation: a name of `activation`, options: those of its class; weights begin as suits it.
    norm: `batch` normalises the input and every hidden layer, after its activation or `before` it (that layer then has
        no bias). momentum, eps: in torch's sense, so Keras' momentum 0.99 is 0.01 here.
    dropout: share of hidden units dropped in training, as alpha dropout with SELU.
    standardise: begin with a layer whose mean and deviation are set from training data by its `adapt`; batch norm then
        leaves out the input.

    Layers are called standardise, norm0, hidden1, norm1, act1, drop1, hidden2, ..., output.
    Raises ValueError for fewer than two sizes, and unknown names.

        >>> mlp([784, 300, 100, 10], "selu", standardise=True).standardise.adapt(images.flatten(1))
    """
    if len(sizes) < 2 or min(sizes) < 1:
        raise ValueError(f"Sizes must be at least two numbers above 0; found {list(sizes)}.")
    if norm not in (None, "batch"):
        raise ValueError(f"The norm must be 'batch' or None; found {norm!r}.")
    layers: OrderedDict[str, nn.Module] = OrderedDict()

    def normalised(number: int, width: int) -> None:
        if norm:
            layers[f"norm{number}"] = nn.BatchNorm1d(width, eps=eps, momentum=momentum)

    if standardise:
        layers["standardise"] = Standardise(sizes[0])
    else:
        normalised(0, sizes[0])
    for i, (inputs, width) in enumerate(zip(sizes[:-2], sizes[1:-1], strict=True), 1):
        layers[f"hidden{i}"] = nn.Linear(inputs, width, bias=not (norm and before))
        if before:
            normalised(i, width)
        layers[f"act{i}"] = activation_called(activation, **options)
        if not before:
            normalised(i, width)
        if dropout:
            layers[f"drop{i}"] = nn.AlphaDropout(dropout) if activation == "selu" else nn.Dropout(dropout)
    layers["output"] = nn.Linear(sizes[-2], sizes[-1])
    made = nn.Sequential(layers)
    initialize_(made, activation)
    initialize_(layers["output"], "linear")
    return made


def check_selu(
    module: nn.Module,
    inputs: torch.Tensor | None = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    l1: float = 0.0,
    max_norm: float | None = None,
) -> tuple[str, ...]:
    """Each condition of self-normalisation that does not hold, in a sentence; none, and the stack normalises itself.

    module: as it begins, before training; inputs: what it is given, (n, features), of which mean and deviation are
    checked. optimizer: of which weight decay (l2) is read; l1, max_norm: other penalties in use.
    The conditions: Klambauer et al. 2017; Geron, Hands-On Machine Learning, chapter 11.
    """
    broken = []
    layers = list(module.named_modules())
    if not any(isinstance(layer, nn.SELU) for _, layer in layers):
        broken.append("activations must be SELU; there is none")
    first = next((layer for _, layer in layers if isinstance(layer, Standardise)), None)
    if first and not first.mean.any() and bool((first.deviation == 1).all()):
        broken.append("inputs must be standardised; the layer for it was never adapted to training data")
    dense = [i for i, (_, layer) in enumerate(layers) if isinstance(layer, nn.Linear)]
    after = {path for path, layer in layers[dense[-1] + 1 :] if _is_activation(layer)} if dense else set()
    if inputs is not None:
        broken += _unstandardised(inputs, first)
    for path, layer in ((p, m) for p, m in layers if p not in after):  # the activation of the output is free
        where = path or "the network"
        if isinstance(layer, nn.Linear) and _is_hidden(path, layers) and not _is_lecun(layer):
            broken.append(f"weights must begin LeCun normal (variance 1 / fan_in); those of {where} do not")
        elif isinstance(layer, NORMS):
            broken.append(f"no other normalisation may stand between; {where} is a {type(layer).__name__}")
        elif isinstance(layer, DROPOUTS):
            broken.append(f"dropout must be alpha dropout; {where} is a {type(layer).__name__}")
        elif not isinstance(layer, PLAIN):
            what = "another activation" if _is_activation(layer) else "no plain stack of dense layers"
            broken.append(f"the network must be a plain stack of dense layers and SELU; {where} is {what}")
    decay = max((group.get("weight_decay", 0.0) for group in optimizer.param_groups), default=0.0) if optimizer else 0.0
    broken += [
        f"no {name} penalty may be used; it is {value:g}" for name, value in (("l1", l1), ("l2", decay)) if value
    ]
    if max_norm is not None:
        broken.append(f"weights must not be bound by a max-norm; it is {max_norm:g}")
    return tuple(broken)


def _is_activation(layer: nn.Module) -> bool:
    return type(layer).__name__.lower() in SCHEME_OF or type(layer).__module__.endswith("activation")


def _unstandardised(inputs: torch.Tensor, first: Standardise | None) -> list[str]:
    x = inputs.detach().float()
    x = first(x) if first else x
    mean, deviation = x.mean(0), x.std(0, correction=0)
    varying = deviation > 0
    off = max(float(mean.abs().max()), float((deviation[varying] - 1).abs().max()) if varying.any() else 0.0)
    if off <= max(APART, 4 / math.sqrt(len(x))):
        return []
    return [
        f"inputs must have mean 0 and deviation 1; a feature is {off:.2g} off: put standardise=True first and adapt it"
    ]


def _is_hidden(path: str, layers: Sequence[tuple[str, nn.Module]]) -> bool:
    """All dense layers but the last."""
    return path != [p for p, layer in layers if isinstance(layer, nn.Linear)][-1]


def _is_lecun(layer: nn.Linear) -> bool:
    weight = layer.weight.detach().float()
    spread = 4 * math.sqrt(2 / weight.numel())  # four standard errors of a variance
    expected: float = 1 / layer.in_features
    centred = float(weight.mean().abs()) <= 4 * math.sqrt(expected / weight.numel())
    apart = abs(float(weight.var(correction=0)) / expected - 1)
    uniform = weight.numel() > 1000 and float(weight.abs().max()) <= 1.001 * math.sqrt(3 * expected)
    return centred and apart <= max(VARIANCE, spread) and not uniform
