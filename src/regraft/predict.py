"""Predictions for files and folders, and the judgement of a model on labelled pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from regraft.artifact import Prediction, TransferModel
from regraft.data import Dataset, LeftOut, printable
from regraft.errors import DataError, PictureError
from regraft.folders import pictures_below
from regraft.leaks import Mark
from regraft.scores import Interval, balanced_accuracy, bootstrap_interval, calibration_error, confusion
from regraft.splits import together

WORST = 24


@dataclass(frozen=True)
class Evaluation:
    """How a model did on labelled pictures.

    confusion: int64 (true, predicted); calibration_error: expected calibration error of the top probability.
    worst: the pictures whose true label got the least probability; left_out: those that could not be read.
    marks: of the pictures judged, to find them among others.
    """

    accuracy: Interval
    balanced_accuracy: float
    calibration_error: float
    confusion: np.ndarray
    labels: tuple[str, ...]
    worst: tuple[dict[str, Any], ...]
    left_out: tuple[LeftOut, ...]
    marks: tuple[Mark, ...] = field(repr=False)

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


def predict_paths(model: TransferModel, paths: Iterable[str | Path]) -> tuple[list[Prediction], list[LeftOut]]:
    """Predictions for picture files and for all pictures below folders, and what could not be read.

    Raises PictureError for a folder without pictures, and for an empty path.
    """
    files = [file for path in paths for file in _pictures_at(path)]
    predictions, left_out = [], []
    for file, answer in zip(files, model.answers(files), strict=True):
        if isinstance(answer, PictureError):
            left_out.append(LeftOut(str(file), str(answer)))
        else:
            predictions.append(model.ranked(str(file), answer))
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
            f"The data must have the model's classes; {printable(unknown[0])!r} in {printable(dataset.source)} is not "
            f"one of: {', '.join(map(printable, model.labels))}."
        )
    rows, labels, marks, left_out = [], [], [], []
    answers = model.answers(dataset.examples, marked=True)
    for done, (example, answer) in enumerate(zip(dataset.examples, answers, strict=True), 1):
        if isinstance(answer, PictureError):
            left_out.append(LeftOut(example.where, str(answer)))
        else:
            rows.append(answer.probabilities)
            labels.append(known[dataset.labels[example.label]])
            marks.append(Mark(example.where, answer.id, answer.pixels, example.group))
        progress(done, len(dataset.examples))
    if not rows:
        why = f": {left_out[0].reason}" if left_out else "."
        raise DataError(
            f"There must be a picture to judge by; {printable(dataset.source)} has none that can be read{why}"
        )
    probabilities, truth = np.stack(rows), np.array(labels)
    counts = confusion(probabilities.argmax(1), truth, len(model.labels))
    hits = (probabilities.argmax(1) == truth).astype(np.float64)
    return Evaluation(
        bootstrap_interval(hits, together([m.group for m in marks])),
        balanced_accuracy(counts),
        calibration_error(probabilities, truth),
        counts,
        model.labels,
        tuple(worst([m.where for m in marks], probabilities, truth, model.labels)),
        tuple(left_out),
        tuple(marks),
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


def _pictures_at(given: str | Path) -> list[Path]:
    if given == "":
        raise PictureError("What to predict must be pictures or folders; found an empty path: leave it out.")
    path = Path(given)
    if not path.is_dir():
        return [path]
    found, _ = pictures_below(path)
    if not found:
        raise PictureError(f"A folder to predict must hold pictures; {printable(str(path))} holds none.")
    return found
