"""The trials of the feature store again, with numbers that leave less to chance, and kills at every system call."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from regraft.store import FeatureKey, open_store, prune, read_features, stored_ids, verify, write_features
from store_trials import (
    KEY,
    REFUSED,
    SHARD,
    content_digest,
    fill,
    finish,
    flip_and_read,
    logged_fill,
    lose_power,
    names,
    rows_of,
    start,
    wrong_rows,
)

pytestmark = pytest.mark.slow
OTHER = FeatureKey({"weights": "w", "cut": "layer4"})


def test_any_of_10000_flipped_bits_and_bytes_is_found(tmp_path: Path) -> None:
    store, ids = open_store(tmp_path), names(3 * SHARD)
    for key, dtype in ((KEY, "float16"), (OTHER, "float32")):
        for i in range(0, 3 * SHARD, SHARD):
            write_features(store, key, ids[i : i + SHARD], rows_of(ids[i : i + SHARD], 9, dtype))
    assert flip_and_read(store, [KEY, OTHER], ids, trials=10_000, seed=1) == 10_000


@pytest.mark.parametrize("seed", range(4))
def test_1000_writers_killed_at_random_moments_leave_whole_records_and_nothing_else(tmp_path: Path, seed: int) -> None:
    result = json.loads(finish(start("kill", tmp_path, 250, seed, 800)))
    clean = open_store(tmp_path / "clean")
    fill(clean, names(800))
    print(result)
    assert result["digest"] == content_digest(clean, names(800))
    assert result["kills"] >= 250
    assert result["temporaries"] > 0  # some died in the middle of a file
    assert (result["damaged"], result["wrong"], result["lost"], result["left"]) == (0, 0, 0, 0)


@pytest.mark.parametrize("fault", ["signal=KILL", "error=ENOSPC", "error=EIO"])
@pytest.mark.parametrize(
    "call",
    ["write", "fsync", "?rename,?renameat,?renameat2", "?mkdir,?mkdirat"],
    ids=["write", "fsync", "rename", "mkdir"],
)
def test_writer_hit_at_every_nth_system_call_leaves_whole_records(tmp_path: Path, call: str, fault: str) -> None:
    ids, n, hit = names(48), 0, True
    while hit:
        n += 1
        root = tmp_path / f"store-{n}"
        log = tmp_path / "log"
        under = ["strace", "-f", "-o", str(log), "-e", f"trace={call}"]
        child = start("fill", root, 0, 48, SHARD, "on", under=[*under, "-e", f"inject={call}:{fault}:when={n}"])
        child.communicate(timeout=60)
        assert child.returncode in (0, REFUSED, -signal.SIGKILL)
        hit = child.returncode != 0 or "INJECTED" in log.read_text()
        store = open_store(root)
        assert verify(store).damaged == ()
        assert wrong_rows(store, ids) == 0
        fill(store, ids)
        prune(store)
        assert len(stored_ids(store, KEY)) == 48
        assert n < 60
    print(f"{call} {fault}: {n - 1} calls hit")
    assert n > 3


def test_power_loss_at_any_of_10000_moments_loses_nothing_that_was_done(tmp_path: Path) -> None:
    log = logged_fill(tmp_path / "logged", names(80))
    counts = lose_power(log, tmp_path / "after", names(80), trials=10_000, seed=1)
    print(counts)
    assert counts["rows"] > 10_000
    assert (counts["lost"], counts["wrong"], counts["damaged"]) == (0, 0, 0)


def test_100000_pictures_are_streamed_in_any_order_within_200_megabytes(tmp_path: Path) -> None:
    result = json.loads(finish(start("stream", tmp_path, 100_000, 4096)))  # 819 MB on the disk
    print(result)
    assert result["right"] == -(-100_000 // 1024)
    assert result["peak"] < 200_000_000


def test_sector_of_a_large_record_overwritten_is_found(tmp_path: Path) -> None:
    store, ids = open_store(tmp_path), names(512)
    write_features(store, KEY, ids, rows_of(ids, 1280))
    (path,) = store.folder(KEY).glob("*.rec")
    sound = path.read_bytes()
    for start_at in range(0, len(sound), 4096 * 7):
        sector = sound[start_at : start_at + 512]
        for other in (b"\0" * len(sector), b"\xff" * len(sector), sound[4096 : 4096 + len(sector)]):
            if other == sector:
                continue
            path.write_bytes(sound[:start_at] + other + sound[start_at + len(sector) :])
            assert read_features(store, KEY, ids).damaged == (path,)
