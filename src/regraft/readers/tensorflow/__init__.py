"""TensorFlow: `checkpoint` reads weights, `graph` whole networks, whose steps are written with those of ONNX."""
