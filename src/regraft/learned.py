"""What is learned from: readable pictures that stand under one label, their folds, and nothing that is tested on.

Knows features and labels, nothing of probes' results. Not covered: near duplicates.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from regraft.data import Dataset, LeftOut, pixel_digest, printable, read
from regraft.errors import DataError, PictureError
from regraft.features import FeatureTable
from regraft.leaks import Mark, find_leaks
from regraft.probe import Task
from regraft.splits import fold_assignments, together


def consistent(
    table: FeatureTable, labels: Sequence[str], allow_empty_class: bool
) -> tuple[np.ndarray, tuple[LeftOut, ...]]:
    """Indices of the examples to learn from, all but pictures whose pixels stand under two labels, and those left out.

    Raises DataError when a class keeps no picture of its own (unless `allow_empty_class`), or fewer than two classes
    keep any.
    """
    under: dict[str, dict[int, str]] = {}
    for example, pixels in zip(table.examples, table.pixels, strict=True):
        under.setdefault(pixels, {}).setdefault(example.label, example.where)
    chosen: list[int] = []
    conflicts: list[LeftOut] = []
    lost: dict[int, LeftOut] = {}
    for i, (example, pixels) in enumerate(zip(table.examples, table.pixels, strict=True)):
        others = [(label, where) for label, where in under[pixels].items() if label != example.label]
        if others:
            label, where = others[0]
            reason = (
                f"the same picture stands under two labels: {printable(labels[example.label])} here and "
                f"{printable(labels[label])} as {printable(where)}"
            )
            conflicts.append(LeftOut(example.where, reason))
            lost.setdefault(example.label, conflicts[-1])
        else:
            chosen.append(i)
    kept = {table.examples[i].label for i in chosen}
    for label, conflict in lost.items():
        if label not in kept and not allow_empty_class:
            raise DataError(
                f"Every class must keep a picture of its own; {printable(conflict.where)}: {conflict.reason}."
            )
    if len(kept) < 2:
        names = ", ".join(printable(labels[label]) for label in sorted(kept)) or "none"
        raise DataError(f"There must be at least 2 classes with pictures that can be used; found {names}.")
    return np.array(chosen, dtype=np.int64), tuple(conflicts)


def task_of(
    table: FeatureTable, chosen: np.ndarray, classes: int, seed: int, *, names: Sequence[str] | None = None
) -> Task:
    """Labels, folds and what must stay together: equal bytes, equal pixels, the user's groups."""
    labels = np.array([table.examples[i].label for i in chosen], dtype=np.int64)
    groups = together(
        [table.ids[i] for i in chosen],
        [table.pixels[i] for i in chosen],
        [table.examples[i].group for i in chosen],
    )
    return Task(labels, groups, fold_assignments(labels, groups, seed=seed, names=names), classes)


def marks_of(table: FeatureTable, chosen: np.ndarray) -> list[Mark]:
    """What tells the chosen pictures from others."""
    return [Mark(table.examples[i].where, table.ids[i], table.pixels[i], table.examples[i].group) for i in chosen]


def refuse_unsound(problems: Sequence[LeftOut], learned: Sequence[Mark], tested: Dataset | None) -> None:
    """Raise DataError for what --strict does not allow: pictures left out, or learned from and tested on."""
    marks = []
    for example in tested.examples if tested else ():
        try:
            raw = read(example)
            marks.append(Mark(example.where, raw.id, pixel_digest(raw.decode()), example.group))
        except PictureError as e:
            problems = [*problems, LeftOut(example.where, str(e))]
    if problems:
        raise DataError(f"--strict allows nothing to be left out; {printable(problems[0].where)}: {problems[0].reason}")
    leaks = find_leaks(learned, marks)
    if leaks:
        raise DataError(
            f"--strict allows no picture to be learned from and tested on; found {len(leaks)}, the first is "
            f"{printable(leaks[0].tested)}, with {leaks[0].equal} equal to {printable(leaks[0].learned)}."
        )
