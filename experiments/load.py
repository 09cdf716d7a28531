"""Puts a service under load, checks every answer, and measures.

    python -m experiments.load --bank=BANK --images='parts/**/*.png'

Starts `patchcore serve` on loopback. Clients send the images over and over, and, as a tenth of the
requests, broken ones. Every score is compared with that of `inspection.scorer`, every refusal with the status
that it must have. Afterwards `patchcore predict` scores the same images, without writing pictures. Prints a
Markdown table; a wrong answer or a service that ended makes the exit code 1.
"""

import concurrent.futures
import contextlib
import http.client
import io
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import flags
from PIL import Image

from experiments import cli, timing
from patchcore_jax import inspection
from patchcore_jax.cli import terminal
from patchcore_jax.data import decoding, image_files, image_finding, preprocess

cli.key_flags('bank', 'images')
_SECONDS = flags.DEFINE_float('seconds', 120, 'How long.', 1)
_CLIENTS = flags.DEFINE_integer('clients', 16, 'That send at the same time, one request after another.', 1)
_MALFORMED = flags.DEFINE_float('malformed', 0.1, 'Share of broken requests.', 0, 1)

_TOLERANCE = 1e-4
_PREDICTED = 1000  # images of the run of predict


class Sent(NamedTuple):
  """A request and what must come back: a status, and with 200 a score."""

  body: bytes
  headers: dict[str, str]
  status: int
  score: float | None


def main(_) -> int:
  # What is compared are files as they are sent; the service is asked for pages one by one.
  paths = [path for path in image_finding.find_images(cli.IMAGES.value) if image_files.file_of(path) == path]
  inspector = inspection.load(cli.BANK.value)
  good, bad = requests(inspector, paths), malformed(Path(paths[0]).read_bytes())
  with service(cli.BANK.value) as address:
    memory = [_metric(address, 'process_resident_memory_bytes')]
    end = time.monotonic() + _SECONDS.value
    with concurrent.futures.ThreadPoolExecutor(_CLIENTS.value) as threads:
      clients = [threads.submit(_client, address, good, bad, seed, end) for seed in range(_CLIENTS.value)]
      while time.monotonic() < end:
        time.sleep(min(5, max(0, end - time.monotonic())))
        memory.append(_metric(address, 'process_resident_memory_bytes'))
      results = [result for client in clients for result in client.result()]
    batch = _metric(address, 'patchcore_batch_images_sum') / _metric(address, 'patchcore_batch_images_count')
  wrong = [problem for *_, problem in results if problem]
  for problem, count in Counter(wrong).most_common(10):
    terminal.console.print(f'WRONG, {count} times: {problem}', markup=False)
  for line in table(results, memory, batch, predict(cli.BANK.value, paths)):
    print(line, flush=True)
  print(timing.machine())
  return 1 if wrong else 0


def requests(inspector: inspection.Inspector, paths) -> list[Sent]:
  """Makes a request of every image, with the score that the library gives it."""
  score = inspection.scorer(inspector, 8)
  pixels = [np.asarray(preprocess.transform(decoding.read_image(path), inspector.preprocessing))
            for path in paths]
  scores = np.concatenate([
      score(np.stack(pixels[i:i + 8])).image for i in range(0, len(pixels), 8)])
  return [Sent(Path(path).read_bytes(), {}, 200, float(s)) for path, s in zip(paths, scores)]


def malformed(image: bytes) -> list[Sent]:
  """Makes broken requests, with the status that each must get."""
  header = struct.pack('>IIBBBBB', 60_000, 60_000, 8, 2, 0, 0, 0)
  bomb = b'\x89PNG\r\n\x1a\n' + b''.join(
      struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
      for kind, data in ((b'IHDR', header), (b'IDAT', b''), (b'IEND', b'')))
  floats = io.BytesIO()
  Image.fromarray(np.zeros((8, 8), np.float32)).save(floats, 'TIFF')
  form = {'Content-Type': 'multipart/form-data; boundary=x'}
  return [Sent(body, headers, status, None) for body, headers, status in (
      (b'', {}, 400), (image, form, 400), (b'--x--\r\n', form, 400), (b'a text file named .png', {}, 415),
      (os.urandom(5000), {}, 415), (image[:len(image) // 2], {}, 422), (floats.getvalue(), {}, 422),
      (bomb, {}, 413), (bytes(33 * 2**20), {}, 413))]


@contextlib.contextmanager
def service(bank: str) -> Iterator[tuple[str, int]]:
  """Yields host and port of a service of its own, and checks that it ends as it should."""
  command = [sys.executable, '-m', 'patchcore_jax', 'serve', bank, '--port=0']
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
    found = None
    for line in process.stdout:
      if found := re.match(r'Ready at http://([\d.]+):(\d+)', line):
        break
    if not found:
      raise OSError('The service did not start.')
    try:
      yield found[1], int(found[2])
    finally:
      process.terminate()
      process.communicate()
  if process.returncode:
    raise OSError(f'The service ended with code {process.returncode}.')


def _client(address, good, bad, seed, end):
  """Sends requests, and tells of each (seconds, whether it was a good one, problem or None)."""
  rng, results = np.random.default_rng(seed), []
  connection = http.client.HTTPConnection(*address, timeout=60)
  while time.monotonic() < end:
    kind = bad if rng.random() < _MALFORMED.value else good
    sent = kind[rng.integers(len(kind))]
    began = time.perf_counter()
    problem = _problem(connection, sent)
    results.append((time.perf_counter() - began, kind is good, problem))
  connection.close()
  return results


def _problem(connection, sent):
  """Sends a request, and tells what is wrong with the answer; None if nothing is."""
  with contextlib.suppress(ConnectionError):  # the body was refused on the way; the answer is there
    connection.request('POST', '/inspect', sent.body, sent.headers)
  try:
    response = connection.getresponse()
    answer = json.loads(response.read())
  except (OSError, http.client.HTTPException, ValueError) as e:
    connection.close()
    # Refused while 33 MiB were under way: a client that is too slow loses the answer with the connection.
    return None if sent.status == 413 and isinstance(e, ConnectionError) else f'{type(e).__name__}: {e}'
  if response.status != sent.status:
    return f'status {response.status} in place of {sent.status}: {answer}'
  if sent.score is not None and not abs(answer['score'] - sent.score) <= _TOLERANCE:
    return f'score {answer["score"]} in place of {sent.score}'
  return None


def _metric(address, name):
  """Reads one of the service's metrics."""
  connection = http.client.HTTPConnection(*address, timeout=60)
  connection.request('GET', '/metrics')
  text = connection.getresponse().read().decode()
  connection.close()
  return float(re.search(rf'^{name} (\S+)$', text, re.MULTILINE)[1])


def predict(bank: str, paths) -> float:
  """Measures the images a second of `patchcore predict` on the same files, without pictures."""
  with tempfile.TemporaryDirectory() as temporary:
    images = Path(temporary, 'images')
    images.mkdir()
    for i in range(_PREDICTED):
      path = Path(paths[i % len(paths)])
      images.joinpath(f'{i:05}{path.suffix}').symlink_to(path.absolute())
    output = subprocess.run(
        [sys.executable, '-m', 'patchcore_jax', 'predict', bank, images, f'--out={Path(temporary, "out")}',
         '--no-overlays', '--maps=none'],
        check=True, capture_output=True, text=True).stdout
  return float(re.search(r'([\d.]+) images/s', output)[1])


def table(results, memory, batch: float, predicted: float) -> Iterator[str]:
  """Yields the results as Markdown."""
  seconds = np.array([s for s, good, _ in results if good])
  rate = len(seconds) / _SECONDS.value
  settled = memory[len(memory) // 6]  # the first requests fill caches and the threads' heaps
  yield f'### serve: {_CLIENTS.value} clients for {_SECONDS.value:g} s on loopback\n'
  yield '| what | |\n|---|---|'
  yield f'| requests | {len(results)}, {len(results) - len(seconds)} of them broken |'
  yield f'| wrong answers | {sum(bool(problem) for *_, problem in results)} |'
  yield (f'| latency of an image | {1000 * np.median(seconds):.0f} ms in the middle, '
         f'{1000 * np.quantile(seconds, 0.99):.0f} ms at 99 %, {1000 * seconds.max():.0f} ms at the most |')
  yield f'| images of a batch | {batch:.1f} |'
  yield (f'| memory of the service | {memory[0] / 1e6:.0f} MB before, {settled / 1e6:.0f} after a sixth of '
         f'the time, {memory[-1] / 1e6:.0f} at the end; at the most {max(memory) / 1e6:.0f} |')
  yield f'| images a second | {rate:.1f} |'
  yield f'| `predict`, the same images | {predicted:.1f} |'
  yield f'| ratio | {rate / predicted:.2f} |'
  yield ''


if __name__ == '__main__':
  flags.mark_flags_as_required(['bank', 'images'])
  cli.run(main)
