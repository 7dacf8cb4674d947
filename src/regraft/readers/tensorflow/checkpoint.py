"""TensorFlow checkpoints of all three generations, read without TensorFlow.

Given may be a prefix (`model.ckpt-100`, also an empty one: `folder/`), one of its files, the text file `checkpoint`
that names the latest, or a folder with one checkpoint. Variables keep the names that the program gave them. What
training keeps beside the weights (optimizer slots, moving averages of weights, counters, metrics) is passed over.

Knows names and layout, not the network that the weights belong to. Not covered: partitioned variables.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path

from regraft.errors import ReaderError
from regraft.printable import printable
from regraft.readers.checkpoint import Checkpoint
from regraft.readers.protobuf_wire import Message
from regraft.readers.tensorflow.bundle import (
    INDEX,
    Bundle,
    Entry,
    is_old_checkpoint,
    open_bundle,
    read_old_checkpoint,
    read_string,
    read_tensor,
)
from regraft.readers.tensorflow.tensors import DTYPES, FLOATS

OBJECT_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"
LATEST = "checkpoint"
LONGEST_TEXT = 1 << 20

# A tensor that training keeps for a variable is named after it: VARIABLE/Adam, VARIABLE/Momentum, VARIABLE/adam_m.
_SLOT = re.compile(
    r"(?P<variable>.+)/(?:(?:Adam|AdaMax|AdamW|AMSGrad|NadamW?|LARS|LAMB|Lamb|Momentum|RMSProp|RMSprop|Adagrad|AdagradDA|"
    r"Adadelta|Ftrl|Proximal\w+|GradientDescent|ExponentialMovingAverage|biased|local_step)(?:Optimizer)?(?:_\d+)?"
    r"|adam_[mv]|lamb_[mv]|m|v|vhat|momentum|rms|accumulator|linear|accum_grad|accum_var)"
)
_TRAINING = re.compile(
    r"(?:.*/)?(?:global_step|beta[12]_power|save_counter|learning_rate|current_loss_scale|loss_scale|good_steps|"
    r"num_good_steps|global_step_read_op_cache.*|seed_generator_state|iterations?)(?:_\d+)?"
    r"|(?:.*/)?(?:training(?:_\d+)?|optimizer)/(?:Adam|SGD|RMSprop|Adagrad|Adadelta|Adamax|Nadam|Ftrl)\w*/.+"
    r"|(?:.*/)?(?:keras_api/metrics|\.OPTIMIZER_SLOT|OBJECT_CONFIG_JSON)(?:/.*)?"
)


def read_tensorflow_checkpoint(path: Path) -> Checkpoint:
    """The variables of a checkpoint, by name, in the types in which they are stored (layout "keras").

    Names of TensorFlow 1 stay as they are (`hidden1/kernel`); of object-based checkpoints they are the full names of
    the variables where the checkpoint has them once, or else the path to the object (`model/layer-1/kernel`).
    Raises ReaderError when there is no checkpoint, when a shard is missing, and when anything is damaged.
    """
    prefix = _prefix(path)
    if not Path(prefix + INDEX).is_file() and is_old_checkpoint(Path(prefix)):
        tensors = read_old_checkpoint(Path(prefix))
        passed = _passed_over(tensors.keys())
        kept = {name: t for name, t in sorted(tensors.items()) if name not in passed}
        return Checkpoint(str(path), "TensorFlow checkpoint of the old format", kept, "keras", tuple(sorted(passed)))
    bundle = open_bundle(prefix)
    names, passed = readable_names(bundle)
    tensors = {names[key]: read_tensor(bundle, key) for key in sorted(names, key=names.__getitem__)}
    generation = "TensorFlow checkpoint (object-based)" if OBJECT_GRAPH in bundle.entries else "TensorFlow checkpoint"
    return Checkpoint(str(path), generation, tensors, "keras", tuple(sorted(passed)))


def readable_names(bundle: Bundle) -> tuple[dict[str, str], set[str]]:
    """The variables of a bundle that are weights, from the key of each to its name, and the keys of all others."""
    passed = {key for key, entry in bundle.entries.items() if entry.dtype not in DTYPES or _is_counter(entry)}
    if OBJECT_GRAPH not in bundle.entries:
        kept = bundle.entries.keys() - passed
        passed |= _passed_over(kept)
        return {key: key for key in bundle.entries if key not in passed}, passed
    try:
        full, training = _objects(Message(memoryview(read_string(bundle, OBJECT_GRAPH))))
    except ValueError as e:
        raise ReaderError(f"{bundle.prefix}{INDEX} must say what its variables belong to; {printable(str(e))}.") from e
    plain = {key: key.removesuffix(VALUE) for key in bundle.entries}
    passed |= {key for key in bundle.entries if key in training or _TRAINING.fullmatch(plain[key])}
    kept = bundle.entries.keys() - passed
    often = Counter(full.get(key, "") for key in kept)
    named = {key: full[key] if full.get(key) and often[full[key]] == 1 else plain[key] for key in kept}
    twice = Counter(named.values())
    return {key: name if twice[name] == 1 else key for key, name in named.items()}, passed


def _is_counter(entry: Entry) -> bool:
    return entry.shape == () and entry.dtype not in FLOATS


def _passed_over(names: Collection[str]) -> set[str]:
    """Of the names of variables, those that are never weights. A slot counts as one only beside its variable."""
    found = set()
    for name in names:
        slot = _SLOT.fullmatch(name)
        if _TRAINING.fullmatch(name) or (slot and slot["variable"] in names):
            found.add(name)
    return found


# ---- the objects of a TensorFlow 2 checkpoint --------------------------------------------------------------------


def _objects(graph: Message) -> tuple[dict[str, str], set[str]]:
    """The full name of each stored variable by its key, and the keys of those that only an optimizer holds.

    An optimizer cannot be told by the path alone: a checkpoint names a variable by the shortest path to it, which may
    lead through the optimizer's list of the weights that it trains.
    """
    nodes = graph.messages(1)
    children = [{child.text(2): child.integer(1) for child in node.messages(1)} for node in nodes]
    if any(not 0 <= i < len(nodes) for kids in children for i in kids.values()):
        raise ValueError("an object is listed that is not there")
    attributes = [node.messages(2) for node in nodes]
    full = {a.text(3): a.text(2) for stored in attributes for a in stored if a.text(1) == "VARIABLE_VALUE"}
    slots = {slot.integer(3) for node in nodes for slot in node.messages(3)}
    optimizers = {
        i for i, kids in enumerate(children) if nodes[i].has(3) or not {"_iterations", "iter"}.isdisjoint(kids)
    }
    roots = {0, *(kids["_trainable_variables"] for i, kids in enumerate(children) if _trains(i, kids, optimizers))}
    outside = _reachable(roots, children, avoid=optimizers | slots)
    weights = {a.text(3) for i in outside for a in attributes[i]}
    return full, full.keys() - weights


def _trains(index: int, kids: Mapping[str, int], optimizers: Collection[int]) -> bool:
    return index in optimizers and "_trainable_variables" in kids


def _reachable(roots: Collection[int], children: list[dict[str, int]], avoid: Collection[int]) -> set[int]:
    found: set[int] = set()
    waiting = [root for root in roots if root < len(children)]
    while waiting:
        at = waiting.pop()
        if at not in found and at not in avoid:
            found.add(at)
            waiting += children[at].values()
    return found


# ---- which files are meant -----------------------------------------------------------------------------------------


def _prefix(path: Path) -> str:
    """The text that the files of the checkpoint begin with, or the single file of the old format."""
    text = str(path)
    if Path(text + INDEX).is_file():
        return text
    if path.is_dir():
        return _in_folder(path)
    if path.is_file():
        if path.name == LATEST:
            return _latest(path)
        if stem := re.fullmatch(r"(.*)(?:\.index|\.meta|\.data-\d{5}-of-\d{5})", text, re.DOTALL):
            return stem[1]
        if is_old_checkpoint(path):
            return text
        raise ReaderError(
            f"{path} must be a TensorFlow checkpoint; it is neither one of its files nor of the old format."
        )
    raise ReaderError(f"A TensorFlow checkpoint must have an index; there is no {text}{INDEX}.")


def _in_folder(folder: Path) -> str:
    if (folder / LATEST).is_file():
        return _latest(folder / LATEST)
    found = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(INDEX))
    if len(found) != 1:
        listed = ", ".join(printable(name.removesuffix(INDEX)) or "an empty name" for name in found[:5]) or "none"
        raise ReaderError(f"The folder {folder} must hold one checkpoint; found {listed}: name the one that is meant.")
    return f"{folder}/{found[0].removesuffix(INDEX)}"


def _latest(path: Path) -> str:
    """The checkpoint that the text file names, looked for beside it and nowhere else: programs write the folder of
    the machine that trained into it."""
    if path.stat().st_size > LONGEST_TEXT:
        raise ReaderError(f"{path} must be the short text in which TensorFlow names its latest checkpoint.")
    text = path.read_text("utf-8", "replace")
    found = re.search(r'^\s*model_checkpoint_path:\s*"((?:[^"\\]|\\.)*)"', text, re.MULTILINE)
    if found is None or ".." in found[1].split("/"):
        raise ReaderError(f"{path} must name a checkpoint in its own folder (`model_checkpoint_path`).")
    return f"{path.parent}/{found[1].rpartition('/')[2]}"
