"""A program that uses the public face, for the type checker: what editors know of it.

`mypy` reads it, strictly; nothing runs it.
"""

from typing import Any, assert_type

import numpy as np

import patchcore_jax as pc


def learn(folder: str) -> pc.Inspector:
  """Fits on a folder, with settings of the default method."""
  detector = pc.PatchCore(ratio=0.1, embedding=pc.EmbeddingSpec('mean'), coreset=pc.CoresetSpec())
  inspector = pc.fit(folder, detector=detector, false_alarm_rate=0.05)
  assert_type(inspector, pc.Inspector)
  inspector.save('banks/part')
  return pc.load('banks/part')


def inspect(inspector: pc.Inspector, image: 'np.ndarray[Any, Any]') -> tuple[float, bool | None]:
  """Inspects one image."""
  finding: pc.Finding = inspector.inspect(image)  # of one image; of many an iterator
  assert_type(finding.score, float)
  return finding.score, finding.anomalous
