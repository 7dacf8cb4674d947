"""A generative adversarial network: the lower layers of the discriminator are the backbone.

Goodfellow et al. 2014, at the scale of DCGAN (Radford et al. 2016). Spectral normalisation of the discriminator
(Miyato et al. 2018) keeps it steady, and it learns at twice the rate of the generator (Heusel et al. 2017). Both step
at once: the generator's loss goes through the discriminator with its weights held still.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize

from regraft.methods.decoder import Decoder
from regraft.methods.encoder import Encoder, encode
from regraft.methods.method import Batch, Method, Panel, Part, Task
from regraft.training import Plan

NOISE = 64
"""Numbers that a picture is generated from."""
SHOWN = (4, 8)


def gan(encoder: Encoder, task: Task) -> Method:
    """Tell pictures from generated ones, while the generator learns to make that hard."""
    spec, values = encoder.preprocess, 1
    for size in encoder.cut.shape:
        values *= size
    judge = nn.Sequential(nn.Flatten(), nn.Linear(values, 1))
    generator = Decoder(NOISE, (spec.channels, *spec.size))
    normed = [m for whole in (encoder.module, judge) for m in whole.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for layer in normed:
        parametrizations.spectral_norm(layer)
    fixed = torch.randn(SHOWN[0] * SHOWN[1], NOISE, generator=torch.Generator().manual_seed(0))

    def logits(x: torch.Tensor, *, held: bool = False) -> torch.Tensor:
        if not held:
            out: torch.Tensor = judge(encode(encoder, x))
            return out.float()
        run = lambda value: functional_call(encoder.module, _still(encoder.module), value)  # noqa: E731
        still: torch.Tensor = functional_call(judge, _still(judge), encode(encoder, x, run))
        return still.float()

    def loss(batch: Batch) -> torch.Tensor:
        made = generator(torch.randn(len(batch.pictures), NOISE, device=batch.pictures.device))
        judged = F.softplus(-logits(batch.pictures)).mean() + F.softplus(logits(made.detach())).mean()
        return judged + F.softplus(-logits(made, held=True)).mean()

    def show(batch: Batch) -> list[Panel]:
        made = generator(fixed.to(batch.pictures.device))
        across = SHOWN[1]
        return [
            Panel("pictures", (tuple(batch.pictures[:across]),)),
            Panel("generated pictures", tuple(tuple(made[i : i + across]) for i in range(0, len(made), across))),
        ]

    def finish() -> None:
        for layer in normed:
            parametrize.remove_parametrizations(layer, "weight")

    parts = (Part("encoder", encoder.module), Part("judge", judge), Part("generator", generator, rate=0.5))
    plan = replace(Plan(0, 4e-4), betas=(0.5, 0.99), weight_decay=0.0)
    return Method(parts, loss, show, plan=plan, finish=finish)


def _still(module: nn.Module) -> dict[str, torch.Tensor]:
    """The module's weights and buffers, copies of what it may write to, so that it stays as it is."""
    state: dict[str, torch.Tensor] = {name: p.detach() for name, p in module.named_parameters()}
    return state | {name: b.detach().clone() for name, b in module.named_buffers()}
