"""Small networks for small pictures: what is trained from scratch beside every pretrained one, or pretrained here."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from regraft.nn import activation as activation_called
from regraft.nn import initialize_

WIDTHS = (32, 64, 128)
FEATURES = 128


def small_network(channels: int) -> nn.Module:
    """Three stages of two 3 x 3 convolutions with batch norm, then the mean: (n, channels, 32, 32) to (n, 128).

    He initialisation. The recipe of VGG (Simonyan and Zisserman 2015) with batch norm, cut down to 0.3 million weights.
    """
    layers: list[nn.Module] = []
    before = channels
    for width in WIDTHS:
        for _ in range(2):
            layers += [nn.Conv2d(before, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            before = width
        layers.append(nn.MaxPool2d(2))
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    initialize_(network)
    return network


def strided_network(channels: int) -> nn.Sequential:
    """Three stages of two 3 x 3 convolutions, the first of each with stride 2: (n, channels, h, w) to (n, 128).

    A fifth of the arithmetic of `small_network`, for pretraining on many pictures (all-convolutional network,
    Springenberg et al. 2015; the discriminator of DCGAN, Radford et al. 2016, is of this kind). He initialisation.
    """
    stages: OrderedDict[str, nn.Module] = OrderedDict()
    before = channels
    for i, width in enumerate(WIDTHS, 1):
        for j, stride in enumerate((2, 1), 1):
            stages[f"conv{i}{j}"] = nn.Conv2d(before, width, 3, stride, padding=1, bias=False)
            stages[f"norm{i}{j}"] = nn.BatchNorm2d(width)
            stages[f"act{i}{j}"] = nn.ReLU()
            before = width
    stages["pool"], stages["flatten"] = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    network = nn.Sequential(stages)
    initialize_(network)
    return network


def dense_network(inputs: int, widths: Sequence[int], activation: str) -> nn.Sequential:
    """Dense layers on the flattened picture: (n, channels, h, w) with `inputs` values to (n, widths[-1]), activated."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for i, width in enumerate(widths, 1):
        layers[f"hidden{i}"] = nn.Linear(inputs, width)
        layers[f"act{i}"] = activation_called(activation)
        inputs = width
    layers["features"] = nn.Flatten()  # the output of a network is no place to cut: without it, no head would see act
    network = nn.Sequential(layers)
    initialize_(network, activation)
    return network
