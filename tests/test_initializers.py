"""Weights begin with the variance that the formula says, on every kind of layer."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from regraft import nn as groundwork

LAYERS = {
    "linear": (lambda: nn.Linear(400, 600), 400, 600),
    "convolution": (lambda: nn.Conv2d(40, 60, (3, 5)), 40 * 15, 60 * 15),
    "grouped": (lambda: nn.Conv2d(60, 120, 5, groups=6), 10 * 25, 20 * 25),
    "depthwise": (lambda: nn.Conv2d(300, 600, 7, groups=300), 49, 2 * 49),
    "transposed": (lambda: nn.ConvTranspose2d(40, 60, 5), 40 * 25, 60 * 25),
    "transposed and grouped": (lambda: nn.ConvTranspose2d(60, 120, 5, groups=6), 10 * 25, 20 * 25),
    "one axis": (lambda: nn.Conv1d(100, 150, 9), 900, 1350),
}
"""Layer, fan_in, fan_out: what one output is summed over, what one input goes into."""


def assert_variance(weight: torch.Tensor, expected: float) -> None:
    """Mean 0 and this variance, within five standard errors (those of normal numbers, which are the larger)."""
    weight, n = weight.detach(), weight.numel()
    assert abs(float(weight.mean())) < 5 * math.sqrt(expected / n)
    assert abs(float(weight.var()) / expected - 1) < 5 * math.sqrt(2 / n)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("mode", ["fan_in", "fan_out", "fan_avg"])
@pytest.mark.parametrize("distribution", ["normal", "uniform"])
def test_variance_is_the_scale_over_the_fan(kind: str, mode: str, distribution: str) -> None:
    make, fan_in, fan_out = LAYERS[kind]
    torch.manual_seed(0)
    layer = make()
    fan = {"fan_in": fan_in, "fan_out": fan_out, "fan_avg": (fan_in + fan_out) / 2}[mode]
    transposed = isinstance(layer, nn.ConvTranspose2d)
    groups = getattr(layer, "groups", 1)
    filled = groundwork.variance_scaling_(layer.weight, 2.0, mode, distribution, groups=groups, transposed=transposed)
    assert filled is layer.weight
    assert_variance(layer.weight, 2 / fan)
    if distribution == "uniform":
        assert float(layer.weight.detach().abs().max()) <= math.sqrt(6 / fan)


@pytest.mark.parametrize(
    ("fill", "numerator", "average", "uniform"),
    [
        (groundwork.glorot_normal_, 1, True, False),
        (groundwork.glorot_uniform_, 1, True, True),
        (groundwork.he_normal_, 2, False, False),
        (groundwork.he_uniform_, 2, False, True),
        (groundwork.lecun_normal_, 1, False, False),
        (groundwork.lecun_uniform_, 1, False, True),
    ],
)
def test_named_initializers_are_their_formula(
    fill: Callable[[torch.Tensor], torch.Tensor], numerator: float, average: bool, uniform: bool
) -> None:
    torch.manual_seed(0)
    weight = fill(torch.empty(500, 30, 3, 3))
    variance = numerator / ((270 + 4500) / 2 if average else 270)
    assert_variance(weight, variance)
    kurtosis = float((weight**4).mean() / weight.var() ** 2)
    assert abs(kurtosis - (1.8 if uniform else 3.0)) < 0.2


@pytest.mark.parametrize(
    ("activation", "numerator"), [("relu", 2), ("leaky_relu", 2), ("swish", 2), ("selu", 1), ("tanh", 1)]
)
@pytest.mark.parametrize("kind", LAYERS)
def test_layers_begin_as_suits_the_activation(activation: str, numerator: float, kind: str) -> None:
    make, fan_in, fan_out = LAYERS[kind]
    torch.manual_seed(0)
    layer = make()
    groundwork.initialize_(nn.Sequential(layer), activation)
    assert_variance(layer.weight, numerator / ((fan_in + fan_out) / 2 if activation == "tanh" else fan_in))
    assert not layer.bias.any()


def test_signals_keep_their_size_through_a_deep_stack() -> None:
    """What the formulas are for: He is twice LeCun, and ReLU loses half at every layer."""
    torch.manual_seed(0)
    x = torch.randn(200, 256)
    deep = nn.Sequential(*(layer for _ in range(30) for layer in (nn.Linear(256, 256), nn.ReLU())))
    with torch.no_grad():
        he = float(groundwork.initialize_(deep, "relu")(x).square().mean())
        lecun = float(groundwork.initialize_(deep, "selu")(x).square().mean())
    assert 0.2 < he < 5
    assert lecun < 1e-6


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: groundwork.variance_scaling_(torch.empty(3)), r"two axes; found shape \(3,\)"),
        (lambda: groundwork.variance_scaling_(torch.empty(3, 3), mode="fan"), "found 'fan'"),
        (lambda: groundwork.variance_scaling_(torch.empty(3, 3), distribution="cauchy"), "found 'cauchy'"),
        (lambda: groundwork.variance_scaling_(torch.empty(3, 3), -1), "above 0; found -1"),
        (lambda: groundwork.initialize_(nn.Linear(2, 2), "relux"), "found 'relux'"),
    ],
)
def test_wrong_arguments_get_one_sentence(call: Callable[[], object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()
