"""Whatever happens to a file of the feature store is found before a row of it is used."""

from __future__ import annotations

import errno
import json
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from regraft.errors import StoreError
from regraft.files import canonical_json, digest
from regraft.store import (
    FeatureKey,
    FeatureStore,
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
    KEY,
    SHARD,
    content_digest,
    fill,
    flip_and_read,
    names,
    records,
    rows_of,
    wrong_rows,
)

OTHER = FeatureKey({"weights": "w", "cut": "layer4"})


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    return open_store(tmp_path / "store")


def test_any_of_2000_flipped_bits_and_bytes_is_found(store: FeatureStore) -> None:
    for key, dtype in ((KEY, "float16"), (OTHER, "float32")):
        for i in range(0, 3 * SHARD, SHARD):
            ids = names(3 * SHARD)[i : i + SHARD]
            write_features(store, key, ids, rows_of(ids, 9, dtype))
    assert flip_and_read(store, [KEY, OTHER], names(3 * SHARD), trials=2000, seed=0) == 2000


def test_record_cut_at_every_length_or_grown_is_found(store: FeatureStore) -> None:
    write_features(store, KEY, ["a", "b"], rows_of(["a", "b"], 3))
    path = records(store)[0]
    data = path.read_bytes()
    for changed in [*(data[:n] for n in range(len(data))), data + b"\0", data + data]:
        path.write_bytes(changed)
        read = read_features(store, KEY, ["a", "b"])
        assert (read.missing, read.damaged) == (("a", "b"), (path,)), len(changed)
    assert len(list((store.root / "quarantine").iterdir())) == 1


def test_record_of_another_key_is_found(store: FeatureStore) -> None:
    write_features(store, KEY, ["a"], rows_of(["a"]))
    write_features(store, OTHER, ["a"], rows_of(["other"]))
    mine, theirs = records(store)[0], records(store, OTHER)[0]
    theirs.rename(mine)
    assert read_features(store, KEY, ["a"]).damaged == (mine,)
    assert read_features(store, OTHER, ["a"]).missing == ("a",)


def test_damaged_record_is_set_aside_and_its_rows_can_be_written_again(store: FeatureStore) -> None:
    fill(store, names(48))
    before = content_digest(store, names(48))
    path = records(store)[1]
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    read = read_features(store, KEY, names(48))
    assert (len(read.missing), read.damaged) == (SHARD, (path,))
    assert np.array_equal(read.rows, rows_of(read.ids))
    assert [p.name for p in (store.root / "quarantine").iterdir()] == [f"{KEY.digest}-{path.name}"]
    assert fill(store, names(48)) == SHARD
    assert content_digest(store, names(48)) == before
    assert prune(store).damaged == 1
    assert list((store.root / "quarantine").iterdir()) == []


@pytest.mark.parametrize(
    "facts",
    [
        {"dim": 10**15},
        {"dim": -1},
        {"dim": 1.5},
        {"ids": [], "sums": []},
        {"ids": 3},
        {"dtype": "object"},
        {"sums": []},
        {"key": OTHER.digest},
        {"key": None},
    ],
    ids=str,
)
def test_header_whose_claims_do_not_fit_the_file_is_damage_and_allocates_nothing(
    store: FeatureStore, facts: dict[str, object]
) -> None:
    header = {"key": KEY.digest, "ids": ["a"], "dtype": "float16", "dim": 4, "sums": [0], **facts}
    text = canonical_json(header)
    head = b"regraft features 1\n" + len(text).to_bytes(4, "little") + text
    path = store.folder(KEY) / "x.rec"
    path.parent.mkdir(parents=True)
    path.write_bytes(head + bytes.fromhex(digest(head)) + b"\0" * 8)
    tracemalloc.start()
    read = read_features(store, KEY, ["a"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (read.missing, read.damaged) == (("a",), (path,))
    assert peak < 1_000_000


def test_length_of_header_beyond_the_file_is_damage(store: FeatureStore) -> None:
    path = store.folder(KEY) / "x.rec"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"regraft features 1\n" + b"\xff\xff\xff\xff" + b"\0" * 100)
    tracemalloc.start()
    read = read_features(store, KEY, ["a"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert read.damaged == (path,)
    assert peak < 1_000_000


def test_record_cut_short_while_blocks_are_read_is_found_in_the_block_that_needs_it(store: FeatureStore) -> None:
    write_features(store, KEY, names(48), rows_of(names(48)))
    blocks = iterate_features(store, KEY, names(48), block_rows=16)
    first, path = next(blocks), records(store)[0]
    os.truncate(path, path.stat().st_size - 3)
    rest = list(blocks)
    assert [len(b.missing) for b in (first, *rest)] == [0, 0, 16]
    assert rest[1].damaged == (path,)


def test_record_whose_header_is_damaged_is_named_by_the_first_block_only(store: FeatureStore) -> None:
    fill(store, names(48))
    path = next(p for p in records(store) if b"picture-00040" in p.read_bytes())
    os.truncate(path, 10)
    blocks = list(iterate_features(store, KEY, names(48), block_rows=16))
    assert [b.damaged for b in blocks] == [(path,), (), ()]
    assert [len(b.missing) for b in blocks] == [0, 0, 16]


def test_bad_sector_counts_as_damage(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(store, names(4))

    def fails(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fails)
    read = read_features(store, KEY, names(4))
    assert (len(read.missing), len(read.damaged)) == (4, 1)


def test_running_out_of_open_files_is_an_error_and_not_damage(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(store, names(4))

    def fails(*_: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "preadv", fails)
    with pytest.raises(StoreError, match="Too many open files"):
        read_features(store, KEY, names(4))
    assert len(records(store)) == 1


def test_key_file_with_one_blank_more_is_not_as_it_was_written(store: FeatureStore) -> None:
    fill(store, names(4))
    path = store.folder(KEY) / "key.json"
    path.write_bytes(path.read_bytes() + b" ")
    assert verify(store).damaged == (path,)


@pytest.mark.parametrize("text", [b"", b"{}", b"[1]", b"\xff", b'{"format": 1, "facts": {}}', b"[" * 5000])
def test_damaged_key_file_costs_no_hit_and_is_written_again(store: FeatureStore, text: bytes) -> None:
    fill(store, names(4))
    path = store.folder(KEY) / "key.json"
    sound = path.read_bytes()
    path.write_bytes(text)
    assert wrong_rows(store, names(4)) == 0
    assert [(e.facts, e.pictures) for e in list_entries(store)] == [(None, 4)]
    assert verify(store).damaged == (path,)
    fill(store, names(5))
    assert path.read_bytes() == sound


def test_verify_counts_files_and_rows_and_sets_damage_aside(store: FeatureStore) -> None:
    fill(store, names(40))
    fill(store, names(20), key=OTHER)
    found = verify(store)
    assert (found.checked, found.rows, found.damaged) == (2 + 3 + 2, 60, ())
    path = records(store)[0]
    path.rename(path.with_name("0" * 32 + ".rec"))  # sound within, but not the file of that name
    assert verify(store).damaged == (path.with_name("0" * 32 + ".rec"),)
    assert len(verify(store).damaged) == 0


def test_other_format_is_listed_and_left_alone(store: FeatureStore) -> None:
    facts = {"weights": "w"}
    folder = store.root / "features" / digest(canonical_json([2, facts]))
    folder.mkdir(parents=True)
    (folder / "key.json").write_text(json.dumps({"format": 2, "facts": facts}, indent=1, sort_keys=True) + "\n")
    (folder / "a.rec").write_bytes(b"regraft features 2\nwhatever")
    assert verify(store).damaged == ()
    assert [(e.digest, e.facts, e.pictures) for e in list_entries(store)] == [(folder.name, facts, 0)]
    assert prune(store, max_bytes=0).keys == (folder.name,)
    assert not folder.exists()


def test_strange_files_in_the_store_are_passed_over(store: FeatureStore) -> None:
    fill(store, names(4))
    (store.folder(KEY) / "notes.txt").write_text("mine")
    (store.folder(KEY) / "folder.rec").mkdir()
    os.mkfifo(store.folder(KEY) / "pipe.rec")
    (store.root / "features" / "stray").write_text("")
    assert stored_ids(store, KEY) == frozenset(names(4))
    assert verify(store).damaged == ()
    assert len(list_entries(store)) == 1
