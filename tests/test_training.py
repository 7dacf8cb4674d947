"""The training loop: stages that open, rates, checkpoints that are gone on from, steps that must not be made."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

from regraft.errors import TrainingError
from regraft.nn import Clipping
from regraft.training import Checkpoints, Diverged, Halted, Plan, Stage, batches_of, rate_at, shuffled, train

ROWS, SIZE, EPOCHS = 26, 5, 5
CLIPPING = Clipping("norm", 1.0)
STEPS = batches_of(ROWS, SIZE)
X = torch.from_numpy(np.random.default_rng(0).normal(0, 1, (ROWS, 6))).float()
Y = torch.arange(ROWS) % 3


def network(seed=0):
    """Three layers, lowest first, with a batch norm whose statistics move and noise that is drawn at every step."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        low, middle, top = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
    return nn.Sequential(low, nn.BatchNorm1d(8), nn.ReLU(), middle, nn.Dropout(0.3), nn.ReLU(), top)


def stages_of(model):
    return [
        Stage("top", tuple(model[6].parameters())),
        Stage("middle", tuple(model[3].parameters()), 0.5, 2),
        Stage("low", (*model[0].parameters(), *model[1].parameters()), 0.25, 3),
    ]


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, two):
    return list(one) == list(two) and all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def checkpoints_in(folder, model, facts="one"):
    return Checkpoints(folder, model, {"facts": facts})


def trained(model, *, loss=None, lr=0.05, clipping=CLIPPING, begun=None, **options):
    """Train the network on the 26 rows; `begun` is a list that takes the epochs whose batches were asked for."""

    def batches(epoch):
        if begun is not None:
            begun.append(epoch)
        yield from shuffled(np.arange(ROWS), SIZE, seed=0, epoch=epoch)

    def plain(rows):
        return F.cross_entropy(model(X[rows]), Y[rows])

    plan = Plan(EPOCHS, lr, weight_decay=0.1, clipping=clipping)
    return train(stages_of(model), plan, batches, STEPS, loss or plain, seed=0, **options)


def halted_at(step):
    """Something that says to stop at this step, counted over all epochs."""
    seen = iter(range(10**6))
    return lambda: next(seen) >= step


# ---- stages ------------------------------------------------------------------------------------------------------


def test_a_closed_stage_keeps_its_bits_has_no_gradient_and_opens_at_its_epoch():
    model = network()
    before, stages, changed = state_of(model), stages_of(model), []
    names = {id(p): name for name, p in model.named_parameters()}

    def after(epoch):
        for stage in stages:
            for p in stage.parameters:
                moved = not torch.equal(p, before[names[id(p)]])
                assert moved == (epoch >= stage.opens)
                assert p.requires_grad == (epoch >= stage.opens)
                assert epoch >= stage.opens or p.grad is None
        changed.append(epoch)
        return False

    losses = trained(model, after=after)
    assert changed == list(range(EPOCHS))
    assert len(losses) == EPOCHS
    assert losses[-1] < losses[0]


def test_a_closed_stage_has_no_optimizer_state_and_all_stages_have_their_place_from_the_start(tmp_path):
    model, places = network(), []

    def after(epoch):
        newest = max(tmp_path.glob("epoch-*.safetensors"))
        tensors = safetensors.torch.load_file(newest)
        places.append(sorted({int(name.split(".")[1]) for name in tensors if name.startswith("optimizer.")}))
        return False

    trained(model, after=after, checkpoints=checkpoints_in(tmp_path, model))
    assert places == [[0, 1], [0, 1], [0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6, 7]]


def test_a_stage_that_was_open_for_another_training_is_closed_again():
    model = network()
    model(X).sum().backward()
    before = state_of(model)
    trained(model, after=lambda epoch: epoch == 1)
    assert torch.equal(model[0].weight, before["0.weight"])
    assert model[0].weight.grad is None


# ---- rates -------------------------------------------------------------------------------------------------------


def test_a_rate_rises_from_the_opening_of_its_stage_and_falls_along_a_cosine():
    plan = Plan(5, 0.4, warmup=0.1)  # 4 steps an epoch: 20 in all, 3 of them to rise
    first, later = Stage("first", ()), Stage("later", (), 0.5, 2)

    def fallen(step):
        return 0.5 * (1 + math.cos(math.pi * step / 20))

    table = {0: 0.4 / 3, 1: 0.8 / 3 * fallen(1), 2: 0.4 * fallen(2), 10: 0.2, 15: 0.4 * fallen(15)}
    assert {step: rate_at(step, 4, plan, first) for step in table} == pytest.approx(table)
    table = {0: 0, 7: 0, 8: 0.2 / 3 * fallen(8), 9: 0.4 / 3 * fallen(9), 10: 0.1}
    assert {step: rate_at(step, 4, plan, later) for step in table} == pytest.approx(table)
    falling = [rate_at(step, 4, plan, first) for step in range(2, 20)]
    assert falling == sorted(falling, reverse=True)
    assert 0 <= falling[-1] < 0.01 * plan.lr


def test_each_stage_is_stepped_at_its_own_rate():
    one, two = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    stages = [Stage("one", (one,)), Stage("two", (two,), 0.25, 1)]
    plan = Plan(3, 0.1, clipping=None)
    train(stages, plan, lambda epoch: range(4), 4, lambda batch: (one + two).sum())
    # Under a constant gradient a step of Adam is as long as its rate.
    expected = [-sum(rate_at(step, 4, plan, stage) for step in range(12)) for stage in stages]
    assert [one.item(), two.item()] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("clipping", [None, Clipping("norm", 0.01), Clipping("value", 0.001)], ids=str)
def test_steps_are_those_of_adamw_on_clipped_gradients(clipping):
    model = network().eval()
    other = copy.deepcopy(model)
    plan = Plan(3, 0.05, weight_decay=0.1, clipping=clipping)
    groups = [
        {"params": [p for p in other.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in other.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=plan.lr)
    stage = Stage("all", tuple(model.parameters()))

    def loss(module, step):
        return F.cross_entropy(module(X) * (1 + 50 * (step % 2)), Y)  # every second gradient is much longer

    losses = train([stage], plan, lambda epoch: range(4), 4, lambda step: loss(model, step))
    for step in range(12):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, 4, plan, stage)
        optimizer.zero_grad()
        loss(other, step % 4).backward()
        if clipping and clipping.by == "norm":
            nn.utils.clip_grad_norm_(other.parameters(), clipping.limit)
        elif clipping:
            nn.utils.clip_grad_value_(other.parameters(), clipping.limit)
        optimizer.step()
    assert len(losses) == 3
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


# ---- batches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 7, 32])
def test_every_row_is_in_one_batch_and_no_batch_holds_one_row_alone(size):
    for n in range(1, 101):
        rows = np.arange(n) * 3
        batches = list(shuffled(rows, size, seed=1, epoch=2))
        assert np.array_equal(np.sort(np.concatenate(batches)), rows)
        assert len(batches) == batches_of(n, size)
        assert min(map(len, batches)) > 1 or n == 1
        assert max(map(len, batches)) <= size + 1


def test_rows_are_shuffled_by_seed_and_epoch_alone():
    def order(**which):
        return np.concatenate(list(shuffled(np.arange(50), 8, **which))).tolist()

    assert order(seed=1, epoch=2) == order(seed=1, epoch=2)
    assert len({tuple(order(seed=s, epoch=e)) for s in range(3) for e in range(3)}) == 9


# ---- checkpoints -------------------------------------------------------------------------------------------------


def test_the_same_training_twice_is_the_same_and_leaves_the_random_state_alone():
    one, two = network(), network()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    losses = trained(one)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert trained(two) == losses
    assert same(one.state_dict(), two.state_dict())


@pytest.mark.parametrize("epoch", range(1, EPOCHS))
def test_a_training_that_is_resumed_at_any_epoch_ends_with_the_same_bits(tmp_path, epoch):
    whole, halted, resumed, begun = network(), network(), network(seed=9), []
    losses = trained(whole)
    with pytest.raises(Halted):
        trained(halted, halt=halted_at(epoch * STEPS + 3), checkpoints=checkpoints_in(tmp_path, halted))
    assert trained(resumed, checkpoints=checkpoints_in(tmp_path, resumed), begun=begun) == losses
    assert begun == list(range(epoch, EPOCHS))
    assert same(resumed.state_dict(), whole.state_dict())


def test_a_training_that_is_halted_in_every_epoch_ends_with_the_same_bits(tmp_path):
    whole = network()
    losses = trained(whole)
    for _ in range(EPOCHS - 1):
        model = network()
        with pytest.raises(Halted):
            trained(model, halt=halted_at(STEPS + 2), checkpoints=checkpoints_in(tmp_path, model))
    last = network()
    assert trained(last, checkpoints=checkpoints_in(tmp_path, last)) == losses
    assert same(last.state_dict(), whole.state_dict())


def test_a_finished_training_is_given_back_without_a_step(tmp_path):
    model, again, begun = network(), network(seed=9), []
    losses = trained(model, checkpoints=checkpoints_in(tmp_path, model))
    assert trained(again, checkpoints=checkpoints_in(tmp_path, again), begun=begun) == losses
    assert begun == []
    assert same(again.state_dict(), model.state_dict())


def test_a_training_that_was_stopped_early_is_given_back_without_a_step(tmp_path):
    model, again, begun = network(), network(seed=9), []
    losses = trained(model, after=lambda epoch: epoch + 1 >= 3, checkpoints=checkpoints_in(tmp_path, model))
    assert len(losses) == 3
    kept = checkpoints_in(tmp_path, again)
    assert trained(again, after=lambda epoch: epoch + 1 >= 3, checkpoints=kept, begun=begun) == losses
    assert begun == []
    assert same(again.state_dict(), model.state_dict())


def test_at_most_two_checkpoints_are_kept(tmp_path):
    model, counts = network(), []

    def after(epoch):
        counts.append(len(list(tmp_path.iterdir())))
        return False

    trained(model, after=after, checkpoints=checkpoints_in(tmp_path, model))
    assert counts == [1, 2, 2, 2, 2]


def flipped(data, at):
    return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]


DAMAGES = {
    "first byte": lambda data: flipped(data, 0),
    "header": lambda data: flipped(data, 40),
    "middle": lambda data: flipped(data, len(data) // 2),
    "last byte": lambda data: flipped(data, len(data) - 1),
    "truncated": lambda data: data[:-1],
    "empty": lambda data: b"",
    "longer": lambda data: data + b"\0",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(tmp_path, damage):
    whole, halted, resumed, begun = network(), network(), network(seed=9), []
    losses = trained(whole)
    with pytest.raises(Halted):
        trained(halted, halt=halted_at(4 * STEPS), checkpoints=checkpoints_in(tmp_path, halted))
    newest = max(tmp_path.iterdir())
    newest.write_bytes(damage(newest.read_bytes()))
    with pytest.warns(UserWarning, match=newest.name):
        assert trained(resumed, checkpoints=checkpoints_in(tmp_path, resumed), begun=begun) == losses
    assert begun == [3, 4]
    assert same(resumed.state_dict(), whole.state_dict())


def test_where_all_checkpoints_are_damaged_training_begins_anew(tmp_path):
    whole, halted, resumed = network(), network(), network()
    losses = trained(whole)
    with pytest.raises(Halted):
        trained(halted, halt=halted_at(4 * STEPS), checkpoints=checkpoints_in(tmp_path, halted))
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-9])
    with pytest.warns(UserWarning, match="damaged"):
        assert trained(resumed, checkpoints=checkpoints_in(tmp_path, resumed)) == losses
    assert same(resumed.state_dict(), whole.state_dict())


def test_what_a_killed_save_left_is_no_checkpoint(tmp_path):
    whole, halted, resumed = network(), network(), network(seed=9)
    losses = trained(whole)
    with pytest.raises(Halted):
        trained(halted, halt=halted_at(2 * STEPS), checkpoints=checkpoints_in(tmp_path, halted))
    newest = max(tmp_path.glob("epoch-*"))
    (tmp_path / ".writing-00000000-1-2-abc").write_bytes(newest.read_bytes()[:100])
    assert trained(resumed, checkpoints=checkpoints_in(tmp_path, resumed)) == losses
    assert same(resumed.state_dict(), whole.state_dict())


def test_checkpoints_of_other_facts_are_not_used(tmp_path):
    whole, other, resumed, begun = network(), network(seed=3), network(), []
    losses = trained(whole)
    trained(other, checkpoints=checkpoints_in(tmp_path, other, "other"))
    assert trained(resumed, checkpoints=checkpoints_in(tmp_path, resumed), begun=begun) == losses
    assert begun == list(range(EPOCHS))
    assert same(resumed.state_dict(), whole.state_dict())


def test_checkpoints_of_other_facts_do_not_push_out_those_that_are_needed(tmp_path):
    other, halted, resumed, begun = network(seed=3), network(), network(seed=9), []
    trained(other, checkpoints=checkpoints_in(tmp_path, other, "other"))
    with pytest.raises(Halted):
        trained(halted, halt=halted_at(2 * STEPS), checkpoints=checkpoints_in(tmp_path, halted))
    trained(resumed, checkpoints=checkpoints_in(tmp_path, resumed), begun=begun)
    assert begun == [2, 3, 4]


# ---- what must not be stepped ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_not_finite_is_named_and_no_step_is_made(value):
    model, seen = network(), []

    def loss(rows):
        seen.append(state_of(model)["6.weight"])
        good = F.cross_entropy(model(X[rows]), Y[rows])
        return good * value if len(seen) == STEPS + 3 else good

    with pytest.raises(Diverged, match="epoch 1, batch 2") as caught:
        trained(model, loss=loss)
    assert (caught.value.epoch, caught.value.step) == (1, 2)
    assert isinstance(caught.value, TrainingError)
    assert torch.equal(model[6].weight, seen[-1])
    assert not torch.equal(seen[-1], seen[-2])


@pytest.mark.parametrize("clipping", [None, Clipping("norm", 1.0), Clipping("value", 0.5)], ids=str)
def test_a_gradient_that_is_not_finite_makes_no_step_under_any_clipping(clipping):
    model, seen = network(), []

    def loss(rows):
        seen.append(state_of(model))
        good = F.cross_entropy(model.eval()(X[rows]), Y[rows])
        if len(seen) < 4:
            return good
        return good + (model[6].weight.sum() * 0).sqrt()  # 0, with a slope that is not a number

    with pytest.raises(Diverged) as caught:
        trained(model, loss=loss, clipping=clipping)
    assert (caught.value.epoch, caught.value.step) == (0, 3)
    assert same(model.state_dict(), seen[-1])


def test_training_stops_at_the_next_batch_once_it_is_told_to():
    model, seen, told = network(), [], []

    def loss(rows):
        seen.append(len(rows))
        if len(seen) == 7:
            told.append(True)
        return F.cross_entropy(model(X[rows]), Y[rows])

    with pytest.raises(Halted):
        trained(model, loss=loss, halt=lambda: bool(told))
    assert len(seen) == 7
