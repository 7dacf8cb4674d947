"""Same or different? Every two pictures of a batch are a pair, and the network must say whether they show one thing.

A siamese network (Bromley et al. 1993): both pictures go through the same layers, and the cosine of what comes out
decides, by a logistic regression on all pairs (the loss of Zhai et al. 2023). Labels say what is the same thing; they
may have many values with two pictures each.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from regraft.methods.encoder import Encoder, dim_of, features
from regraft.methods.method import Batch, Method, Panel, Part, Task
from regraft.methods.views import varied
from regraft.training import Plan

SHOWN = 8


class Verdict(nn.Module):
    """Features to logits of `same` for every two: standardised, their cosines, a scale, kept above 0, and a shift.

    Without the standardisation what all pictures have in common fills the cosines of features that are never negative.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.standard = nn.BatchNorm1d(dim, affine=False)
        self.scale = nn.Parameter(torch.tensor(2.3))
        self.shift = nn.Parameter(torch.tensor(-5.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Float32 (n, dim) to (n, n)."""
        z = F.normalize(self.standard(x), dim=1)
        return z @ z.T * self.scale.exp() + self.shift


def pairs(encoder: Encoder, task: Task) -> Method:
    """Verify every pair of the batch; the batch holds two pictures of each thing."""
    verdict = Verdict(dim_of(encoder))

    def loss(batch: Batch) -> torch.Tensor:
        logits = verdict(features(encoder, varied(batch.pictures, task.views)).float())
        same = batch.labels[:, None] == batch.labels[None]
        others = ~torch.eye(len(logits), dtype=torch.bool, device=logits.device)
        each = F.binary_cross_entropy_with_logits(logits, same.float(), reduction="none")
        return (each * others).sum() / len(logits)

    def show(batch: Batch) -> list[Panel]:
        x = batch.pictures[: 2 * SHOWN]
        said = torch.sigmoid(verdict(features(encoder, x).float()))
        rows = [(i, i + 1) for i in range(0, len(x) - 1, 2)] + [(i, i + 3) for i in range(0, len(x) - 3, 4)]
        words = tuple(
            f"{'same' if batch.labels[i] == batch.labels[j] else 'different'}: {said[i, j]:.2f}" for i, j in rows
        )
        return [
            Panel(
                "pairs, and how sure the network is that they are the same", tuple((x[i], x[j]) for i, j in rows), words
            )
        ]

    parts = (Part("encoder", encoder.module), Part("verdict", verdict))
    return Method(parts, loss, show, batch=128, plan=Plan(0, 2e-3), in_pairs=True)
