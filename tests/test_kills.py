"""An extraction that is killed at any moment goes on where it was, and comes to the same features bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from feature_trials import start
from tiny import write_pictures


def killed(tmp_path: Path, *, kills: int, seed: int, each: int) -> dict[str, int]:
    data = write_pictures(tmp_path / "pictures", each=each)
    child = start("kill", data, tmp_path / "stores", kills, seed, 16)
    out, _ = child.communicate(timeout=900)
    assert child.returncode == 0
    figures: dict[str, int] = json.loads(out)
    print(figures)
    return figures


def assert_right(figures: dict[str, int]) -> None:
    assert figures["halfway"] > 0  # some were hit between the first shard and the last
    assert (figures["damaged"], figures["lost"], figures["wrong"], figures["extra"]) == (0, 0, 0, 0)


def test_extraction_killed_10_times_makes_the_missing_pictures_only_and_the_same_features(tmp_path: Path) -> None:
    assert_right(killed(tmp_path, kills=10, seed=0, each=40))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_extraction_killed_100_times_makes_the_missing_pictures_only_and_the_same_features(
    tmp_path: Path, seed: int
) -> None:
    figures = killed(tmp_path, kills=50, seed=1 + seed, each=150)
    assert_right(figures)
    assert figures["temporaries"] > 0  # some died in the middle of a file
