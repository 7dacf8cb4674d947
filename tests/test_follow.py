"""Following code that branches on sizes and types, adapts itself, or returns tuples: what stays whole, what does not.

The contract (both parts together are the network, bit for bit) is checked at every cut of every network here.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from torch import nn

from regraft.cut import lower_at, split
from regraft.errors import TraceError
from regraft.graph import Trace, trace
from small_networks import Does, Net, assert_every_cut_is_exact, names, of, pictures


class Wide(nn.Module):
    """Two blocks behind each other; `work` runs before them and may look at anything."""

    def __init__(self, work: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.work = work
        self.first = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(self.work(self, x)))


def pieces(network: Trace) -> set[str]:
    """Modules with parts that were kept in one piece."""
    called = {str(n.target) for n in network.graph.nodes if n.op == "call_module"}
    return {path for path in called if any(True for _ in network.module.get_submodule(path).children())}


def of_type(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if x.dtype != self.first[0].weight.dtype or x.ndim != 4 or x.shape[1] != 4:
        raise ValueError("another network")
    return x


# ---- branches on sizes and types ----------------------------------------------------------------------------------


def test_a_question_about_types_and_channels_stops_nothing() -> None:
    network = of(Net(Wide(of_type)))
    assert pieces(network) == set()
    assert {"middle.first", "middle"} <= set(names(network))
    assert_every_cut_is_exact(network, pictures())
    assert_every_cut_is_exact(network, pictures(3, 12))


def test_sizes_are_taken_apart_and_counted() -> None:
    def work(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        shape = (*x.shape[:2], -1)
        assert len(x.shape) == 4
        return x.reshape(shape).reshape(x.shape) * min(4, x.shape[1])

    network = of(Net(Wide(work)))
    assert pieces(network) == set()
    assert_every_cut_is_exact(network, pictures(1, 12))


def resized(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x * 2 if x.shape[2] == 8 else x * 3


def test_a_small_module_that_branches_on_the_picture_size_stays_in_one_piece_for_all_sizes() -> None:
    network = of(Net(Does(resized, layer=nn.Conv2d(4, 4, 1))))
    assert pieces(network) == {"middle"}
    assert_every_cut_is_exact(network, pictures(2, 8))
    assert_every_cut_is_exact(network, pictures(2, 12))


def test_a_large_module_that_branches_on_the_picture_size_is_followed_for_the_size_of_the_example() -> None:
    network = of(Net(Wide(resized)))
    assert "middle.first" in names(network)
    assert_every_cut_is_exact(network, pictures(2, 8))
    lower, _ = split(network, "middle.first")
    with pytest.raises(TraceError, match="keeps to the way through its code that the example took"):
        lower(pictures(2, 12))


def test_sizes_that_take_the_same_way_are_taken_by_the_parts() -> None:
    network = of(Net(Wide(lambda self, x: x if x.shape[2] % 2 else x * 2)))
    assert_every_cut_is_exact(network, pictures(2, 8))
    assert_every_cut_is_exact(network, pictures(2, 12))
    lower, _ = split(network, "middle.first")
    with pytest.raises(TraceError, match="would take another one"):
        lower(pictures(2, 9))


def test_parts_can_be_run_in_another_precision() -> None:
    lower, _ = split(of(Net(Wide(of_type))), "middle.first")
    for layer in lower.modules():
        if isinstance(layer, nn.Conv2d):
            layer.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert lower(pictures()).dtype == torch.bfloat16
    with pytest.raises(RuntimeError):
        lower(pictures())


@pytest.mark.parametrize("one", [True, False], ids=["one picture", "several"])
def test_a_module_that_branches_on_the_size_of_the_batch_stays_in_one_piece(one: bool) -> None:
    network = of(Net(Wide(lambda self, x: x * 2 if (x.shape[0] == 1) == one else x)))
    assert pieces(network) == {"middle"}
    assert_every_cut_is_exact(network, pictures(1))
    assert_every_cut_is_exact(network, pictures(5))


def test_a_module_that_branches_on_content_stays_in_one_piece() -> None:
    network = of(Net(Wide(lambda self, x: x if x.sum() > 0 else -x)))
    assert pieces(network) == {"middle"}
    assert_every_cut_is_exact(network, pictures())
    assert_every_cut_is_exact(network, -pictures())


def test_answers_leave_caches_statistics_and_random_state_alone() -> None:
    @functools.lru_cache
    def scale(size: int) -> torch.Tensor:
        return torch.full((1,), 1.0 + size)

    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.seen = nn.BatchNorm2d(4), {}

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen[int(x.shape[2])] = x.detach()
            return self.norm(x) * scale(int(x.shape[3]))

    middle = nn.Sequential(Caching(), Wide(of_type))
    module = Net(middle)
    before, state = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    network = of(module)
    assert pieces(network) == {"middle.0"}
    assert type(scale(8)) is torch.Tensor
    assert middle[0].seen == {}
    assert all(torch.equal(a, b) for a, b in zip(before.values(), module.state_dict().values(), strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert_every_cut_is_exact(network, pictures())


# ---- state --------------------------------------------------------------------------------------------------------


class Adapting(nn.Module):
    """Shrinks its window for good when it meets a map that is smaller."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.window = nn.Conv2d(4, 4, 1), 8

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if min(x.shape[2], x.shape[3]) <= self.window:
            self.window = min(x.shape[2], x.shape[3])
        return self.conv(x) * self.window


def test_a_layer_that_adapts_itself_to_a_size_is_followed_at_the_size_of_the_example() -> None:
    module = Net(Adapting())
    network = of(module)
    assert pieces(network) == {"middle"}
    assert module.middle.window == 8
    assert_every_cut_is_exact(network, pictures(2, 8))


def test_what_a_module_puts_into_its_dictionaries_is_undone() -> None:
    def work(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if "scale" not in self.kept:
            self.kept["scale"] = self.layer.weight.mean().detach()
        return self.layer(x) * self.kept["scale"]

    middle = Does(work, layer=nn.Conv2d(4, 4, 1))
    middle.kept = {}
    network = of(Net(middle))
    assert pieces(network) == {"middle"}
    assert middle.kept == {}
    assert_every_cut_is_exact(network, pictures())


def test_a_mode_that_changes_nothing_hides_no_sizes() -> None:
    """Positions come from the size alone, in a module that asks for the mode and returns two tensors."""

    class Positions(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            across = torch.arange(x.shape[3], dtype=torch.float32)
            if self.training:
                across = across + 0 if False else across
            return torch.cos(across), torch.sin(across)

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions, self.one, self.two = Positions(), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            cos, sin = self.positions(x)
            return self.two(self.one(x) * cos) * sin

    network = of(Net(Turned()))
    assert {"middle.one", "middle.two"} <= set(names(network))
    assert_every_cut_is_exact(network, pictures())


# ---- tuples -------------------------------------------------------------------------------------------------------


class WithNothing(nn.Module):
    """Returns its result beside what it did not compute; a hook keeps it in one piece."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.register_forward_hook(lambda module, args, output: output)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self.conv(x), None


def test_the_one_tensor_of_a_piece_that_returns_a_tuple_bears_its_name() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([WithNothing(), WithNothing()])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x, _weights = block(x)
            return x

    network = of(Net(Pair()))
    assert {"middle.blocks.0", "middle"} <= set(names(network))
    assert_every_cut_is_exact(network, pictures())


def test_parts_of_a_tuple_that_nobody_uses_hide_no_cut() -> None:
    def work(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        kept, _, _ = self.layer(x).chunk(3, 1)
        return kept

    network = of(Net(Does(work, layer=nn.Conv2d(4, 12, 1))))
    assert "middle.layer" in names(network)
    assert_every_cut_is_exact(network, pictures())


# ---- what is written in place above a cut -------------------------------------------------------------------------


def test_what_is_made_of_weights_in_place_is_made_above_every_cut() -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
            self.table = nn.Parameter(torch.randn(4, 2))
            self.bias = nn.Sequential(nn.Linear(2, 8), nn.ReLU(inplace=True), nn.Linear(8, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(self.one(x) + self.bias(self.table).view(4, 1, 1))

    network = of(Net(Biased()))
    assert {"stem", "middle", "last"} <= set(names(network))
    assert_every_cut_is_exact(network, pictures())
    assert lower_at(network, ["stem"])(pictures())[0].shape == (2, 4, 8, 8)


def test_without_an_example_a_module_that_branches_on_sizes_stays_in_one_piece() -> None:
    from regraft.graph.follow import follow

    followed = follow(Net(Wide(of_type)))
    assert [n.target for n in followed.graph.nodes if n.op == "call_module"] == ["stem", "middle", "last", "head"]
    assert trace(Net(Wide(of_type)), torch.zeros(1, 3, 8, 8)).graph is not followed.graph
