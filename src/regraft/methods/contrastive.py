"""Contrastive learning: two views of one picture must be told from the views of all others in the batch.

SimCLR (Chen et al. 2020). The loss is taken on a projection, which is thrown away: the features below it keep what the
views change.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from regraft.errors import TrainingError
from regraft.methods.encoder import Encoder, dim_of, features
from regraft.methods.method import Batch, Method, Panel, Part, Task
from regraft.methods.views import varied
from regraft.training import Plan

HIDDEN, PROJECTED = 256, 64
TEMPERATURE = 0.2
SHOWN = 8


def contrastive(encoder: Encoder, task: Task) -> Method:
    """Two views of each picture; which of the other views in the batch is the same picture?"""
    if not task.views:
        raise TrainingError("The method contrastive must vary pictures by something; --augment names nothing.")
    project = projection(dim_of(encoder))

    def loss(batch: Batch) -> torch.Tensor:
        n = len(batch.pictures)
        seen = varied(batch.pictures.repeat(2, 1, 1, 1), task.views)
        z = F.normalize(project(features(encoder, seen)).float(), dim=1)
        alike = z @ z.T / TEMPERATURE
        alike.fill_diagonal_(-torch.inf)
        partner = torch.arange(2 * n, device=z.device).roll(n)
        return F.cross_entropy(alike, partner)

    def show(batch: Batch) -> list[Panel]:
        x = batch.pictures[:SHOWN]
        columns = (x, varied(x, task.views), varied(x, task.views))
        return [
            Panel("the picture, and two views that must be found to be the same", tuple(zip(*columns, strict=True)))
        ]

    parts = (Part("encoder", encoder.module), Part("projection", project))
    return Method(parts, loss, show, batch=256, plan=Plan(0, 2e-3))


def projection(inputs: int) -> nn.Module:
    """Two dense layers with batch norm, (n, inputs) to (n, 64)."""
    first = nn.Sequential(nn.Linear(inputs, HIDDEN, bias=False), nn.BatchNorm1d(HIDDEN), nn.ReLU())
    return nn.Sequential(first, nn.Linear(HIDDEN, PROJECTED))
