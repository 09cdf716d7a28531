"""A model and its thresholds -> answers about images."""

from patchcore_jax.inspection.finding import Finding, find
from patchcore_jax.inspection.inspector import Inspector, check_size, load, of_model, predict, scorer

__all__ = [
    'Finding', 'Inspector', 'check_size', 'find', 'load', 'of_model', 'predict', 'scorer']
