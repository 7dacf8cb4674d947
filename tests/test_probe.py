"""Probes on cuts: what a head may see, on the same folds, chosen without the fold it is judged on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from regraft.heads import INPUT, Head, View, _signs, linear_module, random_layer
from regraft.probe import Bench, Task, all_grey, fit_head, next_start, probe_cut, probe_several
from regraft.ridge import STRENGTHS, standardise
from regraft.scores import calibration_error
from tables import bench_of, classes, pixels, table_of, task_of, telling, useless

LABELS = classes(150)


def several(bench: Bench, task: Task, cuts: list[str]) -> object:
    return probe_several(bench, task, cuts, cuts, 2, root=False, start=3)


# --- honesty ---


def test_useless_features_score_as_guessing_does_whatever_was_tried() -> None:
    labels = classes(200, 2)
    hits = []
    for seed in range(12):
        grid = useless(200, 160, seed=seed).reshape(200, 16, 10)
        hits.append(probe_cut(bench_of({"a": grid}, labels), task_of(labels, seed=seed), "a", 1).hits.mean())
    # 12 times 200 tosses of a coin: the mean lies within three standard errors of a half, and no higher.
    assert abs(np.mean(hits) - 0.5) < 3 * 0.5 / np.sqrt(12 * 200)


def test_equal_examples_that_share_no_fold_are_not_recognised() -> None:
    """Pairs of equal rows with labels of chance: parted by the folds they would be known by heart."""
    rng = np.random.default_rng(0)
    rows, labels = useless(60, 400).repeat(2, 0), rng.integers(0, 2, 60).repeat(2)
    pairs = np.arange(60).repeat(2)
    kept, parted = (
        probe_cut(bench_of({"a": rows[:, None]}, labels), task_of(labels, groups=g), "a", 1).hits.mean()
        for g in (pairs, np.arange(120))
    )
    assert parted > 0.8
    assert abs(kept - 0.5) < 0.2


def test_every_repeat_has_an_outcome_for_every_example() -> None:
    trial = probe_cut(bench_of({"a": telling(LABELS, 8, noise=1)[:, None]}, LABELS), task_of(LABELS), "a", 4)
    assert (trial.name, trial.depth) == ("a", 4)
    assert trial.fold_hits.shape == trial.losses.shape == (3, 150)
    assert trial.scores.shape == (3, 150, 3)
    assert np.array_equal(trial.fold_hits, (trial.scores.argmax(-1).numpy() == LABELS))
    assert trial.log_loss == pytest.approx(float(trial.losses.mean()))
    assert np.allclose(trial.hits, trial.fold_hits.mean(0))


# --- what is seen ---


def test_place_is_seen_where_the_class_lies_in_it() -> None:
    """Each class is a bright cell somewhere: the mean over the cells is the same for all."""
    labels = classes(160, 4)
    grid = np.random.default_rng(0).normal(0, 0.3, (160, 4, 6))
    grid[np.arange(160), labels] += 1
    trial = probe_cut(bench_of({"a": grid}, labels), task_of(labels), "a", 1)
    assert trial.views == (View("a", 4, 6, whole=True),)
    assert trial.hits.mean() > 0.9


def test_mean_is_seen_where_the_class_lies_anywhere() -> None:
    labels = classes(60)
    grid = np.random.default_rng(0).normal(0, 4, (60, 16, 40)) + telling(labels, 40, noise=0)[:, None] * 4
    trial = probe_cut(bench_of({"a": grid}, labels), task_of(labels), "a", 1)
    assert trial.views == (View("a", 16, 40, whole=False),)


def test_class_token_and_mean_are_seen_together() -> None:
    tokens = np.stack([telling(LABELS, 6, noise=1.5), useless(150, 6)], 1)
    bench = bench_of({"a": tokens}, LABELS)
    assert bench.views("a") == (View("a", 2, 6, whole=True),)
    (rows,) = bench.rows(bench.views("a"))()
    assert np.array_equal(rows, tokens.reshape(150, 12).astype(np.float16))


def test_view_of_a_grid_is_its_mean_or_all_of_it_and_of_grey_input_one_channel() -> None:
    rows = np.arange(2 * 12, dtype=np.float16).reshape(2, 12)
    assert np.array_equal(View("a", 4, 3, whole=True).of(rows), rows)
    assert np.allclose(View("a", 4, 3, whole=False).of(rows), rows.reshape(2, 4, 3).mean(1))
    assert np.array_equal(View(INPUT, 1, 12, whole=True, grey=True).of(rows), rows[:, :4])
    roots = View("a", 4, 3, whole=True, root=True).of(rows - 5)
    assert np.allclose(roots, np.sign(rows - 5) * np.sqrt(np.abs(rows.astype(np.float32) - 5)), atol=1e-3)
    for view in (View("a", 4, 3, True), View("a", 4, 3, False), View(INPUT, 1, 12, True, grey=True)):
        assert view.of(rows).shape == (2, view.dim)
        assert View(**view.to_json()) == view


def test_grey_pictures_are_told_from_coloured_ones() -> None:
    grey = np.random.default_rng(0).integers(0, 256, (20, 1, 1024)).repeat(3, 1).reshape(20, 1, 3072)
    table = table_of({INPUT: grey}, classes(20))
    assert all_grey(table, np.arange(20))
    tinted = grey.copy()
    tinted[7, 0, 1500] += 1
    table = table_of({INPUT: tinted}, classes(20))
    assert not all_grey(table, np.arange(20))
    assert all_grey(table, np.array([0, 6, 8]))
    blue = grey.copy()
    blue[7, 0, 2500] += 1
    assert not all_grey(table_of({INPUT: blue}, classes(20)), np.arange(20))


def test_chosen_rows_are_the_ones_that_are_learned_from() -> None:
    values = {"a": telling(LABELS, 5, noise=1)[:, None]}
    chosen = np.arange(149, -1, -3)
    bench = Bench(table_of(values, LABELS), chosen, False)
    (rows,) = bench.rows(bench.views("a"))()
    assert np.array_equal(rows, values["a"][chosen, 0].astype(np.float16))


# --- the raw input ---


def test_random_layer_gives_each_picture_the_same_bits_whatever_stands_beside_it() -> None:
    levels = np.random.default_rng(0).integers(0, 256, (17, 3072)).astype(np.float16)
    whole = random_layer(levels, 64)
    assert whole.shape == (17, 64)
    assert whole.dtype == np.float32
    for i in range(17):
        assert np.array_equal(random_layer(levels[i : i + 1], 64)[0], whole[i])


def test_random_layer_is_the_rectified_projection_of_the_normalised_picture() -> None:
    levels = np.random.default_rng(1).integers(0, 256, (3, 1024)).astype(np.float64)
    normal = (levels - levels.mean(1, keepdims=True)) / (levels.std(1, keepdims=True) + 1)
    signs = _signs(1024, 8)
    assert set(np.unique(signs)) == {-1, 1}
    assert abs(signs.mean()) < 0.05
    assert np.allclose(random_layer(levels, 8), np.abs(normal @ signs) / 32, atol=1e-4)


def test_random_layer_does_not_see_brightness_and_is_finite_on_one_grey() -> None:
    levels = np.random.default_rng(2).integers(0, 100, (4, 1024)).astype(np.float16)
    assert np.allclose(random_layer(levels, 32), random_layer(levels + 100, 32), atol=1e-4)
    assert np.array_equal(random_layer(np.full((1, 1024), 200, np.float16), 32), np.zeros((1, 32), np.float32))


def test_input_that_only_a_bent_line_parts_is_learned() -> None:
    labels = classes(200, 2)
    rng = np.random.default_rng(3)
    side = rng.choice([-1, 1], 200)
    corner = np.where(labels == 1, side, -side)
    picture = rng.integers(100, 156, (200, 32, 32)).astype(np.float64)
    picture[:, :16] += 60 * side[:, None, None]
    picture[:, :, :16] += 60 * corner[:, None, None]
    values = {INPUT: picture.reshape(200, 1, 1024).repeat(3, 1).reshape(200, 1, 3072).clip(0, 255).round()}
    bench, task = bench_of(values, labels, grey=True), task_of(labels)
    trial = probe_cut(bench, task, INPUT, 0)
    assert trial.hits.mean() > 0.95
    assert trial.views[0].hidden == 2048
    head = fit_head(bench, task, trial)
    said = head.logits({INPUT: values[INPUT][:, 0, :1024]}).argmax(1).numpy()
    assert (said == labels).mean() > 0.95


# --- several cuts ---


def test_two_cuts_that_each_know_half_are_better_together() -> None:
    labels = classes(200, 4)
    values = {"a": telling(labels // 2, 6, noise=0.7, seed=1)[:, None], "b": telling(labels % 2, 6, noise=0.7)[:, None]}
    bench, task = bench_of(values, labels), task_of(labels)
    alone = max(probe_cut(bench, task, cut, 1).hits.mean() for cut in values)
    both = several(bench, task, ["a", "b"])
    assert alone < 0.6
    assert both.hits.mean() > alone + 0.25
    assert [view.cut for view in both.views] == ["a", "b"]
    assert (both.name, both.depth) == ("a+b", 2)


def test_each_of_several_cuts_has_the_same_say_whatever_its_scale_and_width() -> None:
    values = {"a": telling(LABELS, 6, noise=1)[:, None], "b": telling(LABELS, 30, noise=1, seed=3)[:, None]}
    larger = {"a": values["a"], "b": 512 * values["b"]}
    task = task_of(LABELS)
    first, second = (several(bench_of(v, LABELS), task, ["a", "b"]) for v in (values, larger))
    assert torch.allclose(first.scores, second.scores, atol=2e-3)
    bench = bench_of(values, LABELS)
    head = fit_head(bench, task, first)
    (rows,) = bench.rows(first.views)()
    scaled = standardise(bench.rows((first.views[0],))).apply(rows[:, :6])
    assert float(scaled.square().sum(1).mean()) == pytest.approx(1, rel=1e-3)
    assert head.weight.shape == (3, 36)


# --- the final head ---


def test_head_is_the_ridge_of_the_trial_times_its_sharpness() -> None:
    x = telling(LABELS, 10, noise=1.2)
    bench, task = bench_of({"a": x[:, None]}, LABELS), task_of(LABELS)
    trial = probe_cut(bench, task, "a", 1)
    head = fit_head(bench, task, trial)
    rows = x.astype(np.float16)
    z = standardise(bench.rows(trial.views)).apply(rows).double().numpy()
    z = np.concatenate([z, np.ones((150, 1))], 1)
    reference = Ridge(alpha=trial.strength, fit_intercept=False).fit(z, np.eye(3)[LABELS]).predict(z)
    assert np.allclose(head.logits({"a": rows}), trial.sharpness * reference, atol=1e-2)
    assert STRENGTHS[next_start(trial)] == trial.strength


def test_probabilities_out_of_fold_are_calibrated() -> None:
    labels = classes(600)
    for noise in (0.6, 1.0, 2.0):
        trial = probe_cut(bench_of({"a": telling(labels, 20, noise=noise)[:, None]}, labels), task_of(labels), "a", 1)
        probabilities = torch.softmax(trial.scores[0] * trial.sharpness, 1).numpy()
        assert calibration_error(probabilities, labels) < 0.07


def test_logits_of_a_row_do_not_depend_on_its_neighbours() -> None:
    x = telling(LABELS, 700, noise=1).astype(np.float16)
    bench, task = bench_of({"a": x[:, None]}, LABELS), task_of(LABELS)
    head = fit_head(bench, task, probe_cut(bench, task, "a", 1))
    whole = head.logits({"a": x})
    for n in (1, 2, 7, 64):
        assert torch.equal(head.logits({"a": x[:n]}), whole[:n])
        assert torch.equal(head.logits({"a": x[-n:]}), whole[-n:])


def test_head_as_a_torch_layer_gives_the_same_logits() -> None:
    head = Head((View("a", 1, 5, True),), torch.randn(3, 5), torch.randn(3))
    x = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float16)
    layer = linear_module(head)
    with torch.no_grad():
        assert torch.allclose(layer(torch.from_numpy(x).float()), head.logits({"a": x}), atol=1e-5)
    layer.weight.data.zero_()
    assert float(head.weight.abs().sum()) > 0


# --- poor data ---


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        (np.full((12, 1, 4), 3.0), classes(12)),
        (np.linspace(0, 1, 12)[:, None, None], classes(12)),
        (useless(12, 64).reshape(12, 16, 4), classes(12, 6)),
        (useless(6, 5)[:, None], np.array([0, 0, 1, 1, 7, 7])),
        (np.zeros((9, 16, 3)), classes(9)),
    ],
    ids=["constant", "one feature", "two pictures a class", "classes without pictures", "all zero"],
)
def test_poor_features_give_a_finite_trial_and_head(values: np.ndarray, labels: np.ndarray) -> None:
    bench, task = bench_of({"a": values, INPUT: pixels(useless(len(labels), 3))}, labels), task_of(labels)
    for cut in ("a", INPUT):
        trial = probe_cut(bench, task, cut, 1)
        assert np.isfinite(trial.losses).all()
        assert torch.isfinite(trial.scores).all()
        head = fit_head(bench, task, trial)
        assert torch.isfinite(head.weight).all()
        assert torch.isfinite(head.bias).all()
