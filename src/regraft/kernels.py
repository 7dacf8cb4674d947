"""How other frameworks lay out the weights of one layer, and how torch wants them.

    kernels of convolutions   torch (out, in, h, w); Keras, TensorFlow and Flax (h, w, in, out), depthwise (h, w, in, k)
    dense weights             torch (out, in); all others (in, out)
    Theano                    kernels as torch has them but turned by 180 degrees: it convolves, the others correlate
    after a flatten           channels-last frameworks count (h, w, c), torch counts (c, h, w)

Knows shapes and layers, not names.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from regraft.readers import Layout

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
HWC = (1, 2, 0)
"""The order of (channels, height, width) in which frameworks with channels last count a flattened map."""
SAME = 1e-5
"""Two values of a run that differ by less are the same."""


@dataclass(frozen=True)
class Places:
    """Where the inputs of a dense layer lie in the map that was flattened before it.

    lengths: channels, height and width; order: which of the three axes counts slowest, next, fastest.
    """

    lengths: tuple[int, int, int]
    order: tuple[int, ...] = (0, 1, 2)

    def of_channels_last(self, weight: torch.Tensor) -> torch.Tensor:
        """Weights (out, in) whose inputs were counted (h, w, c), in the order of this layer; others as they are."""
        return self.of(Places(self.lengths, HWC), weight)

    def of(self, other: Places, weight: torch.Tensor) -> torch.Tensor:
        """Weights (out, in) whose inputs were counted as `other` says, of a map as large, in the order of this layer.

        Weights for another number of inputs stay as they are.
        """
        if weight.shape[1] != math.prod(self.lengths):
            return weight
        sizes = [self.lengths[axis] for axis in other.order]
        stored = weight.reshape(-1, *sizes).permute(0, *(other.order.index(axis) + 1 for axis in range(3)))
        return stored.permute(0, *(axis + 1 for axis in self.order)).reshape(len(weight), -1)


def converted(
    tensor: torch.Tensor, owner: nn.Module, name: str, layout: Layout, places: Places | None
) -> torch.Tensor | None:
    """A tensor stored in `layout` as the parameter `name` of `owner` has it, where its kind of layer tells how.

    places: of the inputs of a dense layer that reads a flattened map, None where it reads none. A dense weight fits a
    convolution of one place, and the other way round. None for a convention that is not known.
    """
    if name != "weight" or not isinstance(owner, (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)):
        return tensor
    dense = tensor.dim() == 2
    if isinstance(owner, nn.Linear):
        if tensor.dim() > 2 and _is_of_one_place(tensor, layout):
            kernel = _kernel(tensor, layout)
            return kernel.reshape(kernel.shape[:2])
        if not dense or layout == "torch":
            return tensor
        return tensor.T if places is None or layout == "theano" else places.of_channels_last(tensor.T)
    if dense and math.prod(owner.kernel_size) == 1 and isinstance(owner, CONVOLUTIONS):
        weight = tensor if layout == "torch" else tensor.T
        return weight.reshape(*weight.shape, *[1] * len(owner.kernel_size))
    if layout == "torch" or tensor.dim() != owner.weight.dim():
        return tensor
    if isinstance(owner, TRANSPOSED):
        spatial = tuple(range(tensor.dim() - 2))
        return tensor.permute(-1, -2, *spatial) if layout == "keras" else None  # Keras has (h, w, out, in) here
    if layout == "keras" and owner.groups == owner.in_channels > 1 and tensor.shape[-2] == owner.in_channels:
        depthwise = tensor.permute(-2, -1, *range(tensor.dim() - 2))  # (in, multiplier, h, w)
        return depthwise.reshape(-1, 1, *depthwise.shape[2:])
    return _kernel(tensor, layout)


def _kernel(tensor: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The kernel of a convolution, (out, in, ...)."""
    if layout == "torch":
        return tensor
    if layout == "theano":
        return tensor.flip(list(range(2, tensor.dim())))
    return tensor.permute(-1, -2, *range(tensor.dim() - 2))


def _is_of_one_place(tensor: torch.Tensor, layout: Layout) -> bool:
    places = tensor.shape[2:] if layout in ("torch", "theano") else tensor.shape[:-2]
    return math.prod(places) == 1


def flattened(
    module: nn.Module, run: Callable[[torch.Tensor], object], shape: tuple[int, int, int]
) -> dict[str, Places | None]:
    """For each dense layer that reads a flattened map, by path: which place of the map each of its inputs is.

    run: takes pictures (n, *shape) and calls `module`, which must be in evaluation mode. Found out by two runs in which
    the pictures and every convolution hold the row, then the column, of each value: what comes between them and the
    dense layer (activations, pooling, normalisation) keeps the order. None where no order explains what was seen.
    """
    seen = [_read(module, run, shape, axis) for axis in (2, 3)]
    return {path: _places(rows, seen[1][path]) for path, rows in seen[0].items() if path in seen[1]}


def _read(
    module: nn.Module, run: Callable[[torch.Tensor], object], shape: tuple[int, int, int], axis: int
) -> dict[str, torch.Tensor]:
    """What the dense layers next after the last map read of one picture, where it differs from place to place."""
    read: dict[str, torch.Tensor] = {}

    def coded(layer: nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        read.clear()
        return _coded(output, axis)

    def reading(path: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...], dict[str, torch.Tensor]], None]:
        def note(layer: nn.Module, inputs: tuple[torch.Tensor, ...], named: dict[str, torch.Tensor]) -> None:
            (x,) = (*inputs, *named.values())
            first = next(iter(read.values()), None)
            if x.dim() == 2 and (first is None or torch.equal(first, x[0].double())):
                read[path] = x[0].detach().double()

        return note

    layers = list(module.named_modules())
    hooks = [m.register_forward_hook(coded) for _, m in layers if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
    hooks += [
        m.register_forward_pre_hook(reading(path), with_kwargs=True) for path, m in layers if isinstance(m, nn.Linear)
    ]
    try:
        with torch.no_grad():
            run(_coded(torch.zeros(1, *shape), axis))
    finally:
        for hook in hooks:
            hook.remove()
    return read


def _coded(tensor: torch.Tensor, axis: int) -> torch.Tensor:
    """A tensor of this shape (n, c, h, w) that counts from 0 (excluded) to 1 along one axis."""
    size = [1, 1, 1, 1]
    size[axis] = tensor.shape[axis]
    return (torch.arange(1, size[axis] + 1) / size[axis]).reshape(size).expand_as(tensor).to(tensor).contiguous()


def _places(rows: torch.Tensor, columns: torch.Tensor) -> Places | None:
    """The order of (c, h, w), and the lengths, in which rows and columns count along their own axis alone.

    Where several do, as where columns count slowly, the one of the largest map.
    """
    if rows.std() < SAME and columns.std() < SAME:
        return Places((len(rows), 1, 1), (0, 1, 2))
    length, found = len(rows), []
    for height in _divisors(length, len(set(rows.tolist()))):
        for width in _divisors(length // height, len(set(columns.tolist()))):
            lengths = (length // height // width, height, width)
            for order in itertools.permutations(range(3)):
                sizes = [lengths[axis] for axis in order]
                down, right = order.index(1), order.index(2)
                if _counts(rows.view(sizes), down, right) and _counts(columns.view(sizes), right, down):
                    found.append(Places(lengths, order))
    return max(found, key=lambda places: places.lengths[1] * places.lengths[2], default=None)


def _divisors(number: int, most: int) -> list[int]:
    return [n for n in range(1, min(number, most) + 1) if number % n == 0]


def _counts(values: torch.Tensor, along: int, across: int) -> bool:
    """Whether values go one way along an axis, and mostly stay as they are across another.

    Mostly: pooling that counts its padding makes the border smaller.
    """
    own, other = values.diff(dim=along), values.diff(dim=across)
    if not own.numel():
        return bool(values.std() < SAME)
    dead = (own.abs() < SAME).all(along)
    one_way = (own > SAME).all(along) | (own < -SAME).all(along)
    steady = not other.numel() or bool(other.abs().median() < SAME)
    return steady and bool((one_way | dead).all()) and not bool(dead.all())


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
        if min(have, count) <= prefix:
            continue
        old, new = math.isqrt(have - prefix), math.isqrt(count - prefix)
        if old * old == have - prefix and new * new == count - prefix:
            grid = embedding[:, prefix:].reshape(1, old, old, -1).permute(0, 3, 1, 2).float()
            grid = nn.functional.interpolate(grid, (new, new), mode="bicubic", antialias=True)
            return torch.cat([embedding[:, :prefix].float(), grid.flatten(2).transpose(1, 2)], 1)
    return None
