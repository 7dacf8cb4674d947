"""Each illness of a network in training is provoked, named, and cured by what is advised."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from regraft.nn import Clipping, Health, clip_gradients, initialize_, mlp, watch

ROWS, FEATURES, CLASSES = 64, 20, 4


def trained(
    module: nn.Module, *, rate: float = 0.01, steps: int = 15, clipping: Clipping | None = None, scale: float = 1.0
) -> Health:
    """The health of a network after some steps of gradient descent on a task that it can learn."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS * steps, FEATURES, generator=generator) * scale
    labels = (x @ torch.randn(FEATURES, CLASSES, generator=generator)).argmax(1)
    optimizer = torch.optim.SGD(module.train().parameters(), lr=rate)
    with watch(module) as watched:
        for batch, target in zip(x.split(ROWS), labels.split(ROWS), strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(batch), target).backward()
            if clipping:
                clip_gradients(module.parameters(), clipping)
            optimizer.step()
        return watched.health()


def names(health: Health) -> set[str]:
    return {illness.name for illness in health.illnesses}


def deep(activation: str, depth: int = 20, **options: object) -> nn.Sequential:
    torch.manual_seed(0)
    return mlp([FEATURES] + [60] * depth + [CLASSES], activation, **options)  # type: ignore[arg-type]


def with_normal_weights(module: nn.Module) -> nn.Module:
    """Weights from N(0, 1), as they began before Glorot and Bengio."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight)
    return module


def test_sigmoids_with_normal_weights_saturate_and_their_gradients_vanish_and_the_advice_helps() -> None:
    ill = trained(with_normal_weights(deep("sigmoid", 8)))
    assert "saturation" in names(ill)
    assert "vanishing gradients" in names(trained(deep("sigmoid", 12)))
    for cured in (deep("relu", 8), deep("sigmoid", 3), deep("sigmoid", 8, norm="batch", before=True)):
        assert not names(trained(cured)) & {"saturation", "vanishing gradients", "exploding gradients"}


def test_layers_that_no_gradient_reaches_are_named_without_a_ratio() -> None:
    module = deep("relu", 6)
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    nn.init.zeros_(layers[3].weight)
    nn.init.ones_(layers[3].bias)
    (illness,) = [i for i in trained(module, steps=1).illnesses if i.name == "vanishing gradients"]
    assert illness.evidence == "gradients are 0 in the first layers"


def test_a_large_rate_kills_relu_units_and_a_lower_rate_or_a_leak_keeps_them_alive() -> None:
    ill = trained(deep("relu", 3), rate=30.0, steps=30)
    assert names(ill) & {"dying units", "exploding gradients"}
    dead = next((i for i in ill.illnesses if i.name == "dying units"), None)
    assert dead is not None
    assert any("rate" in remedy for remedy in dead.remedies)
    assert "dying units" not in names(trained(deep("relu", 3), rate=0.05, steps=30))
    assert "dying units" not in names(trained(deep("elu", 3), rate=0.5, steps=30))


def test_a_deep_stack_with_the_wrong_initialiser_explodes_or_vanishes_and_the_right_one_does_neither() -> None:
    large = with_normal_weights(deep("relu"))
    assert "exploding gradients" in names(trained(large, rate=1e-12))
    small = deep("relu", 40)
    for layer in small.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.01)
    assert "vanishing gradients" in names(trained(small))
    assert names(trained(deep("relu"))) == set()
    assert names(trained(deep("selu", 40))) == set()


def test_clipping_is_advised_for_exploding_gradients_and_bounds_the_steps() -> None:
    wild = trained(deep("relu", 3), rate=0.1, scale=1e4, steps=10)
    (illness,) = [i for i in wild.illnesses if i.name == "exploding gradients"]
    assert illness.remedies[0] == "gradient clipping by norm"
    clipped = trained(deep("relu", 3), rate=0.1, scale=1e4, steps=10, clipping=Clipping("norm", 1.0))
    assert max(layer.update or 0 for layer in clipped.layers) < 0.1


def test_values_that_are_not_finite_are_named_and_become_none_in_json() -> None:
    torch.manual_seed(0)
    module = mlp([FEATURES, 10, CLASSES])
    with torch.no_grad():
        module.hidden1.weight[0, 0] = float("inf")
    health = trained(module, steps=2)
    assert "exploding gradients" in names(health)
    assert "not finite" in str(health)
    assert health.to_json()["layers"][0]["mean"] is None


def test_watching_changes_nothing() -> None:
    def run(watched: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        module = mlp([FEATURES, 30, CLASSES], norm="batch", dropout=0.3)
        if watched:
            trained(module)
        else:
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(ROWS * 15, FEATURES, generator=generator)
            labels = (x @ torch.randn(FEATURES, CLASSES, generator=generator)).argmax(1)
            optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
            for batch, target in zip(x.split(ROWS), labels.split(ROWS), strict=True):
                optimizer.zero_grad()
                nn.functional.cross_entropy(module(batch), target).backward()
                optimizer.step()
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
        return list(module.state_dict().values())

    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False), strict=True))


def test_figures_of_each_layer_are_what_they_say() -> None:
    torch.manual_seed(0)
    module = initialize_(nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(), nn.Linear(8, CLASSES)), "relu")
    with torch.no_grad():
        module[0].bias[:3] = -1e6  # three units that no input wakes
    health = trained(module, rate=0.0, steps=4)
    linear, relu, last = health.layers
    assert relu.dead == pytest.approx(3 / 8)
    assert (linear.update, last.update) == (None, None)
    assert (linear.gradient or 0) > 0
    assert health.batches == 4
    assert "38%" in str(health)
    trained_once = trained(module, rate=0.1, steps=2)
    assert 0 < (trained_once.layers[-1].update or 0) < 1


@pytest.mark.parametrize("runs", [0, 1])
def test_a_network_that_did_not_train_has_no_figures(runs: int) -> None:
    module = nn.Sequential(nn.Linear(3, 2)).eval()
    with watch(module) as watched:
        for _ in range(runs):
            module(torch.zeros(2, 3))
        with pytest.raises(ValueError, match="must have run in training mode"):
            watched.health()


class Reused(nn.Module):
    """One activation after layers of different widths and ranks; the first position is dead, the second is not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.relu = nn.Linear(FEATURES, 16), nn.Linear(16, CLASSES), nn.ReLU()
        nn.init.constant_(self.a.bias, -1e6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(self.b(self.relu(self.a(x)).unsqueeze(1)) + 1).squeeze(1)


def test_an_activation_used_at_several_places_is_seen_at_each() -> None:
    torch.manual_seed(0)
    health = trained(Reused(), rate=0.0)
    assert "dying units" in names(health)


@pytest.mark.parametrize("change", ["frozen", "weight_norm", "spectral_norm", "lazy", "one example", "empty"])
def test_layers_of_every_kind_can_be_watched(change: str) -> None:
    torch.manual_seed(0)
    module = mlp([FEATURES, 30, 30, CLASSES])
    x = torch.randn(64, FEATURES)
    if change == "frozen":
        module.hidden1.requires_grad_(False)
    elif change == "weight_norm":
        nn.utils.parametrizations.weight_norm(module.hidden1)
    elif change == "spectral_norm":
        nn.utils.parametrizations.spectral_norm(module.hidden1)
    elif change == "lazy":
        module.hidden2 = nn.LazyLinear(30)
    elif change == "one example":
        x = x[:1]
    with watch(module) as watched:
        module(x).sum().backward()
        if change == "empty":
            module(x[:0])
        health = watched.health()
    assert names(health) == set()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_copies_of_a_watched_network_are_not_watched_and_it_can_be_saved(tmp_path: Path) -> None:
    module = mlp([FEATURES, 30, CLASSES])
    with watch(module) as watched:
        copied = copy.deepcopy(module)
        copied(torch.randn(40, FEATURES))
        with pytest.raises(ValueError, match="no batch was seen"):
            watched.health()
        torch.save(module, tmp_path / "m.pt")
        assert torch.load(tmp_path / "m.pt", weights_only=False)(torch.ones(1, FEATURES)).shape == (1, CLASSES)


@pytest.mark.parametrize("kind", ["scaled loss", "zero head", "accumulated", "large targets", "skip", "sigmoid output"])
def test_healthy_training_raises_no_alarm(kind: str) -> None:
    torch.manual_seed(0)
    module: nn.Module = mlp([FEATURES] + [60] * 6 + [CLASSES])
    if kind == "zero head":
        nn.init.zeros_(module.output.weight)
    if kind == "sigmoid output":
        module = nn.Sequential(*module, nn.Sigmoid())
    if kind == "skip":
        module = Skips()
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
    scale = {"scaled loss": 65536.0, "large targets": 1e5}.get(kind, 1.0)
    with watch(module) as watched:
        for step in range(12):
            x = torch.randn(ROWS, FEATURES)
            loss = nn.functional.mse_loss(module(x), x[:, :CLASSES] * (scale if kind == "large targets" else 1))
            (loss * (scale if kind == "scaled loss" else 1)).backward()
            if kind != "accumulated" or step % 4 == 3:
                if kind == "scaled loss":
                    for p in module.parameters():
                        p.grad /= scale
                optimizer.step()
                optimizer.zero_grad()
        assert names(watched.health()) == set()


class Skips(nn.Module):
    """Residual blocks with a scale that begins near 0, as in transformers: their branches hardly learn at first."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(FEATURES, 60), nn.Linear(60, CLASSES)
        self.blocks = nn.ModuleList(mlp([60, 60, 60], "gelu") for _ in range(6))
        self.scale = nn.Parameter(torch.full((6,), 1e-5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for scale, block in zip(self.scale, self.blocks, strict=True):
            x = x + scale * block(x)
        result: torch.Tensor = self.head(x)
        return result
