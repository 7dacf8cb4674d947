"""What an error of a library is reduced to before it becomes part of a sentence."""

from __future__ import annotations

import pytest

from regraft.errors import first_line


@pytest.mark.parametrize(
    ("error", "said", "with_kind"),
    [
        (ValueError("There must be more.\n  at line 3"), "There must be more", "ValueError: There must be more"),
        (RuntimeError("  no memory "), "no memory", "RuntimeError: no memory"),
        (MemoryError(), "MemoryError", "MemoryError"),
        (ValueError("...\nfurther down"), "ValueError", "ValueError"),
    ],
)
def test_an_error_is_said_in_a_clause(error, said, with_kind):
    assert first_line(error) == said
    assert first_line(error, kind=True) == with_kind
