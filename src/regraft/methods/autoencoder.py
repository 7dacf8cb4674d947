"""Autoencoders: rebuild a picture from a narrow code of it; from the picture itself, a noisy one, or what is uncovered.

Hinton and Salakhutdinov 2006; denoising: Vincent et al. 2008; masked: Pathak et al. 2016 (the loss is taken where the
picture was covered, as in He et al. 2022). The encoder is the backbone, the decoder is thrown away.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from regraft.methods.decoder import decoder_for
from regraft.methods.encoder import Encoder, encode
from regraft.methods.method import Batch, Method, Panel, Part, Task
from regraft.methods.views import varied

CODE = 128
"""Numbers that a picture is rebuilt from: the code must be narrower than the picture, else copying would do."""
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
    return _rebuilding(encoder, lambda x: (x, torch.ones_like(x)), "the picture, and as it is rebuilt")


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


def _rebuilding(encoder: Encoder, spoil: Spoiled, title: str) -> Method:
    spec, values = encoder.preprocess, 1
    for size in encoder.cut.shape:
        values *= size
    squeeze = nn.Sequential(nn.Flatten(), nn.Linear(values, CODE))
    decoder = decoder_for(encoder.module, CODE, (spec.channels, *spec.size))

    def rebuilt(seen: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = decoder(squeeze(encode(encoder, seen)))
        return x

    def loss(batch: Batch) -> torch.Tensor:
        seen, weight = spoil(batch.pictures)
        error = F.binary_cross_entropy(rebuilt(seen).float(), batch.pictures, reduction="none")
        return (error * weight).sum() / weight.sum().clamp(min=1)

    def show(batch: Batch) -> list[Panel]:
        x = batch.pictures[:SHOWN]
        seen, _ = spoil(x)
        columns = (x, rebuilt(x)) if spoil_is_nothing else (x, seen, rebuilt(seen))
        return [Panel(title, tuple(zip(*columns, strict=True)))]

    spoil_is_nothing = "rebuilt from that" not in title
    parts = (Part("encoder", encoder.module), Part("code", squeeze), Part("decoder", decoder))
    return Method(parts, loss, show)
