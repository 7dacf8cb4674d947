"""Freezing holds: through training mode, validation, a resume, weight decay and momentum."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

import tiny
from regraft.backbone import cut_at, load_backbone
from regraft.cut import split
from regraft.graph import trace
from regraft.params import Frozen, freeze, frozen_parts, parameter_groups

SIZE = 64
STEPS = 5


class Noisy(nn.Module):
    """Dropout and batch norm on both sides of the cut."""

    def __init__(self):
        super().__init__()
        self.low = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout2d(0.5), nn.Dropout(0.5))
        self.high = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1))
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(8, 4))

    def forward(self, x):
        return self.head(self.high(self.low(x)))


NETWORKS = {
    "drop path in a resnet": (lambda: timm.create_model("resnet18", drop_path_rate=0.5, num_classes=4), "layer3"),
    "dropout by hand": (Noisy, "low"),
    "efficientnet lite0": (
        lambda: timm.create_model("tf_efficientnet_lite0", drop_path_rate=0.5, num_classes=4),
        "blocks.3",
    ),
}


def made(make, cut, seed):
    torch.manual_seed(seed)
    module = make()
    with torch.no_grad():  # statistics and scales that are not the trivial ones: a scale of 0 would hide drop path
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.weight.uniform_(0.5, 1.5)
        module.train()(torch.randn(8, 3, SIZE, SIZE))
    lower, upper = split(trace(module.eval(), torch.zeros(2, 3, SIZE, SIZE)), cut)
    return nn.Sequential(freeze(lower), upper)


def optimizer_of(model):
    return torch.optim.SGD(parameter_groups(model, lr=0.05, weight_decay=0.1), momentum=0.9)


def step(model, optimizer, seed):
    torch.manual_seed(seed)
    loss = nn.functional.cross_entropy(model(torch.randn(4, 3, SIZE, SIZE)), torch.arange(4))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@pytest.mark.parametrize(("make", "cut"), NETWORKS.values(), ids=NETWORKS.keys())
def test_a_frozen_part_stays_bit_identical_through_training_validation_and_resume(make, cut):
    model = made(make, cut, seed=0)
    lower, upper = model[0], model[1]
    before, trained = copy.deepcopy(lower.state_dict()), copy.deepcopy(upper.state_dict())
    x = torch.randn(3, 3, SIZE, SIZE)
    evaluated = lower(x)
    optimizer = optimizer_of(model)

    model.train()
    step(model, optimizer, 1)
    model.eval()
    with torch.no_grad():
        model(x)
    model.train()
    step(model, optimizer, 2)

    resumed = made(make, cut, seed=9)
    resumed.load_state_dict(model.state_dict())
    again = optimizer_of(resumed)
    again.load_state_dict(optimizer.state_dict())
    resumed.train()
    for i in range(STEPS):
        step(resumed, again, 3 + i)

    after = resumed[0].state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(p.grad is None and not p.requires_grad for p in resumed[0].parameters())
    assert not {id(p) for p in resumed[0].parameters()} & {id(p) for p in again.state}
    assert torch.equal(resumed[0](x), evaluated)
    assert resumed[0].training
    changed = [name for name, tensor in resumed[1].state_dict().items() if not torch.equal(tensor, trained[name])]
    assert len(changed) > len(trained) / 2, "the part above must have been trained"


def test_the_frozen_networks_draw_noise_when_they_are_not_frozen():
    for make, cut in NETWORKS.values():
        lower = made(make, cut, seed=0)[0].module.train()
        x = torch.randn(8, 3, SIZE, SIZE)
        assert not torch.equal(lower(x), lower(x))


def test_a_state_passes_between_a_frozen_and_an_unfrozen_model():
    first, second = tiny.TinyNet(1), tiny.TinyNet(2)
    first.stage1 = freeze(first.stage1)
    assert list(first.state_dict()) == list(second.state_dict())
    second.load_state_dict(first.state_dict())
    first.load_state_dict(tiny.TinyNet(3).state_dict())
    third = tiny.TinyNet(3)
    assert all(torch.equal(t, third.state_dict()[name]) for name, t in first.state_dict().items())
    whole = freeze(tiny.TinyNet(4))
    whole.load_state_dict(third.state_dict())
    assert torch.equal(whole(tiny.EXAMPLE), third.eval()(tiny.EXAMPLE))


def test_a_state_that_lacks_a_tensor_is_refused():
    model = tiny.TinyNet()
    model.stage1 = freeze(model.stage1)
    state = model.state_dict()
    del state["stage1.conv1.weight"]
    with pytest.raises(RuntimeError, match=r"conv1\.weight"):
        model.load_state_dict(state)


def test_nothing_from_outside_makes_a_frozen_part_trainable():
    model = nn.Sequential(freeze(nn.Linear(2, 2)), nn.Linear(2, 2))
    assert list(frozen_parts(model)) == [model[0]]
    model.requires_grad_(True)
    model[0].requires_grad_(True)
    grouped = [p for group in parameter_groups(model, lr=0.1) for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in model[1].parameters()}
    model(torch.ones(1, 2)).sum().backward()
    assert all(p.grad is None for p in model[0].parameters())
    assert all(not m.training for m in model.train()[0].module.modules())
    assert isinstance(model[0], Frozen)


def test_only_weights_of_two_and_more_axes_decay():
    groups = parameter_groups(tiny.TinyNet(), lr=0.1, weight_decay=0.5)
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    assert all(p.dim() > 1 for p in groups[0]["params"])
    assert all(p.dim() == 1 for p in groups[1]["params"])
    assert sum(len(group["params"]) for group in groups) == len(list(tiny.TinyNet().parameters()))


def test_a_backbone_is_cut_by_name_into_halves_that_share_its_parameters():
    backbone = load_backbone(tiny.TinyNet(), example=tiny.EXAMPLE)
    lower, upper = cut_at(backbone, "stage2")
    x = torch.rand(3, 3, 32, 32)
    assert torch.equal(upper(lower(x)), backbone.module(x))
    ours = {id(p) for p in backbone.module.parameters()}
    assert {id(p) for half in (lower, upper) for p in half.parameters()} == ours
