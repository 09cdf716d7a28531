"""Looks at a category before the long work: for what its numbers would hide from whoever reads them."""

import collections
import concurrent.futures
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from patchcore_jax.data import image_contents, image_files, preprocess, value_range
from patchcore_jax.data.folder import Category, Example
from patchcore_jax.data.image_contents import Contents
from patchcore_jax.data.image_errors import ImageError
from patchcore_jax.data.survey import Survey, range_line
from patchcore_jax.evaluation import mask_checks
from patchcore_jax.evaluation.images import Images
from patchcore_jax.evaluation.protocols import PROTOCOLS
from patchcore_jax.evaluation.settings import Settings
from patchcore_jax.settings import Preprocessing


def notes(category: Category, settings: Settings) -> list[str]:
  """Lists what the user must know of a category, in lines without a full stop.

  Args:
    category: its images.
    settings: how they are read.

  Raises:
    ImageError: a mask that cannot be used, unless such files are to be skipped.
    ValueError: images of several bands, of which none are chosen.
  """
  skip = None if settings.data.on_error == 'raise' else lambda error: None  # the work says it
  lines = of_folders(category, settings.preprocessing, settings.metrics.protocol, skip)
  headers = _headers([*category.train, *category.test])
  looked_at = Survey(
      {}, dict(collections.Counter(h.kind for h in headers.values())), [], [], [],
      transparent=sum(h.alpha for h in headers.values()),
      banded=sum(h.bands not in (1, 3) for h in headers.values()),
      pages={image_files.file_of(path): h.pages for path, h in headers.items() if h.pages > 1})
  looked_at.check_bands(settings.preprocessing)
  lines += looked_at.reading(settings.preprocessing)
  tested = {e.image_path for e in category.test}
  lines += _other_colours(
      [h for path, h in headers.items() if path not in tested],
      [h for path, h in headers.items() if path in tested])
  if line := _not_inspected([h for path, h in headers.items() if path in tested], settings.preprocessing):
    lines.append(line)
  return [image_files.shown(line) for line in lines]


def of_folders(
    category: Category, preprocessing: Preprocessing, protocol: str,
    skip: Callable[[ImageError], None] | None = None) -> list[str]:
  """Lists what the user must know of a category's folders and masks, in lines without a full stop.

  Args:
    category: its images.
    preprocessing: what masks go through.
    protocol: name of the protocol, which reads validation images or leaves them out.
    skip: called with the errors of masks that cannot be used; None raises them.
  """
  lines = [line.rstrip('.') for line in category.notes]
  if not any(example.label for example in category.test):
    lines.append('all test images count as good, and image AUROC is not defined')
  if category.has_masks and (line := mask_checks.line(category, preprocessing, skip)):
    lines.append(line)
  if category.validation and not PROTOCOLS[protocol].validation:
    lines.append(
        f'good validation images, which are not read, as the protocol {protocol} sets no threshold by them: '
        f'{len(category.validation)}')
  return lines


def defect_notes(images: Images) -> list[str]:
  """Lists what the user must know of labelled defects that were taken from the test images."""
  if not images.defects:
    return []
  kinds = collections.Counter(example.defect for example in images.defects)
  return [f'{len(images.defects)} defects are learned from, and are no test images any more: '
          f'{", ".join(f"{n} {kind}" for kind, n in kinds.items())}']


def noise_notes(images: Images) -> list[str]:
  """Lists what the user must know of anomalous images that pass for good ones in the training."""
  if not images.noise:
    return []
  names = ', '.join(f'{e.defect}/{Path(e.image_path).name}' for e in images.noise)
  return [f'{len(images.noise)} anomalous images are trained on as if they were good, and are no test images '
          f'any more: {names}']


def range_notes(images: Images) -> list[str]:
  """Lists what the user must know of the value range of a category whose files have more than 8 bits."""
  train, test = images.files
  preprocessing, outside = images.preprocessing, train.outside_range or 0.0
  if not preprocessing.value_range or any(e.read for e in test.examples):
    return []
  lines = [range_line(preprocessing, outside, len(train))]
  _, most = value_range.measured(
      [e.image_path for e in test.examples], preprocessing, max_pixels=test.max_pixels)
  if most > outside:
    lines.append(
        f'up to {100 * most:.3g} % of the pixels of a test image lie outside of that range: predict calls '
        'such an image anomalous whatever its score, which these numbers leave aside')
  return lines


def _headers(examples: Sequence[Example]) -> dict[str, Contents]:
  """Reads the headers of images, by their paths; those that cannot be read are left to the work to name."""
  def header(example):
    try:
      return image_contents.contents(example.image_path, example.read)
    except ImageError:
      return None

  with concurrent.futures.ThreadPoolExecutor(max(2, min(16, os.cpu_count() or 1))) as pool:
    found = pool.map(header, examples)
    return {e.image_path: h for e, h in zip(examples, found, strict=True) if h}


def _other_colours(train: Sequence[Contents], test: Sequence[Contents]) -> list[str]:
  """Tells in a line of test images that are gray where all training images have colours, or the other way."""
  known = {header.bands == 1 for header in train}
  others = [header for header in test if (header.bands == 1) not in known]
  if not train or not others:
    return []
  one, other = ('gray', 'have colours') if others[0].bands == 1 else ('coloured', 'are gray')
  return [f'{len(others)} of {len(test)} test images are {one} files, and all training images {other}']


def _not_inspected(headers: Sequence[Contents], preprocessing: Preprocessing) -> str:
  """Says which share of images the network does not see; '' if it sees all of them."""
  shares = []
  for (width, height), *_ in headers:
    try:
      shares.append(preprocess.not_inspected(height, width, preprocessing))
    except ValueError:  # too small for the crop: the work says it
      continue
  if not shares or max(shares) < 0.005:
    return ''
  low, high = (f'{100 * share:.0f}' for share in (min(shares), max(shares)))
  crop = ' x '.join(map(str, preprocessing.crop))
  return (f'{low if low == high else f"{low} to {high}"} % of each image is not inspected, because of '
          f'preprocess.crop={crop}')
