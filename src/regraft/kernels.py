"""How other frameworks lay out the weights of one layer, and how torch wants them.

    kernels of convolutions   torch (out, in, h, w); Keras, TensorFlow and Flax (h, w, in, out), depthwise (h, w, in, k)
    dense weights             torch (out, in); all others (in, out)
    Theano                    kernels as torch has them but turned by 180 degrees: it convolves, the others correlate
    after a flatten           channels-last frameworks count (h, w, c), torch counts (c, h, w)

Knows shapes and layers, not names.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from regraft.readers import Layout

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def converted(
    tensor: torch.Tensor, owner: nn.Module, name: str, layout: Layout, flat: tuple[int, int, int] | None
) -> torch.Tensor:
    """A tensor stored in `layout` as the parameter `name` of `owner` has it, where its kind of layer tells how.

    flat: (channels, height, width) of what was flattened before a dense layer, None where nothing was.
    """
    if layout == "torch" or name != "weight":
        return tensor
    if isinstance(owner, nn.Linear) and tensor.dim() == 2:
        weight = tensor.T
        if flat and layout != "theano" and weight.shape[1] == math.prod(flat):
            channels, height, width = flat
            weight = weight.reshape(-1, height, width, channels).permute(0, 3, 1, 2).reshape(len(weight), -1)
        return weight
    spatial = tuple(range(tensor.dim() - 2))
    if isinstance(owner, CONVOLUTIONS) and tensor.dim() == owner.weight.dim():
        if layout == "theano":
            return tensor.flip([axis + 2 for axis in spatial])
        if layout == "keras" and owner.groups == owner.in_channels > 1 and tensor.shape[-2] == owner.in_channels:
            depthwise = tensor.permute(-2, -1, *spatial)  # (in, multiplier, h, w)
            return depthwise.reshape(-1, 1, *depthwise.shape[2:])
        return tensor.permute(-1, -2, *spatial)
    if isinstance(owner, TRANSPOSED) and tensor.dim() == owner.weight.dim() and layout == "keras":
        return tensor.permute(-1, -2, *spatial)  # Keras has (h, w, out, in) here
    return tensor


def flattened(module: nn.Module) -> dict[str, tuple[int, int, int]]:
    """For the first dense layer after convolutions, by path: (channels, height, width) of what it reads flattened.

    The height is taken to equal the width; a layer for which that cannot be is left out.
    """
    channels = 0
    for path, layer in module.named_modules():
        if isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED)):
            channels = layer.out_channels
        elif isinstance(layer, nn.Linear):
            places = layer.in_features // channels if channels else 0
            side = math.isqrt(places)
            if places > 1 and side * side * channels == layer.in_features:
                return {path: (channels, side, side)}
            return {}
    return {}


def with_input_channels(kernel: torch.Tensor, channels: int) -> torch.Tensor:
    """A first kernel (out, in, h, w) for another number of input channels.

    Repeated and scaled (Wightman, timm), then shifted so that a grey picture gives exactly what it gave.
    """
    have = kernel.shape[1]
    repeated = kernel.repeat(1, -(-channels // have), 1, 1)[:, :channels] * (have / channels)
    return repeated + (kernel.sum(1, keepdim=True) - repeated.sum(1, keepdim=True)) / channels


def with_positions(embedding: torch.Tensor, count: int) -> torch.Tensor | None:
    """Position embeddings (1, tokens, dim) for `count` tokens: the square grid resampled (bicubic), the rest kept."""
    have = embedding.shape[1]
    for prefix in (1, 0, 2):
        old, new = math.isqrt(have - prefix), math.isqrt(count - prefix)
        if old * old == have - prefix and new * new == count - prefix:
            grid = embedding[:, prefix:].reshape(1, old, old, -1).permute(0, 3, 1, 2).float()
            grid = nn.functional.interpolate(grid, (new, new), mode="bicubic", antialias=True)
            return torch.cat([embedding[:, :prefix].float(), grid.flatten(2).transpose(1, 2)], 1)
    return None
