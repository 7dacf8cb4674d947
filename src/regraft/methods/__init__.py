"""Ways to pretrain a network when no similar one exists: a method is its loss and its two or three modules.

| name | learns to | source |
|---|---|---|
| autoencoder | rebuild the picture through a narrow code | Hinton and Salakhutdinov 2006 |
| denoising | rebuild it from a noisy one | Vincent et al. 2008 |
| masked | rebuild the parts that were covered | Pathak et al. 2016, He et al. 2022 |
| gan | tell pictures from generated ones | Goodfellow et al. 2014, Radford et al. 2016 |
| rbm | give pictures a low energy, layer by layer | Hinton et al. 2006 |
| contrastive | tell two views of one picture from views of others | Chen et al. 2020 |
| rotation | say by how many quarters a picture was turned | Gidaris et al. 2018 |
| pairs | say whether two pictures show the same thing | Bromley et al. 1993, Zhai et al. 2023 |
| labels | name the class, on another task than the one at hand | |

A method knows tensors and the encoder; nothing of files, time or how long it is trained.
"""

from __future__ import annotations

from collections.abc import Callable

from regraft.methods.autoencoder import autoencoder, denoising, masked
from regraft.methods.boltzmann import rbm
from regraft.methods.contrastive import contrastive
from regraft.methods.encoder import Encoder
from regraft.methods.gan import gan
from regraft.methods.method import Batch, Method, Panel, Part, Task
from regraft.methods.pairs import pairs
from regraft.methods.side_task import labels, rotation
from regraft.methods.views import VIEWS

METHODS: dict[str, Callable[[Encoder, Task], Method]] = {
    "autoencoder": autoencoder,
    "denoising": denoising,
    "masked": masked,
    "gan": gan,
    "rbm": rbm,
    "contrastive": contrastive,
    "rotation": rotation,
    "pairs": pairs,
    "labels": labels,
}
LABELLED = ("pairs", "labels")
"""Methods that need to know what a picture shows."""
SPATIAL = ("autoencoder", "denoising", "masked", "gan")
"""Methods that make pictures, and so train up to a cut that still has places."""

__all__ = ["LABELLED", "METHODS", "SPATIAL", "VIEWS", "Batch", "Encoder", "Method", "Panel", "Part", "Task"]
