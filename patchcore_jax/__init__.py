"""PatchCore industrial anomaly detection in JAX: pure functions over arrays and pytrees."""

__version__ = '0.1.0'
