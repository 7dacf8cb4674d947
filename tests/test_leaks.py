"""Leaks across a split are all found, and nothing else is."""

from __future__ import annotations

from regraft.leaks import Leak, Mark, find_leaks

LEARNED = [Mark("train/1", "a", "p", "g"), Mark("train/2", "b", "q"), Mark("train/3", "b", "q")]


def test_equal_bytes_come_before_equal_pixels_before_equal_groups():
    tested = [
        Mark("test/1", "b", "p", "g"),
        Mark("test/2", "c", "p", "g"),
        Mark("test/3", "c", "r", "g"),
        Mark("test/4", "c", "r"),
    ]
    assert find_leaks(LEARNED, tested) == (
        Leak("test/1", "train/2", "bytes"),
        Leak("test/2", "train/1", "pixels"),
        Leak("test/3", "train/1", "group"),
    )


def test_pictures_without_a_group_share_none():
    assert find_leaks(LEARNED, [Mark("test/1", "x", "y", "")]) == ()
