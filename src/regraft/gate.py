"""Did it pay? Several backbones, the raw input and training from scratch on the same folds, and who wins how surely.

Of every backbone the whole procedure is judged: the nested score of the rule that chooses its cuts. The architecture
that was pretrained here is also trained in all its layers on the labelled pictures, once from its own weights and once
from random ones, by one recipe: what lies between the two is what pretraining gave.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from regraft.attempts import Attempt
from regraft.augment import Augment
from regraft.candidates import LITTLE, all_layers_alone
from regraft.errors import TrainingError
from regraft.finetune import Ground
from regraft.flips import flips_are_harmless
from regraft.heads import INPUT
from regraft.ladder import Say, try_alone
from regraft.scores import Interval, bootstrap_interval, paired_difference, widened

NEEDED = (INPUT, "scratch", "default")


@dataclass(frozen=True)
class Rival:
    """One way to the answer. hits: float64 (n,) out of fold; pretrained: regraft made this backbone itself.

    known: of so many of the pictures it learned the classes then, so that its hits on them say nothing.
    """

    name: str
    hits: np.ndarray
    pretrained: bool = False
    known: int = 0


@dataclass(frozen=True)
class Place:
    """A rival in the ranking. score: on pictures it has not seen; behind: by how much the winner is better, paired."""

    rival: Rival
    score: Interval
    behind: Interval


@dataclass(frozen=True)
class Gate:
    """The ranking, best first.

    paid: whether a backbone pretrained here is better, beyond the noise, than the raw input, the same network from
    scratch and the default backbone. None where none was pretrained here, or it leads and one of these is missing.
    """

    places: tuple[Place, ...]
    paid: bool | None
    sentence: str

    def to_json(self) -> dict[str, Any]:
        """The ranking as JSON values."""
        rows = [
            {
                "name": place.rival.name,
                "score": place.score.score,
                "interval": [place.score.low, place.score.high],
                "behind": [place.behind.score, place.behind.low, place.behind.high],
            }
            for place in self.places
        ]
        return {"winner": self.places[0].rival.name, "paid": self.paid, "sentence": self.sentence, "ranking": rows}


def train_all_layers(ground: Ground, say: Say, *, scratch: bool) -> Attempt:
    """All layers of the ground's network trained on every fold's complement, from random weights or its own.

    Raises TrainingError where there are too few pictures, or where it cannot be trained.
    """
    n = len(ground.task.labels)
    if n < LITTLE:
        raise TrainingError(f"Training all layers must have at least {LITTLE} pictures; there are {n}.")
    harmless, _ = flips_are_harmless(ground)
    augment = Augment(crop=True, flip=harmless)
    candidate = all_layers_alone(n, ground.backbone.shown[-1].name, augment, scratch=scratch)
    attempt = try_alone(ground, candidate, say)
    if attempt.status != "finished":
        raise TrainingError(f"The network must be one whose layers can all be trained; they were not: {attempt.reason}")
    return attempt


def rank(rivals: Sequence[Rival], groups: np.ndarray, folds: int, left_out: str = "") -> Gate:
    """Who wins. groups: int64 (n,), as in `Task`; folds: how many there were; left_out: why a rival is not there."""
    best = max(rivals, key=lambda rival: rival.hits.mean())
    order = sorted(rivals, key=lambda rival: (-rival.hits.mean(), rival is not best))
    places = tuple(
        Place(
            rival,
            widened(bootstrap_interval(rival.hits, groups), 1 / folds),
            paired_difference(best.hits, rival.hits, groups),
        )
        for rival in order
    )
    paid, verdict = _verdict(places)
    sentence = f"{_called(best)} wins{verdict}; {_ahead(places)}"
    return Gate(places, paid, f"{sentence}; {left_out}" if left_out else sentence)


def _verdict(places: Sequence[Place]) -> tuple[bool | None, str]:
    best, others = places[0].rival, [place for place in places[1:] if not place.rival.pretrained]
    if not any(place.rival.pretrained for place in places):
        return None, ""
    if not best.pretrained or not all(place.behind.low > 0 for place in others):
        return False, ": pretraining did not pay"
    if best.known:
        return None, f": no wonder, it learned the classes of {best.known} of these pictures"
    missing = [name for name in NEEDED if all(place.rival.name != name for place in others)]
    if missing:
        return None, f": whether pretraining paid is open without {' and '.join(missing)}"
    return True, ": pretraining paid"


def _ahead(places: Sequence[Place]) -> str:
    ahead = ", ".join(
        f"{100 * p.behind.score:+.1f} points over {_called(p.rival)} "
        f"({100 * p.behind.low:+.1f} to {100 * p.behind.high:+.1f})"
        for p in places[1:]
    )
    sure = all(place.behind.low > 0 for place in places[1:])
    return f"{ahead}; {'beyond the noise' if sure else 'not beyond the noise everywhere'}"


def _called(rival: Rival) -> str:
    return "the raw input" if rival.name == INPUT else rival.name
