"""Full and read-only disks, many processes and killed ones leave the feature store right."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from regraft import files
from regraft.errors import RegraftError, StoreError
from regraft.files import FOREIGN_SECONDS, TEMPORARY_PREFIX, stale_temporaries, write_atomic
from regraft.store import (
    FeatureStore,
    StoreFullError,
    StoreReadOnlyError,
    extraction_lock,
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
    content_digest,
    fill,
    finish,
    logged_fill,
    lose_power,
    mounted_tmpfs,
    names,
    records,
    rows_of,
    start,
    temporaries,
    wrong_rows,
)


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    return open_store(tmp_path / "store")


# --- disk and rights ---


@pytest.fixture
def filling_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, Callable[[], None]]]:
    """A folder on a disk that fills up after about 2 MB, and a function that makes room."""
    with mounted_tmpfs(tmp_path / "disk", "4m") as mounted:
        if mounted:
            ballast = tmp_path / "disk" / "ballast"
            ballast.write_bytes(b"\0" * 2_000_000)
            yield tmp_path / "disk" / "store", ballast.unlink
            return
        fsync, calls = os.fsync, iter(range(10**9))

        def full(fd: int) -> None:
            if next(calls) > 20:
                raise OSError(errno.ENOSPC, "No space left on device")
            fsync(fd)

        monkeypatch.setattr(os, "fsync", full)
        yield tmp_path / "disk" / "store", monkeypatch.undo


def test_full_disk_is_one_sentence_leaves_no_torn_file_and_goes_on_after_room_was_made(
    filling_disk: tuple[Path, Callable[[], None]],
) -> None:
    root, make_room = filling_disk
    store, ids = open_store(root), names(640)
    with pytest.raises(StoreFullError, match=r"needs at least [\d,]+ bytes, and [\d,]+ are free at "):
        fill(store, ids, dim=2048, shard=32)
    assert temporaries(root) == []
    assert verify(store).damaged == ()
    kept = stored_ids(store, KEY)
    assert 0 < len(kept) < 640
    make_room()
    assert fill(store, ids, dim=2048, shard=32) == 640 - len(kept)
    assert np.array_equal(read_features(store, KEY, ids).rows, rows_of(ids, 2048))


@pytest.mark.parametrize(("call", "least"), [("fsync", 10), ("replace", 4), ("mkdir", 3)])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO], ids=errno.errorcode.get)
def test_fault_at_any_call_while_writing_leaves_whole_records_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, least: int, number: int
) -> None:
    real, ids = getattr(os, call), names(48)
    for n in range(100):
        store, calls = open_store(tmp_path / f"store-{n}"), iter(range(10**9))

        def fails(*arguments: object, n: int = n, calls: Iterator[int] = calls) -> object:
            if next(calls) == n:
                raise OSError(number, os.strerror(number))
            return real(*arguments)

        fault = None
        with monkeypatch.context() as patch:
            patch.setattr(os, call, fails)
            try:
                fill(store, ids)
            except StoreError as e:
                fault = e
        assert temporaries(store.root) == []
        assert verify(store).damaged == ()
        if fault is None:
            break
        assert isinstance(fault, StoreFullError) == (number != errno.EIO)
        fill(store, ids)
        assert len(stored_ids(store, KEY)) == 48
        assert wrong_rows(store, ids) == 0
    assert least <= n < 100


def test_power_loss_at_any_of_300_moments_loses_nothing_that_was_done(tmp_path: Path) -> None:
    log = logged_fill(tmp_path / "logged", names(80))
    counts = lose_power(log, tmp_path / "after", names(80), trials=300, seed=0)
    assert counts["rows"] > 300
    assert (counts["lost"], counts["wrong"]) == (0, 0)
    assert counts["damaged"] == 0  # a name is given only to what is on the disk


@contextlib.contextmanager
def read_only(way: str) -> Iterator[tuple[Path, contextlib.AbstractContextManager[None]]]:
    """A folder, and a context within which nothing can be written there."""
    place = Path(tempfile.mkdtemp())
    place.chmod(0o755)
    with mounted_tmpfs(place / "disk", "4m") if way == "mount" else contextlib.nullcontext(False) as mounted:

        @contextlib.contextmanager
        def by_mount() -> Iterator[None]:
            assert os.system(f"mount -o remount,ro {place / 'disk'}") == 0
            yield

        @contextlib.contextmanager
        def by_rights() -> Iterator[None]:
            folders = [p for p in (place, *place.rglob("*")) if p.is_dir()]
            for folder in folders:
                folder.chmod(0o555)
            user = os.geteuid()
            if user == 0:
                os.seteuid(65534)
            yield
            os.seteuid(user)
            for folder in folders:
                folder.chmod(0o755)

        (place / "disk").mkdir(exist_ok=True)
        yield place / "disk" / "store", by_mount() if mounted else by_rights()
    shutil.rmtree(place)


@pytest.mark.parametrize("way", ["mount", "rights"])
def test_read_only_store_serves_its_rows_and_says_that_it_cannot_be_written(way: str) -> None:
    with read_only(way) as (root, closed):
        store = open_store(root)
        fill(store, names(20))
        path = records(store)[0]
        path.write_bytes(path.read_bytes()[:-1] + b"!")
        with closed:
            read = read_features(store, KEY, names(20))
            again = read_features(store, KEY, names(20))
            assert (again.damaged, again.missing) == (read.damaged, read.missing) == ((path,), read.missing)
            assert 0 < len(read.ids) < 20
            assert np.array_equal(read.rows, rows_of(read.ids))
            with pytest.raises(StoreReadOnlyError, match="set REGRAFT_CACHE"):
                fill(store, names(25))
            with pytest.raises(StoreReadOnlyError):
                prune(store, max_bytes=0)
            with extraction_lock(store, "any"):
                pass
            assert len(verify(store).damaged) == 1


def test_full_disk_names_the_space_that_the_first_piece_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.BytesIO):
        def write(self, _: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "open", lambda *_: Full(), raising=False)
    with pytest.raises(RegraftError, match="needs at least 1,000 bytes"):
        write_atomic(tmp_path / "file", [b"a" * 1000])


@pytest.mark.parametrize("number", [errno.EFBIG, errno.EIO], ids=errno.errorcode.get)
def test_a_refusal_while_a_file_is_written_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(fd: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match=str(tmp_path / "file")) as refused:
        write_atomic(tmp_path / "file", [b"a"])
    assert refused.value.errno == number


def test_a_key_that_cannot_be_listed_is_named_with_what_to_try(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(store, names(2))
    real, closed = os.scandir, store.folder(KEY)

    def refuse(folder: Path) -> object:
        if Path(folder) == closed:
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))
        return real(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(StoreError, match=f"{closed} is not .Permission denied.: make it readable"):
        list_entries(store)


def test_store_below_a_file_or_with_a_senseless_cap_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="is a file"):
        open_store(tmp_path / "file")
    with pytest.raises(StoreError):
        fill(open_store(tmp_path / "file" / "store"), names(2))
    with pytest.raises(StoreError, match="it cannot be made, .*: set REGRAFT_CACHE to another place"):
        fill(open_store(Path("/proc/none")), names(2))
    with pytest.raises(StoreError, match="positive number of bytes, and is '-5'"):
        open_store(tmp_path, max_bytes=-5)
    monkeypatch.setenv("REGRAFT_CACHE_BYTES", "20GB")
    with pytest.raises(StoreError, match="'20GB'"):
        open_store(tmp_path)


def test_place_and_cap_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGRAFT_CACHE", str(tmp_path / "c"))
    monkeypatch.setenv("REGRAFT_CACHE_BYTES", "1234")
    assert open_store() == FeatureStore(tmp_path / "c", 1234)
    assert open_store(max_bytes=5).max_bytes == 5
    monkeypatch.delenv("REGRAFT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert open_store().root.name == "regraft"


# --- many at once ---


@pytest.mark.parametrize("flock", ["on", "off"])
def test_eight_processes_extracting_at_once_agree_and_the_lock_saves_the_work(tmp_path: Path, flock: str) -> None:
    n = 320
    children = [start("extract", tmp_path / "many", n, flock) for _ in range(8)]
    computed = sum(int(finish(child)) for child in children)
    alone = open_store(tmp_path / "alone")
    fill(alone, names(n))
    many = open_store(tmp_path / "many")
    assert content_digest(many, names(n)) == content_digest(alone, names(n))
    assert verify(many).damaged == ()
    assert temporaries(many.root) == []
    assert computed == n if flock == "on" else n <= computed <= 8 * n


def test_eight_processes_writing_the_same_and_other_shards_without_a_lock_agree(tmp_path: Path) -> None:
    plans = [(0, 160, 16), (0, 160, 16), (0, 160, 40), (80, 240, 16), (80, 320, 10), (240, 320, 16), (0, 320, 64)] * 2
    children = [start("fill", tmp_path / "many", *plan, "off") for plan in plans[:8]]
    for child in children:
        finish(child)
    many, alone = open_store(tmp_path / "many"), open_store(tmp_path / "alone")
    fill(alone, names(320))
    assert content_digest(many, names(320)) == content_digest(alone, names(320))
    assert verify(many).damaged == ()


def test_two_writers_of_the_same_rows_make_one_file(store: FeatureStore) -> None:
    write_features(store, KEY, names(4), rows_of(names(4)))
    write_features(open_store(store.root), KEY, names(4), rows_of(names(4)))
    assert len(records(store)) == 1


def test_second_extractor_waits_for_the_first(store: FeatureStore) -> None:
    order: list[str] = []

    def second() -> None:
        with extraction_lock(store, "cut"):
            order.append("second")

    thread = threading.Thread(target=second)
    with extraction_lock(store, "cut"):
        thread.start()
        with extraction_lock(store, "another cut"):
            time.sleep(0.1)
        order.append("first")
    thread.join(timeout=10)
    assert order == ["first", "second"]


def test_readers_never_see_a_wrong_row_while_others_evict_and_write(store: FeatureStore) -> None:
    ids, stop, faults = names(96), threading.Event(), []

    def repeat(work: Callable[[], object]) -> None:
        try:
            while not stop.is_set():
                work()
        except Exception as e:  # a thread cannot fail a test by itself
            faults.append(e)

    def evict_all() -> None:
        prune(open_store(store.root), max_bytes=0)

    works = [lambda: fill(open_store(store.root), ids), evict_all]
    threads = [threading.Thread(target=repeat, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    seen = missed = 0
    end = time.monotonic() + 2
    while time.monotonic() < end:
        for block in iterate_features(store, KEY, ids, block_rows=24):
            seen, missed = seen + len(block.ids), missed + len(block.missing)
            assert block.damaged == ()
            assert not block.ids or np.array_equal(block.rows, rows_of(block.ids))
    stop.set()
    for thread in threads:
        thread.join()
    assert faults == []
    assert seen > 0
    assert missed > 0


def test_reader_half_way_through_finds_the_rest_missing_when_the_key_is_evicted(store: FeatureStore) -> None:
    fill(store, names(64))
    blocks = iterate_features(store, KEY, names(64), block_rows=16)
    first = next(blocks)
    prune(store, max_bytes=0)
    assert [len(b.missing) for b in blocks] == [16, 16, 16]
    assert np.array_equal(first.rows, rows_of(first.ids))


def test_writer_whose_folder_is_evicted_under_it_writes_again(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, evictions = os.replace, iter(range(3))

    def evicted_first(old: Path, new: Path) -> None:
        if next(evictions, None) is not None:
            shutil.rmtree(store.folder(KEY))
        real(old, new)

    monkeypatch.setattr(os, "replace", evicted_first)
    fill(store, names(4))
    assert wrong_rows(store, names(4)) == 0
    assert len(stored_ids(store, KEY)) == 4


def test_25_writers_killed_at_random_moments_leave_whole_records_and_nothing_else(tmp_path: Path) -> None:
    result = json.loads(finish(start("kill", tmp_path, 25, 1, 800)))
    clean = open_store(tmp_path / "clean")
    fill(clean, names(800))
    assert result["digest"] == content_digest(clean, names(800))
    assert result["kills"] >= 25
    assert (result["damaged"], result["wrong"], result["lost"], result["left"]) == (0, 0, 0, 0)


# --- what dead writers leave ---


def test_file_of_a_killed_writer_is_collected_and_that_of_a_living_one_is_not(store: FeatureStore) -> None:
    fill(store, names(4))
    dead, living = (start("hang", store.folder(KEY) / f"{name}.rec") for name in ("dead", "living"))
    assert [c.stdout.readline() for c in (dead, living)] == ["writing\n"] * 2
    dead.send_signal(signal.SIGKILL)
    assert len(temporaries(store.root)) == 2
    living.send_signal(signal.SIGSTOP)  # however long it sleeps
    os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)  # dead, though nobody has taken note of it
    for path in temporaries(store.root):
        os.utime(path, (0, 0))
    removed = prune(store, max_bytes=0).temporaries
    assert [f"-{dead.pid}-" in p.name for p in removed] == [True]
    assert len(temporaries(store.root)) == 1
    dead.communicate()
    living.send_signal(signal.SIGCONT)
    living.communicate("go on\n")
    assert (store.folder(KEY) / "living.rec").read_bytes() == b"begun, done"


def test_collecting_files_does_not_count_as_using_the_key(store: FeatureStore) -> None:
    fill(store, names(4))
    left = store.folder(KEY) / f"{TEMPORARY_PREFIX}0badf00d-1-77-abc"
    left.write_bytes(b"")
    os.utime(left, (0, 0))
    os.utime(store.folder(KEY), (1e9, 1e9))
    assert prune(store).temporaries == (left,)
    assert list_entries(store)[0].last_used == 1e9


def test_next_writer_of_a_key_collects_what_a_killed_one_left(store: FeatureStore) -> None:
    child = start("hang", store.folder(KEY) / "x.rec")
    child.stdout.readline()
    child.kill()
    child.communicate()
    assert len(temporaries(store.root)) == 1
    fill(store, names(4))
    assert temporaries(store.root) == []


def test_file_of_another_process_with_the_same_number_is_stale(tmp_path: Path) -> None:
    child = start("hang", tmp_path / "x")
    child.stdout.readline()
    path = temporaries(tmp_path)[0]
    assert stale_temporaries(tmp_path) == ()
    prefix, pid, begun, rest = path.name.removeprefix(TEMPORARY_PREFIX).split("-")
    earlier = path.with_name(f"{TEMPORARY_PREFIX}{prefix}-{pid}-{int(begun) - 1}-{rest}")
    earlier.write_bytes(b"")
    assert stale_temporaries(tmp_path) == (earlier,)
    child.communicate("\n")


@pytest.mark.parametrize(("age", "stale"), [(0, False), (0.9, False), (1.1, True), (-1.1, True), (9000, True)])
def test_file_from_another_machine_or_boot_is_given_up_by_age(tmp_path: Path, age: float, stale: bool) -> None:
    for name in ("0badf00d-1-77-abc", "garbage"):
        path = tmp_path / f"{TEMPORARY_PREFIX}{name}"
        path.write_bytes(b"")
        when = time.time() - age * FOREIGN_SECONDS
        os.utime(path, (when, when))
    assert len(stale_temporaries(tmp_path)) == 2 * stale
