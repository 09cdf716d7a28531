"""Answers about images, from a model and its thresholds."""

from patchcore_jax.inspection.acceptance import NotAccepted
from patchcore_jax.inspection.finding import Finding, cell, check_knows_regions, find
from patchcore_jax.inspection.fitting import fit, fit_data
from patchcore_jax.inspection.inspector import Inspector, check_size, load, of_model, predict, scorer

__all__ = [
    'Finding', 'Inspector', 'NotAccepted', 'cell', 'check_knows_regions', 'check_size', 'find', 'fit',
    'fit_data', 'load', 'of_model', 'predict', 'scorer']
