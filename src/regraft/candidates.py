"""What is worth trying beyond probes on frozen features, by a rule over the number of pictures and the network.

The textbook's strategy (Geron, Hands-On Machine Learning, "Reusing Pretrained Layers"): freeze all, then unfreeze from
the top at lower learning rates; with little data drop top hidden layers; with much replace or add some; with very much
train everything. Each of these is a candidate: plain values, in order of complexity.
Knows numbers and names of cuts; nothing of networks, features or time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from regraft.augment import Augment

LITTLE = 40
"""Below this many pictures a fine-tuned layer cannot be told from a probe: nothing is tried."""
SOME = 200
ENOUGH = 500
MUCH = 2000
"""From here on batch norms may move, and top layers may begin anew."""
FEWEST_STEPS, BATCH = 400, 32
"""From random weights a network needs so many steps of so many pictures at least, however few pictures there are."""
LENGTHS = (0.5, 0.25)
"""Shares of its epochs in which a candidate is tried where the time does not last for all of them."""
FEWEST = 2
"""A shortened candidate keeps at least so many epochs, and so many views: one beside the picture itself."""
TOP, UPPER = 0.15, 0.4
"""Shares of the network's arithmetic above the cuts from which parts are trained."""


@dataclass(frozen=True)
class Place:
    """A cut as the rule sees it. above: share of the network's arithmetic that lies above it, 0..1."""

    name: str
    depth: int
    above: float


@dataclass(frozen=True)
class Candidate:
    """A way to train beyond the probe.

    cut: frozen up to here; `picture` trains all layers; `input` trains a small network from scratch.
    epochs: 0 where nothing is trained: a probe that stands beside another.
    end: the deepest layer kept, layers above are dropped; fresh: layers above this cut (all of them: `picture`) begin
    anew; hidden: new ones.
    opens: cuts between which stages lie that open one after another from the top; empty: all from the first epoch.
    statistics: batch norms of the trained layers move on. views: of each picture.
    lr: of the highest layers; decay: of it for each stage further down (layer-wise decay, Howard and Ruder 2018).
    alone: judged without the probe beside it.
    """

    name: str
    does: str
    cut: str
    end: str
    fresh: str = ""
    hidden: tuple[int, ...] = ()
    opens: tuple[str, ...] = ()
    statistics: bool = False
    epochs: int = 10
    lr: float = 5e-4
    decay: float = 0.7
    views: int = 4
    augment: Augment = Augment(crop=True, mix=True)
    alone: bool = False

    def to_json(self) -> dict[str, Any]:
        """The candidate as JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


def beside_the_input(name: str, cut: str) -> Candidate:
    """The probe called `name`, up to this cut, beside that on the raw input, where neither alone is the better."""
    return Candidate("both probes", f"the probe on {name} beside that on the raw input", cut, cut, epochs=0, views=1)


def all_layers_alone(n: int, end: str, augment: Augment, *, scratch: bool) -> Candidate:
    """All layers up to `end` trained on n pictures by one recipe, from random weights or from those that are there.

    What is between the two is what pretraining gave.
    """
    return Candidate(
        "scratch" if scratch else "all layers",
        f"all layers trained from {'random' if scratch else 'pretrained'} weights",
        "picture",
        end,
        fresh="picture" if scratch else "",
        statistics=True,
        epochs=max(30 if n < ENOUGH else 15, -(-FEWEST_STEPS * BATCH // n)),
        lr=3e-3 if scratch else 1e-3,
        decay=1.0,
        views=8 if n < MUCH else 4,
        augment=augment,
        alone=True,
    )


def shortened(candidate: Candidate, n: int) -> tuple[Candidate, ...]:
    """The same in fewer epochs on n pictures and as much fewer views, the longest first.

    What begins at random keeps the fewest steps that it needs.
    """
    anew = candidate.cut == "input" or candidate.fresh or candidate.hidden
    fewest = max(FEWEST, -(-FEWEST_STEPS * BATCH // n)) if anew else FEWEST
    found = [candidate]
    for share in LENGTHS:
        epochs = max(fewest, round(share * candidate.epochs))
        views = min(candidate.views, max(FEWEST, round(share * candidate.views)))
        if epochs < found[-1].epochs:
            does = f"{candidate.does}, in {epochs} epochs and {views} views for want of time"
            found.append(replace(candidate, does=does, epochs=epochs, views=views))
    return tuple(found[1:])


def worth_trying(n: int, places: Sequence[Place], best: str, augment: Augment) -> tuple[Candidate, ...]:
    """The candidates for n pictures, simplest first.

    places: the network's shown cuts in order of depth; none where the features are the raw input's. best: the single
    cut with the least log-loss on the curve. augment: what may be done to pictures.

    | pictures | candidates |
    |---|---|
    | under 40 | none |
    | 40 | the small network from scratch; the top layers from the probe; those above the best cut dropped |
    | 200 | more layers, unfrozen one stage after another |
    | 500 | new hidden layers; all layers |
    | 2,000 | the top layers begun anew; batch norms that move on |

    Where the time does not last for one of them it is tried in a half or a quarter of its epochs (see `shortened`).
    """
    if n < LITTLE:
        return ()
    views = 4 if n < MUCH else 2
    scratch = Candidate(
        "scratch",
        "a small network from random weights: what these pictures give without any transfer",
        "input",
        "small network",
        statistics=True,
        epochs=30 if n < ENOUGH else 15,
        lr=3e-3,
        views=8 if n < MUCH else 4,
        augment=augment,
    )
    if not places:
        return (scratch,)
    end = places[-1].name
    top, upper = _cut_above(places, TOP), _cut_above(places, UPPER)
    tune = Candidate(
        "top layers", f"layers above {top} fine-tuned from the probe", top, end, views=views, augment=augment
    )
    found = [scratch, tune]
    depth = {place.name: place.depth for place in places}
    if best in depth and depth[best] < depth[end]:
        lower = _below(places, best, TOP)
        if lower:
            does = f"layers above {best} dropped, those from {lower} fine-tuned"
            found.append(Candidate("layers dropped", does, lower, best, views=views, augment=augment))
    if n >= SOME and upper != top:
        does = f"layers above {upper} unfrozen from the top, one stage after another"
        opens = tuple(place.name for place in places if depth[upper] < place.depth <= depth[top])[-1:]
        found.append(Candidate("more layers", does, upper, end, opens=opens, epochs=6, views=views, augment=augment))
    if n >= ENOUGH:
        does = f"256 new hidden units under the output, layers above {top} fine-tuned"
        found.append(
            Candidate("layer added", does, top, end, hidden=(256,), opens=(end,), lr=1e-3, views=views, augment=augment)
        )
    if n >= MUCH:
        does = f"layers above {top} replaced by fresh ones"
        found.append(
            Candidate(
                "layers replaced", does, top, end, fresh=top, statistics=True, lr=1e-3, views=views, augment=augment
            )
        )
        does = f"layers above {top} fine-tuned, batch norms move on"
        found.append(Candidate("moving norms", does, top, end, statistics=True, views=views, augment=augment))
    if n >= ENOUGH:
        does = "all layers trained from the pretrained start"
        found.append(Candidate("all layers", does, "picture", end, epochs=5, decay=0.8, views=2, augment=augment))
    return tuple(found)


def _cut_above(places: Sequence[Place], share: float) -> str:
    """The lowest cut above which no more than this share of the arithmetic lies, below the last."""
    inside = [place.name for place in places[:-1] if place.above <= share]
    return inside[0] if inside else places[-2].name if len(places) > 1 else places[0].name


def _below(places: Sequence[Place], end: str, share: float) -> str | None:
    """The lowest cut with no more than this share of the arithmetic between it and `end`, None where there is none."""
    at = next(i for i, place in enumerate(places) if place.name == end)
    inside = [place.name for place in places[:at] if place.above - places[at].above <= share]
    return inside[0] if inside else None
