"""What the record of a run says: what was asked, seen, tried and chosen, as JSON values; and whether it is this run."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from regraft.__version__ import __version__
from regraft.data import Dataset, identity, read, subset
from regraft.depth_curve import Curve
from regraft.errors import RegraftError, RunError
from regraft.ladder import Climb
from regraft.leaks import find_leaks
from regraft.learned import marks_of
from regraft.predict import Evaluation, worst
from regraft.record import read_record, refuse_other_options
from regraft.scores import bootstrap_interval, calibration_error, confusion
from regraft.search import curve_interval

PLACES = ("data", "test")
"""Options that say where pictures lie."""


def record_of(
    options: dict[str, Any],
    dataset: Dataset,
    tested: Dataset | None,
    found: Curve,
    climbed: Climb,
    evaluation: Evaluation | None,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """All of a finished run. evaluation: of the saved model on test pictures, where there are any."""
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
            "identity": identities(dataset, tested, known),
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


def pictures_of(record: dict[str, Any], dataset: Dataset, tested: Dataset | None) -> Callable[[str], np.ndarray | None]:
    """Pixels of a picture that the record names, for the report."""
    known = {e.where: e for e in dataset.examples} | ({e.where: e for e in tested.examples} if tested else {})

    def pixels(where: str) -> np.ndarray | None:
        try:
            return read(known[where]).decode().pixels
        except (KeyError, RegraftError):
            return None

    return pixels


def finished_record(
    folder: Path, options: dict[str, Any], dataset: Dataset, tested: Dataset | None
) -> dict[str, Any] | None:
    """The record of a finished run with these options and data; None where there is something left to do."""
    record = read_record(folder)
    if record is None:
        return None
    # Of a finished run it is known which pictures it saw, wherever they lie; of an interrupted one, only the place.
    finished = record["status"] == "finished"
    refuse_other_options(folder, record, options, PLACES if finished else ())
    if not finished:
        return None
    now = identities(dataset, tested, {})
    other = [f"{kind} pictures" for kind, was in record["data"]["identity"].items() if now[kind] != was]
    if other:
        raise RunError(
            f"{folder} holds a run with other {' and '.join(other)} ({record['data']['pictures']} in all then, "
            f"{len(dataset.examples)} now): choose another --out; features that are stored are not computed again."
        )
    return record


def refuse_other_weights(folder: Path, record: dict[str, Any], now: str | None) -> None:
    """Raise RunError where the files of the network have changed since. now: their digest, None where unknown."""
    before = record["curve"]["backbone"]["weights"]
    if now is not None and now != before:
        raise RunError(
            f"{folder} holds a run on other weights (their digest was {before[:12]} and is {now[:12]}): choose another "
            "--out."
        )


def identities(dataset: Dataset, tested: Dataset | None, known: Mapping[str, str]) -> dict[str, str | None]:
    """Digests of every picture's bytes, label, split and group, wherever the data lie.

    known: digests by place, of training pictures; a test picture may have the place of another one in other data.
    """
    return {
        "training": identity(subset(dataset, "train", "validation"), known),
        "test": identity(tested, {}) if tested else None,
    }
