"""How weights begin: random numbers whose variance keeps that of signals and gradients from layer to layer.

    Glorot   1 / fan_avg   tanh, sigmoid, softmax, none     Glorot and Bengio 2010
    He       2 / fan_in    ReLU and its relatives           He et al. 2015
    LeCun    1 / fan_in    SELU                             LeCun et al. 1998; Klambauer et al. 2017

fan_in is the number of inputs that one output is summed over, fan_out the number of outputs that one input goes into. A
weight alone does not tell the groups of a convolution nor that it is transposed: `initialize_` asks the layer.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import nn

Mode = Literal["fan_in", "fan_out", "fan_avg"]
Distribution = Literal["normal", "uniform"]
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
SCHEMES: dict[str, tuple[float, Mode]] = {"glorot": (1.0, "fan_avg"), "he": (2.0, "fan_in"), "lecun": (1.0, "fan_in")}
"""Scale and mode of each scheme."""
SCHEME_OF = {
    **dict.fromkeys(("relu", "leaky_relu", "rrelu", "prelu", "elu", "gelu", "swish", "silu", "mish"), "he"),
    "selu": "lecun",
    **dict.fromkeys(("tanh", "sigmoid", "softmax", "linear"), "glorot"),
}
"""The scheme that suits each activation."""


def variance_scaling_(
    tensor: torch.Tensor,
    scale: float = 1.0,
    mode: Mode = "fan_in",
    distribution: Distribution = "normal",
    *,
    groups: int = 1,
    transposed: bool = False,
) -> torch.Tensor:
    """Fill a weight in place with numbers of mean 0 and variance scale / fan, and return it.

    tensor: (out, in / groups, ...) of a linear layer or convolution, (in, out / groups, ...) of a transposed one.
    Raises ValueError for fewer than two axes or an unknown mode or distribution.

        >>> variance_scaling_(torch.empty(300, 784), scale=2, mode="fan_avg", distribution="uniform")  # He on fan_avg
    """
    if distribution not in ("normal", "uniform"):
        raise ValueError(f"The distribution must be normal or uniform; found {distribution!r}.")
    if scale <= 0:
        raise ValueError(f"The scale must be above 0; found {scale}.")
    variance = scale / _fan(tensor, mode, groups, transposed)
    if distribution == "normal":
        return nn.init.normal_(tensor, 0.0, math.sqrt(variance))
    limit = math.sqrt(3 * variance)
    return nn.init.uniform_(tensor, -limit, limit)


def glorot_normal_(tensor: torch.Tensor) -> torch.Tensor:
    """Variance 1 / fan_avg, normal."""
    return nn.init.xavier_normal_(tensor)


def glorot_uniform_(tensor: torch.Tensor) -> torch.Tensor:
    """Variance 1 / fan_avg, uniform."""
    return nn.init.xavier_uniform_(tensor)


def he_normal_(tensor: torch.Tensor) -> torch.Tensor:
    """Variance 2 / fan_in, normal."""
    return nn.init.kaiming_normal_(tensor, nonlinearity="relu")


def he_uniform_(tensor: torch.Tensor) -> torch.Tensor:
    """Variance 2 / fan_in, uniform."""
    return nn.init.kaiming_uniform_(tensor, nonlinearity="relu")


def lecun_normal_(tensor: torch.Tensor) -> torch.Tensor:
    """Variance 1 / fan_in, normal."""
    return nn.init.kaiming_normal_(tensor, nonlinearity="linear")


def lecun_uniform_(tensor: torch.Tensor) -> torch.Tensor:
    """Variance 1 / fan_in, uniform."""
    return nn.init.kaiming_uniform_(tensor, nonlinearity="linear")


def initialize_(module: nn.Module, activation: str = "relu", distribution: Distribution = "normal") -> nn.Module:
    """Fill the linear layers and convolutions in `module` as suits the activation that follows them; biases become 0.

    Raises ValueError for an activation that is not known.
    """
    if activation not in SCHEME_OF:
        raise ValueError(f"The activation must be one of {', '.join(SCHEME_OF)}; found {activation!r}.")
    scale, mode = SCHEMES[SCHEME_OF[activation]]
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            variance_scaling_(layer.weight, scale, mode, distribution)
        elif isinstance(layer, CONVOLUTIONS):
            transposed = isinstance(layer, TRANSPOSED)
            variance_scaling_(layer.weight, scale, mode, distribution, groups=layer.groups, transposed=transposed)
        else:
            continue
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return module


def _fan(tensor: torch.Tensor, mode: Mode, groups: int, transposed: bool) -> float:
    if tensor.dim() < 2:
        raise ValueError(f"A weight must have at least two axes; found shape {tuple(tensor.shape)}.")
    window = math.prod(tensor.shape[2:])
    summed, spread = tensor.shape[1] * window, tensor.shape[0] // groups * window
    fan_in, fan_out = (spread, summed) if transposed else (summed, spread)
    fans = {"fan_in": fan_in, "fan_out": fan_out, "fan_avg": (fan_in + fan_out) / 2}
    if mode not in fans:
        raise ValueError(f"The mode must be fan_in, fan_out or fan_avg; found {mode!r}.")
    return fans[mode]
