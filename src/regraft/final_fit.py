"""The final model of a search: what won, trained on all pictures, and beside it the probe as they were judged."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from regraft.artifact import TransferModel, assemble
from regraft.attempts import Attempt
from regraft.data import Dataset
from regraft.errors import first_line
from regraft.files import digest_json
from regraft.finetune import Ground, fit_all, plot_of
from regraft.heads import Head
from regraft.ladder import SLOWER, UNTRAINABLE, Climb, Say, maps_of, network_probe
from regraft.maps import Maps
from regraft.probe import fit_head
from regraft.scores import Interval
from regraft.training import Checkpoints, Diverged
from regraft.tuned import Grown, Tuned, scaled

AFTER = 4.0
"""Seconds to save the model and write the report."""
LONGER = 1.2
"""The test is expected to take so many times as long as its first pictures say."""


def grown(
    ground: Ground, climbed: Climb, stated: Interval, probed: TransferModel, checkpoints: Path, say: Say
) -> tuple[TransferModel, Climb]:
    """The winner trained on all pictures, its logits and the probe's summed as they were judged; and the climb with it.

    Where it cannot be trained on all pictures, also not at a tenth of its rate, the probe is the answer.
    """
    winner = climbed.winner
    if winner is None:
        return probed, climbed
    if winner.candidate.epochs == 0:
        return _both_probes(ground, climbed, probed), climbed
    maps, module, why = climbed.maps, None, ""
    before = _passes(maps)
    try:
        maps = maps or maps_of(ground, winner.candidate, say)
        say(f"training {winner.candidate.name} on all pictures", 0, 1)
        module = _on_all(ground, winner, maps, checkpoints)
    except Diverged:
        why = "diverged on all pictures"
    except UNTRAINABLE as e:
        why = f"failed on all pictures: {first_line(e)}"
    climbed = replace(climbed, forward_passes=climbed.forward_passes + _passes(maps) - before)
    if module is None:
        reason = f"{winner.candidate.name} was better than the probe, but {why}"
        return probed, replace(climbed, winner=None, score=stated, reason=reason)
    scaled(module, winner.whole * winner.share * winner.own)
    rest = winner.whole * (1 - winner.share)
    tuned = Tuned(plot_of(ground, winner.candidate), module, winner.share)
    head = Head(probed.head.views, probed.head.weight * rest, probed.head.bias * rest)
    if winner.share == 1:
        head = Head((), torch.zeros(len(probed.labels), 0), torch.zeros(len(probed.labels)))
    return assemble(ground.backbone, head, probed.labels, ground.numerics, tuned), climbed


def _on_all(ground: Ground, winner: Attempt, maps: Maps, checkpoints: Path) -> Grown:
    """The winner trained on all pictures, at a tenth of its rate where it diverges."""
    facts = {"candidate": winner.candidate.to_json(), "epochs": winner.epochs, "seed": ground.seed}
    facts |= {"examples": digest_json([ground.bench.table.ids[i] for i in ground.bench.chosen])}
    facts |= {"weights": ground.backbone.source.weights, "numerics": ground.numerics.to_json()}
    facts |= {"labels": digest_json(ground.task.labels.tolist()), "preprocess": ground.backbone.preprocess.to_json()}

    def at(slower: float) -> Grown:
        keep = partial(Checkpoints, checkpoints / f"rate-{slower:g}", facts={**facts, "slower": slower})
        return fit_all(ground, winner.candidate, maps, winner.epochs, slower=slower, checkpoints=keep)

    try:
        return at(winner.slower)
    except Diverged:
        return at(winner.slower * SLOWER)


def _passes(maps: Maps | None) -> int:
    """Pictures that were pushed through the frozen part for these maps."""
    return maps.forward_passes + sum(maps.again) if maps else 0


def _both_probes(ground: Ground, climbed: Climb, probed: TransferModel) -> TransferModel:
    """One head that sums the network's best probe and that on the raw input as they were judged."""
    winner, own = climbed.winner, probed.head
    assert winner is not None
    network = fit_head(ground.bench, ground.task, network_probe(ground))
    ours, theirs = winner.whole * (1 - winner.share), winner.whole * winner.share * winner.own
    weight, bias = torch.cat([own.weight * ours, network.weight * theirs], 1), own.bias * ours + network.bias * theirs
    return assemble(ground.backbone, Head((*own.views, *network.views), weight, bias), probed.labels, ground.numerics)


def seconds_after(model: TransferModel, tested: Dataset | None) -> float:
    """Seconds to save, test and report, from a few test pictures that the probe's model answers."""
    if tested is None:
        return AFTER
    batch = model.numerics.batch
    list(model.answers(tested.examples[:batch]))  # the first one sets things up
    some = tested.examples[batch : 3 * batch] or tested.examples
    started = time.perf_counter()
    list(model.answers(some))
    return AFTER + LONGER * len(tested.examples) * (time.perf_counter() - started) / len(some)
