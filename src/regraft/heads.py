"""Heads: from stored grids of features at one or several cuts to one number per class.

A head is linear. What it sees of each cut is a view: the whole grid, or its mean over the cells.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

INPUT = "input"
"""Depth 0: the picture itself at 32 x 32, which every network must beat."""


@dataclass(frozen=True)
class View:
    """What a head sees of one cut.

    parts: vectors stored per picture at the cut; whole: all of them are seen, else their mean.
    grey: of `input` only: one channel is seen, for all training pictures were grey.
    root: signed square roots are seen, which evens out bursts (power normalisation, Perronnin et al. 2010).
    """

    cut: str
    parts: int
    channels: int
    whole: bool
    grey: bool = False
    root: bool = False

    @property
    def dim(self) -> int:
        """Length of the vector that the head sees."""
        return self.channels // 3 if self.grey else self.channels * (self.parts if self.whole else 1)

    def of(self, rows: np.ndarray) -> np.ndarray:
        """Stored rows (n, parts * channels) as seen, (n, dim)."""
        seen = rows
        if self.grey:  # the three channels are equal and stand one after another
            seen = rows[:, : self.dim]
        elif not self.whole and self.parts > 1:
            seen = rows.reshape(len(rows), self.parts, self.channels).mean(1, dtype=np.float32)
        if self.root:
            seen = np.sign(seen, dtype=np.float32) * np.sqrt(np.abs(seen), dtype=np.float32)
        return seen

    def to_json(self) -> dict[str, Any]:
        """The view as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Head:
    """A linear head: logits = x @ weight.T + bias on the views put side by side; softmax of them is calibrated.

    weight: float32 (classes, sum of dims); bias: float32 (classes,).
    """

    views: tuple[View, ...]
    weight: torch.Tensor
    bias: torch.Tensor

    @property
    def cuts(self) -> tuple[str, ...]:
        """The cuts that the head reads, shallowest first."""
        return tuple(view.cut for view in self.views)

    def logits(self, rows: dict[str, np.ndarray]) -> torch.Tensor:
        """Logits float32 (n, classes) of stored rows by cut. Each row is computed alone."""
        seen = torch.from_numpy(np.concatenate([v.of(rows[v.cut]).astype(np.float32) for v in self.views], 1))
        # One product a row: a matrix product's order of sums, and so its last bits, can depend on how many rows it has.
        return torch.stack([torch.mv(self.weight, x) for x in seen]) + self.bias


def linear_module(head: Head) -> nn.Linear:
    """The head as an ordinary torch layer."""
    layer = nn.Linear(head.weight.shape[1], head.weight.shape[0])
    layer.weight.data, layer.bias.data = head.weight.clone(), head.bias.clone()
    return layer
