"""Exports a model as a folder whose program answers with JAX alone, or with ONNX Runtime."""
