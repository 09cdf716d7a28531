"""Looks at a category before the long work: for what its numbers would hide from whoever reads them."""

from patchcore_jax.data import decoding, image_files, preprocess
from patchcore_jax.data.folder import Category
from patchcore_jax.evaluation import mask_checks
from patchcore_jax.evaluation.settings import Settings


def notes(category: Category, settings: Settings) -> list[str]:
  """Lists what the user must know of a category, in lines without a full stop.

  Args:
    category: its images.
    settings: how they are read.

  Raises:
    ImageError: a mask that cannot be used, unless such files are to be skipped.
  """
  lines = [line.rstrip('.') for line in category.notes]
  if not any(example.label for example in category.test):
    lines.append('all test images count as good, and image AUROC is not defined')
  if category.has_masks:
    skip = None if settings.data.on_error == 'raise' else lambda error: None  # the work says it
    if line := mask_checks.line(category, settings.preprocessing, skip):
      lines.append(line)
  if line := _not_inspected(category, settings):
    lines.append(line)
  return [image_files.shown(line) for line in lines]


def _not_inspected(category: Category, settings: Settings) -> str:
  """Says which share of the test images the network does not see; '' if it sees all of them."""
  shares = []
  for example in category.test:
    try:
      width, height = decoding.contents(example.image_path, example.read).size
      shares.append(preprocess.not_inspected(height, width, settings.preprocessing))
    except ValueError:  # unreadable, or too small for the crop: the work says it
      continue
  if not shares or max(shares) < 0.005:
    return ''
  low, high = (f'{100 * share:.0f}' for share in (min(shares), max(shares)))
  crop = ' x '.join(map(str, settings.preprocessing.crop))
  return (f'{low if low == high else f"{low} to {high}"} % of each image is not inspected, because of '
          f'preprocess.crop={crop}')
