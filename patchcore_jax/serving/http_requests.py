"""What is HTTP alone about requests: refusals, forms, and bodies that are not read to their end."""

import asyncio
import contextlib
import time

import python_multipart
from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from patchcore_jax.serving.prometheus import ServiceMetrics

_LINGER_SECONDS = 1.0
_MOST_PARTS = 20


class RequestError(Exception):
  """A request that gets no score, with the status and the words of the answer, and further fields of it."""

  def __init__(self, status: int, code: str, message: str, retry_after: int | None = None, **fields: int):
    super().__init__(message)
    self.status, self.code, self.retry_after, self.fields = status, code, retry_after, fields


def file_of_form(body: bytes, content_type: str) -> bytes:
  """Extracts the one file of a multipart form.

  Raises:
    RequestError: 400, for what is not a form, has too many parts, or has not one file.
  """
  boundary = parse_options_header(content_type)[1].get(b'boundary')
  parts: list[tuple[dict[bytes, bytes], bytearray]] = []
  header = [b'', b'']

  def named(i):
    def add(data, start, end):
      header[i] += data[start:end]
    return add

  def end_header():
    parts[-1][0][header[0].lower()] = header[1]
    header[:] = [b'', b'']

  def begin_part():
    if len(parts) == _MOST_PARTS:  # each takes far more memory than its few bytes
      raise RequestError(
          400, 'bad_form', f'The form has more than {_MOST_PARTS} parts: expected one file.')
    parts.append(({}, bytearray()))

  callbacks = {
      'on_part_begin': begin_part,
      'on_header_field': named(0), 'on_header_value': named(1), 'on_header_end': end_header,
      'on_part_data': lambda data, start, end: parts[-1][1].extend(memoryview(data)[start:end])}
  try:
    parser = python_multipart.MultipartParser(boundary or b'', callbacks)
    parser.write(body)
    parser.finalize()
  except python_multipart.exceptions.FormParserError as e:
    raise RequestError(
        400, 'bad_form', f'The form cannot be read ({e}): expected multipart/form-data with one file, or the '
        'image itself as the body.') from e
  files = [
      content for headers, content in parts
      if b'filename' in parse_options_header(headers.get(b'content-disposition', b''))[1]]
  if len(files) != 1:
    raise RequestError(
        400, 'bad_form', f'The form has {len(files)} files: expected one. Send a request for each image.')
  return bytes(files[0])


def answer_refusal(_, error: RequestError) -> Response:
  """Answers a request that the service refuses."""
  headers = {'Retry-After': str(error.retry_after)} if error.retry_after else {}
  if error.status == 401:
    headers['WWW-Authenticate'] = 'Bearer'
  return JSONResponse({'error': error.code, 'message': str(error)} | error.fields, error.status, headers)


def answer_http_error(request: Request, error: HTTPException) -> Response:
  """Answers a request to an address or with a method that there is not."""
  what = {404: 'not_found', 405: 'wrong_method'}.get(error.status_code, 'refused')
  message = (
      f'{request.method} {request.url.path}: {error.detail}. There are POST /inspect, and GET /, /bank, '
      '/health and /metrics.')
  return JSONResponse({'error': what, 'message': message}, error.status_code, error.headers)


def answer_bug(_, error: Exception) -> Response:
  """Answers a request at which the service failed; the server logs the trace."""
  return JSONResponse({
      'error': 'internal', 'message': f'The service failed at this request ({type(error).__name__}); its log '
      'tells where. Please report it.'}, 500)


class RequestMiddleware:
  """Counts and times all requests, and ends those whose body was not read to its end.

  A client that still sends when the connection is closed may lose the answer. So what it sends is read for a
  while and thrown away, and then the connection is closed.
  """

  def __init__(self, app, *, paths: set[str], meters: ServiceMetrics):
    self._app, self._paths, self._meters = app, paths, meters

  async def __call__(self, scope, receive, send):
    if scope['type'] != 'http':
      await self._app(scope, receive, send)
      return
    began, status = time.perf_counter(), 500
    headers = Headers(scope=scope)
    unread = 'transfer-encoding' in headers or headers.get('content-length', '0') != '0'

    async def watched_receive():
      nonlocal unread
      message = await receive()
      unread = unread and message['type'] == 'http.request' and message.get('more_body', False)
      return message

    async def watched_send(message):
      nonlocal status
      if message['type'] == 'http.response.start':
        status = message['status']
        extra = [(b'x-content-type-options', b'nosniff'), (b'cache-control', b'no-store')]
        if unread:
          extra.append((b'connection', b'close'))
        message = message | {'headers': [*message.get('headers', ()), *extra]}
      elif unread and not message.get('more_body', False):
        await send(message | {'more_body': True})
        with contextlib.suppress(TimeoutError):
          async with asyncio.timeout(_LINGER_SECONDS):
            while unread:
              await watched_receive()
        message = {'type': 'http.response.body', 'body': b''}
      await send(message)

    try:
      await self._app(scope, watched_receive, watched_send)
    finally:
      path = scope['path'] if scope['path'] in self._paths else 'other'
      self._meters.requests.labels(path, status).inc()
      self._meters.seconds.labels(path).observe(time.perf_counter() - began)
