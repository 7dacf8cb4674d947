"""Files of TensorFlow: those it wrote, unpacked; others by hand, for tests of what a reader must refuse.

The forms are those of the sources named in the readers; TensorFlow itself reads what is written here without damage.
"""

from __future__ import annotations

import struct
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from regraft.readers.tensorflow.crc32c import crc32c, masked

FLOAT, INT32, STRING = 1, 3, 7
MAGIC = struct.pack("<Q", 0xDB4775248B80FB57)


def unpack(path: Path, folder: Path) -> None:
    """The files of an archive into a folder. Python before 3.11.4 knows no filters, later ones ask for one."""
    with tarfile.open(path) as archive:
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def field(number: int, value: int | bytes | str) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value & 0xFFFFFFFFFFFFFFFF)
    content = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(content)) + content


def shape(sizes: Sequence[int]) -> bytes:
    return b"".join(field(2, field(1, size)) for size in sizes)


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def entry(dtype: int, sizes: Sequence[int], offset: int, data: bytes, **other: int) -> bytes:
    """other: shard, size, crc, as they are to be written instead; slices: their number."""
    crc = other.get("crc", masked(crc32c(data)))
    return (
        field(1, dtype)
        + field(2, shape(sizes))
        + field(3, other.get("shard", 0))
        + field(4, offset)
        + field(5, other.get("size", len(data)))
        + varint(6 << 3 | 5)
        + struct.pack("<I", crc)
        + field(7, b"") * other.get("slices", 0)
    )


def table(values: Mapping[bytes, bytes], kind: int = 0) -> bytes:
    """A table of one block; kind: how it says to be compressed."""
    block = b"".join(varint(0) + varint(len(k)) + varint(len(v)) + k + v for k, v in sorted(values.items()))
    out, places = b"", []
    handle = b""
    for content in (block, None):
        if content is None:
            content = varint(0) + varint(1) + varint(len(handle)) + b"\xff" + handle
        content += struct.pack("<II", 0, 1)
        handle = varint(len(out)) + varint(len(content))
        places.append(handle)
        typed = content + bytes([kind])
        out += typed + struct.pack("<I", masked(crc32c(typed)))
    return out + (places[0] + places[1]).ljust(40, b"\0") + MAGIC


def write_checkpoint(prefix: Path, entries: Mapping[str, bytes], data: bytes, shards: int = 1, kind: int = 0) -> None:
    values = {b"": field(1, shards), **{name.encode(): value for name, value in entries.items()}}
    Path(f"{prefix}.index").write_bytes(table(values, kind))
    for i in range(shards):
        Path(f"{prefix}.data-{i:05d}-of-{shards:05d}").write_bytes(data)


# ---- graphs ---------------------------------------------------------------------------------------------------------


def attribute(name: str, value: bytes) -> bytes:
    return field(5, field(1, name) + field(2, value))


def node(name: str, op: str, inputs: Sequence[str] = (), *attributes: bytes) -> bytes:
    return field(1, name) + field(2, op) + b"".join(field(3, i) for i in inputs) + b"".join(attributes)


def placeholder(sizes: Sequence[int], name: str = "images") -> bytes:
    return node(
        name, "Placeholder", (), attribute("dtype", field(6, FLOAT)), attribute("shape", field(7, shape(sizes)))
    )


def constant(name: str, array: np.ndarray, sizes: Sequence[int] | None = None) -> bytes:
    """sizes: instead of those that the array has."""
    dtype = {"f": FLOAT, "i": INT32}[array.dtype.kind]
    tensor = field(1, dtype) + field(2, shape(array.shape if sizes is None else sizes))
    content = array.astype("<f4" if dtype == FLOAT else "<i4").tobytes()
    tensor += field(4, content) if sizes is None else field(5 if dtype == FLOAT else 7, content)
    return node(name, "Const", (), attribute("dtype", field(6, dtype)), attribute("value", field(8, tensor)))


def call(name: str, function: str, inputs: Sequence[str]) -> bytes:
    return node(name, "PartitionedCall", inputs, attribute("f", field(10, field(1, function))))


def function(name: str, bodies: Sequence[bytes], result: str) -> bytes:
    """A function of `x` that returns `result`."""
    signature = field(1, name) + field(2, field(1, "x")) + field(3, field(1, "y"))
    return (
        field(1, signature) + b"".join(field(3, body) for body in bodies) + field(4, field(1, "y") + field(2, result))
    )


def graph(nodes: Sequence[bytes], functions: Sequence[bytes] = ()) -> bytes:
    library = b"".join(field(1, f) for f in functions)
    return b"".join(field(1, n) for n in nodes) + (field(2, library) if library else b"")


def saved_model(
    definition: bytes, inputs: Mapping[str, tuple[str, Sequence[int]]], outputs: Mapping[str, str]
) -> bytes:
    """A SavedModel without variables, with one signature for serving."""
    infos = {
        1: {
            name: field(1, tensor) + field(2, FLOAT) + field(3, shape(sizes))
            for name, (tensor, sizes) in inputs.items()
        },
        2: {name: field(1, tensor) + field(2, FLOAT) for name, tensor in outputs.items()},
    }
    signature = b"".join(
        field(number, field(1, name) + field(2, info)) for number, each in infos.items() for name, info in each.items()
    )
    meta = (
        field(1, field(4, "serve")) + field(2, definition) + field(5, field(1, "serving_default") + field(2, signature))
    )
    return field(1, 1) + field(2, meta)
