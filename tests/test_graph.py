"""Following small networks and finding their cuts: pieces, refusals, names, layouts, the choice of what is shown."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regraft.cut import lower_at, split
from regraft.errors import CutError, TraceError
from regraft.graph import Trace, find_cut, trace
from small_networks import Does, Net, Root, assert_every_cut_is_exact, names, of, pictures

# ---- the mode -----------------------------------------------------------------------------------------------------


def test_a_submodule_that_branches_on_the_mode_stays_in_one_piece() -> None:
    network = of(Net(Does(lambda self, x: x * torch.rand(x.shape[:1])[:, None, None, None] if self.training else x)))
    assert [n.target for n in network.graph.nodes if n.op == "call_module"] == ["stem", "middle", "last", "head"]
    assert_every_cut_is_exact(network, pictures())


def test_a_question_about_the_mode_without_consequence_keeps_no_module_in_one_piece() -> None:
    def work(self: nn.Module, x: torch.Tensor) -> object:
        return self.two(F.dropout(self.one(x), self.drop.p if self.training else 0.0))

    parts = {"one": nn.Conv2d(4, 4, 1), "two": nn.Conv2d(4, 4, 1)}
    assert "middle.one" in names(of(Net(Does(work, drop=nn.Dropout(0.0), **parts))))
    assert "middle.one" not in names(of(Net(Does(work, drop=nn.Dropout(0.5), **parts))))


def test_the_outermost_module_may_not_branch_on_the_mode() -> None:
    module = Root(lambda self, x: self.a(x) if self.training else self.a(x) + 1, a=nn.Linear(4, 2))
    with pytest.raises(TraceError, match="Root.forward cannot be followed: it branches on self.training: move that"):
        trace(module, torch.zeros(1, 4))


# ---- pieces and refusals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "work",
    [
        lambda self, x: x if x.sum() > 0 else -x,
        lambda self, x: torch.stack(list(x)),
        lambda self, x: x * len(x),
        lambda self, x: x * int(x.shape[0]),
        lambda self, x: x * torch.rand(1),
        lambda self, x: x * random.choice([1, 1]),
        lambda self, x: nn.ReLU()(x),
        lambda self, x: setattr(self, "kept", x.shape) or x,
    ],
    ids=["branch", "loop", "len", "int", "torch.rand", "random", "made in forward", "keeps state"],
)
def test_a_submodule_that_cannot_be_followed_stays_in_one_piece(work: Callable[..., object]) -> None:
    network = of(Net(Does(work)))
    assert "middle" in {n.target for n in network.graph.nodes if n.op == "call_module"}
    assert names(network) == ["stem", "middle", "last", "mean"]
    assert "kept" not in vars(network.module.middle)
    assert_every_cut_is_exact(network, pictures())


def test_a_submodule_with_hooks_stays_in_one_piece() -> None:
    middle = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())
    middle.register_forward_hook(lambda module, args, output: output * 2)
    network = of(Net(middle))
    assert names(network) == ["stem", "middle", "last", "mean"]
    assert_every_cut_is_exact(network, pictures())


def test_an_outermost_module_that_cannot_be_followed_is_refused_with_the_line_of_its_code() -> None:
    with pytest.raises(
        TraceError, match=r"Root.forward \(.*test_graph.py:\d+\) cannot be followed: symbolically traced"
    ):
        trace(Root(lambda self, x: self.a(x) if x.mean() > 0 else x, a=nn.Linear(4, 4)), torch.zeros(1, 4))


def test_classes_named_as_leaves_stay_in_one_piece() -> None:
    class Pair(nn.Sequential):
        pass

    middle = Pair(nn.Conv2d(4, 4, 1), nn.ReLU())
    assert "middle.0" in names(of(Net(middle)))
    assert "middle.0" not in names(trace(Net(middle), torch.zeros(1, 3, 8, 8), leaf_modules=[Pair]))


@pytest.mark.parametrize(
    ("module", "example", "message"),
    [
        (Net(), torch.zeros(3), "must be a batch, of rank 2 or more"),
        (
            Net(),
            torch.zeros(1, 5, 8, 8),
            "Net must take a batch of 2 like the example, of shape .2, 5, 8, 8.; it raised",
        ),
    ],
)
def test_an_example_that_the_network_does_not_take_is_refused(
    module: nn.Module, example: torch.Tensor, message: str
) -> None:
    with pytest.raises(TraceError, match=message):
        trace(module, example)


def test_a_network_that_gives_something_else_each_time_is_refused() -> None:
    calls: list[int] = []
    module = Root(lambda self, x: self.a(x) * (calls.append(1) or len(calls)), a=nn.Linear(4, 4))
    with pytest.raises(TraceError, match="must compute the same whenever it runs; in evaluation mode"):
        trace(module, torch.zeros(1, 4))


def test_further_arguments_of_forward_keep_their_defaults() -> None:
    class Scaled(nn.Sequential):
        def forward(self, x: torch.Tensor, factor: float = 2.0, mask: torch.Tensor | None = None) -> torch.Tensor:
            x = self[1](self[0](x)) * factor
            return x if mask is None else x * mask

    assert_every_cut_is_exact(trace(Scaled(nn.Linear(4, 4), nn.ReLU()), torch.zeros(1, 4)), torch.randn(3, 4))


# ---- the network is left alone ------------------------------------------------------------------------------------


def test_tracing_leaves_modes_statistics_attributes_and_random_state_as_they_were() -> None:
    module = Net(nn.Sequential(nn.BatchNorm2d(4), Does(lambda self, x: x * torch.tensor(2.0))))
    module.train()
    module.last.eval()
    before, attributes = copy.deepcopy(module.state_dict()), set(vars(module))
    states = torch.get_rng_state(), random.getstate()
    of(module)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), module.state_dict().values(), strict=True))
    assert set(vars(module)) == attributes
    assert (module.training, module.last.training) == (True, False)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


def test_the_mode_of_modules_is_an_ordinary_attribute_again_after_a_failure() -> None:
    with pytest.raises(TraceError):
        trace(Root(lambda self, x: x if x.sum() > 0 else -x), torch.zeros(1, 4))
    assert "training" not in vars(nn.Module)
    assert nn.Linear(1, 1).eval().training is False


# ---- names --------------------------------------------------------------------------------------------------------


def test_a_cut_is_named_after_the_outermost_module_and_found_by_the_others() -> None:
    network = of(Net(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Sequential(nn.ReLU(), nn.Identity()))))
    cut = find_cut(network, "middle")
    assert set(cut.aliases) == {"middle.1", "middle.1.0", "middle.1.1"}
    assert all(find_cut(network, name) is cut for name in (*cut.aliases, cut.node))
    assert (cut.shape, cut.layout, cut.depth) == ((4, 8, 8), "NCHW", 3)


def test_a_block_that_returns_a_tuple_with_one_tensor_is_named() -> None:
    network = of(Net(Does(lambda self, x: self.last(*self.first(x)), first=Does(first), last=Does(lambda s, x: x))))
    assert "middle.first" in [name for cut in network.cuts for name in (cut.name, *cut.aliases)]


def first(self: nn.Module, x: torch.Tensor) -> object:
    return (x.relu(),)


def test_a_layer_that_runs_several_times_is_numbered() -> None:
    act = nn.ReLU()
    module = Root(lambda self, x: self.b(self.act(self.a(self.act(x)))), a=nn.Linear(4, 4), b=nn.Linear(4, 4), act=act)
    network = trace(module, torch.zeros(1, 4))
    assert names(network) == ["act@1", "a", "act@2"]
    with pytest.raises(CutError, match="'act' runs 2 times in Root: say one of act@1, act@2"):
        find_cut(network, "act")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "middle.inner.0",
            r"at 'middle.inner.0' 2 tensors are alive there \(stem, middle.inner.0\): the nearest cut below",
        ),
        ("head", "at 'head' it is the output of the network: the nearest cut below is 'mean'"),
        ("x", "at 'x' it is the input itself: above is 'stem'"),
        ("stemm", "Cut 'stemm' is not in Net: the nearest cuts are stem"),
        ("nonsense", "Cut 'nonsense' is not in Net: the cuts are stem"),
        ("middle.piece.0", "'middle.piece.0' lies inside 'middle.piece', which is followed as one piece: the nearest"),
        ("middle.spare", "Module 'middle.spare' is not run by Net.forward"),
        ("middle.pair", "'middle.pair' returns several"),
    ],
)
def test_a_name_that_is_no_cut_is_refused_with_the_reason_and_the_nearest_cuts(name: str, message: str) -> None:
    inner = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())
    piece = Branches(lambda self, x: self.get_submodule("0")(x) if x.sum() > -1e9 else x, **{"0": nn.Conv2d(4, 4, 1)})
    parts = {"inner": inner, "piece": piece, "spare": nn.ReLU(), "pair": Root(lambda s, x: (x * 1, x * 2))}
    network = of(Net(Does(lambda self, x: sum(self.pair(self.piece(x + self.inner(x)))), **parts)))
    with pytest.raises(CutError, match=message):
        find_cut(network, name)


class Branches(Does):
    pass


def test_a_network_without_cuts_says_so() -> None:
    network = trace(Root(lambda self, x: self.a(x), a=nn.Linear(2, 2)), torch.zeros(1, 2))
    assert network.cuts == ()
    with pytest.raises(CutError, match="Root has no such place"):
        split(network, "a")


@pytest.mark.parametrize("wrong", [[], "stem"])
def test_the_names_of_several_cuts_are_a_list(wrong: list[str]) -> None:
    with pytest.raises(CutError, match="one or more cuts in a list"):
        lower_at(of(Net()), wrong)


def test_nothing_above_the_deepest_named_cut_is_run() -> None:
    lower = lower_at(of(Net()), ["last", "stem"])
    assert {name.split(".")[0] for name, _ in lower.named_parameters()} == {"stem", "last"}
    last, stem = lower(pictures())
    assert torch.equal(last, lower.get_submodule("last")(stem))


# ---- layout and choice --------------------------------------------------------------------------------------------


class Tokens(nn.Module):
    """Patches, some tokens in front, blocks; the position embedding fixes the size of the picture."""

    def __init__(self, prefix: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.patch, self.block = nn.Conv2d(3, 6, 4, stride=4), nn.Linear(6, 6)
        self.front = nn.Parameter(torch.randn(1, prefix, 6))
        self.place = nn.Parameter(torch.randn(1, grid[0] * grid[1] + prefix, 6))
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.front.expand(x.shape[0], -1, -1), x], 1) + self.place
        return self.head(self.norm(x + self.block(x))[:, 0])


@pytest.mark.parametrize(("prefix", "grid"), [(0, (4, 4)), (1, (4, 4)), (5, (3, 3)), (1, (2, 4)), (2, (6, 4))])
def test_tokens_that_are_not_places_of_the_picture_are_counted(prefix: int, grid: tuple[int, int]) -> None:
    network = trace(Tokens(prefix, grid), torch.zeros(1, 3, 4 * grid[0], 4 * grid[1]))
    layouts = {cut.name: (cut.layout, cut.prefix_tokens) for cut in network.cuts}
    assert layouts["patch"] == ("NCHW", 0)
    assert layouts["transpose"] == ("tokens", 0)
    assert layouts["norm"] == ("tokens", prefix)
    assert layouts["getitem_1"] == ("vector", 0)
    assert "flatten" not in layouts
    assert_every_cut_is_exact(network, torch.randn(2, 3, 4 * grid[0], 4 * grid[1]))


@pytest.mark.parametrize("fixed", [False, True])
def test_channels_are_found_on_the_last_axis_too(fixed: bool) -> None:
    def work(self: nn.Module, x: torch.Tensor) -> object:
        x = self.b(self.a(x).permute(0, 2, 3, 1))
        return self.c(x.reshape(-1, 64 * 4) if fixed else x.mean((1, 2)))

    layers = {"a": nn.Conv2d(3, 4, 1), "b": nn.Linear(4, 4), "c": nn.Linear(256 if fixed else 4, 2)}
    layouts = {cut.name: cut.layout for cut in of(Root(work, **layers)).cuts}
    assert list(layouts.values())[:3] == ["NCHW", "NHWC", "NHWC"]


def test_an_axis_that_grows_with_the_picture_is_no_channel_axis() -> None:
    def work(self: nn.Module, x: torch.Tensor) -> object:
        return self.b(torch.einsum("bchw->bhwc", self.a(x)).mean((1, 2)))

    network = of(Root(work, a=nn.Conv2d(3, 8, 1), b=nn.Linear(8, 2)))
    assert [(cut.name, cut.layout) for cut in network.cuts] == [("a", "NCHW"), ("einsum", "NHWC"), ("mean", "vector")]


def test_where_the_size_is_fixed_the_next_layer_tells_the_channel_axis() -> None:
    def work(self: nn.Module, x: torch.Tensor) -> object:
        x = self.a(x).permute(0, 2, 3, 1).reshape(x.shape[0], 4, 2, 4, 2, 4).transpose(2, 3)
        return self.c(self.b(x.reshape(x.shape[0], 4, 4, 16)).flatten(1))

    network = of(Root(work, a=nn.Conv2d(3, 4, 1), b=nn.Linear(16, 4), c=nn.Linear(64, 2)))
    assert {cut.name: cut.layout for cut in network.cuts}["reshape_1"] == "NHWC"


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.act, self.two = nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.two(self.act(self.one(x)))


def residual(*stages: int) -> Trace:
    body = nn.Sequential(*[nn.Sequential(*[Residual(4) for _ in range(n)]) for n in stages])
    return trace(nn.Sequential(nn.Linear(3, 4), body, nn.LayerNorm(4), nn.Linear(4, 2)), torch.zeros(1, 3))


def test_the_ends_of_blocks_are_shown() -> None:
    network = residual(3, 4)
    shown = [cut.name for cut in network.cuts if cut.shown]
    assert shown[:9] == ["0", "1.0.0", "1.0.1", "1.0", "1.1.0", "1.1.1", "1.1.2", "1", "2"]


def test_many_blocks_are_thinned_evenly_and_the_ends_of_stages_stay() -> None:
    network = residual(15, 25, 10)
    shown = [cut for cut in network.cuts if cut.shown]
    depths = [cut.depth for cut in shown]
    assert len(shown) == 25
    assert {"1.0", "1.1", "1"} <= {cut.name for cut in shown}
    assert max(b - a for a, b in zip(depths, depths[1:], strict=False)) <= 4


def test_a_plain_network_shows_values_after_activation_first() -> None:
    layers = [layer for _ in range(14) for layer in (nn.Linear(4, 4), nn.ReLU())]
    network = trace(nn.Sequential(*layers, nn.Linear(4, 2)), torch.zeros(1, 4))
    assert [cut.name for cut in network.cuts if cut.shown] == [str(i) for i in range(1, 28, 2)]


def test_a_short_network_shows_all_its_cuts() -> None:
    network = trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2)), torch.zeros(1, 4))
    assert [cut.shown for cut in network.cuts] == [True, True, True]
