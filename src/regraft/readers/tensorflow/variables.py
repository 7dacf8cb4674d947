"""Which stored tensor each variable of a SavedModel takes.

TensorFlow 2 says it by objects: a function lists the objects that its last inputs are, and the checkpoint has the same
tree of objects under the same names. TensorFlow 1 says it by operations that read a tensor by its key (RestoreV2) and
assign it to a variable. The objects come first: Keras 3 saves models whose operations restore copies instead.

Knows graphs and object trees, not tensors. Not covered: partitioned variables.
"""

from __future__ import annotations

from regraft.readers.protobuf_wire import Message
from regraft.readers.tensorflow.bundle import Bundle, read_string
from regraft.readers.tensorflow.checkpoint import OBJECT_GRAPH
from regraft.readers.tensorflow.nodes import CALLS, Graph
from regraft.readers.tensorflow.tensors import read_strings


def stored_keys(graph: Graph, meta: Message, bundle: Bundle) -> dict[str, str]:
    """The key in the checkpoint of each variable, by the name of its node; ValueError where the file is damaged.

    meta: the MetaGraphDef that `graph` was read from.
    """
    found = _by_restoring(graph, meta.message(3).text(3))
    if OBJECT_GRAPH in bundle.entries:
        stored = Message(memoryview(read_string(bundle, OBJECT_GRAPH))).messages(1)
        found |= _by_objects(graph, meta.message(7), stored)
    return found


def _by_objects(graph: Graph, objects: Message, stored: list[Message]) -> dict[str, str]:
    captured = {name: function.integers(2) for name, function in objects.by_name(2).items()}
    keys = _keys_of_objects(objects.messages(1), stored)
    found = {}
    for node in graph.nodes.values():
        held = captured.get(str(node.attributes.get("f", "")), []) if node.op in CALLS else []
        for (name, _), index in zip(node.inputs[max(0, len(node.inputs) - len(held)) :], held, strict=False):
            if index in keys:
                found[name] = keys[index]
    return found


def _keys_of_objects(objects: list[Message], stored: list[Message]) -> dict[int, str]:
    """Walk both trees side by side from their roots, by the names of the children."""
    found, seen, waiting = {}, set(), [(0, 0)]
    while waiting:
        mine, theirs = waiting.pop()
        if mine in seen:
            continue
        seen.add(mine)
        if not (0 <= mine < len(objects) and 0 <= theirs < len(stored)):
            raise ValueError("an object is listed that is not there")
        for attribute in stored[theirs].messages(2):
            if attribute.text(1) == "VARIABLE_VALUE":
                found[mine] = attribute.text(3)
        names = {child.text(2): child.integer(1) for child in stored[theirs].messages(1)}
        for child in objects[mine].messages(1):
            if child.text(2) in names:
                waiting.append((child.integer(1), names[child.text(2)]))
    return found


def _by_restoring(graph: Graph, restore: str) -> dict[str, str]:
    """In TensorFlow 2 the operations lie in a function, which is opened here."""
    if restore in graph.nodes:
        graph.open_call(restore)
    found = {}
    for node in list(graph.nodes.values()):
        if node.op not in ("AssignVariableOp", "Assign") or len(node.inputs) != 2:
            continue
        name, number = graph.origin(node.inputs[1])
        reader = graph.node(name)
        if reader.op == "RestoreV2" and len(reader.inputs) > 1:
            tensor = graph.node(graph.origin(reader.inputs[1])[0]).attributes.get("value")
            keys = read_strings(tensor) if isinstance(tensor, Message) else []
            if number < len(keys):
                found[graph.origin(node.inputs[0])[0]] = keys[number]
    return found
