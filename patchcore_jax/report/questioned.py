"""Shows images that are asked about, before a model learns of them, beside the most similar normal patch."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from patchcore_jax.banks import provenance
from patchcore_jax.banks.model import Model
from patchcore_jax.data import decoding, placement, preprocess
from patchcore_jax.inspection import Inspector, acceptance, colours, find, scorer
from patchcore_jax.inspection.acceptance import Questioned
from patchcore_jax.inspection.upkeep import Doubt
from patchcore_jax.report import answers, page

_MOST = 100  # pictures, of 10 kB each


def page_of_files(
    path: str | os.PathLike, title: str, inspector: Inspector, questioned: Sequence[Questioned],
    max_pixels: int | None = None) -> None:
  """Writes a page that shows image files that are asked about, with what is unusual in them.

  Args:
    path, title: the page.
    inspector: the model as it is.
    questioned: images whose names are their files.
    max_pixels: see `decoding.decode`.

  Raises:
    OSError: the page cannot be written.
  """
  score, thumbnails = scorer(inspector, 1), provenance.thumbnails(inspector.model)
  pictures = []
  for asked in questioned[:_MOST]:
    image, outside, full_range = decoding.decode(
        asked.name, inspector.preprocessing, max_pixels=max_pixels)
    pixels = np.asarray(preprocess.transform(image, inspector.preprocessing))
    finding = find(
        inspector, score(pixels[None]), 0, image.size[::-1], pixels=pixels, outside=outside,
        full_range=full_range)
    place = placement.placement(image.height, image.width, inspector.preprocessing)
    whole = None if finding.map is None else placement.to_original(finding.map, place)
    limits = colours.limits(inspector, None) or (
        colours.limits_of_map(whole) if whole is not None else (0.0, 1.0))
    nearest = thumbnails[finding.nearest.image] if finding.nearest is not None and thumbnails else b''
    pictures.append(_asked(asked, answers.picture_of(
        inspector, finding, answers.shown(asked.name), image, whole, limits, nearest)))
  _write(path, title, inspector.model, questioned, pictures)


def page_of_rows(
    path: str | os.PathLike, title: str, bank: Model, other: Model,
    doubts: Sequence[Doubt], questioned: Sequence[Questioned]) -> None:
  """Writes a page that shows training images of another bank that are asked about, by its pictures of them.

  Args:
    path, title: the page.
    bank: the model as it is.
    other: the other.
    doubts: images of it.
    questioned: what is asked about: these images, or the other bank as a whole.

  Raises:
    OSError: the page cannot be written.
  """
  pictures = []
  for asked, row, nearest in doubts[:_MOST]:
    origin, normal = provenance.origin(other, row), provenance.origin(bank, nearest)
    image, theirs = provenance.thumbnail(other, origin.image), provenance.thumbnails(bank)
    if image is None:
      break
    patch = None if not theirs else page.Patch(
        answers.shown(normal.name), theirs[normal.image],
        page.grid_cell(normal.row, normal.column, bank.description.grid))
    pictures.append(_asked(asked, page.picture(
        answers.shown(asked.name), asked.score or 0.0, image, nearest=patch,
        patch=page.grid_cell(origin.row, origin.column, other.description.grid))))
  asked = [doubt.question for doubt in doubts]
  _write(path, title, bank, asked, pictures, tuple(q.line for q in questioned if q not in asked))


def _asked(asked: Questioned, picture: page.Picture) -> page.Picture:
  """Adds to a picture why it is asked about."""
  return picture._replace(facts=(('asked about', answers.shown(asked.why)), *picture.facts))


def _write(path, title, model: Model, questioned, pictures, notes=()) -> None:
  """Writes the page."""
  found = model.description.calibration
  thresholds = (page.Threshold('threshold', found.image_threshold),) if found else ()
  notes = [
      *map(answers.shown, notes),
      'Nothing was changed. Accept what is good by its name, and take out what is not. A click on an image '
      'shows it larger, beside the most similar normal patch.']
  if len(pictures) < len(questioned):
    notes.append(f'{len(pictures)} of {len(questioned)} are shown.')
  category = page.Category(
      model.description.category or 'images', [picture.score for picture in pictures], None, thresholds,
      tuple(pictures))
  columns = tuple(page.Column(*c) for c in (('image',), ('score', 'number'), ('why',), ('nearest',)))
  names = acceptance.short_names([asked.name for asked in questioned])
  pictures = [picture._replace(name=answers.shown(name))
              for picture, name in zip(pictures, names, strict=False)]
  rows = [(answers.shown(name), asked.score, answers.shown(asked.why), answers.shown(asked.nearest or ''))
          for name, asked in zip(names, questioned, strict=True)]
  Path(path).parent.mkdir(parents=True, exist_ok=True)
  page.write(path, page.Page(
      title, (), columns, rows, categories=(category,), notes=tuple(notes), pictures_first=True))
