"""Keeps models on disk: a folder with the arrays and the description of how they were made.

This is the only file that knows Orbax.
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from patchcore_jax.banks.model import BankError, Description, Model

# The format that is written. 1 and 2, until November 2026, had descriptions without types, and 1 no digest.
FORMAT = 3
_PIECE = 2**25  # bytes that are encoded and written at once


def save(path: str | os.PathLike, model: Model) -> None:
  """Writes a model as a new folder at `path`, which appears only when it is complete.

  Raises:
    ValueError: `path` exists.
    OSError: it cannot be written.
  """
  save_arrays(path, model.arrays, model.description.to_json())


def save_arrays(path: str | os.PathLike, arrays: Mapping[str, Any], description: Mapping[str, Any]) -> None:
  """Writes named arrays, such as the state of a training, and their description, as `save` does.

  The description tells, as JSON has it, how they came about.
  """
  path = Path(path).absolute()
  if path.exists():
    raise ValueError(f'{path} exists: a model is not overwritten. Remove it or choose another path.')
  path.parent.mkdir(parents=True, exist_ok=True)
  _remove_unfinished(path)  # what a killed run left
  arrays = {k: np.asarray(v) for k, v in arrays.items()}
  shapes = {k: [list(v.shape), str(v.dtype)] for k, v in arrays.items()}
  # This is asked beforehand, because a write that fails half-way leaves Orbax's threads in disorder.
  needed, free = sum(v.nbytes for v in arrays.values()), shutil.disk_usage(path.parent).free
  if free < needed + 2**20:
    raise OSError(
        f'Cannot write the model {path}: it takes {needed / 2**20:.1f} MiB, and '
        f'{free / 2**20:.1f} MiB of the disk are free. Make room, or choose another folder.')
  try:
    # Written in pieces and uncompressed, Orbax takes one copy of the arrays instead of two. Features
    # compress by a few percent only.
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
        f'Cannot write the model {path}: {str(e).splitlines()[0]}. Look at the permissions and the disk, or '
        'choose another folder.') from e


def replace(path: str | os.PathLike, model: Model) -> None:
  """Saves a model in the place of the one at `path`, which is there whole, old or new, at every moment.

  If the process is killed between two renames, the old one is at `path` + '.before', where `restore` finds
  it.

  Raises:
    OSError: it cannot be written; the old model is untouched.
  """
  path = Path(path).absolute()
  after, before = path.with_name(path.name + '.after'), _before(path)
  shutil.rmtree(after, ignore_errors=True)  # what a killed run left
  save(after, model)
  _recover(path)
  path.rename(before)
  after.rename(path)
  shutil.rmtree(before)


def _before(path: Path) -> Path:
  """Names the folder to which `replace` moves the old model for a moment."""
  return path.with_name(path.name + '.before')


def _recover(path: Path) -> None:
  """Mends a `replace` that was killed: puts the old bank back, or removes it if the new one is there."""
  before = _before(path)
  if before.is_dir():
    if path.exists():
      shutil.rmtree(before)
    else:
      before.rename(path)


def _remove_unfinished(path: Path) -> None:
  """Removes what a write that did not end has left beside `path`.

  Orbax writes to a temporary name there, and renames at the end.
  """
  for _ in range(10):
    leftovers = list(path.parent.glob(path.name + '.orbax-checkpoint-tmp*'))
    for leftover in leftovers:
      shutil.rmtree(leftover, ignore_errors=True)
    if not leftovers:
      return
    time.sleep(0.1)  # after a failure, a thread of Orbax's may still be writing


@contextlib.contextmanager
def _quiet():
  """Silences the log of Orbax, which has the traces of errors that are raised, and so told, anyway."""
  before = logging.get_verbosity()
  logging.set_verbosity(logging.FATAL)
  try:
    yield
  finally:
    logging.set_verbosity(before)


def restore(path: str | os.PathLike, *, expected: Mapping[str, Any] | None = None) -> Model:
  """Reads a model, as NumPy arrays.

  Args:
    path: what `save` wrote, here or in an older version.
    expected: fields that the description must have, see `Description.check`.

  Raises:
    BankError: no complete model at `path`, one that was changed or is of a newer format, or one whose
      description differs from `expected`; the message names every difference.
  """

  def check(values):
    Description.from_json(values).check(expected or {}, path)

  arrays, values = restore_arrays(path, check)
  return Model(arrays, Description.from_json(values))


def restore_arrays(
    path: str | os.PathLike, check: Callable[[dict[str, Any]], None],
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """Reads what `save_arrays` wrote: the arrays and the description.

  Args:
    check: called with the description before the arrays are read; raises BankError for one that is not
      wanted.

  Raises:
    BankError: see `restore`.
  """
  path = Path(path).absolute()
  if not path.exists():
    _recover(path)
  if not path.is_dir():
    raise BankError(f'No model at {path}.')
  try:
    with _quiet(), _checkpointer() as checkpointer:
      meta = checkpointer.restore(
          path, args=ocp.args.Composite(description=ocp.args.JsonRestore()))['description']
      _check_format(path, meta.get('format', 1))
      shapes, values = meta['arrays'], meta['description']
      check(values)
      # One after the other: of several that are read at once, one that cannot be ends the event loop in which
      # the others still report, and each of those prints a trace.
      arrays = {k: _restored(checkpointer, path, k, np.empty(shape, dtype))
                for k, (shape, dtype) in shapes.items()}
  except BankError:
    raise
  except Exception as e:  # Orbax and TensorStore have many types for a damaged checkpoint
    if not any((path / name).exists() for name in ('description', 'arrays')):  # perhaps a folder of images
      raise BankError(
          f'{path} is a folder, and no model: expected one that `patchcore fit` or Inspector.save '
          'made.') from e
    why = str(e).partition('\n')[0].partition(' [tensorstore_spec=')[0]  # that is twenty lines of JSON
    raise BankError(
        f'{path} is not a complete model ({type(e).__name__}: {why}). A file in it was damaged or is gone; '
        'copy the model again, or fit it again.') from e
  if 'digest' in meta and meta['digest'] != _digest(arrays, values):
    raise BankError(
        f'{path} is not what was saved: its digest is {_digest(arrays, values)[:16]}..., expected '
        f'{meta["digest"][:16]}.... A file in it was damaged or changed; copy the model again, or fit it '
        'again.')
  return arrays, values


def _restored(checkpointer, path, name, target) -> np.ndarray:
  """Reads one array of a model, which has the shape and type of `target`."""
  found = checkpointer.restore(path, args=ocp.args.Composite(arrays=ocp.args.PyTreeRestore(
      {name: target}, restore_args={name: ocp.RestoreArgs(restore_type=np.ndarray)}, partial_restore=True)))
  return np.asarray(found['arrays'][name])


def _check_format(path, number):
  """Raises BankError for a format that is newer than this version."""
  if number > FORMAT:
    raise BankError(
        f'{path} has format {number}, and this version of patchcore_jax reads up to {FORMAT}: the model '
        'was made by a newer one. Upgrade patchcore_jax, or fit the bank again.')


def _digest(arrays, values):
  """Computes the SHA-256 of everything that is saved."""
  digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
  for name in sorted(arrays):
    array = np.ascontiguousarray(arrays[name])
    digest.update(f'{name}{array.shape}{array.dtype}'.encode())
    digest.update(array.reshape(-1).view(np.uint8).data)
  return digest.hexdigest()


def _checkpointer(**handlers):
  """Makes an Orbax checkpointer for this process alone."""
  # Whoever calls reads or writes alone: of several processes, Orbax would have each wait for the others.
  alone = ocp.options.MultiprocessingOptions(
      primary_host=jax.process_index(), active_processes={jax.process_index()})
  return ocp.Checkpointer(
      ocp.CompositeCheckpointHandler(
          **handlers, composite_options=ocp.CompositeOptions(multiprocessing_options=alone)),
      multiprocessing_options=alone)
