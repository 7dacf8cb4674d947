"""Files of Keras: whole models, which are rebuilt as operations, and weights alone.

    .keras              a zip archive: config.json, metadata.json, model.weights.h5
    .h5, .hdf5          HDF5; a whole model of Keras 2 or 3 has the attribute `model_config`
    .weights.h5, .h5    HDF5 with weights alone, named or numbered

Keras is not needed, and nothing of the description is run: layers are looked up in a written table. Knows the
containers. Not covered: models saved as folders, weights in several parts or as .npz, Keras 1 models.
"""

from __future__ import annotations

import json
import re
import stat
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from regraft.errors import ReaderError
from regraft.printable import printable
from regraft.readers import archives
from regraft.readers.checkpoint import Checkpoint
from regraft.readers.keras.graph import Model, read_model
from regraft.readers.keras.hdf5 import MAGIC, Array, Tree, read_tree
from regraft.readers.keras.layers import Weights, network, refuse_unknown
from regraft.readers.keras.weights import (
    is_numbered,
    is_other,
    named_weights,
    numbered_weights,
    readable_names,
    root_of_names,
)

LONGEST = 400
"""Characters of a reason; names in a file may be of any length."""
CONFIG, METADATA, WEIGHTS = "config.json", "metadata.json", "model.weights.h5"


def read_keras(path: Path) -> Checkpoint:
    """The network and weights of a `.keras` or `.h5` file, or the weights where it holds those alone.

    A whole model comes as `operations` on pictures (n, channels, height, width) with tensors in torch's layout,
    float32; weights alone as stored, named like `conv2d/kernel`, in the layout `keras`. What optimizers and random
    generators left in the file is named in `passed_over`. Raises ReaderError naming the file for anything damaged or
    hostile, and for a layer that is not rebuilt.
    """
    try:
        with open(path, "rb") as file:
            magic = file.read(8)
    except OSError as e:
        raise ReaderError(f"A file of weights must be readable; {printable(str(path))} is not: {e.strerror}.") from e
    if magic.startswith(archives.MAGIC):
        return _archive(path)
    if magic == MAGIC:
        return _hdf5(path)
    raise ReaderError(
        f"A Keras file must be a zip archive (.keras) or HDF5 (.h5); {printable(str(path))} begins with {magic!r}."
    )


def _archive(path: Path) -> Checkpoint:
    with open(path, "rb") as file, archives.open_archive(file, printable(str(path)), compressed=True) as archive:
        entries = _entries(archive, path)
        missing = [name for name in (CONFIG, WEIGHTS) if name not in entries]
        if missing:
            raise ReaderError(
                f"A .keras file must hold {CONFIG} and {WEIGHTS}; {printable(str(path))} lacks {missing}."
            )
        config = _json(archive.read(CONFIG), path)
        metadata = _json(archive.read(METADATA), path) if METADATA in entries else {}
        content = archive.read(WEIGHTS)
    tree = read_tree(path, content, skip=is_other)
    version = _version(metadata.get("keras_version") if isinstance(metadata, Mapping) else None) or 3
    return _whole(path, f"Keras {version} (.keras)", config, tree, version, lambda m: numbered_weights(tree, m))


def _entries(archive: zipfile.ZipFile, path: Path) -> frozenset[str]:
    """Names in the archive, of which none may lead out of it, be a link, or differ from another by case alone."""
    names: set[str] = set()
    for entry in archive.infolist():
        name, mode = entry.filename, entry.external_attr >> 16
        parts = re.split(r"[/\\]", name.rstrip("/"))
        kind = stat.S_IFMT(mode)
        if ".." in parts or "" in parts or ":" in name or "\\" in name or kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise ReaderError(
                f"{printable(str(path))} must hold plain files; its entry {printable(name)!r} is a link or leads out."
            )
        if name.casefold() in names:
            raise ReaderError(f"Every entry of {printable(str(path))} must have a name of its own; {name!r} has not.")
        names.add(name.casefold())
    return frozenset(archive.namelist())


def _hdf5(path: Path) -> Checkpoint:
    tree = read_tree(path, skip=is_other)
    root = root_of_names(tree)
    described = tree.text("", "model_config")
    version = _version(tree.text("", "keras_version") or tree.text(root or "", "keras_version"))
    if described is not None and root is not None:
        config = _json(described.encode("utf-8", "surrogateescape"), path)
        find = lambda model: named_weights(tree, root, model)  # noqa: E731
        turned = (tree.text("", "backend") or tree.text(root, "backend")) == "theano"
        return _whole(path, f"Keras {version or 2} HDF5", config, tree, version or 2, find, turned=turned)
    if root is None and not is_numbered(tree):
        raise ReaderError(
            f"An HDF5 file of Keras must list its layers or hold `vars`; {printable(str(path))} has neither: it is of "
            "another program."
        )
    return _weights(path, tree, root, version)


def _whole(
    path: Path,
    form: str,
    config: Any,
    tree: Tree,
    version: int,
    find: Callable[[Model], Weights],
    *,
    turned: bool = False,
) -> Checkpoint:
    try:
        model = read_model(config)
        refuse_unknown(model)
        weights = find(model)
        operations, tensors, shape = network(model, weights, version=version, turned=turned)
    except ReaderError as e:
        reason = printable(str(e).rstrip("."))[:LONGEST]
        raise ReaderError(f"{printable(str(path))} cannot be rebuilt: {reason}.") from e
    used = {id(array) for of_layer in weights.values() for array in of_layer.values()}
    over = (*tree.skipped, *(name for name, array in tree.arrays.items() if id(array) not in used))
    return Checkpoint(str(path), form, tensors, "torch", over, operations, shape)


def _weights(path: Path, tree: Tree, root: str | None, version: int | None) -> Checkpoint:
    try:
        names = readable_names(tree, root)
    except ReaderError as e:
        raise ReaderError(f"{printable(str(path))} is incomplete: {e}.") from e
    tensors = {name: _tensor(tree.arrays[place]) for place, name in names.items()}
    over = (*tree.skipped, *(name for name in tree.arrays if name not in names))
    form = "Keras weights, numbered" if root is None else f"Keras {version or 1} HDF5 weights"
    return Checkpoint(str(path), form, tensors, "keras", over)


def _tensor(array: Array) -> torch.Tensor:
    return torch.from_numpy(array)


def _version(text: Any) -> int | None:
    """The first number of a version."""
    found = re.match(r"(\d{1,3})\.", text) if isinstance(text, str) else None
    return int(found[1]) if found else None


def _json(content: bytes, path: Path) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as e:
        raise ReaderError(f"The description in {printable(str(path))} must be JSON; it is not: {e}.") from e
