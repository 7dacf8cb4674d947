"""Weights of every usual kind of checkpoint find their places; what could be meant in two ways is refused."""

from __future__ import annotations

import itertools
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn

from regraft.backbone import load_backbone
from regraft.errors import ReaderError
from regraft.readers import read_checkpoint
from regraft.weights import restore


def drawn(module: nn.Module, seed: int) -> nn.Module:
    """The module with other numbers everywhere."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return module


def net(**layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


def pair(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    return drawn(make(), 1), drawn(make(), 2)


def plain(names: Sequence[str] = ("conv", "bn", "fc"), classes: int = 3) -> nn.Sequential:
    conv, bn, fc = names
    return net(**{conv: nn.Conv2d(3, 4, 3), bn: nn.BatchNorm2d(4), "relu": nn.ReLU(), fc: nn.Linear(4, classes)})


def state(module: nn.Module, prefix: str = "") -> dict[str, torch.Tensor]:
    return {prefix + k: v.clone() for k, v in module.state_dict().items() if not k.endswith("num_batches_tracked")}


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(state(a).values(), state(b).values(), strict=True))


# --- order ---


def test_files_that_sort_their_names_are_taken_layer_by_layer_with_each_tensor_in_its_own_place(tmp_path: Path) -> None:
    source, target = drawn(plain(("a1", "b2", "c3")), 1), drawn(plain(("conv", "bn", "zz")), 2)
    save_file(state(source), tmp_path / "w.safetensors")
    coverage = restore(target, tmp_path / "w.safetensors", quiet=True)
    assert coverage.by == "order"
    assert same(target, source)


@pytest.mark.parametrize("numbered", [True, False])
def test_equal_layers_in_a_sorted_file_are_taken_only_where_numbers_tell_their_order(
    tmp_path: Path, numbered: bool
) -> None:
    names = [f"dense_{i}" for i in range(1, 13)] if numbered else list("lkjihgfedcba")
    source = drawn(net(**{name: nn.Linear(5, 5, bias=False) for name in names}), 1)
    target = drawn(net(**{f"hidden{i}": nn.Linear(5, 5, bias=False) for i in range(1, 13)}), 2)
    save_file(state(source), tmp_path / "w.safetensors")
    if numbered:
        restore(target, tmp_path / "w.safetensors", quiet=True)
        assert same(target, source)
    else:
        with pytest.raises(ReaderError, match="nothing does"):
            restore(target, tmp_path / "w.safetensors", quiet=True)


def test_what_a_file_calls_a_bias_never_becomes_a_weight() -> None:
    target = drawn(net(ln=nn.LayerNorm(4), fc=nn.Linear(4, 4)), 2)
    given = {"x.bias": torch.ones(4), "x.weight": torch.zeros(4), "y.weight": torch.ones(4, 4), "y.bias": torch.ones(4)}
    restore(target, given, quiet=True)
    assert torch.equal(target.ln.weight, torch.zeros(4))
    assert torch.equal(target.ln.bias, torch.ones(4))


def test_arrays_in_a_list_as_theano_keeps_them_are_taken_in_order() -> None:
    source, target = pair(lambda: net(a=nn.Linear(6, 5), b=nn.Linear(5, 3)))
    listed = [array for layer in source for array in (layer.weight.detach().T.numpy(), layer.bias.detach().numpy())]
    restore(target, listed, layout="theano", quiet=True)
    assert same(target, source)


# --- prefixes ---


@pytest.mark.parametrize("prefix", ["cnn.", "backbone.body.", "resnet.", "online_encoder.", "module.encoder_q."])
def test_any_prefix_is_found_where_something_else_lies_beside_the_network(prefix: str) -> None:
    source, target = pair(plain)
    beside = {"projector.weight": torch.ones(2, 2), "queue": torch.ones(9), "queue_ptr": torch.ones(1)}
    coverage = restore(target, {**beside, **state(source, prefix)}, quiet=True)
    assert (coverage.by, coverage.share) == ("name", 1)
    assert same(target, source)


def test_what_is_inside_a_prefix_comes_before_what_has_the_same_name_beside_it() -> None:
    source, target = pair(lambda: net(conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4), fc=nn.Linear(4, 2)))
    given = {**state(source, "backbone."), "norm.weight": torch.full((4,), 99.0)}
    restore(target, given, quiet=True)
    assert same(target, source)


@pytest.mark.parametrize(
    ("meant", "other"),
    [("teacher.", "student."), ("module.encoder_q.", "module.encoder_k."), ("online.", "target.")],
)
@pytest.mark.parametrize("first", [True, False])
def test_of_two_networks_of_a_known_method_the_one_to_be_used_is_taken(meant: str, other: str, first: bool) -> None:
    source, target = pair(plain)
    parts = [state(source, meant), state(drawn(plain(), 3), other)]
    restore(target, dict(item for part in (parts if first else parts[::-1]) for item in part.items()), quiet=True)
    assert same(target, source)


def test_two_networks_that_fit_equally_are_refused_until_one_is_chosen() -> None:
    source, target = pair(plain)
    given = {**state(drawn(plain(), 3), "left."), **state(source, "right.")}
    with pytest.raises(ReaderError, match=r"under left and those under right both do: choose with --rename left=\."):
        restore(target, given, quiet=True)
    restore(target, given, rename={"right": ""}, quiet=True)
    assert same(target, source)
    twins = {**state(source, "left."), **state(source, "right.")}
    assert restore(target, twins, quiet=True).share == 1


@pytest.mark.parametrize("wrapper", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
def test_wrappers_are_passed_anywhere_in_a_name(wrapper: str) -> None:
    source, target = pair(plain)
    given = {f"{wrapper}.{k}".replace("fc.", f"fc.{wrapper}."): v for k, v in state(source).items()}
    restore(target, given, quiet=True)
    assert same(target, source)


# --- words ---


class Own(nn.Module):
    """Parameters and buffers that have the words of other frameworks for names."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)
        for name in ("gamma", "scale", "alpha", "b", "w"):
            setattr(self, name, nn.Parameter(torch.zeros(3)))
        self.weight = nn.Parameter(torch.zeros(3))
        self.register_buffer("mean", torch.zeros(3))
        self.params = nn.ParameterDict({"x": torch.zeros(2)})


def test_a_network_takes_its_own_state_whatever_its_names() -> None:
    source, target = pair(Own)
    assert restore(target, state(source), quiet=True).share == 1
    assert same(target, source)
    assert restore(target, state(source, "module."), quiet=True).share == 1


def test_a_name_that_two_tensors_could_be_is_refused() -> None:
    target = net(fc=nn.Linear(3, 3), out=nn.Linear(3, 2))
    given = {"fc/kernel": torch.ones(3, 3), "fc/scale": torch.ones(3, 3), "fc/bias": torch.ones(3)}
    with pytest.raises(ReaderError, match=r"fc/kernel and fc/scale both become fc\.weight"):
        restore(target, given, quiet=True)
    haiku = {"fc/w": torch.ones(3, 3), "fc/offset": torch.ones(3), "out/w": torch.ones(3, 2), "out/b": torch.ones(2)}
    assert restore(target, haiku, layout="flax", quiet=True).share == 1


@pytest.mark.parametrize(
    "rename",
    [
        {"dense/kernel": "hidden1/weight", "dense/bias": "hidden1/bias"},
        {"dense/kernel:0": "hidden1.weight", "dense/bias:0": "hidden1.bias"},
        {"dense": "hidden1", "kernel": "weight"},
        {"dense": "hidden1"},
    ],
)
def test_renames_are_of_the_names_in_the_file(rename: dict[str, str]) -> None:
    target = net(hidden1=nn.Linear(3, 4))
    weight, bias = torch.randn(3, 4), torch.randn(4)
    restore(target, {"dense/kernel:0": weight, "dense/bias:0": bias}, rename=rename, layout="keras", quiet=True)
    assert torch.equal(target.hidden1.weight, weight.T)


def test_renames_do_not_act_on_one_another() -> None:
    source, target = pair(lambda: net(a=nn.Linear(3, 3), b=nn.Linear(3, 3)))
    restore(target, state(source), rename={"a": "b", "b": "a"}, quiet=True)
    assert torch.equal(target.a.weight, source.b.weight)
    assert torch.equal(target.b.weight, source.a.weight)


# --- shapes and layouts ---


@pytest.mark.parametrize("outputs", [4, 5])
def test_dense_weights_and_kernels_of_one_place_become_each_other_the_right_way_round(outputs: int) -> None:
    dense = torch.randn(4, outputs)
    convolution, linear = net(c=nn.Conv2d(4, outputs, 1, bias=False)), net(c=nn.Linear(4, outputs, bias=False))
    restore(convolution, {"c/kernel": dense}, layout="keras", quiet=True)
    assert torch.equal(convolution.c.weight[..., 0, 0], dense.T)
    restore(linear, {"c/kernel": dense.view(1, 1, 4, outputs)}, layout="keras", quiet=True)
    assert torch.equal(linear.c.weight, dense.T)
    restore(linear, {"c.weight": dense.T.reshape(outputs, 4, 1, 1)}, quiet=True)
    assert torch.equal(linear.c.weight, dense.T)


@pytest.mark.parametrize("layout", ["flax", "theano"])
def test_transposed_kernels_of_an_unknown_convention_are_refused(layout: Any) -> None:
    target = net(up=nn.ConvTranspose2d(2, 2, 2, bias=False), out=nn.Conv2d(2, 2, 1))
    with pytest.raises(ReaderError, match="wanted"):
        restore(target, {"up/kernel": torch.randn(2, 2, 2, 2)}, layout=layout, match="up", quiet=True)


def test_a_kernel_whose_axes_lie_otherwise_is_no_vector() -> None:
    target = net(c=nn.Conv2d(3, 8, (1, 1)), out=nn.Linear(8, 2))
    with pytest.raises(ReaderError, match="wanted"):
        restore(target, {"c.weight": torch.randn(8, 1, 3, 1)}, match=r"c\.weight", quiet=True)


def test_only_the_convolution_that_reads_the_pictures_is_adapted() -> None:
    source = drawn(net(first=nn.Conv2d(3, 4, 3), second=nn.Conv2d(4, 8, 3)), 1)
    target = net(first=nn.Conv2d(1, 4, 3), second=nn.Conv2d(16, 8, 3), out=nn.Conv2d(8, 2, 1))
    with pytest.raises(ReaderError, match="second.weight is "):
        restore(target, state(source), adapt=True, match="first|second", quiet=True)
    restore(target, state(source), adapt=True, match="first", quiet=True)
    grouped = net(first=nn.Conv2d(4, 4, 3, groups=4), out=nn.Conv2d(4, 2, 1))
    with pytest.raises(ReaderError, match="wanted"):
        restore(grouped, {"first.weight": torch.randn(4, 4, 3, 3)}, adapt=True, match=r"first\.weight", quiet=True)


@pytest.mark.parametrize(("have", "want"), [*itertools.permutations((1, 2, 3, 17), 2)])
def test_position_embeddings_of_odd_numbers_are_resampled_or_refused(have: int, want: int) -> None:
    class Tokens(nn.Module):
        def __init__(self, count: int) -> None:
            super().__init__()
            self.pos, self.out = nn.Parameter(torch.ones(1, count, 6)), nn.Linear(6, 2)

    given = {"pos": torch.ones(1, have, 6)}
    if {have, want} == {2, 17}:
        assert restore(Tokens(want), given, adapt=True, match="pos", quiet=True).share == 1
    else:
        with pytest.raises(ReaderError, match="wanted"):
            restore(Tokens(want), given, adapt=True, match="pos", quiet=True)


class HeadFirst(nn.Module):
    """Registers its classifier before the layers that it reads."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.fc = nn.Linear(5, classes)
        self.conv = nn.Conv2d(3, 5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(input=self.conv(x).mean((2, 3)))


@pytest.mark.parametrize("example", [None, torch.zeros(1, 3, 8, 8)])
@pytest.mark.parametrize("layout", ["torch", "keras"])
def test_the_classifier_is_the_layer_that_runs_last(example: torch.Tensor | None, layout: Any) -> None:
    source, target = drawn(HeadFirst(3), 1), drawn(HeadFirst(), 2)
    given = state(source)
    if layout == "keras":
        given = {k: v.permute(2, 3, 1, 0) if v.dim() == 4 else v.T if v.dim() == 2 else v for k, v in given.items()}
    coverage = restore(target, given, layout=layout, example=example, quiet=True)
    assert coverage.fresh == {"fc.weight", "fc.bias"}
    with pytest.raises(ReaderError, match=r"holds 0%|nothing does"):
        restore(target, {"fc.weight": torch.ones(4, 5), "fc.bias": torch.ones(4)}, example=example, quiet=True)


# --- what is given ---


def test_tied_weights_count_as_loaded_with_their_twin(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        made = net(a=nn.Linear(4, 4, bias=False), b=nn.Linear(4, 4, bias=False), out=nn.Linear(4, 2))
        made.b.weight = made.a.weight
        return made

    source, target = pair(tied)
    save_model(source, str(tmp_path / "w.safetensors"))
    assert restore(target, tmp_path / "w.safetensors", quiet=True).share == 1
    assert same(target, source)


@pytest.mark.parametrize(
    ("wrap", "ending"),
    [
        (lambda s: {"best_model_state_dict": s, "epoch": 3}, ".pth"),
        (lambda s: {"best_model": s, "best_acc1": torch.tensor(0.7)}, ".pth"),
        (lambda s: {"resnet": s, "params": {"lr": torch.tensor(0.1)}}, ".pth"),
        (lambda s: {"state_dict": s, "epoch": 3, "optimizer": {"state": {0: torch.ones(3)}}}, ".pth.tar"),
        (lambda s: {"model": s, "history": defaultdict(list), "when": datetime(2020, 1, 2)}, ".pt"),
    ],
)
def test_checkpoints_of_usual_trainers_are_taken(wrap: Callable[[Any], Any], ending: str, tmp_path: Path) -> None:
    source, target = pair(plain)
    path = tmp_path / f"w{ending}"
    torch.save(wrap(source.state_dict()), path)
    assert restore(target, path, quiet=True).share == 1
    assert same(target, source)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"fc.weight": torch.ones(2, 3).to_sparse()}, "dense tensor with values"),
        ({"fc.weight": torch.ones(2, 3, device="meta")}, "dense tensor with values"),
        ({}, "must hold a state dict"),
        ([], "must hold a state dict"),
        ({"a": "b"}, "must hold a state dict"),
        ([1, 2], "must hold a state dict"),
    ],
)
def test_what_holds_no_weights_gets_one_sentence(given: Any, says: str) -> None:
    with pytest.raises(ReaderError, match=says):
        restore(net(fc=nn.Linear(3, 2)), given, quiet=True)


def test_arrays_may_be_nested_and_of_any_byte_order() -> None:
    target = net(fc=nn.Linear(3, 2))
    weight = np.arange(6, dtype=">f4").reshape(2, 3)
    restore(target, {"state_dict": {"fc": {"weight": weight, "bias": np.zeros(2, "<f4")}}, "epoch": 3}, quiet=True)
    assert torch.equal(target.fc.weight, torch.arange(6.0).view(2, 3))


def test_networks_of_one_layer_or_of_none_are_answered() -> None:
    with pytest.raises(ReaderError, match="nothing does"):
        restore(net(fc=nn.Linear(3, 2)), {"other.weight": torch.ones(9)}, quiet=True)
    with pytest.raises(ReaderError, match="must have weights to take any"):
        restore(net(act=nn.ReLU()), {"other.weight": torch.ones(9)}, quiet=True)
    assert restore(net(fc=nn.Linear(3, 2)), {"fc.weight": torch.ones(2, 3)}, quiet=True).share == 1
    with pytest.raises(ReaderError, match="must be one of torch, keras, theano, flax; found 'Torch'"):
        restore(net(fc=nn.Linear(3, 2)), {"fc.weight": torch.ones(2, 3)}, layout="Torch", quiet=True)  # type: ignore[arg-type]


def test_names_that_would_act_on_a_terminal_are_shown_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    restore(net(fc=nn.Linear(3, 2)), {"fc.weight": torch.ones(2, 3), "evil\x1b[2J": torch.ones(1)})
    assert "\x1b" not in capsys.readouterr().err


def test_paths_may_be_paths_and_missing_ones_are_named(tmp_path: Path) -> None:
    with pytest.raises(ReaderError, match=r"must exist; there is no .*nope\.pt"):
        load_backbone(tmp_path / "nope.pt")
    (tmp_path / "w.zzz").write_bytes(b"abc" * 100)
    with pytest.raises(ReaderError, match="must end in one of"):
        read_checkpoint(tmp_path / "w.zzz")
