"""What a pickle asks for, told without running it.

A pickle is a program. Before anything is built from one, its opcodes are walked: every name that it would import, and
nothing but the bytes that are really there. Knows opcodes; which names are harmless is for the caller to say.
Not covered: names put together on the stack (protocol 4 and later); who runs such a pickle must check them then.
"""

from __future__ import annotations

import pickletools
import struct
from dataclasses import dataclass
from typing import BinaryIO

from regraft.errors import ReaderError

GROWING = frozenset(
    [
        "base64",
        "base_64",
        "bz2",
        "hex",
        "quopri",
        "quoted_printable",
        "quotedprintable",
        "uu",
        "zip",
        "zlib",
        "base64_codec",
        "bz2_codec",
        "hex_codec",
        "quopri_codec",
        "uu_codec",
        "zlib_codec",
    ]
)
"""Codecs from bytes to bytes: told to encode its own output again and again, a pickle of 200 bytes fills the memory."""
SHORT = 40


@dataclass(frozen=True)
class Scan:
    """names: what the pickle imports by name, as `module.name`; codecs: strings in it that name a growing codec."""

    names: frozenset[str]
    codecs: frozenset[str]


def scan(stream: BinaryIO, origin: str) -> Scan:
    """Walk one pickle from where `stream` stands to its end, where the stream is left.

    Raises ReaderError naming `origin` where the opcodes are broken or cut short, or where a number of the memo is
    larger than the pickle is long: the unpickler of C would allocate a table of that size.
    """
    names: set[str] = set()
    codecs: set[str] = set()
    start, highest = stream.tell(), 0
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name in ("GLOBAL", "INST"):
                names.add(str(argument).replace(" ", ".", 1))
            elif isinstance(argument, str) and len(argument) <= SHORT:
                codecs |= {argument.lower().replace("-", "_").replace(" ", "_")} & GROWING
            elif opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and isinstance(argument, int):
                highest = max(highest, argument)
    except (ValueError, KeyError, IndexError, OverflowError, EOFError, MemoryError, struct.error) as e:
        raise ReaderError(
            f"{origin} must hold a whole pickle; it is damaged or cut short ({e}): fetch it again."
        ) from e
    if highest > stream.tell() - start:
        raise ReaderError(f"{origin} must hold a pickle as long as it says; its memo goes up to {highest:,}.")
    return Scan(frozenset(names), frozenset(codecs))
