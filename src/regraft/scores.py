"""What a classifier's outputs are worth: log-loss, calibration, and intervals that say how sure one can be.

Hits are 0..1 per example (the mean over repeats of cross-validation). Examples of one group are drawn together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

DRAWS = 1000
SEED = 20061
DRAWN_AT_ONCE = 1_000_000
HALVINGS = 14


@dataclass(frozen=True)
class Interval:
    """A score with its 95 % interval."""

    score: float
    low: float
    high: float


def bootstrap_interval(hits: np.ndarray, groups: np.ndarray) -> Interval:
    """Mean of hits (n,) with the percentile bootstrap's 95 % interval over groups (n,), 1,000 draws (Efron 1979).

    One group that is all right and one that is all wrong, of mean size, are drawn from with the others: without them
    a perfect score on few examples would be held certain, and intervals near 1 would cover the truth too rarely.
    """
    _, index = np.unique(groups, return_inverse=True)
    sizes = np.bincount(index).astype(np.float64)
    sums = np.bincount(index, weights=hits)
    sums, sizes = np.append(sums, [0, sizes.mean()]), np.append(sizes, [sizes.mean()] * 2)
    rng = np.random.default_rng(SEED)
    k = len(sizes)
    at_once = max(1, DRAWN_AT_ONCE // k)
    means = []
    for i in range(0, DRAWS, at_once):
        drawn = rng.integers(0, k, (min(at_once, DRAWS - i), k))
        means.append(sums[drawn].sum(1) / sizes[drawn].sum(1))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    score = float(hits.mean())
    return Interval(score, float(min(low, score)), float(max(high, score)))


def widened(interval: Interval, held_out: float) -> Interval:
    """The interval for pictures not seen yet: wider by sqrt(1 + held_out / (1 - held_out)), within [0, 1].

    held_out: share of the examples in a fold. The heads that were judged are made from overlapping examples, which a
    bootstrap of their hits does not see (Nadeau and Bengio 2003).
    """
    factor = (1 + held_out / (1 - held_out)) ** 0.5
    low = interval.score - factor * (interval.score - interval.low)
    high = interval.score + factor * (interval.high - interval.score)
    return Interval(interval.score, max(0.0, low), min(1.0, high))


def paired_difference(ours: np.ndarray, theirs: np.ndarray, groups: np.ndarray) -> Interval:
    """Mean of ours - theirs, hits (n,) on the same examples, with its normal 95 % interval clustered by group."""
    difference = ours - theirs
    _, index = np.unique(groups, return_inverse=True)
    mean = float(difference.mean())
    residuals = np.bincount(index, weights=difference - mean)
    k = len(residuals)
    error = float(np.sqrt((residuals**2).sum() * k / max(k - 1, 1))) / len(difference)
    return Interval(mean, mean - 1.96 * error, mean + 1.96 * error)


def fit_sharpness(scores: torch.Tensor, labels: torch.Tensor) -> float:
    """The factor that scores (n, classes) are multiplied by before softmax: the inverse of the temperature.

    Where the slope of the log-loss, which is convex in it, changes sign between 0.1 and 100, found by halving on a
    logarithmic scale (temperature scaling, Guo et al. 2017).
    """
    own = scores.gather(1, labels.unsqueeze(1))[:, 0].double().mean()
    low, high = np.log(0.1), np.log(100)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        slope = (torch.softmax(scores * float(np.exp(middle)), 1) * scores).sum(1).double().mean() - own
        low, high = (low, middle) if slope > 0 else (middle, high)
    return float(np.float32(np.exp((low + high) / 2)))


def log_loss(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Mean negative log-probability of labels (n,) under softmax of logits (n, classes)."""
    return float(torch.nn.functional.cross_entropy(logits.float(), labels))


def calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error of probabilities (n, classes), equal-width bins (Naeini et al. 2015)."""
    confidence = probabilities.max(1)
    hit = probabilities.argmax(1) == labels
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [abs(hit[which == b].mean() - confidence[which == b].mean()) * (which == b).mean() for b in np.unique(which)]
    return float(sum(gaps))


def confusion(predicted: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Counts int64 (true class, predicted class)."""
    return np.bincount(labels * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def balanced_accuracy(counts: np.ndarray) -> float:
    """Mean recall over the classes that are present, from a confusion table."""
    support = counts.sum(1)
    present = support > 0
    return float((np.diag(counts)[present] / support[present]).mean())
