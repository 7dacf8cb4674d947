"""How much may be spent on a search: wall time from the start of a run, or a number of trials."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field

from regraft.errors import RunError

UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class Budget:
    """seconds of wall time, or trials, candidates to be tried; the other is None.

    spent: seconds that earlier executions of the same run took; started: when this one began (time.monotonic).
    """

    seconds: float | None
    trials: int | None
    spent: float = 0.0
    started: float = field(default_factory=time.monotonic)

    def elapsed(self) -> float:
        """Seconds spent on the run so far, those before an interruption included."""
        return self.spent + time.monotonic() - self.started

    def left(self) -> float:
        """Seconds left, infinite for a budget in trials."""
        return float("inf") if self.seconds is None else self.seconds - self.elapsed()


def budget_from(text: str, *, spent: float = 0.0, started: float | None = None) -> Budget:
    """A budget such as `90s`, `5m`, `2h` or `20trials`. Raises RunError for other words."""
    found = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*(s|m|h|trials?)\s*", str(text))
    if not found or ("trial" in found[2] and "." in found[1]):
        raise RunError(
            f"A budget must be a time or a number of trials, such as 90s, 5m, 2h or 20trials; found {text!r}."
        )
    begun = time.monotonic() if started is None else started
    if "trial" in found[2]:
        return Budget(None, int(found[1]), spent, begun)
    return Budget(float(found[1]) * UNITS[found[2]], None, spent, begun)
