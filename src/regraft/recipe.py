"""The whole job as one function each: `fit`, `curve`, `evaluate`; the column of the architecture from top to bottom."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from torch import nn

from regraft.__version__ import __version__
from regraft.allocator import memory_kept
from regraft.architecture import is_user_function
from regraft.artifact import TransferModel, assemble, load_model, load_with_network, save_model
from regraft.augment import Augment, augment_from
from regraft.backbone import CUSTOM, SCRATCH, Backbone, WeightOptions, is_backbone_folder, load_backbone
from regraft.budget import Budget, budget_from
from regraft.candidates import LITTLE
from regraft.data import Dataset, LeftOut, identity, load_data, printable, read, subset
from regraft.doctor import examine
from regraft.errors import DataError, RegraftError, RunError, TrainingError
from regraft.features import FeatureTable, extract
from regraft.files import digest_json
from regraft.finetune import Ground, fit_all, plot_of
from regraft.flips import flips_are_harmless
from regraft.frozen import agreement
from regraft.gate import Gate, Rival, rank, train_all_layers
from regraft.growth import Growth, grow_labels
from regraft.heads import INPUT, Head
from regraft.ladder import SLOWER, Climb, climb, maps_of, network_probe
from regraft.leaks import find_leaks
from regraft.learned import consistent, marks_of, refuse_unsound, task_of
from regraft.nn import Clipping, Health
from regraft.numerics import Numerics, pick_numerics
from regraft.predict import Evaluation, evaluate_model, worst
from regraft.probe import Bench, Task, Trial, all_grey, fit_head
from regraft.readers import is_file_spec
from regraft.record import read_record, refuse_inside, refuse_other_options, write_record
from regraft.report import REPORT_FILE, write_report
from regraft.scores import Interval, bootstrap_interval, calibration_error, confusion
from regraft.search import Choice, choose, curve_interval, run_trials
from regraft.store import FeatureStore, open_store
from regraft.training import Checkpoints, Diverged
from regraft.tuned import Tuned, scaled

AFTER = 4.0
"""Seconds to save the model and write the report."""
CHECKPOINTS = "checkpoints"
CLIPPING = Clipping("norm", 1.0)
AGREEMENT_NEEDED = 0.98
"""Below this cosine with float32 at some cut, bfloat16 is given up for that network."""

Say = Callable[[str, int, int], None]
"""Progress: what is being done, how much of it is done, how much there is."""
PLACES = ("data", "test")
"""Options that say where pictures lie."""
Data = str | os.PathLike[str] | Dataset | tuple[Any, Any]


@dataclass(frozen=True)
class Curve:
    """How the score depends on the number of reused layers, on the same folds at every cut."""

    backbone: Backbone
    trials: tuple[Trial, ...]
    choice: Choice
    task: Task
    table: FeatureTable
    bench: Bench
    numerics: Numerics
    agreement: float
    problems: tuple[LeftOut, ...]
    seconds: dict[str, float]
    growth: Growth | None = None

    def to_json(self) -> dict[str, Any]:
        """Points in order of depth, the recommended cut and why."""
        shown = {cut.name: cut for cut in self.backbone.cuts}
        singles = [t for t in self.trials if len(t.views) == 1]
        return {
            "backbone": self.backbone.source.to_json(),
            "cuts": [_point(t, self.task, shown) for t in singles],
            "several": [_point(t, self.task, shown) for t in self.trials if len(t.views) > 1],
            "recommended": self.choice.trial.name,
            "transfer_helps": self.choice.helps,
            "reason": self.choice.reason,
            "score": self.choice.score.score,
            "interval": [self.choice.score.low, self.choice.score.high],
            "gain": asdict(self.choice.gain),
            "log_loss_gain": asdict(self.choice.sharper),
            "forward_passes": self.table.forward_passes,
            "seconds": self.seconds,
            "restored": self.backbone.coverage and self.backbone.coverage.to_json(),
            "ends": self.backbone.ends,
            "labels": self.growth.to_json() if self.growth else None,
        }


@dataclass(frozen=True)
class Run:
    """One finished execution: its directory, the saved model as `predict` loads it, and its record."""

    folder: Path
    model: TransferModel
    record: dict[str, Any]


def silent(what: str, done: int, total: int) -> None:
    """Progress for nobody."""


def curve(
    data: Data,
    backbone: str | os.PathLike[str] | nn.Module | Backbone = "default",
    *,
    example: torch.Tensor | None = None,
    group: str | None = None,
    seed: int = 0,
    device: str = "auto",
    strict: bool = False,
    allow_empty_class: bool = False,
    labels: bool = False,
    store: FeatureStore | None = None,
    say: Say = silent,
    **weights: Unpack[WeightOptions],
) -> Curve:
    """How many layers of a backbone to reuse: cross-validated probes on every shown cut and on the raw input.

    data: see `load_data`; its test split is not touched. group: see `load_data`. weights: see `load_backbone`.
    labels: also score with fewer labels (`growth`), to see what more of them would bring.
    Raises RegraftError subclasses as `load_data`, `load_backbone` and `extract` do; with `strict`, DataError for any
    picture that would be left out.
    """
    started = time.perf_counter()
    dataset = load_data(data, group=group, allow_empty_class=allow_empty_class)
    say("loading the backbone", 0, 1)
    network = load_backbone(backbone, example=example, seed=seed, **weights)
    numerics, measured = faithful_numerics(network, device)
    seconds = {"prepare": time.perf_counter() - started}
    place = store or open_store()
    found = _curve(dataset, None, network, numerics, measured, place, seed, strict, allow_empty_class, say, seconds)
    if not labels:
        return found
    cuts = [(cut.name, cut.depth) for cut in network.shown]
    growth = grow_labels(found.bench, found.task, cuts, seed, lambda d, t: say("scoring with fewer labels", d, t))
    return replace(found, growth=growth)


def compare(
    data: Data,
    backbones: Sequence[str | os.PathLike[str] | nn.Module | Backbone],
    *,
    group: str | None = None,
    seed: int = 0,
    allow_empty_class: bool = False,
    say: Say = silent,
    weights: WeightOptions | None = None,
    **options: Any,
) -> tuple[list[Curve], Gate]:
    """The curves of several backbones, best first, and the ranking of them, the raw input and training from scratch.

    backbones: as for `curve`; beside what `pretrain` made, `scratch` is its network (of several, the best one's) with
    all layers trained from random weights on every fold's complement, and it is trained from its own weights as well.
    weights: how files of weights are loaded; options: as for `curve`.
    """
    dataset = load_data(data, group=group, allow_empty_class=allow_empty_class)
    named = [os.fspath(b) if isinstance(b, os.PathLike) else b for b in backbones]
    trained = SCRATCH in named and any(map(_pretrained_here, named))
    found = []
    for backbone in named:
        if trained and backbone == SCRATCH:
            continue
        of_file = isinstance(backbone, str) and (len(named) == 1 or is_file_spec(backbone))
        given = {**options, **(weights or {})} if of_file else options
        found.append(curve(dataset, backbone, seed=seed, allow_empty_class=allow_empty_class, say=say, **given))
    rivals = [rival_of(one) for one in found]
    first = found[0]
    rivals.append(Rival(INPUT, next(t for t in first.trials if t.name == INPUT).hits))
    left_out = ""
    if trained:
        own = max((one for one in found if one.backbone.trained), key=lambda one: float(one.choice.hits.mean()))
        ground = Ground(own.backbone, own.numerics, own.bench, own.task, {t.name: t for t in own.trials}, seed)
        try:
            with memory_kept():
                scratch, further = (train_all_layers(ground, say, scratch=anew).hits for anew in (True, False))
            frozen = rival_of(own)
            rivals += [
                Rival(SCRATCH, scratch),
                replace(frozen, name=f"{frozen.name}, all layers trained", hits=further),
            ]
        except TrainingError as e:
            left_out = str(e)
    gate = rank(rivals, first.task.groups, int(first.task.folds.max()) + 1, left_out)
    return sorted(found, key=lambda one: -one.choice.score.score), gate


def fit(
    data: Data,
    backbone: str | os.PathLike[str] | nn.Module | Backbone = "default",
    *,
    out: str | os.PathLike[str],
    test: Data | None = None,
    example: torch.Tensor | None = None,
    group: str | None = None,
    seed: int = 0,
    device: str = "auto",
    strict: bool = False,
    allow_empty_class: bool = False,
    budget: str = "10m",
    augment: Sequence[str] | None = None,
    balanced: bool = False,
    clipping: Clipping = CLIPPING,
    store: FeatureStore | None = None,
    say: Say = silent,
    **weights: Unpack[WeightOptions],
) -> Run:
    """The whole job: curve, search, final model, its evaluation, report; all in the directory `out`.

    budget: wall time of all of it (`90s`, `5m`, `2h`), or how many candidates are tried beyond the probes (`20trials`;
    `0trials` stops at the curve). augment: names of `regraft.augment`; None: crops, mixes of features, and mirrored
    pictures where the data shows that they keep their labels. balanced: every class has the same say in fine-tuning.
    clipping: of gradients. weights: see `load_backbone`.
    test: pictures that only the finished model sees, instead of the data's own test split. A finished run is returned
    as it is, with 0 `forward_passes`; an interrupted one goes on. RunError if `out` holds a run with other options or
    other data.
    """
    started, begun = time.perf_counter(), time.monotonic()
    backbone = os.fspath(backbone) if isinstance(backbone, os.PathLike) else backbone
    budget_from(budget)
    augment_from(augment or ())
    dataset = load_data(data, group=group, allow_empty_class=allow_empty_class)
    tested = _test_data(dataset, test, group)
    folder = Path(out)
    refuse_inside(folder, dataset.source)
    options = {
        "data": _place(dataset),
        "test": _place(tested) if tested else None,
        "backbone": backbone if isinstance(backbone, str) else _described(backbone),
        "group": group,
        "seed": seed,
        "strict": strict,
        "allow_empty_class": allow_empty_class,
        "budget": budget,
        "augment": None if augment is None else list(augment),
        "balanced": balanced,
        "clipping": [clipping.by, clipping.limit],
        **{name: value for name, value in weights.items() if value not in (None, {}, False, 1.0)},
    }
    record = _resume(folder, options, dataset, tested)
    if record is not None:
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
        saved = load_model(folder, backbone=_given(backbone), device=device)
        now = {"forward_passes": 0, "seconds": {"total": time.perf_counter() - started}}
        return Run(folder, saved, record | now)
    spent = budget_from(budget, spent=_spent(folder), started=begun)
    write_record(folder, {"status": "running", "options": options, "spent": spent.elapsed()})

    say("loading the backbone", 0, 1)
    network = load_backbone(backbone, example=example, seed=seed, **weights)
    numerics, measured = faithful_numerics(network, device)
    seconds = {"prepare": time.perf_counter() - started}
    place = store or open_store()
    found = _curve(dataset, tested, network, numerics, measured, place, seed, strict, allow_empty_class, say, seconds)

    at = time.perf_counter()
    trials = {trial.name: trial for trial in found.trials}
    ground = Ground(network, numerics, found.bench, found.task, trials, seed, balanced, clipping)
    head = fit_head(found.bench, found.task, found.choice.trial)
    probed = assemble(network, head, dataset.labels, numerics)
    seconds["head"] = time.perf_counter() - at
    at = time.perf_counter()

    def keep() -> None:
        write_record(folder, {"status": "running", "options": options, "spent": spent.elapsed()})

    keep()
    reserve = _seconds_after(probed, len(tested.examples) if tested else 0)
    drawn, asked = _augmentation(ground, augment, spent)
    with memory_kept():
        climbed = climb(
            ground, found.choice.trial, found.choice.score, spent, drawn, reserve=reserve, say=say, checkpoint=keep
        )
        seconds["search"] = time.perf_counter() - at
        at = time.perf_counter()
        model, climbed = _grown(ground, climbed, found.choice.score, probed, folder / CHECKPOINTS, say)
    facts = {"score": asdict(climbed.score), "agreement": measured, "examples": len(found.task.labels)}
    if model.tuned is not None:
        facts["classes_of"] = sorted({found.table.ids[i] for i in found.bench.chosen})
    save_model(model, network, folder, facts)
    seconds["final"] = time.perf_counter() - at
    at = time.perf_counter()
    # What is reported is what is saved: the file is read back and judged as `predict` runs it.
    saved = load_model(folder, backbone=_given(network), device=device)
    evaluation = evaluate_model(saved, tested, lambda d, t: say("testing the saved model", d, t)) if tested else None
    seconds["test"] = time.perf_counter() - at
    seconds["total"] = spent.elapsed()
    record = _record(options, dataset, tested, found, climbed, evaluation, seconds)
    record["forward_passes"] += asked
    write_report(folder / REPORT_FILE, record, _pictures_of(record, dataset, tested))
    write_record(folder, record)
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    return Run(folder, saved, record)


def evaluate(
    model: TransferModel | str | os.PathLike[str],
    data: Data,
    *,
    group: str | None = None,
    device: str = "auto",
    say: Say = silent,
) -> Evaluation:
    """Judge a saved model on labelled pictures: their test split if there is one, else all of them.

    Raises DataError naming a class that the model does not know; a class without pictures has support 0.
    """
    loaded = model if isinstance(model, TransferModel) else load_model(model, device=device)
    dataset = load_data(data, group=group, to_learn=False)
    tested = subset(dataset, "test")
    return evaluate_model(loaded, tested if tested.examples else dataset, lambda d, t: say("predicting", d, t))


def doctor(
    run: str | os.PathLike[str], data: Data | None = None, *, backbone: nn.Module | None = None, say: Say = silent
) -> Health:
    """The health of the layers that a finished run reuses, on its pictures or others; its report shows it from then on.

    data: instead of the run's own. Raises RunError where the run is unfinished or reuses no layers, DataError where
    there are no pictures.
    """
    folder = Path(run)
    record = read_record(folder)
    if record is None or record["status"] != "finished":
        raise RunError(f"{folder} must hold a finished run: run `regraft fit` to the end first.")
    model, network = load_with_network(folder, backbone=backbone, device="cpu")
    if network is None and model.tuned is None:
        raise RunError(f"The model in {folder} must reuse layers to be examined; it sees the raw input alone.")
    options = record["options"]
    dataset = load_data(options["data"] if data is None else data, to_learn=False)
    say("examining the layers", 0, 1)
    health = examine(model, network, dataset, seed=options["seed"])
    record["health"] = health.to_json()
    shown = _still_there(options["data"])  # the report shows pictures of the run, whatever was examined
    write_report(folder / REPORT_FILE, record, _pictures_of(record, shown or dataset, _still_there(options["test"])))
    write_record(folder, record)
    return health


def _still_there(source: str | None) -> Dataset | None:
    """The pictures that a run was given, None where there were none or they are gone."""
    try:
        return load_data(source, to_learn=False) if source else None
    except DataError:
        return None


def faithful_numerics(backbone: Backbone, device: str) -> tuple[Numerics, float]:
    """The machine's numerics for this network and their agreement (cosine) with float32; float32 where it is poor."""
    numerics = pick_numerics(device)
    if numerics.precision == "float32":
        return numerics, 1.0
    names = [cut.name for cut in backbone.shown]
    measured = agreement(backbone.trace, names, backbone.preprocess, numerics)
    if measured < AGREEMENT_NEEDED:
        return pick_numerics(device, "float32"), 1.0
    return numerics, measured


def _curve(
    dataset: Dataset,
    tested: Dataset | None,
    backbone: Backbone,
    numerics: Numerics,
    measured: float,
    store: FeatureStore,
    seed: int,
    strict: bool,
    allow_empty_class: bool,
    say: Say,
    seconds: dict[str, float],
) -> Curve:
    learning = subset(dataset, "train", "validation")
    names = [cut.name for cut in backbone.shown]
    at = time.perf_counter()
    if not learning.examples:
        raise DataError(f"There must be pictures to learn from; {printable(dataset.source)} has them only in test/.")
    table = extract(
        learning,
        backbone,
        names,
        store,
        numerics,
        lambda d, t: say("computing features", d, t),
        allow_empty_class=allow_empty_class,
    )
    seconds |= {"features": time.perf_counter() - at}
    chosen, conflicts = consistent(table, dataset.labels, allow_empty_class)
    problems = table.left_out + conflicts
    if strict:
        refuse_unsound(problems, marks_of(table, chosen), tested)
    at = time.perf_counter()
    known = sum(table.ids[i] in backbone.classes_of for i in chosen)
    if known:
        warnings.warn(
            f"{backbone.source.spec} learned the classes of {known} of these {len(chosen)} pictures when it was "
            "trained: scores on them flatter it.",
            stacklevel=3,
        )
    bench = Bench(table, chosen, all_grey(table, chosen))
    task = task_of(table, chosen, len(dataset.labels), seed, names=dataset.labels)
    steps = len(names) + 5
    done: list[Trial] = []

    def tell(trial: Trial) -> None:
        done.append(trial)
        say("probing the cuts", len(done), steps)

    trials = run_trials(bench, task, [(cut.name, cut.depth) for cut in backbone.shown], tell)
    choice = choose(trials, task)
    seconds |= {"probes": time.perf_counter() - at}
    return Curve(backbone, trials, choice, task, table, bench, numerics, measured, problems, seconds)


def _pretrained_here(backbone: str | nn.Module | Backbone) -> bool:
    if isinstance(backbone, Backbone):
        return backbone.trained is not None
    return isinstance(backbone, str) and is_backbone_folder(backbone)


def rival_of(found: Curve) -> Rival:
    """A backbone as the gate sees it, by the nested procedure on its curve."""
    known = sum(found.table.ids[i] in found.backbone.classes_of for i in found.bench.chosen)
    return Rival(found.backbone.source.spec, found.choice.hits, found.backbone.trained is not None, known)


def _spent(folder: Path) -> float:
    """Seconds that interrupted executions of the run took."""
    record = read_record(folder)
    return float(record.get("spent", 0.0)) if record else 0.0


def _seconds_after(model: TransferModel, tested: int) -> float:
    """Seconds to save, test and report, from one timed batch of the probe's model."""
    spec, small = model.preprocess, model.small
    batch = torch.zeros(model.numerics.batch, spec.channels, *spec.size, dtype=torch.uint8)
    reduced = torch.zeros(len(batch), small.channels, *small.size, dtype=torch.uint8) if small else None
    started = time.perf_counter()
    model.run(batch, reduced)
    return AFTER + 2 * tested * (time.perf_counter() - started) / len(batch)


def _augmentation(ground: Ground, names: Sequence[str] | None, budget: Budget) -> tuple[Augment, int]:
    """What may be done to pictures, and the pictures pushed through the network to find out."""
    if names is not None:
        return augment_from(names), 0
    if budget.trials == 0 or budget.left() <= 0 or len(ground.task.labels) < LITTLE:
        return Augment(), 0
    harmless, asked = flips_are_harmless(ground)
    return Augment(crop=True, flip=harmless, mix=True), asked


def _grown(
    ground: Ground, climbed: Climb, stated: Interval, probed: TransferModel, checkpoints: Path, say: Say
) -> tuple[TransferModel, Climb]:
    """The winner trained on all pictures, its logits and the probe's summed as they were judged; and the climb with it.

    Where it cannot be trained on all pictures, also not at a tenth of its rate, the probe is the answer.
    """
    winner = climbed.winner
    if winner is None:
        return probed, climbed
    if winner.candidate.epochs == 0:
        return _both_probes(ground, climbed, probed), climbed
    maps = climbed.maps or maps_of(ground, winner.candidate, say)
    before = 0 if climbed.maps is None else maps.forward_passes + sum(maps.again)
    say(f"training {winner.candidate.name} on all pictures", 0, 1)
    facts = {"candidate": winner.candidate.to_json(), "epochs": winner.epochs, "seed": ground.seed}
    facts |= {"examples": digest_json([ground.bench.table.ids[i] for i in ground.bench.chosen])}
    facts |= {"weights": ground.backbone.source.weights, "numerics": ground.numerics.to_json()}
    facts |= {"labels": digest_json(ground.task.labels.tolist())}
    module = None
    for slower in (winner.slower, winner.slower * SLOWER):
        keep = partial(Checkpoints, checkpoints / f"rate-{slower:g}", facts={**facts, "slower": slower})
        with contextlib.suppress(Diverged):
            module = fit_all(ground, winner.candidate, maps, winner.epochs, slower=slower, checkpoints=keep)
            break
    passes = climbed.forward_passes + maps.forward_passes + sum(maps.again) - before
    if module is None:
        reason = f"{winner.candidate.name} was better than the probe, but diverged on all pictures"
        return probed, replace(climbed, winner=None, score=stated, reason=reason, forward_passes=passes)
    scaled(module, winner.whole * winner.share * winner.own)
    rest = winner.whole * (1 - winner.share)
    tuned = Tuned(plot_of(ground, winner.candidate), module, winner.share)
    head = Head(probed.head.views, probed.head.weight * rest, probed.head.bias * rest)
    if winner.share == 1:
        head = Head((), torch.zeros(len(probed.labels), 0), torch.zeros(len(probed.labels)))
    model = assemble(ground.backbone, head, probed.labels, ground.numerics, tuned)
    return model, replace(climbed, forward_passes=passes)


def _both_probes(ground: Ground, climbed: Climb, probed: TransferModel) -> TransferModel:
    """One head that sums the network's best probe and that on the raw input as they were judged."""
    winner, own = climbed.winner, probed.head
    assert winner is not None
    network = fit_head(ground.bench, ground.task, network_probe(ground))
    ours, theirs = winner.whole * (1 - winner.share), winner.whole * winner.share * winner.own
    weight, bias = torch.cat([own.weight * ours, network.weight * theirs], 1), own.bias * ours + network.bias * theirs
    head = Head((*own.views, *network.views), weight, bias)
    if winner.share == 1:
        head = Head(network.views, network.weight * theirs, network.bias * theirs)
    return assemble(ground.backbone, head, probed.labels, ground.numerics)


def _test_data(dataset: Dataset, test: Data | None, group: str | None) -> Dataset | None:
    if test is None:
        own = subset(dataset, "test")
        return own if own.examples else None
    given = load_data(test, group=group, to_learn=False)
    unknown = sorted(set(given.labels) - set(dataset.labels))
    if unknown:
        raise DataError(
            f"The test data must have the classes of the training data; {printable(unknown[0])!r} in "
            f"{printable(given.source)} is not one of: {', '.join(map(printable, dataset.labels))}."
        )
    own = subset(given, "test")
    return own if own.examples else given


def _resume(folder: Path, options: dict[str, Any], dataset: Dataset, tested: Dataset | None) -> dict[str, Any] | None:
    """The record of a finished run with these options and data; None where there is something left to do."""
    record = read_record(folder)
    if record is None:
        return None
    # Of a finished run it is known which pictures it saw, wherever they lie; of an interrupted one, only the place.
    finished = record["status"] == "finished"
    refuse_other_options(folder, record, {k: v for k, v in options.items() if not (finished and k in PLACES)})
    if not finished:
        return None
    now = _identities(dataset, tested, {})
    other = [f"{kind} pictures" for kind, was in record["data"]["identity"].items() if now[kind] != was]
    if other:
        raise RunError(
            f"{folder} holds a run with other {' and '.join(other)} ({record['data']['pictures']} in all then, "
            f"{len(dataset.examples)} now): choose another --out; features that are stored are not computed again."
        )
    return record


def _identities(dataset: Dataset, tested: Dataset | None, known: Mapping[str, str]) -> dict[str, str | None]:
    """Digests of every picture's bytes, label, split and group, wherever the data lie; `known` are digests by place."""
    return {
        "training": identity(subset(dataset, "train", "validation"), known),
        "test": identity(tested, known) if tested else None,
    }


def _place(dataset: Dataset) -> str:
    return os.path.abspath(dataset.source) if os.path.exists(dataset.source) else dataset.source


def _given(backbone: str | nn.Module | Backbone) -> nn.Module | None:
    """The module that a saved model needs to be loaded: one that was given in Python, which nobody else can build."""
    if isinstance(backbone, Backbone):
        own = backbone.source.architecture == CUSTOM or is_user_function(backbone.source.architecture)
        return backbone.module if own and not backbone.operations else None
    return backbone if isinstance(backbone, nn.Module) else None


def _described(backbone: nn.Module | Backbone) -> str:
    if isinstance(backbone, Backbone):
        return f"{backbone.source.spec} {backbone.source.weights}"
    from regraft.backbone import weights_digest

    return f"{type(backbone).__name__} {weights_digest(backbone, repr(backbone))}"


def _point(trial: Trial, task: Task, cuts: dict[str, Any]) -> dict[str, Any]:
    interval = curve_interval(trial, task)
    return {
        "name": trial.name,
        "depth": trial.depth,
        "dim": sum(view.dim for view in trial.views),
        "score": interval.score,
        "low": interval.low,
        "high": interval.high,
        "log_loss": trial.log_loss,
        "strength": trial.strength,
        "whole_grid": [view.whole and view.parts > 1 for view in trial.views],
        "shape": list(cuts[trial.name].shape) if trial.name in cuts else None,
    }


def _record(
    options: dict[str, Any],
    dataset: Dataset,
    tested: Dataset | None,
    found: Curve,
    climbed: Climb,
    evaluation: Evaluation | None,
    seconds: dict[str, float],
) -> dict[str, Any]:
    marks = evaluation.marks if evaluation else ()
    leaks = find_leaks(marks_of(found.table, found.bench.chosen), marks)
    known = {e.where: id for e, id in zip(found.table.examples, found.table.ids, strict=True)}
    task = found.task
    return {
        "status": "finished",
        "regraft": __version__,
        "options": options,
        "data": {
            "labels": list(dataset.labels),
            "pictures": len(dataset.examples),
            "used": len(task.labels),
            "per_class": np.bincount(task.labels, minlength=task.classes).tolist(),
            "grey": found.bench.grey,
            "identity": _identities(dataset, tested, known),
            "left_out": [asdict(item) for item in found.problems],
            "leaks": [leak.to_json() for leak in leaks],
            "notes": [asdict(item) for item in found.table.notes],
            "ignored": [asdict(item) for item in dataset.ignored],
            "folds": {"repeats": len(task.folds), "folds": int(task.folds.max()) + 1},
        },
        "numerics": {**found.numerics.to_json(), "agreement": found.agreement},
        "curve": found.to_json(),
        "ladder": _ladder(found, climbed),
        "chosen": _chosen(found, climbed, dataset.labels),
        "test": evaluation.to_json() if evaluation else None,
        "forward_passes": found.table.forward_passes + climbed.forward_passes,
        "seconds": seconds,
        "machine": {"python": platform.python_version(), "torch": torch.__version__, "cores": os.cpu_count()},
    }


def _ladder(found: Curve, climbed: Climb) -> dict[str, Any]:
    """What was tried beyond the probe, in order of complexity, and what came of it."""
    probe = found.choice.trial
    return {
        "probe": {
            "name": probe.name,
            "score": float(probe.fold_hits[0].mean()),
            "log_loss": float(probe.losses[0].mean()),
        },
        "attempts": [attempt.to_json() for attempt in climbed.attempts],
        "winner": climbed.winner.candidate.name if climbed.winner else None,
        "reason": climbed.reason,
    }


def _chosen(found: Curve, climbed: Climb, labels: Sequence[str]) -> dict[str, Any]:
    """The answer of the whole search: what it is, its score, and what it got wrong out of fold."""
    trial, task, winner = found.choice.trial, found.task, climbed.winner
    seen = np.ones(len(task.labels), bool)
    logits, own = trial.scores.mean(0) * trial.sharpness, curve_interval(trial, task)
    if winner is not None:
        seen, logits = winner.seen, torch.from_numpy(winner.logits)
        own = bootstrap_interval(winner.hits[seen], task.groups[seen])
    probabilities = torch.softmax(logits, 1).numpy()[seen]
    truth = task.labels[seen]
    where = [found.table.examples[i].where for i in found.bench.chosen[seen]]
    return {
        "name": winner.candidate.name if winner else trial.name,
        "cuts": [view.cut for view in trial.views],
        "strength": trial.strength,
        "score": asdict(climbed.score),
        "own_score": asdict(own),
        "calibration_error": calibration_error(probabilities, truth),
        "confusion": confusion(probabilities.argmax(1), truth, task.classes).tolist(),
        "worst": worst(where, probabilities, truth, labels),
    }


def _pictures_of(
    record: dict[str, Any], dataset: Dataset, tested: Dataset | None
) -> Callable[[str], np.ndarray | None]:
    """Pixels of a picture that the record names, for the report."""
    known = {e.where: e for e in dataset.examples} | ({e.where: e for e in tested.examples} if tested else {})

    def pixels(where: str) -> np.ndarray | None:
        try:
            return read(known[where]).decode().pixels
        except (KeyError, RegraftError):
            return None

    return pixels
