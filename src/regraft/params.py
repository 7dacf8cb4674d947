"""What is trained and what is not: freezing that holds, and parameter groups for the rest.

A frozen module has no gradients, stays out of every optimizer, and keeps its running statistics and its silence
(no dropout) whatever mode the model around it is put in.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


class Frozen(nn.Module):
    """A module that stays as it is: always in evaluation mode, without gradients. Its names in `state_dict` are kept."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Frozen:
        """Sets its own flag only: what is inside stays in evaluation mode."""
        self.training = mode
        self.module.eval()
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Frozen:
        """Does nothing: unwrap `.module` to train it."""
        return self

    def forward(self, *inputs: Any) -> Any:
        """The module's outputs, cut off from the graph of gradients."""
        with torch.no_grad():
            return self.module(*inputs)


def freeze(module: nn.Module) -> Frozen:
    """Freeze a module truly: parameters, buffers and noise. The inverse is `.module` of what is returned."""
    return Frozen(module)


def parameter_groups(module: nn.Module, *, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Groups for a torch optimizer with what is trainable and nothing else.

    Weights of two and more axes decay; biases and norms do not.
    """
    chosen = [p for p in module.parameters() if p.requires_grad]
    decayed, plain = [p for p in chosen if p.dim() > 1], [p for p in chosen if p.dim() <= 1]
    groups = [(decayed, weight_decay), (plain, 0.0)]
    return [{"params": params, "lr": lr, "weight_decay": decay} for params, decay in groups if params]


def frozen_parts(module: nn.Module) -> Iterator[Frozen]:
    """Every frozen part of a model."""
    yield from (m for m in module.modules() if isinstance(m, Frozen))
