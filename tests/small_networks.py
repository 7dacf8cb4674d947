"""Small networks to follow and to cut, each with one thing in it, and the contract that every cut keeps."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from regraft.cut import lower_at, split
from regraft.graph import Trace, trace

torch.set_num_threads(1)


class Net(nn.Module):
    """Two convolutions around a module under test, and a head."""

    def __init__(self, middle: nn.Module | None = None) -> None:
        super().__init__()
        self.stem, self.middle = nn.Conv2d(3, 4, 3, padding=1), middle or nn.Identity()
        self.last, self.head = nn.Conv2d(4, 4, 1), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.last(self.middle(self.stem(x))).mean((2, 3)))


class Does(nn.Module):
    """A module whose forward is a function of itself and its input."""

    def __init__(self, work: Callable[[nn.Module, torch.Tensor], object], **parts: nn.Module) -> None:
        super().__init__()
        self.work = work
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: torch.Tensor) -> object:
        return self.work(self, x)


class Root(Does):
    """The same as a class of its own, for the outermost module."""


def pictures(batch: int = 2, size: int = 8) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch))


def of(module: nn.Module, size: int = 8) -> Trace:
    return trace(module, torch.zeros(1, 3, size, size))


def names(network: Trace) -> list[str]:
    return [cut.name for cut in network.cuts]


def assert_every_cut_is_exact(network: Trace, x: torch.Tensor) -> None:
    """In evaluation and training, from every cut, and with all tensors taken in one pass."""
    for train in (False, True):
        whole = copy.deepcopy(network.module).train(train)
        torch.manual_seed(0)
        y = whole(x.clone())
        torch.manual_seed(0)
        values = lower_at(network, names(network)).train(train)(x.clone())
        for cut, value in zip(network.cuts, values, strict=True):
            lower, upper = (part.train(train) for part in split(network, cut.name))
            torch.manual_seed(0)
            h = lower(x.clone())
            assert torch.equal(upper(h), y), cut.name
            assert torch.equal(h, value), cut.name
