"""Backbones by name: the family, random weights, a factory of the user's own."""

import logging as py_logging
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from patchcore_jax import backbones, memory_bank
from patchcore_jax.backbones import checkpoints
from patchcore_jax.detectors import patchcore
from patchcore_jax.embedding import EmbeddingSpec

_FACTORY = '''
import jax.numpy as jnp
from patchcore_jax.backbones import Backbone

def apply(variables, images):
  return {'a': images[:, ::4, ::4] * variables, 'b': images[:, ::8, ::8]}

def create():
  return Backbone(apply, jnp.ones(()), ('a', 'b'), (0., 0., 0.), (1., 1., 1.))

def wrong():
  return 3
'''


@pytest.fixture
def own(tmp_path, monkeypatch):
  (tmp_path / 'own_backbone.py').write_text(_FACTORY)
  monkeypatch.syspath_prepend(tmp_path)
  yield 'own_backbone'
  sys.modules.pop('own_backbone', None)


class TestCreate:

  def test_random_weights_are_said_loudly(self, caplog):
    with caplog.at_level(py_logging.WARNING, logger='absl'):
      backbone = backbones.create('resnet18', weights='random')
    assert 'RANDOM WEIGHTS' in caplog.text
    assert backbone.name == 'resnet18.random' and backbone.layers == ('layer2', 'layer3')

  def test_never_random_unless_asked(self, monkeypatch):
    def offline(checkpoint):
      raise backbones.checkpoints.DownloadError('no network')
    monkeypatch.setattr(backbones.checkpoints, 'fetch', offline)
    with pytest.raises(ValueError, match='no network'):
      backbones.create('resnet18.tv_in1k')

  def test_the_one_in_the_package(self, monkeypatch):
    monkeypatch.setattr('huggingface_hub.hf_hub_download', None)  # nothing is downloaded
    backbone = backbones.create('resnet18_slim.procedural')
    assert backbone.name == checkpoints.BUILT_IN and backbone.layers == ('layer1', 'layer2', 'colour')
    images = np.random.default_rng(0).integers(0, 256, (2, 96, 64, 3), np.uint8)
    maps = jax.jit(backbone.apply)(
        backbone.variables, backbones.normalize(images, backbone.mean, backbone.std))
    assert maps['layer1'].shape == (2, 24, 16, 32) and maps['layer2'].shape == (2, 12, 8, 64)
    for values in (maps['layer1'], maps['layer2']):  # lengths of about 1 on drawn images; more on noise
      assert np.isfinite(values).all() and 0.1 < float(jnp.square(values).sum(-1).mean()) < 30
    with pytest.raises(ValueError, match="no layer 'layer4'. It has: stem, layer1, layer2, layer3, colour"):
      backbones.create(checkpoints.BUILT_IN, layers=('layer4',))

  @pytest.mark.parametrize('kwargs, words', [
      ({'name': 'auto', 'weights': 'x.pth'}, "has no effect on 'auto'"),
      ({'name': 'vgg'}, "Unknown backbone 'vgg'. There are resnet18"),
      ({'name': 'resnet18'}, 'resnet18.tv_in1k'),
      ({'name': 'resnet18', 'weights': 'random', 'layers': ('layer7',)}, "no layer 'layer7'.*layer4"),
      ({'name': 'resnet18.tv', 'weights': 'x.pth'}, 'No checkpoint'),
      ({'name': 'nothing_here:create'}, "no module 'nothing_here'.*PYTHONPATH"),
      ({'name': 'own_backbone:make'}, "no function 'make'. It has: .*create"),
      ({'name': 'own_backbone:wrong'}, 'returned int'),
      ({'name': 'own_backbone:create', 'layers': ('c',)}, "no layer 'c'. It has: a, b"),
      ({'name': 'own_backbone:create', 'weights': 'x.pth'}, 'has no effect'),
      ({'name': 'own_backbone:create', 'precision': 'bfloat16'},
       "backbone.precision='bfloat16' has no effect on 'own_backbone:create'"),
      ({'name': 'resnet18', 'weights': 'random', 'precision': 'half'},
       "backbone.precision='half': expected one of 'float32', 'tensorfloat32', 'bfloat16'")])
  def test_errors(self, kwargs, words, own):
    with pytest.raises(ValueError, match=words):
      backbones.create(**kwargs)

  def test_precision_is_kept_and_described(self):
    made = [backbones.create('resnet18', weights='random', precision=p)
            for p in ('float32', 'bfloat16')]
    assert [b.precision for b in made] == ['float32', 'bfloat16']
    spec = EmbeddingSpec()
    exact, rounded = (patchcore.describe(b, spec) for b in made)
    with pytest.raises(memory_bank.BankError, match="precision: the bank has 'float32', .*'bfloat16'"):
      memory_bank.check(exact, rounded)

  def test_own_factory(self, own):
    backbone = backbones.create(f'{own}:create', layers=('b',))
    assert backbone.name == 'own_backbone:create' and backbone.layers == ('b',)
    assert backbone.apply(backbone.variables, jnp.ones((1, 16, 16, 3)))['b'].shape == (1, 2, 2, 3)

  def test_the_real_one_beside_the_project(self, realdata, monkeypatch):
    monkeypatch.syspath_prepend(realdata / 'mobilenet_v2')
    backbone = backbones.create('mobilenet_v2:create')
    assert backbone.layers == ('block_6_expand', 'block_13_expand')


class TestBestAvailable:

  def test_the_built_in_one_where_the_better_cannot_be_had(self, monkeypatch, caplog):
    def offline(*args, **kwargs):
      raise OSError('no route to the hub')
    monkeypatch.setattr('huggingface_hub.hf_hub_download', offline)
    with caplog.at_level(py_logging.WARNING, logger='absl'):
      backbone = backbones.create('auto')
    assert backbone.name == checkpoints.BUILT_IN
    for words in ('BUILT-IN', 'wide_resnet50_2.tv_in1k', 'no route to the hub', 'backbone.weights=PATH'):
      assert words in caplog.text

  def test_the_better_where_it_lies(self, monkeypatch):
    monkeypatch.setattr('huggingface_hub.hf_hub_download', lambda *args, **kwargs: 'model.safetensors')
    assert backbones.best_available() == checkpoints.PREFERRED


class TestFingerprint:

  def test_changes_with_any_weight(self):
    variables = {'a': np.zeros(3, np.float32), 'b': np.ones((2, 2), np.float32)}
    first = backbones.fingerprint(variables)
    assert first == backbones.fingerprint(jax.tree.map(jnp.asarray, variables))
    variables['b'][1, 1] += 1e-6
    assert backbones.fingerprint(variables) != first


class TestNormalize:

  def test_equals_float64(self):
    images = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 3), np.uint8)
    mean, std = backbones.checkpoints.IMAGENET_MEAN, backbones.checkpoints.IMAGENET_STD
    expected = (images / 255 - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(backbones.normalize(images, mean, std), expected, atol=1e-6)
