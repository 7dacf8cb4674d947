"""Let torchvision be imported where its compiled operators cannot be loaded.

The wheel of torchvision is built for one build of torch. Beside another one (the CUDA wheel beside the CPU build of
torch, say) its compiled half does not load, and `import torchvision` dies with "operator torchvision::nms does not
exist", because its Python half describes two operators that were never declared. Networks need only that Python half,
so declaring the two is enough. Not covered: the operators themselves (box suppression, region pooling) stay missing,
and calling one raises.
"""

from __future__ import annotations

import importlib.util
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader, FileFinder
from pathlib import Path

import torch

_MISSING = ("nms", "qnms")
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def declare_missing_operators() -> None:
    """Declare the operators that `import torchvision` describes; nothing where they exist or are declared already."""
    if _compiled_half_loads():
        return
    for name in _MISSING:
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", _SCHEMA)


def _compiled_half_loads() -> bool:
    """Whether torchvision's own library can be loaded; loading it here is what its import does first."""
    package = importlib.util.find_spec("torchvision")
    if package is None or package.origin is None:
        return False
    finder = FileFinder(str(Path(package.origin).parent), (ExtensionFileLoader, EXTENSION_SUFFIXES))
    library = finder.find_spec("_C")
    if library is None or library.origin is None:
        return False
    try:
        torch.ops.load_library(library.origin)  # type: ignore[no-untyped-call]
    except OSError:
        return False
    return True
