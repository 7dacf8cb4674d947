"""Networks of TensorFlow, without TensorFlow: SavedModel folders and frozen graphs.

A SavedModel holds a graph (`saved_model.pb`) and a checkpoint of its variables (`variables/variables.index`, ...); what
it is for is said by signatures, of which the one for serving is taken. A frozen graph (`.pb`) holds its weights as
constants; it takes what its placeholder takes and gives what nothing in it reads. Pictures go into the network that
comes out as (batch, channels, height, width).

Assets, custom operations and Python objects that a SavedModel brings along are never looked at.

Knows files. Not covered: several inputs; `saved_model.pbtxt`; graphs in parts above 2 GiB.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from regraft.errors import ReaderError
from regraft.printable import printable
from regraft.readers.checkpoint import Checkpoint
from regraft.readers.onnx.tensors import Allowance
from regraft.readers.protobuf_wire import Message
from regraft.readers.tensorflow.bundle import INDEX, Bundle, open_bundle, read_tensor
from regraft.readers.tensorflow.network import LEAVES, Source, write_network
from regraft.readers.tensorflow.nodes import Graph, GraphNode, Ref, parse_ref, read_graph
from regraft.readers.tensorflow.tensors import Array, allowance, shape_of
from regraft.readers.tensorflow.variables import stored_keys

MODEL = "saved_model.pb"
LARGEST = 2**31
SERVING = ("serving_default", "serve")
SILENT = ("__saved_model_init_op", "__saved_model_train_op")

# What may stand at the end of a graph without being what it computes.
_ASIDE = {"Assert", "Const", "NoOp", "Placeholder", "PlaceholderWithDefault", "SaveV2", "Assign", "AssignVariableOp"}


def read_tensorflow_graph(path: Path, *, output: str | None = None) -> Checkpoint:
    """The network in a SavedModel folder (or its `saved_model.pb`) or in a frozen graph, with its weights.

    output: which one is meant where there are several: its name in the signature, or the name of a step of a frozen
    graph. Raises ReaderError for files that are damaged, for networks of several inputs, for several outputs when none
    is named, and for every operation that is not one of those that regraft knows.

        >>> read_tensorflow_graph(Path("exported/")).operations
    """
    file = path / MODEL if path.is_dir() else path
    data = _read(file)
    try:
        if file.name == MODEL:
            return _saved_model(path, file, Message(data), output)
        return _frozen(path, Message(data), output)
    except ValueError as e:
        kind = "SavedModel" if file.name == MODEL else "frozen graph"
        raise ReaderError(
            f"{file} must be a {kind} of TensorFlow; {printable(str(e)[:300])}: get the file from its source again."
        ) from e


def _frozen(path: Path, proto: Message, output: str | None) -> Checkpoint:
    graph = read_graph(proto)
    if not graph.nodes:
        raise ValueError("it holds no steps")
    last = _frozen_output(path, graph, output)
    inputs = [node for node in graph.in_order(last, LEAVES) if node.op == "Placeholder"]
    if len(inputs) != 1:
        listed = ", ".join(printable(node.name) for node in inputs) or "none"
        raise ReaderError(f"The graph of {path} must have one input; {printable(last[0])!r} is computed from {listed}.")
    source = Source(
        *(graph, inputs[0].name, _declared(inputs[0]), last, _no_variables, True, str(path)),
        allowance(path),
    )
    operations, tensors, shape = write_network(source)
    return Checkpoint(str(path), "TensorFlow frozen graph", tensors, operations=operations, input_shape=shape)


def _frozen_output(path: Path, graph: Graph, output: str | None) -> Ref:
    """The step that is named, or the only one that nothing reads."""
    if output is not None:
        if parse_ref(output)[0] not in graph.nodes:
            raise ReaderError(f"The output of {path} must be a step of its graph; there is no {printable(output)!r}.")
        return parse_ref(output)
    read = {ref[0] for node in graph.nodes.values() for ref in node.inputs}
    ends = [name for name, node in graph.nodes.items() if name not in read and node.op not in _ASIDE]
    ends = [name for name in ends if name not in graph.awaited] or ends
    if len(ends) != 1:
        listed = ", ".join(printable(name) for name in ends[:8]) or "none"
        raise ReaderError(
            f"The graph of {path} must end in one output, or one must be named (output=...); it has {listed}."
        )
    return ends[0], 0


def _declared(node: GraphNode) -> tuple[int | None, ...]:
    shape = node.attributes.get("shape")
    listed = node.attributes.get("_output_shapes") or [None]
    shape = shape if isinstance(shape, tuple) else listed[0]
    return shape if isinstance(shape, tuple) else ()


# ---- SavedModel -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Signature:
    """Name and shape of the one input, and the outputs by name."""

    input: Ref
    shape: tuple[int | None, ...]
    output: Ref


def _saved_model(path: Path, file: Path, proto: Message, output: str | None) -> Checkpoint:
    meta = _meta_graph(file, proto)
    signature = _signature(file, meta, output)
    graph = read_graph(meta.message(2))
    prefix = f"{file.parent}/variables/variables"
    bundle = open_bundle(prefix) if Path(prefix + INDEX).exists() else Bundle(prefix, 0, {})
    stored = stored_keys(graph, meta, bundle)
    allowed = allowance(file, *(bundle.shard(i) for i in range(bundle.shards)))
    read: set[str] = set()
    source = Source(
        *(graph, signature.input[0], signature.shape, signature.output),
        *(_variables(file, bundle, stored, allowed, read), False, str(path), allowed),
    )
    operations, tensors, shape = write_network(source)
    unread = tuple(sorted(bundle.entries.keys() - read))
    return Checkpoint(str(path), "TensorFlow SavedModel", tensors, "torch", unread, operations, shape)


def _meta_graph(file: Path, proto: Message) -> Message:
    """The graph for serving."""
    metas = proto.messages(2)
    serving = [meta for meta in metas if meta.message(1).texts(4) == ["serve"]]
    found = serving or metas
    if len(found) != 1:
        tags = "; ".join(printable("+".join(meta.message(1).texts(4))) for meta in metas) or "none"
        raise ReaderError(f"{file} must hold one graph with the tag `serve`; its graphs have the tags {tags}.")
    return found[0]


def _signature(file: Path, meta: Message, output: str | None) -> _Signature:
    signatures = {name: s for name, s in meta.by_name(5).items() if name not in SILENT and s.by_name(1)}
    name = next((s for s in SERVING if s in signatures), next(iter(signatures), "") if len(signatures) == 1 else "")
    if not name:
        listed = ", ".join(map(printable, signatures)) or "none"
        raise ReaderError(
            f"{file} must have a signature `serving_default`; it has {listed}: export with `model.export(...)`, or "
            "`tf.saved_model.save(model, folder, signatures=function)`."
        )
    inputs, outputs = signatures[name].by_name(1), signatures[name].by_name(2)
    if len(inputs) != 1:
        listed = ", ".join(map(printable, inputs))
        raise ReaderError(f"The signature {printable(name)!r} of {file} must take one input; it takes {listed}.")
    if output is None and len(outputs) == 1:
        output = next(iter(outputs))
    if output is None or output not in outputs:
        listed = ", ".join(map(printable, outputs)) or "none"
        raise ReaderError(
            f"The signature {printable(name)!r} of {file} must have one output, or one must be named (output=...); "
            f"it has {listed}."
        )
    given = next(iter(inputs.values()))
    return _Signature(parse_ref(given.text(1)), shape_of(given.message(3)) or (), parse_ref(outputs[output].text(1)))


def _variables(
    file: Path, bundle: Bundle, stored: Mapping[str, str], allowed: Allowance, read: set[str]
) -> Callable[[str], Array]:
    """What gives the tensor of a variable by the name of its node; notes the keys that were read."""

    def variable(name: str) -> Array:
        key = stored.get(name, "")
        if key not in bundle.entries:
            raise ReaderError(
                f"{file} must find its variables in {bundle.prefix}{INDEX}; {printable(name)!r} is not there: copy the "
                "whole folder."
            )
        entry = bundle.entries[key]
        allowed.spend(entry.size)
        read.add(key)
        tensor = read_tensor(bundle, key)
        return np.asarray((tensor.float() if tensor.is_floating_point() else tensor).numpy())

    return variable


def _no_variables(name: str) -> Array:
    raise ValueError(f"the variable {name!r} has no value in a frozen graph: freeze it first")


def _read(file: Path) -> memoryview:
    try:
        status = file.stat()
    except OSError as e:
        raise ReaderError(
            f"A network of TensorFlow must be a SavedModel folder or a frozen graph; there is no {file}."
        ) from e
    if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST:
        raise ReaderError(f"{file} must be a plain file of at most 2 GiB to hold a graph of TensorFlow.")
    return memoryview(file.read_bytes())
