"""Files of Keras 2 and 3: `file` opens them, `graph` reads models, `weights` tensors, `layers` writes the steps."""
