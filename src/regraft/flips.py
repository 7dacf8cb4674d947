"""Whether mirrored pictures keep their labels: asked of the data, for letters and digits do not.

A probe solved on the other folds answers some held-out pictures as they are and mirrored.
Knows features and probes; nothing of candidates.
"""

from __future__ import annotations

import contextlib

import numpy as np
import torch

from regraft.data import read
from regraft.errors import StoreError
from regraft.files import digest_json
from regraft.finetune import Ground
from regraft.frozen import freeze_lower, run_frozen
from regraft.heads import INPUT
from regraft.preprocess import fit_to_size
from regraft.probe import fit_head, narrowed
from regraft.scores import paired_difference
from regraft.store import FeatureKey, read_features, write_features

ASKED = 192
"""Held-out pictures that are asked about."""
LOST = 0.02
"""Share of right answers that mirrored pictures may lose, beyond the noise."""
FEW = 40
"""Of fewer held-out pictures the loss itself must be so small: its noise says nothing."""


def flips_are_harmless(ground: Ground) -> tuple[bool, int]:
    """Whether mirrored pictures are answered as well as upright ones, and the pictures pushed through for it.

    The answer is kept in the store.
    """
    trials = [t for t in ground.trials.values() if len(t.views) == 1 and t.name != INPUT]
    trial = min(trials, key=lambda t: t.log_loss)
    task, bench, table = ground.task, ground.bench, ground.bench.table
    held = np.flatnonzero(task.folds[0] == 0)
    held = held[np.linspace(0, len(held) - 1, min(ASKED, len(held))).astype(int)]  # of all classes, which lie in order
    ids = [table.ids[bench.chosen[i]] for i in held]
    everything = [[table.ids[i], label] for i, label in zip(bench.chosen, task.labels.tolist(), strict=True)]
    facts = {"features": table.keys[trial.name].digest, "ids": digest_json(ids), "pictures": digest_json(everything)}
    key = FeatureKey({"kind": "flips", **facts})
    known = read_features(table.store, key, ["answer"])
    if not known.missing:
        return bool(known.rows[0, 0]), 0
    learned = np.flatnonzero(task.folds[0] != 0)
    head = fit_head(*narrowed(bench, task, learned), trial)
    upright = np.concatenate([*table.rows(trial.name, bench.chosen[held])()])
    frozen = freeze_lower(ground.backbone.trace, [trial.name], ground.backbone.preprocess, ground.numerics)
    mirrored = []
    size = ground.numerics.batch
    for i in range(0, len(held), size):
        pictures = [read(table.examples[bench.chosen[k]]).decode().pixels[:, ::-1] for k in held[i : i + size]]
        prepared = torch.stack([fit_to_size(np.ascontiguousarray(p), ground.backbone.preprocess) for p in pictures])
        mirrored.append(run_frozen(frozen, prepared)[0].reshape(len(prepared), -1))
    labels = torch.from_numpy(task.labels[held])
    hits = [
        (head.logits({trial.name: rows}).argmax(1) == labels).numpy().astype(np.float64)
        for rows in (np.concatenate(mirrored), upright)
    ]
    lost = paired_difference(hits[1], hits[0], task.groups[held])
    harmless = lost.low <= LOST and (len(held) >= FEW or lost.score <= LOST)
    with contextlib.suppress(StoreError):
        write_features(table.store, key, ["answer"], np.array([[float(harmless)]], np.float32))
    return harmless, len(held)
