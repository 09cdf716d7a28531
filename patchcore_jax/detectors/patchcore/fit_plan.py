"""Plans what a fit keeps in memory, and what on disk, before the long work begins."""

import dataclasses
import itertools
import math
import os

from patchcore_jax.search import merge_reduce

# What the selection keeps for each patch: its distance, age and place in the order, and passes over them.
_STATE_BYTES = 40
# Rows whose memory is set aside for a projection, and for what a selection takes beside its arrays: with so
# many, peaks that were measured stayed below the plan. A projection alone takes less.
_SPARE_ROWS = 65536
# Programs that select and score parts of the images, and batches of embeddings under way: 0.3 GB were seen.
_PROGRAM_BYTES = 400_000_000
_DEVICE_SHARE = 0.85  # of a device's memory; the rest is for programs, and for what falls between arrays


@dataclasses.dataclass(frozen=True)
class FitPlan:
  """The plan of where the arrays of a fit lie. It has no influence on the result.

  Attributes:
    num_patches, num_selected: numbers of patches, of all images and of the bank.
    embeddings_on_disk: whether the embeddings lie on disk; else in memory.
    points_on_disk: whether the projected points do; else they lie in memory, or on the devices.
    stream: whether the points stay on the host, and travel to one device when they are compared.
    memory_bytes: the most that the process will take on the host, about.
    disk_bytes: what lies in the scratch folder, until the bank is made.
    embeddings_on_device: whether the embeddings stay where the network made them; else they go to the host.
    device_bytes: what each device takes, about, where devices have a memory of their own.
    folds_at_once: of how many folds banks are selected at the same time.
  """

  num_patches: int
  num_selected: int
  embeddings_on_disk: bool
  points_on_disk: bool
  stream: bool
  memory_bytes: int
  disk_bytes: int
  embeddings_on_device: bool = False
  device_bytes: int = 0
  folds_at_once: int = 1

  @property
  def points_on_host(self) -> bool:
    """Whether the projected points lie in an array of the host: streamed, or used by a CPU where they are."""
    return self.stream or not self.device_bytes

  def __str__(self) -> str:
    """Writes the plan as one line for the user.

    >>> print(FitPlan(5_488_000, 54_880, True, False, True, 4_700_000_000, 22_478_848_000))
    54880 of 5488000 patches; about 4.7 GB of memory, 22.5 GB of disk for a time
    """
    disk = f'{self.disk_bytes / 1e9:.1f} GB' if self.disk_bytes else 'none'
    device = f', {self.device_bytes / 1e9:.1f} GB on each device' if self.device_bytes else ''
    return (f'{self.num_selected} of {self.num_patches} patches; about '
            f'{self.memory_bytes / 1e9:.1f} GB of memory, {disk} of disk for a time{device}')


def plan(
    num_patches: int,
    num_selected: int,
    dim: int,
    projection_dim: int,
    *,
    memory_gb: float,
    base_bytes: int = 0,
    batch_bytes: int = 0,
    device_bytes: int | None = None,
    num_devices: int = 1,
    folds: int = 0,
    alone: bool = True,
) -> FitPlan:
  """Chooses the fastest of all ways to fit that keep within the memory.

  Args:
    num_patches, num_selected: numbers of patches, of all images and of the bank.
    dim, projection_dim: values of an embedding and of a projected point.
    memory_gb: the most that the process may take on the host, in 10^9 bytes.
    base_bytes: what it takes already.
    batch_bytes: what embedding a batch takes on all devices together.
    device_bytes: memory of each device; None where it is the host's.
    num_devices: devices over which points are split unless they are streamed. Embeddings stay on a device
      only where there is one.
    folds: banks that are selected from parts of the points too, while the whole is kept. One uses a
      CPU's cores partly one after another, so there several are selected at once, as far as memory allows.
    alone: whether no other processes fit with this one; then points may stay on the host.

  Raises:
    ValueError: no way keeps within the memory; the message says how much is needed, and for what.

  >>> print(plan(1000, 10, 1024, 128, memory_gb=1))
  10 of 1000 patches; about 0.0 GB of memory, none of disk for a time
  """
  embeddings, points = 4 * num_patches * dim, 4 * num_patches * projection_dim
  bank, state = 4 * num_selected * dim, _STATE_BYTES * num_patches
  block = 3 * 4 * _SPARE_ROWS * (dim + projection_dim)  # read, on the device, and its result
  centers = 4 * num_selected * projection_dim
  on_host = device_bytes is None
  host_batch_bytes = batch_bytes if on_host else 0
  tried = []
  for on_device, on_disk, points_on_disk, stream in itertools.product((False, True), repeat=4):
    if points_on_disk and not (stream and on_disk) or stream and not alone:
      continue
    if on_device and (on_host or num_devices > 1 or on_disk or stream):
      continue
    copies = 1 if on_host and num_devices == 1 else 2  # while they are put in place
    device = (0 if stream else copies * points) + state
    host_points = points if stream and not points_on_disk else 0
    if on_host:
      host_points += device + 2 * centers
      device = 0
    else:  # a third time: turned, for the distances to the start
      device = (device + (0 if stream else points)) // num_devices + 4 * centers + block
      device = max(device, batch_bytes // num_devices) + on_device * embeddings
      if device > _DEVICE_SHARE * device_bytes:
        continue
    kept = 0 if on_disk or on_device else embeddings
    if folds:  # the whole bank, that of a fold and its copy for the search
      kept += bank + _PROGRAM_BYTES
      host_points += 0 if alone else 2 * points  # those of several processes are copied for each fold
      device += on_device * 2 * points
    fit = kept + max(
        host_batch_bytes, host_points + min(block, 3 * embeddings), 2 * bank if folds else bank)
    memory = base_bytes + max(fit, 2 * bank)  # Orbax copies what it saves
    disk = on_disk * embeddings + points_on_disk * points
    tried.append(FitPlan(
        num_patches, num_selected, on_disk, points_on_disk, stream, memory, disk, on_device, device))
  for way in sorted(tried, key=lambda p: (p.disk_bytes, p.stream, not p.embeddings_on_device)):
    if way.memory_bytes <= memory_gb * 1e9:
      if not folds or not on_host or not alone or num_devices > 1 or way.stream:
        return way
      another = 2 * bank + state + 2 * centers
      more = int(min(min(folds, os.cpu_count() or 1) - 1, (memory_gb * 1e9 - way.memory_bytes) / another))
      return dataclasses.replace(
          way, memory_bytes=way.memory_bytes + more * another, folds_at_once=1 + more)
  least = min((way.memory_bytes for way in tried), default=0)
  if host_batch_bytes > max(2 * bank, block):
    advice = 'lower data.batch_size'
  else:
    advice = 'lower coreset.ratios'
  raise ValueError(
      f'fit.memory_gb={memory_gb:g}: the fit takes at least {least / 1e9:.1f} GB: {base_bytes / 1e9:.1f} '
      f'that the process has already, and {host_batch_bytes / 1e9:.1f} for a batch of images, or '
      f'{2 * bank / 1e9:.1f} for the bank of {num_selected} patches, twice when it is saved. Raise it, or '
      f'{advice}.')


def images_in_block(num_images: int, patches: int, num_selected: int, parts: int) -> int:
  """Computes how many images make a block of a fit in one pass; it depends on no machine.

  A reduction of a large block costs less for each patch, and merges are fewer: from about 131,072 patches on,
  or eight times the bank where that is more. The blocks of a part are of like size.

  Args:
    num_images: images of the whole fit.
    patches: patches of an image.
    num_selected: patches of the bank.
    parts: parts of the images.

  >>> images_in_block(50_000, 784, 10_000, 10)
  167
  """
  images = -(-num_images // parts)
  blocks = -(-images * patches // max(131_072, 8 * num_selected))
  return -(-images // blocks)


def one_pass(
    num_images: int,
    patches: int,
    num_selected: int,
    dim: int,
    projection_dim: int,
    *,
    parts: int,
    memory_gb: float,
    folds: bool = False,
    base_bytes: int = 0,
    batch_bytes: int = 0,
    picture_bytes: int = 0,
) -> FitPlan:
  """Plans a fit in one pass: a block of images and some banks lie in memory, and nothing on disk.

  Args:
    num_images, patches, num_selected, parts: see `images_in_block`.
    picture_bytes: of the picture that is kept of each image; 0 if none is.
    dim, projection_dim, memory_gb, folds, base_bytes, batch_bytes: see `plan`.

  Raises:
    ValueError: the memory is not enough.

  >>> print(one_pass(50_000, 784, 10_000, 1024, 128, parts=10, memory_gb=4))
  10000 of 39200000 patches; about 2.3 GB of memory, none of disk for a time
  """
  per_block = images_in_block(num_images, patches, num_selected, parts)
  block, of_part = per_block * patches, -(-num_images // parts) * patches
  row, bank = 4 * (dim + projection_dim) + 8, 4 * num_selected * (dim + projection_dim)
  roots = min(num_selected, of_part) * parts * row
  levels = 1 + math.ceil(math.log(max(1, of_part / block), merge_reduce.MERGED))
  tree = min(((merge_reduce.MERGED - 1) * levels + 1) * bank, of_part * row)
  reduced = block * (row + 3 * 4 * projection_dim + _STATE_BYTES)
  last = parts * min(num_selected, of_part) * (4 * 4 * projection_dim + _STATE_BYTES)
  pictures = picture_bytes * num_images
  memory = base_bytes + pictures + roots + _PROGRAM_BYTES + max(
      batch_bytes + block * row + tree, reduced + tree, last + bank, (4 if folds else 2) * bank)
  if memory > memory_gb * 1e9:
    raise ValueError(
        f'fit.memory_gb={memory_gb:g}: the fit in one pass takes about {memory / 1e9:.1f} GB: '
        f'{base_bytes / 1e9:.1f} that the process has already, {pictures / 1e9:.1f} for pictures of the '
        f'images, and the rest for a block of {per_block} images and some banks of {num_selected} patches. '
        'Raise it, lower coreset.ratios, or do without pictures (fit.keep_images).')
  return FitPlan(num_images * patches, num_selected, False, False, False, memory, 0)
