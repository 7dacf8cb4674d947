"""Regularised linear heads solved exactly, with every cross-validated score from one factorisation.

Ridge regression of one-hot targets on standardised features with an intercept column, strength s:

    scores(x) = x' (X'X + s I)^-1 X'Y

Out-of-fold residuals follow from the whole-data solution by block deletion (the leave-one-out identity of Allen 1974,
for blocks: Golub, Heath and Wahba 1979): with G = (XX' + s I)^-1 and a fold F,  Y_F - scores_F = G_FF^-1 (G Y)_F.
When there are fewer features than examples the same is done with X'X, one downdate X'X - X_F'X_F a fold, streaming.
Knows tensors and blocks of rows; nothing of cuts, files or labels' names.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

STRENGTHS = tuple(float(10 ** (e / 2)) for e in range(-5, 2))
"""From 0.003 to 3, relative to examples whose squared norm is 1 on average."""
START = 4
DUAL_ROWS = 4000
BLOCK = 4096
STRIPS = 4

Rows = Callable[[], Iterator[np.ndarray]]
"""Gives the rows anew in blocks, any float dtype, (m, dim), always in the same order."""


@dataclass(frozen=True)
class Standard:
    """Centre and scale, float32 (dim,), set without labels: z = (x - centre) * scale, mean |z|^2 = 1.

    Deviations are softened, scale ~ 1 / (deviation + mean deviation), so that rare channels are not blown up.
    """

    centre: torch.Tensor
    scale: torch.Tensor

    def apply(self, x: np.ndarray) -> torch.Tensor:
        """Rows (m, dim) of any float dtype as standardised float32."""
        return (torch.from_numpy(np.ascontiguousarray(x)).float() - self.centre).mul_(self.scale)


@dataclass(frozen=True)
class Path:
    """Out-of-fold scores for the strengths that were tried, float32 (repeats, n, classes) each."""

    scores: dict[float, torch.Tensor]

    def errors(self, targets: torch.Tensor) -> dict[float, torch.Tensor]:
        """Squared error of every example, (repeats, n), by strength."""
        return {s: (v - targets).square().sum(-1) for s, v in self.scores.items()}


def standardise(rows: Rows) -> Standard:
    """Centre and softened scale of all rows, in one pass with float64 sums."""
    n, total, squares = 0, torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    shift: torch.Tensor | None = None
    for block in rows():
        x = torch.from_numpy(np.ascontiguousarray(block)).double()
        shift = x[0].clone() if shift is None else shift  # sums around a row of the data lose no digits
        x -= shift
        n, total, squares = n + len(x), total + x.sum(0), squares + x.square().sum(0)
    assert shift is not None
    mean = total / n
    deviation = (squares / n - mean.square()).clamp_(min=0).sqrt_()
    scale = 1 / (deviation + deviation.mean() + 1e-12)
    norm = (deviation * scale).square().sum().clamp(min=1e-12).sqrt()
    return Standard((mean + shift).float(), (scale / norm).float())


def cross_validate(rows: Rows, standard: Standard, targets: torch.Tensor, folds: torch.Tensor, start: int) -> Path:
    """Out-of-fold scores along the strengths, walked downhill from STRENGTHS[start] to the least squared error.

    targets: float32 (n, classes), one-hot; folds: int64 (repeats, n).
    """
    if dual_is_cheaper(len(targets), len(standard.centre), folds):
        return cross_validate_gram(gram(rows, standard), targets, folds, start)
    return _walk(_primal(rows, standard, targets, folds), targets, start)


def gram(rows: Rows, standard: Standard) -> torch.Tensor:
    """Inner products of all standardised rows, float32 (n, n), without the intercept."""
    x = _all(rows, standard)[:, :-1]
    products = torch.empty(len(x), len(x))
    edges = [round(i * len(x) / STRIPS) for i in range(STRIPS + 1)]
    for top, bottom in pairwise(edges):  # the half below the diagonal; the other is its mirror
        torch.mm(x[top:bottom], x[:bottom].T, out=products[top:bottom, :bottom])
        products[:top, top:bottom] = products[top:bottom, :top].T
    return products


def cross_validate_gram(products: torch.Tensor, targets: torch.Tensor, folds: torch.Tensor, start: int) -> Path:
    """`cross_validate` from inner products (see `gram`); the mean of several is that of a joint head."""
    return _walk(_dual(products + 1, targets, folds), targets, start)


def fit(rows: Rows, standard: Standard, targets: torch.Tensor, strength: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The head on all rows, for features as they come: weight float32 (classes, dim) and bias (classes,).

    The standardisation is folded in.
    """
    n, dim = len(targets), len(standard.centre) + 1
    if n <= min(DUAL_ROWS, dim):
        x = _all(rows, standard).double()
        products = x @ x.T
        products.diagonal().add_(strength)
        solution = x.T @ torch.linalg.solve(products, targets.double())
    else:
        square, product = torch.zeros(dim, dim), torch.zeros(dim, targets.shape[1])
        for x, at in _blocks(rows, standard):
            square.addmm_(x.T, x)
            product.addmm_(x.T, targets[at : at + len(x)])
        square = square.double()
        square.diagonal().add_(strength)
        solution = torch.linalg.solve(square, product.double())
    weight = solution[:-1].T * standard.scale
    bias = solution[-1] - weight @ standard.centre.double()
    return weight.float().contiguous(), bias.float()


def dual_is_cheaper(n: int, dim: int, folds: torch.Tensor) -> bool:
    """Multiplications of the two ways for about four strengths: one n x n inverse, or one dim x dim solve a fold."""
    repeats, solves = len(folds), len(folds) * int(folds.max() + 1)
    dual = n * n * dim + 4 * n**3
    primal = repeats * n * dim * dim + 4 * solves * dim**3 / 3
    return n <= DUAL_ROWS and dual <= primal


def _walk(solve: Callable[[float], torch.Tensor], targets: torch.Tensor, start: int) -> Path:
    scores: dict[float, torch.Tensor] = {}
    losses: dict[int, float] = {}

    def loss(i: int) -> float:
        if not 0 <= i < len(STRENGTHS):
            return float("inf")
        if i not in losses:
            scores[STRENGTHS[i]] = solve(STRENGTHS[i])
            losses[i] = float((scores[STRENGTHS[i]] - targets).square().sum())
        return losses[i]

    at, step = start, 1
    if loss(at + step) >= loss(at):
        step = -1
    while loss(at + step) < loss(at):
        at += step
    return Path(scores)


def _dual(products: torch.Tensor, targets: torch.Tensor, folds: torch.Tensor) -> Callable[[float], torch.Tensor]:
    members = [[(f == k).nonzero()[:, 0] for k in range(int(f.max()) + 1)] for f in folds]
    factor, inverse = torch.empty_like(products), torch.empty_like(products)

    def solve(strength: float) -> torch.Tensor:
        factor.copy_(products).diagonal().add_(strength)
        torch.linalg.cholesky(factor, out=factor)
        torch.cholesky_inverse(factor, out=inverse)
        weighted = inverse @ targets
        out = torch.empty(len(folds), *targets.shape)
        for r, repeat in enumerate(members):
            for fold in repeat:
                block = torch.linalg.cholesky(inverse.index_select(0, fold).index_select(1, fold))
                out[r, fold] = targets[fold] - torch.cholesky_solve(weighted[fold], block)
        return out

    return solve


def _primal(
    rows: Rows, standard: Standard, targets: torch.Tensor, folds: torch.Tensor
) -> Callable[[float], torch.Tensor]:
    dim, classes = len(standard.centre) + 1, targets.shape[1]

    @functools.cache  # with many rows there is one repeat, and 5 squares of up to 4,097 x 4,097 are held
    def sums(r: int) -> tuple[torch.Tensor, torch.Tensor]:
        k = int(folds[r].max()) + 1
        squares, products = torch.zeros(k, dim, dim), torch.zeros(k, dim, classes)
        for x, at in _blocks(rows, standard):
            for f in range(k):
                inside = (folds[r, at : at + len(x)] == f).nonzero()[:, 0]
                xf = x[inside]
                squares[f].addmm_(xf.T, xf)
                products[f].addmm_(xf.T, targets[at + inside])
        return squares, products

    def solve_repeat(r: int, strength: float, out: torch.Tensor) -> None:
        squares, products = sums(r)
        square, product = squares.sum(0), products.sum(0)
        square.diagonal().add_(strength)
        heads = []
        for f in range(len(squares)):
            factor = torch.linalg.cholesky(square - squares[f])
            heads.append(torch.cholesky_solve(product - products[f], factor))
        for x, at in _blocks(rows, standard):
            fold = folds[r, at : at + len(x)]
            for f, head in enumerate(heads):
                inside = (fold == f).nonzero()[:, 0]
                out[r, at + inside] = x[inside] @ head

    def solve(strength: float) -> torch.Tensor:
        out = torch.empty(len(folds), *targets.shape)
        for r in range(len(folds)):
            solve_repeat(r, strength, out)
        return out

    return solve


def _blocks(rows: Rows, standard: Standard) -> Iterator[tuple[torch.Tensor, int]]:
    at = 0
    for block in rows():
        for i in range(0, len(block), BLOCK):
            x = standard.apply(block[i : i + BLOCK])
            yield torch.cat([x, torch.ones(len(x), 1)], 1), at
            at += len(x)


def _all(rows: Rows, standard: Standard) -> torch.Tensor:
    return torch.cat([x for x, _ in _blocks(rows, standard)])
