"""What `torch.save` wrote, with tensors and plain values alone: never a class or function of the file's choice.

The pickle is walked first. Names on a written list of harmless values (scalars of NumPy, paths, name spaces of
options) become empty stand-ins, for they say nothing of weights; any other name beside torch's own tensors is refused.
Then torch reads it with `weights_only=True`. Not covered: quantised, sparse and nested tensors.
"""

from __future__ import annotations

import io
import os
import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO

import torch

from regraft.errors import ReaderError
from regraft.printable import printable
from regraft.readers.archives import open_archive
from regraft.readers.pickles import Scan, scan

LEGACY = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
"""How files begin that torch wrote before it wrote zip archives (version 1.6); five pickles and the bytes follow."""
LEGACY_PICKLES = 5
PLAIN = re.compile(
    r"torch\.(\w+Storage|storage\.\w+Storage|Size|device|Tensor|nn\.parameter\.Parameter|_tensor\._rebuild_from_type_v2"
    r"|(b?float|int|uint|complex|bool|half|double|long|short)\w*)"
    r"|torch\._utils\._rebuild_(tensor|tensor_v2|tensor_v3|parameter|parameter_with_state)"
    r"|collections\.(OrderedDict|Counter)|_codecs\.encode|(builtins|__builtin__)\.(set|complex)"
)
"""Names that tensors and plain values are made of; torch admits them too."""


class _Nothing:
    """Stands for a value that is no weight, whatever it was made from."""

    def __new__(cls, *_: object) -> _Nothing:
        return object.__new__(cls)

    def __setstate__(self, _: object) -> None:
        pass


class _Mapping(OrderedDict[Any, Any]):
    """Stands for a dict that is made from more than its entries, as defaultdict is from a factory."""

    def __init__(self, *_: object) -> None:
        super().__init__()


_FOLDERS = tuple(
    f"{module}.{name}"
    for module in ("pathlib", "pathlib._local")
    for name in ("Path", "PurePath", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
)
EMPTIED: dict[str, Callable[..., object]] = {
    **dict.fromkeys(_FOLDERS, _Nothing),
    **{
        f"numpy.{module}.{name}": _Nothing
        for module in ("core.multiarray", "_core.multiarray")
        for name in ("scalar", "_reconstruct")
    },
    **{f"{m}.{n}": _Nothing for m in ("builtins", "__builtin__") for n in ("list", "dict", "int", "float", "str")},
    **{f"datetime.{name}": _Nothing for name in ("datetime", "date", "time", "timedelta", "timezone")},
    "collections.defaultdict": _Mapping,
    **dict.fromkeys(
        ("numpy.dtype", "numpy.ndarray", "argparse.Namespace", "torch.torch_version.TorchVersion"), _Nothing
    ),
    **dict.fromkeys(
        (
            "pytorch_lightning.utilities.parsing.AttributeDict",
            "lightning.pytorch.utilities.parsing.AttributeDict",
            "lightning_fabric.utilities.data.AttributeDict",
            "lightning.fabric.utilities.data.AttributeDict",
            "easydict.EasyDict",
            "yacs.config.CfgNode",
        ),
        OrderedDict,
    ),
}
"""Harmless values found in training checkpoints, by name, and what stands for them: for kinds of dict, a dict."""


def load_pickled(file: BinaryIO, origin: str) -> Any:
    """What `torch.save` wrote to the file: mappings, lists, tensors on the CPU and plain values.

    Raises ReaderError naming `origin` for whatever is damaged, asks for code, or claims more than the file holds.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    found = _scan_legacy(file, origin) if file.read(len(LEGACY)) == LEGACY else _scan_archive(file, origin)
    _admit(found, origin)
    file.seek(0)
    value = _load(file, origin)
    for tensor in _tensors(value):
        _check(tensor, size, origin)
    return value


def _scan_legacy(file: BinaryIO, origin: str) -> list[Scan]:
    file.seek(0)
    return [scan(file, origin) for _ in range(LEGACY_PICKLES)]


def _scan_archive(file: BinaryIO, origin: str) -> list[Scan]:
    """Walk the pickle in the archive, and read every entry so that its checksum is compared."""
    with open_archive(file, origin) as archive:
        root = archive.namelist()[0].partition("/")[0] if archive.namelist() else ""
        wanted = f"{root}/data.pkl"
        if wanted not in archive.namelist():
            raise ReaderError(f"{origin} must be a file that torch.save wrote; its archive has no data.pkl.")
        for name in archive.namelist():
            with archive.open(name) as entry:
                while entry.read(1 << 20):
                    pass
        return [scan(io.BytesIO(archive.read(wanted)), origin)]


def _admit(found: Iterable[Scan], origin: str) -> None:
    names = sorted({n for one in found for n in one.names if not PLAIN.fullmatch(n) and n not in EMPTIED})
    if names:
        listed = ", ".join(printable(name[:80]) for name in names[:3]) + (", ..." if len(names) > 3 else "")
        raise ReaderError(
            f"{origin} must hold tensors alone; it names {listed}, which is code, and none is run from a file: where "
            'it comes from, load it and save `torch.save(model.state_dict(), "weights.pt")`.'
        )
    codecs = sorted({c for one in found if "_codecs.encode" in one.names for c in one.codecs})
    if codecs:
        raise ReaderError(f"{origin} must hold bytes as they are; it would have them encoded as {codecs[0]}.")


def _load(file: BinaryIO, origin: str) -> Any:
    stand_ins: list[Any] = [(stand_in, name) for name, stand_in in EMPTIED.items()]
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(stand_ins):
            warnings.simplefilter("ignore")  # of old protocols and storages, which are nobody's fault here
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as e:  # damaged bytes raise nearly every kind there is
        reason = printable(next(iter(str(e).splitlines()), "") or type(e).__name__)[:160]
        raise ReaderError(f"{origin} must be a whole file of tensors; torch cannot read it ({reason}).") from e


def _tensors(value: Any) -> list[torch.Tensor]:
    """Every tensor in what was loaded; each container is looked into once."""
    found, waiting, seen = [], [value], set()
    while waiting:
        one = waiting.pop()
        if torch.is_tensor(one):
            found.append(one)
        elif isinstance(one, (dict, list, tuple, set)) and id(one) not in seen:
            seen.add(id(one))
            waiting.extend(one.values() if isinstance(one, dict) else one)
    return found


def _check(tensor: torch.Tensor, size: int, origin: str) -> None:
    """Refuse a tensor that is more, or something else, than bytes of this file."""
    kind = type(tensor)
    if kind not in (torch.Tensor, torch.nn.Parameter) or tensor.layout != torch.strided or tensor.is_quantized:
        raise ReaderError(f"{origin} must hold dense tensors; it has one of {kind.__name__}, {tensor.layout}.")
    if tensor.device.type != "cpu":
        raise ReaderError(f"{origin} must hold the values of its tensors; one has none ({tensor.device.type}).")
    claimed = tensor.numel() * tensor.element_size()
    if claimed > size:
        raise ReaderError(f"{origin} must hold what its tensors claim: {claimed:,} bytes in a file of {size:,}.")
