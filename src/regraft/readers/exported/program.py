"""Networks that `torch.export.save` wrote (`.pt2`), opened without running anything that is pickled in them.

The archive holds the graph of ATen operations as JSON, and the tensors as raw bytes or as `torch.save` wrote them; the
latter are read with `weights_only=True`. Both the layout of torch 2.9 and later (`models/*.json`, `data/weights/`) and
the older ones (`serialized_exported_program.json`) are known. `graph` and `steps` turn the graph into
operations. Not covered: packages compiled by AOTInductor, which are machine code, and custom objects.
"""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from regraft.errors import ReaderError
from regraft.printable import printable
from regraft.readers.archives import open_archive
from regraft.readers.checkpoint import Checkpoint
from regraft.readers.exported.steps import to_operations
from regraft.readers.torch_pickle import load_pickled

INSTEAD = "save a state_dict with torch.save, or export the network to ONNX"
OLD = "serialized_exported_program.json"
KINDS: dict[int, torch.dtype] = {
    code: getattr(torch, name)
    for code, name in (
        *((1, "uint8"), (2, "int8"), (3, "int16"), (4, "int32"), (5, "int64"), (12, "bool")),
        *((6, "float16"), (7, "float32"), (8, "float64"), (13, "bfloat16")),
    )
}
"""Kinds of number by their code in torch/_export/serde/schema.py."""
STRIDED = 7
Tensors = dict[str, torch.Tensor]


def read_exported_program(path: Path) -> Checkpoint:
    """The network and its tensors, float32, under the names of the exported module.

    Raises ReaderError for operations that are not on the written list, for networks exported in training mode or for
    several inputs, and for whatever cannot be read without running code.
    """
    try:
        with open(path, "rb") as file:
            return read_opened_program(file, str(path))
    except OSError as e:
        raise ReaderError(f"An exported program must be readable; {path} is not ({e.strerror or e}).") from e


def read_opened_program(file: BinaryIO, path: str) -> Checkpoint:
    """As `read_exported_program`, of a file that is open; `path` names it in errors."""
    with open_archive(file, path, compressed=True) as archive:
        names = archive.namelist()
        if not is_exported(names):
            raise ReaderError(f"{path} must be a file that torch.export.save wrote; it is not: {INSTEAD}.")
        program, stored = _read_old(archive, path) if OLD in names else _read_new(archive, path)
    version = printable(str(program.get("torch_version", "unknown")))[:40]
    try:
        found = to_operations(program, stored, path)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, StopIteration, RecursionError) as e:
        reason = printable(f"{type(e).__name__}: {e}")[:120]
        raise ReaderError(f"{path} must describe its graph as torch.export does ({reason}): {INSTEAD}.") from e
    passed = tuple(name for name in stored if name not in found.used)
    form = f"PyTorch exported program (torch {version})"
    return Checkpoint(path, form, found.tensors, "torch", passed, found.operations, found.input_shape)


def is_exported(names: Iterable[str]) -> bool:
    """Whether an archive with these entries is one that torch.export.save writes."""
    inner = {name.partition("/")[2] for name in names}
    return OLD in names or "archive_format" in inner or any(name.startswith("models/") for name in inner)


def _read_new(archive: zipfile.ZipFile, origin: str) -> tuple[dict[str, Any], Tensors]:
    names = archive.namelist()
    root = names[0].partition("/")[0]
    models = [n for n in names if n.startswith(f"{root}/models/") and n.endswith(".json")]
    if any(n.startswith(f"{root}/data/aotinductor/") for n in names):
        raise ReaderError(f"{origin} must be an exported graph; it is compiled machine code: {INSTEAD}.")
    if len(models) != 1:
        raise ReaderError(f"{origin} must hold one network; it holds {len(models)}: {INSTEAD}.")
    byteorder = f"{root}/byteorder"
    if byteorder in names and archive.read(byteorder) != b"little":
        raise ReaderError(f"{origin} must hold little-endian numbers; it does not: {INSTEAD}.")
    model = models[0].rpartition("/")[2].removesuffix(".json")
    stored = _payload(archive, f"{root}/data/weights/", f"{model}_weights_config.json", f"{model}.pt", origin)
    stored |= _payload(archive, f"{root}/data/constants/", f"{model}_constants_config.json", f"{model}.pt", origin)
    return _json(archive, models[0], origin), stored


def _read_old(archive: zipfile.ZipFile, origin: str) -> tuple[dict[str, Any], Tensors]:
    stored: Tensors = {}
    for name in ("serialized_state_dict", "serialized_constants"):
        if f"{name}.pt" in archive.namelist():
            stored |= _pickled(archive, f"{name}.pt", origin)
    return _json(archive, OLD, origin), stored


def _json(archive: zipfile.ZipFile, name: str, origin: str) -> dict[str, Any]:
    try:
        value = json.loads(archive.read(name))
    except (ValueError, RecursionError) as e:
        raise ReaderError(f"{name} in {origin} must be JSON; it is not ({printable(str(e))[:80]}).") from e
    if not isinstance(value, dict):
        raise ReaderError(f"{name} in {origin} must be a JSON object; found a {type(value).__name__}.")
    return value


def _payload(archive: zipfile.ZipFile, folder: str, config: str, whole: str, origin: str) -> Tensors:
    """The tensors of one folder: listed one by one, or all in one file of torch.save (torch 2.8)."""
    names = set(archive.namelist())
    if folder + whole in names:
        return _pickled(archive, folder + whole, origin)
    if folder + config not in names:
        return {}
    listed = _json(archive, folder + config, origin).get("config")
    if not isinstance(listed, dict):
        raise ReaderError(f"{config} in {origin} must list tensors; it does not: {INSTEAD}.")
    tensors: Tensors = {}
    for name, about in listed.items():
        where = f"The tensor {printable(name[:80])!r} of {origin}"
        try:
            entry = folder + str(about["path_name"])
            if entry not in names:
                raise ReaderError(f"{where} must lie in the archive; there is no {printable(entry[:80])!r}.")
            if about["tensor_meta"] is None:
                continue  # a custom object; a graph that uses it is refused
            if about["use_pickle"]:
                tensors |= _pickled(archive, entry, origin, alone=name)
            else:
                tensors[name] = _raw(archive.read(entry), about["tensor_meta"], where)
        except (KeyError, TypeError) as e:
            raise ReaderError(f"{where} must be described as torch.export does; it is not: {INSTEAD}.") from e
    return tensors


def _pickled(archive: zipfile.ZipFile, entry: str, origin: str, alone: str = "") -> Tensors:
    """Tensors by name from a file of torch.save in the archive; one without a name is called `alone`."""
    data = archive.read(entry)
    if not data:
        return {}
    value = load_pickled(io.BytesIO(data), f"{entry} in {origin}")
    value = {alone: value} if alone else value
    if not isinstance(value, dict) or not all(isinstance(k, str) for k in value):
        raise ReaderError(f"{entry} in {origin} must hold tensors by name; it does not: {INSTEAD}.")
    return {name: tensor.detach() for name, tensor in value.items() if torch.is_tensor(tensor)}


def _raw(data: bytes, about: Mapping[str, Any], where: str) -> torch.Tensor:
    """A tensor from the bytes of its storage, after its shape and strides were held against them."""
    if about["dtype"] not in KINDS or about["layout"] != STRIDED:
        raise ReaderError(f"{where} must be a dense tensor of common numbers; it is not: {INSTEAD}.")
    kind = KINDS[about["dtype"]]
    shape, strides = ([size["as_int"] for size in about[key]] for key in ("sizes", "strides"))
    offset = about["storage_offset"]["as_int"]
    if len(shape) != len(strides) or not all(type(n) is int and n >= 0 for n in (*shape, *strides, offset)):
        raise ReaderError(f"{where} must have sizes, strides and an offset from 0 on; it has not.")
    have = len(data) // kind.itemsize
    count = math.prod(shape)
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if count and (last >= have or count > have):
        raise ReaderError(f"{where} must lie in its {len(data):,} bytes; it claims {count:,} numbers up to {last:,}.")
    if not count:
        return torch.empty(shape, dtype=kind)
    return torch.frombuffer(bytearray(data), dtype=kind, count=have).as_strided(shape, strides, offset).contiguous()
