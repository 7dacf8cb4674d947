"""Did it pay? Several backbones, the raw input and training from scratch on the same folds, and who wins how surely.

Of every backbone the whole procedure is judged: the nested score of the rule that chooses its cuts. From scratch means
the architecture that was pretrained here with random weights, all layers trained on the labelled pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from regraft.attempts import Attempt
from regraft.augment import Augment
from regraft.candidates import LITTLE, from_scratch
from regraft.errors import TrainingError
from regraft.finetune import Ground
from regraft.flips import flips_are_harmless
from regraft.heads import INPUT
from regraft.ladder import Say, try_alone
from regraft.scores import Interval, bootstrap_interval, paired_difference, widened
from regraft.search import Choice


@dataclass(frozen=True)
class Rival:
    """One way to the answer. hits: float64 (n,) out of fold; pretrained: regraft made this backbone itself."""

    name: str
    hits: np.ndarray
    pretrained: bool = False


@dataclass(frozen=True)
class Place:
    """A rival in the ranking. score: on pictures it has not seen; behind: by how much the winner is better, paired."""

    rival: Rival
    score: Interval
    behind: Interval


@dataclass(frozen=True)
class Gate:
    """The ranking, best first. paid: whether a backbone pretrained here is better than all else, beyond the noise.

    paid is None where none was pretrained here.
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


def rival_of(name: str, choice: Choice, *, pretrained: bool) -> Rival:
    """A backbone, by the nested procedure on its curve."""
    return Rival(name, choice.hits, pretrained)


def train_from_scratch(ground: Ground, say: Say) -> Attempt:
    """The ground's network with random weights, trained on every fold's complement.

    Raises TrainingError where there are too few pictures, or where it cannot be trained.
    """
    n = len(ground.task.labels)
    if n < LITTLE:
        raise TrainingError(f"Training from scratch must have at least {LITTLE} pictures; there are {n}.")
    harmless, _ = flips_are_harmless(ground)
    candidate = from_scratch(n, ground.backbone.shown[-1].name, Augment(crop=True, flip=harmless))
    attempt = try_alone(ground, candidate, say)
    if attempt.status != "finished":
        raise TrainingError(f"The network must be one that trains from scratch; it did not: {attempt.reason}")
    return attempt


def rank(rivals: Sequence[Rival], groups: np.ndarray, folds: int) -> Gate:
    """Who wins. groups: int64 (n,), as in `Task`; folds: how many the rivals were judged on."""
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
    others = places[1:]
    sure = all(place.behind.low > 0 for place in others)
    ours = any(rival.pretrained for rival in rivals)
    rest = [place for place in others if not place.rival.pretrained]
    paid = (best.pretrained and all(place.behind.low > 0 for place in rest)) if ours else None
    return Gate(places, paid, _sentence(places, sure, paid))


def _sentence(places: Sequence[Place], sure: bool, paid: bool | None) -> str:
    ahead = ", ".join(
        f"{100 * p.behind.score:+.1f} points over {_called(p.rival)} "
        f"({100 * p.behind.low:+.1f} to {100 * p.behind.high:+.1f})"
        for p in places[1:]
    )
    certainty = "beyond the noise" if sure else "not beyond the noise everywhere"
    verdict = "" if paid is None else ": pretraining paid" if paid else ": pretraining did not pay"
    return f"{_called(places[0].rival)} wins{verdict}; {ahead}; {certainty}"


def _called(rival: Rival) -> str:
    return "the raw input" if rival.name == INPUT else rival.name
