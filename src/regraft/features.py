"""Features of a data set at every cut: one pass per picture, kept in the store, never computed twice.

Each file is opened once; the bytes that are hashed are the bytes that are decoded. What is in the store is not even
decoded. Beside the cuts of the network two more things are kept per picture: `input`, the picture at 32 x 32 (depth 0
of every curve), and a digest of its pixels (to find equal pictures in unequal files).
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch

from regraft.ahead import in_order, side_by_side
from regraft.backbone import Backbone
from regraft.data import Dataset, Example, LeftOut, pixel_digest, printable, read
from regraft.errors import BackboneError, DataError, PictureError, StoreError
from regraft.files import digest
from regraft.frozen import FrozenLower, NotFinite, channels_of, freeze_lower, run_frozen
from regraft.heads import INPUT
from regraft.numerics import Numerics
from regraft.preprocess import PreprocessSpec, fit_to_size, input_spec
from regraft.ridge import Rows
from regraft.store import (
    FeatureKey,
    FeatureStore,
    StoreReadOnlyError,
    extraction_lock,
    iterate_features,
    read_features,
    stored_ids,
    write_features,
)

INPUT_SPEC = input_spec(3)
PIXELS = "pixels"
PREPARATION = 3
"""Raised when decoding, resizing, folding or pooling changes its answer, so that no older features pass for these."""
SHARD_ROWS = 512
FLUSH_SECONDS = 10.0
TOLD_EVERY = 32
HELD_BYTES = 500_000_000
"""Rows beyond this are read from the store, block by block, whenever they are needed."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class FeatureTable:
    """Features of the readable examples of a data set, row by row in their order.

    ids: content digest of each example; pixels: digest of its decoded pixels; left_out: what could not be read.
    shapes: (parts, channels) by cut, `input` included; a row is parts * channels values.
    forward_passes: pictures pushed through the network in this call; seconds: wall time by stage.
    """

    examples: tuple[Example, ...]
    ids: tuple[str, ...]
    pixels: tuple[str, ...]
    left_out: tuple[LeftOut, ...]
    notes: tuple[LeftOut, ...]
    shapes: dict[str, tuple[int, int]]
    forward_passes: int
    seconds: dict[str, float]
    store: FeatureStore
    keys: dict[str, FeatureKey] = field(repr=False)
    held: dict[str, np.ndarray] = field(repr=False)

    def rows(self, cut: str, chosen: np.ndarray | None = None) -> Rows:
        """A function that gives the stored rows of a cut in blocks, float16, of the chosen examples (default: all)."""
        index = np.arange(len(self.ids)) if chosen is None else np.asarray(chosen)
        if cut in self.held:
            return lambda: _slices(self.held[cut], index)
        ids = [self.ids[i] for i in index]
        return lambda: _streamed(self.store, self.keys[cut], ids)


@dataclass(frozen=True)
class _Prepared:
    """A picture ready for the network: uint8 (C, H, W), the same at 32 x 32, and the digest of its pixels."""

    id: str
    where: str
    large: torch.Tensor
    small: torch.Tensor
    pixels: bytes
    notes: tuple[str, ...]


@dataclass
class _Buffer:
    """Rows computed and not yet written, by cut."""

    ids: list[str]
    rows: dict[str, list[np.ndarray]]
    since: float


def extract(
    dataset: Dataset,
    backbone: Backbone,
    cuts: Sequence[str],
    store: FeatureStore,
    numerics: Numerics,
    progress: Progress = lambda done, total: None,
    *,
    allow_empty_class: bool = False,
) -> FeatureTable:
    """Features of every example at `cuts`, from the store where they are there, else computed and stored.

    Unreadable examples are named in `left_out`. A damaged record is set aside and its pictures computed again.
    Raises DataError when no picture of some class can be read (unless `allow_empty_class`), BackboneError when a
    feature is not finite, StoreError when the disk is full (what was stored before stays).
    """
    started = time.perf_counter()
    frozen = freeze_lower(backbone.trace, cuts, backbone.preprocess, numerics)
    keys = feature_keys(frozen, backbone.source.weights)
    shapes = {cut.name: (parts, channels_of(cut)) for cut, parts in zip(frozen.cuts, frozen.parts, strict=True)}
    shapes[INPUT] = (1, 3 * 32 * 32)
    spilled: dict[str, dict[str, np.ndarray]] = {name: {} for name in keys}
    passes = 0
    with extraction_lock(store, digest(*(key.digest.encode() for key in keys.values()))):
        for _ in range(3):  # a record can turn out damaged only when it is read: then its pictures come again
            found, left_out, notes, computed = _pass(dataset, frozen, keys, store, spilled, progress)
            passes += computed
            middle = time.perf_counter()
            held, lost = _load(store, keys, [i for _, i in found], spilled, shapes)
            if not lost:
                break
        else:
            raise StoreError(
                f"The store at {store.root} must keep what is written to it; records vanish again and again."
            )
    examples = tuple(example for example, _ in found)
    if not allow_empty_class or not examples:
        _check_classes(dataset, examples, left_out)
    pixels = tuple(bytes(row.astype(np.uint8)).hex() for row in held.pop(PIXELS))
    seconds = {"extract": middle - started, "load": time.perf_counter() - middle}
    ids = tuple(i for _, i in found)
    return FeatureTable(
        examples, ids, pixels, tuple(left_out), tuple(notes), shapes, passes, seconds, store, keys, held
    )


def feature_keys(frozen: FrozenLower, weights: str) -> dict[str, FeatureKey]:
    """The store's key of each cut, of `input` and of the pixel digests: all that shaped them except the picture."""
    shared = {"weights": weights, "preprocess": frozen.preprocess.to_json(), "preparation": PREPARATION}
    keys = {}
    for cut, parts in zip(frozen.cuts, frozen.parts, strict=True):
        apart = sorted(other.name for other in frozen.apart if other.depth < cut.depth)
        facts = {"kind": "grid", "cut": cut.name, "parts": parts, "apart": apart}
        keys[cut.name] = FeatureKey({**facts, **shared, **frozen.numerics.to_json()})
    keys[INPUT] = FeatureKey({"kind": "input", "preprocess": INPUT_SPEC.to_json(), "preparation": PREPARATION})
    keys[PIXELS] = FeatureKey({"kind": "pixels", "preparation": PREPARATION})
    return keys


def _pass(
    dataset: Dataset,
    frozen: FrozenLower,
    keys: dict[str, FeatureKey],
    store: FeatureStore,
    spilled: dict[str, dict[str, np.ndarray]],
    progress: Progress,
) -> tuple[list[tuple[Example, str]], list[LeftOut], list[LeftOut], int]:
    stored = {name: stored_ids(store, key).union(spilled[name]) for name, key in keys.items()}
    have = frozenset.intersection(*stored.values())
    found: list[tuple[Example, str]] = []
    left_out: list[LeftOut] = []
    notes: list[LeftOut] = []
    computed: set[str] = set()
    buffer = _Buffer([], {name: [] for name in keys}, time.monotonic())

    def batches(pool: ThreadPoolExecutor) -> Iterator[tuple[int, list[_Prepared]]]:
        """Batches to compute, now and then an empty one, and how many pictures are done with each."""
        batch: list[_Prepared] = []
        done = 0
        prepared_ones = in_order(pool, lambda e: _prepare(e, have, frozen.preprocess), dataset.examples)
        for done, (example, outcome) in enumerate(prepared_ones, 1):
            if isinstance(outcome, LeftOut):
                left_out.append(outcome)
            else:
                found.append((example, outcome[0]))
                prepared = outcome[1]
                if prepared and prepared.id not in computed:
                    computed.add(prepared.id)
                    notes.extend(LeftOut(example.where, note) for note in prepared.notes)
                    batch.append(prepared)
            if len(batch) == frozen.numerics.batch or (not batch and done % TOLD_EVERY == 0):
                yield done, batch
                batch = []
        yield done, batch

    ahead = 2 * torch.get_num_threads()
    told = 0
    try:
        with side_by_side() as pool:
            work = in_order(pool, lambda item: _run(item[1], frozen), batches(pool), ahead)
            for (done, batch), values in work:
                _keep(batch, values, frozen, buffer)
                if len(buffer.ids) >= SHARD_ROWS or time.monotonic() - buffer.since > FLUSH_SECONDS:
                    _flush(buffer, keys, store, stored, spilled)
                while told < done:
                    told += 1
                    progress(told, len(dataset.examples))
    finally:  # an interrupt keeps what was computed
        _flush(buffer, keys, store, stored, spilled)
    return found, left_out, notes, len(computed)


def _prepare(example: Example, have: frozenset[str], spec: PreprocessSpec) -> tuple[str, _Prepared | None] | LeftOut:
    try:
        raw = read(example)
        if raw.id in have:
            return raw.id, None
        picture = raw.decode()
    except PictureError as e:
        return LeftOut(example.where, str(e))
    large, small = fit_to_size(picture.pixels, spec), fit_to_size(picture.pixels, INPUT_SPEC)
    pixels = bytes.fromhex(pixel_digest(picture))
    return raw.id, _Prepared(raw.id, example.where, large, small, pixels, picture.notes)


def _run(batch: Sequence[_Prepared], frozen: FrozenLower) -> list[np.ndarray]:
    if not batch:
        return []
    try:
        return run_frozen(frozen, torch.stack([p.large for p in batch]))
    except NotFinite as e:
        raise BackboneError(
            f"The features of {printable(batch[e.row].where)} at cut {e.cut} must be finite; the network gives NaN "
            "or infinity for it: leave the picture out, or choose another backbone."
        ) from e


def _keep(batch: Sequence[_Prepared], values: Sequence[np.ndarray], frozen: FrozenLower, buffer: _Buffer) -> None:
    if not batch:
        return
    buffer.ids += [p.id for p in batch]
    for cut, value in zip(frozen.cuts, values, strict=True):
        buffer.rows[cut.name].append(value.reshape(len(batch), -1))
    buffer.rows[INPUT].append(np.stack([p.small.numpy().reshape(-1) for p in batch]).astype(np.float16))
    buffer.rows[PIXELS].append(np.stack([np.frombuffer(p.pixels, np.uint8) for p in batch]).astype(np.float16))


def _flush(
    buffer: _Buffer,
    keys: dict[str, FeatureKey],
    store: FeatureStore,
    stored: dict[str, frozenset[str]],
    spilled: dict[str, dict[str, np.ndarray]],
) -> None:
    for name, key in keys.items():
        # Another backbone, or a write cut short, may have left the rows of some keys there.
        new = [i for i, id_ in enumerate(buffer.ids) if id_ not in stored[name]]
        if not new:
            continue
        ids, rows = [buffer.ids[i] for i in new], np.concatenate(buffer.rows[name])[new]
        try:
            write_features(store, key, ids, rows)
        except StoreReadOnlyError as e:
            if not any(spilled.values()):
                warnings.warn(f"{e} Features are kept in memory and lost afterwards.", stacklevel=2)
            spilled[name].update(zip(ids, rows, strict=True))
    buffer.ids.clear()
    for blocks in buffer.rows.values():
        blocks.clear()
    buffer.since = time.monotonic()


def _load(
    store: FeatureStore,
    keys: dict[str, FeatureKey],
    ids: Sequence[str],
    spilled: dict[str, dict[str, np.ndarray]],
    shapes: dict[str, tuple[int, int]],
) -> tuple[dict[str, np.ndarray], bool]:
    """Rows held in memory, as much as fits; every record is read and checked. True if some turned out lost."""
    held: dict[str, np.ndarray] = {}
    room = HELD_BYTES
    unique = list(dict.fromkeys(ids))
    at = {id_: i for i, id_ in enumerate(unique)}
    index = np.array([at[i] for i in ids], dtype=np.int64)
    for name, key in keys.items():
        memory = spilled[name]
        stored = [i for i in unique if i not in memory]
        dim = 16 if name == PIXELS else shapes[name][0] * shapes[name][1]
        size = 2 * dim * len(ids)
        if size > room and not memory and name != PIXELS:
            if any(block.missing for block in iterate_features(store, key, stored)):
                return {}, True
            continue
        out = read_features(store, key, stored)
        if out.missing:
            return {}, True
        rows = out.rows
        if memory:
            rows = np.empty((len(unique), dim), np.float16)
            if stored:
                rows[[at[i] for i in stored]] = out.rows
            for id_ in memory.keys() & at.keys():
                rows[at[id_]] = memory[id_]
        held[name] = rows[index] if len(unique) < len(ids) else rows
        room -= size
    return held, False


def _check_classes(dataset: Dataset, examples: Iterable[Example], left_out: Sequence[LeftOut]) -> None:
    lost = {e.label for e in dataset.examples} - {e.label for e in examples}
    if lost:
        name = dataset.labels[min(lost)]
        files = {e.where for e in dataset.examples if e.label == min(lost)}
        reason = next(item.reason for item in left_out if item.where in files)
        raise DataError(f"Every class must have a picture that can be read; {printable(name)!r} has none: {reason}")


def _slices(rows: np.ndarray, index: np.ndarray) -> Iterator[np.ndarray]:
    for i in range(0, len(index), 4096):
        yield rows[index[i : i + 4096]]


def _streamed(store: FeatureStore, key: FeatureKey, ids: Sequence[str]) -> Iterator[np.ndarray]:
    for block in iterate_features(store, key, ids, block_rows=4096):
        if block.missing:
            raise StoreError("Features vanished from the store while they were read: run the same command again.")
        yield block.rows
