"""The whole procedure against a tuned scikit-learn script, on the same features and the same re-splits.

    python bench/resplit.py DATA_FOLDER [--set photos] [--splits 5]

All pictures of the set (train and test together) are split anew, a quarter for the test, seeded. Ours: probes on every
cut, the rule, the head. scikit-learn: StandardScaler and LogisticRegression on the last layer's features, C and scaling
chosen by 5-fold GridSearchCV.
"""

from __future__ import annotations

import argparse
import datetime
import warnings
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import Normalizer, StandardScaler

from regraft.backbone import load_backbone
from regraft.data import load_data
from regraft.depth_curve import faithful_numerics
from regraft.features import FeatureTable, extract
from regraft.learned import task_of
from regraft.probe import Bench, all_grey, fit_head
from regraft.search import choose, run_trials
from regraft.splits import together
from regraft.store import open_store

RESULTS = Path(__file__).parent / "RESULTS.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--set", default="photos")
    parser.add_argument("--splits", type=int, default=5)
    options = parser.parse_args()
    backbone = load_backbone()
    numerics, _ = faithful_numerics(backbone, "auto")
    cuts = [(cut.name, cut.depth) for cut in backbone.shown]
    dataset = load_data(options.data / options.set)
    table = extract(dataset, backbone, [name for name, _ in cuts], open_store(), numerics)
    labels = np.array([e.label for e in table.examples])
    groups = together(table.ids, table.pixels)
    rows = []
    for seed in range(options.splits):
        folds = StratifiedGroupKFold(4, shuffle=True, random_state=seed)
        train, held = next(iter(folds.split(labels, labels, groups)))
        rows.append((ours(table, train, held, cuts, len(dataset.labels)), reference(table, train, held, labels)))
        print(seed, *(f"{score:.4f}" for score in rows[-1]), flush=True)
    mean = np.mean(rows, axis=0)
    line = (
        f"\n## Re-splits of {options.set}, {datetime.date.today()}\n\n{options.splits} splits of {len(labels)} "
        f"pictures: regraft {mean[0]:.4f} ({', '.join(f'{r[0]:.3f}' for r in rows)}), tuned scikit-learn {mean[1]:.4f} "
        f"({', '.join(f'{r[1]:.3f}' for r in rows)})."
    )
    print(line)
    with RESULTS.open("a") as f:
        f.write(line + "\n")


def ours(table: FeatureTable, train: np.ndarray, held: np.ndarray, cuts: list[tuple[str, int]], classes: int) -> float:
    """Test accuracy of what `fit` would save."""
    bench = Bench(table, train, all_grey(table, train))
    task = task_of(table, train, classes, 0)
    trial = choose(run_trials(bench, task, cuts), task).trial
    head = fit_head(bench, task, trial)
    rows = np.concatenate(list(Bench(table, held, bench.grey).rows(trial.views)())).astype(np.float32)
    said = (torch.from_numpy(rows) @ head.weight.T + head.bias).argmax(1).numpy()
    return float((said == np.array([table.examples[i].label for i in held])).mean())


def reference(table: FeatureTable, train: np.ndarray, held: np.ndarray, labels: np.ndarray) -> float:
    """Test accuracy of tuned logistic regression on the last layer's features."""
    x = np.concatenate(list(table.rows("global_pool")())).astype(np.float32)
    pipeline = Pipeline([("scale", StandardScaler()), ("head", LogisticRegression(max_iter=500))])
    scales = [StandardScaler(), Normalizer(), "passthrough"]
    grid = GridSearchCV(pipeline, {"scale": scales, "head__C": [0.001, 0.01, 0.1, 1, 10, 100]}, cv=5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        grid.fit(x[train], labels[train])
    return float(grid.score(x[held], labels[held]))


if __name__ == "__main__":
    main()
