"""What is trained and what is not: freezing that holds, and parameter groups for the rest.

A frozen module has no gradients, stays out of every optimizer, and keeps its running statistics and its silence
(no dropout) whatever mode the model around it is put in. Knows modules and parameters, nothing of cuts or heads.
Not covered: modules that draw noise in evaluation mode too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


class Frozen(nn.Module):
    """A module that stays as it is: always in evaluation mode, without gradients.

    In `state_dict` its tensors have the names that they have without being frozen, so that a state passes between a
    model with a frozen part and the same model without. `module` is the module itself.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module.eval().requires_grad_(False)
        self.register_load_state_dict_pre_hook(_below_module)  # type: ignore[no-untyped-call]

    def train(self, mode: bool = True) -> Frozen:
        """Sets its own flag only: what is inside stays in evaluation mode."""
        self.training = mode
        self.module.eval()
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Frozen:
        """Does nothing: train `.module` without what freezes it."""
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The state of the module; arguments as in torch."""
        return self.module.state_dict(*args, **kwargs)

    def forward(self, *inputs: Any) -> Any:
        """The module's outputs, cut off from the graph of gradients."""
        with torch.no_grad():
            return self.module(*inputs)


def freeze(module: nn.Module) -> Frozen:
    """Freeze a module truly: parameters, buffers and noise. The module itself is changed, not copied.

    >>> model = torch.nn.Sequential(freeze(lower), upper).train()
    """
    return Frozen(module)


def parameter_groups(module: nn.Module, *, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Groups for a torch optimizer with what is trainable and nothing else.

    lr: learning rate of all; weight_decay: of weights of two and more axes (biases and norms do not decay).
    What lies in a frozen part is left out even where its `requires_grad` was set again from outside.
    """
    frozen = {id(p) for part in frozen_parts(module) for p in part.parameters()}
    chosen = [p for p in module.parameters() if p.requires_grad and id(p) not in frozen]
    groups = [([p for p in chosen if p.dim() > 1], weight_decay), ([p for p in chosen if p.dim() <= 1], 0.0)]
    return [{"params": params, "lr": lr, "weight_decay": decay} for params, decay in groups if params]


def frozen_parts(module: nn.Module) -> Iterator[Frozen]:
    """Every frozen part of a model."""
    yield from (m for m in module.modules() if isinstance(m, Frozen))


def _below_module(frozen: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Give the names of a state the step down to `.module` that `state_dict` leaves out."""
    for name in [name for name in state if name.startswith(prefix)]:
        state[f"{prefix}module.{name[len(prefix) :]}"] = state.pop(name)
