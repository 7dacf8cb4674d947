"""A generative adversarial network: the lower layers of the discriminator are the backbone.

Goodfellow et al. 2014, at the scale of DCGAN (Radford et al. 2016). What keeps it steady: pictures and made ones pass
the batch norms in one batch, what is judged is varied and noisy, real or made alike (Zhao et al. 2020), and the last
layer is spectrally normalised (Miyato et al. 2018; on all layers the features came out worse). The discriminator must
also say by how many quarters a real picture was turned, without which it forgets what pictures look like once it can
tell them apart (SS-GAN, Chen et al. 2019). Both sides step at once: the generator's loss goes through the discriminator
with its weights held still.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations

from regraft.methods.decoder import Decoder
from regraft.methods.encoder import Encoder, encode
from regraft.methods.method import Batch, Method, Panel, Part, Task
from regraft.methods.views import turned, varied
from regraft.training import Plan

NOISE = 64
"""Numbers that a picture is generated from."""
TURNED = 2
"""Of so many pictures one is shown in all four turns."""
SHOWN = (4, 8)


def gan(encoder: Encoder, task: Task) -> Method:
    """Tell pictures from generated ones, while the generator learns to make that hard."""
    spec, values = encoder.preprocess, math.prod(encoder.cut.shape)
    judge, turns = (nn.Sequential(nn.Flatten(), nn.Linear(values, outputs)) for outputs in (1, 4))
    square = spec.size[0] == spec.size[1]
    generator = Decoder(NOISE, (spec.channels, *spec.size))
    parametrizations.spectral_norm(judge[1])
    fixed = torch.randn(SHOWN[0] * SHOWN[1], NOISE, generator=torch.Generator().manual_seed(0))

    def logits(real: torch.Tensor, made: torch.Tensor, *, held: bool = False) -> tuple[torch.Tensor, ...]:
        """Of both in one batch: alone, batch norm would tell each side by its own mean."""
        both = varied(torch.cat([real, made]), task.views | {"noise"})
        if not held:
            out: torch.Tensor = judge(encode(encoder, both))
            return out.float().chunk(2)
        run = lambda value: functional_call(encoder.module, _still(encoder.module), value)  # noqa: E731
        still: torch.Tensor = functional_call(judge, _still(judge), encode(encoder, both, run))
        return still.float().chunk(2)

    def loss(batch: Batch) -> torch.Tensor:
        real = batch.pictures
        made = generator(torch.randn(len(real), NOISE, device=real.device))
        true, false = logits(real, made.detach())
        judged = F.softplus(-true).mean() + F.softplus(false).mean()
        _, hoped = logits(real, made, held=True)
        adversarial = judged + F.softplus(-hoped).mean()
        if not square:
            return adversarial
        seen, quarters = turned(varied(real[: -(-len(real) // TURNED)], task.views - {"flip"}))
        return adversarial + F.cross_entropy(turns(encode(encoder, seen)).float(), quarters)

    def show(batch: Batch) -> list[Panel]:
        made = generator(fixed.to(batch.pictures.device))
        across = SHOWN[1]
        return [
            Panel("pictures", (tuple(batch.pictures[:across]),)),
            Panel("generated pictures", tuple(tuple(made[i : i + across]) for i in range(0, len(made), across))),
        ]

    parts = (
        Part("encoder", encoder.module),
        Part("judge", judge, 0.5),
        Part("turns", turns),
        Part("generator", generator),
    )
    plan = replace(Plan(0, 1e-3), betas=(0.5, 0.99), weight_decay=0.0)
    return Method(parts, loss, show, plan=plan)


def _still(module: nn.Module) -> dict[str, torch.Tensor]:
    """The module's weights and buffers, copies of what it may write to, so that it stays as it is."""
    state: dict[str, torch.Tensor] = {name: p.detach() for name, p in module.named_parameters()}
    return state | {name: b.detach().clone() for name, b in module.named_buffers()}
