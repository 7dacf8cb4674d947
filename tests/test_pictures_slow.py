"""Mutated picture files by the thousand: nothing but PictureError may escape."""

from __future__ import annotations

import pytest

from picture_makers import WHOLE, fuzz


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_only_picture_errors_escape_from_mutated_files(name):
    tried, refused, slowest = fuzz(WHOLE[name], seconds=1.0, seed=len(name))
    assert tried > 20
    assert refused > 0
    assert slowest < 10.0
