"""The feature store gives back the rows that were written, under the key that shaped them, and keeps to its cap."""

from __future__ import annotations

import base64
import json
import os
import shutil
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from regraft.errors import StoreError
from regraft.store import (
    FeatureKey,
    FeatureStore,
    StoreFullError,
    iterate_features,
    list_entries,
    open_store,
    prune,
    read_features,
    stored_ids,
    verify,
    write_features,
)
from store_trials import (
    DIM,
    KEY,
    fill,
    names,
    records,
    rows_of,
)

OTHER = FeatureKey({"weights": "w", "cut": "layer4"})


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    return open_store(tmp_path / "store")


# --- rows in, rows out ---


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_rows_come_back_bit_identical(store: FeatureStore, dtype: str) -> None:
    ids = names(40)
    rows = np.random.default_rng(0).standard_normal((40, 7)).astype(dtype)
    write_features(store, KEY, ids, rows)
    read = read_features(store, KEY, ids)
    assert read.rows.dtype == rows.dtype
    assert read.rows.tobytes() == rows.tobytes()
    assert (read.ids, read.missing, read.damaged) == (tuple(ids), (), ())


def test_rows_come_in_the_order_asked_for_and_repeated_ids_are_repeated(store: FeatureStore) -> None:
    fill(store, names(70))
    asked = [*np.random.default_rng(1).permutation(names(70)), "picture-00003", "picture-00003"]
    assert np.array_equal(read_features(store, KEY, asked).rows, rows_of(asked))


def test_ids_that_are_not_there_are_missing_and_the_others_keep_their_order(store: FeatureStore) -> None:
    fill(store, names(20))
    read = read_features(store, KEY, ["x", "picture-00009", "y", "picture-00002"])
    assert read.missing == ("x", "y")
    assert read.ids == ("picture-00009", "picture-00002")
    assert np.array_equal(read.rows, rows_of(read.ids))


def test_empty_store_answers_with_nothing_and_makes_no_folder(store: FeatureStore) -> None:
    assert stored_ids(store, KEY) == frozenset()
    assert read_features(store, KEY, ["a"]).missing == ("a",)
    assert list_entries(store) == []
    assert verify(store).checked == 0
    assert not store.root.exists()


def test_keys_do_not_see_the_rows_of_one_another(store: FeatureStore) -> None:
    fill(store, names(5))
    assert read_features(store, OTHER, names(5)).missing == tuple(names(5))


def test_many_rows_at_once_are_laid_down_in_several_shards(store: FeatureStore) -> None:
    ids = names(1100)
    write_features(store, KEY, ids, rows_of(ids, 4))
    assert len(records(store)) == 3
    assert np.array_equal(read_features(store, KEY, ids).rows, rows_of(ids, 4))


def test_rows_in_any_memory_layout_are_taken(store: FeatureStore) -> None:
    rows = rows_of(names(6), 10)
    write_features(store, KEY, names(6), np.asfortranarray(rows)[:, ::2].astype(">f2"))
    assert np.array_equal(read_features(store, KEY, names(6)).rows, rows[:, ::2])


def test_id_written_in_several_shards_is_read_once(store: FeatureStore) -> None:
    for group in (names(8), names(8)[4:], names(12)[2:]):
        write_features(store, KEY, group, rows_of(group))
    assert np.array_equal(read_features(store, KEY, names(12)).rows, rows_of(names(12)))
    assert list_entries(store)[0].pictures == 12


def test_ids_of_any_characters_survive(store: FeatureStore) -> None:
    ids = ["caf\udce9.jpg", "a\nb", "-", "", "\U0001f9ec", "é"]
    write_features(store, KEY, ids, rows_of([str(i) for i in range(6)]))
    assert stored_ids(store, KEY) == frozenset(ids)


def test_rows_read_do_not_change_when_the_file_does(store: FeatureStore) -> None:
    fill(store, names(8))
    read = read_features(store, KEY, names(8))
    records(store)[0].write_bytes(b"\0" * 5000)
    assert np.array_equal(read.rows, rows_of(names(8)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite_are_refused_naming_the_picture(store: FeatureStore, value: float) -> None:
    rows = rows_of(names(9))
    rows[6, 5] = value
    with pytest.raises(StoreError, match=r"1 of 9 .*picture-00006"):
        write_features(store, KEY, names(9), rows)
    assert stored_ids(store, KEY) == frozenset()


@pytest.mark.parametrize(
    "rows",
    [np.zeros((3, 4)), np.zeros((2, 4), np.float32), np.zeros(3, np.float32), np.zeros((3, 0), np.float32)],
    ids=["float64", "too few rows", "one axis", "no values"],
)
def test_rows_of_another_shape_or_type_are_refused(store: FeatureStore, rows: np.ndarray) -> None:
    with pytest.raises(StoreError, match=r"float16 or float32 of shape \(3, values per picture\)"):
        write_features(store, KEY, names(3), rows)


def test_rows_of_two_lengths_under_one_key_are_never_mixed(store: FeatureStore) -> None:
    write_features(store, KEY, ["a"], rows_of(["a"], 8))
    write_features(store, KEY, ["b"], rows_of(["b"], 9))
    with pytest.raises(StoreError, match="the facts of this key leave something out"):
        read_features(store, KEY, ["a"])


# --- in blocks ---


def test_blocks_hold_all_rows_in_order_whatever_the_order_of_writing(store: FeatureStore) -> None:
    fill(store, names(100))
    asked = list(np.random.default_rng(2).permutation(names(110)))
    blocks = list(iterate_features(store, KEY, asked, block_rows=32))
    assert [len(b.ids) + len(b.missing) for b in blocks] == [32, 32, 32, 14]
    assert [i for b in blocks for i in b.ids] == [i for i in asked if i < "picture-00100"]
    assert all(np.array_equal(b.rows, rows_of(b.ids)) for b in blocks)


def test_iterating_needs_the_memory_of_one_block(store: FeatureStore) -> None:
    ids, dim, block = names(2000), 2048, 64
    for i in range(0, 2000, 250):
        write_features(store, KEY, ids[i : i + 250], rows_of(ids[i : i + 250], dim))
    asked = list(np.random.default_rng(3).permutation(ids))
    tracemalloc.start()
    seen = sum(len(b.ids) for b in iterate_features(store, KEY, asked, block_rows=block))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seen == 2000
    assert peak < 2 * block * dim * 2 + 2_000_000  # two blocks and the ids; all rows would be 8 MB


def test_damage_found_half_way_loses_only_ids_of_that_shard_from_there_on(store: FeatureStore) -> None:
    fill(store, names(64), shard=32)
    blocks = iterate_features(store, KEY, names(64), block_rows=16)
    first = next(blocks)
    second_shard = next(p for p in records(store) if b"picture-00050" in p.read_bytes())
    data = bytearray(second_shard.read_bytes())
    data[-1] ^= 1
    second_shard.write_bytes(data)
    rest = list(blocks)
    assert first.missing == rest[0].missing == ()
    assert [b.damaged for b in rest] == [(), (), (second_shard,)]
    assert np.array_equal(rest[1].rows, rows_of(rest[1].ids))  # its rows were sound, each has its own check
    assert rest[2].missing == tuple(names(64)[48:])


# --- keys ---

FACTS = {
    "weights": "d41d8",
    "cut": "layer3",
    "grid": [2, 2],
    "preprocess": {"size": 224, "crop": 0.875, "filter": "bicubic", "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
    "dtype": "float16",
    "batch_size": 32,
    "layout": "channels_last",
    "kernels": "torch-2.13-avx512",
}


def changed_facts() -> Iterator[tuple[str, dict[str, object]]]:
    for name, value in FACTS.items():
        inner = value if isinstance(value, dict) else {None: value}
        for part, old in inner.items():
            new = f"{old}x" if isinstance(old, str) else [*old[:-1], 9] if isinstance(old, list) else old + 1
            yield f"{name} {part or ''}".strip(), {**FACTS, name: new if part is None else {**inner, part: new}}
        yield f"no {name}", {k: v for k, v in FACTS.items() if k != name}


@pytest.mark.parametrize("facts", [pytest.param(f, id=i) for i, f in changed_facts()])
def test_each_fact_alone_makes_another_key(store: FeatureStore, facts: dict[str, object]) -> None:
    write_features(store, FeatureKey(FACTS), ["a"], rows_of(["a"]))
    assert FeatureKey(facts) != FeatureKey(FACTS)
    assert stored_ids(store, FeatureKey(facts)) == frozenset()


def test_equal_facts_are_one_key_in_any_order_and_stay_when_the_callers_change() -> None:
    facts = json.loads(json.dumps(FACTS))
    key = FeatureKey(facts)
    facts["preprocess"]["size"] = 1
    assert key == FeatureKey(dict(reversed(FACTS.items()))) == FeatureKey({**FACTS, "grid": (2, 2)})
    assert len({key, FeatureKey(FACTS)}) == 1
    assert key.facts == FACTS


@pytest.mark.parametrize("value", [float("nan"), b"x", object(), {1, 2}], ids=["nan", "bytes", "object", "set"])
def test_facts_that_json_cannot_hold_are_refused(value: object) -> None:
    with pytest.raises(StoreError, match="JSON values"):
        FeatureKey({"weights": value})


def test_moved_store_keeps_its_hits(store: FeatureStore, tmp_path: Path) -> None:
    fill(store, names(30))
    shutil.move(store.root, tmp_path / "elsewhere" / "deep")
    moved = open_store(tmp_path / "elsewhere" / "deep")
    assert np.array_equal(read_features(moved, KEY, names(30)).rows, rows_of(names(30)))


# A store of format 1 as it was first written: one record of two pictures, and the digest of its key.
FIRST_KEY = "b607093957a697e410c2f0dbabbd66da"
FIRST_RECORD = "8299ac6dbf2597a0e3e5f3cf7d8bb2e7.rec"
FIRST_BYTES = (
    "cmVncmFmdCBmZWF0dXJlcyAxCnMAAAB7ImRpbSI6MywiZHR5cGUiOiJmbG9hdDE2IiwiaWRzIjpbImEiLCJiIl0sImtleSI6ImI2"
    "MDcwOTM5NTdhNjk3ZTQxMGMyZjBkYmFiYmQ2NmRhIiwic3VtcyI6WzMzMDY4OTQ5NTMsMTQ2NzQ1NjI0MF19XZXtC3U3DyGqz+U8"
    "rVr1v8lk6GQHZVdndmeVZw=="
)


def test_record_of_the_first_release_is_still_read_and_written_alike(store: FeatureStore) -> None:
    assert KEY.digest == FIRST_KEY
    store.folder(KEY).mkdir(parents=True)
    (store.folder(KEY) / FIRST_RECORD).write_bytes(base64.b64decode(FIRST_BYTES))
    assert np.array_equal(read_features(store, KEY, ["a", "b"]).rows, rows_of(["a", "b"], 3))
    write_features(store, KEY, ["a", "b"], rows_of(["a", "b"], 3))
    assert [p.name for p in records(store)] == [FIRST_RECORD]


# --- what goes when room is needed ---


def keys(n: int) -> list[FeatureKey]:
    return [FeatureKey({"cut": i}) for i in range(n)]


def age(store: FeatureStore, key: FeatureKey, days: float) -> None:
    when = time.time() - days * 86400
    os.utime(store.folder(key), (when, when))


def test_cap_evicts_the_keys_used_longest_ago(tmp_path: Path) -> None:
    a, b, c, d = keys(4)
    for i, key in enumerate((a, b, c)):
        fill(open_store(tmp_path), names(32), key=key)
        age(open_store(tmp_path), key, 10 - i)
    read_features(open_store(tmp_path), a, names(1))  # reading is using
    used = sum(e.bytes for e in list_entries(open_store(tmp_path)))
    store = open_store(tmp_path, max_bytes=used + 100)
    fill(store, names(16), key=d)
    assert {e.facts["cut"] for e in list_entries(store) if e.facts} == {0, 2, 3}
    assert sum(e.bytes for e in list_entries(store)) <= store.max_bytes


def test_keys_of_this_run_are_not_evicted_and_a_cap_they_fill_is_an_error(tmp_path: Path) -> None:
    a, b, old = keys(3)
    fill(open_store(tmp_path), names(16), key=old)
    store = open_store(tmp_path, max_bytes=15_000)

    def in_turn() -> None:
        for i in range(0, 96, 16):
            for key in (a, b):
                write_features(store, key, names(96)[i : i + 16], rows_of(names(96)[i : i + 16]))

    with pytest.raises(StoreFullError, match=r"may hold 15,000 bytes, and .* raise REGRAFT_CACHE_BYTES"):
        in_turn()
    assert {e.facts["cut"] for e in list_entries(store) if e.facts} == {0, 1}
    assert sum(e.bytes for e in list_entries(store)) <= 15_000
    assert stored_ids(store, a) >= stored_ids(store, b) > frozenset()


def test_files_set_aside_count_towards_the_cap_and_go_first(tmp_path: Path) -> None:
    a, b = keys(2)
    store = open_store(tmp_path)
    fill(store, names(16), key=a)
    size = list_entries(store)[0].bytes
    (tmp_path / "quarantine").mkdir()
    (tmp_path / "quarantine" / "big").write_bytes(b"\0" * 100_000)
    fill(open_store(tmp_path, max_bytes=3 * size), names(16), key=b)
    assert list((tmp_path / "quarantine").iterdir()) == []
    assert len(list_entries(store)) == 2


def test_prune_removes_by_age_or_down_to_a_size_and_says_what(store: FeatureStore) -> None:
    a, b, c = keys(3)
    for key, days in ((a, 30), (b, 20), (c, 1)):
        fill(store, names(16), key=key)
        age(store, key, days)
    size = sum(e.bytes for e in list_entries(store))
    assert prune(store).keys == ()
    assert prune(store, older_than=25 * 86400).keys == (a.digest,)
    pruned = prune(store, max_bytes=size // 2)
    assert (pruned.keys, pruned.bytes) == ((b.digest,), size // 3)
    assert [e.digest for e in list_entries(store)] == [c.digest]
    assert not store.folder(a).exists()


@pytest.mark.parametrize("days", [-365, 0, 365])
def test_clocks_a_year_off_change_neither_keys_nor_hits(store: FeatureStore, days: int) -> None:
    fill(store, names(20))
    for path in (store.folder(KEY), *store.folder(KEY).iterdir()):
        os.utime(path, (time.time() - days * 86400,) * 2)
    assert fill(store, names(20)) == 0
    assert verify(store).damaged == ()


def test_entries_tell_what_is_stored(store: FeatureStore) -> None:
    fill(store, names(20))
    (entry,) = list_entries(store)
    assert (entry.digest, entry.facts, entry.pictures, entry.dim, entry.dtype) == (
        KEY.digest,
        {"weights": "w", "cut": "layer3"},
        20,
        DIM,
        "float16",
    )
    assert entry.bytes == sum(p.stat().st_size for p in store.folder(KEY).iterdir())
    assert abs(entry.last_used - time.time()) < 100
