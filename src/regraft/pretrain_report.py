"""The page of a pretraining run: its loss, what it makes of pictures, the depth curve before and after.

As `report`, whose drawing it shares: one file, opened from the disk, offline; words and looks are in `templates/`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from regraft.curve_drawing import plot_curve, ticks
from regraft.files import write_atomic
from regraft.heads import INPUT
from regraft.methods import Panel
from regraft.report import LISTED, Thumbnail, page_environment, thumbnail

WIDTH, HEIGHT, LEFT, TOP, BELOW = 900, 220, 70, 12, 40
LEVELS = 4


@dataclass(frozen=True)
class LossPlot:
    """Where everything lies when the loss is drawn against the epoch; places in pixels."""

    width: int
    height: int
    left: int
    bottom: int
    across: tuple[tuple[float, str], ...]
    along: tuple[tuple[float, str], ...]
    points: tuple[tuple[float, float, str], ...]

    @property
    def line(self) -> str:
        """The points of a polyline."""
        return " ".join(f"{x},{y}" for x, y, _ in self.points)


def write_pretrain_report(path: Path, record: Mapping[str, Any], panels: Sequence[Panel]) -> None:
    """Write the page of a finished run whole or not at all. record: the document of record.json."""
    curves = record["curves"]
    drawn = {
        "loss": plot_loss(record["losses"]),
        "panels": [{"title": panel.title, "rows": _rows(panel)} for panel in panels],
        "plots": [(name, plot_curve(curve, curve["recommended"], curve["majority"])) for name, curve in curves.items()],
        "best": _best(curves) if curves else None,
        "listed": LISTED,
        "winner": None,
    }
    page = page_environment().get_template("pretrain.html.j2").render({**record, **drawn})
    write_atomic(path, [page.encode("utf-8")])


def plot_loss(losses: Sequence[float]) -> LossPlot:
    """The drawing of the loss of every epoch, counted from 1."""
    low, high = min(losses), max(losses)
    span = (high - low) or max(abs(high), 1e-9)
    bottom = TOP + HEIGHT

    def x(epoch: float) -> float:
        return round(LEFT + (WIDTH - LEFT - 10) * (epoch - 1) / max(1, len(losses) - 1), 1)

    def y(loss: float) -> float:
        return round(TOP + HEIGHT * (low + span - loss) / span, 1)

    levels = [low + span * i / LEVELS for i in range(LEVELS + 1)]
    return LossPlot(
        WIDTH,
        bottom + BELOW,
        LEFT,
        bottom,
        tuple((y(level), f"{level:.4g}") for level in levels),
        tuple((x(epoch), str(epoch)) for epoch in ticks(1, len(losses), 12) if 1 <= epoch <= len(losses)),
        tuple((x(i), y(loss), f"epoch {i}: {loss:.5g}") for i, loss in enumerate(losses, 1)),
    )


def _rows(panel: Panel) -> list[tuple[list[Thumbnail | None], str]]:
    captions = panel.captions or ("",) * len(panel.rows)
    return [([thumbnail(_pixels(x)) for x in row], text) for row, text in zip(panel.rows, captions, strict=False)]


def _pixels(x: torch.Tensor) -> np.ndarray:
    """A tensor (channels, height, width) in [0, 1] as uint8 (height, width, channels)."""
    levels = (x.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    return np.ascontiguousarray(levels.permute(1, 2, 0).numpy())


def _best(curves: Mapping[str, Any]) -> dict[str, Any]:
    """The best mean on the network before and after, and the raw input's."""

    def best(curve: Mapping[str, Any]) -> float:
        return max(float(p["score"]) for p in [*curve["cuts"], *curve["several"]] if p["name"] != INPUT)

    raw = next(p["score"] for p in curves["after"]["cuts"] if p["name"] == INPUT)
    helps = curves["after"]["transfer_helps"]
    return {"before": best(curves["before"]), "after": best(curves["after"]), "input": raw, "helps": helps}
