"""Predictions for files and folders, and the judgement of a model on labelled pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from regraft.artifact import Prediction, TransferModel
from regraft.data import Dataset, LeftOut, printable
from regraft.errors import DataError, PictureError
from regraft.pictures import SUFFIXES
from regraft.scores import Interval, balanced_accuracy, bootstrap_interval, calibration_error, confusion
from regraft.splits import together

WORST = 24
CHUNK = 64


@dataclass(frozen=True)
class Evaluation:
    """How a model did on labelled pictures.

    confusion: int64 (true, predicted); calibration_error: expected calibration error of the top probability.
    worst: the pictures whose true label got the least probability; left_out: those that could not be read.
    """

    accuracy: Interval
    balanced_accuracy: float
    calibration_error: float
    confusion: np.ndarray
    labels: tuple[str, ...]
    worst: tuple[dict[str, Any], ...]
    left_out: tuple[LeftOut, ...]

    def to_json(self) -> dict[str, Any]:
        """The judgement as JSON values."""
        return {
            "accuracy": self.accuracy.score,
            "interval": [self.accuracy.low, self.accuracy.high],
            "balanced_accuracy": self.balanced_accuracy,
            "calibration_error": self.calibration_error,
            "pictures": int(self.confusion.sum()),
            "labels": list(self.labels),
            "per_class": per_class(self.confusion, self.labels),
            "confusion": self.confusion.tolist(),
            "worst": list(self.worst),
            "left_out": [{"where": item.where, "reason": item.reason} for item in self.left_out],
        }


def predict_paths(
    model: TransferModel, paths: Iterable[str | Path]
) -> tuple[list[Prediction], list[LeftOut]]:
    """Predictions for picture files and for all pictures below folders, and what could not be read.

    Raises PictureError for a path where nothing is.
    """
    files = [file for path in paths for file in _pictures_at(Path(path))]
    predictions, left_out = [], []
    for file, row in zip(files, model.probabilities(files), strict=True):
        if isinstance(row, PictureError):
            left_out.append(LeftOut(str(file), str(row)))
        else:
            order = np.argsort(-row, kind="stable")
            predictions.append(Prediction(str(file), tuple((model.labels[i], float(row[i])) for i in order)))
    return predictions, left_out


def evaluate_model(
    model: TransferModel, dataset: Dataset, progress: Callable[[int, int], None] = lambda done, total: None
) -> Evaluation:
    """Run the model on every example; labels are matched by name.

    Raises DataError naming a class that the model does not know, or when no picture can be read.
    """
    known = {name: i for i, name in enumerate(model.labels)}
    unknown = sorted({dataset.labels[e.label] for e in dataset.examples} - known.keys())
    if unknown:
        raise DataError(
            f"The data must have the model's classes; {printable(unknown[0])!r} in {printable(dataset.source)} is not one "
            f"of: {', '.join(map(printable, model.labels))}."
        )
    items = [e.path if e.path is not None else e.array for e in dataset.examples]
    rows, labels, where, groups, left_out = [], [], [], [], []
    for done, (example, row) in enumerate(zip(dataset.examples, model.probabilities(items), strict=True), 1):
        if isinstance(row, PictureError):
            left_out.append(LeftOut(example.where, str(row)))
        else:
            rows.append(row)
            labels.append(known[dataset.labels[example.label]])
            where.append(example.where)
            groups.append(example.group)
        progress(done, len(items))
    if not rows:
        raise DataError(f"There must be a picture to judge by; none in {printable(dataset.source)} can be read.")
    probabilities, truth = np.stack(rows), np.array(labels)
    counts = confusion(probabilities.argmax(1), truth, len(model.labels))
    hits = (probabilities.argmax(1) == truth).astype(np.float64)
    return Evaluation(
        bootstrap_interval(hits, together(groups)),
        balanced_accuracy(counts),
        calibration_error(probabilities, truth),
        counts,
        model.labels,
        tuple(worst(where, probabilities, truth, model.labels)),
        tuple(left_out),
    )


def per_class(counts: np.ndarray, labels: Sequence[str]) -> list[dict[str, Any]]:
    """Recall, precision and support of each class from a confusion table; None where they are not defined."""
    support, said, right = counts.sum(1), counts.sum(0), np.diag(counts)
    return [
        {
            "label": label,
            "support": int(support[i]),
            "recall": float(right[i] / support[i]) if support[i] else None,
            "precision": float(right[i] / said[i]) if said[i] else None,
        }
        for i, label in enumerate(labels)
    ]


def worst(
    where: Sequence[str], probabilities: np.ndarray, truth: np.ndarray, labels: Sequence[str]
) -> list[dict[str, Any]]:
    """The misjudged pictures whose true label got the least probability, most wrong first."""
    given = probabilities[np.arange(len(truth)), truth]
    said = probabilities.argmax(1)
    wrong = [int(i) for i in np.argsort(given, kind="stable") if said[i] != truth[i]][:WORST]
    return [
        {
            "where": where[i],
            "label": labels[truth[i]],
            "predicted": labels[said[i]],
            "probability": float(probabilities[i, said[i]]),
            "probability_of_label": float(given[i]),
        }
        for i in wrong
    ]


def _pictures_at(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    if not path.exists():
        raise PictureError(f"A path to predict must exist; nothing is at {printable(str(path))}.")
    return [path]
