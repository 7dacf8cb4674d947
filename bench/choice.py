"""Is the choice of the cut sound, and does the stated interval hold? Many small draws, judged on test features.

    python bench/choice.py DATA_FOLDER [--draws 50] [--sizes 100,300] [--sets fashion,...] [--keep FOLDER]
    python bench/choice.py DATA_FOLDER --verdicts

For each draw of n training pictures: the rule chooses; its stated 95 % interval is held against the accuracy of the
chosen head on all test pictures; regret is the best trial's test accuracy less the chosen one's. `always deepest`
is the regret of taking the last cut without looking. Three rules are compared on the same draws: least log-loss among
the equals of the best mean (ours), the best mean alone, the least log-loss alone. --verdicts shuffles the pixels of
fashion and digits by one fixed permutation (transfer must not help) and runs photos (it must).
"""

from __future__ import annotations

import argparse
import datetime
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from regraft.backbone import load_backbone
from regraft.data import Dataset, from_arrays, load_data, read, subset
from regraft.depth_curve import faithful_numerics
from regraft.features import FeatureTable, extract
from regraft.heads import INPUT
from regraft.probe import Bench, Task, Trial, all_grey, fit_head
from regraft.recipe import curve
from regraft.search import choose, run_trials
from regraft.splits import fold_assignments, together
from regraft.store import open_store

GROUPS = {"emoji": r"([^/]+)-[^-]+$"}
RESULTS = Path(__file__).parent / "RESULTS.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--draws", type=int, default=50)
    parser.add_argument("--sizes", default="100,300")
    parser.add_argument("--sets", default="fashion,mnist10k,silhouettes,emoji")
    parser.add_argument("--keep", type=Path, default=None)
    parser.add_argument("--verdicts", action="store_true")
    options = parser.parse_args()
    lines = [f"\n## Choice, {datetime.date.today()}\n"]
    if options.verdicts:
        lines += verdicts(options.data)
    else:
        keep = options.keep or Path(tempfile.mkdtemp())
        sizes = [int(n) for n in options.sizes.split(",")]
        lines += draws(options.data, options.sets.split(","), sizes, options.draws, keep)
    print("\n".join(lines))
    with RESULTS.open("a") as f:
        f.write("\n".join(lines) + "\n")


def draws(data: Path, sets: list[str], sizes: list[int], count: int, keep: Path) -> list[str]:
    """One row per set and size, and their mean."""
    out = [
        "| set | pictures | draws | covered | stated | test | regret | best mean | least log-loss | deepest |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    keep.mkdir(parents=True, exist_ok=True)
    everything: list[tuple[float, ...]] = []
    for name in sets:
        names = [(n, seed, keep / f"{name}_{n}_{seed}.npz") for n in sizes for seed in range(count)]
        missing = [(n, seed, path) for n, seed, path in names if not path.exists()]
        if missing:
            draw(data / name, GROUPS.get(name), missing)
        for n in sizes:
            rows = [judge(*loaded(path)) for size, _, path in names if size == n]
            everything += rows
            out.append(f"| {name} | {n} | {len(rows)} | " + " | ".join(_cells(rows)) + " |")
            print(out[-1], flush=True)
    out.append(f"| all | | {len(everything)} | " + " | ".join(_cells(everything)) + " |")
    return out


def draw(folder: Path, group: str | None, wanted: list[tuple[int, int, Path]]) -> None:
    """Draw, try every trial, judge each on all test features, and store what came of it."""
    backbone = load_backbone()
    cuts = [(cut.name, cut.depth) for cut in backbone.shown]
    numerics, _ = faithful_numerics(backbone, "auto")
    dataset = load_data(folder, group=group)
    train, test = (
        extract(subset(dataset, split), backbone, [name for name, _ in cuts], open_store(), numerics)
        for split in ("train", "test")
    )
    labels = np.array([e.label for e in train.examples])
    truth = torch.tensor([e.label for e in test.examples])
    for n, seed, path in wanted:
        chosen = stratified(labels, n, np.random.default_rng(seed))
        bench = Bench(train, chosen, all_grey(train, chosen))
        groups = together([train.pixels[i] for i in chosen], [train.examples[i].group for i in chosen])
        folds = fold_assignments(labels[chosen], groups, seed=seed)
        task = Task(labels[chosen], groups, folds, len(dataset.labels))
        trials = run_trials(bench, task, cuts)
        np.savez(
            path,
            labels=task.labels,
            groups=groups,
            folds=folds,
            names=[t.name for t in trials],
            depths=[t.depth for t in trials],
            hits=np.stack([t.fold_hits for t in trials]),
            losses=np.stack([t.losses for t in trials]),
            test=[test_accuracy(t, bench, task, test, truth) for t in trials],
        )


def loaded(path: Path) -> tuple[Task, list[Trial], np.ndarray]:
    """A stored draw: its task, its trials without their heads, and each trial's accuracy on the test features."""
    with np.load(path) as kept:
        task = Task(kept["labels"], kept["groups"], kept["folds"], int(kept["labels"].max()) + 1)
        nothing = torch.empty(0)
        trials = [
            Trial(str(name), int(depth), (), 0.0, 0.0, hits, losses, nothing)
            for name, depth, hits, losses in zip(
                kept["names"], kept["depths"], kept["hits"], kept["losses"], strict=True
            )
        ]
        return task, trials, kept["test"]


def judge(task: Task, trials: list[Trial], test: np.ndarray) -> tuple[float, ...]:
    """covered, stated, test, and the regrets: our rule, best mean, least log-loss, deepest cut."""
    choice = choose(trials, task)
    found = {t.name: float(accuracy) for t, accuracy in zip(trials, test, strict=True)}
    network = [t for t in trials if t.name != INPUT]
    mean = max(network, key=lambda t: t.hits.mean())
    sharp = min(network, key=lambda t: t.log_loss)
    deepest = max((t for t in network if "+" not in t.name), key=lambda t: t.depth)
    ours, best = found[choice.trial.name], max(found.values())
    covered = choice.score.low <= ours <= choice.score.high
    others = (best - found[t.name] for t in (mean, sharp, deepest))
    return float(covered), choice.score.score, ours, best - ours, *others


def test_accuracy(trial: Trial, bench: Bench, task: Task, test: FeatureTable, truth: torch.Tensor) -> float:
    """Accuracy on the test features of the head fitted on the draw."""
    head = fit_head(bench, task, trial)
    rows = Bench(test, np.arange(len(test.ids)), bench.grey).rows(trial.views)
    said = torch.cat([(torch.from_numpy(x.astype(np.float32)) @ head.weight.T + head.bias).argmax(1) for x in rows()])
    return float((said == truth).float().mean())


def stratified(labels: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """n indices with about the same share of each class as in labels, at least 2 of each."""
    order = rng.permutation(len(labels))
    classes = np.unique(labels)
    first = np.concatenate([order[labels[order] == c][:2] for c in classes])
    rest = order[~np.isin(order, first)][: n - len(first)]
    return np.sort(np.concatenate([first, rest]))


def verdicts(data: Path) -> list[str]:
    """Two tasks where transfer cannot help, and one where it must."""
    out = ["| task | transfer helps | chosen | gain of the best cut over the input, points |", "|---|---|---|---|"]
    tasks: list[tuple[str, Dataset]] = [
        ("fashion, pixels shuffled", shuffled(load_data(data / "fashion"), 28)),
        ("digits, pixels shuffled", shuffled(load_data(data / "digits"), 16)),
        ("photos", load_data(data / "photos")),
    ]
    for name, dataset in tasks:
        choice = curve(dataset).choice
        gain = f"{100 * choice.gain.score:+.1f} ({100 * choice.gain.low:+.1f} to {100 * choice.gain.high:+.1f})"
        out.append(f"| {name} | {'yes' if choice.helps else 'no'} | {choice.trial.name} | {gain} |")
        print(out[-1], flush=True)
    return out


def shuffled(dataset: Dataset, side: int) -> Dataset:
    """The training pictures with their pixels in one fixed random order."""
    order = np.random.default_rng(0).permutation(side * side)
    examples = subset(dataset, "train").examples
    images = [read(e).decode().pixels[..., :1].reshape(-1)[order].reshape(side, side) for e in examples]
    made = from_arrays(images, [dataset.labels[e.label] for e in examples])
    return replace(made, source=f"{dataset.source}, pixels shuffled")


def _cells(rows: list[tuple[float, ...]]) -> list[str]:
    mean = np.mean(rows, axis=0)
    return [f"{100 * mean[0]:.0f} %", f"{mean[1]:.3f}", f"{mean[2]:.3f}", *(f"{100 * m:.2f}" for m in mean[3:])]


if __name__ == "__main__":
    main()
