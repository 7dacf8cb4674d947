"""Training on stored maps against computing the frozen layers again: seconds an epoch, and accuracy with views.

    python bench/stored.py DATA_FOLDER [--pictures 500] [--sets photos,clipart,icons] [--seeds 3] [--only speed]

Speed (aims): the last stage (above blocks.5) from stored maps at least 4 times as fast an epoch as with `lower` run at
every step, with the same accuracy; at the pooled cut, 4 views and 30 epochs at least 5 times as fast as on-line; the
whole at most 1.2 times K x frozen + E x upper. Accuracy: 4 stored views within 1 point of views drawn anew at every
step, out of fold on training pictures, paired, three sets, 3 seeds.
"""

from __future__ import annotations

import argparse
import itertools
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from accuracy import GROUPS
from never_worse import thinned
from regraft.ahead import side_by_side
from regraft.augment import Augment, augmented
from regraft.backbone import Backbone, load_backbone
from regraft.candidates import Candidate
from regraft.data import Example, load_data, read, subset
from regraft.depth_curve import faithful_numerics
from regraft.features import extract
from regraft.finetune import Ground, begin, train_fold, trains_in_bfloat16
from regraft.frozen import FrozenLower, as_map, freeze_lower, values_at_cuts
from regraft.ladder import maps_of
from regraft.learned import consistent, task_of
from regraft.maps import Maps, picture_views
from regraft.preprocess import fit_to_size
from regraft.probe import Bench, all_grey
from regraft.scores import paired_difference
from regraft.search import run_trials
from regraft.store import open_store

CUT, END = "blocks.5", "global_pool"


@dataclass(frozen=True)
class OnLine:
    """Maps as they are without a store: every picture decoded, varied anew and pushed through at every step."""

    examples: list[Example]
    ids: list[str]
    lower: FrozenLower
    augment: Augment
    views: int = 1
    number: itertools.count = field(default_factory=lambda: itertools.count(1))  # type: ignore[type-arg]

    def batch(self, rows: np.ndarray, views: np.ndarray) -> torch.Tensor:
        """A new view of each picture; the picture itself where a fold is judged."""
        judging = len(rows) > 32
        size, out = self.lower.numerics.batch, []
        for i in range(0, len(rows), size):
            pictures = []
            for k in rows[i : i + size]:
                pixels = read(self.examples[k]).decode().pixels
                view = 0 if judging else next(self.number)
                pictures.append(fit_to_size(augmented(pixels, self.ids[k], view, self.augment), self.lower.preprocess))
            out.append(
                torch.from_numpy(as_map(values_at_cuts(self.lower, torch.stack(pictures))[0], self.lower.cuts[0]))
            )
        return torch.cat(out).float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--pictures", type=int, default=500)
    parser.add_argument("--sets", default="photos,clipart,icons")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", choices=["speed", "accuracy"])
    options = parser.parse_args()
    backbone = load_backbone()
    if options.only != "accuracy":
        speed(ground_of(backbone, options.data, options.sets.split(",")[-1], options.pictures, 0))
    if options.only != "speed":
        for name in options.sets.split(","):
            accuracy(backbone, options.data, name, options.pictures, options.seeds)


def ground_of(backbone: Backbone, data: Path, name: str, pictures: int, seed: int) -> Ground:
    """Features, folds and probes of a thinned set, as `fit` has them before it climbs."""
    numerics, _ = faithful_numerics(backbone, "auto")
    dataset = subset(thinned(load_data(data / name, group=GROUPS.get(name)), pictures, seed), "train", "validation")
    table = extract(dataset, backbone, [cut.name for cut in backbone.shown], open_store(), numerics)
    chosen, _ = consistent(table, dataset.labels, False)
    task = task_of(table, chosen, len(dataset.labels), seed)
    bench = Bench(table, chosen, all_grey(table, chosen))
    trials = run_trials(bench, task, [(cut.name, cut.depth) for cut in backbone.shown])
    return Ground(backbone, numerics, bench, task, {t.name: t for t in trials}, seed)


def on_line(ground: Ground, cut: str, augment: Augment) -> OnLine:
    """The same pictures without a store."""
    table, chosen = ground.bench.table, ground.bench.chosen
    lower = freeze_lower(ground.backbone.trace, [cut], ground.backbone.preprocess, ground.numerics)
    return OnLine([table.examples[i] for i in chosen], [table.ids[i] for i in chosen], lower, augment)


def timed(ground: Ground, candidate: Candidate, maps: Maps | OnLine) -> tuple[float, np.ndarray]:
    """Seconds to train on one fold, and the logits of the other."""
    started = time.perf_counter()
    logits = train_fold(ground, candidate, maps, 0, halt=lambda: False)  # type: ignore[arg-type]
    return time.perf_counter() - started, logits[-1]


def speed(ground: Ground) -> None:
    """Seconds, taken in turn."""
    augment = Augment(crop=True)
    stage = Candidate("last stage", "", CUT, END, epochs=2, augment=augment)
    pooled = Candidate("pooled", "", END, END, hidden=(64,), epochs=30, augment=augment)
    table, chosen = ground.bench.table, ground.bench.chosen
    examples, ids = [table.examples[i] for i in chosen], [table.ids[i] for i in chosen]
    started = time.perf_counter()
    stored = maps_of(ground, stage, lambda *_: None)
    filling = time.perf_counter() - started
    lower = freeze_lower(ground.backbone.trace, [CUT], ground.backbone.preprocess, ground.numerics)
    again = Maps(picture_views(examples, ids, ground.backbone.preprocess, stage.views, augment).values, 0, lower)
    ratios, equal = [], True
    for _ in range(3):
        fast, a = timed(ground, stage, stored)
        slow, b = timed(ground, stage, again)
        ratios.append(slow / fast)
        equal &= bool((a.argmax(1) == b.argmax(1)).all())
    print(
        f"{len(ids)} pictures, above {CUT}, {stage.epochs} epochs: stored {fast:.1f} s, lower run again {slow:.1f} s,"
    )
    print(
        f"  ratios {', '.join(f'{r:.1f}' for r in ratios)} (aim 4), same answers: {equal}; filling {filling:.1f} s once"
    )
    model = bare(ground, stage, examples)
    print(f"  filling and training against K x frozen + E x upper, bare: {(filling + fast) / model:.2f} (aim 1.2)")
    started = time.perf_counter()
    kept = maps_of(ground, pooled, lambda *_: None)
    filled = time.perf_counter() - started
    fast, _ = timed(ground, pooled, kept)
    one, _ = timed(ground, replace(pooled, epochs=1), on_line(ground, END, augment))
    print(f"pooled cut, 4 views, 30 epochs: {filled + fast:.1f} s; on-line 30 x {one:.1f} s:")
    print(f"  {30 * one / (filled + fast):.1f} times (aim 5)")


def bare(ground: Ground, candidate: Candidate, examples: list[Example]) -> float:
    """K x (decode and frozen part) + E x (steps of the part above), as plain loops without a store or judging."""
    spec = ground.backbone.preprocess
    lower = freeze_lower(ground.backbone.trace, [candidate.cut], spec, ground.numerics)
    size = ground.numerics.batch
    started = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        pictures = list(pool.map(lambda e: fit_to_size(read(e).decode().pixels, spec), examples))
    batches = [torch.stack(pictures[i : i + size]) for i in range(0, len(pictures), size)]
    with side_by_side() as pool:
        maps = torch.cat(list(pool.map(lambda batch: values_at_cuts(lower, batch)[0].float(), batches)))
    frozen = time.perf_counter() - started
    learned = np.flatnonzero(ground.task.folds[0] != 0)
    part = begin(ground, candidate, learned).requires_grad_(True)
    optimizer = torch.optim.AdamW(part.parameters(), lr=1e-5)
    labels = torch.from_numpy(ground.task.labels)
    started = time.perf_counter()
    for chosen in np.array_split(learned, -(-len(learned) // 32)):
        with torch.autocast("cpu", torch.bfloat16, enabled=trains_in_bfloat16(ground, candidate)):
            out = part(maps[chosen])
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(out.float(), labels[chosen]).backward()
        optimizer.step()
    return candidate.views * frozen + candidate.epochs * (time.perf_counter() - started)


def accuracy(backbone: Backbone, data: Path, name: str, pictures: int, seeds: int) -> None:
    """Out-of-fold hits on two folds with 4 stored views against views drawn anew, paired."""
    ours, theirs, groups = [], [], []
    for seed in range(seeds):
        ground = ground_of(backbone, data, name, pictures, seed)
        candidate = Candidate("last stage", "", CUT, END, epochs=8, augment=Augment(crop=True, mix=True))
        stored = maps_of(ground, candidate, lambda *_: None)
        fresh = on_line(ground, CUT, candidate.augment)
        for fold in (0, 1):
            held = ground.task.folds[0] == fold
            for hits, maps in ((ours, stored), (theirs, fresh)):
                logits = train_fold(ground, candidate, maps, fold, halt=lambda: False)[-1]  # type: ignore[arg-type]
                hits.append(logits.argmax(1) == ground.task.labels[held])
            groups.append([f"{seed} {g}" for g in ground.task.groups[held]])
    index = np.unique(np.concatenate(groups), return_inverse=True)[1]
    mine, other = (np.concatenate(h).astype(float) for h in (ours, theirs))
    gain = paired_difference(mine, other, index)
    print(
        f"{name}: stored views {mine.mean():.4f}, on-line {other.mean():.4f}, difference {100 * gain.score:+.2f} "
        f"({100 * gain.low:+.2f} to {100 * gain.high:+.2f}) points over {len(mine)} answers",
        flush=True,
    )


if __name__ == "__main__":
    main()
