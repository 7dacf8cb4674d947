"""The ladder above the probe: candidates tried within a budget, on the same folds, each kept only if it wins.

Successive halving over folds (Jamieson and Talwalkar 2016): every candidate is judged on the first folds; those behind
the probe are stopped there, the better half goes on to the others (with many pictures the first folds are enough). In
the order of their complexity a candidate takes the place of the answer so far only if it is better beyond the noise on
the folds that both have seen; so at worst the answer is the probe. With a budget in time all go on, the most promising
first; one is tried only if it, what is left to do for the best so far, and the final fit are expected to end in time,
in a half or a quarter of its epochs where all of them would not.

Knows candidates, folds and time. What was tried is kept in the store, and not tried again.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from regraft.ahead import side_by_side
from regraft.attempts import Attempt, Status, judged, recalled, remember
from regraft.augment import Augment
from regraft.budget import Budget
from regraft.candidates import Candidate, Place, beside_the_input, shortened, worth_trying
from regraft.costs import fold_seconds, map_seconds, workers
from regraft.errors import BackboneError, CutError, TrainingError, first_line
from regraft.finetune import STORED, Ground, plot_of, stored_of, train_fold, trained_on, trains_in_bfloat16
from regraft.frozen import freeze_lower
from regraft.graph import find_cut, shares_above
from regraft.heads import INPUT
from regraft.maps import Maps, extract_maps, fit_together, picture_views, views_that_fit
from regraft.preprocess import input_spec
from regraft.probe import Trial
from regraft.scores import Interval
from regraft.training import Diverged, Halted
from regraft.winner import FIRST_FOLDS, SURE, answer_of, decide, eligible

ENOUGH_HELD_OUT = 1000
"""Where the first folds hold so many pictures, no more are asked: the time is better spent on other candidates."""
SLOWER = 0.1
SPARE = 1.1
"""Estimates of time are taken so much higher."""
FINAL = 0.9
"""The final fit takes so many times as long as a fold for as many pictures: it has all cores, and judges none."""
FORWARD = 0.4
"""Share of a step that answering the same pictures takes."""
UNTRAINABLE = (TrainingError, BackboneError, CutError, RuntimeError, MemoryError)
"""What ends one candidate, not the climb: torch refuses with a RuntimeError what it cannot train or hold in memory."""
FIRST = ("top layers", "scratch", "more layers", "layers dropped")
"""Cheap candidates that often win come first; the others in order of complexity."""
Say = Callable[[str, int, int], None]
_Shared = tuple[str, int, tuple[tuple[str, bool], ...]]


@dataclass(frozen=True)
class Climb:
    """All attempts in order of complexity, the one that won or None for the probe, and what the whole would score.

    forward_passes: pictures pushed through the frozen part for maps. maps: of the winner, for its final fit.
    """

    attempts: tuple[Attempt, ...]
    winner: Attempt | None
    score: Interval
    reason: str
    forward_passes: int
    maps: Maps | None = field(default=None, repr=False)


@dataclass
class _Rung:
    """A candidate on its way.

    outcomes: logits by fold so far; fold, prepared: seconds that training on one and making its maps take, 0 where not
    known yet.
    """

    candidate: Candidate
    outcomes: dict[int, np.ndarray] = field(default_factory=dict)
    slower: float = 1.0
    seconds: float = 0.0
    fold: float = 0.0
    prepared: float = 0.0
    ended: tuple[Status, str] | None = None


@dataclass
class _Way:
    """How a climb stands: what it may spend, what it has used, and the maps that candidates share.

    tested: pictures that the saved model will answer; folds: on how many a candidate is judged; after: seconds to leave
    for what follows the folds in training.
    """

    ground: Ground
    probe: Trial
    budget: Budget
    reserve: float
    say: Say
    tested: int = 0
    folds: int = FIRST_FOLDS
    after: float = 0.0
    maps: dict[_Shared, Maps] = field(default_factory=dict)
    forward_passes: int = 0
    steps: int = 0
    of: int = 0

    def left(self) -> float:
        """Seconds left for candidates and for the final fit."""
        return self.budget.left() - self.reserve


def climb(
    ground: Ground,
    probe: Trial,
    stated: Interval,
    budget: Budget,
    augment: Augment,
    *,
    reserve: float = 0.0,
    tested: int = 0,
    say: Say = lambda what, done, total: None,
) -> Climb:
    """Try what is worth trying while the budget lasts.

    probe: the choice of the curve, with the score `stated` for it; reserve: seconds to leave for what comes after with
    the probe's model, beside the winner's final fit; tested: pictures that the saved model will answer then.
    """
    trained = [_Rung(candidate) for candidate in candidates_for(ground, augment)]
    rungs = [*(_solved(ground, probe) if trained and budget.trials != 0 else ()), *trained]
    folds = list(range(int(ground.task.folds.max()) + 1))
    if FIRST_FOLDS * len(ground.task.labels) >= ENOUGH_HELD_OUT * len(folds):
        folds = folds[:FIRST_FOLDS]
    spent = budget.left() <= reserve
    way = _Way(ground, probe, budget, reserve, say, tested, len(folds), of=2 * len(trained))
    order = sorted(trained, key=lambda r: FIRST.index(r.candidate.name) if r.candidate.name in FIRST else len(FIRST))
    for number, rung in enumerate(order):
        if budget.trials is not None and number >= budget.trials:
            rung.ended = ("skipped", f"the budget of {budget.trials} trials was spent")
            continue
        _advance(way, rung, folds[:FIRST_FOLDS], rungs, len(folds) - FIRST_FOLDS)
        _release(way, rungs)
        if rung.ended is None and not _promising(way, rung):
            rung.ended = ("stopped", "behind the probe on the first folds, in hits and in log-loss")
    going = sorted((r for r in trained if r.ended is None), key=lambda r: -_ahead(way, r))
    kept = len(going) if budget.trials is None else (len(going) + 1) // 2
    for rung in going[kept:]:
        rung.ended = ("stopped", "in the lesser half on the first folds")
    for rung in going[:kept]:
        _advance(way, rung, folds[FIRST_FOLDS:], rungs, 0)
        _release(way, rungs)
    found, (winner, score, reason) = _decided(way, rungs, stated)
    if spent and trained and winner is None:
        reason = "the budget was spent when the curve was done: give more, and another --out, to try anything beyond it"
    maps = way.maps.get(_shared(winner.candidate)) if winner else None
    for shared in way.maps:
        way.forward_passes += sum(way.maps[shared].again)
    return Climb(found, winner, score, reason, way.forward_passes, maps)


def _decided(
    way: _Way, rungs: Sequence[_Rung], stated: Interval
) -> tuple[tuple[Attempt, ...], tuple[Attempt | None, Interval, str]]:
    """All attempts and what is decided, without what another run left in the store and this one cannot train in time.

    A run that is resumed takes the best that it had finished, however little time is left.
    """
    while True:
        found = tuple(_attempt(way, rung) for rung in rungs)
        decided = decide(way.ground.task, way.probe, stated, found)
        rung = next((r for r, a in zip(rungs, found, strict=True) if a is decided[0]), None)
        if rung is None or rung.seconds or way.budget.spent or not rung.candidate.epochs or way.left() == float("inf"):
            return found, decided
        try:
            needed = SPARE * (_final(way, rung) + _preparing(way, rung))
        except UNTRAINABLE as e:
            rung.ended = ("failed", first_line(e))
            continue
        if needed <= way.left():
            return found, decided
        says = f"known from another run, and training it on all pictures would take about {needed:.0f} s"
        rung.ended = ("stopped", f"{says} of the {max(0.0, way.left()):.0f} s left")


def try_alone(ground: Ground, candidate: Candidate, say: Say) -> Attempt:
    """What comes of one candidate on all folds, however long it takes."""
    folds = list(range(int(ground.task.folds.max()) + 1))
    way = _Way(ground, ground.trials[INPUT], Budget(None, None), 0.0, say, of=1)
    rung = _Rung(candidate)
    _advance(way, rung, folds, [rung], 0)
    return _attempt(way, rung)


def candidates_for(ground: Ground, augment: Augment) -> tuple[Candidate, ...]:
    """What is worth trying on this ground (see `worth_trying`)."""
    shown = ground.backbone.shown
    shares = shares_above(ground.backbone.trace, shown)
    places = [Place(cut.name, cut.depth, share) for cut, share in zip(shown, shares, strict=True)]
    singles = [t for t in ground.trials.values() if len(t.views) == 1 and t.name != INPUT]
    best = min(singles, key=lambda t: t.log_loss).name
    return worth_trying(len(ground.task.labels), places, best, augment)


def maps_of(ground: Ground, candidate: Candidate, say: Say) -> Maps:
    """The views that a candidate is trained on, as many as fit into memory. Raises TrainingError where none do."""
    table, chosen, backbone, numerics = ground.bench.table, ground.bench.chosen, ground.backbone, ground.numerics
    examples, ids = [table.examples[i] for i in chosen], [table.ids[i] for i in chosen]
    views, _ = _views_of(ground, candidate)
    if views == 0:
        raise TrainingError(f"What {candidate.name} trains on must fit into memory; {len(ids)} pictures do not.")
    plot = plot_of(ground, candidate)
    if trained_on(ground, candidate) == STORED:
        tell = partial(say, f"computing maps at {candidate.cut}")
        return extract_maps(
            examples, ids, backbone, candidate.cut, table.store, numerics, views, candidate.augment, tell
        )
    spec = input_spec(plot.channels) if plot.takes == "input" else backbone.preprocess
    pictures = picture_views(examples, ids, spec, views, candidate.augment)
    if plot.takes != "map":
        return pictures
    return replace(pictures, lower=freeze_lower(backbone.trace, [candidate.cut], backbone.preprocess, numerics))


def _views_of(ground: Ground, candidate: Candidate) -> tuple[int, int]:
    """How many views a candidate is trained on, by numbers and shapes alone, and the bytes that they take."""
    n, plot = len(ground.task.labels), plot_of(ground, candidate)
    if trained_on(ground, candidate) == STORED:
        views = stored_of(ground, candidate)
        return views, 2 * n * views * math.prod(find_cut(ground.backbone.trace, candidate.cut).shape)
    spec = input_spec(plot.channels) if plot.takes == "input" else ground.backbone.preprocess
    shape = (spec.channels, *spec.size)
    views = views_that_fit(n, shape, 1, candidate.views)
    return views, n * views * math.prod(shape)


def network_probe(ground: Ground, where: np.ndarray | None = None) -> Trial:
    """The probe on the network with the least log-loss out of fold. where: bool (n,), the pictures that are asked."""
    seen = np.ones(len(ground.task.labels), bool) if where is None else where
    return min((t for t in ground.trials.values() if t.name != INPUT), key=lambda t: float(t.losses[0][seen].mean()))


def _solved(ground: Ground, probe: Trial) -> list[_Rung]:
    """The network's best probe beside the raw input's, where that is the answer of the curve: it costs no training."""
    if probe.name != INPUT:
        return []
    network, assignment = network_probe(ground), ground.task.folds[0]
    rung = _Rung(beside_the_input(network.name, network.views[-1].cut))
    for fold in np.unique(assignment):
        held = assignment == fold
        trial = network_probe(ground, ~held)  # chosen without the fold that it answers
        rung.outcomes[int(fold)] = (trial.scores[0] * trial.sharpness).numpy()[None, held]
    return [rung]


def _attempt(way: _Way, rung: _Rung) -> Attempt:
    ended = rung.ended or ("finished", "")
    ground, candidate = way.ground, rung.candidate
    attempt = judged(ground, way.probe, candidate, rung.outcomes, ended, rung.slower, rung.seconds)
    precision = "bfloat16" if trains_in_bfloat16(ground, candidate) else "float32"
    return replace(attempt, trained_on=trained_on(ground, candidate), precision=precision)


def _promising(way: _Way, rung: _Rung) -> bool:
    """Whether a candidate is ahead of the probe in hits or in log-loss on the folds that it has seen."""
    attempt = _attempt(way, rung)
    return any(gain is not None and gain.score > 0 for gain in (attempt.gain, attempt.sharper))


def _ahead(way: _Way, rung: _Rung) -> float:
    """How far a candidate is ahead of the probe in hits and log-loss, each in units of its own noise."""
    attempt = _attempt(way, rung)
    gains = [gain for gain in (attempt.gain, attempt.sharper) if gain is not None]
    return sum(gain.score / max(gain.high - gain.low, 1e-9) for gain in gains) if gains else float("-inf")


def _advance(way: _Way, rung: _Rung, folds: Sequence[int], rungs: Sequence[_Rung], later: int) -> None:
    """Judge a candidate on these folds, or say why not.

    later: how many folds the best of `rungs` still needs after these.
    """
    started = time.monotonic()
    way.steps += 1
    way.say(f"trying {rung.candidate.name}", way.steps, way.of)
    try:
        missing = _settled(way, rung, folds, rungs, later)
        if not missing:
            return
        _train(way, rung, missing)
    except Diverged as e:
        rung.ended = ("failed", f"{e} It was tried again at a tenth of the rate.")
    except Halted:
        rung.ended = ("unfinished", "the time ran out while it trained")
    except UNTRAINABLE as e:
        rung.ended = ("failed", first_line(e))
    rung.seconds += time.monotonic() - started


def _settled(way: _Way, rung: _Rung, folds: Sequence[int], rungs: Sequence[_Rung], later: int) -> list[int]:
    """The folds to train a candidate on, at the longest of its lengths that is known or expected to end in time.

    Empty where all are known, or where not even the shortest would end: then it is told so. Once judged at a length it
    stays at it, and where not all folds would end is judged on some more, side by side, if it may win then. What a run
    that is resumed had finished goes before what is longer.
    """
    full, ground = rung.candidate, way.ground
    endless = way.left() == float("inf")
    lengths = (full,) if rung.outcomes or endless else (full, *shortened(full, len(ground.task.labels)))
    known = [(candidate, recalled(ground, candidate, folds)) for candidate in lengths]
    if way.budget.spent:
        known.sort(key=lambda pair: len(pair[1]) < len(folds))
    rivals: list[_Rung] | None = None
    needed = 0.0
    for candidate, outcomes in known:
        _cut_to(rung, candidate)
        missing = [fold for fold in folds if fold not in outcomes]
        if missing and way.left() > 0 and not endless:
            rivals = _rivals(way, rung, rungs, later) if rivals is None else rivals
            way.after = _after(way, rung, rivals, later)
            needed = _own(way, rung, missing) + way.after
        if not missing or endless or way.left() >= needed > 0:
            _take(rung, outcomes)
            return missing
    _cut_to(rung, full)
    what = "its other folds and the final fit" if rung.outcomes else "it and what must follow"
    even = f"even in {lengths[-1].epochs} epochs " if len(lengths) > 1 else ""
    takes = f"{even}{what} would take about {needed:.0f} s of the {way.left():.0f} s left"
    reason = takes if way.left() > 0 else "no time was left"
    if not rung.outcomes:
        rung.ended = ("skipped", reason)
        return []
    rung.ended = ("unfinished", reason)
    _take(rung, known[0][1])
    some = missing[: workers(ground)]
    enough = int(np.isin(ground.task.folds[0], [*rung.outcomes, *some]).sum()) >= SURE
    return some if enough and way.left() >= _own(way, rung, some) + way.after > 0 else []


def _rivals(way: _Way, rung: _Rung, rungs: Sequence[_Rung], later: int) -> list[_Rung]:
    """The others that may be the answer; while folds are to come, the one that is furthest ahead."""
    judged = [r for r in rungs if r.outcomes and r.candidate.epochs and r is not rung]
    if later:
        going = (r for r in judged if r.ended is None)
        return sorted(going, key=lambda r: -_ahead(way, r))[:1]
    everywhere = np.ones(len(way.ground.task.labels), bool)
    found = [(r, _attempt(way, r)) for r in judged]
    return [r for r, a in found if answer_of(way.probe, eligible([a], way.folds), way.ground.task.groups, everywhere)]


def _take(rung: _Rung, known: Mapping[int, tuple[np.ndarray, float]]) -> None:
    """Add what was trained before."""
    rung.outcomes |= {fold: rows for fold, (rows, _) in known.items()}
    rung.slower = min([rung.slower, *(slower for _, slower in known.values())])


def _cut_to(rung: _Rung, candidate: Candidate) -> None:
    """Go on with another length of a candidate: what it takes follows from what was measured."""
    rung.fold *= candidate.epochs / rung.candidate.epochs
    rung.prepared *= candidate.views / rung.candidate.views
    rung.candidate = candidate


def _own(way: _Way, rung: _Rung, folds: Sequence[int]) -> float:
    """Seconds that a candidate takes on these folds, its maps included."""
    return SPARE * (_preparing(way, rung) + -(-len(folds) // workers(way.ground)) * _fold(way, rung))


def _after(way: _Way, rung: _Rung, rivals: Sequence[_Rung], later: int) -> float:
    """Seconds that must follow with this candidate or with a rival: `later` folds and the final fit."""
    few = FIRST_FOLDS * len(way.ground.task.labels) < SURE * way.folds  # on the first folds alone it cannot win
    going = [*rivals, rung] if few else rivals
    rest = -(-later // workers(way.ground)) * max((_fold(way, r) for r in going), default=0.0)
    return SPARE * (rest + max(_final(way, rung), *(_final(way, r) + _preparing(way, r) for r in rivals), 0.0))


def _fold(way: _Way, rung: _Rung) -> float:
    """Seconds to train a candidate on one fold; what was recalled has not been timed yet."""
    rung.fold = rung.fold or fold_seconds(way.ground, rung.candidate)
    return rung.fold


def _preparing(way: _Way, rung: _Rung) -> float:
    """Seconds to make the maps of a candidate, none where as many views are at hand."""
    cut, views, varied = _shared(rung.candidate)
    if any(held[0] == cut and held[1] >= views and held[2] == varied for held in way.maps):
        return 0.0
    rung.prepared = rung.prepared or map_seconds(way.ground, rung.candidate)
    return rung.prepared


def _final(way: _Way, rung: _Rung) -> float:
    """Seconds that the final fit of a candidate takes, and its part in answering the test pictures."""
    n, folds = len(way.ground.task.labels), int(way.ground.task.folds.max()) + 1
    once = _fold(way, rung) / max(1, rung.candidate.epochs) / (n * (1 - 1 / folds))  # seconds of a picture in an epoch
    return once * (FINAL * n * rung.candidate.epochs + FORWARD * way.tested)


def _train(way: _Way, rung: _Rung, folds: Sequence[int]) -> None:
    """Train a candidate on these folds, side by side; an error or an interrupt stops all of them soon."""
    ground, candidate = way.ground, rung.candidate
    end = time.monotonic() + way.left() - way.after

    def say(what: str, done: int, total: int) -> None:
        if time.monotonic() > end:
            raise Halted
        way.say(what, done, total)

    shared = _shared(candidate)
    if shared not in way.maps:
        _make_room(way, _views_of(ground, candidate)[1])
        way.maps[shared] = maps_of(ground, candidate, say)
        way.forward_passes += way.maps[shared].forward_passes
    maps = way.maps[shared]
    halted = threading.Event()

    def one(fold: int) -> tuple[np.ndarray, float]:
        halt = lambda: halted.is_set() or time.monotonic() > end  # noqa: E731
        try:
            return train_fold(ground, candidate, maps, fold, halt=halt), 1.0
        except Diverged:
            return train_fold(ground, candidate, maps, fold, slower=SLOWER, halt=halt), SLOWER

    started = time.monotonic()
    with side_by_side(workers(ground)) as pool:
        futures = {fold: pool.submit(one, fold) for fold in folds}
        try:
            for fold, future in futures.items():
                rung.outcomes[fold], slower = future.result()
                rung.slower = min(rung.slower, slower)
                remember(ground, candidate, fold, rung.outcomes[fold], slower)
        except BaseException:
            halted.set()
            for future in futures.values():
                future.cancel()
            raise
    rung.fold = (time.monotonic() - started) / -(-len(folds) // workers(ground))


def _release(way: _Way, rungs: Sequence[_Rung]) -> None:
    """Let go of the maps that no candidate still needs."""
    able = [r for r in rungs if r.ended is None or (r.ended[0] == "unfinished" and len(r.outcomes) >= FIRST_FOLDS)]
    needed = {_shared(rung.candidate) for rung in able}
    for shared in [shared for shared in way.maps if shared not in needed]:
        _let_go(way, shared)


def _make_room(way: _Way, wanted: int) -> None:
    """Let go of maps, the oldest first, until so many bytes more may be held: they are in the store, or made again."""
    for shared in list(way.maps):
        if not fit_together(way.maps.values(), wanted):
            _let_go(way, shared)


def _let_go(way: _Way, shared: _Shared) -> None:
    way.forward_passes += sum(way.maps.pop(shared).again)


def _shared(candidate: Candidate) -> _Shared:
    """What candidates have in common that train on the same maps."""
    return candidate.cut, candidate.views, tuple(candidate.augment.to_json().items())
