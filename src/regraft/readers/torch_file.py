"""PyTorch's own files: state dicts and training checkpoints (`.pt .pth .bin .ckpt`), always with `weights_only=True`.

TorchScript archives and pickled modules are programs and are refused. A file of `torch.export` under another ending
is read as what it is. Knows how such files begin and which entries they have; `torch_pickle` reads tensors,
`state_dict` finds the weights among them.
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

from regraft.errors import ReaderError
from regraft.readers.archives import MAGIC, open_archive
from regraft.readers.checkpoint import Checkpoint
from regraft.readers.exported.program import is_exported, read_exported_program
from regraft.readers.state_dict import weights_of
from regraft.readers.torch_pickle import LEGACY, load_pickled

FORMAT = "PyTorch"
OTHERS = (
    (b"\x89HDF\r\n", "an HDF5 file: give it the ending .h5"),
    (b"\x80", "a plain pickle, which torch.save did not write: load it where it comes from and torch.save its tensors"),
)
"""What is often found under the name of a PyTorch file, by its first bytes."""


def read_torch(path: Path) -> Checkpoint:
    """The weights in a state dict or training checkpoint, under the names that the file gives them.

    Raises ReaderError for TorchScript, pickled modules, and whatever is damaged or asks for code.
    """
    try:
        with open(path, "rb") as file:
            if _exported(file, str(path)):
                return read_exported_program(path)
            return read_opened(file, str(path))
    except OSError as e:
        raise ReaderError(f"A PyTorch file must be readable; {path} is not ({e.strerror or e}).") from e


def read_opened(file: BinaryIO, origin: str) -> Checkpoint:
    """As `read_torch`, of a file that is open; `origin` names it in errors."""
    tensors, passed = weights_of(load_pickled(file, origin), origin)
    return Checkpoint(origin, FORMAT, tensors, passed_over=passed)


def _exported(file: BinaryIO, origin: str) -> bool:
    """Whether torch.export wrote it. Raises ReaderError for what neither that nor torch.save can have written."""
    head = file.read(max(len(LEGACY), 32))
    file.seek(0)
    if head.startswith(LEGACY):
        return False
    if not head.startswith(MAGIC):
        found = next((said for magic, said in OTHERS if head.startswith(magic)), "none, or an empty or damaged one")
        raise ReaderError(f"{origin} must be a file that torch.save wrote; it is {found}.")
    with open_archive(file, origin, compressed=True) as archive:
        names = archive.namelist()
    if is_exported(names):
        return True
    if any(name.partition("/")[2].startswith(("code/", "constants.pkl")) for name in names):
        raise ReaderError(
            f"{origin} must be a state dict; it is a TorchScript archive, a program: where it is trusted, save "
            '`torch.save(torch.jit.load(FILE).state_dict(), "weights.pt")`.'
        )
    return False
