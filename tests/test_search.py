"""The choice of a cut follows its rule, on trials made by hand, and finds the best cut of tables made for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from regraft.heads import INPUT, View
from regraft.probe import Task, Trial
from regraft.scores import bootstrap_interval, widened
from regraft.search import Choice, choose, curve_interval, run_trials
from tables import bench_of, classes, pixels, task_of, telling, useless

N = 200
TASK = task_of(classes(N, 2))
REPEATS = len(TASK.folds)


def trial(name: str, hits: np.ndarray, *, loss: float | np.ndarray = 0.5, depth: int = 1) -> Trial:
    """A trial with these hits, bool (n,) in every repeat or (repeats, n), and these log-losses."""
    fold_hits = np.broadcast_to(hits, (REPEATS, N)).astype(bool)
    losses = np.broadcast_to(loss, fold_hits.shape).astype(np.float32)
    return Trial(name, depth, (View(name, 1, 4, True),), 0.1, 1.0, fold_hits, losses, torch.zeros(REPEATS, N, 2))


def right(share: float, *, seed: int | None = None) -> np.ndarray:
    """Hits on this share of the examples: the same ones for nested shares, or drawn."""
    order = np.arange(N) * 73 % N if seed is None else np.random.default_rng(seed).permutation(N)
    return order < share * N


# --- the rule ---


def test_cut_that_is_clearly_best_is_chosen_whatever_its_log_loss() -> None:
    found = choose([trial(INPUT, right(0.5)), trial("a", right(0.6), loss=0.1), trial("b", right(0.9), loss=2.0)], TASK)
    assert (found.trial.name, found.best.name, found.helps) == ("b", "b", True)
    assert found.gain.score == pytest.approx(0.4)
    assert found.gain.low > 0.3


def test_among_equals_the_least_log_loss_is_chosen() -> None:
    close = right(0.9) & ~(np.arange(N) % 97 == 0)  # a few hits fewer than the best, and a surer forecast
    trials = [trial(INPUT, right(0.5)), trial("a", right(0.9), loss=0.4), trial("b", close, loss=0.3)]
    assert trials[2].hits.mean() < trials[1].hits.mean()
    found = choose(trials, TASK)
    assert (found.trial.name, found.best.name) == ("b", "a")
    assert found.reason.startswith("transfer helps: ")
    assert "b is as good as a within the noise and has the least log-loss" in found.reason


def test_difference_that_is_small_but_sure_parts_two_cuts() -> None:
    worse = right(0.9) & ~right(0.06)  # always wrong where the other is, and on 12 more
    found = choose([trial(INPUT, right(0.5)), trial("a", right(0.9)), trial("b", worse, loss=0.1)], TASK)
    assert found.trial.name == "a"


def a_little_better() -> np.ndarray:
    better = right(0.80)
    better[np.flatnonzero(~better)[:2]] = True
    return better


def test_network_that_is_surer_and_not_ahead_in_hits_may_help_unless_it_is_behind_beyond_the_noise() -> None:
    surer = 0.49 + 0.3 * np.sin(np.arange(N))
    found = choose([trial(INPUT, a_little_better()), trial("a", right(0.8), loss=surer)], TASK)
    assert (found.trial.name, found.helps) == ("a", False)
    assert found.reason.startswith("transfer may help: -1.0 points")
    found = choose([trial(INPUT, right(0.9)), trial("a", right(0.8), loss=surer)], TASK)
    assert found.trial.name == INPUT
    assert found.reason.startswith("transfer does not help here: ")


@pytest.mark.parametrize("loss", [0.5, 0.51])
def test_input_is_kept_when_nothing_beats_it_beyond_the_noise_or_in_log_loss(loss: float) -> None:
    found = choose([trial(INPUT, right(0.8)), trial("a", a_little_better(), loss=loss), trial("b", right(0.7))], TASK)
    assert (found.trial.name, found.best.name, found.helps) == (INPUT, "a", False)
    assert found.gain.low <= 0 < found.gain.score
    assert found.reason.startswith("transfer does not help here: ")
    assert "+1.0 points (-" in found.reason


def test_network_that_is_ahead_within_the_noise_is_taken_by_its_log_loss_and_no_help_is_claimed() -> None:
    surer = 0.49 + 0.3 * np.sin(np.arange(N))  # lower in the mean, not beyond the noise
    trials = [trial(INPUT, right(0.8)), trial("a", a_little_better(), loss=surer), trial("b", right(0.2))]
    found = choose(trials, TASK)
    assert (found.trial.name, found.helps) == ("a", False)
    assert found.gain.low <= 0 < found.gain.score
    assert found.sharper.low <= 0 < found.sharper.score
    assert found.reason.startswith("transfer may help: +1.0 points (-")
    assert found.reason.endswith("within the noise; a has the least log-loss")


def test_score_of_an_undecided_choice_is_nested_with_the_input_among_the_picks() -> None:
    loss = 0.49 + 0.3 * np.sin(np.arange(N))
    raw, a = trial(INPUT, right(0.8)), trial("a", a_little_better(), loss=loss)
    found = choose([raw, a], TASK)
    expected = np.zeros(TASK.folds.shape)
    for r, assignment in enumerate(TASK.folds):
        for fold in np.unique(assignment):
            others, inside = assignment != fold, assignment == fold
            least = min((raw, a), key=lambda t: float(t.losses[r, others].mean()))
            expected[r, inside] = least.fold_hits[r, inside]
    assert raw.hits.mean() <= found.score.score <= a.hits.mean()
    assert found.score.score == pytest.approx(expected.mean(), abs=1e-9)


def test_log_loss_that_is_lower_beyond_the_noise_tells_what_hits_cannot() -> None:
    better = a_little_better()
    surer = 0.4 + 0.1 * np.sin(np.arange(N))
    found = choose([trial(INPUT, right(0.8)), trial("a", better, loss=surer)], TASK)
    assert (found.trial.name, found.helps) == ("a", True)
    assert found.gain.low <= 0 < found.sharper.low
    assert found.reason.endswith("over the raw input, and a log-loss lower by 0.10 (0.09 to 0.11)")


def test_input_that_is_better_than_all_is_kept() -> None:
    found = choose([trial(INPUT, right(0.9)), trial("a", right(0.8), loss=0.01)], TASK)
    assert (found.trial.name, found.helps) == (INPUT, False)
    assert found.gain.high < 0


def test_examples_that_belong_together_make_the_same_gain_unsure() -> None:
    gain = right(0.8)
    gain[:12] = True  # all that is gained lies in one group of twelve pictures
    base = gain.copy()
    base[:12] = False
    trials = [trial(INPUT, base), trial("a", gain)]
    assert choose(trials, TASK).helps
    groups = np.concatenate([np.zeros(12, np.int64), np.arange(12, N)])
    assert not choose(trials, Task(TASK.labels, groups, TASK.folds, 2)).helps


def test_order_of_the_trials_does_not_matter() -> None:
    trials = [trial(INPUT, right(0.5)), trial("a", right(0.8), loss=0.3), trial("b", right(0.8, seed=4), loss=0.2)]
    names = {choose(order, TASK).trial.name for order in (trials, trials[::-1], [trials[1], trials[0], trials[2]])}
    assert names == {"b"}


def test_help_is_seldom_claimed_of_twenty_cuts_that_are_as_good_as_the_input() -> None:
    claims = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        names = [f"cut{i}" for i in range(20)]
        raw, *trials = [trial(n, rng.random(N) < 0.7, loss=rng.exponential(0.5, N)) for n in (INPUT, *names)]
        claims += choose([raw, *trials], TASK).helps
    assert claims <= 6


# --- the score that is stated ---


def test_score_of_a_choice_that_is_never_in_doubt_is_that_of_the_chosen_trial_with_a_wider_interval() -> None:
    found = choose([trial(INPUT, right(0.4)), trial("a", right(0.9))], TASK)
    own = bootstrap_interval(found.trial.hits, TASK.groups)
    assert own == curve_interval(found.trial, TASK)
    assert found.score == widened(own, 1 / (int(TASK.folds.max()) + 1))
    assert found.score.low < own.low < own.high < found.score.high


def test_winner_among_many_equals_is_flattered_and_the_stated_score_is_not() -> None:
    """Thirty forecasts, each right by chance in 70 of 100 cases: the best looks better than it is."""
    own, stated = [], []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        trials = [trial(f"cut{i}", rng.random(N) < 0.7, loss=rng.random()) for i in range(30)]
        found = choose([trial(INPUT, right(0.4)), *trials], TASK)
        own.append(found.best.hits.mean())
        stated.append(found.score.score)
    assert np.mean(own) > 0.74
    assert abs(np.mean(stated) - 0.7) < 0.015


def test_stated_interval_covers_the_truth_as_often_as_it_says() -> None:
    covered = 0
    for seed in range(60):
        rng = np.random.default_rng(1000 + seed)
        trials = [trial(f"cut{i}", rng.random(N) < 0.8) for i in range(5)]
        score = choose([trial(INPUT, right(0.4)), *trials], TASK).score
        covered += score.low <= 0.8 <= score.high
    assert covered >= 52


# --- end to end ---


def search(values: dict[str, np.ndarray], labels: np.ndarray) -> tuple[tuple[Trial, ...], Choice]:
    task = task_of(labels)
    cuts = [(name, depth) for depth, name in enumerate((n for n in values if n != INPUT), 1)]
    trials = run_trials(bench_of(values, labels), task, cuts)
    return trials, choose(trials, task)


def test_middle_cut_is_found_where_it_knows_most() -> None:
    labels = classes(240, 4)
    values = {INPUT: pixels(useless(240, 5))}
    for name, noise in {"a": 3.0, "b": 1.6, "c": 0.55, "d": 1.6, "e": 3.0}.items():
        values[name] = telling(labels, 24, noise=noise, seed=ord(name))[:, None]
    trials, found = search(values, labels)
    score = {t.name: t.hits.mean() for t in trials}
    assert max("abcde", key=lambda name: score[name]) == "c"
    assert "c" in [view.cut for view in found.trial.views]
    assert found.helps
    assert found.gain.score > 0.4
    assert abs(found.score.score - found.trial.hits.mean()) < 0.03
    assert "transfer helps" in found.reason


def test_input_is_found_where_the_pixels_know_and_the_network_does_not() -> None:
    labels = classes(240, 2)
    known = (2.0 * labels - 1)[:, None] * np.ones((1, 200)) * 0.4 + useless(240, 200)
    values = {INPUT: pixels(known), "a": useless(240, 30)[:, None], "b": useless(240, 30, seed=2)[:, None]}
    trials, found = search(values, labels)
    assert trials[0].hits.mean() > 0.9
    assert not found.helps
    assert found.trial.name == INPUT
    assert found.score.score == pytest.approx(trials[0].hits.mean(), abs=0.02)


def test_nothing_is_claimed_where_nothing_knows_anything() -> None:
    labels = classes(150, 3)
    values = {INPUT: pixels(useless(150, 5)), "a": useless(150, 30)[:, None], "b": useless(150, 40, seed=2)[:, None]}
    _, found = search(values, labels)
    assert not found.helps
    assert found.score.low < 1 / 3 < found.score.high


def test_one_cut_is_enough_for_a_search() -> None:
    labels = classes(60)
    trials, found = search({INPUT: pixels(useless(60, 5)), "a": telling(labels, 12, noise=0.5)[:, None]}, labels)
    assert [t.name for t in trials] == [INPUT, "a"]
    assert (found.trial.name, found.helps) == ("a", True)


def test_heads_on_several_cuts_are_tried_and_every_trial_is_told() -> None:
    labels = classes(90)
    values = {INPUT: pixels(useless(90, 5))}
    values |= {name: telling(labels, 8, noise=1.5, seed=ord(name))[:, None] for name in "abcdef"}
    told: list[str] = []
    task = task_of(labels)
    trials = run_trials(bench_of(values, labels), task, list(zip("abcdef", range(1, 7), strict=True)), told.append)
    assert told == list(trials)
    joint = [t for t in trials if len(t.views) > 1]
    assert joint
    for found in joint:
        cuts = [view.cut for view in found.views]
        assert cuts == sorted(cuts)  # shallowest first
        assert found.depth == "abcdef".index(cuts[-1]) + 1
    assert max(t.hits.mean() for t in joint) > max(t.hits.mean() for t in trials if len(t.views) == 1)
