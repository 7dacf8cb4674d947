"""What a candidate will cost, from a few timed steps: seconds for its maps and for training on one fold; and a picture.

Where maps are stored and where `lower` is run again, and which precision a step has, are rules over shapes (see `maps`
and `finetune`), so that the same run always does the same arithmetic; only what is tried in a time hangs on the clock.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from regraft.backbone import Backbone
from regraft.candidates import BATCH, Candidate
from regraft.data import Example, read
from regraft.errors import PictureError
from regraft.finetune import STORED, Ground, cuts_read, plot_of, trained_on, trains_in_bfloat16
from regraft.frozen import freeze_lower, values_at_cuts
from regraft.graph import find_cut
from regraft.heads import INPUT
from regraft.maps import picture_views
from regraft.numerics import Numerics
from regraft.preprocess import fit_to_size, input_spec
from regraft.training import batches_of
from regraft.tuned import PICTURE, grow

SAMPLED = 3
"""Pictures that are prepared to see how long it takes."""
JUDGING = 1.3
"""Steps, and the answers to the held-out pictures after every epoch, against steps alone."""
FOLDS_AT_ONCE = 5


def fold_seconds(ground: Ground, candidate: Candidate) -> float:
    """Seconds to train on all folds but one, with as many threads as a fold gets."""
    # The probe that it begins as takes long to solve: a head on all cuts that it may read is timed instead.
    plot = replace(plot_of(ground, replace(candidate, fresh=PICTURE)), fresh="")
    if candidate.cut != INPUT:
        views = [view for name in cuts_read(ground, candidate) for view in ground.trials[name].views]
        plot = replace(plot, views=tuple(views))
    module, n = grow(plot, ground.backbone).to(ground.numerics.device), len(ground.task.labels)
    dtype = torch.float32 if plot.takes == "map" else torch.uint8
    x = torch.zeros(min(BATCH, n), *_shape(ground, candidate), dtype=dtype, device=ground.numerics.device)
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // workers(ground)))
    try:
        step = min(_step(ground, candidate, module, x) for _ in range(2))
        if plot.takes == "map" and trained_on(ground, candidate) != STORED:
            step += len(x) * _frozen_seconds(ground, candidate)
    finally:
        torch.set_num_threads(threads)
    folds = int(ground.task.folds.max()) + 1
    return JUDGING * step * candidate.epochs * batches_of(round(n * (1 - 1 / folds)), BATCH)


def map_seconds(ground: Ground, candidate: Candidate) -> float:
    """Seconds to prepare all views of all pictures, through the frozen part where there is one."""
    each = _preparing(ground, candidate) / torch.get_num_threads()
    if trained_on(ground, candidate) == STORED:
        each += _frozen_seconds(ground, candidate)
    return len(ground.task.labels) * candidate.views * each


def _frozen_seconds(ground: Ground, candidate: Candidate) -> float:
    """Seconds to push one picture through the frozen part below the candidate."""
    frozen = freeze_lower(ground.backbone.trace, [candidate.cut], ground.backbone.preprocess, ground.numerics)
    shape = _shape(ground, replace(candidate, cut=PICTURE))
    pictures = torch.zeros(ground.numerics.batch, *shape, dtype=torch.uint8)
    values_at_cuts(frozen, pictures)
    started = time.perf_counter()
    values_at_cuts(frozen, pictures)
    return (time.perf_counter() - started) / len(pictures)


def _preparing(ground: Ground, candidate: Candidate) -> float:
    """Seconds to decode and prepare one view of a picture, from a few of them."""
    table, chosen = ground.bench.table, ground.bench.chosen[:SAMPLED]
    small = candidate.cut == INPUT
    spec = input_spec(plot_of(ground, candidate).channels) if small else ground.backbone.preprocess
    examples, ids = [table.examples[i] for i in chosen], [table.ids[i] for i in chosen]
    started = time.perf_counter()
    picture_views(examples, ids, spec, candidate.views, candidate.augment)
    seconds = (time.perf_counter() - started) * min(torch.get_num_threads(), len(chosen))
    return seconds / (len(chosen) * candidate.views)


def picture_seconds(backbone: Backbone, examples: Sequence[Example], numerics: Numerics) -> float:
    """Seconds to decode and prepare a picture and push it through the network up to its last shown cut."""
    frozen = freeze_lower(backbone.trace, [cut.name for cut in backbone.shown], backbone.preprocess, numerics)
    started = time.perf_counter()
    for example in examples[:SAMPLED]:
        with contextlib.suppress(PictureError):
            fit_to_size(read(example).decode().pixels, backbone.preprocess)
    each = (time.perf_counter() - started) / SAMPLED / torch.get_num_threads()
    pictures = torch.zeros(numerics.batch, backbone.preprocess.channels, *backbone.preprocess.size, dtype=torch.uint8)
    _settle(values_at_cuts(frozen, pictures)[0])
    started = time.perf_counter()
    _settle(values_at_cuts(frozen, pictures)[0])
    return each + (time.perf_counter() - started) / numerics.batch


def workers(ground: Ground) -> int:
    """How many folds are trained at once."""
    return 1 if ground.numerics.device != "cpu" else min(torch.get_num_threads(), FOLDS_AT_ONCE)


def _step(ground: Ground, candidate: Candidate, module: torch.nn.Module, x: torch.Tensor) -> float:
    _settle(x)
    started = time.perf_counter()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=trains_in_bfloat16(ground, candidate)):
        out = module(x)
    out.float().square().mean().backward()
    _settle(x)
    return time.perf_counter() - started


def _settle(x: torch.Tensor) -> None:
    """Wait for what a GPU was given to do."""
    if x.device.type == "cuda":
        torch.cuda.synchronize()


def _shape(ground: Ground, candidate: Candidate) -> tuple[int, ...]:
    if candidate.cut == INPUT:
        spec = input_spec(plot_of(ground, candidate).channels)
    elif candidate.cut == PICTURE:
        spec = ground.backbone.preprocess
    else:
        return find_cut(ground.backbone.trace, candidate.cut).shape
    return (spec.channels, *spec.size)
