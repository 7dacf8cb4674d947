"""Freezing holds in fine-tuning: what lies below the cut, and the user's network, keep every bit."""

from __future__ import annotations

import contextlib

import pytest
import timm
import torch
from torch import nn

import grounds
import tiny
from regraft.backbone import load_backbone
from regraft.candidates import Candidate
from regraft.cut import split
from regraft.finetune import begin, fit_all, train_fold
from regraft.frozen import freeze_lower, values_at_cuts
from regraft.ladder import maps_of
from regraft.training import Checkpoints, Halted
from regraft.tuned import batch_norms, run_tuned


class Part(nn.Module):
    """Convolution, batch norm, dropout and a residual branch that may be dropped."""

    def __init__(self, before, after):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after)
        self.branch, self.drop_path = nn.Conv2d(after, after, 1), timm.layers.DropPath(0.5)
        self.dropout, self.pool = nn.Dropout(0.5), nn.MaxPool2d(2)

    def forward(self, x):
        x = torch.relu(self.bn(self.conv(x)))
        return self.pool(self.dropout(x + self.drop_path(self.branch(x))))


class Noisy(nn.Module):
    """Four such parts for pictures of 32 x 32, with statistics and scales that are not the trivial ones."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.one, self.two, self.three, self.four = Part(3, 6), Part(6, 8), Part(8, 8), Part(8, 8)
            self.head = nn.Linear(8, 5)
            for norm in batch_norms(self):
                nn.init.uniform_(norm.weight, 0.5, 1.5)
            with torch.no_grad():
                self.train()(torch.rand(16, 3, 32, 32))

    def forward(self, x):
        return self.head(self.four(self.three(self.two(self.one(x)))).mean((2, 3)))


EPOCHS, OPENS = 4, 1
CANDIDATE = {"cut": "two", "end": "mean", "opens": ("three",), "epochs": EPOCHS, "lr": 5e-3, "views": 2}


@pytest.fixture
def module():
    return Noisy()


@pytest.fixture
def ground(tmp_path, module):
    found = grounds.ground_of(
        tiny.write_pictures(tmp_path / "data", each=12), load_backbone(module, example=tiny.EXAMPLE)
    )
    assert {"two", "three", "four", "mean"} <= {cut.name for cut in found.backbone.shown}
    return found


def quiet(what, done, total):
    pass


def copied(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def differing(before, module):
    after = module.state_dict()
    assert list(after) == list(before)
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


def fitted(ground, candidate, folder, *, epochs=EPOCHS, halt=lambda: False):
    seen = []

    def checkpoints(module):
        seen.append(module)
        return Checkpoints(folder, module, {})

    maps = maps_of(ground, candidate, quiet)
    with contextlib.suppress(Halted):
        fit_all(ground, candidate, maps, epochs, slower=1.0, halt=halt, checkpoints=checkpoints)
    return seen[0]


def statistics_of(module):
    return {
        f"{name}.{which}": getattr(norm, which).clone()
        for name, norm in module.named_modules()
        if isinstance(norm, nn.BatchNorm2d)
        for which in ("running_mean", "running_var")
    }


@pytest.mark.parametrize("statistics", [False, True], ids=["norms stay", "norms move"])
def test_the_frozen_part_and_the_users_network_keep_every_bit_through_folds_fit_and_resume(
    tmp_path, ground, module, statistics
):
    candidate = Candidate("stages", "", statistics=statistics, **CANDIDATE)
    lower = split(ground.backbone.trace, "two")[0]
    frozen = freeze_lower(ground.backbone.trace, ["two"], ground.backbone.preprocess, ground.numerics)
    pictures = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    answered = values_at_cuts(frozen, pictures)[0]
    before = [(part, copied(part)) for part in (lower, module, ground.backbone.module)]
    modes = [m.training for m in module.modules()]
    wanted = [p.requires_grad for p in module.parameters()]

    maps = maps_of(ground, candidate, quiet)
    for fold in range(2):
        train_fold(ground, candidate, maps, fold, halt=lambda: False)
    for step in (2, 7):  # before and after the second stage opens, then to the end
        steps = iter(range(10**6))
        fitted(ground, candidate, tmp_path / "run", halt=lambda steps=steps, step=step: next(steps) >= step)
    fitted(ground, candidate, tmp_path / "run")

    assert all(differing(state, part) == set() for part, state in before)
    again = freeze_lower(ground.backbone.trace, ["two"], ground.backbone.preprocess, ground.numerics)
    for one in (frozen, again):
        assert torch.equal(values_at_cuts(one, pictures)[0], answered)
    assert all(p.grad is None for p in module.parameters())
    assert [m.training for m in module.modules()] == modes
    assert [p.requires_grad for p in module.parameters()] == wanted


def test_a_stage_that_is_not_open_yet_keeps_every_bit_and_then_trains(tmp_path, ground):
    candidate = Candidate("stages", "", **CANDIDATE)
    start = begin(ground, candidate, range(len(ground.task.labels)))
    before = copied(start)
    early = differing(before, fitted(ground, candidate, tmp_path / "early", epochs=OPENS))
    assert {name.split(".")[1] for name in early if name.startswith("body")} == {"four"}
    assert {"top.0.weight", "top.0.bias"} <= early
    late = differing(before, fitted(ground, candidate, tmp_path / "late"))
    assert {name.split(".")[1] for name in late if name.startswith("body")} == {"three", "four"}
    trainable = {name for name, _ in start.named_parameters()}
    assert late == trainable


@pytest.mark.parametrize("epochs", [OPENS, EPOCHS], ids=["before unfreezing", "after"])
def test_statistics_of_trained_norms_move_only_where_they_are_told_to(tmp_path, ground, epochs):
    kept = Candidate("stages", "", **CANDIDATE)
    moving = Candidate("stages", "", statistics=True, **CANDIDATE)
    before = statistics_of(begin(ground, kept, range(len(ground.task.labels))))
    after = statistics_of(fitted(ground, kept, tmp_path / "kept", epochs=epochs))
    assert len(before) == 4
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    moved = statistics_of(fitted(ground, moving, tmp_path / "moving", epochs=epochs))
    assert not any(torch.equal(tensor, moved[name]) for name, tensor in before.items())


@pytest.mark.parametrize("statistics", [False, True], ids=["norms stay", "norms move"])
@pytest.mark.parametrize("step", [3, 5, 7])
def test_a_resume_with_a_stage_that_opens_later_comes_to_the_same_bits(tmp_path, ground, statistics, step):
    candidate = Candidate("stages", "", statistics=statistics, **CANDIDATE)
    whole = fitted(ground, candidate, tmp_path / "whole")
    steps = iter(range(10**6))
    fitted(ground, candidate, tmp_path / "again", halt=lambda: next(steps) >= step)
    assert differing(copied(whole), fitted(ground, candidate, tmp_path / "again")) == set()


def test_dropout_and_drop_path_are_silent_in_fine_tuning(tmp_path, ground):
    candidate = Candidate("stages", "", **CANDIDATE)
    one = fitted(ground, candidate, tmp_path / "one")
    torch.manual_seed(99)
    assert differing(copied(one), fitted(ground, candidate, tmp_path / "two")) == set()
    maps = maps_of(ground, candidate, quiet)
    x = maps.batch(torch.arange(8).numpy(), torch.zeros(8, dtype=torch.int64).numpy())
    assert torch.equal(run_tuned(one, x), run_tuned(one, x))
    noisy = [m for m in one.modules() if isinstance(m, nn.Dropout | timm.layers.DropPath)]
    assert noisy
    assert not any(m.training for m in noisy)
