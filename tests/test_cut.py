"""Cutting small networks in two: modes, shared tensors, sizes that cross the cut, operations in place."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regraft.cut import split
from regraft.errors import CutError
from regraft.graph import trace
from small_networks import Net, Root, assert_every_cut_is_exact, names, of, pictures

# ---- the mode -----------------------------------------------------------------------------------------------------


def test_the_mode_is_read_when_a_part_runs_not_when_it_is_traced() -> None:
    module = Root(
        lambda self, x: self.b(F.dropout(self.a(x), 0.5, self.training)), a=nn.Linear(4, 4), b=nn.Linear(4, 2)
    )
    for train in (True, False):
        lower, upper = split(trace(module.train(train), torch.zeros(1, 4)), "a")
        x = torch.randn(3, 4)
        assert not torch.equal(upper.train()(lower(x)), upper(lower(x)))
        assert torch.equal(upper.eval()(lower(x)), module.eval()(x))


def test_parts_have_a_mode_of_their_own_even_where_they_hold_the_same_layer() -> None:
    def work(self: nn.Module, x: torch.Tensor) -> object:
        return self.c(self.drop(self.b(self.drop(self.a(x)))))

    layers = {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4), "drop": nn.Dropout(0.5)}
    module = Root(work, **layers).eval()
    lower, upper = split(trace(module, torch.zeros(1, 4)), "b")
    upper.train()
    x = torch.randn(3, 4)
    assert torch.equal(lower(x), lower(x))
    assert not torch.equal(upper(lower(x)), upper(lower(x)))
    assert not module.training
    assert not module.drop.training


# ---- the tensors of the parts ---------------------------------------------------------------------------------------


def test_parts_hold_the_very_tensors_of_the_network_under_their_names() -> None:
    class Middle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.norm = nn.Parameter(torch.ones(4, 1, 1)), nn.BatchNorm2d(4)
            self.register_buffer("kept", torch.ones(1))
            self.register_buffer("forgotten", torch.ones(1), persistent=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x * self.scale) * self.kept + self.forgotten

    module = Net(Middle())
    lower, upper = split(of(module), "middle.norm")
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    for part in (lower, upper):
        held = dict(part.named_parameters()) | dict(part.named_buffers())
        assert all(tensors[name] is tensor for name, tensor in held.items())
    assert {*lower.state_dict(), *upper.state_dict()} == set(module.state_dict())
    assert not {*lower.state_dict()} & {*upper.state_dict()}


def test_a_copy_of_a_part_works_alone() -> None:
    module = Net(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Dropout(0.5))).eval()
    lower, upper = split(of(module), "stem")
    twin, x = copy.deepcopy(upper), pictures()
    y = twin(lower(x))
    with torch.no_grad():
        module.last.weight.zero_()
    assert torch.equal(twin(lower(x)), y)
    assert not torch.equal(upper(lower(x)), y)


# ---- what counts as alive -----------------------------------------------------------------------------------------


def test_sizes_of_earlier_tensors_are_read_off_the_tensor_at_the_cut() -> None:
    def work(self: nn.Module, x: torch.Tensor) -> object:
        batch, _, height, width = x.shape
        x = self.b(self.a(x)).flatten(2)
        return self.c(x.view(batch, 4, height, width).mean((2, 3)) + x.shape[0] * 0)

    layers = {"a": nn.Conv2d(3, 4, 1), "b": nn.Conv2d(4, 4, 3, padding=1), "c": nn.Linear(4, 2)}
    network = of(Root(work, **layers))
    assert names(network)[:2] == ["a", "b"]
    assert_every_cut_is_exact(network, pictures())
    lower, upper = split(network, "a")
    x = torch.randn(5, 3, 6, 10)
    assert torch.equal(upper(lower(x)), network.module(x))


def test_above_tokens_that_carry_height_and_width_beside_them_another_size_is_refused() -> None:
    def work(self: nn.Module, x: torch.Tensor) -> object:
        x = self.a(x)
        height, width = x.shape[2:]
        x = self.b(x.flatten(2).transpose(1, 2))
        return self.c(x.transpose(1, 2).reshape(-1, 4, height, width)).mean((2, 3))

    layers = {"a": nn.Conv2d(3, 4, 1), "b": nn.Linear(4, 4), "c": nn.Conv2d(4, 4, 3)}
    network = of(Root(work, **layers))
    assert "b" in names(network)
    assert_every_cut_is_exact(network, pictures())
    lower, upper = split(network, "b")
    with pytest.raises(CutError, match=r"must have shape .batch, 64, 4.; found .2, 96, 4."):
        upper(lower(torch.randn(2, 3, 8, 12)))


def test_what_depends_on_weights_or_sizes_alone_is_computed_on_both_sides() -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.a, self.b = nn.Parameter(torch.randn(4)), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            bias = self.table.sigmoid() * 16
            place = torch.arange(x.shape[1], device=x.device) / x.shape[1]
            return self.b(self.a(x + bias) + bias + place[:, None])

    network = trace(Biased(), torch.zeros(1, 6, 4))
    assert names(network) == ["add", "a", "add_1", "add_2"]
    assert_every_cut_is_exact(network, torch.randn(2, 6, 4))


def test_lower_holds_nothing_that_only_upper_needs() -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.a, self.b = nn.Parameter(torch.randn(4)), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            bias = self.table.sigmoid()
            return self.b(self.a(x) + bias)

    lower, upper = split(trace(Biased(), torch.zeros(1, 4)), "a")
    assert set(lower.state_dict()) == {"a.weight", "a.bias"}
    assert set(upper.state_dict()) == {"table", "b.weight", "b.bias"}


def test_upper_returns_what_the_network_returns_in_the_same_form() -> None:
    def work(self: nn.Module, x: torch.Tensor) -> object:
        x = self.a(x)
        return {"scores": self.b(x), "rest": [x, (x + 1, 2)]}

    module = Root(work, a=nn.Linear(4, 4), b=nn.Linear(4, 2))
    lower, upper = split(trace(module, torch.zeros(1, 4)), "a")
    x = torch.randn(3, 4)
    assert repr(upper(lower(x))) == repr(module(x))


def test_there_is_no_cut_where_examples_are_mixed() -> None:
    def work(self: nn.Module, x: torch.Tensor) -> object:
        x = self.a(x)
        return self.b((x @ x.T).softmax(1).sum(1, keepdim=True))

    network = trace(Root(work, a=nn.Linear(4, 4), b=nn.Linear(1, 2)), torch.zeros(1, 4))
    assert names(network) == ["a", "sum_1"]


def test_both_parts_keep_the_checks_that_the_network_makes() -> None:
    def work(self: nn.Module, x: torch.Tensor) -> object:
        torch._assert(x.shape[2] == 8, "the picture must be 8 high")
        x = self.a(x)
        torch._assert(x.shape[3] == 8, "the picture must be 8 wide")
        return self.b(x).mean((2, 3))

    lower, upper = split(of(Root(work, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 2, 1))), "a")
    with pytest.raises(AssertionError, match="8 high"):
        lower(torch.randn(1, 3, 7, 8))
    with pytest.raises(AssertionError, match="8 wide"):
        upper(lower(torch.randn(1, 3, 8, 7)))


def test_random_numbers_are_drawn_on_one_side_only() -> None:
    def work(self: nn.Module, x: torch.Tensor) -> object:
        noise = torch.bernoulli(self.a.weight.sigmoid())
        return self.b(self.a(x) @ noise)

    network = trace(Root(work, a=nn.Linear(4, 4), b=nn.Linear(4, 4)), torch.zeros(1, 4))
    assert names(network) == ["matmul"]
    assert_every_cut_is_exact(network, torch.randn(3, 4))


def test_there_is_no_cut_where_the_batch_is_folded_into_windows() -> None:
    def work(self: nn.Module, x: torch.Tensor) -> object:
        x = self.a(x)
        windows = self.b(x.view(x.shape[0] * 2, 2, 4))
        return self.c(windows.view(-1, 4, 4))

    network = trace(Root(work, a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 4)), torch.zeros(1, 4, 4))
    assert names(network) == ["a", "view_1"]
    assert_every_cut_is_exact(network, torch.randn(3, 4, 4))


# ---- in-place operations ------------------------------------------------------------------------------------------


def in_place() -> Root:
    def work(self: nn.Module, x: torch.Tensor) -> object:
        x = self.norm(self.a(x))
        x = self.act(x)
        x = self.b(x)
        x += 1
        x.mul_(2)
        x = self.drop(x)
        x[:, 0] = 0
        return self.c(F.relu(x.flatten(1), inplace=True))

    layers = {"a": nn.Conv2d(3, 4, 1), "norm": nn.BatchNorm2d(4), "act": nn.ReLU(inplace=True)}
    more = {"b": nn.Conv2d(4, 4, 1), "drop": nn.Dropout(0.5, inplace=True), "c": nn.Linear(256, 2)}
    return Root(work, **layers, **more)


def test_operations_in_place_change_no_tensor_at_a_cut() -> None:
    network = of(in_place())
    assert {"norm", "b"} <= set(names(network))
    assert_every_cut_is_exact(network, pictures())
    for cut in network.cuts:
        lower, upper = (part.eval() for part in split(network, cut.name))
        h = lower(pictures())
        before = h.clone()
        assert torch.equal(upper(h), upper(h)), cut.name
        assert torch.equal(h, before), cut.name
    assert network.module.act.inplace


def test_a_tensor_that_requires_gradients_can_go_into_an_upper_part_that_works_in_place() -> None:
    lower, upper = (part.eval() for part in split(of(in_place()), "norm"))
    h = lower(pictures()).detach().requires_grad_()
    upper(h).sum().backward()
    assert h.grad is not None


def test_a_value_under_two_names_is_changed_under_both() -> None:
    def work(self: nn.Module, x: torch.Tensor) -> object:
        x = self.a(x)
        same = x
        x += 1
        x -= 0.5
        x *= 2
        x /= 3
        return self.b(x * same)

    network = trace(Root(work, a=nn.Linear(4, 4), b=nn.Linear(4, 2)), torch.zeros(1, 4))
    assert names(network) == ["a", "mul"]
    with torch.no_grad():
        assert_every_cut_is_exact(network, torch.randn(3, 4))
