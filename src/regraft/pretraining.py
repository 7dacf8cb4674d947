"""Pretrain a network when no similar one exists, as one function: pictures in, a folder with a backbone out.

The one training loop runs every method (`methods`); its epochs are fixed before it begins, by the budget and a few
timed steps, and written down, so that a run that is continued goes on bit for bit. What comes out is a backbone like
any other: `curve`, `fit` and `inspect` take the folder.
"""

from __future__ import annotations

import copy
import os
import platform
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from regraft.__version__ import __version__
from regraft.allocator import memory_kept
from regraft.backbone import Backbone, described_backbone, load_backbone, savable, save_backbone
from regraft.budget import budget_from
from regraft.cut import split
from regraft.data import Dataset, identity, load_data, load_unlabelled, subset
from regraft.depth_curve import Curve
from regraft.errors import BackboneError, DataError, RunError, TrainingError
from regraft.graph import Cut
from regraft.methods import LABELLED, METHODS, SPATIAL, VIEWS, Encoder, Task
from regraft.networks.small import dense_network, strided_network
from regraft.numerics import pick_numerics
from regraft.prepared import prepare
from regraft.preprocess import PreprocessSpec
from regraft.pretrain_report import write_pretrain_report
from regraft.pretrain_steps import Say, Work, fitting, planned, set_norms, shown, trained
from regraft.recipe import CHECKPOINTS, Data, curve
from regraft.record import read_record, refuse_inside, refuse_other_options, write_record
from regraft.report import REPORT_FILE
from regraft.splits import check_seed
from regraft.store import FeatureStore

SMALL = "small"
DENSE = re.compile(r"dense((?:-[1-9]\d{0,4})+)")
FROM_RATE = 0.1
"""Share of a method's learning rate for a network that is not at random: at more it forgets what it knows."""


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
    seed = check_seed(seed)
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
    cut = cut_for(backbone, method)
    encoder = Encoder(split(backbone.trace, cut.name)[0].requires_grad_(True), cut, pictures.preprocess)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        learner = METHODS[method](encoder, Task(int(pictures.labels.max()) + 1, views))
    if start:
        learner = replace(learner, plan=replace(learner.plan, lr=learner.plan.lr * FROM_RATE))
    work = Work(method, learner, encoder, pictures, seed, device, begun_from=start is not None)
    work = work.by(batch or fitting(work))
    # What an interrupted run had prepared is not counted twice: it must not end earlier for having been stopped.
    before_that = float(record["spent"]) if record and known else 0.0
    spent = budget_from(budget, spent=before_that, started=None if known else begun)
    seconds["prepare"] = time.monotonic() - begun
    at = time.perf_counter()
    with memory_kept():
        if known is None:
            known = planned(work, epochs, spent)

        def keep(rate: float) -> None:
            known["rate"] = rate
            write_record(folder, status | {"plan": known, "spent": spent.elapsed()})

        def late(epoch: int) -> bool:
            last = max(int(part.opens * known["epochs"]) for part in learner.parts)
            return epochs is None and spent.left() < 0 and epoch >= last

        keep(known.get("rate", 1.0))
        facts = {**options, "steps": known["steps"], "all": known["epochs"], "pictures": pictures_are}
        facts |= {"batch": work.learner.batch, "weights": backbone.source.weights}
        losses, seen = trained(work, known, facts, folder / CHECKPOINTS, keep, late, say)
        seconds["training"] = time.perf_counter() - at
        at = time.perf_counter()
        if not work.begun_from:
            set_norms(work)
        panels = shown(work)
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
    record = write_record(folder, record)
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


def cut_for(backbone: Backbone, method: str) -> Cut:
    """Up to where a method trains: the deepest shown cut, for methods that make pictures the deepest with places."""
    maps = [cut for cut in backbone.shown if cut.layout == "NCHW" and min(cut.shape[1:]) > 1]
    return maps[-1] if maps and method in SPATIAL else backbone.shown[-1]


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
