"""The service: batches, answers, limits; most of it over real sockets."""

import asyncio
import base64
import concurrent.futures
import contextlib
import dataclasses
import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from patchcore_jax import inspection
from patchcore_jax.banks import store
from patchcore_jax.cli import serve
from patchcore_jax.data import preprocess
from patchcore_jax.detectors import MahalanobisAD
from patchcore_jax.serving import app, http_requests, server
from patchcore_jax.serving.app import Options
from patchcore_jax.serving.batcher import Batcher, BatchError
from tests import small

_OPTIONS = Options(max_bytes=400_000, max_pixels=1_000_000, seconds=0.6, queue=16, batch_size=4)


def _file(pixels, kind='PNG', **kwargs):
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, kind, **kwargs)
  return file.getvalue()


def parts(n, seed=5):
  """[n, 50, 40, 3] uint8, each of another strength of noise."""
  rng = np.random.default_rng(seed)
  noise = rng.normal(128, np.linspace(5, 70, n)[:, None, None, None], (n, 50, 40, 3))
  return noise.clip(0, 255).astype(np.uint8)


@contextlib.contextmanager
def running(inspector, options=_OPTIONS, token=None):
  """Yields the address of a service on loopback, once it is ready."""
  ready, errors = threading.Event(), []

  def on_ready(error):
    errors.append(error)
    ready.set()

  listener = server.listen('127.0.0.1', 0)
  served = server.make_server(
      app.create_app(inspector, name='noise', options=options, token=token, on_ready=on_ready),
      seconds=options.seconds)
  thread = threading.Thread(target=served.run, kwargs={'sockets': [listener]})
  address = listener.getsockname()
  thread.start()
  try:
    assert ready.wait(60) and errors == [None]
    yield address
  finally:
    served.should_exit = True
    thread.join(30)
  assert not thread.is_alive()


def ask(address, path='/inspect', body=None, method=None, **headers):
  """(status, headers, answer); the answer is JSON if it says so."""
  connection = http.client.HTTPConnection(*address, timeout=20)
  try:
    connection.request(method or ('GET' if body is None else 'POST'), path, body, headers)
    response = connection.getresponse()
    data = response.read()
    if response.headers['content-type'] == 'application/json':
      data = json.loads(data)
    return response.status, response.headers, data
  finally:
    connection.close()


@pytest.fixture(scope='module')
def inspector():
  return small.inspector()


@pytest.fixture(scope='module')
def address(inspector):
  with running(inspector) as where:
    yield where


def _expected(inspector, images):
  pixels = np.stack([
      np.asarray(preprocess.transform(Image.fromarray(i), inspector.preprocessing)) for i in images])
  scores = inspection.scorer(inspector, len(images))(pixels)
  return [inspection.find(inspector, scores, i, images[i].shape[:2]) for i in range(len(images))]


class TestBatcher:

  def _run(self, coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 20))

  def test_every_item_gets_its_own_result_and_batches_are_full(self):
    sizes = []

    def score(items):
      sizes.append(len(items))
      time.sleep(0.02)
      return [10 * i for i in items]

    async def many():
      batcher = Batcher(score, batch_size=4, wait_seconds=0.01)
      results = await asyncio.gather(*(batcher.submit(i) for i in range(21)))
      await batcher.close()
      return results

    assert self._run(many()) == [10 * i for i in range(21)]
    assert sizes == [4, 4, 4, 4, 4, 1]

  def test_one_item_waits_no_longer_than_it_is_told(self):
    async def one():
      batcher = Batcher(lambda items: items, batch_size=8, wait_seconds=0.05)
      began = time.perf_counter()
      await batcher.submit(1)
      seconds = time.perf_counter() - began
      await batcher.close()
      return seconds

    assert 0.04 < self._run(one()) < 2

  def test_a_failing_batch_fails_alone(self):
    def score(items):
      if 2 in items:
        raise KeyError('poison')
      return items

    async def three():
      batcher = Batcher(score, batch_size=2, wait_seconds=0.01)
      results = await asyncio.gather(*(batcher.submit(i) for i in range(6)), return_exceptions=True)
      again = await batcher.submit(7)
      await batcher.close()
      return results, again

    results, again = self._run(three())
    assert [r for r in results if not isinstance(r, BatchError)] == [0, 1, 4, 5]
    assert [str(r) for r in results if isinstance(r, BatchError)] == ["KeyError: 'poison'"] * 2
    assert again == 7

  def test_too_few_results_are_an_error(self):
    async def one():
      batcher = Batcher(lambda items: [], batch_size=2, wait_seconds=0)
      with pytest.raises(BatchError, match='0 results for 1 items'):
        await batcher.submit(1)
      await batcher.close()

    self._run(one())

  def test_what_nobody_waits_for_is_left_out(self):
    seen, go = [], threading.Event()

    def score(items):
      seen.extend(items)
      go.wait(10)
      return items

    async def some():
      batcher = Batcher(score, batch_size=1, wait_seconds=0)
      tasks = [asyncio.create_task(batcher.submit(i)) for i in range(3)]
      await asyncio.sleep(0.05)
      assert batcher.waiting == 2
      tasks[1].cancel()
      go.set()
      await batcher.close()
      return await tasks[2]

    assert self._run(some()) == 2
    assert seen == [0, 2]

  def test_closing_finishes_what_is_there_and_takes_no_more(self):
    async def close():
      batcher = Batcher(lambda items: items, batch_size=2, wait_seconds=10)
      tasks = [asyncio.create_task(batcher.submit(i)) for i in range(5)]
      await asyncio.sleep(0)
      await batcher.close()
      with pytest.raises(RuntimeError, match='closed'):
        await batcher.submit(1)
      return await asyncio.gather(*tasks)

    assert self._run(close()) == [0, 1, 2, 3, 4]

  def test_bad_sizes(self):
    with pytest.raises(ValueError, match='batch_size=0'):
      Batcher(list, batch_size=0, wait_seconds=0)


class TestScorer:

  def test_sizes_do_not_change_the_scores(self, inspector):
    images = small.images(5)
    index, predicted = next(inspection.predict(inspector, small.batches(images, 5)))
    np.testing.assert_array_equal(index, np.arange(5))
    score = inspection.scorer(inspector, 5, 1, 2)
    for n in (1, 2, 3, 5):
      jax.tree.map(
          lambda got, expected, n=n: np.testing.assert_allclose(got, expected[:n], atol=1e-5),
          score(images[:n]), predicted)
    with pytest.raises(ValueError, match='6 images for a scorer of batches of at most 5'):
      score(small.images(6))


class TestInspect:

  def test_concurrent_requests_get_their_own_scores(self, address, inspector):
    images = parts(24)
    expected = _expected(inspector, images)
    with concurrent.futures.ThreadPoolExecutor(12) as threads:
      answers = list(threads.map(lambda i: ask(address, body=_file(i)), images))
    assert [status for status, _, _ in answers] == [200] * len(images)
    for (_, _, answer), finding in zip(answers, expected):
      # Padded to other batches, so not to the last bit.
      assert answer['score'] == pytest.approx(finding.score, abs=1e-4)
      assert answer['calibrated_score'] == pytest.approx(finding.calibrated_score, abs=1e-4)
      assert answer['p_value'] == finding.p_value
      assert answer['decision'] == ('anomalous' if finding.anomalous else 'good')
      assert tuple(answer['box']) == finding.box
      assert answer['centroid'] == pytest.approx(finding.centroid, abs=0.01)
      assert answer['image_size'] == [40, 50]
      assert answer['threshold'] == inspector.calibration.image_threshold
    assert {answer['decision'] for _, _, answer in answers} == {'good', 'anomalous'}
    # The scores differ, or the test could not see them mixed up.
    assert np.diff(sorted(f.score for f in expected)).min() > 2e-4

  def test_the_nearest_patch_is_named(self, address, inspector):
    _, _, answer = ask(address, body=_file(parts(1)[0]))
    (finding,) = _expected(inspector, parts(1))
    number, name, row, column = finding.nearest
    assert name == f'/line/good/{number}.png'  # where that lies, a client is not told
    assert answer['nearest'] == {'image': f'{number}.png', 'number': number, 'row': row, 'column': column}
    assert tuple(answer['patch']) == finding.patch

  def test_raw_map(self, address, inspector):
    image = parts(3)[2]
    _, _, answer = ask(address, '/inspect?map=npy', _file(image))
    anomaly_map = np.load(io.BytesIO(base64.b64decode(answer['map']['data'])))
    np.testing.assert_allclose(anomaly_map, _expected(inspector, [image])[0].map, atol=1e-4)
    # 40 x 50 pixels stay as they are in width, and 9 rows are cut off above and below, 8 columns beside.
    assert answer['map']['box'] == [8, 9, 32, 41]

  def test_drawn_map_shows_what_was_not_seen_as_dark(self, address):
    _, _, answer = ask(address, '/inspect?map=png', _file(np.full((50, 40, 3), 200, np.uint8)))
    drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer['map']['data']))))
    assert drawn.shape == (50, 40, 3)
    assert drawn[:9].max() < 100 and drawn[9:41, 8:32].max() >= 150

  def test_large_images_are_drawn_small(self, address):
    _, _, answer = ask(address, '/inspect?map=png', _file(np.zeros((500, 2000, 3), np.uint8)))
    drawn = Image.open(io.BytesIO(base64.b64decode(answer['map']['data'])))
    assert drawn.size == (1024, 256)
    assert answer['image_size'] == [2000, 500]

  def test_pictures_of_why(self, address):
    _, _, answer = ask(address, '/inspect?why=png', _file(parts(1)[0]))
    for name in ('patch', 'nearest'):
      assert Image.open(io.BytesIO(base64.b64decode(answer['why'][name]))).size == (24, 24)

  def test_forms(self, address):
    image = _file(parts(1)[0])
    form = b'\r\n'.join((
        b'--x', b'Content-Disposition: form-data; name="comment"', b'', b'new',
        b'--x', b'Content-Disposition: form-data; name="file"; filename="a.png"', b'Content-Type: image/png',
        b'', image, b'--x--', b''))
    status, _, answer = ask(address, body=form, **{'Content-Type': 'multipart/form-data; boundary=x'})
    assert status == 200
    assert answer['score'] == pytest.approx(ask(address, body=image)[2]['score'], abs=1e-4)

  @pytest.mark.parametrize('kind', ['PNG', 'JPEG', 'BMP', 'TIFF', 'WEBP', 'GIF'])
  def test_formats(self, address, kind):
    assert ask(address, body=_file(parts(1)[0], kind))[0] == 200

  @pytest.mark.parametrize('kind', ['PNG', 'TIFF', 'GIF', 'WEBP'])
  def test_each_page_is_an_image(self, address, kind):
    first, second = parts(2, seed=1)
    both = _file(first, kind, save_all=True, append_images=[Image.fromarray(second)], lossless=True)
    status, _, answer = ask(address, body=both)
    assert (status, answer['error'], answer['pages']) == (422, 'several_pages', 2)
    scores = [ask(address, f'/inspect?page={page}', both)[2]['score'] for page in (1, 2)]
    if kind != 'GIF':  # which has fewer colours
      alone = [ask(address, body=_file(pixels))[2]['score'] for pixels in (first, second)]
      assert scores == pytest.approx(alone, abs=1e-3)
    assert abs(scores[0] - scores[1]) > 0.1
    status, _, answer = ask(address, '/inspect?page=3', both)
    assert status == 422 and 'has 2 pages' in answer['message']
    assert ask(address, '/inspect?page=1', _file(first))[0] == 200

  def test_masks_have_the_size_of_the_image(self, address, inspector):
    image = parts(24)[-1]
    _, _, answer = ask(address, '/inspect?mask=png', _file(image))
    mask = Image.open(io.BytesIO(base64.b64decode(answer['mask']['data'])))
    (finding,) = _expected(inspector, [image])
    assert mask.size == (40, 50) and answer['mask']['type'] == 'image/png'
    assert finding.regions and [r['area'] for r in answer['regions']] == [r.area for r in finding.regions]
    assert (np.asarray(mask) == 255).sum() == sum(r.area for r in finding.regions)
    assert set(np.unique(mask)) == {0, 255}

  def test_specks_are_ignored_if_so_started(self, address, inspector):
    body = _file(parts(24)[-1])
    assert ask(address, body=body)[2]['decision'] == 'anomalous'
    with running(inspector, dataclasses.replace(_OPTIONS, min_area=1e6)) as where:
      answer = ask(where, '/inspect?mask=png', body)[2]
    assert (answer['decision'], answer['regions']) == ('good', [])
    assert 'no region has 1e+06' in answer['reason']
    assert not np.asarray(Image.open(io.BytesIO(base64.b64decode(answer['mask']['data'])))).any()
    bare = dataclasses.replace(inspector, model=inspector.model.with_description(calibration=None))
    with pytest.raises(ValueError, match='no pixel threshold'):
      app.create_app(bare, name='noise', options=Options(min_area=1))

  @pytest.mark.parametrize('pixels', [
      np.zeros((50, 40), np.uint16), np.zeros((1, 1, 3), np.uint8), np.zeros((20, 20_000, 3), np.uint8)])
  def test_odd_images_have_an_answer(self, address, pixels):
    assert ask(address, body=_file(pixels))[0] == 200

  @pytest.mark.parametrize('body, status, code, words', [
      (b'', 400, 'empty', 'expected the bytes of one'),
      (b'a text file that is named .png', 415, 'unknown_format', 'expected PNG, JPEG'),
      (_file(parts(1)[0])[:-2000], 422, 'unreadable', 'damaged or truncated'),
      (_file(np.zeros((1001, 1000), np.uint8)), 413, 'too_many_pixels', '1.001 megapixels; allowed are 1.'),
      (_file(np.zeros((1, 900_000), np.uint8)), 422, 'wrong_size', 'more than'),
      (_file(np.zeros((5, 5), np.float32), 'TIFF'), 422, 'unreadable', 'floats'),
      (b'\0' * 400_001, 413, 'too_many_bytes', 'larger than 0.38')])
  def test_refusals_say_what_was_expected(self, address, body, status, code, words):
    got, _, answer = ask(address, body=body)
    assert (got, answer['error']) == (status, code)
    assert words in answer['message']
    assert ask(address, body=_file(parts(1)[0]))[0] == 200  # it goes on

  @pytest.mark.parametrize('query, words', [
      ('map=jpg', "map='jpg': expected one of none, png, npy"), ('amp=png', "no parameter 'amp'"),
      ('page=0', "page='0': expected a number")])
  def test_bad_parameters(self, address, query, words):
    status, _, answer = ask(address, f'/inspect?{query}', _file(parts(1)[0]))
    assert status == 400 and words in answer['message']

  def test_shapes_that_the_bank_was_not_made_of(self, inspector):
    whole = dataclasses.replace(inspector, model=inspector.model.with_description(
        preprocessing=preprocess.Preprocessing(resize=(32,), crop=())))
    with running(whole, Options(batch_size=1)) as where:
      status, _, answer = ask(where, body=_file(np.zeros((50, 40, 3), np.uint8)))
    assert (status, answer['error']) == (422, 'wrong_size')
    assert 'The image is 32 x 40 pixels' in answer['message'] and '24 x 32' in answer['message']

  def test_banks_without_thresholds(self, inspector):
    bare = dataclasses.replace(inspector, model=inspector.model.with_description(calibration=None))
    with running(bare, Options(batch_size=1)) as where:
      _, _, answer = ask(where, '/inspect?map=png', _file(parts(1)[0]))
      assert ask(where, '/bank')[2]['threshold'] is None
    assert answer['score'] > 0
    assert [answer[k] for k in ('decision', 'p_value', 'calibrated_score', 'threshold')] == [None] * 4

  def test_methods_that_score_whole_images(self):
    """What they do not know is null, and a map is left out even if asked for."""
    whole = small.inspector(MahalanobisAD(), calibration=None)
    with running(whole, Options(batch_size=1)) as where:
      status, _, answer = ask(where, '/inspect?map=png&why=png', _file(parts(1)[0]))
      assert ask(where, '/bank')[2]['detector'] == 'mahalanobis_ad'
    assert status == 200 and answer['score'] > 0 and 'map' not in answer
    for field in ('box', 'centroid', 'patch', 'patch_box', 'nearest', 'nearest_box'):
      assert answer[field] is None
    assert answer['why'] == {'patch': None, 'nearest': None}

  def test_slow_bodies(self, address):
    with socket.create_connection(address, timeout=10) as connection:
      connection.sendall(b'POST /inspect HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc')
      answer = connection.makefile('rb').read()
    assert b' 408 ' in answer.splitlines()[0] and b'3 bytes of the request came in 0.6 s' in answer

  def test_slow_heads_are_cut_off(self, address):
    with socket.create_connection(address, timeout=10) as connection:
      connection.sendall(b'POST /insp')
      began = time.monotonic()
      with contextlib.suppress(ConnectionResetError):
        assert connection.recv(100) == b''
    assert 0.3 < time.monotonic() - began < 5

  def test_bodies_without_a_length_are_refused_on_the_way(self, address):
    with socket.create_connection(address, timeout=10) as connection:
      connection.sendall(b'POST /inspect HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n')
      for _ in range(5):
        connection.sendall(b'186A0\r\n' + b'\0' * 100_000 + b'\r\n')
      answer = connection.makefile('rb').read()  # though the body has no end
    assert b' 413 ' in answer.splitlines()[0] and b'connection: close' in answer

  def test_a_full_queue(self, inspector, monkeypatch):
    _patch_scorer(monkeypatch, lambda images: time.sleep(0.3))
    options = Options(queue=2, batch_size=1)
    body = _file(parts(1)[0])
    with running(inspector, options) as where, concurrent.futures.ThreadPoolExecutor(8) as threads:
      answers = list(threads.map(lambda _: ask(where, body=body), range(8)))
      assert ask(where, body=body)[0] == 200
    statuses = [status for status, _, _ in answers]
    assert set(statuses) == {200, 503} and statuses.count(200) >= 2
    refused = next(a for a in answers if a[0] == 503)
    assert refused[1]['retry-after'] == '1' and refused[2]['error'] == 'busy'

  def test_a_poisoned_batch(self, inspector, monkeypatch):
    def poison(images):
      if (images == 77).all(axis=(1, 2, 3)).any():
        raise RuntimeError('out of something')

    _patch_scorer(monkeypatch, poison)
    bad = _file(np.full((50, 40, 3), 77, np.uint8))
    with running(inspector, Options(batch_size=1)) as where:
      status, _, answer = ask(where, body=bad)
      assert (status, answer['error']) == (500, 'scoring_failed')
      assert ask(where, body=_file(parts(1)[0]))[0] == 200
      metrics = ask(where, '/metrics')[2].decode()
    assert 'patchcore_failed_batches_total 1.0' in metrics

  def test_ending_finishes_what_was_taken_on(self, inspector, monkeypatch):
    _patch_scorer(monkeypatch, lambda images: time.sleep(0.2))
    body = _file(parts(1)[0])
    with concurrent.futures.ThreadPoolExecutor(6) as threads:
      with running(inspector, Options(batch_size=1)) as where:
        asked = [threads.submit(ask, where, body=body) for _ in range(6)]
        time.sleep(0.3)
      assert [a.result()[0] for a in asked] == [200] * 6


def _patch_scorer(monkeypatch, before):
  """`before` runs with each batch."""
  make = inspection.scorer

  def scorer(*args):
    score = make(*args)

    def patched(images):
      before(images)
      return score(images)

    patched.compile = score.compile
    return patched

  monkeypatch.setattr(inspection, 'scorer', scorer)


class TestOtherAddresses:

  def test_page(self, address):
    status, headers, page = ask(address, '/')
    assert status == 200 and b'<!doctype html>' in page
    # Nothing from elsewhere, and nothing but its own script.
    assert b'http' not in page.replace(b'http-equiv', b'')
    assert "default-src 'none'" in headers['content-security-policy']

  def test_bank(self, address, inspector):
    answer = ask(address, '/bank')[2]
    assert answer['bank'] == 'noise' and answer['backbone'] == 'tests.small:backbone'
    assert answer['input_size'] == [32, 24] and answer['training_images'] == 8
    assert answer['limits']['megapixels'] == 1

  def test_health_tells_when_it_is_ready(self, inspector, monkeypatch):
    go = threading.Event()
    make = inspection.scorer

    def waiting(*args):
      assert go.wait(20)
      return make(*args)

    monkeypatch.setattr(inspection, 'scorer', waiting)

    async def ask_both():
      ready = asyncio.Event()
      service = app.create_app(
          inspector, name='', options=Options(batch_size=1), on_ready=lambda _: ready.set())
      async with service.router.lifespan_context(service):
        before = [(await _call(service, p, m))[0] for p, m in (('/health', 'GET'), ('/inspect', 'POST'))]
        go.set()
        await ready.wait()
        return before, await _call(service, '/health', 'GET')

    before, (status, answer) = asyncio.run(ask_both())
    assert before == [503, 503]
    assert (status, json.loads(answer)) == (200, {'status': 'ready'})

  def test_a_network_that_does_not_compile(self, inspector, monkeypatch):
    def fail(*_):
      raise RuntimeError('no such device')

    monkeypatch.setattr(inspection, 'scorer', fail)

    async def start():
      done = asyncio.get_running_loop().create_future()
      service = app.create_app(inspector, name='', on_ready=done.set_result)
      async with service.router.lifespan_context(service):
        return await done, await _call(service, '/health', 'GET')

    error, (status, answer) = asyncio.run(start())
    assert str(error) == 'no such device'
    assert (status, json.loads(answer)) == (503, {'status': 'failed'})

  def test_metrics(self, address):
    ask(address, body=_file(parts(1)[0]))
    status, headers, text = ask(address, '/metrics')
    assert status == 200 and headers['content-type'].startswith('text/plain')
    lines = dict(line.rsplit(' ', 1) for line in text.decode().splitlines() if line[0] != '#')
    assert float(lines['patchcore_requests_total{path="/inspect",status="200"}']) >= 1
    assert float(lines['patchcore_batch_images_sum']) >= float(lines['patchcore_batch_images_count']) >= 1
    assert lines['patchcore_ready'] == '1.0'

  @pytest.mark.parametrize('path, method, status', [('/nothing', 'GET', 404), ('/inspect', 'GET', 405)])
  def test_wrong_addresses(self, address, path, method, status):
    got, _, answer = ask(address, path, method=method)
    assert got == status and 'POST /inspect' in answer['message']

  def test_no_other_site_may_read_answers(self, address):
    headers = ask(address, '/bank', Origin='http://elsewhere.example')[1]
    assert not [name for name in headers if name.lower().startswith('access-control')]


async def _call(service, path, method):
  """(status, body) of a request without a body, in this process."""
  answer = {'body': b''}

  async def receive():
    return {'type': 'http.request'}

  async def send(message):
    answer['status'] = message.get('status', answer.get('status'))
    answer['body'] += message.get('body', b'')

  scope = {'type': 'http', 'method': method, 'path': path, 'query_string': b'', 'headers': []}
  await service(scope, receive, send)
  return answer['status'], answer['body']


class TestToken:

  def test_all_but_the_page_and_health_need_it(self, inspector):
    body = _file(parts(1)[0])
    with running(inspector, Options(batch_size=1), token='secret') as where:
      assert [ask(where, p)[0] for p in ('/', '/health', '/bank', '/metrics')] == [200, 200, 401, 401]
      status, headers, answer = ask(where, body=body)
      assert (status, headers['www-authenticate'], answer['error']) == (401, 'Bearer', 'unauthorized')
      for wrong in ('Bearer secre', 'Bearer secrets', 'Basic secret', 'secret', 'Bearer \xfc'):
        assert ask(where, body=body, Authorization=wrong)[0] == 401
      assert ask(where, body=body, Authorization='bearer secret')[0] == 200
      assert ask(where, '/metrics', Authorization='Bearer secret')[0] == 200


class TestFileOfForm:

  @pytest.mark.parametrize('body, kind, words', [
      (b'', 'multipart/form-data; boundary=x', 'has 0 files'),
      (b'abc', 'multipart/form-data; boundary=x', 'cannot be read'),
      (b'--x--', 'multipart/form-data', 'cannot be read'),
      (b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\nb\r\n--x--',
       'multipart/form-data; boundary=x', 'has 0 files'),
      (b'--x\r\nContent-Disposition: form-data; name="a"; filename="b"\r\n\r\nb\r\n' * 2 + b'--x--',
       'multipart/form-data; boundary=x', 'has 2 files'),
      (b'--x\r\na: b\r\n\r\n\r\n' * 21 + b'--x--', 'multipart/form-data; boundary=x', 'more than 20 parts')])
  def test_other_forms(self, body, kind, words):
    with pytest.raises(http_requests.RequestError, match=words) as error:
      http_requests.file_of_form(body, kind)
    assert error.value.status == 400


class TestListen:

  def test_a_taken_port_is_told(self):
    with server.listen('127.0.0.1', 0) as first:
      first.listen()
      port = first.getsockname()[1]
      assert server.address(first) == f'http://127.0.0.1:{port}'
      with pytest.raises(OSError, match=f'127.0.0.1:{port}.*Choose another --port'):
        server.listen('127.0.0.1', port)

  def test_an_address_of_another_machine(self):
    with pytest.raises(OSError, match='Cannot listen on 192.0.2.1:0'):
      server.listen('192.0.2.1', 0)


class TestOptions:

  @pytest.mark.parametrize('fields', [{'queue': 0}, {'seconds': float('nan')}, {'wait_seconds': -1}])
  def test_out_of_range(self, fields):
    with pytest.raises(ValueError, match=f'{next(iter(fields))}='):
      Options(**fields)


class TestReadToken:

  def test_the_file_counts_before_the_variable(self, tmp_path):
    (tmp_path / 'token').write_text('one\n')
    assert serve.read_token(str(tmp_path / 'token'), 'two') == 'one'
    assert serve.read_token(None, 'two') == 'two'
    assert serve.read_token(None, None) is None

  @pytest.mark.parametrize('text', ['', ' \n', 'a b', 'ü'])
  def test_bad_tokens(self, text, tmp_path):
    (tmp_path / 'token').write_text(text)
    with pytest.raises(ValueError, match='token in .*token is empty or has'):
      serve.read_token(str(tmp_path / 'token'), None)


class TestBinary:

  def test_serves_until_it_is_told_to_end(self, inspector, tmp_path):
    store.save(tmp_path / 'noise', inspector.model)
    command = [sys.executable, '-m', 'patchcore_jax', 'serve', tmp_path / 'noise', '--port=0']
    with subprocess.Popen(
        [*command, '--batch-size=2'], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {'PATCHCORE_TOKEN': 'ab'}) as process:
      try:
        line = next(line for line in process.stdout if not line.startswith('serve: compile'))
        found = re.match(
            r'Ready at http://127\.0\.0\.1:(\d+): bank .*noise, 192 patches, tests.small:backbone, '
            'a token is needed', line)
        assert found, line
        status, _, answer = ask(
            ('127.0.0.1', int(found[1])), body=_file(parts(1)[0]), Authorization='Bearer ab')
      finally:
        process.send_signal(signal.SIGTERM)
      rest = process.stdout.read()
    assert status == 200
    assert answer['score'] == pytest.approx(_expected(inspector, parts(1))[0].score, abs=1e-4)
    *before, last = rest.splitlines()
    assert (process.returncode, last) == (0, 'Ended.')
    assert [line.partition('62 % of each image')[2][:50] for line in before] == [
        ' of 40 x 50 pixels is not inspected: the bank was ']

  @pytest.mark.parametrize('seconds', [0.4, 1.2])
  def test_ctrl_c_before_it_is_ready(self, inspector, tmp_path, seconds):
    store.save(tmp_path / 'noise', inspector.model)
    command = [sys.executable, '-m', 'patchcore_jax', 'serve', tmp_path / 'noise', '--port=0']
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
      time.sleep(seconds)
      process.send_signal(signal.SIGINT)
      said, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and said.splitlines()[-1] == 'Ended.' and 'Traceback' not in said

  def test_the_extra_is_named_when_it_is_absent(self, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'uvicorn', None)
    monkeypatch.delitem(sys.modules, 'patchcore_jax.serving.server')
    monkeypatch.delattr('patchcore_jax.serving.server')
    (tmp_path / 'description').mkdir()  # as a model has
    result = CliRunner().invoke(serve.command, [str(tmp_path), '--port=0'])
    assert result.exit_code == 1 and "pip install 'patchcore_jax[serve]'" in result.stderr
