"""Text that may hold anything, made safe for a terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    """The text with control characters, and bytes of file names that are no text, escaped."""
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
