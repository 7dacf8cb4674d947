"""ONNX: `file` opens it, `graph` writes its network as steps, `tensors` and `constants` hold its numbers."""
