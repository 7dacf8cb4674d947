"""A small convolutional network for pictures of 32 x 32: what is trained from scratch beside every pretrained one."""

from __future__ import annotations

from torch import nn

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
