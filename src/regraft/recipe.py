"""The whole job as one function each: `fit`, `curve`, `evaluate`; the column of the architecture from top to bottom."""

from __future__ import annotations

import os
import shutil
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import nn

from regraft.allocator import memory_kept
from regraft.architecture import is_user_function
from regraft.artifact import TransferModel, assemble, load_model, load_with_network, save_model
from regraft.augment import Augment, augment_from
from regraft.backbone import CUSTOM, SCRATCH, Backbone, WeightOptions, is_backbone_folder, load_backbone
from regraft.budget import Budget, budget_from
from regraft.candidates import LITTLE
from regraft.data import Dataset, load_data, printable, subset
from regraft.depth_curve import Curve, as_rival, curve_of, warn_of_known
from regraft.doctor import examine
from regraft.errors import ArtifactError, BackboneError, DataError, RunError, TrainingError, first_line
from regraft.final_fit import grown, seconds_after
from regraft.finetune import Ground
from regraft.flips import flips_are_harmless
from regraft.framing import Framed, frame
from regraft.gate import Gate, Rival, rank, train_all_layers
from regraft.growth import grow_labels
from regraft.heads import INPUT
from regraft.ladder import Say, climb
from regraft.nn import Clipping, Health
from regraft.numerics import pick_numerics
from regraft.predict import Evaluation, evaluate_model
from regraft.probe import fit_head
from regraft.readers import is_file_spec
from regraft.record import RECORD_FILE, read_record, refuse_inside, spending, write_record
from regraft.report import REPORT_FILE, write_report
from regraft.run_record import finished_record, identities, pictures_of, record_of, refuse_other_weights
from regraft.splits import check_seed
from regraft.store import FeatureStore, open_store

CHECKPOINTS = "checkpoints"
CLIPPING = Clipping("norm", 1.0)
UNASKED = {"adapt": False, "min_coverage": 1.0}
"""Options about weights that are not None where nothing is asked."""

Data = str | os.PathLike[str] | Dataset | tuple[Any, Any]


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
    seed = check_seed(seed)
    dataset = load_data(data, group=group, allow_empty_class=allow_empty_class)
    say("loading the backbone", 0, 1)
    network = load_backbone(backbone, example=example, seed=seed, **weights)
    found = curve_of(
        dataset,
        network,
        store or open_store(),
        tested=None,
        device=device,
        seed=seed,
        strict=strict,
        allow_empty_class=allow_empty_class,
        say=say,
        started=started,
    )
    warn_of_known(found, 2)
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
    rivals = [as_rival(one) for one in found]
    first = found[0]
    rivals.append(Rival(INPUT, next(t for t in first.trials if t.name == INPUT).hits))
    left_out = ""
    if trained:
        own = max((one for one in found if one.backbone.trained), key=lambda one: float(one.choice.hits.mean()))
        ground = Ground(own.backbone, own.numerics, own.bench, own.task, {t.name: t for t in own.trials}, seed)
        try:
            with memory_kept():
                scratch, further = (train_all_layers(ground, say, scratch=anew).hits for anew in (True, False))
            frozen = as_rival(own)
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
    framing: bool = True,
    augment: Sequence[str] | None = None,
    balanced: bool = False,
    clipping: Clipping = CLIPPING,
    store: FeatureStore | None = None,
    say: Say = silent,
    **weights: Unpack[WeightOptions],
) -> Run:
    """The whole job: curve, search, final model, its evaluation, report; all in the directory `out`.

    budget: wall time of all of it (`90s`, `5m`, `2h`), or how many candidates are tried beyond the probes (`20trials`;
    `0trials` stops at the curve). framing: also try pictures whole and larger than the network states (see `framing`).
    augment: names of `regraft.augment`; None: crops, mixes of features, and mirrored pictures where the data shows that
    they keep their labels. balanced: every class has the same say in fine-tuning.
    clipping: of gradients. weights: see `load_backbone`.
    test: pictures that only the finished model sees, instead of the data's own test split. A finished run is returned
    as it is, with 0 `forward_passes`; an interrupted one goes on, and so does one whose saved model is lost. RunError
    if `out` holds a run with other options or other data.
    """
    started, begun = time.perf_counter(), time.monotonic()
    backbone = os.fspath(backbone) if isinstance(backbone, os.PathLike) else backbone
    budget_from(budget)
    augment_from(augment or ())
    seed = check_seed(seed)
    dataset = load_data(data, group=group, allow_empty_class=allow_empty_class)
    tested = _test_data(dataset, test, group)
    folder = Path(out)
    for place in (dataset, tested):
        if place is not None:
            refuse_inside(folder, place.source)
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
        **({} if framing else {"framing": False}),
        **{name: value for name, value in weights.items() if value != UNASKED.get(name) and value != {}},
    }
    record = finished_record(folder, options, dataset, tested)
    if record is not None:
        refuse_other_weights(folder, record, _weights_now(backbone, seed, weights))
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
        try:
            saved = load_model(folder, backbone=_given(backbone), device=device)
        except ArtifactError:
            warnings.warn(f"The saved model in {folder} cannot be read and is made again.", stacklevel=2)
        else:
            if not (folder / REPORT_FILE).exists():
                _report_again(folder, record, dataset, tested)
            now = {"forward_passes": 0, "seconds": {"total": time.perf_counter() - started}}
            return Run(folder, saved, record | now)
    spent = budget_from(budget, spent=_spent(folder), started=begun)
    with spending(folder, options, spent):
        say("loading the backbone", 0, 1)
        network = load_backbone(backbone, example=example, seed=seed, **weights)
        look = partial(
            curve_of,
            store=store or open_store(),
            tested=tested,
            device=device,
            seed=seed,
            strict=strict,
            allow_empty_class=allow_empty_class,
            say=say,
        )
        at, count = time.perf_counter(), len(tested.examples) if tested else 0
        notes = folder / CHECKPOINTS / "framing.json"
        framed = Framed(network)
        if framing:
            numerics = pick_numerics(device)
            framed = frame(dataset, network, look, spent, numerics, seed=seed, tested=count, notes=notes)
        network = framed.backbone
        found = framed.curve or look(dataset, network)
        warn_of_known(found, 2)
        seconds = dict(found.seconds)
        seconds["framing"] = time.perf_counter() - at - sum(seconds.values())
        seconds["prepare"] += at - started

        at = time.perf_counter()
        trials = {trial.name: trial for trial in found.trials}
        ground = Ground(network, found.numerics, found.bench, found.task, trials, seed, balanced, clipping)
        head = fit_head(found.bench, found.task, found.choice.trial)
        probed = assemble(network, head, dataset.labels, found.numerics)
        at = _lap(seconds, "head", at)

        stated = found.choice.score
        reserve = seconds_after(probed, tested) if spent.seconds else 0.0
        drawn, asked = _augmentation(ground, augment, spent)
        with memory_kept():
            climbed = climb(ground, found.choice.trial, stated, spent, drawn, reserve=reserve, tested=count, say=say)
            at = _lap(seconds, "search", at)
            model, climbed = grown(ground, climbed, stated, probed, folder / CHECKPOINTS, say)
        facts = {"score": asdict(climbed.score), "agreement": found.agreement, "examples": len(found.task.labels)}
        if model.tuned is not None:
            facts["classes_of"] = sorted({found.table.ids[i] for i in found.bench.chosen})
        save_model(model, network, folder, facts)
        at = _lap(seconds, "final", at)
        # What is reported is what is saved: the file is read back and judged as `predict` runs it.
        saved = load_model(folder, backbone=_given(network), device=device)
        tell = partial(say, "testing the saved model")
        evaluation = evaluate_model(saved, tested, tell) if tested else None
        _lap(seconds, "test", at)
        seconds["total"] = spent.elapsed()
        record = record_of(options, dataset, tested, found, climbed, evaluation, seconds)
        record["forward_passes"] += asked + framed.forward_passes
        record["framing"] = framed.to_json()
        write_report(folder / REPORT_FILE, record, pictures_of(record, dataset, tested))
    record = write_record(folder, record)
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
    folder, advice = Path(run), "give a folder that `regraft fit` made"
    record = read_record(folder, advice) if os.path.exists(folder / RECORD_FILE) else None
    if record is None or record["status"] != "finished":
        raise RunError(f"{folder} must hold a finished run: {advice}, or run that to the end first.")
    model, network = load_with_network(folder, backbone=backbone, device="cpu")
    if network is None and model.tuned is None:
        raise RunError(f"The model in {folder} must reuse layers to be examined; it sees the raw input alone.")
    options = record["options"]
    dataset = load_data(options["data"] if data is None else data, to_learn=False)
    say("examining the layers", 0, 1)
    health = examine(model, network, dataset, seed=options["seed"])
    record["health"] = health.to_json()
    shown = _shown_by(record, dataset)
    if shown is None:
        warnings.warn(
            f"The report in {folder} stays as it is: pictures of the run are no longer where they were.", stacklevel=2
        )
    else:
        _report_again(folder, record, *shown)
    return health


def _shown_by(record: dict[str, Any], examined: Dataset) -> tuple[Dataset, Dataset | None] | None:
    """The data of a run, whose pictures its report shows, and the test data; None where they are gone.

    examined: other data, or the run's own at another place.
    """
    options = record["options"]
    own, tested = _still_there(options["data"]), _still_there(options["test"])
    if own and (tested or not options["test"]):
        return own, tested
    judged = _test_data(examined, None, None)
    return (examined, judged) if identities(examined, judged, {}) == record["data"]["identity"] else None


def _report_again(folder: Path, record: dict[str, Any], dataset: Dataset, tested: Dataset | None) -> None:
    """Write the report and the record of a finished run again, or warn that they stay as they are."""
    try:
        write_report(folder / REPORT_FILE, record, pictures_of(record, dataset, tested))
        write_record(folder, record)
    except (OSError, RunError) as e:
        warnings.warn(f"The report in {folder} cannot be written again: {first_line(e)}.", stacklevel=3)


def _still_there(source: str | None) -> Dataset | None:
    """The pictures that a run was given, None where there were none or they are gone."""
    try:
        return load_data(source, to_learn=False) if source else None
    except DataError:
        return None


def _pretrained_here(backbone: str | nn.Module | Backbone) -> bool:
    if isinstance(backbone, Backbone):
        return backbone.trained is not None
    return isinstance(backbone, str) and is_backbone_folder(backbone)


def _weights_now(backbone: str | nn.Module | Backbone, seed: int, weights: WeightOptions) -> str | None:
    """Digest of a network that lies in files, as they are now; None where it does not, or no more."""
    if not isinstance(backbone, str) or not os.path.exists(backbone):
        return None
    return load_backbone(backbone, seed=seed, **weights).source.weights


def _lap(seconds: dict[str, float], stage: str, since: float) -> float:
    """Note what a stage took since then, and return the time now."""
    now = time.perf_counter()
    seconds[stage] = now - since
    return now


def _spent(folder: Path) -> float:
    """Seconds that interrupted executions of the run took."""
    record = read_record(folder)
    return float(record.get("spent", 0.0)) if record else 0.0


def _augmentation(ground: Ground, names: Sequence[str] | None, budget: Budget) -> tuple[Augment, int]:
    """What may be done to pictures, and the pictures pushed through the network to find out."""
    if names is not None:
        return augment_from(names), 0
    tried_before = budget.spent > 0  # by this run, with the pictures that it drew then: they are still the answer
    if budget.trials == 0 or (budget.left() <= 0 and not tried_before) or len(ground.task.labels) < LITTLE:
        return Augment(), 0
    harmless, asked = flips_are_harmless(ground)
    return Augment(crop=True, flip=harmless, mix=True), asked


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
    if not isinstance(backbone, nn.Module):
        raise BackboneError(
            f"A backbone must be a name, a path, a module or what load_backbone returned; found {backbone!r}."
        )
    from regraft.backbone import weights_digest

    return f"{type(backbone).__name__} {weights_digest(backbone, repr(backbone))}"
