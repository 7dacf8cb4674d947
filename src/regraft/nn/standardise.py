"""Standardisation as the first layer: mean and deviation of the training data, carried with the weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


class Standardise(nn.Module):
    """(x - mean) / deviation for each feature; both are buffers, 0 and 1 until `adapt` sets them.

    features: the length of axis 1 of the input, (n, features), or of (n, features, ...) with `channels`.
    """

    mean: torch.Tensor
    deviation: torch.Tensor

    def __init__(self, features: int, *, channels: bool = False) -> None:
        super().__init__()
        self.features = features
        self.channels = channels
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("deviation", torch.ones(features))

    def adapt(self, data: torch.Tensor | Iterable[torch.Tensor]) -> Standardise:
        """Set mean and deviation from training data, one batch (n, features, ...) or several, in one pass in float64.

        Features that never vary keep the deviation 1. Raises ValueError for no data, other widths, or values that are
        not finite.
        """
        count, total, squares = 0, torch.zeros(self.features).double(), torch.zeros(self.features).double()
        shift: torch.Tensor | None = None
        for batch in [data] if isinstance(data, torch.Tensor) else data:
            if batch.dim() < 2 or batch.shape[1] != self.features:
                raise ValueError(f"Data must be (n, {self.features}, ...); found {tuple(batch.shape)}.")
            rows = batch.detach().double().cpu().movedim(1, -1).reshape(-1, self.features)
            if not rows.isfinite().all():
                raise ValueError("Data must be finite; found infinity or not-a-number.")
            if len(rows) and shift is None:  # sums around a row of the data lose no digits
                shift = rows[0].clone()
            if shift is not None:
                rows = rows - shift
            count, total, squares = count + len(rows), total + rows.sum(0), squares + rows.square().sum(0)
        if shift is None:
            raise ValueError("Data must hold at least one example; found none.")
        mean = total / count
        deviation = (squares / count - mean.square()).clamp(min=0).sqrt()
        self.mean.copy_(mean + shift)
        self.deviation.copy_(torch.where(deviation > 1e-7 * shift.abs().clamp(min=1e-5), deviation, 1.0))
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of the input's shape. Raises ValueError for sequences and maps unless `channels` was said."""
        if x.dim() != 2 and not self.channels:
            raise ValueError(
                f"Inputs must be (n, {self.features}); found {tuple(x.shape)}: use channels=True for maps."
            )
        return ((x.movedim(1, -1) - self.mean) / self.deviation).movedim(-1, 1)

    def extra_repr(self) -> str:
        """The number of features."""
        return str(self.features)
