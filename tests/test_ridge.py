"""The linear heads: exact, cross-validated without refitting, and streamed; each against an explicit reference."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from regraft import ridge
from regraft.ridge import STRENGTHS, Rows, Standard, cross_validate, fit, standardise

DUAL_SHAPE, PRIMAL_SHAPE = (60, 40), (200, 12)
"""Pictures and features: few and many pictures for the features there are."""


def problem(n: int, dim: int, classes: int = 3, *, seed: int = 0) -> tuple[np.ndarray, torch.Tensor]:
    """Features float32 (n, dim) of unequal scale around unequal centres, and one-hot labels that they tell in part."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    centres = rng.normal(0, 1, (classes, dim))
    x = (centres[labels] + rng.normal(0, 1.5, (n, dim))) * rng.uniform(0.1, 5, dim) + rng.normal(0, 3, dim)
    return x.astype(np.float32), torch.nn.functional.one_hot(torch.from_numpy(labels), classes).float()


def in_blocks(x: np.ndarray, size: int = 10**9) -> Rows:
    return lambda: (x[i : i + size] for i in range(0, len(x), size))


def random_folds(n: int, folds: int, repeats: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.stack([torch.randperm(n, generator=generator) % folds for _ in range(repeats)])


def with_intercept(x: np.ndarray, standard: Standard) -> np.ndarray:
    z = (x.astype(np.float64) - standard.centre.double().numpy()) * standard.scale.double().numpy()
    return np.concatenate([z, np.ones((len(z), 1))], 1)


def refitted(z: np.ndarray, targets: torch.Tensor, folds: torch.Tensor, strength: float) -> np.ndarray:
    """Out-of-fold scores (repeats, n, classes) by fitting scikit-learn's ridge anew without each fold."""
    y = targets.double().numpy()
    out = np.empty((len(folds), *y.shape))
    for r, assignment in enumerate(folds.numpy()):
        for f in np.unique(assignment):
            inside = assignment == f
            model = Ridge(alpha=strength, fit_intercept=False, solver="cholesky").fit(z[~inside], y[~inside])
            out[r, inside] = model.predict(z[inside])
    return out


# --- cross-validation from one factorisation ---


@pytest.mark.parametrize("shape", [DUAL_SHAPE, PRIMAL_SHAPE], ids=["dual", "primal"])
@pytest.mark.parametrize("strength", [STRENGTHS[0], STRENGTHS[3], STRENGTHS[-1]])
def test_out_of_fold_scores_are_those_of_heads_fitted_without_the_fold(shape: tuple[int, int], strength: float) -> None:
    x, targets = problem(*shape)
    standard, folds = standardise(in_blocks(x)), random_folds(len(x), 5, 2)
    start = STRENGTHS.index(strength)
    found = cross_validate(in_blocks(x), standard, targets, folds, start).scores[strength]
    expected = refitted(with_intercept(x, standard), targets, folds, strength)
    assert found.shape == expected.shape
    assert np.abs(found.numpy() - expected).max() < 1e-3
    assert np.abs(found.numpy() - targets.numpy()).max() > 0.1  # the held-out labels were not seen


def test_folds_of_unequal_size_and_an_empty_one_are_right() -> None:
    for shape in (DUAL_SHAPE, PRIMAL_SHAPE):
        x, targets = problem(*shape)
        standard = standardise(in_blocks(x))
        folds = torch.full((1, len(x)), 3)
        folds[0, :7], folds[0, 7:30] = 0, 2  # nothing is in fold 1
        found = cross_validate(in_blocks(x), standard, targets, folds, 3).scores[STRENGTHS[3]]
        expected = refitted(with_intercept(x, standard), targets, folds, STRENGTHS[3])
        assert np.abs(found.numpy() - expected).max() < 1e-3


@pytest.mark.parametrize("shape", [(60, 40), (60, 59), (60, 90), (150, 80)])
def test_dual_and_primal_give_the_same_scores(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    x, targets = problem(*shape)
    standard, folds = standardise(in_blocks(x)), random_folds(len(x), 4, 2)
    dual = cross_validate(in_blocks(x), standard, targets, folds, 3)
    monkeypatch.setattr(ridge, "DUAL_ROWS", 0)
    primal = cross_validate(in_blocks(x), standard, targets, folds, 3)
    assert dual.scores.keys() == primal.scores.keys()
    for strength in dual.scores:
        assert (dual.scores[strength] - primal.scores[strength]).abs().max() < 2e-3


def test_float32_scores_stay_within_five_thousandths_of_float64_at_the_weakest_strength() -> None:
    x, targets = problem(900, 600, classes=5)
    x[:, 300:] = x[:, :300] + x[:, 300:] / 1000  # pairs of features that are nearly equal
    standard, folds = standardise(in_blocks(x)), random_folds(len(x), 5, 1)
    found = cross_validate(in_blocks(x), standard, targets, folds, 0).scores[STRENGTHS[0]]
    expected = refitted(with_intercept(x, standard), targets, folds, STRENGTHS[0])
    assert np.abs(found.numpy() - expected).max() < 5e-3


# --- the strengths ---


def test_walk_ends_at_the_least_squared_error_of_the_ladder_from_any_start() -> None:
    least = set()
    for seed, noise in enumerate((0.0, 3.0, 30.0)):
        x, targets = problem(*DUAL_SHAPE, seed=seed)
        x += np.random.default_rng(9).normal(0, noise + 1e-3, x.shape).astype(np.float32)
        standard, folds = standardise(in_blocks(x)), random_folds(len(x), 5, 2)
        z = with_intercept(x, standard)
        errors = {s: ((refitted(z, targets, folds, s) - targets.numpy()) ** 2).sum() for s in STRENGTHS}
        best = min(errors, key=lambda s: errors[s])
        least.add(best)
        for start in range(len(STRENGTHS)):
            path = cross_validate(in_blocks(x), standard, targets, folds, start)
            found = {s: float(e.sum()) for s, e in path.errors(targets).items()}
            assert min(found, key=lambda s: found[s]) == best
            assert found[best] == pytest.approx(errors[best], rel=1e-3)
    assert len(least) > 1


def test_walk_from_the_best_strength_looks_at_its_neighbours_only() -> None:
    x, targets = problem(*DUAL_SHAPE)
    standard, folds = standardise(in_blocks(x)), random_folds(len(x), 5, 1)
    errors = cross_validate(in_blocks(x), standard, targets, folds, 0).errors(targets)
    best = STRENGTHS.index(min(errors, key=lambda s: float(errors[s].sum())))
    assert 0 < best < len(STRENGTHS) - 1
    again = cross_validate(in_blocks(x), standard, targets, folds, best)
    assert set(again.scores) == set(STRENGTHS[best - 1 : best + 2])


# --- the final head ---


@pytest.mark.parametrize("shape", [DUAL_SHAPE, PRIMAL_SHAPE, (30, 40)], ids=["square", "tall", "wide"])
def test_head_gives_what_scikit_learn_gives_on_standardised_features(shape: tuple[int, int]) -> None:
    x, targets = problem(*shape)
    standard = standardise(in_blocks(x))
    z = with_intercept(x, standard)
    reference = Ridge(alpha=0.1, fit_intercept=False, solver="cholesky").fit(z, targets.double().numpy())
    weight, bias = fit(in_blocks(x), standard, targets, 0.1)
    found = torch.from_numpy(x) @ weight.T + bias  # on features as they come
    assert (weight.dtype, weight.shape, bias.shape) == (torch.float32, (3, shape[1]), (3,))
    assert np.abs(found.numpy() - reference.predict(z)).max() < 1e-3


def test_head_of_many_pictures_is_that_of_the_dual(monkeypatch: pytest.MonkeyPatch) -> None:
    x, targets = problem(40, 60)
    standard = standardise(in_blocks(x))
    weight, bias = fit(in_blocks(x), standard, targets, 0.1)
    monkeypatch.setattr(ridge, "DUAL_ROWS", 0)
    again, bias_again = fit(in_blocks(x), standard, targets, 0.1)
    assert torch.allclose(weight, again, atol=1e-4)
    assert torch.allclose(bias, bias_again, atol=1e-3)


# --- standardisation ---


def test_standardisation_centres_softens_and_scales_to_squared_norm_one() -> None:
    x, _ = problem(500, 30)
    standard = standardise(in_blocks(x))
    deviation = x.astype(np.float64).std(0)
    scale = 1 / (deviation + deviation.mean())
    scale /= np.sqrt(((deviation * scale) ** 2).sum())
    assert np.allclose(standard.centre, x.astype(np.float64).mean(0), atol=1e-4)
    assert np.allclose(standard.scale, scale, rtol=1e-4)
    z = standard.apply(x)
    assert float(z.square().sum(1).mean()) == pytest.approx(1, rel=1e-4)
    assert float(z.mean(0).abs().max()) < 1e-5


def test_small_deviations_on_top_of_a_large_offset_keep_their_digits() -> None:
    rng = np.random.default_rng(0)
    x = (rng.normal(0, 0.01, (1000, 5)) + 1000).astype(np.float32)
    deviation = x.astype(np.float64).std(0)
    scale = 1 / (deviation + deviation.mean())
    expected = scale / np.sqrt(((deviation * scale) ** 2).sum())
    assert np.allclose(standardise(in_blocks(x)).scale, expected, rtol=1e-3)


# --- streams ---


@pytest.mark.parametrize("shape", [DUAL_SHAPE, PRIMAL_SHAPE], ids=["dual", "primal"])
@pytest.mark.parametrize("size", [1, 7, 64])
def test_rows_in_blocks_of_any_size_give_equal_results(
    shape: tuple[int, int], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, targets = problem(*shape)
    folds = random_folds(len(x), 3, 2)
    whole = standardise(in_blocks(x))
    expected = cross_validate(in_blocks(x), whole, targets, folds, 3).scores[STRENGTHS[3]]
    weight, bias = fit(in_blocks(x), whole, targets, 0.1)
    monkeypatch.setattr(ridge, "BLOCK", 5)
    rows = in_blocks(x, size)
    standard = standardise(rows)
    assert torch.allclose(standard.centre, whole.centre, atol=1e-6)
    assert torch.allclose(standard.scale, whole.scale, rtol=1e-6)
    assert torch.allclose(cross_validate(rows, standard, targets, folds, 3).scores[STRENGTHS[3]], expected, atol=1e-4)
    again, bias_again = fit(rows, standard, targets, 0.1)
    assert torch.allclose(again, weight, atol=1e-5)
    assert torch.allclose(bias_again, bias, atol=1e-4)


def test_half_precision_rows_are_taken_as_their_values() -> None:
    x, targets = problem(*DUAL_SHAPE)
    half = x.astype(np.float16)
    folds = random_folds(len(x), 3, 1)
    found, expected = (
        cross_validate(in_blocks(rows), standardise(in_blocks(rows)), targets, folds, 3).scores[STRENGTHS[3]]
        for rows in (half, half.astype(np.float32))
    )
    assert torch.equal(found, expected)


# --- poor data ---


def constant(n: int) -> np.ndarray:
    return np.full((n, 6), 0.1, np.float32)


def one_feature(n: int) -> np.ndarray:
    return np.linspace(-1, 1, n, dtype=np.float32)[:, None]


def some_constant(n: int) -> np.ndarray:
    x, _ = problem(n, 6)
    x[:, ::2] = 7
    return x


def equal_features(n: int) -> np.ndarray:
    return one_feature(n).repeat(6, 1)


def huge_and_tiny(n: int) -> np.ndarray:
    x, _ = problem(n, 6)
    return x * np.array([6e4, 1e-6, 1, 1, 0, 1e-3], np.float32)


@pytest.mark.parametrize("make", [constant, one_feature, some_constant, equal_features, huge_and_tiny])
@pytest.mark.parametrize("classes", [2, 9], ids=["two classes", "more classes than pictures"])
@pytest.mark.parametrize("n", [6, 80])
@pytest.mark.parametrize("dual", [True, False], ids=["dual", "primal"])
def test_poor_features_give_finite_scores_and_heads(
    make: Callable[[int], np.ndarray], classes: int, n: int, dual: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ridge, "DUAL_ROWS", 4000 if dual else 0)
    x = make(n)
    targets = torch.nn.functional.one_hot(torch.arange(n) % classes, classes).float()
    standard = standardise(in_blocks(x))
    for start in (0, len(STRENGTHS) - 1):
        scores = cross_validate(in_blocks(x), standard, targets, random_folds(n, 3, 1), start).scores
        assert all(torch.isfinite(s).all() for s in scores.values())
    weight, bias = fit(in_blocks(x), standard, targets, STRENGTHS[0])
    seen_later = torch.from_numpy(make(80) + np.float32(0.3))
    assert torch.isfinite(seen_later @ weight.T + bias).all()


def test_constant_features_leave_the_share_of_each_class() -> None:
    targets = torch.nn.functional.one_hot(torch.tensor([0, 0, 0, 1]), 2).float()
    weight, bias = fit(in_blocks(constant(4)), standardise(in_blocks(constant(4))), targets, 1e-6)
    assert torch.equal(weight, torch.zeros_like(weight))
    assert torch.allclose(bias, torch.tensor([0.75, 0.25]), atol=1e-4)


# --- memory ---


PROBE = """
import re, sys
from pathlib import Path
import numpy as np, torch
from regraft.ridge import cross_validate, fit, standardise
torch.set_num_threads(1)
n, dim = int(sys.argv[1]), int(sys.argv[2])
def rows():
    for i in range(0, n, 512):
        rng = np.random.default_rng(i)
        yield rng.random((min(512, n - i), dim), dtype=np.float32).astype(np.float16)
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
warm = torch.linalg.cholesky(torch.eye(64)) @ torch.ones(64, 64)
before = peak()
targets = torch.nn.functional.one_hot(torch.arange(n) % 10, 10).float()
standard = standardise(rows)
cross_validate(rows, standard, targets, torch.arange(n)[None] % 5, 3)
fit(rows, standard, targets, 0.1)
print(peak() - before)
"""


def memory_of_probe(pictures: int, dim: int) -> int:
    """Bytes by which the memory of a process grows that probes features made on the way."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", PROBE, str(pictures), str(dim)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=900)
    return int(done.stdout)


def test_probe_on_a_stream_needs_less_memory_than_the_features_it_sees() -> None:
    pictures, dim = 100_000, 256
    assert memory_of_probe(pictures, dim) < 0.8 * pictures * dim * 4


@pytest.mark.slow
def test_probe_on_20000_pictures_of_4096_features_grows_by_less_than_a_gigabyte() -> None:
    assert memory_of_probe(20_000, 4096) < 1e9
