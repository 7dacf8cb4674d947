"""Flax: parameter trees and train states that `flax.serialization` wrote as msgpack.

Extension types, from flax/serialization.py: 1 an array (shape, name of the dtype, bytes), 2 a complex number, 3 a
number of NumPy; arrays above 1 GiB come in chunks. Names are joined with `/`, without the names of the collections
(`params`, `batch_stats`). Knows msgpack through the package of that name. Not covered: Orbax folders.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from regraft.errors import ReaderError
from regraft.printable import printable
from regraft.readers.checkpoint import Checkpoint

FORMAT = "Flax msgpack"
ARRAY, NUMBER = 1, 3
CHUNKED = "__msgpack_chunked_array__"
COLLECTIONS = ("params", "batch_stats")
WRAPPERS = ("target", "model")
TRAINING = frozenset(
    [
        "opt_state",
        "optimizer",
        "state",
        "step",
        "epoch",
        "rng",
        "dropout_rng",
        "key",
        "dynamic_scale",
        "loss_scale",
        "ema",
        "ema_params",
        "params_ema",
    ]
)
DEPTH = 64
KINDS = {
    **{name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64", "bool", "complex64")},
    **{name: getattr(torch, name) for name in ("int8", "int16", "int32", "int64")},
    **{name: getattr(torch, name) for name in ("uint8", "uint16", "uint32", "uint64")},
}


def read_flax(path: Path) -> Checkpoint:
    """The parameters and batch statistics of a Flax file, `layout` "flax".

    Optimizer state, counters, random keys, and averaged parameters beside plain ones are passed over. Raises
    ReaderError when the package is missing and for whatever is damaged or claims more than is there.
    """
    try:
        data = path.read_bytes()
    except OSError as e:
        raise ReaderError(f"A Flax file must be readable; {path} is not ({e.strerror or e}).") from e
    tree = _unpack(data, str(path))
    tensors: dict[str, torch.Tensor] = {}
    passed: list[str] = []
    for parts, value in _leaves(tree, str(path)):
        name = "/".join(_named(parts))
        if value is None or _is_training(parts, tree):
            passed.append("/".join(parts))
        elif name in tensors:
            raise ReaderError(f"Every array of {path} must have a name of its own; {printable(name[:80])} has not.")
        else:
            tensors[name] = value
    return Checkpoint(str(path), FORMAT, tensors, "flax", _grouped(passed))


def _unpack(data: bytes, origin: str) -> dict[str, Any]:
    try:
        import msgpack
    except ImportError as e:
        raise ReaderError("Reading Flax needs the package msgpack: run `pip install regraft[flax]`.") from e

    def extension(code: int, inner: bytes) -> torch.Tensor | None:
        if code not in (ARRAY, NUMBER):
            return None
        shape, kind, raw = msgpack.unpackb(inner, raw=True)
        array = _array(tuple(shape), kind.decode("ascii") if isinstance(kind, bytes) else str(kind), raw)
        return array if code == ARRAY else None

    try:
        tree = msgpack.unpackb(data, ext_hook=extension, raw=False, strict_map_key=False)
    except Exception as e:  # damaged bytes raise nearly every kind there is
        raise ReaderError(f"{origin} must be whole msgpack as Flax writes it; found {printable(str(e))[:120]}.") from e
    if not isinstance(tree, dict):
        raise ReaderError(f"{origin} must hold a tree of parameters; found a {type(tree).__name__}.")
    return tree


def _array(shape: tuple[int, ...], kind: str, raw: bytes) -> torch.Tensor:
    if kind not in KINDS:
        raise ValueError(f"numbers of the unknown kind {kind[:20]}")
    if not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError("a shape that is none")
    if not isinstance(raw, bytes) or math.prod(shape) * KINDS[kind].itemsize != len(raw):
        raise ValueError(f"an array of {shape} {kind} in {len(raw):,} bytes")
    if not raw:
        return torch.empty(shape, dtype=KINDS[kind])
    return torch.frombuffer(bytearray(raw), dtype=KINDS[kind]).reshape(shape)


def _leaves(tree: dict[str, Any], origin: str) -> Iterator[tuple[tuple[str, ...], torch.Tensor | None]]:
    """(path, array) of every leaf in order; None where it is no array."""
    waiting: list[tuple[tuple[str, ...], Any]] = [((), tree)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, dict) and CHUNKED in value:
            yield path, _joined(value, f"{'/'.join(path)} of {origin}")
        elif isinstance(value, (dict, list)):
            if len(path) >= DEPTH:
                raise ReaderError(f"{origin} must hold a tree of parameters; it is nested more than {DEPTH} deep.")
            items = value.items() if isinstance(value, dict) else enumerate(value)
            waiting.extend(reversed([((*path, str(k)), v) for k, v in items]))
        else:
            yield path, value if torch.is_tensor(value) else None


def _joined(value: dict[str, Any], where: str) -> torch.Tensor:
    """An array that came in chunks: {"shape": {"0": ...}, "chunks": {"0": flat array, ...}}."""
    try:
        shape = tuple(int(value["shape"][str(i)]) for i in range(len(value["shape"])))
        chunks = [value["chunks"][str(i)].flatten() for i in range(len(value["chunks"]))]
        if math.prod(shape) != sum(chunk.numel() for chunk in chunks):
            raise ValueError(f"{shape} in {sum(chunk.numel() for chunk in chunks):,} numbers")
        return torch.cat(chunks).reshape(shape)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as e:
        raise ReaderError(
            f"{printable(where)} must be an array in whole chunks; found {printable(str(e))[:80]}."
        ) from e


def _named(parts: tuple[str, ...]) -> tuple[str, ...]:
    """The path without what the tree is wrapped in and without the names of collections."""
    while len(parts) > 1 and (parts[0] in COLLECTIONS or (parts[0] in WRAPPERS and parts[1] in COLLECTIONS)):
        parts = parts[1:]
    return parts


def _is_training(parts: tuple[str, ...], tree: Any) -> bool:
    """Whether the array belongs to the training alone: it lies under such a name beside the parameters."""
    for part in parts[:2]:
        if part in TRAINING and tree.keys() & {*COLLECTIONS, *WRAPPERS}:
            return True
        tree = tree.get(part)
        if part not in WRAPPERS or not isinstance(tree, dict):
            return False
    return False


def _grouped(passed: list[str]) -> tuple[str, ...]:
    """What was passed over, an optimizer as a whole."""
    return tuple(dict.fromkeys(next((p for p in name.split("/") if p in TRAINING), name) for name in passed))
