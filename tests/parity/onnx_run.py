"""Random numbers for ONNX files, and ONNX Runtime, for the scripts beside this file."""

import numpy as np
import onnxruntime

RANDOM = np.random.RandomState(0)


def rand(*shape, random=RANDOM):
    """Random float32 numbers that are neither symmetric nor all of one sign."""
    return (random.randn(*shape) * 0.5 + 0.1).astype(np.float32)


def run(model, feed, names=None):
    """What ONNX Runtime gives for one input, without optimisations; `model` is a path or the bytes of a file."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return session.run(names, {session.get_inputs()[0].name: feed})
