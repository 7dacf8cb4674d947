"""Stacks of dense layers: activations, norms, standardised inputs, the conditions of self-normalisation, clipping."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import nn

from regraft import nn as groundwork
from regraft.nn import Standardise, check_selu, clip_gradients, mlp
from regraft.nn.activations import ACTIVATIONS
from regraft.nn.clipping import Clipping


def kinds(module: nn.Module) -> list[str]:
    return [type(layer).__name__ for layer in module.children()]


# --- activations ---


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_of_torch_wherever_it_has_them(name: str) -> None:
    made = groundwork.activation(name)
    assert type(made) is groundwork.Swish if name == "swish" else type(made).__module__.startswith("torch.nn")
    assert made.eval()(torch.linspace(-3, 3, 7)).shape == (7,)


def test_swish_is_silu_bent_by_its_beta_which_may_be_trained() -> None:
    x = torch.linspace(-4, 4, 33)
    assert torch.allclose(groundwork.activation("swish")(x), nn.functional.silu(x))
    assert torch.allclose(groundwork.activation("swish", beta=2.0)(x), x * torch.sigmoid(2 * x))
    fixed, trained = groundwork.Swish(1.5), groundwork.Swish(1.5, trained=True)
    assert (len(list(fixed.parameters())), len(list(trained.parameters()))) == (0, 1)
    assert fixed.state_dict().keys() == trained.state_dict().keys() == {"beta"}
    trained(x).sum().backward()
    assert float(trained.beta.grad.abs()) > 0


@pytest.mark.parametrize(
    ("asked", "advised"),
    [
        ({}, "relu"),
        ({"task": "complex"}, "swish"),
        ({"task": "most complex"}, "swish"),
        ({"latency": True}, "leaky_relu"),
        ({"task": "complex", "latency": True}, "prelu"),
        ({"deep_mlp": True}, "selu"),
    ],
)
def test_advice_names_an_activation_and_its_reason(asked: dict[str, object], advised: str) -> None:
    advice = groundwork.advise_activation(**asked)
    assert advice.activation == advised
    assert advice.activation in ACTIVATIONS
    assert len(advice.reason) > 20


# --- what a stack is made of ---


def test_norm_stands_after_the_activation_or_before_it_and_then_there_is_no_bias() -> None:
    after, before = mlp([8, 6, 5, 3], norm="batch"), mlp([8, 6, 5, 3], norm="batch", before=True)
    assert kinds(after) == ["BatchNorm1d", *["Linear", "ReLU", "BatchNorm1d"] * 2, "Linear"]
    assert kinds(before) == ["BatchNorm1d", *["Linear", "BatchNorm1d", "ReLU"] * 2, "Linear"]
    assert [m.bias is None for m in before if isinstance(m, nn.Linear)] == [True, True, False]
    assert all(m.bias is not None for m in after if isinstance(m, nn.Linear))
    passed = mlp([8, 6, 3], norm="batch", momentum=0.01, eps=1e-3)
    assert {(m.momentum, m.eps) for m in passed if isinstance(m, nn.BatchNorm1d)} == {(0.01, 1e-3)}


def test_standardisation_comes_first_and_batch_norm_leaves_the_input_out() -> None:
    made = mlp([8, 6, 3], norm="batch", standardise=True, dropout=0.2)
    assert kinds(made) == ["Standardise", "Linear", "ReLU", "BatchNorm1d", "Dropout", "Linear"]
    assert kinds(mlp([8, 6, 3], "selu", dropout=0.2)) == ["Linear", "SELU", "AlphaDropout", "Linear"]
    assert mlp([8, 6, 3], "leaky_relu", negative_slope=0.2).act1.negative_slope == 0.2
    assert kinds(mlp([8, 3])) == ["Linear"]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: mlp([3]), r"at least two numbers above 0; found \[3\]"),
        (lambda: mlp([3, 0, 2]), "above 0"),
        (lambda: mlp([3, 2, 2], "relux"), "found 'relux'"),
        (lambda: mlp([3, 2, 2], norm="layer"), "found 'layer'"),
        (lambda: Standardise(3).adapt(torch.zeros(0, 3)), "at least one example"),
        (lambda: Standardise(3).adapt(torch.zeros(4, 2)), r"found \(4, 2\)"),
        (lambda: Standardise(3).adapt(torch.full((2, 3), float("nan"))), "finite"),
        (lambda: Standardise(3)(torch.zeros(2, 3, 4)), "use channels=True"),
        (lambda: groundwork.activation("relux"), "found 'relux'"),
        (lambda: groundwork.advise_activation("hard"), "found 'hard'"),
        (lambda: Clipping("norm", 0), "above 0"),
        (lambda: Clipping("norm", "1"), "above 0; found norm, '1'"),
    ],
)
def test_wrong_arguments_get_one_sentence(call: Callable[[], object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()


def test_inputs_are_standardised_by_what_training_data_said_once() -> None:
    torch.manual_seed(0)
    data = torch.randn(500, 4) * torch.tensor([1.0, 50, 1e-3, 0]) + torch.tensor([0.0, 1e4, -1, 7])
    layer = Standardise(4)
    assert torch.equal(layer(data), data)
    layer.adapt(data)
    out = layer(data)
    assert torch.allclose(out.mean(0), torch.zeros(4), atol=1e-3)
    assert torch.allclose(out[:, :3].std(0, correction=0), torch.ones(3), atol=1e-3)
    assert torch.equal(out[:, 3], torch.zeros(500))
    batched = Standardise(4).adapt(iter(data.split(37)))
    assert torch.allclose(batched.mean, layer.mean)
    assert torch.allclose(batched.deviation, layer.deviation, rtol=1e-4)
    again = Standardise(4)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(data), out)
    assert not list(layer.parameters())
    pictures = torch.randn(5, 3, 8, 8) * 2 + 1
    channels = Standardise(3, channels=True).adapt(pictures)(pictures)
    assert torch.allclose(channels.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)


# --- self-normalisation ---


def test_a_hundred_selu_layers_keep_mean_0_and_deviation_1() -> None:
    torch.manual_seed(0)
    deep = mlp([100] * 101 + [10], "selu", standardise=True)
    x = torch.rand(500, 100) * 30 + 5
    deep.standardise.adapt(x)
    assert check_selu(deep, x) == ()
    with torch.no_grad():
        for layer in list(deep.children())[:-1]:
            x = layer(x)
            if isinstance(layer, nn.SELU):
                assert abs(float(x.mean())) < 0.3
                assert 0.6 < float(x.std()) < 1.4


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda net: check_selu(net, torch.rand(50, 20) * 9), "inputs must have mean 0"),
        (lambda net: check_selu(nn.init.normal_(net.hidden2.weight) is None or net), "LeCun normal.*hidden2"),
        (lambda net: check_selu(net.append(nn.BatchNorm1d(3))), "no other normalisation.*BatchNorm1d"),
        (lambda net: check_selu(net.append(nn.Dropout(0.1))), "alpha dropout.*Dropout"),
        (lambda net: check_selu(nn.Sequential(*net[:2], nn.ReLU(), *net[2:])), "another activation"),
        (lambda net: check_selu(net.append(nn.Bilinear(2, 2, 2))), "no plain stack"),
        (lambda net: check_selu(net, l1=0.1), "no l1 penalty"),
        (lambda net: check_selu(nn.Sequential(Standardise(20), *net)), "never adapted"),
        (lambda net: check_selu(net, optimizer=torch.optim.SGD(net.parameters(), weight_decay=0.01)), "no l2 penalty"),
        (lambda net: check_selu(net, max_norm=1.0), "max-norm; it is 1"),
        (lambda net: check_selu(mlp([20, 30, 3])), "must be SELU; there is none"),
    ],
)
def test_each_broken_condition_is_named(change: Callable[[nn.Module], tuple[str, ...]], says: str) -> None:
    torch.manual_seed(0)
    made = mlp([20, 30, 40, 3], "selu")
    assert check_selu(made, torch.randn(5000, 20)) == ()
    assert check_selu(nn.Sequential(*made, nn.LogSoftmax(1)), torch.randn(64, 20)) == ()
    broken = change(made)
    assert len([sentence for sentence in broken if re.search(says, sentence)]) == 1, broken


def test_a_skip_connection_is_no_plain_stack() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp([8, 8, 8], "selu")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = x + self.body(x)
            return result

    assert any("plain stack" in sentence for sentence in check_selu(Skip()))


# --- clipping ---


def test_clipping_by_value_turns_the_gradient_and_by_norm_keeps_its_direction() -> None:
    """The textbook's example: (0.9, 100)."""
    gradient = torch.tensor([0.9, 100.0])

    def clipped(clipping: Clipping) -> torch.Tensor:
        parameters = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(3))]
        parameters[0].grad, parameters[1].grad = gradient[:1].clone(), gradient[1:].clone()
        assert clip_gradients(iter(parameters), clipping) == pytest.approx(float(gradient.norm()))
        return torch.cat([parameters[0].grad, parameters[1].grad])

    assert torch.allclose(clipped(Clipping("value", 1.0)), torch.tensor([0.9, 1.0]))
    by_norm = clipped(Clipping("norm", 1.0))
    assert torch.allclose(by_norm, gradient / gradient.norm(), atol=1e-5)
    assert torch.equal(clipped(Clipping("norm", 1000.0)), gradient)
    assert clip_gradients([nn.Parameter(torch.zeros(2))], Clipping("norm", 1.0)) == 0
