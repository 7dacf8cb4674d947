"""A summary counts what the textbook counts, and says what is trained, what is frozen and what mode a layer is in."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from regraft.nn import mlp, summary


def test_totals_of_the_textbooks_network_with_batch_norm() -> None:
    """Geron, chapter 11: 271,346 parameters, of which 2,368 running statistics."""
    module = mlp([784, 300, 100, 10], norm="batch")
    found = summary(module, (784,))
    assert (found.total, found.trainable, found.non_trainable) == (271_346, 268_978, 2_368)
    flat = summary(nn.Sequential(nn.Flatten(), *module), (1, 28, 28))
    assert (flat.total, flat.trainable) == (271_346, 268_978)
    assert [layer.outputs for layer in flat.layers][:3] == [((784,),), ((784,),), ((300,),)]
    assert "271,346 in all, 268,978 trainable, 2,368 not" in str(found)


def test_frozen_layers_and_modes_are_shown_and_the_module_stays_as_it_is() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))
    module[0].requires_grad_(False)
    module[1].eval()
    before = {name: t.clone() for name, t in module.state_dict().items()}
    found = summary(module, (3, 8, 8))
    assert [layer.training for layer in found.layers] == [True, False, True, True, True]
    assert [m.training for m in module] == [True, False, True, True, True]
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())
    conv, norm = found.layers[:2]
    assert (conv.trainable, conv.frozen, conv.buffers) == (0, 3 * 4 * 9 + 4, 0)
    assert (norm.trainable, norm.frozen, norm.buffers) == (8, 0, 8)
    assert not any(m._forward_hooks for m in module.modules())


def test_shared_weights_are_counted_once_and_layers_that_do_not_run_are_named() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.b = nn.Linear(4, 4)
            self.b.weight = self.a.weight
            self.unused = nn.Linear(4, 9)
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.b(self.a(self.a(x))), self.scale

    module = Shared()
    found = summary(module, (4,))
    assert found.total == sum(p.numel() for p in module.parameters())
    by_path = {layer.path: layer for layer in found.layers}
    assert by_path["a"].uses == 2
    assert by_path["unused"].outputs == ()
    assert by_path[""].trainable == 3
    assert "not called" in str(found)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_modules_of_other_numbers_are_run_in_their_own(dtype: torch.dtype) -> None:
    assert summary(nn.Sequential(nn.Linear(3, 2)).to(dtype), (3,)).total == 8
