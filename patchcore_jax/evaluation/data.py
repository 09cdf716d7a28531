"""Labelled data on disk -> the images of its categories. It imports no JAX."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from patchcore_jax.builtin import synthetic
from patchcore_jax.data import folder, image_files, layouts
from patchcore_jax.settings import DataSpec

SOURCES = ('synthetic', 'tfds', *layouts.LAYOUTS)


def load_categories(
    data: DataSpec, progress: Callable[[int, int], None] | None = None) -> list[folder.Category]:
  """Lists the images of the chosen categories; draws the built-in data set if it is chosen.

  Args:
    data: its source, root and categories count.
    progress: called with (done, total) while the built-in data is drawn.

  Raises:
    ValueError: an unknown source, no root, or a folder that is not what the source says.
  """
  layout, names = _layout(data), data.categories
  if data.source == 'synthetic':
    for name in names:
      if name not in synthetic.CATEGORIES:
        raise ValueError(
            f'No category {name!r} in the built-in data set. There are: {", ".join(synthetic.CATEGORIES)}.')
    names = names or synthetic.CATEGORIES
    synthetic.prepare(data.root, categories=names, num_workers=os.cpu_count() or 1, progress=progress)
  return [layout.load_category(data.root, name) for name in names or layout.list_categories(data.root)]


def as_trained(data: DataSpec, categories: Sequence[folder.Category]) -> list[folder.Category]:
  """Gives every category the training images of all, where they have one model."""
  if not data.multi_class:
    return list(categories)
  train = [example for category in categories for example in category.train]
  return [category._replace(train=train) for category in categories]


def passed_by(data: DataSpec) -> str:
  """Names the folders beside the categories that hold images and are none; '' if there are none.

  Args:
    data: as of `load_categories`; where it names categories, nothing is passed by unasked.
  """
  layout, root = _layout(data), Path(data.root)
  if data.categories or not isinstance(layout, folder.FolderLayout):
    return ''
  names = [f'{p.name} ({_count(n, "image")})' for p in image_files.folders_in(root)
           if not layout.is_category(p) and (n := len(image_files.listed(p).images))]
  return image_files.shown(
      f'no category, for lack of a folder train with good parts: {", ".join(names)}') if names else ''


def _count(n: int, word: str) -> str:
  """Counts things."""
  return f'{n} {word}' if n == 1 else f'{n} {word}s'


def located(data: DataSpec) -> DataSpec:
  """Finds the data set where `root` is the folder of one category, such as 'mvtec/screw'.

  Returns:
    The same, or with the folder above as the root and that one category.

  Raises:
    ValueError: as `load_categories`, as far as folders say it.
  """
  layout, root = _layout(data), Path(data.root)
  if data.source == 'synthetic':
    return data
  if not data.categories and isinstance(layout, folder.FolderLayout) and layout.is_category(root):
    root = Path(os.path.abspath(root))
    return dataclasses.replace(data, root=str(root.parent), categories=(root.name,))
  if data.categories and isinstance(layout, folder.FolderLayout):
    known = [name for name in data.categories if layout.is_category(root / name)]
  else:
    known = layout.list_categories(root)
  for name in data.categories:
    if name not in known:
      layout.load_category(root, name)  # says what is missing
  return data


def _layout(data: DataSpec) -> Any:
  """Finds what lists the categories and images of the source."""
  if data.source not in SOURCES:
    raise ValueError(f'data.source={data.source!r}: expected one of {", ".join(SOURCES)}.')
  if not data.root:
    raise ValueError('data.root is not set: expected the folder where the data set lies.')
  if data.source == 'tfds':
    from patchcore_jax.data import mvtec_ad as layout  # half a second that other sources need not wait
  else:
    layout = layouts.LAYOUTS['folder' if data.source == 'synthetic' else data.source]
  if data.good and not isinstance(layout, folder.FolderLayout):
    raise ValueError(
        f'data.good={",".join(data.good)}: the source {data.source!r} says by other means what is good. '
        'Leave it out.')
  return dataclasses.replace(layout, good=data.good) if data.good else layout
