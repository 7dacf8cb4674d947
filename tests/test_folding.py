"""Batch norms go into the layer before them exactly where that changes nothing, and stay everywhere else."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from regraft.graph import trace
from regraft.networks.torchvision_ops import declare_missing_operators
from regraft.nn import Standardise, fold_batchnorm, mlp, unfolded
from regraft.nn.folding import uses_weights_plainly

declare_missing_operators()

from timm.layers import BatchNormAct2d, Conv2dSame, ScaledStdConv2d, StdConv2d  # noqa: E402 - importable only now


def worn(module: nn.Module, *, seed: int = 0) -> nn.Module:
    """The module in evaluation mode after a life: norms with statistics and scales of their own, some negative."""
    generator = torch.Generator().manual_seed(seed)
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            if norm.running_mean is not None:
                norm.running_mean.normal_(0, 1, generator=generator)
                norm.running_var.uniform_(0.3, 3, generator=generator)
            if norm.affine:
                nn.init.normal_(norm.weight, 0, 1, generator=generator)
                nn.init.normal_(norm.bias, 0, 1, generator=generator)
    return module.eval()


def norms(module: nn.Module) -> int:
    return sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules())


def assert_folds(module: nn.Module, x: torch.Tensor, *, left: int, graph: torch.fx.Graph | None = None) -> None:
    """Folds a module and checks that nothing but the number of norms changed."""
    before = {name: t.clone() for name, t in module.state_dict().items()}
    with torch.no_grad():
        expected = module(x)
    folded = fold_batchnorm(module, graph, example=x)
    with torch.no_grad():
        found = folded(x)
        assert torch.equal(module(x), expected)  # the module itself is as it was
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())
    assert norms(folded) == left
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def sequence(module: nn.Module) -> torch.fx.Graph:
    """The graph of a sequence whose layers are kept in one piece."""
    graph = torch.fx.Graph()
    value = graph.placeholder("x")
    for name, _ in module.named_children():
        value = graph.call_module(name, (value,))
    graph.output(value)
    return graph


def picture(channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, 9, 9, generator=torch.Generator().manual_seed(1))


# --- what is folded ---


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_norm_with_any_statistics_goes_into_the_convolution(seed: int, bias: bool, affine: bool) -> None:
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Conv2d(3, 6, 3, bias=bias), nn.BatchNorm2d(6, affine=affine, eps=1e-3), nn.ReLU())
    assert_folds(worn(module, seed=seed), picture(), left=0)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, stride=2, padding=1),
        nn.Conv2d(4, 8, 3, groups=4),
        nn.Conv2d(4, 6, 3, dilation=2, padding="same", padding_mode="reflect"),
        Conv2dSame(4, 6, 3, stride=2, bias=False),
    ],
    ids=["strided", "grouped", "dilated", "padded as in TensorFlow"],
)
def test_convolutions_of_all_kinds_take_the_norm_up(layer: nn.Conv2d) -> None:
    module = worn(nn.Sequential(layer, nn.BatchNorm2d(layer.out_channels)))
    assert uses_weights_plainly(layer)
    assert_folds(module, picture(4), left=0, graph=sequence(module))


def test_one_dimensional_convolution_takes_the_norm_up() -> None:
    module = worn(nn.Sequential(nn.Conv1d(3, 5, 3), nn.BatchNorm1d(5)))
    assert_folds(module, torch.randn(2, 3, 8), left=0)


def test_linear_layer_on_rows_takes_the_norm_up() -> None:
    module = worn(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 5), nn.BatchNorm1d(5)))
    assert_folds(module, torch.randn(6, 4), left=0)


def test_norm_with_an_activation_leaves_the_activation() -> None:
    module = worn(nn.Sequential(nn.Conv2d(3, 5, 3), BatchNormAct2d(5, act_layer=nn.SiLU)))
    graph = sequence(module)
    x = picture()
    folded = fold_batchnorm(module, graph)
    assert norms(folded) == 0
    assert [type(m).__name__ for m in folded[1].children()] == ["SiLU"]  # type: ignore[index]
    with torch.no_grad():
        assert torch.allclose(folded(x), module(x), atol=1e-5)
        assert float(folded(x).min()) < 0  # and nothing was rectified twice


def test_residual_block_folds_both_norms_beside_the_skip() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
            self.conv2, self.bn2 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))

    assert_folds(worn(nn.Sequential(Residual(), Residual())), picture(), left=0)


@pytest.mark.parametrize(
    ("name", "left"),
    [("tf_efficientnet_lite0", 0), ("densenet121", 62), ("resnet18", 0), ("mobilenetv2_050", 0)],
)
def test_networks_of_the_field_give_the_same_with_random_statistics(name: str, left: int) -> None:
    """DenseNet's norms before a ReLU and a convolution stay, those between two convolutions go."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    module = timm.create_model(name)
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(norm.running_mean, 0, 0.3)
            nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, 0, 0.3)
    x = torch.randn(2, 3, 64, 64)
    traced = trace(module.eval(), x)
    assert_folds(traced.module, x, left=left, graph=traced.graph)


# --- forward, into what reads the norm ---


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 4, 3),
        nn.Conv2d(6, 4, (2, 3), stride=2, dilation=2, bias=False),
        nn.Conv2d(6, 12, 3, groups=3),
        nn.Conv2d(6, 6, 1, groups=6, padding="valid"),
    ],
    ids=str,
)
def test_norm_goes_forward_into_a_convolution_without_padding(layer: nn.Conv2d) -> None:
    torch.manual_seed(0)
    module = worn(nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.BatchNorm2d(6), nn.Dropout(), layer))
    assert_folds(module, picture(), left=0)


@pytest.mark.parametrize("padding", [1, "same"])
def test_norm_before_a_padded_convolution_is_left_and_listed(padding: int | str) -> None:
    module = worn(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=padding)))
    assert_folds(module, picture(), left=1)
    assert unfolded(module) == {"1": "neither the layer before it nor the one after it can take it up alone"}


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("example", [None, torch.zeros(2, 20)])
def test_networks_of_the_textbook_keep_no_norm(before: bool, example: torch.Tensor | None) -> None:
    """Geron, chapter 11: batch norm after the activation, and before it."""
    torch.manual_seed(0)
    module = worn(mlp([20, 30, 10, 5], norm="batch", before=before, dropout=0.3))
    flat = nn.Sequential(nn.Flatten(), *copy.deepcopy(module)).eval()
    x = torch.randn(7, 20)
    for network, given in ((module, x), (flat, x.view(7, 4, 5))):
        folded = fold_batchnorm(network, example=given[:2] if example is not None else None)
        assert norms(folded) == 0
        with torch.no_grad():
            expected = network(given)
            assert float((folded(given) - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
        assert unfolded(network) == {}


def test_standardisation_goes_into_the_first_layer() -> None:
    torch.manual_seed(0)
    module = mlp([6, 5, 3], standardise=True).eval()
    x = torch.randn(50, 6) * 20 + 3
    module.standardise.adapt(x)
    folded = fold_batchnorm(module)
    assert not any(isinstance(m, Standardise) for m in folded.modules())
    assert torch.allclose(folded(x), module(x), atol=1e-5)


def test_each_norm_that_stays_is_listed_with_its_reason() -> None:
    torch.manual_seed(0)
    assert unfolded(worn(NormTwice())) == {"bn": "it is used in several places"}
    training = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    assert "training mode" in unfolded(training)["1"]
    assert set(unfolded(worn(TwoNames()))) == {"bn", "other"}


@pytest.mark.parametrize("mean", [2000.0, 1e5, 1.7e9])
def test_means_far_from_0_are_not_folded_forward_for_digits_would_be_lost(mean: float) -> None:
    torch.manual_seed(0)
    module = mlp([6, 5, 3], standardise=True).eval()
    module.standardise.adapt(torch.randn(50, 6) * 5 + mean)
    assert unfolded(module) == {"standardise": "its means lie far from 0, and digits would be lost"}
    assert isinstance(fold_batchnorm(module)[0], Standardise)


def test_what_comes_back_is_a_copy_of_the_module_itself() -> None:
    module = worn(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)))
    assert isinstance(fold_batchnorm(module)[1], nn.Identity)
    assert type(fold_batchnorm(module)) is nn.Sequential


@pytest.mark.parametrize("norm", [nn.BatchNorm3d(4), nn.SyncBatchNorm(4)])
def test_norms_of_other_kinds_are_listed(norm: nn.Module) -> None:
    assert unfolded(nn.Sequential(nn.ReLU(), norm).eval()) == {"1": f"a {type(norm).__name__} is not folded"}


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.norm(self.fc(x)) + y
        return result


def test_modules_of_several_inputs_keep_their_norms() -> None:
    assert norms(fold_batchnorm(worn(Two()))) == 1


# --- what is left alone ---


class TwoUsers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        return self.bn(x) + x


class CalledTwice(TwoUsers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(x)) + F.relu(self.conv(x))


class NormTwice(TwoUsers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(self.bn(x)))


class TwoNames(TwoUsers):
    """One layer under two names, each called once."""

    def __init__(self) -> None:
        super().__init__()
        self.again, self.other = self.conv, nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.other(self.again(self.bn(self.conv(x))))


class WeightsRead(TwoUsers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(x)) + self.conv.weight.sum()


class NormRead(TwoUsers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(x)) * self.bn.weight.sum()


class Between(TwoUsers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(F.relu(self.conv(x)))


@pytest.mark.parametrize(
    ("kind", "left"),
    [(TwoUsers, 1), (CalledTwice, 1), (NormTwice, 1), (TwoNames, 2), (WeightsRead, 1), (NormRead, 1), (Between, 1)],
)
def test_layer_or_norm_with_another_use_is_left_alone(kind: type[nn.Module], left: int) -> None:
    torch.manual_seed(0)
    assert_folds(worn(kind()), picture(), left=left)


def test_weights_shared_by_two_layers_are_folded_in_a_copy_of_their_own() -> None:
    module = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))
    module[2].weight = module[0].weight
    assert_folds(worn(module), picture(), left=0)


@pytest.mark.parametrize("kind", [StdConv2d, ScaledStdConv2d])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_layer_that_standardises_its_weights_is_left_alone(kind: type[nn.Conv2d], kernel: int, bias: bool) -> None:
    layer = kind(3, 5, kernel, bias=bias)
    if bias:
        nn.init.ones_(layer.bias)
    assert not uses_weights_plainly(layer)
    module = worn(nn.Sequential(layer, nn.BatchNorm2d(5)))
    folded = fold_batchnorm(module, sequence(module))
    with torch.no_grad():
        assert norms(folded) == 1
        assert torch.equal(folded(picture()), module(picture()))


@pytest.mark.parametrize(
    "dress",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        lambda layer: layer.register_forward_hook(lambda layer, inputs, output: output.abs()) and layer,
        lambda layer: layer.register_forward_pre_hook(lambda layer, inputs: (inputs[0].abs(),)) and layer,
    ],
    ids=["weight norm", "spectral norm", "hook", "hook before"],
)
def test_layer_whose_weights_or_results_are_made_by_others_is_left_alone(
    dress: Callable[[nn.Conv2d], nn.Module],
) -> None:
    layer = nn.Conv2d(3, 5, 3)
    dress(layer)
    module = worn(nn.Sequential(layer, nn.BatchNorm2d(5)))
    assert not uses_weights_plainly(layer)
    folded = fold_batchnorm(module, sequence(module))
    with torch.no_grad():
        assert norms(folded) == 1
        assert torch.equal(folded(picture()), module(picture()))


def test_layer_that_goes_on_with_an_activation_is_left_alone() -> None:
    class Rectified(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.relu(super().forward(x))

    class OfTwo(nn.Linear):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + y

    assert not uses_weights_plainly(Rectified(3, 5, 3))
    assert not uses_weights_plainly(OfTwo(3, 5))
    assert not uses_weights_plainly(nn.ReLU())


def test_norm_of_a_class_that_does_more_is_left_alone() -> None:
    class Doubling(nn.BatchNorm2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    module = worn(nn.Sequential(nn.Conv2d(3, 5, 3), Doubling(5)))
    folded = fold_batchnorm(module, sequence(module))
    with torch.no_grad():
        assert torch.equal(folded(picture()), module(picture()))


def test_norm_in_training_mode_or_without_running_statistics_is_left_alone() -> None:
    for norm in (nn.BatchNorm2d(5), nn.BatchNorm2d(5, track_running_stats=False)):
        module = worn(nn.Sequential(nn.Conv2d(3, 5, 3), norm))
        if norm.running_mean is not None:
            norm.train()
        assert norms(fold_batchnorm(copy.deepcopy(module))) == 1


def test_linear_layer_on_a_sequence_is_left_alone_for_the_norm_is_over_its_positions() -> None:
    module = worn(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)))
    assert_folds(module, torch.randn(2, 5, 6), left=1)
    other = worn(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(4)))
    assert_folds(other, torch.randn(2, 4, 6), left=1)


def test_linear_layer_is_left_alone_where_it_could_be_given_rows_or_sequences() -> None:
    module = worn(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)))
    assert norms(fold_batchnorm(module)) == 1


def test_gradients_are_wanted_of_folded_weights_exactly_where_they_were_before() -> None:
    module = worn(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    assert all(p.requires_grad for p in fold_batchnorm(module).parameters())
    assert not any(p.requires_grad for p in fold_batchnorm(module.requires_grad_(False)).parameters())
