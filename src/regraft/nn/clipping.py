"""Gradient clipping, against gradients that explode: torch's own two ways behind one setting."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import nn


@dataclass(frozen=True)
class Clipping:
    """by `value`: every component is cut to [-limit, limit], which may turn the gradient; by `norm`: the whole gradient
    is scaled down to the length `limit`, which keeps its direction.
    """

    by: Literal["value", "norm"]
    limit: float

    def __post_init__(self) -> None:
        number = isinstance(self.limit, int | float)
        if self.by not in ("value", "norm") or not number or not 0 < self.limit < float("inf"):
            raise ValueError(
                f"Gradients are clipped by value or norm at a finite limit above 0; found {self.by}, {self.limit!r}."
            )


def clip_gradients(parameters: Iterable[nn.Parameter], clipping: Clipping) -> float:
    """Clip the gradients of all parameters in place, as one vector; their norm before is returned.

    (0.9, 100) clipped by value at 1 becomes (0.9, 1), by norm (0.009, 1.0).
    """
    listed = [p for p in parameters if p.grad is not None]
    norm = float(nn.utils.get_total_norm([p.grad for p in listed if p.grad is not None])) if listed else 0.0
    if clipping.by == "value":
        nn.utils.clip_grad_value_(listed, clipping.limit)
    else:
        nn.utils.clip_grad_norm_(listed, clipping.limit)
    return norm
