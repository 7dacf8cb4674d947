"""Scores and how sure one can be of them, against simulations with a known truth and examples done by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from regraft.scores import (
    Interval,
    balanced_accuracy,
    bootstrap_interval,
    calibration_error,
    confusion,
    fit_sharpness,
    log_loss,
    paired_difference,
    widened,
)


def alone(n: int) -> np.ndarray:
    return np.arange(n)


# --- intervals ---


@pytest.mark.parametrize(("truth", "n"), [(0.5, 60), (0.8, 30), (0.9, 120), (0.98, 50)])
def test_bootstrap_interval_covers_a_known_accuracy_about_as_often_as_it_says(truth: float, n: int) -> None:
    rng = np.random.default_rng(0)
    intervals = [bootstrap_interval((rng.random(n) < truth).astype(float), alone(n)) for _ in range(600)]
    covered = np.mean([i.low <= truth <= i.high for i in intervals])
    width = np.mean([i.high - i.low for i in intervals])
    binomial = 2 * 1.96 * np.sqrt(truth * (1 - truth) / n)
    print(f"accuracy {truth}, {n} examples: covered {covered:.1%}, width {width / binomial:.2f} of the binomial one")
    assert covered >= 0.92
    assert 0.85 < width / binomial < 1.25


def test_bootstrap_interval_of_grouped_examples_covers_their_mean() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(600):
        hits = np.repeat(rng.random(40) < 0.8, 5).astype(float)  # five pictures of each thing, all right or all wrong
        interval = bootstrap_interval(hits, np.repeat(np.arange(40), 5))
        covered += interval.low <= 0.8 <= interval.high
    assert 0.89 <= covered / 600 <= 0.99


def test_groups_widen_the_interval_when_their_members_agree() -> None:
    hits = np.repeat(np.arange(40) % 5 > 0, 5).astype(float)
    together, apart = bootstrap_interval(hits, np.repeat(np.arange(40), 5)), bootstrap_interval(hits, alone(200))
    assert together.score == apart.score == 0.8
    assert together.high - together.low > 1.8 * (apart.high - apart.low)


def test_names_and_order_of_groups_do_not_matter() -> None:
    hits, groups = np.array([1.0, 0, 1, 1, 0, 1]), np.array([7, 7, 2, 9, 2, 9])
    renamed = np.array([0, 0, 5, 9, 5, 9])
    found, other = bootstrap_interval(hits, groups), bootstrap_interval(hits, renamed)
    assert found.score == other.score == pytest.approx(4 / 6)
    assert (found.low, found.high) == pytest.approx((other.low, other.high), abs=0.05)


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("n", [1, 5, 20, 500])
def test_unanimous_hits_are_not_held_certain(value: float, n: int) -> None:
    interval = bootstrap_interval(np.full(n, value), alone(n))
    assert interval.score == value
    assert interval.low <= value <= interval.high
    assert 2 / (n + 2) <= interval.high - interval.low <= 4 / (n + 2)  # the rule of three
    assert 0 <= interval.low <= interval.high <= 1


def test_interval_shrinks_with_the_root_of_the_number_of_examples() -> None:
    rng = np.random.default_rng(0)
    widths = []
    for n in (200, 800):
        interval = bootstrap_interval((rng.permutation(n) < 0.7 * n).astype(float), alone(n))
        widths.append(interval.high - interval.low)
    assert widths[0] / widths[1] == pytest.approx(2, rel=0.15)


def test_same_hits_have_the_same_interval_every_time() -> None:
    hits = (np.arange(50) % 3 > 0).astype(float)
    assert bootstrap_interval(hits, alone(50)) == bootstrap_interval(hits, alone(50))


# --- differences ---


def test_paired_difference_by_hand() -> None:
    ours, theirs = np.array([1.0, 1, 1, 0]), np.array([0.0, 1, 0, 1])
    found = paired_difference(ours, theirs, alone(4))
    # Differences 1, 0, 1, -1: mean 1/4, deviation sqrt(11/12), standard error sqrt(11/48).
    assert found.score == 0.25
    assert found.low == pytest.approx(0.25 - 1.96 * np.sqrt(11 / 48))
    assert found.high == pytest.approx(0.25 + 1.96 * np.sqrt(11 / 48))


def test_paired_difference_of_groups_by_hand() -> None:
    ours, theirs = np.array([1.0, 1, 1, 0, 1, 1]), np.array([0.0, 0, 1, 0, 1, 0])
    found = paired_difference(ours, theirs, np.array([4, 4, 8, 8, 9, 9]))
    # Sums of the groups 2, 0, 1 around their mean 1: standard error of the sum sqrt((1 + 1 + 0) 3 / 2) = sqrt(3).
    assert found.score == 0.5
    assert found.high - found.score == pytest.approx(1.96 * np.sqrt(3) / 6)


def test_paired_difference_is_surer_than_the_two_scores_it_is_of() -> None:
    rng = np.random.default_rng(0)
    theirs = (rng.random(300) < 0.7).astype(float)
    ours = np.where(rng.random(300) < 0.05, 1.0, theirs)
    paired = paired_difference(ours, theirs, alone(300))
    single = bootstrap_interval(ours, alone(300))
    assert paired.high - paired.low < 0.5 * (single.high - single.low)
    assert paired.score == -paired_difference(theirs, ours, alone(300)).score


def test_paired_difference_covers_the_true_one() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        easy = rng.random(80)
        ours, theirs = (easy + rng.normal(0, 0.2, 80) > 0.3).astype(float), (easy > 0.4).astype(float)
        truth = 0.0941  # of 10 million draws
        interval = paired_difference(ours, theirs, alone(80))
        covered += interval.low <= truth <= interval.high
    assert 0.91 <= covered / 400 <= 0.98


# --- probabilities ---


@pytest.mark.parametrize("temperature", [0.05, 0.5, 1.0, 4.0])
def test_sharpness_is_the_inverse_of_a_known_temperature(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20_000, 4, generator=generator)
    labels = torch.multinomial(torch.softmax(logits, 1), 1, generator=generator)[:, 0]
    assert fit_sharpness(logits * temperature, labels) == pytest.approx(1 / temperature, rel=0.06)


def test_sharpness_stays_finite_when_scores_are_perfect_useless_or_constant() -> None:
    labels = torch.arange(30) % 3
    perfect = torch.nn.functional.one_hot(labels, 3).float()
    assert fit_sharpness(perfect, labels) > 15
    assert fit_sharpness(1 - perfect, labels) < 0.2
    assert 0 < fit_sharpness(torch.zeros(30, 3), labels) <= 100


def test_log_loss_by_hand() -> None:
    logits = torch.log(torch.tensor([[0.9, 0.1], [0.25, 0.75]]))
    assert log_loss(logits, torch.tensor([0, 0])) == pytest.approx(-(np.log(0.9) + np.log(0.25)) / 2, rel=1e-5)


def test_calibration_error_by_hand() -> None:
    probabilities = np.array([[0.9, 0.1], [0.95, 0.05], [0.4, 0.6], [0.3, 0.7]])
    # In ten bins: 0.9 and 0.95 share one, one of two right, gap 0.425; 0.6 right, gap 0.4; 0.7 wrong, gap 0.7.
    found = calibration_error(probabilities, np.array([0, 1, 1, 0]), bins=10)
    assert found == pytest.approx((2 * 0.425 + 0.4 + 0.7) / 4)


def test_certain_and_right_has_no_calibration_error_and_certain_and_wrong_has_all() -> None:
    assert calibration_error(np.eye(3), np.arange(3)) == 0
    assert calibration_error(np.eye(3), np.array([1, 2, 0])) == 1


def test_drawn_from_its_own_probabilities_a_forecast_has_almost_no_calibration_error() -> None:
    rng = np.random.default_rng(0)
    sure = rng.uniform(0.5, 1, 20_000)
    labels = (rng.random(20_000) > sure).astype(int)
    assert calibration_error(np.stack([sure, 1 - sure], 1), labels) < 0.02


# --- tables ---


def test_confusion_counts_true_classes_down_and_predicted_ones_across() -> None:
    counts = confusion(np.array([1, 1, 2, 0]), np.array([0, 1, 1, 0]), 3)
    assert counts.tolist() == [[1, 1, 0], [0, 1, 1], [0, 0, 0]]


def test_balanced_accuracy_is_the_mean_recall_of_the_classes_that_are_present() -> None:
    counts = confusion(np.array([0, 0, 0, 1, 0, 3]), np.array([0, 0, 0, 0, 1, 3]), 4)
    assert balanced_accuracy(counts) == pytest.approx((3 / 4 + 0 + 1) / 3)  # of class 2 there is nothing


def test_an_interval_for_unseen_pictures_is_wider_by_what_overlapping_heads_hide() -> None:
    found = widened(Interval(0.8, 0.7, 0.85), 1 / 5)
    assert found.score == 0.8
    assert found.low == pytest.approx(0.8 - 0.1 * 1.25**0.5)
    assert found.high == pytest.approx(0.8 + 0.05 * 1.25**0.5)
    assert widened(Interval(0.99, 0.98, 1.0), 1 / 2).high == 1.0
