"""What pretraining does beside its one loop: a batch that fits, epochs that a budget fixes, batches, norms at the end.

Knows methods, prepared pictures and time; nothing of folders of runs, records or curves.
"""

from __future__ import annotations

import copy
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from regraft.budget import Budget
from regraft.errors import TrainingError
from regraft.methods import Batch, Encoder, Method, Panel
from regraft.methods.encoder import encode
from regraft.prepared import Pictures
from regraft.training import Checkpoints, Diverged, Stage, batches_of, shuffled, train
from regraft.tuned import batch_norms

MOST_EPOCHS = 300
ROOM = 4 << 30
"""Bytes that a step may keep for its gradients; a method's batch is halved until it does. The same on all machines."""
MEASURED, LEAST = 8, 16
"""Pictures on which that is measured, and the least that are left in a batch."""
TIMED, TIMED_SHARE = 8, 0.02
"""Steps that are timed at least, after as many that warm up, and the share of the budget that goes into it."""
STEP = 1.1
"""A step with its optimizer takes so many times as long as its loss and gradients."""
SLOWER = 0.1
RESERVE = 0.05
"""Share of the budget that is left for what comes after training."""
NORMED = 4096
"""Pictures that batch norms are set on once more after training, as they are, not varied or spoilt."""
Say = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Work:
    """What is trained, on what, and where.

    begun_from: a backbone; its batch norms keep the statistics of the pictures that it has learned from.
    """

    name: str
    learner: Method
    encoder: Encoder
    pictures: Pictures
    seed: int
    device: str
    begun_from: bool

    @property
    def modules(self) -> nn.ModuleDict:
        return nn.ModuleDict({part.name: part.module for part in self.learner.parts})

    def by(self, batch: int) -> Work:
        """The same with so many pictures a step."""
        return replace(self, learner=replace(self.learner, batch=batch))


def planned(work: Work, epochs: int | None, budget: Budget) -> dict[str, Any]:
    """Epochs and their steps: what is asked for, else what fits into the budget by a few steps that leave no trace."""
    steps = batches_of(len(work.pictures.labels), work.learner.batch)
    least = len({part.opens for part in work.learner.parts})
    if epochs is not None:
        if epochs < least:
            raise TrainingError(
                f"The method {work.name} must have an epoch for each of {least} layers; found {epochs}."
            )
        return {"epochs": epochs, "steps": steps}
    taken: list[float] = []
    with _without_trace(work):
        begun = at = time.perf_counter()
        for batch in itertools.chain.from_iterable(
            batches_of_epoch(work, i, MOST_EPOCHS, steps) for i in itertools.count()
        ):
            value = work.learner.loss(batch)
            value.backward()  # type: ignore[no-untyped-call]
            float(value.detach())  # waits for a GPU
            taken.append(time.perf_counter() - at)
            at = time.perf_counter()
            share = (at - begun) / (budget.seconds or 1)
            if (share > TIMED_SHARE and len(taken) >= 2 * TIMED) or (share > 5 * TIMED_SHARE and len(taken) > 1):
                break
    left = budget.left() - 2 * RESERVE * (budget.seconds or 0)
    affordable = max(1, int(left / (STEP * statistics.median(taken[len(taken) // 2 :]))))
    epochs = max(least, min(MOST_EPOCHS, -(-affordable // steps)))
    return {"epochs": epochs, "steps": max(1, min(steps, affordable // epochs))}


def fitting(work: Work) -> int:
    """The method's batch, halved until what a step keeps for its gradients fits into ROOM."""
    kept: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with _without_trace(work) as modules, torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        some = next(batches_of_epoch(work.by(MEASURED), 0, 1, 1))
        value = work.learner.loss(some)
        weights = {parameter.untyped_storage().data_ptr() for parameter in modules.parameters()}
        each = sum(size for place, size in kept.items() if place not in weights) / len(some.labels)
        del value  # until here it kept them all in place
    batch = work.learner.batch
    while batch * each > ROOM and batch // 2 >= LEAST:
        batch //= 2
    return batch


@contextmanager
def _without_trace(work: Work) -> Iterator[nn.ModuleDict]:
    """The modules as they train, to be tried: their values, gradients and the random numbers are as before after it."""
    modules = _placed(work)
    kept = copy.deepcopy(modules.state_dict())
    devices = [torch.cuda.current_device()] if work.device != "cpu" else []
    with torch.random.fork_rng(devices=devices):
        yield modules
    modules.load_state_dict(kept)
    modules.zero_grad(set_to_none=True)


def _placed(work: Work) -> nn.ModuleDict:
    """All modules as they train: on their device, laid out for it."""
    modules: nn.ModuleDict = work.modules.to(work.device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    for norm in batch_norms(work.encoder.module) if work.begun_from else ():
        norm.eval()
    return modules


def trained(
    work: Work,
    plan: dict[str, Any],
    facts: dict[str, Any],
    folder: Path,
    keep: Callable[[float], None],
    late: Callable[[int], bool],
    say: Say,
) -> tuple[list[float], int]:
    """Train in place; the mean loss of every epoch, and how many pictures were seen now.

    Once more, at a tenth of the rate, where the loss is not finite. keep: told the rate in use after every epoch;
    late: whether no further epoch is to begin.
    """
    modules = _placed(work)
    epochs, steps = plan["epochs"], plan["steps"]
    stages = [Stage(p.name, tuple(p.module.parameters()), p.rate, int(p.opens * epochs)) for p in work.learner.parts]
    begun = copy.deepcopy(modules.state_dict())
    seen = 0

    def batches(epoch: int) -> Iterator[Batch]:
        nonlocal seen
        for done, batch in enumerate(batches_of_epoch(work, epoch, epochs, steps)):
            say(f"pretraining by {work.name}", epoch * steps + done, epochs * steps)
            seen += len(batch.labels)
            yield batch

    for slower in (1.0, SLOWER) if plan["rate"] == 1 else (SLOWER,):

        def after(epoch: int, slower: float = slower) -> bool:
            keep(slower)
            return late(epoch)

        keep(slower)
        rates = replace(work.learner.plan, epochs=epochs, lr=work.learner.plan.lr * slower)
        checkpoints = Checkpoints(folder / f"rate-{slower:g}", modules, facts)
        try:
            loss = work.learner.loss
            found = train(stages, rates, batches, steps, loss, seed=work.seed, after=after, checkpoints=checkpoints)
        except Diverged:
            modules.load_state_dict(begun)
        else:
            say(f"pretraining by {work.name}", epochs * steps, epochs * steps)
            return found, seen
    raise TrainingError(
        f"The loss of {work.name} must be finite; it was not, also not at a tenth of the learning rate: choose another "
        "method or --arch."
    )


def batches_of_epoch(work: Work, epoch: int, epochs: int, steps: int) -> Iterator[Batch]:
    values, labels = work.pictures.values, work.pictures.labels
    for some in islice(rows_of_epoch(work, epoch), steps):
        at = torch.from_numpy(some)
        x = values[at].to(work.device, torch.float32).div_(255)
        yield Batch(x, torch.from_numpy(labels[some]).to(work.device), epoch / epochs)


def rows_of_epoch(work: Work, epoch: int) -> Iterator[np.ndarray]:
    """The pictures of every batch; in pairs, each is followed by another of its label, itself where there is none."""
    labels, size = work.pictures.labels, work.learner.batch
    everything = np.arange(len(labels))
    if not work.learner.in_pairs:
        yield from shuffled(everything, size, seed=work.seed, epoch=epoch)
        return
    rng = np.random.default_rng([work.seed, epoch, 2])
    order = np.argsort(labels, kind="stable")
    first, count = np.searchsorted(labels[order], labels), np.bincount(labels)[labels]
    place = np.empty_like(order)
    place[order] = everything
    step = rng.integers(1, np.maximum(count, 2))
    partner = order[first + (place - first + step) % count]
    for some in shuffled(everything, size // 2, seed=work.seed, epoch=epoch):
        yield np.stack([some, partner[some]], 1).reshape(-1)


def set_norms(work: Work) -> None:
    """Set the statistics of batch norms anew from pictures as they are: in training they saw spoilt or made ones."""
    norms = cast(list[nn.BatchNorm2d], list(batch_norms(work.encoder.module)))
    if not norms:
        return
    work.encoder.module.eval()
    kept = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # of torch: the mean of all batches
        norm.train()
    n = len(work.pictures.labels)
    chosen = np.random.default_rng(work.seed).permutation(n)[:NORMED]
    with torch.no_grad():
        for some in np.array_split(chosen, -(-len(chosen) // work.learner.batch)):
            x = work.pictures.values[torch.from_numpy(some)].to(work.device, torch.float32).div_(255)
            encode(work.encoder, x)
    for norm, momentum in zip(norms, kept, strict=True):
        norm.momentum = momentum
        norm.eval()


def shown(work: Work) -> list[Panel]:
    """What the method has to show, on the first pictures of a batch that no training has drawn."""
    modules = work.modules.eval()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(work.seed)
        panels = work.learner.show(next(batches_of_epoch(work, MOST_EPOCHS, MOST_EPOCHS, 1)))
    modules.train()
    return panels
