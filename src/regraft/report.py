"""report.html: one file that shows a run to the person who asked for it, opened from the disk, offline.

Python here works out what is said and where it is drawn (plain numbers in frozen dataclasses); the words, the markup
and the looks are in `templates/`. Every text is made printable and escaped on its way into the page, so labels and file
names may hold anything. No scripts, nothing from outside: the page forbids both to itself.
Knows the record of a run, nothing of networks or training. Not covered: comparing several runs.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from regraft.curve_drawing import plot_curve, ticks
from regraft.data import printable
from regraft.files import write_atomic

REPORT_FILE = "report.html"

THUMBNAIL = 112
"""Longer side of a thumbnail, in pixels."""
LISTED = 50
"""Of files that were left out, so many are named; the others are counted."""
MATRIX_CLASSES = 30
"""With more classes the confusion table gives way to the pairs that are confused most."""
PAIRS = 20
WEAKEST = 20

INPUT = "input"
PHASES = {
    "prepare": "finding the pictures, loading and following the network",
    "features": "features: the frozen part, once per picture",
    "probes": "probes: heads at every cut, cross-validated",
    "framing": "framing: trying the pictures whole, and larger",
    "head": "head of the probe, on all pictures",
    "search": "search: trying candidates beyond the probe",
    "final": "training the winner, if there is one, on all pictures; saving the model",
    "test": "testing the saved model",
    "other": "everything else",
}
HEAD_ALONE = "final head, saving the model"
"""What `head` was in records without `final`."""
Pixels = Callable[[str], npt.NDArray[np.uint8] | None]


def write_report(path: Path, record: Mapping[str, Any], pixels: Pixels) -> None:
    """Write the report of a finished run, whole or not at all.

    record: the document of record.json; pixels: uint8 (H, W, 1 or 3) of a picture that its `worst` lists name, or None
    where it cannot be read. Raises RegraftError when the disk is full.
    """
    write_atomic(path, [render(record, pixels).encode("utf-8")])


def render(record: Mapping[str, Any], pixels: Pixels) -> str:
    """The page as text, free of surrogates and control characters; arguments as for `write_report`."""
    judged = judge(record)
    rows = class_rows(judged, dict(zip(record["data"]["labels"], record["data"]["per_class"], strict=True)))
    ladder = ladder_of(record)
    drawn = {
        "network": network_name(record["curve"]["backbone"]),
        "majority": majority(record["data"]),
        "plot": plot_curve(record["curve"], record["curve"]["recommended"], majority(record["data"])["share"]),
        "framing": record.get("framing"),
        "ladder": ladder,
        "winner": ladder.winner if ladder else None,
        "spans": spans(record["seconds"]),
        "judged": judged,
        "rows": rows,
        "weakest": WEAKEST if len(rows) > MATRIX_CLASSES else len(rows),
        "pairs": confused_pairs(judged, PAIRS) if len(rows) > MATRIX_CLASSES else None,
        "worst": [(item, thumbnail(pixels(item["where"]))) for item in judged.worst],
        "left_out": left_out(record),
        "listed": LISTED,
        "health": record.get("health"),
        "flows": flows(record["health"]) if record.get("health") else (),
    }
    return page_environment().get_template("report.html.j2").render({**record, **drawn})


def page_environment() -> Environment:
    """What pages are rendered with: every text printable and escaped, an unknown name an error."""
    return Environment(
        loader=PackageLoader("regraft"),
        autoescape=True,
        finalize=_visible,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def network_name(backbone: Mapping[str, Any]) -> str:
    """What to call the backbone in a sentence."""
    named = {"custom": "your own network", "operations": backbone["spec"]}
    name = str(named.get(backbone["architecture"], backbone["architecture"]))
    return name if backbone["pretrained"] else f"{name} with random weights"


def majority(data: Mapping[str, Any]) -> dict[str, Any]:
    """The largest class among the pictures learned from and its share: what a constant answer would score."""
    counts = data["per_class"]
    return {"label": data["labels"][counts.index(max(counts))], "share": max(counts) / data["used"]}


# --- where the time went ---


@dataclass(frozen=True)
class Span:
    """One phase of the run; start and share are fractions of the whole time."""

    name: str
    what: str
    seconds: float
    start: float
    share: float


def spans(seconds: Mapping[str, float]) -> list[Span]:
    """The phases in order of time; what `total` holds beyond them comes last, as `other`."""
    parts = {name: s for name, s in seconds.items() if name != "total"}
    parts["other"] = max(0.0, seconds["total"] - sum(parts.values()))
    whole = sum(parts.values()) or 1.0
    found: list[Span] = []
    known = PHASES if "final" in seconds else PHASES | {"head": HEAD_ALONE}
    for name, s in parts.items():
        start = found[-1].start + found[-1].share if found else 0.0
        found.append(Span(name, known.get(name, name), s, start, s / whole))
    return found


# --- the ladder of what was tried beyond the probe ---


@dataclass(frozen=True)
class Bar:
    """A paired difference and its interval; at, start and end: where they lie on the scale of the ladder, 0..1."""

    score: float
    low: float
    high: float
    at: float
    start: float
    end: float


@dataclass(frozen=True)
class Rung:
    """A candidate and what came of it.

    way: how it trains, one word; better: than the probe beyond the noise; gain: in shares of pictures over the probe's;
    change: of the log-loss from the probe's, with its 95 % interval; below 0 where the candidate's is lower.
    """

    attempt: Mapping[str, Any]
    way: str
    won: bool
    better: bool
    gain: Bar | None
    change: tuple[float, float, float] | None


@dataclass(frozen=True)
class Ladder:
    """The candidates in order of complexity. zero: place of the probe on their scale; scale: ticks as (place, text).

    raw: the raw input's point of the curve; probe: its name, score and log-loss on the folds that candidates share.
    """

    raw: Mapping[str, Any]
    probe: Mapping[str, Any]
    rungs: tuple[Rung, ...]
    zero: float
    scale: tuple[tuple[float, str], ...]

    @property
    def winner(self) -> Rung | None:
        """The candidate that took the place of the probe."""
        return next((rung for rung in self.rungs if rung.won), None)

    @property
    def judged(self) -> int:
        """How many candidates were judged on some fold."""
        return sum(bool(rung.attempt["folds"]) for rung in self.rungs)

    @property
    def scratch(self) -> Rung | None:
        """The candidate without transfer."""
        return next((rung for rung in self.rungs if rung.way == "scratch"), None)


def ladder_of(record: Mapping[str, Any]) -> Ladder | None:
    """What was tried beyond the probe; None where nothing was, or the record is older than the ladder."""
    ladder, cuts = record.get("ladder"), record["curve"]["cuts"]
    if not ladder or not ladder["attempts"]:
        return None
    gains = [attempt["gain"] for attempt in ladder["attempts"] if attempt["gain"]]
    levels = ticks(100 * min([0.0, *(g[1] for g in gains)]), 100 * max([0.0, *(g[2] for g in gains)]), 6)

    def place(difference: float) -> float:
        return (100 * difference - levels[0]) / (levels[-1] - levels[0])

    def rung(attempt: Mapping[str, Any]) -> Rung:
        gain, sharper = attempt["gain"], attempt["log_loss_gain"]
        bar = Bar(*gain, *map(place, gain)) if gain else None
        change = (-sharper[0], -sharper[2], -sharper[1]) if sharper else None
        # The rule by which the ladder itself chooses.
        better = bool(bar and change and (bar.low > 0 or (change[2] < 0 and bar.score >= 0)))
        return Rung(
            attempt, way_of(attempt, cuts[-1]["name"]), attempt["name"] == ladder["winner"], better, bar, change
        )

    scale = tuple((place(level / 100), f"{level:+d}" if level else "0") for level in levels) if gains else ()
    rungs = tuple(rung(attempt) for attempt in ladder["attempts"])
    return Ladder(cuts[0], ladder["probe"], rungs, place(0.0), scale)


def way_of(attempt: Mapping[str, Any], deepest: str) -> str:
    """How a candidate trains, in one word. deepest: the last cut of the curve."""
    ways = (
        ("solved", not attempt["epochs"]),
        ("scratch", attempt["cut"] == INPUT),
        ("all", attempt["cut"] == "picture"),
        ("fresh", attempt["fresh"]),
        ("hidden", attempt["hidden"]),
        ("dropped", attempt["end"] != deepest),
        ("stages", attempt["opens"]),
    )
    return next((way for way, so in ways if so), "tuned")


# --- the health of layers ---


@dataclass(frozen=True)
class Flow:
    """One layer: its figures, and its outputs' spread and its gradient as places on a scale of powers of ten, 0..1."""

    layer: Mapping[str, Any]
    spread: float | None
    gradient: float | None


def flows(health: Mapping[str, Any]) -> list[Flow]:
    """The layers of a record's `health`, each measure on the scale between its least and its largest layer."""
    layers = health["layers"]
    spreads = _on_scale([layer["spread"] for layer in layers])
    gradients = _on_scale([layer["gradient"] for layer in layers])
    return [Flow(layer, s, g) for layer, s, g in zip(layers, spreads, gradients, strict=True)]


def _on_scale(values: Sequence[float | None]) -> list[float | None]:
    powers = [math.log10(v) if v else None for v in values]
    known = [p for p in powers if p is not None]
    low, high = (math.floor(min(known)), math.ceil(max(known))) if known else (0, 1)
    return [None if p is None else (p - low) / max(1, high - low) for p in powers]


# --- classes ---


@dataclass(frozen=True)
class Judged:
    """What the classes are judged by: the test pictures where there are any, else the predictions out of fold.

    confusion: counts (true, predicted).
    """

    on_test: bool
    labels: Sequence[str]
    confusion: Sequence[Sequence[int]]
    worst: Sequence[Mapping[str, Any]]

    @property
    def pictures(self) -> int:
        """How many pictures were judged."""
        return sum(map(sum, self.confusion))

    @property
    def where(self) -> str:
        """The same in words."""
        return f"the {self.pictures:,} test pictures" if self.on_test else f"{self.pictures:,} pictures out of fold"


@dataclass(frozen=True)
class ClassRow:
    """One class; recall and precision are None where they are not defined. learned: pictures learned from."""

    label: str
    learned: int
    support: int
    recall: float | None
    precision: float | None


@dataclass(frozen=True)
class Pair:
    """How often one class was taken for another; share: of the true class."""

    label: str
    predicted: str
    count: int
    share: float


def judge(record: Mapping[str, Any]) -> Judged:
    """The results that the report shows by class and by picture."""
    test = record["test"]
    if test is None:
        return Judged(False, record["data"]["labels"], record["chosen"]["confusion"], record["chosen"]["worst"])
    return Judged(True, test["labels"], test["confusion"], test["worst"])


def class_rows(judged: Judged, learned: Mapping[str, int]) -> list[ClassRow]:
    """All classes, lowest recall first; those without a picture to judge by come last."""
    said = [sum(column) for column in zip(*judged.confusion, strict=True)]
    rows = []
    for i, label in enumerate(judged.labels):
        right, support = judged.confusion[i][i], sum(judged.confusion[i])
        recall = right / support if support else None
        rows.append(ClassRow(label, learned.get(label, 0), support, recall, right / said[i] if said[i] else None))
    return sorted(rows, key=lambda row: (row.recall is None, row.recall or 0.0, -row.support))


def confused_pairs(judged: Judged, most: int) -> list[Pair]:
    """The pairs of classes that are confused most often, at most `most` of them."""
    pairs = [
        Pair(judged.labels[i], judged.labels[j], count, count / sum(row))
        for i, row in enumerate(judged.confusion)
        for j, count in enumerate(row)
        if i != j and count
    ]
    return sorted(pairs, key=lambda pair: (-pair.count, -pair.share))[:most]


# --- what was left out ---


@dataclass(frozen=True)
class Listing:
    """Files of one fate: (where, what about it)."""

    title: str
    meaning: str
    files: tuple[tuple[str, str], ...]


def left_out(record: Mapping[str, Any]) -> list[Listing]:
    """Everything that was found and not used as one might think, by what became of it."""
    data, test = record["data"], record["test"]

    def files(items: Sequence[Mapping[str, str]]) -> tuple[tuple[str, str], ...]:
        return tuple((item["where"], item["reason"]) for item in items)

    found = [
        Listing(
            "Pictures not learned from", "Unreadable, or the same picture under two labels.", files(data["left_out"])
        )
    ]
    if test is not None:
        leaks = tuple((leak["tested"], f"same {leak['equal']} as {leak['learned']}") for leak in data["leaks"])
        found += [
            Listing("Test pictures not judged", "They could not be read.", files(test["left_out"])),
            Listing(
                "Test pictures learned from too", "They stayed in the test; take them out to have a clean one.", leaks
            ),
        ]
    return [
        *found,
        Listing("Used with a remark", "Read and used, though not all that the file holds.", files(data["notes"])),
        Listing("Files passed over", "Not taken for pictures.", files(data["ignored"])),
    ]


# --- pictures ---


@dataclass(frozen=True)
class Thumbnail:
    """A small picture as a data URI; tiny: so small that it is enlarged with its pixels left sharp."""

    uri: str
    tiny: bool


def thumbnail(pixels: npt.NDArray[np.uint8] | None) -> Thumbnail | None:
    """A picture uint8 (H, W, 1 or 3) made at most THUMBNAIL wide and high, as PNG or JPEG, whichever is smaller."""
    if pixels is None:
        return None
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    tiny = max(image.size) <= THUMBNAIL // 2
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    encoded = {"png": _encoded(image, "PNG"), "jpeg": _encoded(image, "JPEG")}
    kind, data = min(encoded.items(), key=lambda item: len(item[1]))
    return Thumbnail(f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}", tiny)


def _encoded(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, optimize=True, quality=82)
    return file.getvalue()


def _visible(value: Any) -> Any:
    """What the template puts into the page: all that is not markup already, made printable (then it is escaped)."""
    return value if isinstance(value, Markup) else printable(str(value))
