"""The final model of a search: what won, trained on all pictures, and beside it the probe as they were judged."""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from regraft.artifact import TransferModel, assemble
from regraft.files import digest_json
from regraft.finetune import Ground, fit_all, plot_of
from regraft.heads import Head
from regraft.ladder import SLOWER, Climb, Say, maps_of, network_probe
from regraft.probe import fit_head
from regraft.scores import Interval
from regraft.training import Checkpoints, Diverged
from regraft.tuned import Tuned, scaled

AFTER = 4.0
"""Seconds to save the model and write the report."""


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
    maps = climbed.maps or maps_of(ground, winner.candidate, say)
    before = 0 if climbed.maps is None else maps.forward_passes + sum(maps.again)
    say(f"training {winner.candidate.name} on all pictures", 0, 1)
    facts = {"candidate": winner.candidate.to_json(), "epochs": winner.epochs, "seed": ground.seed}
    facts |= {"examples": digest_json([ground.bench.table.ids[i] for i in ground.bench.chosen])}
    facts |= {"weights": ground.backbone.source.weights, "numerics": ground.numerics.to_json()}
    facts |= {"labels": digest_json(ground.task.labels.tolist())}
    module = None
    for slower in (winner.slower, winner.slower * SLOWER):
        keep = partial(Checkpoints, checkpoints / f"rate-{slower:g}", facts={**facts, "slower": slower})
        with contextlib.suppress(Diverged):
            module = fit_all(ground, winner.candidate, maps, winner.epochs, slower=slower, checkpoints=keep)
            break
    passes = climbed.forward_passes + maps.forward_passes + sum(maps.again) - before
    if module is None:
        reason = f"{winner.candidate.name} was better than the probe, but diverged on all pictures"
        return probed, replace(climbed, winner=None, score=stated, reason=reason, forward_passes=passes)
    scaled(module, winner.whole * winner.share * winner.own)
    rest = winner.whole * (1 - winner.share)
    tuned = Tuned(plot_of(ground, winner.candidate), module, winner.share)
    head = Head(probed.head.views, probed.head.weight * rest, probed.head.bias * rest)
    if winner.share == 1:
        head = Head((), torch.zeros(len(probed.labels), 0), torch.zeros(len(probed.labels)))
    model = assemble(ground.backbone, head, probed.labels, ground.numerics, tuned)
    return model, replace(climbed, forward_passes=passes)


def _both_probes(ground: Ground, climbed: Climb, probed: TransferModel) -> TransferModel:
    """One head that sums the network's best probe and that on the raw input as they were judged."""
    winner, own = climbed.winner, probed.head
    assert winner is not None
    network = fit_head(ground.bench, ground.task, network_probe(ground))
    ours, theirs = winner.whole * (1 - winner.share), winner.whole * winner.share * winner.own
    weight, bias = torch.cat([own.weight * ours, network.weight * theirs], 1), own.bias * ours + network.bias * theirs
    head = Head((*own.views, *network.views), weight, bias)
    if winner.share == 1:
        head = Head(network.views, network.weight * theirs, network.bias * theirs)
    return assemble(ground.backbone, head, probed.labels, ground.numerics)


def seconds_after(model: TransferModel, tested: int) -> float:
    """Seconds to save, test and report, from one timed batch of the probe's model."""
    spec, small = model.preprocess, model.small
    batch = torch.zeros(model.numerics.batch, spec.channels, *spec.size, dtype=torch.uint8)
    reduced = torch.zeros(len(batch), small.channels, *small.size, dtype=torch.uint8) if small else None
    started = time.perf_counter()
    model.run(batch, reduced)
    return AFTER + 2 * tested * (time.perf_counter() - started) / len(batch)
