"""The memory bank: embeddings of good patches, kept in the order of their selection.

This is the only file that knows Orbax. A saved bank is a folder with the arrays and a description of
how they were made; so is a saved model of another detector (`save_arrays`).
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from patchcore_jax.search import coreset

# Of the folder that is written. 1, until November 2026, had no digest.
FORMAT = 2
_PIECE = 2**25  # bytes that are encoded and written at once


class BankError(ValueError):
  """A bank that cannot be restored, or was made in another way; the message names the difference."""


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class MemoryBank:
  """Embeddings of m good patches; a pytree whose leaves are the arrays.

  Attributes:
    embeddings: [m, d] float32, in order of selection, so every prefix is the bank of a smaller ratio.
    indices: [m] int32, where each patch comes from: (image * rows + row) * columns + column over the
      training images in their order.
    description: JSON-able; how the bank was made. `num_patches` is the number of patches it was
      selected from.
    extras: further arrays by name, which are kept with the bank; `provenance` says which there are.
  """

  embeddings: Any
  indices: Any
  description: dict[str, Any]
  extras: dict[str, Any] = dataclasses.field(default_factory=dict)

  def sizes(self, ratios: tuple[float, ...]) -> tuple[int, ...]:
    """Patches that the bank of each ratio holds.

    Raises:
      ValueError: a ratio larger than the bank was selected with.
    """
    sizes = tuple(coreset.coreset_size(self.description['num_patches'], r) for r in ratios)
    if max(sizes) > len(self.embeddings):
      raise ValueError(
          f'The bank holds {len(self.embeddings)} patches, ratio {max(ratios)} needs {max(sizes)}. '
          'Fit it with a larger ratio.')
    return sizes

  def tree_flatten(self):
    return (self.embeddings, self.indices, self.extras), json.dumps(self.description, sort_keys=True)

  @classmethod
  def tree_unflatten(cls, description, arrays):
    embeddings, indices, extras = arrays
    return cls(embeddings, indices, json.loads(description), extras)


def save(path: str | os.PathLike, bank: MemoryBank) -> None:
  """Writes a bank as a new folder at `path`, which appears only when it is complete.

  Raises:
    ValueError: `path` exists.
    OSError: it cannot be written.
  """
  arrays = {'embeddings': bank.embeddings, 'indices': bank.indices}
  save_arrays(path, arrays | bank.extras, bank.description)


def save_arrays(
    path: str | os.PathLike, arrays: Mapping[str, Any], description: Mapping[str, Any]) -> None:
  """`save` of named arrays and a JSON-able description of how they were made."""
  path = Path(path).absolute()
  if path.exists():
    raise ValueError(f'{path} exists: a bank is not overwritten. Remove it or choose another path.')
  path.parent.mkdir(parents=True, exist_ok=True)
  _remove_unfinished(path)  # what a killed run left
  arrays = {k: np.asarray(v) for k, v in arrays.items()}
  shapes = {k: [list(v.shape), str(v.dtype)] for k, v in arrays.items()}
  # Asked beforehand, because a write that fails half-way leaves Orbax's threads in disorder.
  needed, free = sum(v.nbytes for v in arrays.values()), shutil.disk_usage(path.parent).free
  if free < needed + 2**20:
    raise OSError(
        f'Cannot write the memory bank {path}: it takes {needed / 2**20:.1f} MiB, and '
        f'{free / 2**20:.1f} MiB of the disk are free. Make room, or choose another folder.')
  try:
    # In pieces and as they are: Orbax then takes one copy of the arrays instead of two. Features compress
    # by a few percent only.
    pieces = {k: ocp.SaveArgs(chunk_byte_size=_PIECE) for k in arrays}
    handlers = {
        'arrays': ocp.PyTreeCheckpointHandler(use_compression=False),
        'description': ocp.JsonCheckpointHandler()}
    with _quiet(), _checkpointer(**handlers) as checkpointer:
      checkpointer.save(path, args=ocp.args.Composite(
          arrays=ocp.args.PyTreeSave(arrays, save_args=pieces),
          description=ocp.args.JsonSave({
              'format': FORMAT, 'digest': _digest(arrays, description), 'arrays': shapes,
              'description': description})))
  except Exception as e:  # TensorStore reports a failed write as a ValueError, among other things
    _remove_unfinished(path)
    raise OSError(
        f'Cannot write the memory bank {path}: {str(e).splitlines()[0]}. Make room, or choose another '
        'folder.') from e


def replace(path: str | os.PathLike, bank: MemoryBank) -> None:
  """`save` in the place of the bank at `path`, which is there whole, old or new, at every moment.

  If the process is killed between two renames, the old one is at `path` + '.before', where `restore` finds
  it.

  Raises:
    OSError: it cannot be written; the old bank is untouched.
  """
  path = Path(path).absolute()
  after, before = path.with_name(path.name + '.after'), _before(path)
  shutil.rmtree(after, ignore_errors=True)  # what a killed run left
  save(after, bank)
  _recover(path)
  path.rename(before)
  after.rename(path)
  shutil.rmtree(before)


def _before(path: Path) -> Path:
  return path.with_name(path.name + '.before')


def _recover(path: Path) -> None:
  """After a `replace` that was killed: puts the old bank back, or removes it where the new one is there."""
  before = _before(path)
  if before.is_dir():
    if path.exists():
      shutil.rmtree(before)
    else:
      before.rename(path)


def _remove_unfinished(path: Path) -> None:
  """Orbax writes to a temporary name beside `path` and renames at the end."""
  for _ in range(10):
    leftovers = list(path.parent.glob(path.name + '.orbax-checkpoint-tmp*'))
    for leftover in leftovers:
      shutil.rmtree(leftover, ignore_errors=True)
    if not leftovers:
      return
    time.sleep(0.1)  # after a failure, a thread of Orbax's may still be writing


@contextlib.contextmanager
def _quiet():
  """Orbax logs the traces of errors that are raised, and so told, anyway."""
  before = logging.get_verbosity()
  logging.set_verbosity(logging.FATAL)
  try:
    yield
  finally:
    logging.set_verbosity(before)


def restore(
    path: str | os.PathLike, *, expected: Mapping[str, Any] | None = None
) -> MemoryBank:
  """Reads a bank, as NumPy arrays.

  Args:
    path: what `save` wrote.
    expected: entries that the description must have, for example the backbone that is about to be
      used.

  Raises:
    BankError: no complete bank at `path`, one that was changed or is of a newer format, or one whose
      description differs from `expected`; the message names every difference.
  """
  arrays, description = restore_arrays(path, expected=expected)
  try:
    return MemoryBank(arrays.pop('embeddings'), arrays.pop('indices'), description, arrays)
  except KeyError as e:
    raise BankError(
        f'{path} holds {", ".join(sorted(arrays))}: the model of another detector, not a memory bank.'
    ) from e


def restore_arrays(
    path: str | os.PathLike, *, expected: Mapping[str, Any] | None = None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """`restore` of what `save_arrays` wrote: the arrays and their description."""
  path = Path(path).absolute()
  if not path.exists():
    _recover(path)
  if not path.is_dir():
    raise BankError(f'No memory bank at {path}.')
  try:
    with _quiet(), _checkpointer() as checkpointer:
      meta = checkpointer.restore(
          path, args=ocp.args.Composite(description=ocp.args.JsonRestore()))['description']
      _check_format(path, meta.get('format', 1))
      shapes, description = meta['arrays'], meta['description']
      check(description, expected or {}, path)
      target = {k: np.empty(shape, dtype) for k, (shape, dtype) in shapes.items()}
      arrays = checkpointer.restore(
          path, args=ocp.args.Composite(arrays=ocp.args.StandardRestore(target)))['arrays']
  except BankError:
    raise
  except Exception as e:  # Orbax and TensorStore have many types for a damaged checkpoint
    raise BankError(
        f'{path} is not a complete memory bank ({type(e).__name__}: {str(e).splitlines()[0]}). '
        'Remove it and fit again.') from e
  arrays = {k: np.asarray(v) for k, v in arrays.items()}
  if 'digest' in meta and meta['digest'] != _digest(arrays, description):
    raise BankError(
        f'{path} is not what was saved: its digest is {_digest(arrays, description)[:16]}..., expected '
        f'{meta["digest"][:16]}.... A file in it was damaged or changed; copy the bank again, or fit it '
        'again.')
  return arrays, description


def _check_format(path, number):
  if number > FORMAT:
    raise BankError(
        f'{path} has format {number}, and this version of patchcore_jax reads up to {FORMAT}: the bank '
        'was made by a newer one. Upgrade patchcore_jax, or fit the bank again.')


def _digest(arrays, description):
  """SHA-256 of everything that is saved."""
  digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
  for name in sorted(arrays):
    array = np.ascontiguousarray(arrays[name])
    digest.update(f'{name}{array.shape}{array.dtype}'.encode())
    digest.update(array.reshape(-1).view(np.uint8).data)
  return digest.hexdigest()


def check(description: Mapping[str, Any], expected: Mapping[str, Any], name: Any = '') -> None:
  """Compares a bank's description with what it is about to be used with.

  Args:
    description: of the bank.
    expected: entries that it must have, nested as in the description.
    name: of the bank, for the message.

  Raises:
    BankError: some differ; the message names each.

  >>> check({'image_size': [8, 8]}, {'image_size': (8, 9)})  # doctest: +ELLIPSIS
  Traceback (most recent call last):
    ...
  patchcore_jax.banks.store.BankError: ... image_size: the bank has [8, 8], asked for is [8, 9]. ...
  """
  # Through JSON, so that tuples and lists compare equal.
  have, expected = flat(description), flat(json.loads(json.dumps(expected)))
  differences = [
      f'{field}: the bank has {have.get(field)!r}, asked for is {value!r}'
      for field, value in expected.items() if have.get(field) != value]
  if differences:
    raise BankError(
        f'The memory bank{f" {name}" if name else ""} was made in another way. '
        f'{"; ".join(differences)}. Use the same settings, or fit a new bank.')


def flat(tree: Mapping[str, Any]) -> dict[str, Any]:
  """A nested dict as one level, keys joined by dots; for comparing two of them.

  >>> flat({'a': {'b': [1, 2]}, 'c': None})
  {'a.b': [1, 2], 'c': None}
  """
  leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: not isinstance(x, dict))
  return {jax.tree_util.keystr(path, simple=True, separator='.'): leaf for path, leaf in leaves}


def _checkpointer(**handlers):
  # Whoever calls reads or writes alone: of several processes, Orbax would have each wait for the others.
  alone = ocp.options.MultiprocessingOptions(
      primary_host=jax.process_index(), active_processes={jax.process_index()})
  return ocp.Checkpointer(
      ocp.CompositeCheckpointHandler(
          **handlers, composite_options=ocp.CompositeOptions(multiprocessing_options=alone)),
      multiprocessing_options=alone)
