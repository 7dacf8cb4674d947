"""CRC-32C (Castagnoli), the checksum of TensorFlow's files, fast enough for networks of hundreds of megabytes.

The register of a CRC is linear in what it held before and in the data: with S^n for "n zero bytes pass",

    register(s, A B) = S^|B| register(s, A)  xor  register(0, B)

so a block is cut into LANES pieces which pass side by side as one numpy vector, and their registers are joined pairwise
with S^n as a 32 x 32 matrix over the field of two elements. Knows bytes alone.

Source: Castagnoli et al., IEEE Trans. Communications 41 (1993); masking: LevelDB, table_format.md.
"""

from __future__ import annotations

import functools
import sys

import numpy as np

POLYNOMIAL = 0x82F63B78
LANES = 8192
BLOCK = LANES * 1024
SMALL = 16 * LANES
"""Shorter data, in bytes, is not worth the lanes."""

Words = np.ndarray[tuple[int, ...], np.dtype[np.uint32]]


def crc32c(data: bytes | bytearray | memoryview) -> int:
    """The CRC-32C of the data, below 2**32."""
    view = memoryview(data).cast("B")
    register, at = 0xFFFFFFFF, 0
    while len(view) - at >= SMALL and sys.byteorder == "little":
        size = min(BLOCK, (len(view) - at) // (4 * LANES) * 4 * LANES)
        register = _pass_lanes(register, view[at : at + size])
        at += size
    return _pass_bytes(register, view[at:]) ^ 0xFFFFFFFF


def masked(crc: int) -> int:
    """The form in which files store a CRC, so that a CRC of data that holds CRCs stays good."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _pass_bytes(register: int, data: memoryview) -> int:
    table = _byte_table()
    for byte in data:
        register = table[(register ^ byte) & 0xFF] ^ register >> 8
    return register


def _pass_lanes(register: int, data: memoryview) -> int:
    """data: a multiple of 4 * LANES bytes."""
    low, high = _pair_tables()
    words = np.ascontiguousarray(np.frombuffer(data, np.uint32).reshape(LANES, -1).T)
    registers = np.zeros(LANES, np.uint32)
    registers[0] = register
    for row in words:
        registers ^= row
        registers = low[registers & 0xFFFF] ^ high[registers >> 16]
    zeros = _zeros(4 * len(words))
    while len(registers) > 1:
        registers = _apply(zeros, registers[0::2]) ^ registers[1::2]
        zeros = _apply(zeros, zeros)
    return int(registers[0])


def _apply(matrix: Words, vectors: Words) -> Words:
    """Each of the vectors (bits of an integer) times the matrix, given by its 32 columns."""
    out = np.zeros_like(vectors)
    for bit in range(32):
        out ^= matrix[bit] * (vectors >> np.uint32(bit) & np.uint32(1))
    return out


def _zeros(count: int) -> Words:
    """S^count as 32 columns, by repeated squaring."""
    power = np.array([_pass_bytes(1 << bit, memoryview(b"\0")) for bit in range(32)], np.uint32)
    out = np.array([1 << bit for bit in range(32)], np.uint32)
    while count:
        if count & 1:
            out = _apply(power, out)
        power = _apply(power, power)
        count >>= 1
    return out


@functools.cache
def _byte_table() -> tuple[int, ...]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (POLYNOMIAL if value & 1 else 0)
        table.append(value)
    return tuple(table)


@functools.cache
def _pair_tables() -> tuple[Words, Words]:
    """What 4 bytes do to a register, for the 65,536 values of its low half and of its high half."""
    columns = _zeros(4)
    half = np.arange(65536, dtype=np.uint32)
    return _apply(columns, half), _apply(columns, half << np.uint32(16))
