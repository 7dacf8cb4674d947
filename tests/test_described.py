"""Networks written in Python become lists of operations where the list has words for them, and compute the same."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from regraft.described import as_operations
from regraft.errors import ReaderError
from regraft.graph import trace
from regraft.operations import Network, Operation, Operations, build, operations_from_json


class Skip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.second, self.drop, self.out = nn.Conv2d(6, 6, 3, padding="same"), nn.Dropout(0.3), nn.Linear(6 * 16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.first(x)))
        y = F.max_pool2d(x + F.leaky_relu(self.second(x), 0.2), 2)
        y = F.dropout(y, 0.2, self.training)
        return F.log_softmax(self.out(self.drop(y.view(y.size(0), -1))), dim=1)


class Joined(Skip):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.sigmoid(self.first(x))
        return torch.cat([x, self.second(x)], 1).mean((2, 3))


class Unsayable(Skip):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.fft.fft(self.first(x)).real.mean((2, 3))


def sequence() -> nn.Module:
    layers = OrderedDict(flat=nn.Flatten(), hidden1=nn.Linear(64, 9), act=nn.SELU(), out=nn.Linear(9, 3))
    return nn.Sequential(layers)


@pytest.mark.parametrize("make", [Skip, Joined, sequence])
def test_network_in_python_is_said_in_operations_and_comes_back_from_json(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    module, x = make().eval(), torch.randn(3, 1, 8, 8)
    said = as_operations(module, x)
    assert said is not None
    assert torch.allclose(said(x), module(x), atol=1e-6)
    told = json.loads(json.dumps(said.operations.to_json()))
    again = build(operations_from_json(told), said.state_dict())
    assert torch.equal(again(x), said(x))
    assert said.state_dict().keys() <= module.state_dict().keys()
    traced = trace(again, x)
    assert len(traced.cuts) >= 3
    loss = again.train()(x).square().sum()
    loss.backward()
    assert all(p.grad is not None for p in again.parameters())


class Heads(Skip):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        x = F.relu(self.norm(self.first(x)))
        return x.mean((2, 3)), self.second(x)


def test_of_several_outputs_the_first_is_said_with_the_layers_that_lead_to_it() -> None:
    torch.manual_seed(0)
    module, x = Heads().eval(), torch.randn(3, 1, 8, 8)
    said = as_operations(module, x)
    assert said is not None
    assert torch.allclose(said(x), module(x)[0], atol=1e-6)
    assert {name.split(".")[0] for name in said.state_dict()} == {"first", "norm"}
    assert len(module(x)) == 2


def test_what_the_list_has_no_word_for_stays_a_module() -> None:
    x = torch.randn(2, 1, 8, 8)
    assert as_operations(Unsayable().eval(), x) is None


def linear(**options: object) -> Operations:
    return Operations((Operation("fc", "Linear", ("input",), {"in_features": 3, "out_features": 2} | options),), "fc")


@pytest.mark.parametrize(
    ("operations", "says"),
    [
        (Operations((Operation("x", "Lambda", ("input",)),), "x"), "must be one that regraft knows; 'x' is 'Lambda'"),
        (Operations((Operation("x", "os.system", ("input",)),), "x"), "must be one that regraft knows"),
        (Operations((Operation("x", "__class__", ("input",)),), "x"), "must be one that regraft knows"),
        (Operations((Operation("x", "ReLU", ("y",)),), "x"), "come after its inputs; 'x' does not"),
        (Operations((Operation("x", "ReLU", ("input",)), Operation("x", "ReLU", ("x",))), "x"), "a name of its own"),
        (Operations((), "y"), "The output of a network must be one of its steps; 'y' is none"),
        (linear(wrong=1), "must be a Linear that can be made"),
        (linear(in_features=-1), "must be a Linear that can be made"),
        (Operations((Operation("p", "parameter", (), {"shape": "no"}),), "p"), "must be a parameter that can be made"),
    ],
)
def test_step_that_is_not_of_the_list_is_refused(operations: Operations, says: str) -> None:
    with pytest.raises(ReaderError, match=says):
        build(operations)


def test_layers_are_not_allocated_on_the_word_of_a_list() -> None:
    huge = linear(in_features=10**9, out_features=10**6)
    with pytest.raises(ReaderError, match=r"fc.weight \(2, 3\) instead of \(1000000, 1000000000\)"):
        build(huge, {"fc.weight": torch.zeros(2, 3), "fc.bias": torch.zeros(2)})


def test_tensors_must_be_those_of_the_steps() -> None:
    good = {"fc.weight": torch.randn(2, 3), "fc.bias": torch.zeros(2)}
    assert isinstance(build(linear(), good), Network)
    with pytest.raises(ReaderError, match="fc.bias absent instead of"):
        build(linear(), {"fc.weight": good["fc.weight"]})
    with pytest.raises(ReaderError, match="other .* instead of absent"):
        build(linear(), good | {"other": torch.zeros(1)})


@pytest.mark.parametrize(("size", "kernel", "stride"), [(7, 3, 2), (8, 3, 2), (9, 4, 3), (5, 2, 1), (6, 5, 4)])
def test_same_padding_gives_as_many_outputs_as_the_stride_says(size: int, kernel: int, stride: int) -> None:
    window = {"kernel": [kernel] * 2, "stride": [stride] * 2}
    network = build(Operations((Operation("pool", "AverageSame", ("input",), window),), "pool"), {})
    x = torch.ones(1, 2, size, size)
    assert network(x).shape[2:] == (-(-size // stride),) * 2
    assert torch.equal(network(x), torch.ones(1, 2, -(-size // stride), -(-size // stride)))
