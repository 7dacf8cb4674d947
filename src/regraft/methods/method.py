"""What a way to pretrain consists of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from regraft.training import Plan


@dataclass(frozen=True)
class Task:
    """classes: of the labels, 0 where there are none; views: what pictures are varied by, names of `VIEWS`."""

    classes: int
    views: frozenset[str]


@dataclass(frozen=True)
class Batch:
    """pictures: float32 (n, channels, height, width) in [0, 1]; labels: int64 (n,); done: share of the epochs, 0..1."""

    pictures: torch.Tensor
    labels: torch.Tensor
    done: float


@dataclass(frozen=True)
class Part:
    """A module to train. rate: its share of the learning rate; opens: share of the epochs after which it trains."""

    name: str
    module: nn.Module
    rate: float = 1.0
    opens: float = 0.0


@dataclass(frozen=True)
class Panel:
    """Pictures to look at: rows of tensors in [0, 1], (channels, height, width), and what each is."""

    title: str
    rows: tuple[tuple[torch.Tensor, ...], ...]
    captions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Method:
    """parts: all that is trained, the encoder among them; loss: a scalar with gradients.

    batch: pictures of a step; plan: all but the epochs. show: what there is to look at, for pictures in evaluation.
    in_pairs: a batch holds two pictures of each label.
    """

    parts: tuple[Part, ...]
    loss: Callable[[Batch], torch.Tensor]
    show: Callable[[Batch], list[Panel]]
    batch: int = 128
    plan: Plan = Plan(0, 1e-3)
    in_pairs: bool = False
