"""Where everything lies in the drawing of a depth curve; lengths are its units, about one pixel on a wide screen.

Knows the curve as the record has it; the markup is in `templates/curve.svg.j2`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

WIDTH, LEFT, RIGHT, TOP, HEIGHT = 960, 64, 24, 46, 290
COLUMN = 36  # for each head on several cuts, right of the curve
BELOW = 30  # numbers of the depth axis
ROW = 18  # one line of dots: which cuts a head on several reads
LEADER = 24  # from the axis, or the last of these lines, to the cuts' names
NAME_GAP = 15.0
NAME_LONGEST = 22
SLANT = 55  # degrees
LETTER_WIDTH = 6.3


@dataclass(frozen=True)
class Point:
    """A score on the drawing. short: the name as it fits under the axis; mark: the letter of a head on several cuts;
    parts: the cuts that such a head reads; note: how; members: x of these cuts; row: y of their line of dots."""

    name: str
    short: str
    mark: str
    depth: int
    score: float
    low: float
    high: float
    recommended: bool
    x: float
    y: float
    y_low: float
    y_high: float
    name_x: float
    parts: tuple[str, ...] = ()
    note: str = ""
    members: tuple[float, ...] = ()
    row: float = 0.0


@dataclass(frozen=True)
class Plot:
    """The drawing of a curve: its size, the frame of the curve inside it, ticks as (place, text), and the points.

    majority: y of what a constant answer scores, None where that lies outside the drawing.
    """

    width: int
    height: float
    left: float
    right: float
    top: float
    bottom: float
    across: tuple[tuple[float, str], ...]
    along: tuple[tuple[float, str], ...]
    cuts: tuple[Point, ...]
    several: tuple[Point, ...]
    names_y: float
    slant: int
    majority: float | None

    @property
    def line(self) -> str:
        """The curve through the scores, as points of an SVG polyline."""
        return " ".join(f"{p.x},{p.y}" for p in self.cuts)

    @property
    def band(self) -> str:
        """The outline of the intervals, as points of an SVG polygon."""
        upper = [f"{p.x},{p.y_high}" for p in self.cuts]
        return " ".join(upper + [f"{p.x},{p.y_low}" for p in reversed(self.cuts)])


def plot_curve(curve: Mapping[str, Any], chosen: str, constant: float) -> Plot:
    """Where everything lies when scores in percent are drawn against depth.

    curve: as in the record; chosen: name of the point to mark; constant: the score of a constant answer.
    """
    cuts, several = curve["cuts"], curve["several"]
    right = WIDTH - RIGHT - COLUMN * len(several)
    deepest: int = max(max(c["depth"] for c in cuts), 1)
    levels = ticks(100 * min(p["low"] for p in cuts + several), 100 * max(p["high"] for p in cuts + several))
    bottom = TOP + HEIGHT
    names_y = bottom + BELOW + ROW * len(several) + LEADER

    def x(depth: float) -> float:
        return round(LEFT + (right - LEFT) * depth / deepest, 1)

    def y(score: float) -> float:
        return round(TOP + HEIGHT * (levels[-1] - 100 * score) / (levels[-1] - levels[0]), 1)

    def point(c: Mapping[str, Any], at: float, name_x: float, short: str, mark: str = "") -> Point:
        y_of = (y(c["score"]), y(c["low"]), y(c["high"]))
        recommended = c["name"] == chosen
        facts = (c["name"], short, mark, c["depth"], c["score"], c["low"], c["high"], recommended)
        return Point(*facts, at, *y_of, name_x)

    named = spread([x(c["depth"]) for c in cuts], NAME_GAP, WIDTH - RIGHT - COLUMN * len(several))
    points = tuple(
        point(c, x(c["depth"]), at, shortened(c["name"], NAME_LONGEST)) for c, at in zip(cuts, named, strict=True)
    )
    place = {p.name: p.x for p in points}
    heads = []
    for i, c in enumerate(several):
        at = right + COLUMN * (i + 0.75)
        parts, note = parts_of(c["name"])
        head = point(c, at, at, f"{len(parts)} cuts", chr(ord("A") + i))
        members = tuple(place[name] for name in parts if name in place)
        heads.append(replace(head, parts=parts, note=note, members=members, row=bottom + BELOW + ROW * (i + 0.5)))
    longest = max(len(p.short) for p in points)
    return Plot(
        width=WIDTH,
        height=names_y + 40 + math.ceil(longest * LETTER_WIDTH * math.sin(math.radians(SLANT))),
        left=LEFT,
        right=right,
        top=TOP,
        bottom=bottom,
        across=tuple((y(level / 100), f"{level} %") for level in levels),
        along=tuple((x(depth), str(depth)) for depth in ticks(0, deepest, 10) if depth <= deepest),
        cuts=points,
        several=tuple(heads),
        names_y=names_y,
        slant=SLANT,
        majority=y(constant) if levels[0] <= 100 * constant <= levels[-1] else None,
    )


def parts_of(name: str) -> tuple[tuple[str, ...], str]:
    """The cuts in the name of a head on several, and the note behind them, as in `layer3+layer4 (roots)`."""
    cuts, _, note = name.partition(" (")
    return tuple(cuts.split("+")), note.removesuffix(")")


def ticks(low: float, high: float, most: int = 7) -> list[int]:
    """Whole numbers at equal steps of 1, 2 or 5 times a power of ten, from at most `low` to at least `high`."""
    steps = (digit * 10**power for power in range(9) for digit in (1, 2, 5))
    step = next(s for s in steps if math.ceil(high / s) - math.floor(low / s) < most)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [step * i for i in range(first, max(last, first + 1) + 1)]


def spread(places: Sequence[float], gap: float, most: float) -> list[float]:
    """Places in order, moved as little as needed to lie `gap` apart, the last at `most` or below.

    The mean of pushing every crowd to the right and pushing it to the left: both keep the gap, so their mean does.
    """
    pushed_right: list[float] = []
    for place in places:
        pushed_right.append(max(place, pushed_right[-1] + gap) if pushed_right else place)
    pushed_left: list[float] = []
    for place in reversed(places):
        pushed_left.append(min(place, pushed_left[-1] - gap) if pushed_left else place)
    found: list[float] = []
    for a, b in zip(reversed(pushed_right), pushed_left, strict=True):
        found.append(min((a + b) / 2, found[-1] - gap if found else most))
    return [round(place, 1) for place in reversed(found)]


def shortened(text: str, longest: int) -> str:
    """The text with its middle left out where it is longer than `longest`; the end tells more, so it keeps more."""
    if len(text) <= longest:
        return text
    start = longest // 3
    return f"{text[:start]}…{text[len(text) - (longest - start - 1) :]}"
