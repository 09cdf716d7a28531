"""The HTTP service as an ASGI app: an image is posted, its score, decision and map are answered.

docs/serving.md has the addresses, the fields of answers and the limits.
"""

import asyncio
import base64
import contextlib
import dataclasses
import hashlib
import hmac
import importlib.resources
import json
import math
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePath
from typing import NamedTuple

import numpy as np
import prometheus_client
from absl import logging
from PIL import Image
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

import patchcore_jax
from patchcore_jax import inspection
from patchcore_jax.data import decoding, image_contents, preprocess
from patchcore_jax.data.image_errors import ImageError, TooManyPixelsError, UnknownFormatError
from patchcore_jax.inspection import Inspector, image_sizes
from patchcore_jax.serving import http_requests, pictures
from patchcore_jax.serving.batcher import Batcher, BatchError
from patchcore_jax.serving.http_requests import RequestError
from patchcore_jax.serving.prometheus import ServiceMetrics

_FORMATS = 'PNG, JPEG, BMP, TIFF, WebP, GIF or PPM'


@dataclasses.dataclass(frozen=True)
class Options:
  """How much a service takes on.

  Attributes:
    batch_size: the most images that are scored at once. Functions for 1, 2, 4, ... up to it are compiled.
    wait_seconds: how long an incomplete batch waits for more images.
    threads: number of threads that decode images and draw maps.
    queue: the most requests that are worked on or wait; more are sent away with 503.
    max_bytes: the most bytes of the body of a request.
    max_pixels: the most pixels of an image. Decoding takes up to 20 bytes a pixel in each thread (WebP; other
      formats half).
    seconds: time within which the body of a request must have come.
    min_area: regions of fewer pixels are ignored (`inspection.find`).

  Raises:
    ValueError: values out of range.
  """

  batch_size: int = 8
  wait_seconds: float = 0.002
  threads: int = 2
  queue: int = 64
  max_bytes: int = 32 * 2**20
  max_pixels: int = 25_000_000
  seconds: float = 15.0
  min_area: float = 0.0

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value, least = getattr(self, field.name), 0 if field.name in ('wait_seconds', 'min_area') else 1e-3
      if not least <= value < math.inf:
        raise ValueError(f'{field.name}={value}: expected {"at least 0" if not least else "more than 0"}.')


def sizes_of(batch_size: int) -> list[int]:
  """Lists the batch sizes that are compiled: powers of two, and the largest.

  >>> sizes_of(6)
  [1, 2, 4, 6]
  """
  return [2**i for i in range(batch_size.bit_length()) if 2**i < batch_size] + [batch_size]


def create_app(
    inspector: Inspector,
    *,
    name: str,
    options: Options | None = None,
    token: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    on_ready: Callable[[Exception | None], None] | None = None,
) -> Starlette:
  """Creates the service of one bank.

  It compiles in the background once it is started; until then `/health` answers 503.

  Args:
    inspector: bank, network, and how they are used.
    name: name of the bank, shown on the page and in `/bank`.
    options: limits; None for the defaults.
    token: where it is given, requests to all but `/` and `/health` need `Authorization: Bearer TOKEN`.
    progress: called as `progress('compile', done, total)`.
    on_ready: called when all is compiled, with None, or with the exception that prevented it.

  Raises:
    ValueError: regions are to be ignored, and the bank knows none; or a method that scores no image alone.
  """
  if inspector.detector.of_a_set:
    raise ValueError(f'{inspector.detector.title} has no service: {inspector.detector.host_step}.')
  if options and options.min_area:
    inspection.check_knows_regions(inspector)
  service = _Service(inspector, name, options or Options(), token)

  @contextlib.asynccontextmanager
  async def lifespan(_):
    await service.start(progress, on_ready)
    try:
      yield
    finally:
      await service.stop()

  routes = [
      Route('/', service.page), Route('/health', service.health), Route('/metrics', service.metrics),
      Route('/bank', service.about), Route('/inspect', service.inspect, methods=['POST'])]
  app = Starlette(
      routes=routes, lifespan=lifespan,
      exception_handlers={
          RequestError: http_requests.answer_refusal, HTTPException: http_requests.answer_http_error,
          Exception: http_requests.answer_bug})
  app.add_middleware(
      http_requests.RequestMiddleware, paths={route.path for route in routes}, meters=service.meters)
  return app


class _Decoded(NamedTuple):
  """What is kept of an image while it waits: not all its pixels, which may be many."""

  size: tuple[int, int]  # (height, width) as it came, upright
  pixels: np.ndarray  # [h, w, 3] uint8, as the network sees it
  outside: float  # share of it outside of the value range
  full_range: bool  # see `decoding.Decoded`
  shown: Image.Image | None  # made smaller, to draw the map on


class _Service:
  """The state of a running service, and its answer at each address."""

  def __init__(self, inspector: Inspector, name: str, options: Options, token: str | None):
    self._inspector, self._name, self._options = inspector, name, options
    self._token = token.encode() if token else None
    self._in_flight, self._state = 0, 'starting'
    self._remarks = image_sizes.Remarks(inspector.model.description, logging.warning)
    self._batcher: Batcher | None = None
    self._page, self._policy = _read_page()
    self.meters = ServiceMetrics(
        lambda: self._batcher.waiting if self._batcher else 0, lambda: self._in_flight)

  # Life.

  async def start(self, progress, on_ready) -> None:
    self._batcher = Batcher(
        self._score, batch_size=self._options.batch_size, wait_seconds=self._options.wait_seconds)
    self._threads = ThreadPoolExecutor(self._options.threads, 'images')
    self._warming = asyncio.create_task(self._warm(progress, on_ready))

  async def _warm(self, progress, on_ready) -> None:
    """Compiles the functions of all batch sizes."""
    sizes = sizes_of(self._options.batch_size)
    try:
      self._scorer = await self._batcher.run(lambda: inspection.scorer(self._inspector, *sizes))
      for i, size in enumerate(sizes):
        await self._batcher.run(lambda size=size: self._scorer.compile(size))
        if progress:
          progress('compile', i + 1, len(sizes))
    except Exception as e:
      self._state = 'failed'
      logging.exception('The service could not compile.')
      if on_ready:
        on_ready(e)
      return
    self._state = 'ready'
    self.meters.ready.set(1)
    if on_ready:
      on_ready(None)

  async def stop(self) -> None:
    """Finishes what is in the queue, and stops the service. Compiling is not waited for."""
    self._state = 'stopping'
    self.meters.ready.set(0)
    ready = self._warming.done()
    self._warming.cancel()
    await self._batcher.close(wait=ready)
    self._threads.shutdown()

  def _score(self, images):
    """Scores a batch, in the scoring thread; returns (scores of the batch, position in it) for each image."""
    self.meters.batches.observe(len(images))
    try:
      with self.meters.scoring.time():
        scores = self._scorer(np.stack(images))
    except Exception:
      self.meters.failures.inc()
      logging.exception('A batch of %d images failed.', len(images))
      raise
    return [(scores, i) for i in range(len(images))]

  # Addresses.

  async def page(self, _) -> Response:
    return HTMLResponse(self._page, headers={'Content-Security-Policy': self._policy})

  async def health(self, _) -> Response:
    ready = self._state == 'ready'
    headers = {} if ready else {'Retry-After': '5'}
    return JSONResponse({'status': self._state}, 200 if ready else 503, headers)

  async def metrics(self, request: Request) -> Response:
    self._check_token(request)
    return Response(
        prometheus_client.generate_latest(self.meters.registry),
        media_type=prometheus_client.CONTENT_TYPE_LATEST)

  async def about(self, request: Request) -> Response:
    self._check_token(request)
    calibration, options = self._inspector.calibration, self._options
    model = self._inspector.model
    return JSONResponse({
        'bank': self._name,
        'detector': self._inspector.detector.name,
        'backbone': ' + '.join(backbone.name for backbone in self._inspector.backbones),
        'patches': len(model.arrays.get('embeddings', ())),
        'training_images': model.description.num_images,
        'input_size': list(self._inspector.image_size),
        'threshold': calibration and calibration.image_threshold,
        'pixel_threshold': calibration and calibration.pixel_threshold,
        'false_alarm_rate': calibration and calibration.guaranteed_rate,
        'limits': {
            'megabytes': options.max_bytes / 2**20, 'megapixels': options.max_pixels / 1e6,
            'seconds': options.seconds, 'queue': options.queue, 'formats': list(image_contents.FORMATS)},
        'version': patchcore_jax.__version__})

  async def inspect(self, request: Request) -> Response:
    self._check_token(request)
    wanted = _wanted(request)
    if self._state != 'ready':
      raise RequestError(503, 'not_ready', f'The service is {self._state}: ask again soon.', 5)
    if self._in_flight >= self._options.queue:
      raise RequestError(
          503, 'busy', f'{self._in_flight} requests are being worked on, the most that is allowed: send '
          'this one again in a second.', 1)
    self._in_flight += 1
    try:
      body = await self._body(request)
      decoded = await self._in_thread(
          self._decode, body, request.headers.get('content-type', ''), wanted)
      del body
      scores, i = await self._batcher.submit(decoded.pixels)
      answer = await self._in_thread(self._answer, decoded, scores, i, wanted)
    except BatchError as e:
      raise RequestError(
          500, 'scoring_failed', 'The image was read, but scoring it, or one that shared its batch, failed; '
          'the log of the service tells why. Try again.') from e
    except ClientDisconnect:
      return Response(status_code=400)  # for the meters: nobody reads it
    finally:
      self._in_flight -= 1
    return Response(answer, media_type='application/json')

  # Steps of a request.

  def _check_token(self, request: Request) -> None:
    """Refuses a request without the token, where one is needed."""
    if self._token is None:
      return
    scheme, _, given = request.headers.get('authorization', '').partition(' ')
    given = given.strip().encode('latin-1')  # the bytes of a header were read as such
    # The comparison takes a time that does not tell how much of the token was right.
    if scheme.lower() != 'bearer' or not hmac.compare_digest(given, self._token):
      raise RequestError(
          401, 'unauthorized', 'This service wants a token: send the header "Authorization: Bearer TOKEN" '
          'with the one that it was started with.')

  async def _body(self, request: Request) -> bytes:
    """Reads the body of a request, within the limits of bytes and seconds."""
    most = self._options.max_bytes
    if int(request.headers.get('content-length', 0)) > most:
      raise _too_many_bytes(most)
    parts, size = [], 0
    try:
      async with asyncio.timeout(self._options.seconds):
        async for part in request.stream():
          size += len(part)
          if size > most:
            raise _too_many_bytes(most)
          parts.append(part)
    except TimeoutError as e:
      raise RequestError(
          408, 'too_slow', f'{size} bytes of the request came in {self._options.seconds:g} seconds, and not '
          'its end: send a smaller image, or over a faster line.') from e
    return b''.join(parts)

  async def _in_thread(self, function, *args):
    return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)

  def _decode(self, body: bytes, content_type: str, wanted: dict[str, str]) -> _Decoded:
    """Decodes and preprocesses the image of a request; a copy to draw a map on is kept if that is wanted."""
    if content_type.partition(';')[0].strip().lower() == 'multipart/form-data':
      body = http_requests.file_of_form(body, content_type)
    if not body:
      raise RequestError(
          400, 'empty', f'The request has no image: expected the bytes of one ({_FORMATS}) as its body, or '
          'a form with one file.')
    name = 'the image'
    if wanted['page']:
      name += f'#{wanted["page"]}'
    elif (pages := image_contents.num_pages(name, lambda _: body)) > 1:
      raise RequestError(
          422, 'several_pages', f'The image has {pages} pages, and one is inspected at a time: send a '
          f'request for each, with ?page=1 to ?page={pages}.', pages=pages)
    try:
      image, outside, full_range = decoding.decode(
          name, self._inspector.preprocessing, lambda _: body, max_pixels=self._options.max_pixels)
    except TooManyPixelsError as e:
      raise RequestError(413, 'too_many_pixels', _sentence(e)) from e
    except UnknownFormatError as e:
      raise RequestError(
          415, 'unknown_format', f'What was sent ({len(body)} bytes, starting with {body[:8]!r}) is not an '
          f'image of a known format, or its first bytes are damaged: expected {_FORMATS}.') from e
    except ImageError as e:
      raise RequestError(422, 'unreadable', _sentence(e)) from e
    try:
      pixels = np.asarray(preprocess.transform(image, self._inspector.preprocessing))
      inspection.check_size(self._inspector, pixels.shape[:2])
    except ValueError as e:
      raise RequestError(422, 'wrong_size', _sentence(e)) from e
    shown = pictures.made_smaller(image) if wanted['map'] == 'png' else None
    return _Decoded((image.height, image.width), pixels, outside, full_range, shown)

  def _answer(self, decoded: _Decoded, scores, i: int, wanted: dict[str, str]) -> bytes:
    """Writes the answer to one image: its finding and the pictures that are wanted, as JSON."""
    inspector = self._inspector
    min_area = self._options.min_area
    found = inspection.find(
        inspector, scores, i, decoded.size, pixels=decoded.pixels, outside=decoded.outside,
        full_range=decoded.full_range, min_area=min_area)
    self.meters.decisions.labels(found.decision or 'none').inc()
    self._remarks.see(found.image_size, found.not_inspected, 'a request', note=found.note)
    answer = found.to_json()
    if found.nearest is not None:
      # The name is enough: where the training images lay does not concern those who send images.
      answer['nearest']['image'] = PurePath(found.nearest.name).name
    if wanted['map'] != 'none' and found.map is not None:
      answer['map'] = pictures.map_file(inspector, found, decoded.size, decoded.shown)
    if wanted['mask'] == 'png' and found.regions is not None:
      answer['mask'] = pictures.mask_file(inspector, found, decoded.size, min_area)
    if wanted['why'] == 'png':
      answer['why'] = pictures.why(inspector, decoded.pixels, found)
    return json.dumps(answer, allow_nan=False).encode()


def _wanted(request: Request) -> dict[str, str]:
  """Reads and checks the query parameters."""
  known = {'map': ('none', 'png', 'npy'), 'mask': ('none', 'png'), 'why': ('none', 'png'), 'page': ('',)}
  wanted = {key: values[0] for key, values in known.items()}
  for key, value in request.query_params.multi_items():
    if key not in known:
      raise RequestError(
          400, 'bad_parameter', f'There is no parameter {key!r}: expected one of {", ".join(known)}.')
    if key == 'page':
      if not re.fullmatch('[1-9][0-9]{0,8}', value):
        raise RequestError(400, 'bad_parameter', f'page={value!r}: expected a number, from 1 on.')
    elif value not in known[key]:
      raise RequestError(
          400, 'bad_parameter', f'{key}={value!r}: expected one of {", ".join(known[key])}.')
    wanted[key] = value
  return wanted


def _too_many_bytes(most: int) -> RequestError:
  return RequestError(
      413, 'too_many_bytes', f'The request is larger than {most / 2**20:g} MiB, the most that is allowed: '
      'send a smaller image, or start the service with a larger --max-mb.')


def _read_page() -> tuple[str, str]:
  """Reads the page: (page, policy that keeps a browser from running or loading anything else)."""
  page = importlib.resources.files(__package__).joinpath('page.html').read_text('utf-8')

  def digest(tag):
    text = re.search(f'<{tag}>(.*?)</{tag}>', page, re.DOTALL)[1]
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

  return page, (
      f"default-src 'none'; script-src 'sha256-{digest('script')}'; style-src 'sha256-{digest('style')}'; "
      "img-src blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
      "frame-ancestors 'none'")


def _sentence(error: Exception) -> str:
  """Writes the message of an error with a capital letter."""
  text = str(error)
  return text[:1].upper() + text[1:]
