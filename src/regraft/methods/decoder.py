"""From a code to a picture: what autoencoders rebuild with and GANs generate with."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from regraft.methods.encoder import in_order
from regraft.nn import initialize_

START = 64
WIDTHS = (32, 16)


class Decoder(nn.Module):
    """A code (n, inputs) to a picture in [0, 1], (n, *shape).

    A dense layer to a quarter of the height and width, then twice: twice as large, a convolution, batch norm (DCGAN,
    Radford et al. 2016, with nearest neighbours instead of strides: Odena et al. 2016).
    """

    def __init__(self, inputs: int, shape: Sequence[int]) -> None:
        super().__init__()
        channels, self.height, self.width = shape
        self.start = (START, math.ceil(self.height / 4), math.ceil(self.width / 4))
        self.dense = nn.Linear(inputs, math.prod(self.start))
        layers: list[nn.Module] = []
        before = START
        for width in WIDTHS:
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(before, width, 3, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(width), nn.ReLU()]
            before = width
        self.layers = nn.Sequential(nn.BatchNorm2d(START), nn.ReLU(), *layers)
        self.output = nn.Conv2d(WIDTHS[-1], channels, 3, padding=1)
        initialize_(self)

    def forward(self, code: torch.Tensor) -> torch.Tensor:
        """The picture."""
        x = self.dense(code).view(-1, *self.start).contiguous(memory_format=torch.channels_last)
        x = torch.sigmoid(self.output(self.layers(x)))
        return x[:, :, : self.height, : self.width]


class DenseDecoder(nn.Module):
    """A code (n, inputs) to a picture in [0, 1], (n, *shape), through dense layers of these widths."""

    def __init__(self, inputs: int, widths: Sequence[int], shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)
        layers: list[nn.Module] = []
        for width in widths:
            layers += [nn.Linear(inputs, width), nn.ReLU()]
            inputs = width
        self.layers = nn.Sequential(*layers, nn.Linear(inputs, math.prod(shape)))
        initialize_(self)

    def forward(self, code: torch.Tensor) -> torch.Tensor:
        """The picture."""
        return torch.sigmoid(self.layers(code)).view(-1, *self.shape)


def decoder_for(network: nn.Module, inputs: int, shape: Sequence[int]) -> nn.Module:
    """The decoder that suits an encoder: its dense layers in reverse where it has only such, else convolutions."""
    layers = in_order(network)
    dense = [layer for layer in layers if isinstance(layer, nn.Linear)]
    if any(isinstance(layer, nn.Conv2d) for layer in layers) or not dense:
        return Decoder(inputs, shape)
    return DenseDecoder(inputs, [layer.out_features for layer in reversed(dense[:-1])], shape)
