"""Features come out right from a store that is damaged, full, read-only or shared by several processes."""

from __future__ import annotations

import errno
import json
import os
import shutil
import warnings
from pathlib import Path

import pytest

from feature_trials import assert_equal_tables, complete, extracted, start, table_digest, tiny
from regraft import features
from regraft.backbone import Backbone
from regraft.errors import StoreError
from regraft.store import FeatureStore, open_store, verify
from store_trials import mounted_tmpfs, temporaries
from tiny import CLASSES, write_pictures


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """24 pictures in 3 classes."""
    return write_pictures(tmp_path / "pictures")


@pytest.fixture
def kept(tmp_path: Path) -> FeatureStore:
    return open_store(tmp_path / "kept")


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny()


# --- a store that fails ---


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("at", [30, -1], ids=["in the header", "in the last row"])
@pytest.mark.parametrize("key", [0, -1])
def test_damaged_record_is_set_aside_and_its_pictures_made_again(
    data: Path, kept: FeatureStore, backbone: Backbone, at: int, key: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "SHARD_ROWS", 8)
    expected = extracted(data, kept, backbone=backbone)
    folders = sorted((kept.root / "features").iterdir())
    damaged = sorted(folders[key].glob("*.rec"))[1]
    flip(damaged, at)
    table = extracted(data, kept, backbone=backbone)
    assert table.forward_passes == 8
    assert_equal_tables(table, expected)
    assert len(list((kept.root / "quarantine").iterdir())) == 1
    assert extracted(data, kept, backbone=backbone).forward_passes == 0
    assert verify(kept).damaged == ()


def test_lost_and_exchanged_records_are_made_again(
    data: Path, kept: FeatureStore, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "SHARD_ROWS", 8)
    expected = extracted(data, kept, backbone=backbone)
    one, other, third = sorted((kept.root / "features").iterdir())[:3]
    next(one.glob("*.rec")).unlink()
    a, b = next(other.glob("*.rec")), next(third.glob("*.rec"))
    shutil.copy(a, b)
    b.with_name("00.rec").write_bytes(b"")
    table = extracted(data, kept, backbone=backbone)
    assert 8 <= table.forward_passes <= 24
    assert_equal_tables(table, expected)


def test_read_only_store_serves_what_it_has_and_the_rest_stays_in_memory_with_one_warning(
    data: Path, tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = extracted(data, open_store(tmp_path / "new"), backbone=backbone)
    with mounted_tmpfs(tmp_path / "disk", "8m") as mounted:
        kept = open_store(tmp_path / "disk" / "store")
        more = [data / name / f"{i}.png" for name in CLASSES for i in range(4, 8)]
        parts = [path.read_bytes() for path in more]
        for path in more:
            path.unlink()
        extracted(data, kept, backbone=backbone)
        for path, part in zip(more, parts, strict=True):
            path.write_bytes(part)
        if mounted:
            assert os.system(f"mount -o remount,ro {tmp_path / 'disk'}") == 0
        else:

            def refuse(*arguments: object) -> None:
                raise OSError(errno.EROFS, "Read-only file system")

            monkeypatch.setattr(os, "replace", refuse)
        monkeypatch.setattr(features, "SHARD_ROWS", 8)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            table = extracted(data, kept, backbone=backbone)
            again = extracted(data, kept, backbone=backbone)
        assert table.forward_passes == again.forward_passes == 12
        assert_equal_tables(table, expected)
        assert_equal_tables(again, expected)
        kinds = [str(w.message) for w in told]
        assert len(kinds) == 2  # one for each run
        assert all("cannot be written to" in k and "kept in memory" in k for k in kinds)


def test_full_disk_is_one_sentence_and_the_next_run_goes_on(
    data: Path, tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = extracted(data, open_store(tmp_path / "new"), backbone=backbone)
    monkeypatch.setattr(features, "SHARD_ROWS", 8)
    fsync, calls = os.fsync, iter(range(10**9))

    def full(fd: int) -> None:
        if next(calls) > 30:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", full)
    kept = open_store(tmp_path / "kept")
    with pytest.raises(StoreError, match=r"needs at least [\d,]+ bytes, and [\d,]+ are free at .*make room") as caught:
        extracted(data, kept, backbone=backbone)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert temporaries(kept.root) == []
    assert verify(kept).damaged == ()
    have = len(complete(kept, backbone))
    assert 0 < have < 24
    table = extracted(data, kept, backbone=backbone)
    assert table.forward_passes == 24 - have
    assert_equal_tables(table, expected)


# --- several processes ---


def race(data: Path, root: Path, n: int, flock: str) -> list[dict[str, object]]:
    """What n processes report that extract the same pictures into one store at the same time."""
    children = [start("extract", data, root, flock) for _ in range(n)]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write("\n")
        child.stdin.flush()
    found = [child.communicate(timeout=300)[0] for child in children]
    assert [child.returncode for child in children] == [0] * n
    return [json.loads(out) for out in found]


@pytest.mark.parametrize(("n", "flock"), [(8, "on"), (3, "off")])
def test_processes_that_extract_the_same_pictures_agree(n: int, flock: str, tmp_path: Path, backbone: Backbone) -> None:
    data = write_pictures(tmp_path / "many", each=30)
    expected = table_digest(extracted(data, open_store(tmp_path / "alone"), backbone=backbone))
    found = race(data, tmp_path / "shared", n, flock)
    assert {f["digest"] for f in found} == {expected}
    total = sum(int(str(f["passes"])) for f in found)
    print(f"{n} processes, locks {flock}: {total} passes for 90 pictures")
    assert 90 <= total <= (1.2 * 90 if flock == "on" else n * 90)  # locks save work and nothing else
    assert verify(open_store(tmp_path / "shared")).damaged == ()


def test_extraction_without_file_locks_gives_the_same(
    data: Path, kept: FeatureStore, backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = extracted(data, open_store(tmp_path / "locked"), backbone=backbone)

    def refuse(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    assert_equal_tables(extracted(data, kept, backbone=backbone), expected)
