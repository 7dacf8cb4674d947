"""What a part above a cut is trained on: the tensors at the cut for a few views of every picture, computed once.

Maps at a cut are kept in the store, one key for each view; a part that starts at the picture itself keeps the prepared
pictures in memory and stores nothing. Where storing would cost more than it saves, `lower` is run again instead.
Knows pictures, views and the store; nothing of training. Not covered: sets whose maps do not fit into memory.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch

from regraft.ahead import in_order, side_by_side
from regraft.allocator import memory_for_pictures
from regraft.augment import Augment, augmented
from regraft.backbone import Backbone
from regraft.data import Example, printable, read
from regraft.errors import BackboneError, StoreError, TrainingError
from regraft.features import PREPARATION, Progress
from regraft.frozen import FrozenLower, NotFinite, as_map, freeze_lower, values_at_cuts
from regraft.numerics import Numerics
from regraft.preprocess import PreprocessSpec, fit_to_size
from regraft.store import FeatureKey, FeatureStore, extraction_lock, read_features, stored_ids, write_features

WRITTEN_AT_ONCE = 512
LARGEST = memory_for_pictures()
"""Bytes of maps and pictures that are held in memory at most, of all candidates."""
FEWEST_VIEWS = 2
"""Maps of fewer views are not worth storing where pictures of as many fit into memory."""
WORTH = 20.0
"""A map may be so many times as large as the picture as the share of the arithmetic below it times this.

Reckoned, not measured, from writing and reading 400 MB/s for each of 4 views, and from 5 ms to run all of
EfficientNet-Lite0 again in each of 10 epochs. Larger networks take longer, and gain more by storing.
"""


@dataclass(frozen=True)
class Maps:
    """Views of pictures ready to train on: values (n, views, *shape), maps float16 or pictures uint8.

    lower: what turns pictures into maps at every step, where maps are not stored. forward_passes: pictures pushed
    through the frozen part to fill the table; again: those pushed through it since, a list that grows.
    """

    values: np.ndarray
    forward_passes: int
    lower: FrozenLower | None = None
    again: list[int] = field(default_factory=list)

    @property
    def views(self) -> int:
        """How many views there are of each picture; view 0 is the picture itself."""
        return int(self.values.shape[1])

    def batch(self, rows: np.ndarray, views: np.ndarray) -> torch.Tensor:
        """One view of each of these pictures: maps float32, pictures uint8."""
        chosen = torch.from_numpy(self.values[rows, views])
        if self.lower is None:
            return chosen if chosen.dtype == torch.uint8 else chosen.float()
        self.again.append(len(rows))
        size = self.lower.numerics.batch
        parts = [values_at_cuts(self.lower, chosen[i : i + size])[0] for i in range(0, len(chosen), size)]
        return torch.cat([torch.from_numpy(as_map(part, self.lower.cuts[0])) for part in parts]).float()


def views_stored(n: int, shape: Sequence[int], below: float, spec: PreprocessSpec, wanted: int) -> int:
    """How many views of n pictures are stored as maps of this shape; 0 where `lower` is run again at every step.

    below: share of the network's arithmetic below the cut. A map, float16, that is no larger than the prepared picture,
    uint8, is stored, and a larger one where enough was computed below it; unless so few views fit into memory that
    pictures are the better use of it.
    """
    larger = 2 * int(np.prod(shape)) / (spec.channels * spec.size[0] * spec.size[1])
    if larger > max(1.0, WORTH * below):
        return 0
    fit = views_that_fit(n, shape, 2, wanted)
    return fit if fit >= min(FEWEST_VIEWS, views_that_fit(n, (spec.channels, *spec.size), 1, wanted)) else 0


def views_that_fit(n: int, shape: Sequence[int], bytes_each: int, wanted: int) -> int:
    """How many views of n pictures fit into memory, at most `wanted`; 0 where not even one does."""
    return min(wanted, LARGEST // max(1, n * bytes_each * int(np.prod(shape))))


def fit_together(held: Iterable[Maps], wanted: int) -> bool:
    """Whether so many bytes more fit into memory beside the maps that are held."""
    return sum(maps.values.nbytes for maps in held) + wanted <= LARGEST


def picture_views(
    examples: Sequence[Example], ids: Sequence[str], spec: PreprocessSpec, views: int, augment: Augment
) -> Maps:
    """Prepared pictures uint8 (n, views, C, H, W), decoded once and kept in memory."""
    values = np.empty((len(examples), views, spec.channels, *spec.size), np.uint8)
    everything = [(e, i, range(views)) for e, i in zip(examples, ids, strict=True)]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for k, (_, prepared) in enumerate(in_order(pool, lambda item: _prepare(*item, spec, augment), everything)):
            values[k] = prepared.numpy()
    return Maps(values, 0)


def extract_maps(
    examples: Sequence[Example],
    ids: Sequence[str],
    backbone: Backbone,
    cut: str,
    store: FeatureStore,
    numerics: Numerics,
    views: int,
    augment: Augment,
    progress: Progress = lambda done, total: None,
) -> Maps:
    """Maps at a cut for every view of every picture, from the store where they are there.

    ids: digests of the examples. Raises BackboneError where a value is not finite, TrainingError where a picture
    changed since its features were computed.
    """
    frozen = freeze_lower(backbone.trace, [cut], backbone.preprocess, numerics)
    keys = map_keys(frozen, backbone.source.weights, views, augment)
    values = np.empty((len(ids), views, *frozen.cuts[0].shape), np.float16)
    first: dict[str, int] = {}
    twins = [first.setdefault(id_, i) for i, id_ in enumerate(ids)]
    passes = 0
    with extraction_lock(store, keys[0].digest):
        missing = _read(store, keys, ids, values)
        places = sorted((i, k) for i, k in missing if twins[i] == i)
        wanted = itertools.groupby(places, key=lambda place: place[0])
        work = [(examples[i], ids[i], [k for _, k in group]) for i, group in wanted]
        with contextlib.closing(_computed(work, frozen, augment)) as computed:
            waiting: list[tuple[int, int]] = []
            for done, row in enumerate(computed, 1):
                i, k = places[done - 1]
                values[i, k] = row
                waiting.append((i, k))
                passes += 1
                if len(waiting) == WRITTEN_AT_ONCE or done == len(places):
                    _write(store, keys, ids, values, waiting)
                    waiting = []
                progress(done, len(places))
    for i, k in missing:
        values[i, k] = values[twins[i], k]
    return Maps(values, passes)


def map_keys(frozen: FrozenLower, weights: str, views: int, augment: Augment) -> list[FeatureKey]:
    """The store's key of each view: all that shaped it except the picture."""
    cut = frozen.cuts[0]
    shared = {"weights": weights, "preprocess": frozen.preprocess.to_json(), "preparation": PREPARATION}
    facts = {"kind": "map", "cut": cut.name, "shape": list(cut.shape), **shared, **frozen.numerics.to_json()}
    return [FeatureKey({**facts, "view": k, "augment": augment.to_json() if k else None}) for k in range(views)]


def _read(
    store: FeatureStore, keys: Sequence[FeatureKey], ids: Sequence[str], values: np.ndarray
) -> list[tuple[int, int]]:
    """Fill `values` with what is stored; the places (picture, view) of what is not."""
    missing = []
    for k, key in enumerate(keys):
        there = stored_ids(store, key)
        for i in range(0, len(ids), 1024):
            some = ids[i : i + 1024]
            wanted = list(dict.fromkeys(id_ for id_ in some if id_ in there))
            found = read_features(store, key, wanted) if wanted else None
            rows = dict(zip(found.ids, found.rows, strict=True)) if found else {}
            for j, id_ in enumerate(some, i):
                if id_ in rows:
                    values[j, k] = rows[id_].reshape(values.shape[2:])
                else:
                    missing.append((j, k))
    return missing


def _write(
    store: FeatureStore,
    keys: Sequence[FeatureKey],
    ids: Sequence[str],
    values: np.ndarray,
    places: Sequence[tuple[int, int]],
) -> None:
    """Keep maps; where the store takes nothing more they are computed again next time."""
    for k, key in enumerate(keys):
        rows = [i for i, view in places if view == k]
        if rows:
            with contextlib.suppress(StoreError):
                write_features(store, key, [ids[i] for i in rows], values[rows, k].reshape(len(rows), -1))


def _computed(
    work: Sequence[tuple[Example, str, Sequence[int]]], frozen: FrozenLower, augment: Augment
) -> Generator[np.ndarray]:
    """The map of every (picture, view), in order."""
    size = frozen.numerics.batch
    spec = frozen.preprocess

    def batches(pool: ThreadPoolExecutor) -> Iterator[tuple[list[Example], torch.Tensor]]:
        examples: list[Example] = []
        pixels: list[torch.Tensor] = []
        for (example, _, _), prepared in in_order(pool, lambda item: _prepare(*item, spec, augment), work):
            for picture in prepared:
                examples.append(example)
                pixels.append(picture)
                if len(pixels) == size:
                    yield examples, torch.stack(pixels)
                    examples, pixels = [], []
        if pixels:
            yield examples, torch.stack(pixels)

    def run(item: tuple[list[Example], torch.Tensor]) -> np.ndarray:
        try:
            return as_map(values_at_cuts(frozen, item[1])[0], frozen.cuts[0])
        except NotFinite as e:
            where = printable(item[0][e.row].where)
            raise BackboneError(f"The map of {where} at cut {e.cut} must be finite: leave the picture out.") from e

    with side_by_side() as pool:
        for _, rows in in_order(pool, run, batches(pool), 2 * torch.get_num_threads()):
            yield from rows


def _prepare(example: Example, id_: str, views: Sequence[int], spec: PreprocessSpec, augment: Augment) -> torch.Tensor:
    """Views of one picture as the network takes them, uint8 (views, C, H, W)."""
    raw = read(example)
    if raw.id != id_:
        raise TrainingError(f"Pictures must stay as they are during a run; {printable(example.where)} changed.")
    pixels = raw.decode().pixels
    return torch.stack([fit_to_size(augmented(pixels, id_, k, augment), spec) for k in views])
