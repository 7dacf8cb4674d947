"""Networks in ONNX files, as steps of regraft with their weights.

The file is parsed, its constants and sizes are worked out, and every other step of its graph is written as a layer or
function of torch. Nothing of the file is run. Pictures may come in as (batch, channels, height, width) or, as from
TensorFlow, (batch, height, width, channels): the network that comes out takes the former.

Knows files; what a graph means is known next door. Not covered: files of more than 2 GiB (their weights may lie
beside them), several inputs, control flow that depends on the picture, sequences, recurrent layers, activations that
are rounded to whole numbers, operators other than those of onnx.ai and a few of scikit-learn's.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from regraft.errors import ReaderError
from regraft.printable import printable
from regraft.readers.checkpoint import Checkpoint
from regraft.readers.onnx.graph import read_graph
from regraft.readers.onnx.tensors import Allowance

OPSETS = range(7, 26)
"""Versions of the operators that are known: older ones broadcast otherwise, newer ones may mean anything."""
_LARGEST = 2**31 - 1
_MOST_STEPS = 200_000


def read_onnx(path: Path, *, output: str | None = None) -> Checkpoint:
    """The network in an ONNX file: its steps, and its weights as float32 in torch's layout.

    output: which of several outputs is meant. Weights in files beside the model are read where these lie in its folder
    (or below) and are plain files, no links.

    Raises ReaderError where the file is none, damaged or dishonest about its sizes, where it holds a step that cannot
    be followed, and where the package `onnx` is missing.
    """
    try:
        import onnx  # noqa: F401
    except ImportError as e:
        raise ReaderError("Reading ONNX files needs the package onnx: run `pip install regraft[onnx]`.") from e
    allowed = Allowance(path)
    model = _parsed(path, allowed)
    opset = _opset(model, path)
    found = read_graph(_inlined(model, path).graph, path, opset, allowed, output)
    writer = f", written by {printable(model.producer_name)[:60]} {printable(model.producer_version)[:30]}"
    return Checkpoint(
        path=str(path),
        format=f"ONNX, version {opset} of the operators{writer.rstrip() if model.producer_name else ''}",
        tensors=found.tensors,
        passed_over=found.passed_over,
        operations=found.operations,
        input_shape=found.input_shape,
    )


def _parsed(path: Path, allowed: Allowance) -> Any:
    """The model as the file has it."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        model = onnx.ModelProto.FromString(_bytes(path, allowed))
    except DecodeError as e:
        raise ReaderError(
            f"{path} must be a whole ONNX file; it cannot be parsed: it is another file or cut short."
        ) from e
    if not model.opset_import or not model.graph.node:
        missing = "steps" if model.opset_import else "version of the operators"
        raise ReaderError(f"{path} must be a whole ONNX file; it has no {missing}: it is another file or cut short.")
    if not _is_text(model):
        raise ReaderError(f"The names in {path} must be text; some are not: it is damaged.")
    return model


def _is_text(message: Any) -> bool:
    """Whether all names inside are text: where they are not, the parser hands out bytes."""
    for part, value in message.ListFields():
        if part.type == part.TYPE_STRING:
            if any(isinstance(text, bytes) for text in ([value] if isinstance(value, str | bytes) else value)):
                return False
        elif part.type == part.TYPE_MESSAGE:
            several = [value] if hasattr(value, "ListFields") else value
            if not all(_is_text(inner) for inner in several):
                return False
    return True


def _bytes(path: Path, allowed: Allowance) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as e:
        raise ReaderError(f"{path} must be a file that can be read: {e.strerror}.") from e
    try:
        seen = os.fstat(descriptor)
        if not stat.S_ISREG(seen.st_mode):
            raise ReaderError(f"{path} must be a plain file; it is a folder or device.")
        if seen.st_size > _LARGEST:
            raise ReaderError(
                f"An ONNX file can have at most 2 GiB; {path} has {seen.st_size:,} bytes: save the model with its "
                "weights in a file beside it."
            )
        allowed.grant(seen)
        with os.fdopen(os.dup(descriptor), "rb") as file:
            return file.read(seen.st_size)
    finally:
        os.close(descriptor)


def _opset(model: Any, path: Path) -> int:
    versions = {entry.domain: int(entry.version) for entry in model.opset_import}
    found = versions.get("", versions.get("ai.onnx", 0))
    if found not in OPSETS:
        raise ReaderError(
            f"The operators of an ONNX file must be of version {OPSETS[0]} to {OPSETS[-1]}; those of {path} are of "
            f"version {found or 'unknown'}: export or convert it with opset 17, say."
        )
    return found


def _inlined(model: Any, path: Path) -> Any:
    """The model with its own functions put in where they are called, unless that explodes."""
    import onnx.inliner

    if not model.functions:
        return model
    functions = {(f.domain, f.name): f for f in model.functions}
    sizes: dict[tuple[str, str], int] = {}
    total = sum(_steps_of(node, functions, sizes, ()) for node in _all_nodes(model.graph.node))
    if total > _MOST_STEPS or len(functions) < len(model.functions):
        raise ReaderError(
            f"The functions of {path} must stay below {_MOST_STEPS:,} steps, and each have a name of its own: export "
            "it without functions."
        )
    try:
        return onnx.inliner.inline_local_functions(model)
    except Exception as e:  # what compiled code makes of a damaged model
        raise ReaderError(f"The functions of {path} must be sound; they are not: {printable(str(e))[:200]}.") from e


def _steps_of(
    node: Any, functions: Mapping[tuple[str, str], Any], sizes: dict[tuple[str, str], int], above: tuple[Any, ...]
) -> int:
    """How many steps a node becomes; more than are allowed where functions call each other in a circle."""
    key = (node.domain, node.op_type)
    if key not in functions:
        return 1
    if key in above or len(above) > 50:
        return _MOST_STEPS + 1
    if key not in sizes:
        nodes = _all_nodes(functions[key].node)
        sizes[key] = sum(_steps_of(inner, functions, sizes, (*above, key)) for inner in nodes)
    return sizes[key]


def _all_nodes(nodes: Any) -> Iterator[Any]:
    """The nodes and those of the graphs that they hold."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in [attribute.g, *attribute.graphs]:
                yield from _all_nodes(graph.node)
