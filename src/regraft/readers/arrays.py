"""NumPy's files: `.npz` archives of arrays, and `.npy` with one array or a pickled dict of them.

Declared shapes are held against the bytes that are there before anything is allocated. A pickled dict is read by an
unpickler that knows no name but those that arrays are made of, and makes the arrays itself: no function of NumPy is
called with what the file says. Names of nested values are joined with `/`. Not covered: arrays of records.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch

from regraft.errors import ReaderError
from regraft.printable import printable
from regraft.readers.archives import open_archive
from regraft.readers.checkpoint import Checkpoint, Layout
from regraft.readers.pickles import scan
from regraft.readers.state_dict import weights_of

NUMBERS = "biufc"
WORDS = "SUMm"
"""Kinds of dtype that are never weights: text and dates."""
DEPTH = 32
Array = npt.NDArray[Any]


def read_arrays(path: Path, *, layout: Layout = "torch") -> Checkpoint:
    """The arrays of a `.npz` or `.npy` file by name; text, single numbers and the like are passed over.

    layout: how kernels are laid out, which these files do not say. Big-endian numbers are converted. Raises
    ReaderError for arrays that claim more than is stored, objects in `.npz`, and pickles that name anything but arrays.
    """
    try:
        with open(path, "rb") as file:
            if path.suffix.lower() == ".npz":
                form, found = "NumPy .npz", _read_npz(file, str(path))
            else:
                form, found = "NumPy .npy", _read_npy(file, str(path), path.stem)
    except OSError as e:
        raise ReaderError(f"A file of arrays must be readable; {path} is not ({e.strerror or e}).") from e
    tensors = {n: _tensor(v, f"{n!r} of {path}") for n, v in found.items() if isinstance(v, np.ndarray)}
    passed = tuple(name for name, value in found.items() if not isinstance(value, np.ndarray))
    return Checkpoint(str(path), form, tensors, layout, passed)


def checkpoint_of(value: Mapping[str, Any] | Sequence[Any]) -> Checkpoint:
    """Arrays or tensors given in Python: by name, nested as in a checkpoint, or in order, as Theano lists them.

    Raises ReaderError for what holds none, and for sparse tensors and others without plain values.
    """
    tensors, passed = weights_of(_as_tensors(value, "the given arrays"), "the given arrays")
    return Checkpoint("the given arrays", "arrays", tensors, passed_over=passed)


def _as_tensors(value: Any, where: str, depth: int = 0) -> Any:
    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided or value.is_quantized or value.device.type == "meta":
            raise ReaderError(f"{where} must be a dense tensor with values; it is {value.layout}, {value.device}.")
        return value.detach().cpu()
    if isinstance(value, Mapping) and depth < DEPTH:
        return {str(key): _as_tensors(entry, f"{where}[{key!r}]", depth + 1) for key, entry in value.items()}
    if isinstance(value, list | tuple) and depth < DEPTH:
        return [_as_tensors(entry, f"{where}[{i}]", depth + 1) for i, entry in enumerate(value)]
    if not hasattr(value, "__array__"):
        return value
    array = np.asarray(value)
    return _tensor(array.astype(array.dtype.newbyteorder("=")), where)


def _read_npz(file: BinaryIO, origin: str) -> dict[str, Array | None]:
    found: dict[str, Array | None] = {}
    with open_archive(file, origin, compressed=True) as archive:
        for entry in archive.infolist():
            name = printable(entry.filename[:80])
            if not entry.filename.endswith(".npy"):
                raise ReaderError(f"Every entry of {origin} must be a .npy array; {name!r} is none.")
            with archive.open(entry) as inner:
                head = _header(inner, f"{name} in {origin}")
                if head.kind.hasobject:
                    raise ReaderError(
                        f"{name} in {origin} must be numbers; it is a pickled object: save the arrays in it by name."
                    )
                found[entry.filename.removesuffix(".npy")] = head.array(inner, entry.file_size, f"{name} in {origin}")
    return found


def _read_npy(file: BinaryIO, origin: str, own: str) -> dict[str, Any]:
    head = _header(file, origin)
    if not head.kind.hasobject:
        return {own: head.array(file, os.fstat(file.fileno()).st_size, origin)}
    data = file.read()
    scan(io.BytesIO(data), origin)
    return dict(_flat(_unpickle(data, origin), own, origin))


@dataclass(frozen=True)
class _Header:
    """What an array says about itself; start: the byte at which its numbers begin."""

    kind: np.dtype[Any]
    shape: tuple[int, ...]
    fortran: bool
    start: int

    def array(self, file: Any, size: int, origin: str) -> Array | None:
        """The numbers, which must fill the file of `size` bytes to its end; None for text."""
        _check_kind(self.kind, origin)
        needed, have = math.prod(self.shape) * self.kind.itemsize, size - self.start
        if needed != have:
            raise ReaderError(
                f"{origin} must hold what it declares: {needed:,} bytes for {self.shape}; it has {have:,}."
            )
        return None if self.kind.kind in WORDS else _made(file.read(), self.kind, self.shape, self.fortran, origin)


def _header(file: Any, origin: str) -> _Header:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of headers that Python 2 wrote
            version = np.lib.format.read_magic(file)
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            shape, fortran, kind = read[version](file)
    except Exception as e:  # damaged text raises nearly every kind there is
        reason = printable(next(iter(str(e).splitlines()), ""))[:120]
        raise ReaderError(f"{origin} must begin as NumPy writes arrays; it does not ({reason}).") from e
    return _Header(kind, _shape(shape, origin), bool(fortran), file.tell())


def _shape(value: Any, origin: str) -> tuple[int, ...]:
    if not isinstance(value, tuple) or not all(type(n) is int and 0 <= n < 1 << 63 for n in value):
        raise ReaderError(f"{origin} must have a shape of whole numbers from 0 on; found {str(value)[:40]}.")
    return value


def _check_kind(kind: np.dtype[Any], origin: str) -> None:
    if kind.hasobject or kind.fields or kind.subdtype or kind.kind not in NUMBERS + WORDS or kind.itemsize > 1 << 31:
        hint = ": bfloat16 is stored so, save it as float32" if kind.str[1:] == "V2" else ""
        raise ReaderError(f"{origin} must be plain numbers; it is of kind {kind.str[:20]}{hint}.")
    if kind.kind in "fc" and kind.itemsize > (8 if kind.kind == "f" else 16):
        raise ReaderError(f"{origin} must be of 64 bits at most; it is of kind {kind.str}: save it as float32.")


def _made(raw: bytes, kind: np.dtype[Any], shape: tuple[int, ...], fortran: bool, origin: str) -> Array:
    """The array that the bytes are, in the byte order of this machine."""
    if len(raw) != math.prod(shape) * kind.itemsize:
        raise ReaderError(f"{origin} must be whole; {len(raw):,} bytes are there for {shape} of {kind.str}.")
    flat = np.frombuffer(raw, kind) if raw else np.empty(0, kind)
    return flat.astype(kind.newbyteorder("=")).reshape(shape, order="F" if fortran else "C")


def _tensor(array: Array, where: str) -> torch.Tensor:
    try:
        return torch.from_numpy(np.array(array, order="C"))
    except TypeError as e:
        raise ReaderError(f"{where} must be of a kind that torch has; it is {array.dtype}: save it as float32.") from e


class _Refused(pickle.UnpicklingError):
    """The pickle names something that is not part of an array."""


class _Kind:
    """Stands for `numpy.dtype` in a pickle."""

    def __init__(self, name: object = "", *_: object) -> None:
        self.name, self.order = str(name), "="

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 2 or any(part is not None for part in state[2:5]):
            raise pickle.UnpicklingError("an array of records")
        self.order = str(state[1])

    def dtype(self) -> np.dtype[Any]:
        """The kind of number, which must be a plain one."""
        if not isinstance(self.name, str) or len(self.name) > 12 or self.order not in ("<", ">", "=", "|"):
            raise pickle.UnpicklingError("an unknown kind of number")
        return np.dtype(self.name).newbyteorder(self.order if self.order != "|" else "=")  # type: ignore[arg-type]


class _Array:
    """Stands for `numpy.ndarray` in a pickle; `value` is the array, or the list of what an array of objects holds.

    single: whether it is an array without axes, as numpy.save makes of a dict.
    """

    def __init__(self, *_: object) -> None:
        self.value: Array | list[Any] | None = None
        self.single = False

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, raw = state
        self.value, self.single = _from_pickle(raw, kind, shape, bool(fortran)), shape == ()


def _from_pickle(raw: Any, kind: Any, shape: Any, fortran: bool) -> Array | list[Any] | None:
    if not isinstance(kind, _Kind):
        raise pickle.UnpicklingError("an array without a kind")
    if kind.name.startswith("O"):
        if not isinstance(raw, list):
            raise pickle.UnpicklingError("an array of objects without a list of them")
        return raw
    dtype = kind.dtype()
    _check_kind(dtype, "an array")
    if dtype.kind in WORDS:
        return None
    data = raw.encode("latin-1") if isinstance(raw, str) else raw  # Python 2 wrote bytes as text
    if not isinstance(data, (bytes, bytearray)):
        raise pickle.UnpicklingError("an array without bytes")
    return _made(bytes(data), dtype, _shape(shape, "an array"), fortran, "an array")


def _array(*_: object) -> _Array:
    return _Array()


def _from_buffer(raw: Any, kind: Any, shape: Any, order: Any) -> _Array:
    made = _Array()
    made.value = _from_pickle(raw, kind, shape, order == "F")
    return made


def _number(*_: object) -> None:
    """A single number, which is no weight."""


def _encode(text: Any, codec: Any = "latin1") -> bytes:
    if not isinstance(text, str) or codec not in ("latin1", "latin-1", "utf-8", "ascii"):
        raise _Refused(f"_codecs.encode as {str(codec)[:20]}")
    return text.encode(codec)


class _Called:
    """A function in a pickle, which may call it but, unlike one of Python, not change it."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, _: object) -> None:
        raise pickle.UnpicklingError("a function that is changed")


ADMITTED: dict[str, Callable[..., Any]] = {
    "numpy.ndarray": _Array,
    "numpy.dtype": _Kind,
    "_codecs.encode": _Called(_encode),
    "collections.OrderedDict": OrderedDict,
    **{
        f"numpy.{core}.{name}": _Called(function)
        for core in ("core", "_core")
        for name, function in (
            *(("multiarray._reconstruct", _array), ("multiarray.scalar", _number)),
            ("numeric._frombuffer", _from_buffer),
        )
    },
}
"""Every name that a pickled dict of arrays may have in it, and what it becomes here."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Only what is admitted; nothing is imported."""
        if f"{module}.{name}" not in ADMITTED:
            raise _Refused(f"{module}.{name}")
        return ADMITTED[f"{module}.{name}"]


def _unpickle(data: bytes, origin: str) -> Any:
    stream = io.BytesIO(data)
    try:
        value = _Unpickler(stream, encoding="latin1").load()
    except _Refused as e:
        raise ReaderError(
            f"{origin} must hold arrays by name alone; it names {printable(str(e))[:80]}, which is code, and none is "
            "run from a file: where it comes from, save the arrays with numpy.savez."
        ) from e
    except ReaderError as e:
        raise ReaderError(f"{origin} must hold whole arrays: {e}") from e
    except Exception as e:  # damaged bytes raise nearly every kind there is
        raise ReaderError(f"{origin} must hold a whole pickled dict of arrays; found {printable(str(e))[:120]}.") from e
    if stream.read(1):
        raise ReaderError(f"{origin} must end with its pickle; there is more behind it.")
    return value


def _flat(value: Any, own: str, origin: str) -> Iterator[tuple[str, Any]]:
    """(name, array) for arrays, (name, None) for what is none; each container once, however often it is referred to."""
    waiting: list[tuple[tuple[str, ...], Any]] = [((), value)]
    names: set[str] = set()
    seen: set[int] = set()
    while waiting:
        path, one = waiting.pop()
        inner = one.value if isinstance(one, _Array) else one
        items = (
            inner.items() if isinstance(inner, dict) else enumerate(inner) if isinstance(inner, (list, tuple)) else ()
        )
        if isinstance(inner, (dict, list, tuple)) and id(inner) not in seen:
            seen.add(id(inner))
            if len(path) >= DEPTH:
                raise ReaderError(f"{origin} must hold arrays by name; they are nested more than {DEPTH} deep.")
            single = isinstance(one, _Array) and one.single
            waiting.extend(reversed([(path if single else (*path, _key(k)), v) for k, v in items]))
            continue
        name = "/".join(path) or own
        if name in names:
            raise ReaderError(f"Every array of {origin} must have a name of its own; {printable(name[:80])} has not.")
        names.add(name)
        yield name, inner if isinstance(inner, np.ndarray) else None


def _key(key: Any) -> str:
    return key.decode("utf-8", "replace") if isinstance(key, bytes) else str(key)
