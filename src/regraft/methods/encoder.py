"""The part of a network that is pretrained: from a picture to the values at one cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import fx, nn

from regraft.frozen import pooled
from regraft.graph import Cut
from regraft.preprocess import PreprocessSpec


@dataclass(frozen=True)
class Encoder:
    """module: normalised pictures (n, channels, *size) to the values at `cut`, trained in place."""

    module: nn.Module
    cut: Cut
    preprocess: PreprocessSpec


def encode(
    encoder: Encoder, x: torch.Tensor, run: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> torch.Tensor:
    """The values at the cut, (n, *cut.shape), of pictures with values in [0, 1], float32 (n, channels, *size).

    run: instead of the module.
    """
    spec = encoder.preprocess
    if any(spec.mean) or set(spec.std) != {1.0}:
        mean, std = (torch.tensor(value, device=x.device).view(1, -1, 1, 1) for value in (spec.mean, spec.std))
        x = (x - mean) / std
    values: torch.Tensor = (run or encoder.module)(x.contiguous(memory_format=torch.channels_last))
    return values


def features(encoder: Encoder, x: torch.Tensor) -> torch.Tensor:
    """Their mean over the places of the picture, float32 (n, dim); arguments as for `encode`."""
    return pooled(encode(encoder, x), encoder.cut, 1).flatten(1)


def in_order(network: nn.Module) -> list[nn.Module]:
    """The layers of a part of a network in the order in which they run."""
    graph = cast(fx.GraphModule, network).graph
    return [network.get_submodule(str(node.target)) for node in graph.nodes if node.op == "call_module"]


def dim_of(encoder: Encoder) -> int:
    """Length of a vector of `features`."""
    cut = encoder.cut
    channels = cut.shape[0] if cut.layout == "NCHW" else cut.shape[-1]
    return channels * (2 if cut.layout == "tokens" and cut.prefix_tokens else 1)
