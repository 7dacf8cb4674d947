"""Run the frozen part of a network: a fixed function from prepared pictures to small grids of features.

One pass feeds every cut asked for. Extraction and prediction both come through here, so that what a head was fitted
on is what it is given later. Knows tensors; nothing of files, labels or heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from regraft.cut import lower_at
from regraft.errors import BackboneError
from regraft.graph import Cut, Trace, find_cut
from regraft.nn.folding import fold_batchnorm, uses_weights_plainly
from regraft.numerics import Numerics
from regraft.preprocess import PreprocessSpec, normalise

MAX_STORED = 4096
GRIDS = (4, 2, 1)
LARGEST_HALF = 65504.0
"""float16's largest value: features beyond it are clipped to it, a deterministic part of the frozen function."""


@dataclass(frozen=True)
class FrozenLower:
    """The layers below the deepest cut, folded, in their precision and on their device, never trained.

    parts: for each cut, how many vectors make its features: grid cells, or class token and mean of the rest, or 1.
    apart: cuts between a layer and its batch norm, which cannot be folded then; all above them has other last bits.
    """

    module: nn.Module
    cuts: tuple[Cut, ...]
    parts: tuple[int, ...]
    preprocess: PreprocessSpec
    numerics: Numerics
    apart: tuple[Cut, ...] = ()


def freeze_lower(trace: Trace, cuts: Sequence[str], preprocess: PreprocessSpec, numerics: Numerics) -> FrozenLower:
    """A private, folded copy of everything up to the deepest of `cuts`; the traced module is left as it is."""
    lower = lower_at(trace, list(cuts)).eval()
    example = torch.zeros(1, *trace.example_shape[1:])
    module = fold_batchnorm(lower, lower.graph, example=example).requires_grad_(False)  # type: ignore[arg-type]
    if numerics.precision == "bfloat16":
        _cast_weights(module, emulated=numerics.emulated)
    module = module.to(numerics.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    found = tuple(find_cut(trace, name) for name in cuts)
    apart = tuple(cut for cut in found if _before_norm(trace, cut))
    return FrozenLower(module, found, tuple(parts_of(cut) for cut in found), preprocess, numerics, apart)


def _before_norm(trace: Trace, cut: Cut) -> bool:
    node = next(n for n in trace.graph.nodes if n.name == cut.node)
    called = [str(user.target) for user in node.users if user.op == "call_module"]
    return any(isinstance(trace.module.get_submodule(path), nn.BatchNorm1d | nn.BatchNorm2d) for path in called)


def parts_of(cut: Cut) -> int:
    """How many vectors a cut is stored as: g*g grid cells with g the largest of 4, 2, 1 that keeps 4,096 values."""
    if cut.layout == "vector":
        return 1
    if cut.layout == "tokens":
        return 2 if cut.prefix_tokens else 1
    return next(g * g for g in GRIDS if channels_of(cut) * g * g <= MAX_STORED or g == 1)


def channels_of(cut: Cut) -> int:
    """The number of channels of the value at a cut."""
    return cut.shape[0] if cut.layout == "NCHW" else cut.shape[-1]


def run_frozen(frozen: FrozenLower, pictures: torch.Tensor) -> list[np.ndarray]:
    """Features of prepared pictures, uint8 (n, C, H, W) with n at most the fixed batch.

    Returns one float16 array (n, parts, channels) per cut. A picture's row does not depend on the others: the batch
    is padded with zeros to one size, and layout and threads do not change the order of its sums.
    Raises BackboneError when a network gives NaN or infinity, naming the cut and the row.
    """
    values = values_at_cuts(frozen, pictures)
    return [as_grid(v, cut, parts) for v, cut, parts in zip(values, frozen.cuts, frozen.parts, strict=True)]


def values_at_cuts(frozen: FrozenLower, pictures: torch.Tensor) -> list[torch.Tensor]:
    """The tensors at the cuts themselves, in the precision of the network; as `run_frozen` otherwise."""
    n = len(pictures)
    full = pictures.new_zeros((frozen.numerics.batch, *pictures.shape[1:]))
    full[:n] = pictures
    x = normalise(full.to(frozen.numerics.device), frozen.preprocess)
    if x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    half = frozen.numerics.precision == "bfloat16" and not frozen.numerics.emulated
    with torch.inference_mode(), torch.autocast(frozen.numerics.device, torch.bfloat16, enabled=half):
        values = frozen.module(x)
    return [value[:n] for value in values]


def as_grid(value: torch.Tensor, cut: Cut, parts: int) -> np.ndarray:
    """The value at a cut as stored features, float16 (n, parts, channels); raises NotFinite."""
    return _checked(pooled(value, cut, parts), cut)


def as_map(value: torch.Tensor, cut: Cut) -> np.ndarray:
    """The value at a cut as a stored map, float16 (n, *cut.shape) in plain order; raises NotFinite."""
    return _checked(value.float().contiguous(), cut)


def pooled(value: torch.Tensor, cut: Cut, parts: int) -> torch.Tensor:
    """The value at a cut, (n, ...), as a few averages: float32 (n, parts, channels)."""
    value = value.float()
    if cut.layout == "vector":
        return value.flatten(1).unsqueeze(1)
    if cut.layout == "tokens":
        mean = value[:, cut.prefix_tokens :].mean(1)
        return torch.stack([value[:, 0], mean], 1) if cut.prefix_tokens else mean.unsqueeze(1)
    if cut.layout == "NHWC":
        value = value.permute(0, 3, 1, 2)
    g = round(parts**0.5)
    return F.adaptive_avg_pool2d(value, g).flatten(2).transpose(1, 2)


def agreement(trace: Trace, cuts: Sequence[str], preprocess: PreprocessSpec, numerics: Numerics) -> float:
    """Least cosine, over cuts and 8 drawn pictures, between features in these numerics and in float32.

    The pictures are seeded smooth noise, the same everywhere, so that the answer is a fact of the network alone.
    """
    exact = Numerics(numerics.device, "float32", numerics.batch, numerics.kernels)
    height, width = preprocess.size
    noise = torch.from_numpy(np.random.RandomState(0).rand(8, preprocess.channels, 7, 7)).float()
    smooth = F.interpolate(noise, (height, width), mode="bilinear")
    pictures = (smooth * 255).round().to(torch.uint8)
    ours, theirs = (
        run_frozen(freeze_lower(trace, cuts, preprocess, kind), pictures[: kind.batch]) for kind in (numerics, exact)
    )
    cosines = [
        F.cosine_similarity(torch.from_numpy(a).float().flatten(1), torch.from_numpy(b).float().flatten(1)).min().item()
        for a, b in zip(ours, theirs, strict=True)
    ]
    return min(cosines)


def _cast_weights(module: nn.Module, *, emulated: bool) -> None:
    """Round convolutions and linear layers to bfloat16; emulated, they compute in float32 between rounded numbers."""
    layers = [m for m in module.modules() if isinstance(m, nn.Conv2d | nn.Linear) and uses_weights_plainly(m)]
    for layer in layers:
        layer.to(torch.bfloat16)
        if emulated:
            layer.float()
            layer.register_forward_pre_hook(lambda layer, inputs: tuple(_rounded(x) for x in inputs))
            layer.register_forward_hook(lambda layer, inputs, output: _rounded(output))


def _rounded(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.bfloat16).float()


def _checked(features: torch.Tensor, cut: Cut) -> np.ndarray:
    finite = torch.isfinite(features).flatten(1).all(1).cpu()
    if not bool(finite.all()):
        row = int((~finite).nonzero()[0])
        raise NotFinite(cut.name, row)
    return features.clamp(-LARGEST_HALF, LARGEST_HALF).half().cpu().numpy()


class NotFinite(BackboneError):
    """A network gave NaN or infinity for the picture in this row of a batch."""

    def __init__(self, cut: str, row: int) -> None:
        super().__init__(
            f"The features at cut {cut} must be finite; row {row} of the batch is not: choose another backbone."
        )
        self.cut = cut
        self.row = row
