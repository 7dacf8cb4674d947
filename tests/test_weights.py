"""Weights find their places by name, or by shape and order, and nothing is loaded that was not asked for."""

from __future__ import annotations

import itertools
from collections import OrderedDict

import pytest
import torch
from torch import nn

from regraft.errors import ReaderError
from regraft.operations import Operation, Operations, build
from regraft.readers import Checkpoint
from regraft.weights import matches, restore


def network(seed: int = 0, channels: int = 3, classes: int = 4) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = OrderedDict(
        conv=nn.Conv2d(channels, 8, (3, 2)),
        norm=nn.BatchNorm2d(8),
        act=nn.ReLU(),
        depthwise=nn.Conv2d(8, 16, 3, groups=8),
        flat=nn.Flatten(),
        dense=nn.Linear(16 * 4 * 4, 6),
        out=nn.Linear(6, classes),
    )
    made = nn.Sequential(layers)
    for tensor in made.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape))
    return made


def mlp(layers: int = 11) -> nn.Sequential:
    return nn.Sequential(OrderedDict((f"hidden{i}", nn.Linear(7, 7)) for i in range(1, layers)))


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items() if not k.endswith("num_batches_tracked")}


def same(ours: nn.Module, theirs: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(state(ours).values(), state(theirs).values(), strict=True))


def keras(module: nn.Sequential) -> dict[str, torch.Tensor]:
    """The weights as Keras would hold them: HWIO, depthwise (h, w, in, multiplier), dense rows counted (h, w, c)."""
    s = state(module)
    return {
        "conv/kernel": s["conv.weight"].permute(2, 3, 1, 0),
        "conv/bias": s["conv.bias"],
        "norm/gamma": s["norm.weight"],
        "norm/beta": s["norm.bias"],
        "norm/moving_mean": s["norm.running_mean"],
        "norm/moving_variance": s["norm.running_var"],
        "depthwise/depthwise_kernel": s["depthwise.weight"].reshape(8, 2, 3, 3).permute(2, 3, 0, 1),
        "depthwise/bias": s["depthwise.bias"],
        "dense/kernel": s["dense.weight"].reshape(6, 16, 4, 4).permute(2, 3, 1, 0).reshape(-1, 6),
        "dense/bias": s["dense.bias"],
        "out/kernel": s["out.weight"].T,
        "out/bias": s["out.bias"],
    }


# --- names ---


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "backbone.", "encoder.", "module.backbone.", "odd_one."])
def test_usual_prefixes_and_those_that_all_names_share_are_repaired(prefix: str) -> None:
    source, target = network(1), network(2)
    coverage = restore(target, {prefix + k: v for k, v in state(source).items()}, quiet=True)
    assert same(target, source)
    assert coverage.by == "name"
    assert coverage.fresh == frozenset()
    assert {row.status for row in coverage.rows} == {"renamed" if prefix else "loaded"}


def test_prefix_of_the_network_is_repaired_too() -> None:
    source, target = network(1), nn.Sequential(OrderedDict(backbone=network(2)))
    assert restore(target, state(source), quiet=True).share == 1
    assert same(target.backbone, source)


def test_pattern_takes_whole_parts_from_the_start_of_the_new_name() -> None:
    assert matches("hidden[123]", "hidden1.weight")
    assert not matches("hidden[123]", "hidden10.weight")
    assert matches(r"blocks\.[01]", "blocks.1.conv.weight")
    assert not matches("conv", "blocks.1.conv.weight")
    source, target = mlp(), mlp()
    before = state(target)
    coverage = restore(target, state(source), match="hidden[123]", quiet=True)
    assert coverage.loaded == {f"hidden{i}.{k}" for i in (1, 2, 3) for k in ("weight", "bias")}
    assert "hidden10.weight" in coverage.fresh
    for name, value in state(target).items():
        assert torch.equal(value, state(source)[name] if name in coverage.loaded else before[name])


def test_names_are_renamed_first_and_a_name_that_is_not_there_is_refused() -> None:
    source, target = network(1), network(2)
    other = {k.replace("dense", "dense_1").replace("conv", "features.first"): v for k, v in state(source).items()}
    restore(target, other, rename={"dense_1": "dense", "features.first": "conv"}, quiet=True)
    assert same(target, source)
    with pytest.raises(ReaderError, match="'dens_1' is not; nearest: dense_1"):
        restore(target, other, rename={"dens_1": "dense"}, quiet=True)
    with pytest.raises(ReaderError, match="must stay apart"):
        restore(target, other, rename={"dense_1": "out"}, quiet=True)


# --- order ---


def test_foreign_names_are_matched_by_shape_and_order_when_every_tensor_fits_its_place() -> None:
    source, target = network(1), network(2)
    coverage = restore(target, {f"t{i}": v for i, v in enumerate(state(source).values())}, quiet=True)
    assert coverage.by == "order"
    assert same(target, source)


def test_order_stands_even_when_the_classifier_is_another() -> None:
    source, target = network(1, classes=9), network(2)
    before = state(target)["out.weight"]
    coverage = restore(target, {f"t{i}": v for i, v in enumerate(state(source).values())}, quiet=True)
    assert coverage.fresh == {"out.weight", "out.bias"}
    assert torch.equal(state(target)["out.weight"], before)


@pytest.mark.parametrize("change", ["one too many", "one too few", "two exchanged"])
def test_order_that_does_not_fit_loads_nothing(change: str) -> None:
    target = network(2)
    before = state(target)
    values = list(state(network(1)).values())
    if change == "one too many":
        values.append(torch.zeros(3))
    elif change == "one too few":
        values.pop()
    else:
        values[0], values[1] = values[1], values[0]
    with pytest.raises(ReaderError, match=r"nothing does: conv.weight is not in it; nearest names there: t"):
        restore(target, {f"t{i}": v for i, v in enumerate(values)}, quiet=True)
    assert all(torch.equal(a, b) for a, b in zip(state(target).values(), before.values(), strict=True))


# --- layouts ---


def test_keras_kernels_and_dense_rows_after_a_flatten_come_out_as_torch_has_them() -> None:
    source, target = network(1), network(2)
    coverage = restore(target, keras(source), layout="keras", example=torch.zeros(1, 3, 8, 7), quiet=True)
    assert same(target, source)
    moved = {row.parameter for row in coverage.rows if row.status == "transposed"}
    assert moved == {"conv.weight", "depthwise.weight", "dense.weight", "out.weight"}


def test_theano_kernels_are_turned() -> None:
    source, target = network(1), network(2)
    theirs = {k: v.flip(2, 3) if v.dim() == 4 else v.T if v.dim() == 2 else v for k, v in state(source).items()}
    restore(target, theirs, layout="theano", quiet=True)
    assert same(target, source)


def turning() -> Checkpoint:
    """A whole network as a reader describes one of Keras: its map is turned before it is flattened."""
    steps = (
        Operation("conv", "Conv2d", ("input",), {"in_channels": 3, "out_channels": 5, "kernel_size": 3, "stride": 2}),
        Operation("act", "ReLU", ("conv",), {}),
        Operation("turned", "Named", ("act",), {"function": "permute", "dims": [0, 2, 3, 1]}),
        Operation("flat", "Flatten", ("turned",), {}),
        Operation("dense", "Linear", ("flat",), {"in_features": 60, "out_features": 6}),
        Operation("out", "Linear", ("dense",), {"in_features": 6, "out_features": 2}),
    )
    torch.manual_seed(3)
    shapes = {"conv.weight": (5, 3, 3, 3), "conv.bias": (5,), "dense.weight": (6, 60), "dense.bias": (6,)}
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    tensors |= {"out.weight": torch.randn(2, 6), "out.bias": torch.randn(2)}
    return Checkpoint("m.keras", "Keras 3", tensors, operations=Operations(steps, "out"), input_shape=(3, 9, 7))


def test_a_whole_network_that_turns_its_map_gives_dense_rows_as_the_new_network_counts_them() -> None:
    source = turning()
    layers = OrderedDict(
        conv=nn.Conv2d(3, 5, 3, 2), act=nn.ReLU(), flat=nn.Flatten(), dense=nn.Linear(60, 6), out=nn.Linear(6, 2)
    )
    target, x = nn.Sequential(layers), torch.rand(4, 3, 9, 7)
    restore(target, source, example=x, quiet=True)
    assert source.operations is not None
    with torch.no_grad():
        assert torch.allclose(target(x), build(source.operations, source.tensors)(x), atol=1e-5)


def test_flatten_that_is_not_square_is_told() -> None:
    source = nn.Sequential(OrderedDict(conv=nn.Conv2d(1, 4, 1), flat=nn.Flatten(), dense=nn.Linear(4 * 2 * 6, 3)))
    target = nn.Sequential(OrderedDict(conv=nn.Conv2d(1, 4, 1), flat=nn.Flatten(), dense=nn.Linear(4 * 2 * 6, 3)))
    s = state(source)
    theirs = {
        "conv/kernel": s["conv.weight"].permute(2, 3, 1, 0),
        "conv/bias": s["conv.bias"],
        "dense/kernel": s["dense.weight"].reshape(3, 4, 2, 6).permute(2, 3, 1, 0).reshape(-1, 3),
        "dense/bias": s["dense.bias"],
    }
    with pytest.raises(ReaderError, match=r"order in which dense reads .* give example= or flatten="):
        restore(target, theirs, layout="keras", quiet=True)
    restore(target, theirs, layout="keras", flatten={"dense": (4, 2, 6)}, quiet=True)
    assert same(target, source)
    target.dense.reset_parameters()
    restore(target, theirs, layout="keras", example=torch.zeros(1, 1, 2, 6), quiet=True)
    assert same(target, source)


class Reader(nn.Module):
    """Reads a map of 5 channels, 3 rows and 4 columns in the order of `axes`, after `between`; two heads."""

    def __init__(self, axes: tuple[int, ...], between: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 5, 1)
        self.between = between
        self.axes = axes
        self.mean, self.spread = nn.Linear(60, 6), nn.Linear(60, 6)
        self.out = nn.Linear(6, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.between(self.conv(x)).permute(0, *self.axes).flatten(1)
        result: torch.Tensor = self.out(torch.relu(self.mean(x)) * self.spread(x))
        return result


@pytest.mark.parametrize("axes", list(itertools.permutations((1, 2, 3))), ids=str)
@pytest.mark.parametrize(
    ("between", "size"),
    [
        (nn.Sequential(nn.BatchNorm2d(5), nn.ReLU6()), (3, 4)),
        (nn.Sequential(nn.Hardswish(), nn.MaxPool2d(2, ceil_mode=True)), (5, 7)),
        (nn.Sequential(nn.AvgPool2d(3, 2, 1), nn.GELU(), nn.Dropout()), (6, 8)),
    ],
    ids=["norm", "largest", "mean"],
)
def test_the_order_that_a_dense_layer_reads_is_found_by_a_run(
    axes: tuple[int, ...], between: nn.Module, size: tuple[int, int]
) -> None:
    source = Reader(axes, between)
    target = Reader(axes, between)
    target.mean.reset_parameters()
    target.train()
    s = state(source)
    theirs = {k: v.permute(2, 3, 1, 0) if v.dim() == 4 else v.T if v.dim() == 2 else v for k, v in s.items()}
    place = torch.arange(60).reshape(5, 3, 4).permute(*(axis - 1 for axis in axes)).flatten()  # (c, h, w) of each input
    for name in ("mean.weight", "spread.weight"):
        by_place = torch.empty(6, 60)
        by_place[:, place] = s[name]
        theirs[name] = by_place.reshape(6, 5, 3, 4).permute(2, 3, 1, 0).reshape(60, 6)
    coverage = restore(target, theirs, layout="keras", example=torch.rand(1, 2, *size), quiet=True)
    assert coverage.share == 1
    assert same(target, source)
    assert target.training


def test_a_network_that_reads_pictures_flattened_takes_the_rows_of_channels_last() -> None:
    source, target = (nn.Sequential(OrderedDict(first=nn.Linear(3 * 8 * 8, 5), out=nn.Linear(5, 2))) for _ in "ab")
    s = state(source)
    theirs = {k: v.T if v.dim() == 2 else v for k, v in s.items()}
    theirs["first.weight"] = s["first.weight"].reshape(5, 3, 8, 8).permute(2, 3, 1, 0).reshape(-1, 5)
    restore(target, theirs, layout="keras", example=torch.zeros(1, 3, 8, 8), quiet=True)
    assert same(target, source)


def test_of_several_networks_in_a_file_the_one_that_fits_is_taken() -> None:
    source = network(1)
    others = {f"small/{i}": v for i, v in enumerate(state(mlp(3)).values())}
    both = {**others, **{f"large/{i}": v for i, v in enumerate(state(source).values())}}
    target = network(2)
    coverage = restore(target, both, quiet=True)
    assert coverage.by == "order"
    assert sum(row.status == "unexpected" for row in coverage.rows) == 4
    assert same(target, source)
    with pytest.raises(ReaderError, match="nothing does"):
        restore(target, {**both, **{f"again/{i}": v + 1 for i, v in enumerate(state(source).values())}}, quiet=True)


def test_input_channels_are_adapted_only_when_asked() -> None:
    source = network(1, channels=3)
    for channels in (1, 4, 6):
        target = network(2, channels=channels)
        with pytest.raises(ReaderError, match="conv.weight is .8, 3, 3, 2., wanted .8, "):
            restore(target, state(source), quiet=True)
        restore(target, state(source), adapt=True, quiet=True)
        grey = torch.randn(2, 1, 8, 7)
        assert torch.allclose(
            target.conv(grey.expand(-1, channels, -1, -1)), source.conv(grey.expand(-1, 3, -1, -1)), atol=1e-5
        )


def test_where_adapting_is_the_cure_the_refusal_says_so() -> None:
    with pytest.raises(ReaderError, match="fit it with --adapt, choose with --match"):
        restore(network(channels=1), state(network(1)), quiet=True)


def test_position_embeddings_are_resampled_only_when_asked() -> None:
    class Tokens(nn.Module):
        def __init__(self, count: int) -> None:
            super().__init__()
            self.positions = nn.Parameter(torch.zeros(1, count, 4))
            self.body, self.out = nn.Linear(4, 4), nn.Linear(4, 2)

    source, target = Tokens(1 + 16), Tokens(1 + 36)
    source.positions.data[:, 1:] = torch.arange(4.0).repeat_interleave(4).view(1, 16, 1)
    source.positions.data[:, 0] = 7
    with pytest.raises(ReaderError, match="positions"):
        restore(target, state(source), quiet=True)
    restore(target, state(source), adapt=True, quiet=True)
    rows = target.positions[0, 1:, 0].view(6, 6)
    assert torch.all(target.positions[0, 0] == 7)
    assert torch.all(rows.diff(dim=0) > 0)
    assert torch.allclose(rows[:, :1].expand(-1, 6), rows, atol=1e-5)


# --- coverage ---


def test_less_than_all_is_refused_with_the_first_loss_and_nothing_changed() -> None:
    source, target = network(1), network(2)
    before = state(target)
    lacking = {k: v for k, v in state(source).items() if not k.startswith("norm")}
    with pytest.raises(ReaderError, match=r"holds 60%: 4 are not loaded, the first norm.weight \(missing"):
        restore(target, lacking, quiet=True)
    assert all(torch.equal(a, b) for a, b in zip(state(target).values(), before.values(), strict=True))
    coverage = restore(target, lacking, min_coverage=0.5, quiet=True)
    assert coverage.share == pytest.approx(0.6)
    assert coverage.fresh == {f"norm.{k}" for k in ("weight", "bias", "running_mean", "running_var")}


def test_nothing_is_never_enough() -> None:
    with pytest.raises(ReaderError, match="Something of the given arrays must fit the network, and nothing does"):
        restore(network(), {"wholly": torch.zeros(3), "other": torch.zeros(2)}, min_coverage=0, quiet=True)
    with pytest.raises(ReaderError, match="matches none; nearest: dense"):
        restore(network(), state(network()), match="dens", quiet=True)
    with pytest.raises(ReaderError, match="must be a regular expression"):
        restore(network(), state(network()), match="(", quiet=True)


def test_whole_numbers_do_not_pass_for_weights() -> None:
    quantised = {k: (v * 10).to(torch.uint8) if v.dim() == 4 else v for k, v in state(network(1)).items()}
    with pytest.raises(ReaderError, match="conv.weight"):
        restore(network(2), quantised, quiet=True)


def test_weights_in_whole_numbers_are_called_so() -> None:
    whole = {k: (v * 10).to(torch.int8) for k, v in state(network(1)).items()}
    with pytest.raises(ReaderError, match=r"\(8, 3, 3, 2\) of whole numbers, wanted"):
        restore(network(2), whole, quiet=True)


def test_two_values_for_tied_weights_are_refused_and_equal_ones_taken() -> None:
    def tied() -> nn.Sequential:
        made = mlp(3)
        made.get_submodule("hidden2").weight = made.get_submodule("hidden1").weight
        return made

    target, theirs = tied(), state(tied())
    restore(target, theirs, quiet=True)
    before = state(target)
    with pytest.raises(ReaderError, match=r"hidden1.weight and hidden2.weight are one parameter .* has two values"):
        restore(target, theirs | {"hidden2.weight": torch.ones(7, 7)}, quiet=True)
    assert all(torch.equal(a, b) for a, b in zip(state(target).values(), before.values(), strict=True))


@pytest.mark.parametrize("least", [float("nan"), -0.1, 1.5])
def test_a_least_coverage_that_is_no_share_is_refused(least: float) -> None:
    with pytest.raises(ReaderError, match=f"a share from 0 to 1; found {least}"):
        restore(network(), state(network()), min_coverage=least, quiet=True)


def test_table_tells_what_came_of_every_parameter(capsys: pytest.CaptureFixture[str]) -> None:
    source = state(network(1, classes=9)) | {"extra.weight": torch.zeros(3)}
    coverage = restore(network(2), source)
    printed = capsys.readouterr().err
    assert "matched by name: 10 loaded, 2 shape mismatch, 1 unexpected" in printed
    assert "out.weight is (9, 6), wanted (4, 6)" in printed
    assert "unexpected         extra.weight" in printed
    assert coverage.to_json()["counts"] == {"loaded": 10, "shape mismatch": 2, "unexpected": 1}
