"""Downloads a data set, or takes an archive or a folder at hand, and writes it as TensorFlow Datasets.

    python -m experiments.prepare --dataset=mvtec_ad --data_dir=DIR
    python -m experiments.prepare --dataset=mvtec_ad --data_dir=DIR --archive=mvtec_anomaly_detection.tar.xz
    python -m experiments.prepare --dataset=mvtec_ad --data_dir=DIR --folder=EXTRACTED --categories=screw,wood

Then `--config.data.source=tfds --config.data.root=DIR` reads it. A download that was stopped goes on when
the same command is given again; categories that are prepared already are left alone. The archive stays in
DIR/downloads. A run that is killed leaves at most a folder DIR/.extracting-*, which may be deleted.
"""

import hashlib
import http.client
import lzma
import os
import shutil
import tarfile
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

from absl import flags

from experiments import cli
from patchcore_jax.cli import terminal
from patchcore_jax.data import mvtec_ad
from patchcore_jax.data.folder import MVTEC
from patchcore_jax.evaluation.settings import names_in

cli.key_flags()

_DATASET = flags.DEFINE_enum('dataset', None, ['mvtec_ad'], 'Which data set.')
_DATA_DIR = flags.DEFINE_string('data_dir', None, 'Folder of TensorFlow Datasets to write to.')
_ARCHIVE = flags.DEFINE_string('archive', None, 'An archive at hand, of all categories or of some.')
_FOLDER = flags.DEFINE_string('folder', None, 'An extracted archive at hand.')
_CATEGORIES = flags.DEFINE_list('categories', [], 'Which categories; by default all.')
_URL = flags.DEFINE_string('url', mvtec_ad.ARCHIVE_URL, 'Where to download from, if the address has moved.')

_BLOCK = 2**20


def main(_) -> None:
  run(_DATA_DIR.value, archive=_ARCHIVE.value, folder=_FOLDER.value, url=_URL.value,
      categories=names_in(_CATEGORIES.value))


def run(
    data_dir: str | os.PathLike, *, archive: str | os.PathLike | None = None,
    folder: str | os.PathLike | None = None, categories: Sequence[str] = (),
    url: str = mvtec_ad.ARCHIVE_URL, sha256: str = mvtec_ad.ARCHIVE_SHA256,
) -> None:
  """Prepares MVTec AD as a data set of TensorFlow Datasets.

  Args:
    data_dir: the folder of TensorFlow Datasets to write to.
    archive: an archive (.tar, with any compression) of all categories or of some, not downloaded
      and not checked.
    folder: the same, extracted.
    categories: which; () for all, or for those that `archive` or `folder` holds.
    url: where to download from without either.
    sha256: checksum of what is downloaded, in hexadecimal.

  Raises:
    ValueError: bad arguments, a checksum that does not match, or an archive or folder of another form.
    OSError: no connection, or one that broke; no space left.
  """
  if archive and folder:
    raise ValueError('Both --archive and --folder are given: expected one of them.')
  mvtec_ad.check_categories(categories)
  data_dir = Path(data_dir)
  terminal.console.print(mvtec_ad.LICENCE, markup=False)
  wanted = categories or mvtec_ad.CATEGORIES
  if not (archive or folder):
    wanted = [name for name in wanted if not mvtec_ad.is_prepared(data_dir, name)]
    if not wanted:
      terminal.console.print(f'Prepared before, in {data_dir}.')
      return
  with terminal.progress_bar('mvtec_ad') as progress, tempfile.TemporaryDirectory(
      prefix='.extracting-', dir=_made(data_dir), ignore_cleanup_errors=True) as temporary:
    if not folder:
      if not archive:
        archive = data_dir / 'downloads' / 'mvtec_anomaly_detection.tar.xz'
        download(url, archive, sha256, progress)
      folder = extract(archive, temporary, wanted, progress)
    found = MVTEC.list_categories(folder)
    if categories and (missing := [name for name in wanted if name not in found]):
      raise ValueError(f'{archive or folder} does not hold {", ".join(missing)}.')
    wanted = [name for name in wanted if name in found]
    if not wanted:
      raise ValueError(f'No category of MVTec AD in {folder}: found {", ".join(found)}.')
    mvtec_ad.prepare(
        data_dir, folder, wanted, progress=lambda done, total: progress('prepare', done, total))
  terminal.console.print(
      f'{len(wanted)} categories in {data_dir}: --config.data.source=tfds --config.data.root={data_dir}')


def download(url: str, path: Path, sha256: str, progress: Callable[[str, int, int], None]) -> None:
  """Downloads a file; `path` appears when its checksum is right.

  A download that was stopped goes on from its `.part`.

  Args:
    url: where from.
    path: where to; left alone if it exists.
    sha256: checksum in hexadecimal.
    progress: called as `progress(stage, done, total)`, in MiB.

  Raises:
    ValueError: another checksum; nothing is kept.
    OSError: no connection, or one that broke: what came is kept; or no space left.
  """
  path = Path(path)
  if path.exists():
    return
  part = _made(path.parent) / (path.name + '.part')
  have = part.stat().st_size if part.exists() else 0
  request = urllib.request.Request(url, headers={'Range': f'bytes={have}-'} if have else {})
  again = 'Give the same command again to go on.'
  try:
    with urllib.request.urlopen(request, timeout=60) as response:
      if response.status != http.client.PARTIAL_CONTENT:
        have = 0  # the server sends all of it
      total = have + int(response.headers.get('Content-Length') or 0)
      if (free := shutil.disk_usage(part.parent).free) < total - have:
        raise OSError(
            f'{url} has {total / 2**20:.0f} MiB, and {free / 2**20:.0f} MiB of the disk are free.')
      update = _in_mib(progress, 'download', total)
      with part.open('ab' if have else 'wb') as file:
        while block := response.read(_BLOCK):
          file.write(block)
          have += len(block)
          update(have)
    if have < total:
      raise OSError(f'The download stopped after {have} of {total} bytes. {again}')
  except urllib.error.HTTPError as e:
    if e.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE:  # else the part has all there is
      raise OSError(
          f'{url} answers {e.code} {e.reason}. Pass another --url, or get the archive from '
          f'{mvtec_ad.HOMEPAGE} and pass it as --archive.') from e
  except urllib.error.URLError as e:
    raise OSError(
        f'No connection to {url}: {e.reason}. {again} Or get the archive elsewhere and pass it as '
        '--archive.') from e
  except (http.client.HTTPException, ConnectionError, TimeoutError) as e:
    raise OSError(f'The download stopped after {have} bytes: {e or type(e).__name__}. {again}') from e
  if (got := _sha256(part, progress)) != sha256:
    part.unlink()
    raise ValueError(
        f'{url} is not the file it should be: expected SHA-256 {sha256}, got {got}. It was deleted. Try '
        f'again; if it stays so, get the archive from {mvtec_ad.HOMEPAGE} and pass it as --archive.')
  part.rename(path)


def extract(
    archive: str | os.PathLike, to: str | os.PathLike, categories: Sequence[str],
    progress: Callable[[str, int, int], None],
) -> Path:
  """Extracts some categories of an archive, at its top or one folder below.

  Args:
    archive: any that `tarfile` reads.
    to: an empty folder.
    categories: which; those that the archive does not hold are passed over.
    progress: called as `progress(stage, done, total)`, in MiB of the archive.

  Returns:
    The folder that holds the categories.

  Raises:
    ValueError: no archive, a damaged one, one with paths that lead out of it, or without any of them.
  """
  try:
    update = _in_mib(progress, 'extract', os.path.getsize(archive))
    found = set()
    with open(archive, 'rb') as file, tarfile.open(fileobj=file) as tar:
      for member in tar:
        parts = PurePosixPath(member.name).parts
        inside = next((i for i, part in enumerate(parts[:2]) if part in categories), None)
        if inside is not None:
          tar.extract(member, to, filter='data')
          found.add(parts[:inside])
        update(file.tell())
  except FileNotFoundError as e:
    raise ValueError(f'No archive {archive}.') from e
  except (tarfile.TarError, lzma.LZMAError, EOFError) as e:
    raise ValueError(f'Cannot extract {archive}: {e}. Get it again.') from e
  if len(found) != 1:
    raise ValueError(
        f'{archive} has none of the categories {", ".join(categories)} at its top or one folder below.')
  return Path(to).joinpath(*found.pop())


def _sha256(path, progress) -> str:
  """Computes the SHA-256 of a file, in hexadecimal."""
  digest, done, update = hashlib.sha256(), 0, _in_mib(progress, 'check', path.stat().st_size)
  with path.open('rb') as file:
    while block := file.read(_BLOCK):
      digest.update(block)
      done += len(block)
      update(done)
  return digest.hexdigest()


def _in_mib(progress, stage, size):
  """Makes `update(done bytes)`, which tells `progress` of each MiB; a size of 0 stands for an unknown one."""
  told, total = 0, -(-size // _BLOCK)

  def update(done):
    nonlocal told
    mib = -(-done // _BLOCK)
    if mib > told:
      told = mib
      progress(f'{stage} (MiB)', mib, max(mib, total) if size else mib + 1)

  return update


def _made(folder: Path) -> Path:
  """Makes a folder where there is none, and returns it."""
  folder.mkdir(parents=True, exist_ok=True)
  return folder


if __name__ == '__main__':
  flags.mark_flags_as_required(['dataset', 'data_dir'])
  cli.run(main)
