"""Does the RBM learn what scikit-learn's BernoulliRBM learns? Pseudo-likelihood on digits with the same settings.

    python bench/boltzmann.py

scikit-learn's 8 x 8 digits, scaled to [0, 1], split in half by seed; 100 hidden units, learning rate .05, batches of
10, 20 epochs, persistent contrastive divergence for both; five seeds. The score is the mean pseudo-log-likelihood of
the other half, by each library's own estimate of it (mean of 20 draws).
"""

from __future__ import annotations

import datetime
import statistics
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.neural_network import BernoulliRBM
from torch import nn

from regraft.methods.boltzmann import Machine, pseudo_likelihood
from regraft.training import Plan, Stage, batches_of, shuffled, train

RESULTS = Path(__file__).parent / "RESULTS.md"
HIDDEN, RATE, BATCH, EPOCHS, SEEDS, ESTIMATES = 100, 0.05, 10, 20, 5, 20


def main() -> None:
    values = load_digits().data.astype(np.float32) / 16
    rows = []
    for seed in range(SEEDS):
        order = np.random.default_rng(seed).permutation(len(values))
        learned, judged = np.array_split(values[order], 2)
        rows.append((theirs(learned, judged, seed), ours(learned, judged, seed)))
    sklearn, regraft = (statistics.mean(column) for column in zip(*rows, strict=True))
    lines = [
        f"\n## Boltzmann machine against scikit-learn, {datetime.date.today()}\n",
        "| seed | scikit-learn | regraft |",
        "|---|---|---|",
        *(f"| {seed} | {a:.2f} | {b:.2f} |" for seed, (a, b) in enumerate(rows)),
        f"| mean | {sklearn:.2f} | {regraft:.2f}, {100 * (regraft - sklearn) / abs(sklearn):+.1f} % |",
    ]
    print("\n".join(lines))
    with RESULTS.open("a") as file:
        file.write("\n".join(lines) + "\n")


def theirs(learned: np.ndarray, judged: np.ndarray, seed: int) -> float:
    """Mean pseudo-log-likelihood by scikit-learn."""
    machine = BernoulliRBM(HIDDEN, learning_rate=RATE, batch_size=BATCH, n_iter=EPOCHS, random_state=seed).fit(learned)
    return float(np.mean([machine.score_samples(judged).mean() for _ in range(ESTIMATES)]))


def ours(learned: np.ndarray, judged: np.ndarray, seed: int) -> float:
    """The same by regraft's method and training loop."""
    torch.manual_seed(seed)
    machine = Machine(nn.Linear(learned.shape[1], HIDDEN), BATCH)
    x = torch.from_numpy(learned)
    plan = Plan(EPOCHS, RATE, warmup=0.0, weight_decay=0.0, clipping=None, falls=False, rule="sgd")
    train(
        [Stage("machine", tuple(machine.parameters()))],
        plan,
        lambda epoch: (x[torch.from_numpy(b)] for b in shuffled(np.arange(len(x)), BATCH, seed=seed, epoch=epoch)),
        batches_of(len(x), BATCH),
        machine.contrast,
        seed=seed,
    )
    with torch.no_grad():
        v = torch.from_numpy(judged)
        return float(np.mean([float(pseudo_likelihood(machine, v).mean()) for _ in range(ESTIMATES)]))


if __name__ == "__main__":
    main()
