"""Autoencoders: rebuild a picture from a narrow code of it; from the picture itself, a noisy one, or what is uncovered.

Hinton and Salakhutdinov 2006; denoising: Vincent et al. 2008; masked: Pathak et al. 2016 (the loss is taken where the
picture was covered, as in He et al. 2022). The encoder is the backbone, the decoder is thrown away.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from regraft.methods.decoder import decoder_for
from regraft.methods.encoder import Encoder, encode
from regraft.methods.method import Batch, Method, Panel, Part, Task
from regraft.methods.views import varied

CODE, NARROWER = 128, 4
"""Numbers that a picture is rebuilt from, at most a quarter of its own: from as many, copying would do."""
SPOILING = frozenset(("light", "erase"))
"""Views that change a picture without moving it, so that it can still be rebuilt as it was."""
NOISE = 0.3
CELLS = 7
COVERED = 0.5
SHOWN = 8

Spoiled = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Pictures as the encoder sees them, and the weight of every pixel in the loss."""


def autoencoder(encoder: Encoder, task: Task) -> Method:
    """Rebuild the picture itself."""
    return _rebuilding(encoder, None, "the picture, and as it is rebuilt")


def denoising(encoder: Encoder, task: Task) -> Method:
    """Rebuild the picture from one with Gaussian noise of deviation 0.3, in another light where views have that."""

    def noisy(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen = varied(x, task.views & SPOILING)
        return (seen + NOISE * torch.randn_like(x)).clamp(0, 1), torch.ones_like(x)

    return _rebuilding(encoder, noisy, "the picture, spoilt, and as it is rebuilt from that")


def masked(encoder: Encoder, task: Task) -> Method:
    """Rebuild the half of the picture's 7 x 7 cells that are covered with grey, in another light as well."""

    def covered(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cells = (torch.rand(len(x), 1, CELLS, CELLS, device=x.device) < COVERED).float()
        mask = F.interpolate(cells, x.shape[2:])
        return varied(x, task.views & SPOILING) * (1 - mask) + 0.5 * mask, mask.expand_as(x)

    return _rebuilding(encoder, covered, "the picture, partly covered, and as it is rebuilt from that")


def _rebuilding(encoder: Encoder, spoil: Spoiled | None, title: str) -> Method:
    shape = (encoder.preprocess.channels, *encoder.preprocess.size)
    code = max(1, min(CODE, math.prod(shape) // NARROWER))
    squeeze = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(encoder.cut.shape), code))
    decoder = decoder_for(encoder.module, code, shape)

    def rebuilt(seen: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = decoder(squeeze(encode(encoder, seen)))
        return x

    def loss(batch: Batch) -> torch.Tensor:
        x = batch.pictures
        seen, weight = spoil(x) if spoil else (x, torch.ones_like(x))
        error = F.binary_cross_entropy(rebuilt(seen), x, reduction="none")
        return (error * weight).sum() / weight.sum().clamp(min=1)

    def show(batch: Batch) -> list[Panel]:
        x = batch.pictures[:SHOWN]
        if spoil is None:
            return [Panel(title, tuple(zip(x, rebuilt(x), strict=True)))]
        seen, _ = spoil(x)
        return [Panel(title, tuple(zip(x, seen, rebuilt(seen), strict=True)))]

    parts = (Part("encoder", encoder.module), Part("code", squeeze), Part("decoder", decoder))
    return Method(parts, loss, show)
