"""Tokens of Vision Transformers, as the methods on them take them: patches on one grid, and a class token."""

from collections.abc import Sequence

import jax


def on_one_grid(maps: Sequence[jax.Array], title: str) -> list[jax.Array]:
  """Makes sure that the layers of a network have one grid of patches.

  Args:
    maps: [b, rows, columns, c_l] each.
    title: the method that asks, for the message.

  Raises:
    ValueError: grids that differ, or no map.
  """
  grids = {m.shape[1:3] for m in maps}
  if len(grids) != 1:
    found = ', '.join(f'{rows} x {columns}' for rows, columns in sorted(grids)) or 'none'
    raise ValueError(
        f'{title} compares patches of one grid: expected layers with as many cells, got {found}. Set the '
        'layers, for a Vision Transformer some of its blocks.')
  return list(maps)


def with_class_token(maps: Sequence[jax.Array], title: str) -> tuple[list[jax.Array], jax.Array]:
  """Parts the maps of a network into those of patches and, of the last layer, the class token.

  Args:
    maps: [b, rows, columns, c_l] each; the last has one cell, such as the layer 'blocks.11.cls'.
    title: the method that asks, for the message.

  Returns:
    The maps of patches, and the class token [b, c].

  Raises:
    ValueError: a last layer of more cells, layers of patches whose grids differ, or none.
  """
  *patches, token = maps
  if token.shape[1:3] != (1, 1):
    raise ValueError(
        f'{title} takes a class token from the last of the layers: expected one cell, got '
        f'{token.shape[1]} x {token.shape[2]}. Take a Vision Transformer and end its layers with a class '
        'token, such as blocks.11.cls.')
  return on_one_grid(patches, title), token[:, 0, 0]
