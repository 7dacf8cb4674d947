"""Keras models as networks of operations: each layer becomes the layers or functions of torch that do the same.

The table KINDS holds every layer that is rebuilt, with the weights it has, the options that matter and the function
that writes its steps. An option that is not in the table stops the reading unless it is off; initializers,
regularizers and constraints matter to training alone and are passed over. Anything else is refused by name, and
nothing is ever imported or run on the word of a file.

Knows layers, not files. Not covered: recurrent layers, masks, 1-D and 3-D convolutions, shared weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from regraft.errors import ReaderError
from regraft.operations import INPUT, Operations
from regraft.readers.keras import activations, arithmetic, joins, tokens, windows
from regraft.readers.keras.graph import Layer, Model, Numbers, Ref, in_order, resolved
from regraft.readers.keras.steps import Array, Steps, Use, Value, unwrapped

Path = tuple[str, ...]
Weights = Mapping[Path, Mapping[str, Array]]
"""For the path of a layer (names of the models around it, then its own): its weights by role."""
Write = Callable[[Use, Steps, Sequence[Any]], Value]


@dataclass(frozen=True)
class Role:
    """A weight of a layer: its names in files, the first of which is ours, and the option that says it is there.

    inside: the layer within the layer that has it, in files that number weights.
    """

    names: tuple[str, ...]
    given: str = ""
    trained: bool = True
    inside: str = ""


@dataclass(frozen=True)
class Kind:
    """How a class of layers is rebuilt. keys: options that `write` knows, None where none matters to the outputs."""

    write: Write
    keys: tuple[str, ...] | None = ()
    roles: tuple[Role, ...] = ()
    inputs: int | None = 1


def network(
    model: Model, weights: Weights, *, version: int, turned: bool = False
) -> tuple[Operations, dict[str, torch.Tensor], tuple[int, ...] | None]:
    """The steps, their tensors (float32, named after the steps), and the (channels, height, width) of the input.

    version: of the Keras that wrote it, 2 or 3; turned: kernels are those of Theano. A model of pictures without
    channels takes them with one. The shape is None for other inputs, or where a size is left open. Raises ReaderError
    for layers, options and weights that are not understood.
    """
    x, sizes = _input(model)
    to = Steps(sizes)
    if x.rank == 3:
        x = to.add(f"{model.start or INPUT}_grey", "squeeze", x, dim=1)
    y = _run(_Reading(weights, version, turned, to), model, x, ())
    if y.rank == 4 and not _channels_first(model):
        y = to.moved(y.step, y)
    elif y.rank == 3:
        y = to.plain(y.step, y)
    return Operations(tuple(to.operations), y.step), to.tensors, sizes if sizes and len(sizes) == 3 else None


def refuse_unknown(model: Model) -> None:
    """Raises ReaderError naming the first layer of a class that is not rebuilt."""
    for layer in _all(model):
        if not layer.model and layer.kind not in KINDS:
            raise ReaderError(
                f"layer {layer.name!r} ({layer.kind}) is of a class that is not rebuilt: export the network to ONNX, "
                "or choose one of the usual layers"
            )


def roles(layer: Layer) -> tuple[Role, ...]:
    """The weights of a layer, in the order in which Keras lists them."""
    if layer.kind == "Normalization" and unwrapped(layer.config.get("mean")) is not None:
        return ()
    return tuple(role for role in KINDS[layer.kind].roles if not role.given or layer.config.get(role.given, True))


# ---- the whole network ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Reading:
    weights: Weights
    version: int
    turned: bool
    to: Steps


def _input(model: Model) -> tuple[Value, tuple[int, ...] | None]:
    """The input as Keras sees it, and its sizes as torch has it; None where one is left open."""
    if model.shape is None:
        raise ReaderError("the network must say which input it takes; build it with keras.Input before saving it")
    sizes = model.shape[1:]
    if not 1 <= len(sizes) <= 3:
        raise ReaderError(f"the input must be pictures or vectors; it has {len(sizes)} axes beside the batch")
    first = _channels_first(model)
    if len(sizes) == 3 and not first:
        sizes = (sizes[2], *sizes[:2])
    if len(sizes) == 2:  # grey pictures without an axis for channels
        sizes = (1, *sizes)
    known = [size for size in sizes if size is not None]
    x = Value(INPUT, len(model.shape), moved=len(model.shape) == 4 and not first)
    return x, tuple(known) if len(known) == len(sizes) else None


def _channels_first(model: Model) -> bool:
    """Whether the first layer that tells has the channels before height and width."""
    told = (layer.config.get("data_format") for layer in _all(model) if KINDS.get(layer.kind))
    return next((form for form in told if form is not None), None) == "channels_first"


def _all(model: Model) -> Iterator[Layer]:
    for layer in model.layers:
        yield layer
        if layer.model:
            yield from _all(layer.model)


def _run(reading: _Reading, model: Model, x: Value, path: Path) -> Value:
    """The steps of a model on x."""
    layers = {layer.name: layer for layer in model.layers}
    values: dict[tuple[str, int], Value] = {}
    seen: set[str] = set()
    for layer, use in in_order(model):
        given = layer.uses[use] if layer.uses else ()
        inputs = [values[resolved(layers, one)] if isinstance(one, Ref) else one for one in given]
        if not inputs and layer is model.layers[0] or layer.name == model.start:
            inputs = [x]
        if layer.name in seen and (layer.model or roles(layer)):
            raise ReaderError(f"layer {layer.name!r} is used more than once with the same weights: that is not rebuilt")
        seen.add(layer.name)
        values[layer.name, use] = _layer(reading, layer, inputs, (*path, layer.name))
    return values[resolved(layers, model.end)]


def _layer(reading: _Reading, layer: Layer, inputs: Sequence[Value | float | Numbers], path: Path) -> Value:
    if layer.model:
        if len(inputs) != 1 or not isinstance(inputs[0], Value):
            raise ReaderError(f"model {layer.name!r} must be called on one tensor")
        return _run(reading, layer.model, inputs[0], path)
    use = Use(".".join(path), layer.kind, layer.config, reading.weights.get(path, {}), reading.version, reading.turned)
    kind = KINDS[layer.kind]
    if not inputs or (kind.inputs and len(inputs) != kind.inputs):
        raise use.refused(f"must be called on {kind.inputs or 'some'} tensor; found {len(inputs)}")
    if kind.write not in arithmetic.OF_NUMBERS and not all(isinstance(one, Value) for one in inputs):
        raise use.refused("must be called on tensors; found a number")
    _check_options(use, kind)
    try:
        return kind.write(use, reading.to, inputs)
    except (KeyError, TypeError, ValueError, IndexError, ArithmeticError, AttributeError) as e:
        raise use.refused(f"must be described as Keras does it; it is not ({type(e).__name__}: {e})") from e


TRAINING = re.compile(
    r"\w+_(initializer|regularizer|constraint)|momentum|renorm\w*|fused|synchronized|virtual_batch_size"
)
ABOUT = frozenset(
    (
        "name",
        "trainable",
        "dtype",
        "batch_input_shape",
        "batch_shape",
        "input_dim",
        "autocast",
        "seed",
        "implementation",
    )
)


def _check_options(use: Use, kind: Kind) -> None:
    """Refuse an option that is on and that nobody here knows: it may change what the layer gives."""
    if "int8" in str(use.config.get("dtype")) or "float8" in str(use.config.get("dtype")):
        raise use.refused("is quantized, which is not rebuilt: save the network before that")
    if kind.keys is None:
        return
    for key, value in use.config.items():
        known = key in kind.keys or key in ABOUT or TRAINING.fullmatch(key)
        if not known and value is not None and value is not False:
            raise use.refused(f"has an option that regraft does not know: {key!r:.60}")


# ---- the table --------------------------------------------------------------------------------------------------

_BIAS = Role(("bias", "b"), "use_bias")
_KERNEL = Role(("kernel", "depthwise_kernel", "W"))
_SCALE, _CENTER = Role(("gamma",), "scale"), Role(("beta",), "center")
_FORM = ("data_format",)
_WINDOW = (*_FORM, "kernel_size", "strides", "padding", "dilation_rate", "activation", "use_bias", "groups")
_STATISTICS = tuple(Role(names, trained=False) for names in (("moving_mean",), ("moving_variance",)))
_POOL = Kind(windows.pooling, (*_FORM, "pool_size", "strides", "padding"))
_GLOBAL = Kind(windows.global_pooling, (*_FORM, "keepdims"))
_IDENTITY = Kind(joins.same, None)
_NORM = ("axis", "epsilon", "center", "scale")
_BATCH_NORM = Kind(joins.batch_norm, _NORM, (_SCALE, _CENTER, *_STATISTICS))
_ADAPTED = tuple(Role((name,), trained=False) for name in ("mean", "variance", "count"))
_SEPARABLE = (Role(("depthwise_kernel",)), Role(("pointwise_kernel",)), _BIAS)
_PROJECTIONS = tuple(
    role
    for own in ("query", "key", "value", "output")
    for role in (
        Role((f"{own}_kernel", "kernel"), inside=f"{own}_dense"),
        Role((f"{own}_bias", "bias"), "use_bias", inside=f"{own}_dense"),
    )
)
_HEADS = ("num_heads", "key_dim", "value_dim", "dropout", "use_bias", "output_shape", "attention_axes")
_SHAPES = ("query_shape", "key_shape", "value_shape")
_TOKENS = Kind(tokens.pooling, (*_FORM, "keepdims"))
_MERGES = {"Add": "add", "Multiply": "mul", "Maximum": "maximum", "Minimum": "minimum"}
RANDOM = (
    *("AugMix", "CutMix", "MixUp", "RandAugment", "RandomBrightness", "RandomColorDegeneration", "RandomColorJitter"),
    *("RandomContrast", "RandomElasticTransform", "RandomErasing", "RandomFlip", "RandomGaussianBlur"),
    *("RandomGrayscale", "RandomHeight", "RandomHue", "RandomInvert", "RandomPerspective", "RandomPosterization"),
    *("RandomRotation", "RandomSaturation", "RandomSharpness", "RandomShear", "RandomTranslation", "RandomWidth"),
    "RandomZoom",
)
"""Data augmentation that leaves pictures as they are in evaluation; RandomCrop does not."""

KINDS: dict[str, Kind] = {
    "InputLayer": _IDENTITY,
    "Conv2D": Kind(windows.convolution, (*_WINDOW, "filters"), (_KERNEL, _BIAS)),
    "DepthwiseConv2D": Kind(windows.depthwise, (*_WINDOW, "depth_multiplier"), (_KERNEL, _BIAS)),
    "SeparableConv2D": Kind(windows.separable, (*_WINDOW, "filters", "depth_multiplier"), _SEPARABLE),
    "Conv2DTranspose": Kind(windows.transposed, (*_WINDOW, "filters", "output_padding"), (_KERNEL, _BIAS)),
    "Dense": Kind(windows.dense, ("units", "activation", "use_bias"), (_KERNEL, _BIAS)),
    **dict.fromkeys(("BatchNormalization", "SyncBatchNormalization"), _BATCH_NORM),
    "LayerNormalization": Kind(joins.layer_norm, _NORM, (_SCALE, _CENTER)),
    "GroupNormalization": Kind(joins.group_norm, (*_NORM, "groups"), (_SCALE, _CENTER)),
    "LayerScale": Kind(joins.layer_scale, ("init_values", "projection_dim"), (Role(("gamma",)),)),
    "Normalization": Kind(joins.normalization, ("axis", "mean", "variance", "invert"), _ADAPTED),
    "Rescaling": Kind(joins.rescaling, ("scale", "offset")),
    "Activation": Kind(activations.activation, ("activation",)),
    "ReLU": Kind(activations.relu, ("max_value", "negative_slope", "threshold")),
    "LeakyReLU": Kind(activations.leaky_relu, ("alpha", "negative_slope")),
    "ThresholdedReLU": Kind(activations.thresholded_relu, ("theta",)),
    "PReLU": Kind(activations.prelu, ("shared_axes",), (Role(("alpha", "alphas")),)),
    "ELU": Kind(activations.elu, ("alpha",)),
    "Softmax": Kind(activations.softmax, ("axis",)),
    **dict.fromkeys(("MaxPooling2D", "AveragePooling2D"), _POOL),
    **dict.fromkeys(("GlobalAveragePooling2D", "GlobalMaxPooling2D"), _GLOBAL),
    **dict.fromkeys(("GlobalAveragePooling1D", "GlobalMaxPooling1D"), _TOKENS),
    "MultiHeadAttention": Kind(tokens.attention, (*_HEADS, *_SHAPES), _PROJECTIONS, inputs=None),
    "ZeroPadding2D": Kind(windows.zero_padding, (*_FORM, "padding")),
    "Cropping2D": Kind(windows.cropping, (*_FORM, "cropping")),
    "UpSampling2D": Kind(windows.up_sampling, (*_FORM, "size", "interpolation")),
    "Resizing": Kind(windows.resizing, (*_FORM, "height", "width", "interpolation", "fill_mode", "fill_value")),
    "Flatten": Kind(joins.flatten, _FORM),
    "Reshape": Kind(joins.reshape, ("target_shape",)),
    "Permute": Kind(joins.permute, ("dims",)),
    **dict.fromkeys(("Dropout", "SpatialDropout2D"), Kind(joins.dropout, ("rate", "noise_shape", "data_format"))),
    **dict.fromkeys(("GaussianNoise", "GaussianDropout", "AlphaDropout", "ActivityRegularization"), _IDENTITY),
    **dict.fromkeys(("Identity", *RANDOM), _IDENTITY),
    "Concatenate": Kind(joins.concatenate, ("axis",), inputs=None),
    "Average": Kind(joins.average, inputs=None),
    "Subtract": Kind(joins.merged("sub"), inputs=2),
    **{name: Kind(joins.merged(function), inputs=None) for name, function in _MERGES.items()},
    "UnitNormalization": Kind(joins.unit_normalization, ("axis",)),
    "CenterCrop": Kind(windows.center_crop, (*_FORM, "height", "width")),
    "CustomScaleLayer": Kind(joins.custom_scale, ("scale",), inputs=2),
    **{f"ops.{name}": Kind(write, inputs=2) for name, write in arithmetic.OF_TWO.items()},
    **{f"ops.{name}": Kind(arithmetic.activation(own)) for name, own in arithmetic.ACTIVATIONS.items()},
    "ops.BiasAdd": Kind(arithmetic.bias_add, _FORM, inputs=2),
    "ops.LeakyRelu": Kind(arithmetic.leaky_relu, ("alpha", "negative_slope")),
    "ops.Gelu": Kind(arithmetic.gelu, ("approximate",)),
    "ops.Softmax": Kind(activations.softmax, ("axis",)),
    "ops.Negative": Kind(arithmetic.negative),
    "ops.Mean": Kind(arithmetic.mean, ("axis", "keepdims")),
    "ops.Concatenate": Kind(joins.concatenate, ("axis",), inputs=None),
    "ops.Stack": Kind(arithmetic.stack, ("axis",), inputs=None),
    "ops.Reshape": Kind(arithmetic.reshape, ("shape", "newshape")),
    "ops.GetItem": Kind(arithmetic.get_item, ("slice_spec",)),
}
"""Layers by the name of their class; operations that Keras records for `x + y` are called `ops.Add`."""
