"""A model and its thresholds -> answers about images."""

from patchcore_jax.inspection.inspector import (
    SAMPLE,
    Finding,
    Inspector,
    check_size,
    described,
    finding,
    geometry,
    load,
    of_bank,
    predict,
    sample_of,
    score_differences,
    scorer,
)

__all__ = [
    'SAMPLE', 'Finding', 'Inspector', 'check_size', 'described', 'finding', 'geometry', 'load', 'of_bank',
    'predict', 'sample_of', 'score_differences', 'scorer']
