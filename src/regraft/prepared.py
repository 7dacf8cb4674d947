"""Pictures of a data set ready to train on all layers: decoded once, at the size of the network, held in memory.

Knows pictures and their preparation; nothing of networks or training. Not covered: sets that do not fit into memory.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from regraft.ahead import in_order
from regraft.allocator import memory_for_pictures
from regraft.data import Dataset, Example, LeftOut, printable, read
from regraft.errors import DataError, PictureError
from regraft.preprocess import PreprocessSpec, fit_to_size, plain_spec

DECODERS = 2
LARGEST = memory_for_pictures()
LOOKED_AT = 32
SMALL = 64
"""Pictures that are all of one size, no larger than this, keep it."""
SIZE = 32


@dataclass(frozen=True)
class Pictures:
    """values: uint8 (n, channels, height, width); labels: int64 (n,), of the data set or of its groups.

    ids: digests of the pictures; left_out: what could not be read.
    """

    values: torch.Tensor
    labels: np.ndarray
    preprocess: PreprocessSpec
    ids: tuple[str, ...]
    left_out: tuple[LeftOut, ...]


def prepare(
    dataset: Dataset,
    preprocess: PreprocessSpec | None = None,
    *,
    size: int | None = None,
    by_group: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Pictures:
    """All pictures of a data set, in its order.

    preprocess: of the network; None: stretched to `size` x `size` with values in [0, 1], to their own size where that
    is one for all and small, else to 32 x 32; one channel where all are grey. by_group: labels are those of groups.
    Raises DataError where nothing is left, or where it does not fit into memory.
    """
    spec = preprocess or plain_spec(*_size(dataset, size), 3)
    n = len(dataset.examples)
    needed = n * spec.channels * spec.size[0] * spec.size[1]
    if needed > LARGEST:
        raise DataError(
            f"Pictures must fit into {LARGEST / 1e9:.0f} GB; {n:,} of {spec.size[0]} x {spec.size[1]} take "
            f"{needed / 1e9:.1f} GB: give a smaller --size or fewer pictures."
        )
    values = np.empty((n, spec.channels, *spec.size), np.uint8)
    kept: list[Example] = []
    ids: list[str] = []
    left_out: list[LeftOut] = []

    def one(example: Example) -> tuple[str, np.ndarray] | PictureError:
        try:
            raw = read(example)
            return raw.id, fit_to_size(raw.decode().pixels, spec).numpy()
        except PictureError as e:
            return e

    with ThreadPoolExecutor(DECODERS) as pool:
        for done, (example, outcome) in enumerate(in_order(pool, one, dataset.examples), 1):
            if isinstance(outcome, PictureError):
                left_out.append(LeftOut(printable(example.where), str(outcome)))
            else:
                values[len(kept)] = outcome[1]
                kept.append(example)
                ids.append(outcome[0])
            progress(done, n)
    if len(kept) < 2:
        raise DataError(f"There must be at least 2 readable pictures in {printable(dataset.source)}; {len(kept)} are.")
    values = values[: len(kept)]
    if preprocess is None and all(
        (some[:, :1] == some).all() for some in np.array_split(values, len(kept) // 1000 + 1)
    ):
        values, spec = np.ascontiguousarray(values[:, :1]), plain_spec(*spec.size, 1)
    names = [f"{e.label} {e.group or e.where}" if by_group else str(e.label) for e in kept]
    index = {name: i for i, name in enumerate(dict.fromkeys(names))}
    labels = np.array([index[name] for name in names]) if by_group else np.array([e.label for e in kept])
    return Pictures(torch.from_numpy(values), labels.astype(np.int64), spec, tuple(ids), tuple(left_out))


def _size(dataset: Dataset, size: int | None) -> tuple[int, int]:
    if size is not None:
        return size, size
    sizes = set()
    for example in dataset.examples[:: max(1, len(dataset.examples) // LOOKED_AT)]:
        try:
            sizes.add(read(example).decode().pixels.shape[:2])
        except PictureError:
            continue
    if len(sizes) == 1 and max(max(sizes)) <= SMALL:
        height, width = sizes.pop()
        return int(height), int(width)
    return SIZE, SIZE
