"""The contract of a cut for networks of other libraries: both parts together are the network, also while training."""

from __future__ import annotations

import copy
from collections.abc import Collection

import torch
from torch import nn

from regraft.cut import split
from regraft.graph import Trace


def pictures(side: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(batch))


def blocks_and_cuts(network: Trace, kinds: Collection[str]) -> tuple[list[str], list[str]]:
    """Paths of the modules of these classes, and those of them that are cuts."""
    cuts = {name for cut in network.cuts for name in (cut.name, *cut.aliases)}
    blocks = [path for path, m in network.module.named_modules() if type(m).__name__ in kinds]
    return blocks, [path for path in blocks if path in cuts]


def some(network: Trace, n: int) -> list[str]:
    """About n shown cuts, spread over the depth."""
    shown = [cut.name for cut in network.cuts if cut.shown]
    return shown[len(shown) // (2 * n) :: max(1, len(shown) // n)][:n]


def assert_parts_are_the_whole(network: Trace, side: int, names: Collection[str]) -> None:
    """Outputs in evaluation for batches of 1 and 3; outputs, gradients and statistics of a step in training."""
    module, x = network.module, pictures(side)
    with torch.no_grad():
        wholes = [module.eval()(pictures(side, batch)) for batch in (1, 3)]
        for name in names:
            lower, upper = (part.eval() for part in split(network, name))
            for batch, whole in zip((1, 3), wholes, strict=True):
                assert torch.equal(upper(lower(pictures(side, batch))), whole), name
    start, whole = copy.deepcopy(module.state_dict()), copy.deepcopy(module).train()
    torch.manual_seed(1)
    y = whole(x)
    y.square().sum().backward()
    for name in names:
        lower, upper = (part.train() for part in split(network, name))
        torch.manual_seed(1)
        z = upper(lower(x))
        assert torch.equal(z, y), name
        z.square().sum().backward()
        for (path, p), q in zip(module.named_parameters(), whole.parameters(), strict=True):
            assert (p.grad is None and q.grad is None) or torch.equal(p.grad, q.grad), (name, path)
        for (path, b), c in zip(module.named_buffers(), whole.buffers(), strict=True):
            assert torch.equal(b, c), (name, path)
        module.zero_grad(set_to_none=True)
        module.load_state_dict(start)


def assert_a_step_trains(network: Trace, side: int, name: str) -> None:
    """One step of gradient descent above a cut lowers the loss and changes nothing below it."""
    start = copy.deepcopy(network.module.state_dict())
    lower, upper = (part.eval() for part in split(network, name))
    with torch.no_grad():
        h = lower(pictures(side, 4))
    target = torch.randn(upper(h).shape, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(upper.parameters(), lr=0.01)
    before = nn.functional.mse_loss(upper(h), target)
    before.backward()
    optimizer.step()
    network.module.zero_grad(set_to_none=True)
    with torch.no_grad():
        assert nn.functional.mse_loss(upper(h), target) < before
    above = {id(p) for p in upper.parameters()}
    below = [path for path, p in network.module.named_parameters() if id(p) not in above]
    assert below
    assert all(torch.equal(network.module.state_dict()[path], start[path]) for path in below)
    network.module.load_state_dict(start)
