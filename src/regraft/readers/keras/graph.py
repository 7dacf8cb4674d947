"""The description of a Keras model as layers and what each is called on, in the dialects of Keras 2 and Keras 3.

    Sequential    a list of layers, each called on the one before
    Functional    layers with `inbound_nodes`; Keras 2 writes [[name, use, output, {...}]], Keras 3 {args, kwargs}
    a model among the layers   described in the same way, inside

Knows the JSON, neither weights nor what a layer does. Not covered: several inputs or outputs, layers with weights
that are called twice, models that are classes of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from regraft.errors import ReaderError

MODELS = ("Sequential", "Functional", "Model")
PACKAGES = ("keras", "tf_keras")
BARE = "keras.src.ops."
"""The module of operations that Keras 3 records for `x * 2`: they are no layers."""
CODE = ("Lambda", "TFOpLambda", "SlicingOpLambda", "ClassMethod", "InstanceMethod", "InstanceProperty")
"""Classes whose work is a function that the description names or holds."""
OF_TENSORFLOW = {
    "__operators__.add": "Add",
    "math.add": "Add",
    "math.subtract": "Subtract",
    "math.multiply": "Multiply",
    "math.truediv": "TrueDivide",
    "math.divide": "TrueDivide",
    "math.pow": "Power",
    "math.negative": "Negative",
    "math.maximum": "Maximum",
    "math.minimum": "Minimum",
    "math.reduce_mean": "Mean",
    "concat": "Concatenate",
    "nn.relu": "Relu",
    "nn.relu6": "Relu6",
    "nn.silu": "Silu",
    "nn.gelu": "Gelu",
    "nn.softmax": "Softmax",
    "nn.leaky_relu": "LeakyRelu",
    "math.sigmoid": "Sigmoid",
    "math.tanh": "Tanh",
    "reshape": "Reshape",
    "nn.bias_add": "BiasAdd",
    "__operators__.getitem": "GetItem",
}
"""What Keras 2 records for `x + y`, a function of TensorFlow by its name, as Keras 3 calls it. Others are code."""
SECOND = ("y", "bias")
"""How such functions call a second tensor or number."""
CONSTANT = "_CONSTANT_VALUE"
"""Stands where Keras 2 calls a function on a number first, as in `1 - x`."""
REGISTERED = {"Custom>CustomScaleLayer": "CustomScaleLayer"}
"""Layers of Keras' own networks that it registers as a user would."""
BY_NAME = {"MultiHeadAttention": ("query", "value", "key")}
"""Layers called on several tensors by name."""
OF_PICTURES = ("Rand", "AugMix", "CutMix", "MixUp", "Resizing", "CenterCrop")
"""How the layers begin that Keras 3 calls with training=True by default; only in training does that have effect."""
DEEPEST = 20
LARGEST = 3e38
LONGEST = 500


@dataclass(frozen=True)
class Ref:
    """The output of one use of a layer."""

    layer: str
    use: int = 0


Numbers = tuple[float, ...]
"""Constants, one for each place along the last axis."""
Argument = Ref | float | Numbers


@dataclass(frozen=True)
class Layer:
    """One layer: `kind` is its class (`ops.Add` for a bare operation), `uses` are the arguments of each call.

    model: the layers inside, where it is a model itself.
    """

    name: str
    kind: str
    config: Mapping[str, Any] = field(repr=False)
    uses: tuple[tuple[Argument, ...], ...] = ()
    model: Model | None = None

    @property
    def trainable(self) -> bool:
        return bool(self.config.get("trainable", True))


@dataclass(frozen=True)
class Model:
    """Layers in the order of the file; `start` is the one that stands for the input, `end` the one that is the output.

    shape: of the input, with the batch first and None for sizes that are left open; None where it is not said.
    """

    name: str
    layers: tuple[Layer, ...]
    start: str | None
    end: Ref
    shape: tuple[int | None, ...] | None


def read_model(described: Any, depth: int = 0) -> Model:
    """The model that the JSON of a file describes.

    Raises ReaderError for anything that is not a Sequential or Functional model of Keras' own layers.
    """
    kind, config = _class(described, "the network")
    if kind not in MODELS:
        raise ReaderError(
            f"the network is a class of its own ({kind}), whose code is not in the file: save it as a Functional "
            "model, or give its weights alone with an architecture"
        )
    if depth > DEEPEST:
        raise ReaderError(f"models may hold models {DEEPEST} deep; found more")
    if isinstance(config, list):  # Sequential before Keras 2.2
        config = {"layers": config}
    config = _mapping(config, "the network")
    listed = config.get("layers")
    if not isinstance(listed, list) or not listed:
        raise ReaderError("the network must have layers; none are listed")
    make = _functional if kind != "Sequential" or "input_layers" in config else _sequential
    return make(config, [_mapping(one, "a layer") for one in listed], depth)


def in_order(model: Model) -> list[tuple[Layer, int]]:
    """The uses of layers that the output needs, each after those it is called on.

    Raises ReaderError for a loop and for a name that no layer has.
    """
    layers = {layer.name: layer for layer in model.layers}
    done: dict[tuple[str, int], None] = {}
    opened: set[tuple[str, int]] = set()
    stack = [resolved(layers, model.end)]
    while stack:
        at = stack[-1]
        inputs = [resolved(layers, arg) for arg in _arguments(layers[at[0]], at[1]) if isinstance(arg, Ref)]
        waiting = [one for one in inputs if one not in done]
        if at in done or not waiting:
            done[at] = None
            stack.pop()
        elif at in opened:
            raise ReaderError(f"the layers must not form a loop; {at[0]!r} needs itself")
        else:
            opened.add(at)
            stack.extend(reversed(waiting))
    return [(layers[name], use) for name, use in done]


def resolved(layers: Mapping[str, Layer], ref: Ref) -> tuple[str, int]:
    """The use that a reference means. A layer with one use has that one: its number also counts uses elsewhere."""
    if ref.layer not in layers:
        raise ReaderError(f"every layer must be called on layers of the network; {ref.layer!r} is none")
    count = len(layers[ref.layer].uses)
    if count > 1 and not 0 <= ref.use < count:
        raise ReaderError(f"layer {ref.layer!r} has {count} uses; number {ref.use} is asked for")
    return ref.layer, ref.use if count > 1 else 0


def _arguments(layer: Layer, use: int) -> tuple[Argument, ...]:
    return layer.uses[use] if layer.uses else ()


def _sequential(config: Mapping[str, Any], listed: list[Mapping[str, Any]], depth: int) -> Model:
    layers: list[Layer] = []
    for one in listed:
        layer = _layer(one, depth)
        before: tuple[Ref, ...] = (Ref(layers[-1].name),) if layers else ()
        layers.append(Layer(layer.name, layer.kind, layer.config, (before,), layer.model))
    _distinct(layers)
    first = layers[0]
    shape = _shape(first.config) or (first.model.shape if first.model else None)
    start = first.name if first.kind == "InputLayer" else None
    return Model(
        str(config.get("name", "")), tuple(layers), start, Ref(layers[-1].name), shape or _built(config, listed)
    )


def _built(config: Mapping[str, Any], listed: list[Mapping[str, Any]]) -> tuple[int | None, ...] | None:
    """The input that a Sequential model without an input layer was built for."""
    build = listed[0].get("build_config")
    said = config.get("build_input_shape") or (build.get("input_shape") if isinstance(build, Mapping) else None)
    return _shape({"batch_shape": said})


def _functional(config: Mapping[str, Any], listed: list[Mapping[str, Any]], depth: int) -> Model:
    layers = []
    for one in listed:
        layer = _layer(one, depth)
        nodes = _sequence(one.get("inbound_nodes") or [], layer.name)
        if layer.kind.startswith("ops."):
            layers.append(_operation(layer, nodes))
            continue
        uses = tuple(_use(node, layer) for node in nodes)
        layers.append(Layer(layer.name, layer.kind, layer.config, uses, layer.model))
    _distinct(layers)
    starts, ends = _leaves(config.get("input_layers")), _leaves(config.get("output_layers"))
    if len(starts) != 1 or len(ends) != 1:
        raise ReaderError(
            f"a network must have one input and one output; {config.get('name', 'it')!r} has {len(starts)} and "
            f"{len(ends)}: save the part of it that you need as a model of its own"
        )
    shape = next((_shape(layer.config) for layer in layers if layer.name == starts[0].layer), None)
    return Model(str(config.get("name", "")), tuple(layers), starts[0].layer, ends[0], shape)


def _layer(described: Mapping[str, Any], depth: int) -> Layer:
    kind, config = _class(described, "a layer")
    if kind in MODELS and not _is_bare(described):
        model = read_model(described, depth + 1)
        inner = config if isinstance(config, Mapping) else {}
        return Layer(_name(described.get("name", inner.get("name")), kind), kind, inner, model=model)
    config = _mapping(config, kind)
    name = _name(described.get("name", config.get("name")), kind)
    if kind in CODE:
        kind, config = OF_TENSORFLOW[config["function"]], {k: v for k, v in config.items() if k != "function"}
        return Layer(name, f"ops.{kind}", config)
    return Layer(name, f"ops.{kind}" if _is_bare(described) else kind, config)


def _is_bare(described: Mapping[str, Any]) -> bool:
    """Whether this is an operation of Keras 3. In HDF5 no module tells; but a layer says whether it is trainable."""
    if "module" in described:
        return str(described["module"]).startswith(BARE)
    config, nodes = described.get("config"), described.get("inbound_nodes")
    called = isinstance(nodes, list) and bool(nodes) and isinstance(nodes[0], Mapping)
    return called and isinstance(config, Mapping) and "trainable" not in config


def _is_listed(kind: str, config: Any) -> bool:
    """Whether a function of TensorFlow is one of the plain ones that are rebuilt."""
    function = config.get("function") if isinstance(config, Mapping) else None
    slices = function == "__operators__.getitem"
    return (
        isinstance(function, str)
        and function in OF_TENSORFLOW
        and kind == ("SlicingOpLambda" if slices else "TFOpLambda")
    )


def _class(described: Any, what: str) -> tuple[str, Any]:
    """The class and the config of a description, when the class is one of Keras."""
    described = _mapping(described, what)
    kind, module = described.get("class_name"), described.get("module")
    if not isinstance(kind, str):
        raise ReaderError(f"{what} must name its class; found {kind!r}")
    config = described.get("config")
    name = config.get("name", kind) if isinstance(config, Mapping) else kind
    registered = described.get("registered_name")
    if kind in CODE and not _is_listed(kind, config):
        raise ReaderError(
            f"layer {name!r} is a {kind}: it holds or names code, which is never run; build the network from layers, "
            "or export it to ONNX"
        )
    if module is not None and str(module).partition(".")[0] not in PACKAGES:
        raise ReaderError(f"layer {name!r} is {module}.{kind}: only layers of Keras are rebuilt, and no code is run")
    kind = REGISTERED.get(kind, kind)
    if registered not in (None, kind, *(name for name, own in REGISTERED.items() if own == kind)):
        raise ReaderError(f"layer {name!r} is {registered}: only layers of Keras are rebuilt, and no code is run")
    return kind, config


def _operation(layer: Layer, nodes: list[Any]) -> Layer:
    """An operation with what it is called on; what Keras says in the call beside tensors joins its options."""
    name = layer.name
    if len(nodes) != 1:
        raise ReaderError(f"operation {name!r} must be called once; it has {len(nodes)} calls")
    node = nodes[0]
    given: tuple[Argument, ...]
    if isinstance(node, Mapping):
        options = _mapping(node.get("kwargs") or {}, name)
        values = _sequence(node.get("args"), name)
        if layer.kind == "ops.GetItem" and len(values) == 2:
            values, options = values[:1], {**options, "slice_spec": values[1]}
        given = tuple(_tensors(values, name))
    else:
        leaves = [_sequence(one, name) for one in ([node] if _is_leaf(node) else _sequence(node, name))]
        options = _mapping((leaves[0][3] if leaves and len(leaves[0]) > 3 else None) or {}, name)
        given = tuple(_older_argument(leaf, name) for leaf in leaves)
        given += tuple(_older_argument(options[key], name) for key in SECOND if options.get(key) is not None)
        options = {key: value for key, value in options.items() if key not in SECOND}
    said = {key: value for key, value in options.items() if value is not None and key != "name"}
    return Layer(name, layer.kind, {**layer.config, **said}, (given,))


def _older_argument(value: Any, name: str) -> Argument:
    """What an operation of Keras 2 is called on: the output of a layer, a number, or numbers."""
    if isinstance(value, list) and len(value) > 2 and value[0] == CONSTANT:
        value = value[2]
    return _ref(value) if _is_leaf(value) else _constant(value, name)


def _constant(value: Any, name: str) -> float | Numbers:
    """A number, or numbers along the last axis, whatever axes of length 1 lie around."""
    while isinstance(value, list) and len(value) == 1 and isinstance(value[0], list):
        value = value[0]
    listed = value if isinstance(value, list) else [value]
    if not listed or not all(_is_number(one) for one in listed):
        raise ReaderError(f"layer {name!r} is called on something that is not the output of a layer")
    return tuple(map(float, listed)) if isinstance(value, list) else float(value)


def _is_number(value: Any) -> bool:
    """Whether this is a number that a float32 can hold: JSON's may be of any size."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST


def _use(node: Any, layer: Layer) -> tuple[Argument, ...]:
    """The arguments of one call, in either dialect."""
    name = layer.name
    if isinstance(node, Mapping):
        options = _mapping(node.get("kwargs") or {}, name)
        if layer.kind.startswith(OF_PICTURES):
            options = {key: value for key, value in options.items() if key != "training"}
        tensors = [*_sequence(node.get("args"), name), *_named(options, layer.kind)]
        _plain_call({key: value for key, value in options.items() if key not in BY_NAME.get(layer.kind, ())}, name)
        return tuple(_tensors(tensors, name))
    if _is_leaf(node):  # one tensor without the list around it
        node = [node]
    refs = []
    for one in _sequence(node, name):
        if not _is_leaf(one):
            raise ReaderError(f"layer {name!r} is called on something that is not the output of a layer")
        options = _mapping((one[3] if len(one) > 3 else None) or {}, name)
        _plain_call({key: value for key, value in options.items() if key not in BY_NAME.get(layer.kind, ())}, name)
        refs += [_ref(one), *(_ref(value) for value in _named(options, layer.kind))]
    return tuple(refs)


def _named(options: Mapping[str, Any], kind: str) -> list[Any]:
    """The tensors that a call gives by name."""
    return [options[key] for key in BY_NAME.get(kind, ()) if options.get(key) is not None]


def _tensors(values: Sequence[Any], name: str) -> Iterator[Argument]:
    """References and numbers, in Keras 3's JSON of the arguments of a call."""
    for value in values:
        if isinstance(value, list):
            yield from _tensors(value, name)
        elif isinstance(value, Mapping) and value.get("class_name") == "__keras_tensor__":
            yield _ref(_mapping(value.get("config"), name).get("keras_history"))
        elif isinstance(value, Mapping) and value.get("class_name") in ("__numpy__", "__tensor__"):
            yield _constant(_mapping(value.get("config"), name).get("value"), name)
        else:
            yield _constant(value, name)


def _plain_call(options: Mapping[str, Any], name: str) -> None:
    """Refuse a call that asks for more than the layer's usual work."""
    if options.get("training"):
        raise ReaderError(f"layer {name!r} is called with training=True, so that it is not the same in every run")
    more = sorted(key for key, value in options.items() if key != "training" and value is not None)
    if more:
        raise ReaderError(f"layer {name!r} is called with {more[0]}=, which is not rebuilt")


def _leaves(value: Any) -> list[Ref]:
    if _is_leaf(value):
        return [_ref(value)]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [ref for one in value for ref in _leaves(one)] if isinstance(value, list) else []


def _is_leaf(value: Any) -> bool:
    return isinstance(value, list) and len(value) >= 3 and isinstance(value[0], str) and isinstance(value[1], int)


def _ref(value: Any) -> Ref:
    if not _is_leaf(value) or value[2] != 0:
        raise ReaderError(f"layers must be called on the first output of a layer; found {value!r:.80}")
    return Ref(value[0], value[1])


def _shape(config: Mapping[str, Any]) -> tuple[int | None, ...] | None:
    said = config.get("batch_shape") or config.get("batch_input_shape")
    if not isinstance(said, list) or not said:
        return None
    if any(size is not None and (not isinstance(size, int) or size < 1) for size in said):
        raise ReaderError(f"the shape of an input must be whole numbers; found {said!r:.80}")
    return tuple(said)


def _distinct(layers: Sequence[Layer]) -> None:
    if len({layer.name for layer in layers}) < len(layers):
        raise ReaderError("every layer must have a name of its own; some share one")


def _name(value: Any, kind: str) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= LONGEST:
        raise ReaderError(f"every layer must have a name of at most {LONGEST} characters; a {kind} has none")
    return value


def _mapping(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ReaderError(f"{what} must be described by an object; found {type(value).__name__}")
    return value


def _sequence(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise ReaderError(f"the calls of layer {name!r} must be lists; found {type(value).__name__}")
    return value
