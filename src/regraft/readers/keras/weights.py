"""Where the weights of a Keras model lie in its HDF5 file.

    named     Keras 1 and 2, and `.h5` of Keras 3: a group for every layer, whose attribute `weight_names` lists its
              weights in order; those of a model inside lie in one group, trained ones first
    numbered  `.keras` and `.weights.h5`: layers/CLASS_2/vars/0, where 2 counts the layers of that class in the model

Knows names and order, not what a layer computes. Not covered: files of weights in several parts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from regraft.errors import ReaderError
from regraft.readers.keras.graph import Layer, Model
from regraft.readers.keras.hdf5 import Array, Tree
from regraft.readers.keras.layers import Path, Role, roles

NAMED = "model_weights"
TOP = "top_level_model_weights"
LISTS = ("layers", "_layer_checkpoint_dependencies")
"""What the list of layers is called; the second is of Keras 2.12 and 2.13."""
_OTHER = re.compile(
    r"(^|/)(optimizer(_weights)?|metrics|_?compile_metrics|_metrics|_loss_tracker|seed_generator|_seed_generators|"
    r"_random_generator|random_generator)(/|$)|(StateVar|seed_generator_state)(:0)?$"
)
_KNOWN_LEAVES = frozenset(
    (
        *("kernel", "bias", "gamma", "beta", "moving_mean", "moving_variance", "depthwise_kernel"),
        *("pointwise_kernel", "alpha", "mean", "variance"),
    )
)
ROLES_BY_CLASS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("conv1d", "conv2d", "conv3d", "dense", "conv2d_transpose", "depthwise_conv2d"), ("kernel", "bias")
    ),
    "separable_conv2d": ("depthwise_kernel", "pointwise_kernel", "bias"),
    "batch_normalization": ("gamma", "beta", "moving_mean", "moving_variance"),
    **dict.fromkeys(("layer_normalization", "group_normalization"), ("gamma", "beta")),
    "p_re_lu": ("alpha",),
    "embedding": ("embeddings",),
    "normalization": ("mean", "variance", "count"),
}
"""The weights of a layer whose class is known by its group alone, when all, or all but the last, are there."""
_KERAS_1 = {"W": "kernel", "b": "bias", "running_mean": "moving_mean", "running_std": "moving_variance"}


def is_other(name: str) -> bool:
    """Whether an array is never a weight: the state of an optimizer, of a metric or of random numbers."""
    return bool(_OTHER.search(name))


def is_numbered(tree: Tree) -> bool:
    """Whether a file has its weights as `vars/0`."""
    return any(name.rpartition("/")[2] == "vars" for name in tree.groups)


def root_of_names(tree: Tree) -> str | None:
    """The group that lists its layers; None where there is none."""
    for group in (NAMED, ""):
        if tree.texts(group, "layer_names") is not None:
            return group
    return None


# ---- weights for the layers of a model --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Slot:
    path: Path
    role: Role
    trained: bool


def named_weights(tree: Tree, root: str, model: Model) -> dict[Path, dict[str, Array]]:
    """For every layer its weights by role, from a file that names them.

    Raises ReaderError where their number or their names are not those of the layers.
    """
    found: dict[Path, dict[str, Array]] = {}
    for layer in _layers(model):
        slots = sorted(_slots(layer, (), True), key=lambda slot: not slot.trained)
        names = [name for name in tree.texts(_below(root, layer.name), "weight_names") or () if not is_other(name)]
        if len(names) != len(slots):
            raise ReaderError(f"layer {layer.name!r} must have {len(slots)} weights; the file has {len(names)}")
        for slot, name in zip(slots, names, strict=True):
            leaf = _leaf(name)
            if leaf in _KNOWN_LEAVES and leaf not in slot.role.names:
                raise ReaderError(f"layer {'.'.join(slot.path)!r} must have a {slot.role.names[0]}; found {name!r}")
            found.setdefault(slot.path, {})[slot.role.names[0]] = _array(tree, f"{_below(root, layer.name)}/{name}")
    return found


def numbered_weights(tree: Tree, model: Model) -> dict[Path, dict[str, Array]]:
    """For every layer its weights by role, from a file that numbers them.

    Raises ReaderError where their number is not that of the layer, or a group says it is another layer's.
    """
    return dict(_numbered(tree, _counts(tree), model, "", ()))


def _numbered(
    tree: Tree, counts: Counter[str], model: Model, group: str, path: Path
) -> Iterator[tuple[Path, dict[str, Array]]]:
    listed = next((_below(group, own) for own in LISTS if _below(group, own) in tree.groups), _below(group, LISTS[0]))
    count: dict[str, int] = {}
    for layer in _layers(model):
        own = _snake(layer.kind)
        number = count.get(own, 0)
        count[own] = number + 1
        if f"{listed}/{own}_2" in tree.groups and f"{listed}/{own}_1" not in tree.groups:
            number *= 2  # Keras 2.12 counts layers with weights twice
        place = f"{listed}/{own}_{number}" if number else f"{listed}/{own}"
        said = tree.text(f"{place}/vars", "name")
        if said not in (None, layer.name):
            raise ReaderError(f"the weights of layer {layer.name!r} must lie at {place}; those of {said!r} do")
        if layer.model:
            yield from _numbered(tree, counts, layer.model, place, (*path, layer.name))
            continue
        wanted = roles(layer)
        groups = [_group(tree, place, role.inside) for role in wanted]
        stored = sum(counts[group] for group in {f"{place}/vars", *groups})
        if stored != len(wanted):
            raise ReaderError(f"layer {layer.name!r} must have {len(wanted)} weights; the file has {stored}")
        numbers = [groups[:i].count(group) for i, group in enumerate(groups)]
        places = [f"{group}/{i}" for group, i in zip(groups, numbers, strict=True)]
        yield (
            (*path, layer.name),
            {role.names[0]: _array(tree, at) for role, at in zip(wanted, places, strict=True)},
        )


def _group(tree: Tree, place: str, inside: str) -> str:
    """Where the weights of a layer, or of a layer inside it, lie; Keras 2 hides those by an underscore."""
    own = inside if f"{place}/{inside}/vars" in tree.groups else f"_{inside}"
    return f"{place}/{own}/vars" if inside else f"{place}/vars"


def _layers(model: Model) -> Iterator[Layer]:
    """The layers that Keras counts: bare operations are none."""
    return (layer for layer in model.layers if not layer.kind.startswith("ops."))


def _slots(layer: Layer, path: Path, trainable: bool) -> Iterator[_Slot]:
    """Places for the weights of a layer and those inside it, in the order of the layers."""
    trainable = trainable and layer.trainable
    path = (*path, layer.name)
    if layer.model:
        for inner in _layers(layer.model):
            yield from _slots(inner, path, trainable)
        return
    for role in roles(layer):
        yield _Slot(path, role, trainable and role.trained)


def _array(tree: Tree, name: str) -> Array:
    if name not in tree.arrays:
        raise ReaderError(f"the file must hold the weights that it lists; {name!r} is missing")
    return tree.arrays[name]


# ---- weights without a model ------------------------------------------------------------------------------------


def readable_names(tree: Tree, root: str | None) -> dict[str, str]:
    """For the arrays of a file of weights (path in the file) names to join them by: `conv2d/kernel`.

    root: the group that lists its layers, None for a file that numbers them.
    """
    pairs = list(_names_of_named(tree, root) if root is not None else _names_of_numbered(tree))
    given = Counter(name for _, name in pairs)
    return {place: name if given[name] == 1 else place for place, name in pairs}


def _names_of_named(tree: Tree, root: str) -> Iterator[tuple[str, str]]:
    for layer in (*(tree.texts(root, "layer_names") or ()), TOP):
        group = _below(root, layer)
        names = [name for name in tree.texts(group, "weight_names") or () if not is_other(name)]
        single = len({name.rpartition("/")[0] for name in names}) == 1
        for name in names:
            place = f"{group}/{name}"
            _array(tree, place)
            own, leaf = name.rpartition("/")[0].removeprefix(f"{layer}/"), _leaf(name)
            yield place, f"{layer}/{leaf}" if single or own == layer or not own else f"{layer}/{own}/{leaf}"


def _names_of_numbered(tree: Tree) -> Iterator[tuple[str, str]]:
    counts = _counts(tree)
    for place in tree.arrays:
        group, _, last = place.rpartition("/")
        parts, shown = group.split("/"), []
        for i, part in enumerate(parts):
            if part in LISTS or part == "vars":
                continue
            said = tree.text("/".join((*parts[: i + 1], "vars")), "name")
            shown.append(said if said and i and parts[i - 1] in LISTS else part)
        yield place, "/".join((*shown, _role_of(group, last, counts[group])))


def _counts(tree: Tree) -> Counter[str]:
    """How many arrays lie in each group."""
    return Counter(name.rpartition("/")[0] for name in tree.arrays)


def _role_of(group: str, number: str, there: int) -> str:
    """The role of the array `number` of `there` of a layer: from its class, if that and the count tell."""
    own = re.sub(r"_\d+$", "", group.rpartition("/vars")[0].rpartition("/")[2])
    known = ROLES_BY_CLASS.get(own, ())
    if own == "batch_normalization" and there == 2:
        known = known[2:]
    whole = there == len(known) or (known[-1:] == ("bias",) and there == len(known) - 1)
    return known[int(number)] if whole and number.isdecimal() and int(number) < len(known) else number


def _leaf(name: str) -> str:
    """`kernel` of `dense_1/kernel:0`, also of the names that Keras 1 gave (`dense_1_W`)."""
    leaf = name.rpartition("/")[2].partition(":")[0]
    old = re.fullmatch(r"\w+_(W|b|gamma|beta|running_mean|running_std)(_\d+)?", leaf)
    if old:
        return _KERAS_1.get(old[1], old[1])
    return re.sub(r"_\d+$", "", leaf) if re.sub(r"_\d+$", "", leaf) in _KNOWN_LEAVES else leaf


def _below(group: str, name: str) -> str:
    return f"{group}/{name}" if group else name


def _snake(kind: str) -> str:
    """The class as Keras writes it in paths: Conv2D is conv2d, PReLU is p_re_lu."""
    kind = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", kind))
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", kind).lower()
