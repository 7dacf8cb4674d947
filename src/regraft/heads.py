"""Heads: from stored grids of features at one or several cuts to one number per class.

A head is linear. What it sees of each cut is a view: the whole grid, or its mean over the cells.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

INPUT = "input"
"""Depth 0: the picture itself at 32 x 32, which every network must beat."""

SOFTENED = 1e-4
"""Added under roots where gradients flow through them."""


@dataclass(frozen=True)
class View:
    """What a head sees of one cut.

    parts: vectors stored per picture at the cut; whole: all of them are seen, else their mean.
    grey: of `input` only: one channel is seen, for all training pictures were grey.
    root: signed square roots are seen, which evens out bursts (power normalisation, Perronnin et al. 2010).
    hidden: of `input` only: this many units of a fixed random hidden layer are seen (see `random_layer`).
    """

    cut: str
    parts: int
    channels: int
    whole: bool
    grey: bool = False
    root: bool = False
    hidden: int = 0

    def seen(self, cells: torch.Tensor) -> torch.Tensor:
        """Stored cells (n, parts, channels), float32, as a head of a cut sees them (see `of`), with gradients."""
        rows = cells.flatten(1) if self.whole else cells.mean(1)
        if not self.root:
            return rows
        roots = (rows.abs() + SOFTENED).sqrt() - SOFTENED**0.5  # a root's own slope at 0 is infinite
        signed: torch.Tensor = roots.copysign(rows)
        return signed

    @property
    def dim(self) -> int:
        """Length of the vector that the head sees."""
        if self.hidden:
            return self.hidden
        return self.channels // 3 if self.grey else self.channels * (self.parts if self.whole else 1)

    def of(self, rows: np.ndarray) -> np.ndarray:
        """Stored rows (n, parts * channels) as seen, (n, dim)."""
        seen = rows
        if self.grey:  # the three channels are equal and stand one after another
            seen = rows[:, : self.channels // 3]
        elif not self.whole and self.parts > 1:
            cells = torch.from_numpy(np.ascontiguousarray(rows)).view(len(rows), self.parts, self.channels)
            seen = cells.float().mean(1).numpy()
        if self.root:
            values = torch.from_numpy(np.ascontiguousarray(seen)).float()
            seen = values.abs().sqrt_().copysign_(values).numpy()
        return random_layer(seen, self.hidden) if self.hidden else seen

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
        if not self.views:
            return self.bias.repeat(len(next(iter(rows.values()))), 1)
        seen = torch.from_numpy(np.concatenate([v.of(rows[v.cut]).astype(np.float32) for v in self.views], 1))
        # One product a row, each at the start of its own memory: the order of sums in a product, and so its last bits,
        # can depend on how many rows there are and on where a row lies.
        return torch.stack([torch.mv(self.weight, x.clone()) for x in seen]) + self.bias


def random_layer(pixels: np.ndarray, units: int) -> np.ndarray:
    """What a hidden layer that never learnt makes of grey levels 0..255, (n, dim): float32 (n, units).

    Every picture is brought to mean 0 and deviation 1, projected on random signs, and rectified by the absolute value
    (random features, Rahimi and Recht 2008; rectification, Jarrett et al. 2009). Sums of whole grey levels are exact
    in float32, so a picture gives the same bits whatever stands beside it, on every machine.
    """
    levels = pixels.astype(np.float32)
    signs = _signs(levels.shape[1], units)
    exact = levels.astype(np.float64)
    mean = exact.mean(1, keepdims=True)
    deviation = np.sqrt(np.maximum((exact * exact).mean(1, keepdims=True) - mean * mean, 0)) + 1
    projected = (levels @ signs - mean.astype(np.float32) * signs.sum(0)) / deviation.astype(np.float32)
    rectified: np.ndarray = np.abs(projected, dtype=np.float32) / np.float32(levels.shape[1] ** 0.5)
    return rectified


@functools.lru_cache(maxsize=2)
def _signs(dim: int, units: int) -> np.ndarray:
    """Fixed random signs, float32 (dim, units), from bits that are the same everywhere and always (SHAKE-256)."""
    bits = np.unpackbits(np.frombuffer(hashlib.shake_256(b"regraft").digest(-(-dim * units // 8)), np.uint8))
    return bits[: dim * units].reshape(dim, units).astype(np.float32) * 2 - 1


def linear_module(head: Head) -> nn.Linear:
    """The head as an ordinary torch layer."""
    layer = nn.Linear(head.weight.shape[1], head.weight.shape[0])
    layer.weight.data, layer.bias.data = head.weight.clone(), head.bias.clone()
    return layer
