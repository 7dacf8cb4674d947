"""Pretrain a network when no similar one exists, as one function: pictures in, a folder with a backbone out.

The one training loop runs every method (`methods`); its epochs are fixed before it begins, by the budget and a few
timed steps, and written down, so that a run that is continued goes on bit for bit. What comes out is a backbone like
any other: `curve`, `fit` and `inspect` take the folder.
"""

from __future__ import annotations

import copy
import itertools
import os
import platform
import re
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from regraft.__version__ import __version__
from regraft.allocator import memory_kept
from regraft.backbone import Backbone, described_backbone, load_backbone, savable, save_backbone
from regraft.budget import Budget, budget_from
from regraft.cut import split
from regraft.data import Dataset, identity, load_data, load_unlabelled, subset
from regraft.errors import BackboneError, DataError, RunError, TrainingError
from regraft.graph import Cut
from regraft.methods import LABELLED, METHODS, SPATIAL, VIEWS, Batch, Encoder, Method, Panel, Task
from regraft.methods.encoder import encode
from regraft.networks.small import dense_network, strided_network
from regraft.numerics import pick_numerics
from regraft.prepared import Pictures, prepare
from regraft.preprocess import PreprocessSpec
from regraft.pretrain_report import write_pretrain_report
from regraft.recipe import CHECKPOINTS, Curve, Data, curve
from regraft.record import read_record, refuse_inside, refuse_other_options, write_record
from regraft.report import REPORT_FILE
from regraft.store import FeatureStore
from regraft.training import Checkpoints, Diverged, Stage, batches_of, shuffled, train
from regraft.tuned import batch_norms

SMALL = "small"
DENSE = re.compile(r"dense((?:-[1-9]\d{0,4})+)")
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
FROM_RATE = 0.1
"""Share of a method's learning rate for a network that is not at random: at more it forgets what it knows."""
RESERVE = 0.05
"""Share of the budget that is left for what comes after training."""
NORMED = 4096
"""Pictures that batch norms are set on once more after training, as they are, not varied or spoilt."""
Say = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Pretrained:
    """One finished run: its directory, the backbone as every command loads it from there, and the record."""

    folder: Path
    backbone: Backbone
    record: dict[str, Any]


def pretrain(
    data: Data | Any,
    *,
    method: str,
    out: str | os.PathLike[str],
    arch: str | None = None,
    start: str | None = None,
    labelled: Data | None = None,
    group: str | None = None,
    size: int | None = None,
    budget: str = "20m",
    epochs: int | None = None,
    batch: int | None = None,
    augment: Sequence[str] | None = None,
    seed: int = 0,
    device: str = "auto",
    store: FeatureStore | None = None,
    say: Say = lambda what, done, total: None,
) -> Pretrained:
    """Train a network on pictures without the labels of the task, and keep it as a backbone in the directory `out`.

    data: as for `load_unlabelled`; for the methods `pairs` and `labels` as for `load_data`, where pictures of one
        `group` (else of one class) show the same thing. Pictures in test/ are left alone.
    method: a name of `METHODS`. arch: `small` (a small convolutional network, the default), `dense-500-250` (dense
        layers of these widths), or any name that `load_backbone` takes, with random weights. start: a backbone to go on
        from instead. size: height and width of the pictures for `small` and `dense`.
    budget: wall time of all of it; epochs: exactly so many instead. augment: names of `VIEWS`; None: all of them, but
        neither light nor noise where labels say what a picture shows.
    batch: pictures of a step; None: what suits the method, less where the network would keep more than 4 GB for it.
    labelled: class folders, or other labelled data, on which the curve is drawn before and after.

    A finished run is returned as it is, an interrupted one goes on. Raises RunError where `out` holds another run,
    TrainingError where a method does not suit the network or diverges even at a tenth of its rate.
    """
    begun = time.monotonic()
    if budget_from(budget).seconds is None:
        raise RunError(f"The budget of pretraining must be a time, such as 20m; found {budget!r}: or pass --epochs.")
    if method not in METHODS:
        raise TrainingError(f"The method must be one of {', '.join(METHODS)}; found {method!r}.")
    views = _views(augment, method)
    if arch and start:
        raise BackboneError("A network begins at random (--arch) or from a backbone (--from), not both.")
    _refuse_idle(method, arch, start, group, size)
    dataset, folder = _dataset(data, method, group), Path(out)
    asked = load_data(labelled) if labelled is not None else None
    for place in (dataset, asked):
        if place is not None:
            refuse_inside(folder, place.source)
    options: dict[str, Any] = {
        "data": os.path.abspath(dataset.source) if os.path.exists(dataset.source) else dataset.source,
        "method": method,
        "arch": arch or (SMALL if start is None else None),
        "from": start,
        "group": group,
        "size": size,
        "budget": budget,
        "epochs": epochs,
        "batch": batch,
        "augment": sorted(views),
        "seed": seed,
        "labelled": os.path.abspath(asked.source) if asked and os.path.exists(asked.source) else asked is not None,
    }
    record = read_record(folder)
    say("reading pictures", 0, 1)
    pictures_are = identity(dataset, {})
    if record is not None:
        refuse_other_options(folder, record, options)
        if record.get("identity", pictures_are) != pictures_are:
            raise RunError(f"{folder} holds a run with other pictures: choose another --out.")
        if record["status"] == "finished":
            shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
            return Pretrained(folder, load_backbone(folder), record)
    known = record.get("plan") if record else None
    status: dict[str, Any] = {"status": "running", "options": options, "identity": pictures_are, "plan": known}
    write_record(folder, status | {"spent": float(record.get("spent", 0.0)) if record else 0.0})

    seconds: dict[str, float] = {}
    own = savable(load_backbone(start)) if start else _named(options["arch"], seed)
    tell = lambda d, t: say("preparing pictures", d, t)  # noqa: E731
    by_group = method == "pairs" and group is not None
    pictures = prepare(dataset, own.preprocess if own else None, size=size, by_group=by_group, progress=tell)
    if method == "pairs" and int(np.bincount(pictures.labels).max()) < 2:
        raise DataError(
            "For pairs there must be two pictures of a thing; each stands alone here: give another --group."
        )
    backbone = own or begin(options["arch"], pictures.preprocess, sigmoid=method == "rbm", seed=seed)
    before = copy.deepcopy(backbone.module.state_dict())
    backbone.module.to(device := pick_numerics(device).device)  # first of all: parts share its tensors
    cut = _cut_for(backbone, method)
    encoder = Encoder(split(backbone.trace, cut.name)[0].requires_grad_(True), cut, pictures.preprocess)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        learner = METHODS[method](encoder, Task(int(pictures.labels.max()) + 1, views))
    if start:
        learner = replace(learner, plan=replace(learner.plan, lr=learner.plan.lr * FROM_RATE))
    work = _Work(method, learner, encoder, pictures, seed, device, begun_from=start is not None)
    work = work.by(batch or _fitting(work))
    # What an interrupted run had prepared is not counted twice: it must not end earlier for having been stopped.
    before_that = float(record["spent"]) if record and known else 0.0
    spent = budget_from(budget, spent=before_that, started=None if known else begun)
    seconds["prepare"] = time.monotonic() - begun
    at = time.perf_counter()
    with memory_kept():
        if known is None:
            known = _planned(work, epochs, spent)

        def keep(rate: float) -> None:
            known["rate"] = rate
            write_record(folder, status | {"plan": known, "spent": spent.elapsed()})

        def late(epoch: int) -> bool:
            last = max(int(part.opens * known["epochs"]) for part in learner.parts)
            return epochs is None and spent.left() < 0 and epoch >= last

        keep(known.get("rate", 1.0))
        facts = {**options, "steps": known["steps"], "all": known["epochs"], "pictures": pictures_are}
        facts |= {"batch": work.learner.batch, "weights": backbone.source.weights}
        losses, seen = _trained(work, known, facts, folder / CHECKPOINTS, keep, late, say)
        seconds["training"] = time.perf_counter() - at
        at = time.perf_counter()
        if not work.begun_from:
            _set_norms(work)
        panels = _shown(work)
    backbone.module.cpu().eval()
    facts = {"method": method, "data": pictures_are, "pictures": len(pictures.labels), "epochs": len(losses)}
    if method in LABELLED and not by_group:
        facts["classes_of"] = sorted(set(pictures.ids))
    saved = save_backbone(backbone, folder, cut.name, facts)
    curves = _before_and_after(asked, backbone, before, saved, seed, device, store, say)
    seconds["rest"] = time.perf_counter() - at
    seconds["total"] = spent.elapsed()
    record = {
        "status": "finished",
        "regraft": __version__,
        "options": options,
        "plan": known,
        "cut": cut.name,
        "losses": losses,
        "pictures": len(pictures.labels),
        "identity": pictures_are,
        "left_out": [asdict(item) for item in pictures.left_out],
        "weights": saved.source.weights,
        "licence": saved.source.licence,
        "parameters": sum(p.numel() for p in encoder.module.parameters()),
        "pictures_per_second": seen / max(seconds["training"], 1e-9),
        "curves": {name: one.to_json() | {"majority": _majority(one)} for name, one in curves},
        "seconds": seconds,
        "batch": work.learner.batch,
        "device": work.device,
        "machine": {"python": platform.python_version(), "torch": torch.__version__, "cores": os.cpu_count()},
    }
    write_pretrain_report(folder / REPORT_FILE, record, panels)
    write_record(folder, record)
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    return Pretrained(folder, saved, record)


def begin(arch: str, preprocess: PreprocessSpec, *, sigmoid: bool = False, seed: int = 0) -> Backbone:
    """`small` or `dense-...` with random weights, for pictures prepared so. sigmoid: of the dense layers, else ReLU.

    Raises BackboneError for another name.
    """
    dense = DENSE.fullmatch(arch)
    if not dense and arch != SMALL:
        raise BackboneError(f"A network for pictures of any size must be small or dense-WIDTH-WIDTH; found {arch!r}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if dense:
            widths = [int(width) for width in dense[1].split("-")[1:]]
            inputs = preprocess.channels * preprocess.size[0] * preprocess.size[1]
            made = dense_network(inputs, widths, "sigmoid" if sigmoid else "relu")
        else:
            made = strided_network(preprocess.channels)
    return described_backbone(made, preprocess, arch)


@dataclass(frozen=True)
class _Work:
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

    def by(self, batch: int) -> _Work:
        """The same with so many pictures a step."""
        return replace(self, learner=replace(self.learner, batch=batch))


def _views(names: Sequence[str] | None, method: str) -> frozenset[str]:
    unknown = sorted(set(names or ()) - set(VIEWS))
    if unknown:
        raise TrainingError(f"Pictures can be varied by {', '.join(VIEWS)} in pretraining; found {unknown[0]!r}.")
    if names is None:  # without labels colours must not give a picture away; with them they may say what it shows
        return frozenset(("crop", "flip", "erase") if method in LABELLED else VIEWS)
    return frozenset(names)


def _refuse_idle(method: str, arch: str | None, start: str | None, group: str | None, size: int | None) -> None:
    """Raise for an option that would change nothing."""
    if group is not None and method != "pairs":
        raise DataError(
            f"--group says what is the same thing, for pairs; the method {method} does not ask: leave it out."
        )
    if size is not None and (start or not (arch is None or arch == SMALL or DENSE.fullmatch(arch))):
        raise BackboneError(
            f"--size is for small and dense networks; {start or arch} has a size of its own: leave it out."
        )


def _dataset(data: Any, method: str, group: str | None) -> Dataset:
    if method not in LABELLED:
        return load_unlabelled(data)
    if isinstance(data, str | os.PathLike | Dataset | tuple):
        found = load_data(data, group=group, to_learn=group is None)
        return subset(found, "train", "validation")
    raise DataError(f"The method {method} must know what pictures show; give labels beside them.")


def _named(arch: str | None, seed: int) -> Backbone | None:
    """A network by name with random weights; None for those that suit pictures of any size."""
    if arch is None or arch == SMALL or DENSE.fullmatch(arch):
        return None
    return load_backbone(arch, pretrained=False, seed=seed)


def _cut_for(backbone: Backbone, method: str) -> Cut:
    """Up to where a method trains: the deepest shown cut, for methods that make pictures the deepest with places."""
    maps = [cut for cut in backbone.shown if cut.layout == "NCHW" and min(cut.shape[1:]) > 1]
    return maps[-1] if maps and method in SPATIAL else backbone.shown[-1]


def _planned(work: _Work, epochs: int | None, budget: Budget) -> dict[str, Any]:
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
        for batch in itertools.chain.from_iterable(_batches(work, i, MOST_EPOCHS, steps) for i in itertools.count()):
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


def _fitting(work: _Work) -> int:
    """The method's batch, halved until what a step keeps for its gradients fits into ROOM."""
    kept: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with _without_trace(work) as modules, torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        some = next(_batches(work.by(MEASURED), 0, 1, 1))
        value = work.learner.loss(some)
        weights = {parameter.untyped_storage().data_ptr() for parameter in modules.parameters()}
        each = sum(size for place, size in kept.items() if place not in weights) / len(some.labels)
        del value  # until here it kept them all in place
    batch = work.learner.batch
    while batch * each > ROOM and batch // 2 >= LEAST:
        batch //= 2
    return batch


@contextmanager
def _without_trace(work: _Work) -> Iterator[nn.ModuleDict]:
    """The modules as they train, to be tried: their values, gradients and the random numbers are as before after it."""
    modules = _placed(work)
    kept = copy.deepcopy(modules.state_dict())
    devices = [torch.cuda.current_device()] if work.device != "cpu" else []
    with torch.random.fork_rng(devices=devices):
        yield modules
    modules.load_state_dict(kept)
    modules.zero_grad(set_to_none=True)


def _placed(work: _Work) -> nn.ModuleDict:
    """All modules as they train: on their device, laid out for it."""
    modules: nn.ModuleDict = work.modules.to(work.device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    for norm in batch_norms(work.encoder.module) if work.begun_from else ():
        norm.eval()
    return modules


def _trained(
    work: _Work,
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
        for done, batch in enumerate(_batches(work, epoch, epochs, steps)):
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


def _batches(work: _Work, epoch: int, epochs: int, steps: int) -> Iterator[Batch]:
    values, labels = work.pictures.values, work.pictures.labels
    for some in islice(_rows(work, epoch), steps):
        at = torch.from_numpy(some)
        x = values[at].to(work.device, torch.float32).div_(255)
        yield Batch(x, torch.from_numpy(labels[some]).to(work.device), epoch / epochs)


def _rows(work: _Work, epoch: int) -> Iterator[np.ndarray]:
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


def _set_norms(work: _Work) -> None:
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


def _shown(work: _Work) -> list[Panel]:
    """What the method has to show, on the first pictures of a batch that no training has drawn."""
    modules = work.modules.eval()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(work.seed)
        panels = work.learner.show(next(_batches(work, MOST_EPOCHS, MOST_EPOCHS, 1)))
    modules.train()
    return panels


def _before_and_after(
    labelled: Dataset | None,
    backbone: Backbone,
    before: dict[str, torch.Tensor],
    saved: Backbone,
    seed: int,
    device: str,
    store: FeatureStore | None,
    say: Say,
) -> list[tuple[str, Curve]]:
    if labelled is None:
        return []
    backbone.module.load_state_dict(before)
    drawn = partial(curve, labelled, seed=seed, device=device, store=store, say=say)
    return [("before", drawn(backbone)), ("after", drawn(saved))]


def _majority(found: Curve) -> float:
    """What a constant answer would score."""
    return float(np.bincount(found.task.labels).max() / len(found.task.labels))
