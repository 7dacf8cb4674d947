"""Pretrained networks and weights of every framework: a path becomes a `Checkpoint`.

    checkpoint         what a file holds
    torch_file         PyTorch state dicts (torch_pickle, pickles, state_dict)
    safetensors_file   safetensors
    exported/          torch.export
    keras/             Keras 2 and 3: whole models, weights (HDF5)
    onnx/              ONNX
    tensorflow/        TensorFlow 1 and 2: checkpoints, SavedModels, frozen graphs
    arrays             .npz and .npy, as from Theano
    flax_file          Flax
    archives           zip files; protobuf_wire  protocol buffers

No reader runs anything that a file brings along, and none believes a header further than the file is long.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable
from pathlib import Path

from regraft.errors import ReaderError
from regraft.readers.arrays import checkpoint_of
from regraft.readers.checkpoint import Checkpoint, Layout
from regraft.readers.tensorflow.bundle import is_old_checkpoint

__all__ = ["Checkpoint", "Layout", "checkpoint_of", "is_file_spec", "read_checkpoint"]

READERS = {
    ".pt": ("torch_file", "read_torch"),
    ".pth": ("torch_file", "read_torch"),
    ".bin": ("torch_file", "read_torch"),
    ".ckpt": ("torch_file", "read_torch"),
    ".tar": ("torch_file", "read_torch"),
    ".pt2": ("exported.program", "read_exported_program"),
    ".safetensors": ("safetensors_file", "read_safetensors"),
    ".json": ("safetensors_file", "read_safetensors"),
    ".keras": ("keras.file", "read_keras"),
    ".h5": ("keras.file", "read_keras"),
    ".hdf5": ("keras.file", "read_keras"),
    ".onnx": ("onnx.file", "read_onnx"),
    ".pb": ("tensorflow.graph", "read_tensorflow_graph"),
    ".npz": ("arrays", "read_arrays"),
    ".npy": ("arrays", "read_arrays"),
    ".msgpack": ("flax_file", "read_flax"),
}
"""Module and function by the ending of the file."""
STUBS = (
    (b"version https://git-lfs", "a Git LFS pointer: run `git lfs pull`"),
    (b"<", "a web page or XML: fetch it again"),
)
"""What is often found in the place of a file of any kind, by its first bytes."""


def is_file_spec(spec: str) -> bool:
    """Whether this names weights on the disk: a file, a folder or prefix of TensorFlow, or what is spelt like one.

    A folder that merely has the name of a network is none.
    """
    path = Path(spec)
    if path.is_dir():
        return os.sep in spec or _holds_graph(path) or _holds_checkpoint(path)
    return path.exists() or _is_prefix(path) or path.suffix.lower() in READERS


def read_checkpoint(path: str | Path) -> Checkpoint:
    """What the file, folder or TensorFlow prefix at `path` holds.

    Raises ReaderError of one sentence where there is nothing, or nothing that can be read safely.
    """
    place = Path(path)
    module, function = _reader(place)
    _refuse_stub(place)
    read: Callable[[Path], Checkpoint] = getattr(importlib.import_module(f"regraft.readers.{module}"), function)
    found = read(place)
    if not found.tensors:
        beside = f", only {', '.join(found.passed_over[:3])}, never weights" if found.passed_over else ""
        raise ReaderError(f"{place} must hold weights; none are in it{beside} ({found.format}).")
    return found


def _refuse_stub(place: Path) -> None:
    if not place.is_file():
        return
    try:
        with open(place, "rb") as file:
            head = file.read(32)
    except OSError as e:
        raise ReaderError(f"A file of weights must be readable; {place} is not ({e.strerror or e}).") from e
    if not head:
        raise ReaderError(f"A file of weights must hold something; {place} is empty.")
    for magic, said in STUBS:
        if head.lstrip().startswith(magic):
            raise ReaderError(f"{place} must be a file of weights; it is {said}.")


def _reader(place: Path) -> tuple[str, str]:
    checkpoint, graph = ("tensorflow.checkpoint", "read_tensorflow_checkpoint"), READERS[".pb"]
    if place.is_dir():
        if _holds_graph(place):
            return graph
        if _holds_checkpoint(place):
            return checkpoint
        raise ReaderError(
            f"A folder of weights must be a SavedModel, a TensorFlow checkpoint or a Hugging Face model; {place} has "
            "no saved_model.pb, *.index or config.json."
        )
    if place.exists() and not place.is_file():
        raise ReaderError(f"Weights must be a file or a folder; {place} is neither.")
    if (not place.exists() and _is_prefix(place)) or (place.exists() and _is_of_tensorflow(place)):
        return checkpoint
    if not place.exists():
        raise ReaderError(f"The file of weights must exist; there is no {place}.")
    if place.suffix.lower() in READERS:
        return READERS[place.suffix.lower()]
    raise ReaderError(
        f"A file of weights must end in one of {', '.join(READERS)}, or be a TensorFlow prefix; found {place}."
    )


def _is_prefix(place: Path) -> bool:
    return Path(f"{place}.index").exists()


def _holds_graph(folder: Path) -> bool:
    return (folder / "saved_model.pb").exists()


def _holds_checkpoint(folder: Path) -> bool:
    return (folder / "checkpoint").exists() or any(folder.glob("*.index"))


def _is_of_tensorflow(file: Path) -> bool:
    """Whether this is one of the files of a checkpoint of TensorFlow, or the only one of the oldest kind."""
    parts = re.search(r"\.(index|meta|data-\d+-of-\d+)$", file.name)
    return file.name == "checkpoint" or bool(parts) or is_old_checkpoint(file)
