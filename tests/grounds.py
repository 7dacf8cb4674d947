"""What candidates stand on, for tests of fine-tuning: features, folds and probes of tiny pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import nn

import tiny
from regraft.backbone import Backbone, load_backbone
from regraft.data import load_data
from regraft.features import extract
from regraft.finetune import Ground
from regraft.learned import task_of
from regraft.numerics import Numerics
from regraft.probe import Bench
from regraft.search import run_trials
from regraft.store import open_store

NUMERICS = Numerics("cpu", "float32", 16, "test")


def ground_of(root: Path, network: nn.Module | Backbone, *, seed: int = 0, balanced: bool = False) -> Ground:
    """What candidates stand on, in float32: the features of the pictures in a folder, and the probes on them."""
    backbone = network if isinstance(network, Backbone) else load_backbone(network, example=tiny.EXAMPLE)
    data = load_data(root)
    table = extract(data, backbone, [cut.name for cut in backbone.shown], open_store(), NUMERICS)
    chosen = np.arange(len(table.examples))
    bench, task = Bench(table, chosen, False), task_of(table, chosen, len(data.labels), seed)
    trials = run_trials(bench, task, [(cut.name, cut.depth) for cut in backbone.shown])
    return Ground(backbone, NUMERICS, bench, task, {trial.name: trial for trial in trials}, seed, balanced)
