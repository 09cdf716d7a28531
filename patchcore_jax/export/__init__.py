"""A model -> a folder whose program answers with JAX alone, or with ONNX Runtime."""
