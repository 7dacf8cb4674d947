"""Activations by name, torch's own wherever it has them, and a rule of thumb for choosing one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn


class Swish(nn.Module):
    """x * sigmoid(beta x); with a trained beta, each network finds how far it bends (Ramachandran et al. 2017)."""

    def __init__(self, beta: float = 1.0, *, trained: bool = False) -> None:
        super().__init__()
        value = torch.tensor(float(beta))
        if trained:
            self.beta = nn.Parameter(value)
        else:
            self.register_buffer("beta", value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any shape, and the same shape."""
        return x * torch.sigmoid(self.beta * x)


ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "rrelu": nn.RReLU,
    "prelu": nn.PReLU,
    "elu": nn.ELU,
    "selu": nn.SELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "swish": Swish,
    "mish": nn.Mish,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}


@dataclass(frozen=True)
class Advice:
    """An activation by name and why."""

    activation: str
    reason: str


def activation(name: str, **options: Any) -> nn.Module:
    """The activation called `name`, with the options of its class (`negative_slope` of leaky_relu, `beta` of swish).

    Raises ValueError for an unknown name.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"The activation must be one of {', '.join(ACTIVATIONS)}; found {name!r}.")
    return ACTIVATIONS[name](**options)


def advise_activation(
    task: Literal["simple", "complex", "most complex"] = "simple", *, latency: bool = False, deep_mlp: bool = False
) -> Advice:
    """Which activation to begin with (Geron, Hands-On Machine Learning, 3rd ed., chapter 11).

    latency: the time of one prediction matters; deep_mlp: a plain stack of many dense layers.
    Raises ValueError for an unknown task.
    """
    if task not in ("simple", "complex", "most complex"):
        raise ValueError(f"The task must be simple, complex or most complex; found {task!r}.")
    if deep_mlp:
        return Advice(
            "selu", "a deep plain stack of dense layers normalises itself, if its conditions hold: see check_selu"
        )
    if latency:
        if task == "simple":
            return Advice("leaky_relu", "as quick as ReLU, and its units do not die")
        return Advice("prelu", "as quick as leaky ReLU, with a slope that is trained, for a complex task")
    if task == "simple":
        return Advice("relu", "a good default for simple tasks: quick, and every library and chip speeds it up")
    if task == "complex":
        return Advice("swish", "smooth, the better default for complex tasks; Mish may gain a little and costs more")
    return Advice("swish", "with a trained beta (trained=True), for the most complex tasks")
