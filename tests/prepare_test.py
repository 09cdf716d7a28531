"""Follows an archive on a server (here: on loopback) to records, with what goes wrong on the way."""

import contextlib
import functools
import hashlib
import http.server
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading

import pytest

from experiments import prepare
from patchcore_jax.data import mvtec_ad
from tests import conftest


@pytest.fixture(scope='module')
def archive(pristine, tmp_path_factory):
  """The plates under names that MVTec AD has, as it is published: categories beside two texts."""
  root = tmp_path_factory.mktemp('archive')
  (root / 'license.txt').write_text('CC BY-NC-SA 4.0')
  # So that the archive takes more than one block to send.
  (root / 'readme.txt').write_bytes(os.urandom(3 * 2**20))
  path = root / 'mvtec_anomaly_detection.tar.xz'
  with tarfile.open(path, 'w:xz', preset=0) as tar:
    tar.add(pristine / 'bolt', 'bottle')
    tar.add(pristine / 'nut', 'screw')
    for name in ('license.txt', 'readme.txt'):
      tar.add(root / name, name)
  return path


@pytest.fixture(scope='module')
def digest(archive):
  return hashlib.sha256(archive.read_bytes()).hexdigest()


class _Handler(http.server.BaseHTTPRequestHandler):
  """Sends one file; after `server.breaks_after` bytes the connection breaks."""

  def do_GET(self):
    data, asked = self.server.data, self.headers.get('Range')
    self.server.asked.append(asked)
    if self.server.status != 200:
      return self.send_error(self.server.status)
    start = int(re.fullmatch(r'bytes=(\d+)-', asked)[1]) if asked and self.server.knows_ranges else 0
    if start >= len(data):
      return self.send_error(416)
    self.send_response(206 if start else 200)
    if self.server.tells_size:
      self.send_header('Content-Length', str(len(data) - start))
    if start:
      self.send_header('Content-Range', f'bytes {start}-{len(data) - 1}/{len(data)}')
    self.end_headers()
    sent = data[start:self.server.breaks_after]
    with contextlib.suppress(ConnectionError):
      self.wfile.write(sent)

  def log_message(self, *args):
    pass


@pytest.fixture
def server(archive):
  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), _Handler) as server:
    server.data, server.asked = archive.read_bytes(), []
    server.breaks_after, server.knows_ranges, server.tells_size, server.status = None, True, True, 200
    server.url = f'http://127.0.0.1:{server.server_port}/mvtec_anomaly_detection.tar.xz'
    thread = threading.Thread(target=functools.partial(server.serve_forever, poll_interval=0.01))
    thread.start()
    yield server
    server.shutdown()
    thread.join()


def _ignore(stage, done, total):
  pass


class TestRun:

  def test_from_a_server_to_records(self, server, digest, tmp_path, capsys):
    prepare.run(tmp_path, url=server.url, sha256=digest, categories=('bottle',))
    assert mvtec_ad.list_categories(tmp_path) == ['bottle']
    prepare.run(tmp_path, url=server.url, sha256=digest, categories=('bottle', 'screw'))
    assert mvtec_ad.list_categories(tmp_path) == ['bottle', 'screw']
    assert len(mvtec_ad.load_category(tmp_path, 'screw').test) == 8
    out = capsys.readouterr().out
    assert out.index('CC BY-NC-SA 4.0') < out.index('download (MiB) 4/4')
    assert f'--config.data.source=tfds --config.data.root={tmp_path}' in out.replace('\n', '')
    assert {p.name for p in tmp_path.iterdir()} == {'downloads', 'mvtec_ad'}  # nothing extracted is left
    # Again: nothing is asked for, and only what is not there is made from the archive that is.
    with pytest.raises(ValueError, match='none of the categories cable, capsule, carpet'):
      prepare.run(tmp_path, url=server.url, sha256=digest)
    prepare.run(tmp_path, url=server.url, sha256=digest, categories=('bottle', 'screw'))
    assert server.asked == [None] and 'Prepared before' in capsys.readouterr().out

  @pytest.mark.parametrize('wrapped', [False, True])
  def test_a_local_archive(self, wrapped, archive, pristine, tmp_path):
    if wrapped:
      archive = tmp_path / 'a.tar.gz'
      with tarfile.open(archive, 'w:gz') as tar:
        tar.add(pristine / 'bolt', 'mvtec/bottle')
        tar.add(pristine / 'nut', 'mvtec/screw')
    prepare.run(tmp_path / 'tfds', archive=archive, categories=('screw',))
    assert mvtec_ad.list_categories(tmp_path / 'tfds') == ['screw']

  def test_a_folder(self, pristine, tmp_path):
    shutil.copytree(pristine / 'bolt', tmp_path / 'extracted/wood')
    prepare.run(tmp_path / 'tfds', folder=tmp_path / 'extracted')
    assert mvtec_ad.list_categories(tmp_path / 'tfds') == ['wood']

  def test_bad_arguments(self, archive, pristine, tmp_path):
    with pytest.raises(ValueError, match='expected one of them'):
      prepare.run(tmp_path, archive=archive, folder=pristine)
    with pytest.raises(ValueError, match="No category 'bolt' in MVTec AD"):
      prepare.run(tmp_path, archive=archive, categories=('bolt',))
    with pytest.raises(ValueError, match='No category of MVTec AD in .*found bolt, nut'):
      prepare.run(tmp_path, folder=pristine)
    with pytest.raises(ValueError, match='mvtec_anomaly_detection.tar.xz does not hold wood.'):
      prepare.run(tmp_path, archive=archive, categories=('wood', 'screw'))

  def test_command_line(self, archive, tmp_path):
    command = [sys.executable, '-m', 'experiments.prepare', f'--data_dir={tmp_path}',
               '--dataset=mvtec_ad', f'--archive={archive}']
    kwargs = {'cwd': conftest.ROOT, 'capture_output': True, 'text': True}
    result = subprocess.run([*command, '--categories=bottle, screw'], **kwargs)
    assert result.returncode == 0, result.stderr
    assert mvtec_ad.list_categories(tmp_path) == ['bottle', 'screw']
    result = subprocess.run([*command, '--categories=bolt'], **kwargs)
    assert result.returncode == 1 and result.stderr.startswith("error: No category 'bolt'")


class TestDownload:

  def test_a_broken_one_goes_on(self, server, archive, digest, tmp_path):
    path = tmp_path / 'downloads/a.tar.xz'
    server.breaks_after = len(server.data) // 2
    with pytest.raises(OSError, match='stopped after .* Give the same command again to go on'):
      prepare.download(server.url, path, digest, _ignore)
    assert [p.name for p in path.parent.iterdir()] == ['a.tar.xz.part']
    have = (path.parent / 'a.tar.xz.part').stat().st_size
    assert have == server.breaks_after
    server.breaks_after = None
    stages = {}
    prepare.download(server.url, path, digest, lambda stage, *counts: stages.update({stage: counts}))
    assert server.asked == [None, f'bytes={have}-']
    assert path.read_bytes() == archive.read_bytes() and len(list(path.parent.iterdir())) == 1
    assert stages == {'download (MiB)': (4, 4), 'check (MiB)': (4, 4)}

  def test_a_killed_process_goes_on(self, server, archive, digest, tmp_path):
    # Killed as soon as a second block was written, by a signal that nothing can catch.
    code = ('import os, signal, sys; from pathlib import Path; from experiments import prepare\n'
            'def progress(stage, done, total):\n'
            '  if done == 2: os.kill(os.getpid(), signal.SIGKILL)\n'
            f'prepare.download({server.url!r}, Path({str(tmp_path / "a")!r}), {digest!r}, progress)')
    assert subprocess.run([sys.executable, '-c', code], cwd=conftest.ROOT).returncode < 0
    assert [p.name for p in tmp_path.iterdir()] == ['a.part']
    prepare.download(server.url, tmp_path / 'a', digest, _ignore)
    assert server.asked[1].startswith('bytes=') and server.asked[1] != 'bytes=0-'
    assert (tmp_path / 'a').read_bytes() == archive.read_bytes()

  def test_a_size_that_is_not_told(self, server, archive, digest, tmp_path):
    server.tells_size = False
    calls = []
    prepare.download(server.url, tmp_path / 'a', digest, lambda *x: calls.append(x))
    assert (tmp_path / 'a').read_bytes() == archive.read_bytes()
    assert calls[0] == ('download (MiB)', 1, 2)

  def test_a_server_that_knows_no_ranges_starts_afresh(self, server, archive, digest, tmp_path):
    (tmp_path / 'a.part').write_bytes(b'x' * 1000)
    server.knows_ranges = False
    prepare.download(server.url, tmp_path / 'a', digest, _ignore)
    assert (tmp_path / 'a').read_bytes() == archive.read_bytes()

  def test_a_part_that_has_all(self, server, archive, digest, tmp_path):
    shutil.copy(archive, tmp_path / 'a.part')
    prepare.download(server.url, tmp_path / 'a', digest, _ignore)
    assert server.asked == [f'bytes={len(server.data)}-'] and (tmp_path / 'a').exists()

  @pytest.mark.parametrize('part', [b'', b'x' * 1000, b'x' * 2**23])
  def test_a_wrong_checksum_leaves_nothing(self, part, server, digest, tmp_path):
    if part:  # of another file
      (tmp_path / 'a.part').write_bytes(part)
    else:
      server.data = server.data[:-1] + b'?'
    with pytest.raises(ValueError, match=f'expected SHA-256 {digest}, got [0-9a-f]{{64}}. .*--archive'):
      prepare.download(server.url, tmp_path / 'a', digest, _ignore)
    assert not list(tmp_path.iterdir())

  def test_an_address_that_has_moved(self, server, digest, tmp_path):
    server.status = 404
    with pytest.raises(OSError, match='answers 404 Not Found. Pass another --url, or get .*--archive'):
      prepare.download(server.url, tmp_path / 'a', digest, _ignore)

  def test_no_connection(self, digest, tmp_path):
    with pytest.raises(OSError, match='No connection to http://127.0.0.1:1/a: .*--archive'):
      prepare.download('http://127.0.0.1:1/a', tmp_path / 'a', digest, _ignore)

  def test_a_full_disk(self, server, digest, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage)
    with pytest.raises(OSError, match='has 3 MiB, and 1 MiB of the disk are free'):
      prepare.download(server.url, tmp_path / 'a', digest, _ignore)
    assert not list(tmp_path.iterdir())


class TestExtract:

  def test_only_what_is_asked_for(self, archive, tmp_path):
    assert prepare.extract(archive, tmp_path, ['screw', 'wood'], _ignore) == tmp_path
    assert [p.name for p in tmp_path.iterdir()] == ['screw']
    assert len(list(tmp_path.rglob('*.png'))) == 6 + 8 + 4

  @pytest.mark.parametrize('name, kind', [
      ('bottle/../../outside.png', tarfile.REGTYPE), ('bottle/link', tarfile.SYMTYPE)])
  def test_paths_that_lead_out_are_refused(self, name, kind, tmp_path):
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.size = kind, '/etc', 3 if kind == tarfile.REGTYPE else 0
    with tarfile.open(tmp_path / 'evil.tar', 'w') as tar:
      tar.addfile(member, io.BytesIO(b'abc'))
    (tmp_path / 'to').mkdir()
    with pytest.raises(ValueError, match='Cannot extract .*evil.tar'):
      prepare.extract(tmp_path / 'evil.tar', tmp_path / 'to', ['bottle'], _ignore)
    assert not list(tmp_path.rglob('outside.png')) and not list((tmp_path / 'to').rglob('link'))

  def test_damaged_archives(self, archive, tmp_path):
    (tmp_path / 'half.tar.xz').write_bytes(archive.read_bytes()[:20000])
    (tmp_path / 'text.tar').write_text('text' * 1000)
    for name in ('half.tar.xz', 'text.tar'):
      with pytest.raises(ValueError, match=f'Cannot extract .*{name}'):
        prepare.extract(tmp_path / name, tmp_path / 'to', ['bottle'], _ignore)
    with pytest.raises(ValueError, match='No archive .*none.tar'):
      prepare.extract(tmp_path / 'none.tar', tmp_path / 'to', ['bottle'], _ignore)

  def test_another_archive(self, pristine, tmp_path):
    with tarfile.open(tmp_path / 'a.tar', 'w') as tar:
      tar.add(pristine / 'bolt', 'bolt')
    with pytest.raises(ValueError, match='none of the categories bottle, screw'):
      prepare.extract(tmp_path / 'a.tar', tmp_path / 'to', ['bottle', 'screw'], _ignore)
