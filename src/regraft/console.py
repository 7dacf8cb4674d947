"""Records as text: what commands print on standard output, and what they warn of on standard error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from regraft.printable import printable
from regraft.terminal import to_stderr

LISTED = 20
"""Of files that were left out, so many are named on the terminal; the record names all."""


def tell_left_out(items: Sequence[dict[str, str]]) -> None:
    """Name what was left out, and why."""
    if items:
        to_stderr(f"{len(items)} {'picture was' if len(items) == 1 else 'pictures were'} left out:")
    for item in items[:LISTED]:
        named = item["where"] in item["reason"]
        to_stderr(f"- {item['reason']}" if named else f"- {item['where']}: {item['reason']}")


def tell_passed_over(items: Sequence[dict[str, str]], verbose: bool) -> None:
    """Name files that are no pictures, where asked."""
    for item in items if verbose else ():
        to_stderr(f"passed over {item['where']}: {item['reason']}")


def tell_folds(folds: int) -> None:
    """Warn where a class has too few pictures for all folds."""
    from regraft.splits import FOLDS

    if folds < FOLDS:
        to_stderr(
            f"warning: judged with {folds} folds instead of {FOLDS}, for the smallest class has {folds} pictures (or "
            "groups): expect wide intervals"
        )


def tell_leaks(leaks: Sequence[dict[str, str]]) -> None:
    """Warn where test pictures were also learned from."""
    if leaks:
        first = leaks[0]
        to_stderr(
            f"warning: test pictures that were also learned from: {len(leaks)}; the test score flatters the model; the "
            f"first is {first['tested']}, with {first['equal']} equal to {first['learned']}"
        )


def print_curve(document: dict[str, Any]) -> None:
    """The score at every cut as bars, the choice, why, and what to expect."""
    width = max(len(p["name"]) for p in document["cuts"]) + 2
    for point in document["cuts"]:
        bar = "#" * round(40 * point["score"])
        mark = " <" if point["name"] == document["recommended"] else ""
        interval = f"{point['low']:.3f}-{point['high']:.3f}"
        click.echo(f"{point['depth']:3} {point['name']:<{width}} {point['score']:.3f}  {interval}  {bar}{mark}")
    for point in document["several"]:
        mark = " <" if point["name"] == document["recommended"] else ""
        click.echo(f"    {point['name']}  {point['score']:.3f}  {point['low']:.3f}-{point['high']:.3f}{mark}")
    if document["ends"]:
        click.echo(document["ends"])
    if document["labels"]:
        _print_growth(document["labels"])
    click.echo(f"reuse up to {document['recommended']}: {document['reason']}")
    _print_expected(document["score"], *document["interval"])


def _print_expected(score: float, low: float, high: float) -> None:
    click.echo(f"expected accuracy on new pictures: {score:.3f} (95 % interval {low:.3f} to {high:.3f})")


def _print_growth(growth: dict[str, Any]) -> None:
    for size in growth["sizes"]:
        click.echo(f"{size['labels']:>7} labels  {size['score']:.3f}  {size['low']:.3f}-{size['high']:.3f}")
    if growth["with_twice_the_labels"] is not None:
        click.echo(
            f"twice the labels: about {growth['with_twice_the_labels']:.3f}, if errors go on falling as they did"
        )


def print_framing(record: dict[str, Any]) -> None:
    """What came of the ways to show pictures."""
    framing = record.get("framing", {"tried": []})  # runs of older versions have none
    for attempt in framing["tried"]:
        _print_attempt(attempt, attempt["reason"], "pictures as stated", attempt["name"] == framing["chosen"])


def print_ladder(record: dict[str, Any]) -> None:
    """What came of every candidate, and what the winner is expected to score."""
    ladder = record["ladder"]
    for attempt in ladder["attempts"]:
        came = attempt["reason"]
        if "every step" in attempt["trained_on"]:
            came = f"{attempt['trained_on']}{'; ' + came if came else ''}"
        _print_attempt(attempt, came, "the probe", attempt["name"] == ladder["winner"])
    if ladder["reason"]:
        click.echo(ladder["reason"])
    if ladder["winner"]:
        _print_expected(**record["chosen"]["score"])


def _print_attempt(attempt: dict[str, Any], came: str, rival: str, won: bool) -> None:
    if attempt["gain"]:
        score, low, high = (f"{100 * v:+.1f}" for v in attempt["gain"])
        came = f"{score} points over {rival} ({low} to {high}){', ' + came if came else ''}"
    click.echo(f"    {attempt['name']:<16} {came}{' <' if won else ''}")


def print_judged(document: dict[str, Any]) -> None:
    """The figures of a judgement on test pictures, one line."""
    low, high = document["interval"]
    click.echo(
        f"test accuracy {document['accuracy']:.3f} (95 % interval {low:.3f} to {high:.3f}), balanced "
        f"{document['balanced_accuracy']:.3f}, calibration error {document['calibration_error']:.3f}, "
        f"{document['pictures']} pictures"
    )


def print_classes(document: dict[str, Any]) -> None:
    """Recall and precision of every class."""
    for row in document["per_class"]:
        recall = "-" if row["recall"] is None else f"{row['recall']:.3f}"
        precision = "-" if row["precision"] is None else f"{row['precision']:.3f}"
        name = printable(row["label"])
        click.echo(f"{name:<24} recall {recall:>5}  precision {precision:>5}  {row['support']:>6} pictures")
