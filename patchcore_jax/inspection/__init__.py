"""Answers about images, from a model and its thresholds."""

from patchcore_jax.inspection.finding import Finding, cell, find
from patchcore_jax.inspection.fitting import fit, fit_data
from patchcore_jax.inspection.inspector import Inspector, check_size, load, of_model, predict, scorer

__all__ = [
    'Finding', 'Inspector', 'cell', 'check_size', 'find', 'fit', 'fit_data', 'load', 'of_model', 'predict',
    'scorer']
