"""A network and images small enough for tests of whole detectors; the network in NumPy too."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

from patchcore_jax import backbones, inspection
from patchcore_jax.backbones import Backbone
from patchcore_jax.banks import calibration
from patchcore_jax.data.dataset import ArrayData
from patchcore_jax.data.pipeline import Batch
from patchcore_jax.detectors import PatchCore, Run, streaming
from patchcore_jax.settings import CoresetSpec, EmbeddingSpec, Preprocessing

LAYERS = ('a', 'b', 'c')
_STRIDES = {'a': 4, 'b': 8, 'c': 8}


def apply(variables, images):
  """One product a layer, of images thinned out: maps of 8 x 6 cells, then 4 x 3."""

  def thinned(stride):
    # XLA for GPUs (JAX 0.10 and 0.11) ends the process where it joins a slice with steps and a product.
    return jax.lax.optimization_barrier(images[:, ::stride, ::stride])

  return {
      name: jnp.tanh(jnp.einsum('bhwc,cd->bhwd', thinned(stride), variables[name], precision='highest'))
      for name, stride in _STRIDES.items()}


def backbone(layers=LAYERS) -> Backbone:
  rng = np.random.default_rng(1)
  channels = {'a': 7, 'b': 6, 'c': 5}
  variables = {k: rng.standard_normal((3, channels[k])).astype(np.float32) for k in LAYERS}
  return Backbone(apply, variables, tuple(layers), (0.5,) * 3, (0.25,) * 3, 'small')


def with_token(layers=('b', 'c')) -> Backbone:
  """Makes the network with a class token as its last layer: the mean of layer 'a'."""
  return dataclasses.replace(backbone(layers), apply=_apply_with_token, layers=(*layers, 'token'))


def _apply_with_token(variables, images):
  found = apply(variables, images)
  return found | {'token': found['a'].mean((1, 2), keepdims=True)}


def maps(images, layers=LAYERS) -> list[np.ndarray]:
  """The feature maps in float64."""
  pixels = (images / 255 - 0.5) / 0.25
  variables = backbone().variables
  return [
      np.tanh(pixels[:, ::_STRIDES[k], ::_STRIDES[k]] @ variables[k].astype(np.float64))
      for k in layers]


def images(n: int, seed: int = 0) -> np.ndarray:
  """[n, 32, 24, 3] uint8: noise of another strength in each image."""
  rng = np.random.default_rng(seed)
  noise = rng.normal(128, rng.uniform(10, 60, (n, 1, 1, 1)), (n, 32, 24, 3))
  return noise.clip(0, 255).astype(np.uint8)


def batches(images: np.ndarray, size: int):
  """Batches of one size, the last one padded."""
  for i in range(0, len(images), size):
    part = images[i:i + size]
    index = np.full(size, -1, np.int32)
    index[:len(part)] = np.arange(i, i + len(part))
    yield Batch(np.pad(part, [(0, size - len(part))] + [(0, 0)] * 3), None, index)


def data(images: np.ndarray, batch_size: int = 8) -> ArrayData:
  """The images as a detector takes them, named as if they were files."""
  return ArrayData(images, batch_size, [f'/line/good/{i}.png' for i in range(len(images))])


def fit(detector, good=None, *, network=None, batch_size: int = 8, **run):
  """A model of the detector; by default of 8 images of noise."""
  good = images(8) if good is None else good
  return detector.fit(data(good, batch_size), (network or backbone(),), Run(**run))


def predict(detector, model, tests, *, network=None, batch_size: int = 8, **arguments):
  """The `Scores` of all images, as one."""
  networks = (network or backbone(),) if detector.needs_network else ()
  score_fn = detector.score_fn(model, networks, **arguments)
  return joined(streaming.predict(
      score_fn, data(tests, batch_size).batches(), image_size=model.description.image_size))


def joined(predictions):
  """The scores of all batches as one."""
  _, scores = zip(*predictions)
  return jax.tree.map(lambda *x: np.concatenate(x), *scores)


def on_devices(count: int, module: str, expression: str):
  """What t.<expression>, an array, is in a process with so many CPU devices; t is a module of tests.

  Fake devices must be asked for before JAX starts, hence another process.
  """
  script = (
      f'import json, jax\nfrom tests import {module} as t\n'
      f'print(json.dumps([jax.local_device_count(), t.{expression}.tolist()]))')
  settings = {
      'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': f'--xla_force_host_platform_device_count={count}',
      'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'}  # most of the time is the compiler's
  result = subprocess.run(
      [sys.executable, '-c', script], env=os.environ | settings, check=True, capture_output=True, text=True)
  found, value = json.loads(result.stdout)
  assert found == count
  return value


def inspector(detector=None, layers=LAYERS, **description) -> inspection.Inspector:
  """Makes an inspector of a bank of noise, with thresholds and pictures; images are cut to 32 x 24 pixels."""
  detector = detector or PatchCore(0.5, EmbeddingSpec('mean'), CoresetSpec(projection_dim=4))
  network = backbones.create('tests.small:backbone', layers=layers)
  model = fit(detector, network=network, keep_images=True).with_description(**{
      'preprocessing': Preprocessing(resize=(40,), crop=(32, 24)),
      'calibration': calibration.calibrate(
          np.linspace(0.03, 0.3, 20), np.linspace(0.02, 0.2, 20), false_alarm_rate=0.1)} | description)
  return inspection.Inspector(detector, model, (network,))
