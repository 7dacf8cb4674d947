"""Graphs of one or a few ONNX operators, with what ONNX Runtime computes for each; `make_onnx.py` writes them down."""

import numpy as np
from onnx import TensorProto, helper, numpy_helper
from onnx_run import rand, run

RANDOM = np.random.RandomState(2)
MASK = np.where(RANDOM.rand(6, 5) > 0.5, -100, 0).astype(np.float32)
PICTURE = ["n", 4, 6, 5]
LAST = ["n", 6, 5, 4]
CASES = {}


def case(name, *nodes, shape=PICTURE, opset=17, positive=False, out=None, turned=False, **constants):
    """A graph of `nodes`, each (operator, inputs, attributes), and its output for `rand` from seed 1.

    `x` goes in, `@` is what the step before makes, and what the last one makes comes out. turned: it has the channels
    last and is kept channels first.
    """
    steps, before = [], "x"
    tensors = {key: np.asarray(value) for key, value in constants.items()}
    if positive:
        steps += [helper.make_node("Abs", ["x"], ["above"]), helper.make_node("Add", ["above", "half"], ["positive"])]
        tensors["half"], before = np.array(0.5, np.float32), "positive"
    for number, (op, inputs, attributes) in enumerate(nodes):
        inputs = [before if i == "@" else i for i in inputs]
        outputs = attributes.pop("outputs", [f"{op}_{number}"])
        domain = attributes.pop("domain", "")
        steps.append(helper.make_node(op, inputs, outputs, name=f"step/{op}_{number}", domain=domain, **attributes))
        before = outputs[0]
    before = out or before
    x = rand(2, *(PICTURE if shape == LAST else shape)[1:], random=np.random.RandomState(1))
    feed = np.ascontiguousarray(x.transpose(0, 2, 3, 1)) if shape == LAST else x
    graph = helper.make_graph(
        steps,
        "case",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(before, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, key) for key, value in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    data = model.SerializeToString()
    if isinstance(shape[0], int):
        y = np.concatenate([run(data, feed[i : i + 1])[0] for i in range(2)])
    else:
        y = run(data, feed)[0]
    CASES[name] = (data, x, np.ascontiguousarray(y.transpose(0, 3, 1, 2)) if turned else y)


def c(op, *inputs, **attributes):
    """A step after the one before it."""
    return (op, ["@", *inputs], attributes)


def ints(*values):
    return np.array(values, np.int64)


def all_cases():
    """By name: the file, the input (channels first) and the output."""
    for group in (convolutions, pooling, norms, arithmetic, moves, resizing, channels_last, whole_batches, places):
        group()
    return CASES


def convolutions():
    w, b, d = rand(6, 4, 3, 2), rand(6), rand(4, 1, 3, 3)
    case("conv", c("Conv", "w", "b"), w=w, b=b)
    case("conv_asymmetric", c("Conv", "w", "b", pads=[0, 1, 2, 0], strides=[2, 1]), w=w, b=b)
    for mode in ("SAME_UPPER", "SAME_LOWER", "VALID"):
        for stride in (1, 2):
            extra = {"auto_pad": mode, "strides": [stride, stride]}
            case(f"conv_{mode.lower()}_{stride}", c("Conv", "w", **extra), w=w)
    case("conv_same_odd", c("Conv", "w", auto_pad="SAME_UPPER"), w=rand(4, 4, 3, 5))
    case("conv_depthwise", c("Conv", "w", group=4, pads=[1, 1, 1, 1], dilations=[1, 2]), w=d)
    case("conv_grouped", c("Conv", "w", "b", group=2), w=rand(6, 2, 2, 2), b=b)
    case("conv_bias_added", c("Conv", "w"), c("Add", "b"), w=w, b=b.reshape(1, 6, 1, 1))
    case("conv_row_added", c("Conv", "w"), c("Add", "b"), w=w, b=rand(6, 4, 4))
    case("conv_1d", c("Conv", "w", "b", pads=[1, 0]), shape=["n", 4, 9], w=rand(6, 4, 3), b=b)
    case("conv_1d_same", c("Conv", "w", auto_pad="SAME_UPPER", strides=[2]), shape=["n", 4, 9], w=rand(6, 4, 2))
    t = rand(4, 3, 3, 2)
    case("transposed", c("ConvTranspose", "w", "b", strides=[2, 2], pads=[1, 0, 1, 0]), w=t, b=rand(3))
    case("transposed_cropped", c("ConvTranspose", "w", strides=[2, 3], pads=[0, 1, 1, 0]), w=t)
    case("transposed_longer", c("ConvTranspose", "w", strides=[2, 2], output_padding=[1, 1], dilations=[2, 1]), w=t)
    case("transposed_groups", c("ConvTranspose", "w", group=2, strides=[2, 2]), w=t)
    case("transposed_same", c("ConvTranspose", "w", auto_pad="SAME_UPPER", strides=[2, 2]), w=t)
    case("transposed_shape", c("ConvTranspose", "w", output_shape=[12, 9], strides=[2, 2]), w=t)
    row = ["n", 8]
    case("gemm", c("Gemm", "w", "b", transB=1), shape=row, w=rand(5, 8), b=rand(5))
    case("gemm_scaled", c("Gemm", "w", "b", alpha=0.5, beta=2.0), shape=row, w=rand(8, 5), b=rand(1, 5))
    case("gemm_one_bias", c("Gemm", "w", "b"), shape=row, w=rand(8, 5), b=rand(1))
    case("gemm_plain", c("Gemm", "w"), shape=row, w=rand(8, 5))
    case("matmul_added", c("MatMul", "w"), ("Add", ["b", "@"], {}), shape=row, w=rand(8, 5), b=rand(5))
    case("matmul_tokens", c("MatMul", "w"), c("Add", "b"), shape=["n", 6, 8], w=rand(8, 5), b=rand(1, 1, 5))
    case("matmul_positions", c("MatMul", "w"), c("Add", "b"), shape=["n", 6, 8], w=rand(8, 5), b=rand(6, 5))
    case("matmul_twice", c("MatMul", "w"), c("Relu"), ("Add", ["@", "MatMul_0"], {}), shape=row, w=rand(8, 5))
    case(
        "matmul_used_elsewhere",
        *(c("MatMul", "w"), c("Add", "b"), ("Mul", ["@", "MatMul_0"], {})),
        shape=row,
        w=rand(8, 5),
        b=rand(5),
    )
    case("matmul_stack", c("MatMul", "w"), shape=["n", 3, 6, 8], w=rand(3, 8, 5))
    case("matmul_left", ("MatMul", ["w", "@"], {}), shape=["n", 3, 6, 8], w=rand(5, 6))
    case(
        "attention",
        *(c("MatMul", "w"), c("Split", "thirds", axis=-1, outputs=["q", "k", "v"])),
        *(("Transpose", ["k"], {"perm": [0, 2, 1]}), ("MatMul", ["q", "Transpose_2"], {}), c("Mul", "scale")),
        *(c("Softmax"), c("MatMul", "v"), c("Squeeze", "last"), c("MatMul", "w2")),
        shape=["n", 6, 8],
        w=rand(8, 3),
        thirds=ints(1, 1, 1),
        scale=np.float32(0.5),
        last=ints(2),
        w2=rand(6, 2),
    )
    case("weights_twice", c("MatMul", "w"), c("MatMul", "w"), shape=row, w=rand(8, 8))


def pooling():
    w = {"w": rand(4, 4, 1, 1)}
    k = {"kernel_shape": [3, 2]}
    case("max", c("Conv", "w"), c("MaxPool", **k), **w)
    case("max_padded", c("Conv", "w"), c("MaxPool", pads=[1, 1, 1, 1], strides=[2, 2], **k), **w)
    case("max_ceil", c("Conv", "w"), c("MaxPool", ceil_mode=1, strides=[2, 2], **k), **w)
    case("max_behind", c("Conv", "w"), c("MaxPool", kernel_shape=[3, 3], strides=[2, 2], pads=[0, 0, 1, 1]), **w)
    case("max_in_front", c("Conv", "w"), c("MaxPool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 2, 0, 0]), **w)
    case("max_dilated", c("Conv", "w"), c("MaxPool", dilations=[2, 2], **k), **w)
    case("average", c("Conv", "w"), c("AveragePool", strides=[2, 2], **k), **w)
    same = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "strides": [2, 2]}
    case("average_padded", c("Conv", "w"), c("AveragePool", **same), **w)
    case("average_counted", c("Conv", "w"), c("AveragePool", count_include_pad=1, **same), **w)
    behind = {"kernel_shape": [3, 3], "pads": [0, 1, 1, 2], "strides": [2, 2]}
    case("average_counted_behind", c("Conv", "w"), c("AveragePool", count_include_pad=1, **behind), **w)
    case("average_behind", c("Conv", "w"), c("AveragePool", **behind), **w)
    case("average_next", c("Conv", "w"), c("AveragePool", kernel_shape=[2, 2], pads=[0, 0, 1, 1]), **w)
    case("average_before", c("Conv", "w"), c("AveragePool", kernel_shape=[2, 2], pads=[1, 1, 0, 0]), **w)
    case(
        "average_ceil",
        c("Conv", "w"),
        c("AveragePool", kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1),
        opset=19,
        **w,
    )
    for mode in ("SAME_UPPER", "SAME_LOWER", "VALID"):
        for op in ("MaxPool", "AveragePool"):
            extra = {"auto_pad": mode, "strides": [2, 2], "kernel_shape": [2, 3]}
            case(f"{op}_{mode}".lower(), c("Conv", "w"), c(op, **extra), **w)
    case("global_average", c("Conv", "w"), c("GlobalAveragePool"), c("Flatten"), **w)
    case("global_max", c("Conv", "w"), c("GlobalMaxPool"), c("Flatten"), **w)


def norms():
    n = {"g": rand(4), "b": rand(4), "m": rand(4), "v": np.abs(rand(4)) + 0.3}
    row = {"shape": ["n", 4]}
    case("batch_norm", c("BatchNormalization", "g", "b", "m", "v", epsilon=1e-3), **n)
    case("batch_norm_old", c("BatchNormalization", "g", "b", "m", "v", epsilon=0.1), opset=8, **n)
    case("batch_norm_rows", c("BatchNormalization", "g", "b", "m", "v"), **row, **n)
    case("instance_norm", c("InstanceNormalization", "g", "b", epsilon=0.01), g=n["g"], b=n["b"])
    case("group_norm", c("GroupNormalization", "g", "b", num_groups=2), opset=21, g=n["g"], b=n["b"])
    case("layer_norm", c("LayerNormalization", "g", "b", epsilon=0.01), shape=["n", 6, 4], g=n["g"], b=n["b"])
    case("layer_norm_two", c("LayerNormalization", "g", axis=1), shape=["n", 6, 4], g=rand(6, 4))
    case("local_norm", c("Conv", "w"), c("LRN", size=3, alpha=0.3, beta=0.6, bias=1.5), w=rand(6, 4, 1, 1))
    for old, axis in ((True, 1), (False, -1), (False, 1)):
        kind = {"opset": 11 if old else 17, "shape": ["n", 4]}
        case(f"softmax_{old}_{axis}".lower(), c("MatMul", "w"), c("Softmax", axis=axis), **kind, w=rand(4, 5))
    pointed = c("GlobalAveragePool")
    case("softmax_old_map", c("Conv", "w"), pointed, c("Softmax"), opset=9, w=rand(6, 4, 1, 1))
    case("log_softmax", c("Conv", "w"), c("LogSoftmax", axis=1), w=rand(6, 4, 1, 1))


def arithmetic():
    w = {"w": rand(4, 4, 1, 1)}
    plain = ("Relu", "Sigmoid", "Tanh", "Softplus", "HardSwish", "Abs", "Neg", "Exp", "Erf", "Selu", "Identity")
    for op in plain:
        case(op.lower(), c("Conv", "w"), c(op), **w)
    case("mish", c("Conv", "w"), c("Mish"), opset=18, **w)
    case("gelu", c("Conv", "w"), c("Gelu"), opset=20, **w)
    case("gelu_tanh", c("Conv", "w"), c("Gelu", approximate="tanh"), opset=20, **w)
    case("leaky", c("Conv", "w"), c("LeakyRelu", alpha=0.3), **w)
    case("elu", c("Conv", "w"), c("Elu", alpha=0.7), **w)
    case("hard_sigmoid", c("Conv", "w"), c("HardSigmoid"), **w)
    case("hard_sigmoid_sixth", c("Conv", "w"), c("HardSigmoid", alpha=1 / 6), **w)
    case("prelu", c("Conv", "w"), c("PRelu", "s"), s=rand(4, 1, 1), **w)
    case("prelu_one", c("Conv", "w"), c("PRelu", "s"), s=rand(1), **w)
    case("silu", c("Conv", "w"), c("Sigmoid"), ("Mul", ["Conv_0", "@"], {}), **w)
    case("hard_swish_by_parts", c("Conv", "w"), c("HardSigmoid", alpha=1 / 6), ("Mul", ["@", "Conv_0"], {}), **w)
    case("gate_used_twice", c("Conv", "w"), c("Sigmoid"), ("Mul", ["Conv_0", "@"], {}), c("Add", "Sigmoid_1"), **w)
    case("clip", c("Conv", "w"), c("Clip", "low", "high"), low=np.float32(-0.2), high=np.float32(0.3), **w)
    case("clip_open", c("Conv", "w"), c("Clip", "", "high"), high=np.float32(0.3), **w)
    case("clip_six", c("Conv", "w"), c("Clip", min=0.0, max=6.0), opset=9, **w)
    case("sqrt", c("Sqrt"), c("Conv", "w"), positive=True, **w)
    case("log", c("Log"), c("Conv", "w"), positive=True, **w)
    case("reciprocal", c("Reciprocal"), c("Conv", "w"), positive=True, **w)
    case("pow", c("Conv", "w"), c("Pow", "p"), p=np.float32(2), **w)
    case("pow_each", c("Pow", "p"), c("Conv", "w"), positive=True, p=np.abs(rand(4, 1, 1)), **w)
    for op in ("Add", "Sub", "Mul", "Div", "Max", "Min"):
        case(f"{op.lower()}_row", ("Exp", ["x"], {}), c("Conv", "w"), (op, ["k", "@"], {}), k=rand(5) + 2, **w)
        case(f"{op.lower()}_one", c("Conv", "w"), c(op, "k"), k=np.float32(1.5), **w)
        case(f"{op.lower()}_live", c("Conv", "w"), c(op, "x"), positive=True, **w)
    case("sum_three", c("Conv", "w"), c("Sum", "x", "k"), k=rand(4, 1, 1), **w)
    case("where", c("Conv", "w"), ("Where", ["mask", "@", "x"], {}), mask=MASK == 0, **w)
    case("masked", c("Conv", "w"), c("Add", "mask"), c("Softmax"), mask=MASK, **w)
    case("shifted_picture", c("Sub", "m"), c("Div", "s"), c("Conv", "w"), m=rand(4, 1, 1), s=rand(4, 1, 1) + 2, **w)


def moves():
    w = {"w": rand(4, 4, 1, 1)}
    case("flatten", c("Conv", "w"), c("Flatten"), **w)
    case("flatten_last", c("Conv", "w"), c("Flatten", axis=-3), **w)
    case("reshape", c("Conv", "w"), c("Reshape", "s"), s=ints(0, 2, -1, 5), **w)
    case("reshape_tokens", c("Conv", "w"), c("Reshape", "s"), c("Transpose", perm=[0, 2, 1]), s=ints(0, 4, -1), **w)
    case(
        "reshape_merges",
        c("Conv", "w"),
        c("Reshape", "s"),
        c("Relu"),
        c("Reshape", "t"),
        s=ints(-1, 6, 5),
        t=ints(-1, 4, 30),
        **w,
    )
    case(
        "reshape_by_sizes",
        *(c("Conv", "w"), c("Shape"), c("Gather", "first"), c("Unsqueeze", "zero"), c("Concat", "rest", axis=0)),
        *(("Reshape", ["Conv_0", "@"], {}),),
        **{"first": np.int64(0), "zero": ints(0), "rest": ints(4, 30), **w},
    )
    case(
        "reshape_by_old_sizes",
        *(c("Conv", "w"), c("Shape"), c("Slice", starts=[0], ends=[1]), c("Cast", to=1), c("Cast", to=7)),
        *(c("Concat", "rest", axis=0), ("Reshape", ["Conv_0", "@"], {})),
        **{"rest": ints(-1), "opset": 9, **w},
    )
    case("transpose", c("Conv", "w"), c("Transpose", perm=[0, 3, 1, 2]), c("Flatten"), **w)
    case(
        "transpose_pair",
        c("Conv", "w"),
        c("Transpose", perm=[0, 2, 3, 1]),
        c("Add", "k"),
        c("Transpose", perm=[0, 3, 1, 2]),
        k=rand(4),
        **w,
    )
    case("squeeze", c("Conv", "w"), c("GlobalAveragePool"), c("Squeeze", "a"), a=ints(-1, 2), **w)
    case("squeeze_all", c("Conv", "w"), c("GlobalAveragePool"), c("Squeeze"), **w)
    case("squeeze_old", c("Conv", "w"), c("GlobalAveragePool"), c("Squeeze", axes=[2, 3]), opset=9, **w)
    case("unsqueeze", c("MatMul", "w"), c("Unsqueeze", "a"), shape=["n", 4], a=ints(1, -1), w=rand(4, 5))
    case("concat", c("Conv", "w"), c("Concat", "x", axis=1), **w)
    case(
        "class_token",
        *(c("Conv", "w"), c("Reshape", "s"), c("Transpose", perm=[0, 2, 1]), ("Shape", ["@"], {}), c("Gather", "zero")),
        *(c("Unsqueeze", "nought"), c("Concat", "rest", axis=0), ("Expand", ["token", "@"], {})),
        *(("Concat", ["@", "Transpose_2"], {"axis": 1}), c("Add", "place")),
        s=ints(0, 4, 30),
        zero=np.int64(0),
        nought=ints(0),
        rest=ints(1, 4),
        token=rand(1, 1, 4),
        place=rand(1, 31, 4),
        **w,
    )
    case("split", c("Conv", "w"), c("Split", axis=1, outputs=["a", "b"]), ("Mul", ["a", "b"], {}), opset=11, **w)
    case(
        "split_sizes", c("Conv", "w"), c("Split", "s", axis=-1, outputs=["a", "b", "d"]), out="b", s=ints(1, 3, 1), **w
    )
    case("split_count", c("Conv", "w"), c("Split", axis=2, num_outputs=2, outputs=["a", "b"]), out="b", opset=18, **w)
    far = 2**63 - 1
    case(
        "slice",
        c("Conv", "w"),
        c("Slice", "s", "e", "a", "t"),
        s=ints(1, -5),
        e=ints(far, -1),
        a=ints(1, 3),
        t=ints(1, 2),
        **w,
    )
    case(
        "slice_back",
        c("Conv", "w"),
        c("Slice", "s", "e", "a", "t"),
        s=ints(-1),
        e=ints(-far),
        a=ints(1),
        t=ints(-1),
        **w,
    )
    case("slice_old", c("Conv", "w"), c("Slice", starts=[1, 0], ends=[9999, -2], axes=[2, 3]), opset=9, **w)
    case("gather_one", c("Conv", "w"), c("Gather", "i", axis=2), i=np.int64(-2), **w)
    case("gather_some", c("Conv", "w"), c("Gather", "i", axis=1), i=ints(2, 0, -1), **w)
    case("gather_run", c("Conv", "w"), c("Gather", "i", axis=1), i=ints(1, 2), **w)
    sides = ints(0, 0, 1, 2, 0, 0, 3, 0)
    case("pad", c("Conv", "w"), c("Pad", "p", "v"), p=sides, v=np.float32(0.7), **w)
    case("pad_channels", c("Conv", "w"), c("Pad", "p"), p=ints(0, 1, 0, 0, 0, 2, 0, 1), **w)
    case("pad_reflect", c("Conv", "w"), c("Pad", "p", mode="reflect"), p=sides, **w)
    case("pad_edge", c("Conv", "w"), c("Pad", "p", mode="edge"), p=sides, **w)
    case("pad_old", c("Conv", "w"), c("Pad", pads=[0, 0, 1, 2, 0, 0, 3, 0], value=0.7), opset=9, **w)
    case("pad_axes", c("Conv", "w"), c("Pad", "p", "", "a"), p=ints(1, 2, 0, 1), a=ints(-1, 2), opset=18, **w)
    for op in ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2"):
        old = {"axes": [2, 3], "keepdims": 0}
        case(f"{op.lower()}_old", c("Conv", "w"), c(op, **old), opset=11, **w)
        case(op.lower(), c("Conv", "w"), c(op, "a"), opset=18, a=ints(-1), **w)
    case("cast", c("Conv", "w"), c("Cast", to=1), **w)
    case("dropout", c("Conv", "w"), c("Dropout", "r"), r=np.float32(0.3), **w)
    case("dropout_old", c("Conv", "w"), c("Dropout", ratio=0.4), opset=9, **w)
    case("expand", c("Conv", "w"), c("GlobalAveragePool"), c("Expand", "s"), s=ints(1, 1, 3, 2), **w)
    case("tile", c("Conv", "w"), c("Tile", "r"), r=ints(1, 1, 2, 3), **w)
    case(
        "constant_node",
        ("Constant", [], {"value": numpy_helper.from_array(rand(6, 4, 1, 1))}),
        ("Conv", ["x", "@"], {}),
    )
    q = RANDOM.randint(0, 255, (6, 4, 3, 3)).astype(np.uint8)
    case(
        "weights_uint8",
        ("DequantizeLinear", ["q", "s", "z"], {}),
        ("Conv", ["x", "@"], {}),
        q=q,
        s=np.float32(0.01),
        z=np.uint8(120),
    )
    q = RANDOM.randint(-127, 127, (6, 4, 3, 3)).astype(np.int8)
    scales = {"s": np.abs(rand(6)) * 0.01, "z": np.zeros(6, np.int8)}
    case("weights_int8", ("DequantizeLinear", ["q", "s", "z"], {"axis": 0}), ("Conv", ["x", "@"], {}), q=q, **scales)
    rounded = ("QuantizeLinear", ["w", "s", "z"], {"axis": 0}), c("DequantizeLinear", "s", "z", axis=0)
    case("weights_rounded", *rounded, ("Conv", ["x", "@"], {}), w=rand(6, 4, 3, 3), **scales)
    case("weights_half", ("Cast", ["h"], {"to": 1}), ("Conv", ["x", "@"], {}), h=rand(6, 4, 1, 1).astype(np.float16))
    case("weights_turned", ("Transpose", ["h"], {"perm": [3, 2, 0, 1]}), ("Conv", ["x", "@"], {}), h=rand(3, 3, 4, 6))


def places():
    """Places that become channels, weights that are computed, and PyTorch's local response normalisation."""
    w = {"w": rand(16, 4, 1, 1)}
    for mode in ("DCR", "CRD"):
        case(f"depth_to_space_{mode.lower()}", c("Conv", "w"), c("DepthToSpace", blocksize=2, mode=mode), **w)
    case("space_to_depth", c("SpaceToDepth", blocksize=2), c("Conv", "w"), shape=["n", 4, 6, 4], w=rand(3, 16, 1, 1))
    case("cast_like", c("Conv", "w"), c("CastLike", "half"), c("Add", "half"), half=np.float32(0.5), **w)
    case(
        "cast_like_constant",
        *(c("Conv", "w"), ("CastLike", ["two", "Conv_0"], {}), ("Mul", ["Conv_0", "@"], {})),
        two=np.int64(2),
        **w,
    )
    counted = (("CumSum", ["ones", "last"], {}), ("Add", ["Conv_0", "@"], {}))
    case(
        "counted", c("Conv", "w"), *counted, ones=np.ones((4, 6, 5), np.float32), last=np.int64(-1), w=rand(4, 4, 1, 1)
    )
    planes = (c("Mul", "@"), c("Unsqueeze", "one"), c("Pad", "p"), c("AveragePool", kernel_shape=[5, 1, 1]))
    sides = {"one": ints(1), "p": ints(0, 0, 2, 0, 0, 0, 0, 2, 0, 0)}
    case("mean_of_planes", c("Conv", "w"), *planes, c("Squeeze", "one"), **sides, **w)
    n = {"s": rand(6), "b": rand(6), "m": rand(6), "v": np.abs(rand(6)) + 0.3}
    n |= {"k": rand(1, 6, 36), "t": ints(6, 4, 3, 3)}
    for training in (0, 1):
        outputs = ["normed", "mean", "var"][: 1 + 2 * training]
        norm = ("BatchNormalization", ["k", "s", "b", "m", "v"], {"training_mode": training, "outputs": outputs})
        steps = (norm, c("Reshape", "t"), ("Conv", ["x", "@"], {}))
        case(f"weights_normalised_{training}", *steps, **n)


def resizing():
    w = {"w": rand(1, 4, 1, 1)}
    whole, down = np.array([1, 1, 2, 3], np.float32), np.array([1, 1, 0.6, 0.5], np.float32)
    for mode in ("nearest", "linear"):
        for rule in ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel"):
            kind = {"mode": mode, "coordinate_transformation_mode": rule}
            case(f"{mode}_{rule}", c("Conv", "w"), c("Resize", "", "s", **kind), s=whole, **w)
            case(f"{mode}_{rule}_down", c("Conv", "w"), c("Resize", "", "s", **kind), s=down, **w)
    for rounding in ("floor", "ceil", "round_prefer_ceil"):
        kind = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": rounding}
        case(f"nearest_{rounding}", c("Conv", "w"), c("Resize", "", "s", **kind), s=whole, **w)
    case(
        "nearest_tensorflow",
        c("Conv", "w"),
        c("Resize", "", "s", coordinate_transformation_mode="tf_half_pixel_for_nn", nearest_mode="floor"),
        s=whole,
        **w,
    )
    case(
        "resize_axes",
        c("Conv", "w"),
        c("Resize", "", "", "z", mode="linear", axes=[2, 3]),
        opset=18,
        z=ints(8, 13),
        **w,
    )
    case("resize_cubic", c("Conv", "w"), c("Resize", "", "s", mode="cubic"), s=np.array([1, 1, 2, 2], np.float32), **w)
    case("resize_ten", c("Conv", "w"), c("Resize", "s"), opset=10, s=whole, **w)
    case("upsample", c("Conv", "w"), c("Upsample", "s"), opset=9, s=whole, **w)
    case("upsample_seven", c("Conv", "w"), c("Upsample", scales=[1.0, 1.0, 2.0, 2.0], mode="linear"), opset=8, **w)


def channels_last():
    """Graphs as they come from TensorFlow: every layer between two transposes."""
    inward, outward = c("Transpose", perm=[0, 3, 1, 2]), c("Transpose", perm=[0, 2, 3, 1])
    w, b = {"w": rand(6, 4, 3, 3), "w2": rand(5, 6, 1, 1), "k": rand(6)}, rand(6)
    kind = {"shape": LAST, **w}
    case("last_dense", c("MatMul", "m"), c("Add", "k"), shape=LAST, m=rand(4, 6), k=b)
    first = (inward, c("Conv", "w"), outward)
    case("last_pair", *first, c("Add", "k"), c("Relu"), inward, c("Conv", "w2"), **kind)
    case("last_flat", *first, c("Mul", "k"), c("Flatten"), c("MatMul", "m"), m=rand(72, 3), **kind)
    case("last_reshaped", *first, c("Reshape", "s"), c("MatMul", "m"), s=ints(-1, 72), m=rand(72, 3), **kind)
    case("last_mean", *first, c("ReduceMean", axes=[1, 2], keepdims=0), opset=11, **kind)
    case("last_mean_kept", *first, c("ReduceMean", axes=[1, 2]), inward, c("Conv", "w2"), opset=11, **kind)
    case(
        "last_gate",
        *first,
        c("ReduceMean", axes=[1, 2]),
        c("Sigmoid"),
        ("Mul", ["@", "Transpose_2"], {}),
        inward,
        opset=11,
        **kind,
    )
    squeezed = (c("GlobalAveragePool"), c("Reshape", "s"), c("Sigmoid"), ("Mul", ["@", "Transpose_2"], {}))
    case("last_gate_by_shape", *first, inward, *squeezed, inward, s=ints(-1, 1, 1, 6), **kind)
    case("last_softmax", *first, c("Softmax", axis=-1), turned=True, **kind)
    case("last_prelu", *first, c("PRelu", "p"), turned=True, p=rand(1, 1, 6), **kind)
    case("last_map", *first, c("Add", "k"), c("Relu"), turned=True, **kind)
    case("last_padded", *first, c("Pad", "p"), inward, c("Conv", "w2"), p=ints(0, 1, 2, 0, 0, 3, 0, 0), **kind)
    case(
        "last_joined",
        *first,
        ("Concat", ["@", "Transpose_2"], {"axis": 3}),
        inward,
        c("MaxPool", kernel_shape=[2, 2]),
        **kind,
    )
    case(
        "last_split",
        *first,
        c("Split", axis=3, outputs=["l", "r"]),
        ("Sub", ["l", "r"], {}),
        inward,
        c("Relu"),
        opset=11,
        **kind,
    )
    case("last_sliced", *first, c("Slice", "s", "e", "a"), inward, s=ints(1), e=ints(3), a=ints(2), **kind)
    case("last_grown", *first, c("Resize", "", "s"), inward, s=np.array([1, 2, 2, 1], np.float32), **kind)
    case("last_plain_add", *first, c("Add", "bias"), inward, bias=rand(4, 3, 6), **kind)
    case(
        "last_and_first",
        *first,
        ("Transpose", ["x"], {"perm": [0, 3, 1, 2]}),
        c("Conv", "w3"),
        outward,
        c("Add", "Transpose_2"),
        inward,
        w3=rand(6, 4, 3, 3),
        **kind,
    )
    case("last_picture_shifted", c("Sub", "mean"), *first, turned=True, mean=rand(4), **kind)
    n = {"g": rand(4), "o": rand(4), "m": rand(4), "v": np.abs(rand(4)) + 0.3}
    case(
        "last_picture_norm",
        inward,
        c("BatchNormalization", "g", "o", "m", "v"),
        outward,
        c("MatMul", "d"),
        shape=LAST,
        d=rand(4, 3),
        **n,
    )


def whole_batches():
    """Graphs written for one picture at a time, as PyTorch exports them by default."""
    one, w = [1, *PICTURE[1:]], {"w": rand(4, 4, 1, 1)}
    case("one_flat", c("Conv", "w"), c("Reshape", "s"), c("MatMul", "m"), shape=one, s=ints(1, -1), m=rand(120, 3), **w)
    case("one_flat_sized", c("Conv", "w"), c("Reshape", "s"), shape=one, s=ints(1, 120), **w)
    case(
        "one_token",
        c("Conv", "w"),
        c("Reshape", "s"),
        ("Concat", ["t", "@"], {"axis": 2}),
        shape=one,
        s=ints(1, 4, 30),
        t=rand(1, 4, 1),
        **w,
    )
    heads = (c("Reshape", "s"), c("Transpose", perm=[0, 2, 1]), c("Reshape", "t"), c("Relu"), c("Reshape", "u"))
    case("one_heads", c("Conv", "w"), *heads, shape=one, s=ints(4, 6, 5), t=ints(2, 10, 6), u=ints(1, 120), **w)
    case(
        "one_last",
        c("Conv", "w"),
        c("Reshape", "s"),
        c("Transpose", perm=[2, 0, 1]),
        c("Reshape", "t"),
        c("Softmax", axis=0),
        c("Reshape", "u"),
        c("Transpose", perm=[1, 2, 0]),
        shape=one,
        s=ints(1, 4, 30),
        t=ints(30, 4),
        u=ints(30, 1, 4),
        **w,
    )
    case("one_grown", c("Conv", "w"), c("Resize", "", "", "s"), shape=one, s=ints(1, 4, 12, 10), **w)
    case("one_sliced", c("Conv", "w"), c("Slice", "s", "e", "s"), shape=one, s=ints(0), e=ints(1), **w)
    case("one_expanded", c("Conv", "w"), c("GlobalAveragePool"), c("Expand", "s"), shape=one, s=ints(1, 4, 3, 2), **w)
