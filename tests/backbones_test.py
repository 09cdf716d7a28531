"""Backbones by name: the family, random weights, a factory of the user's own."""

import logging as py_logging
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default
from configs.parity import anomalib, paper
from experiments import wiring
from patchcore_jax import backbones
from patchcore_jax.backbones import checkpoints, resnet, simulation
from patchcore_jax.banks.model import BankError, Description, Model
from patchcore_jax.detectors import PatchCore, streaming
from patchcore_jax.evaluation import networks
from tests import precision

_FACTORY = '''
import jax.numpy as jnp
from patchcore_jax.backbones import Backbone

def apply(variables, images):
  return {'a': images[:, ::4, ::4] * variables, 'b': images[:, ::8, ::8]}

def create():
  return Backbone(apply, jnp.ones(()), ('a', 'b'), (0., 0., 0.), (1., 1., 1.))

def product():
  return Backbone(
      lambda variables, images: {'a': images @ variables}, jnp.ones((3, 4)), ('a',), (0.,) * 3, (1.,) * 3)

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
      ({'name': 'resnet18.tv', 'weights': 'x.pth'}, 'No checkpoint'),
      ({'name': 'nothing_here:create'}, "no module 'nothing_here'.*PYTHONPATH"),
      ({'name': 'tests.nothing.here:create'}, "no module 'tests.nothing.here'.*PYTHONPATH"),
      ({'name': 'own_backbone:make'}, "no function 'make'. It has: .*create"),
      ({'name': 'own_backbone:wrong'}, 'returned int'),
      ({'name': 'own_backbone:create', 'layers': ('c',)}, "no layer 'c'. It has: a, b"),
      ({'name': 'own_backbone:create', 'weights': 'x.pth'}, 'has no effect'),
      ({'name': 'own_backbone:create', 'precision': 'bfloat16'},
       "backbone.precision='bfloat16' has no effect on 'own_backbone:create'")])
  def test_errors(self, kwargs, words, own):
    with pytest.raises(ValueError, match=words):
      backbones.create(**kwargs)

  def test_precision_is_kept_and_described(self):
    made = [backbones.create('resnet18', weights='random', precision=p)
            for p in ('float32', 'bfloat16')]
    assert [b.precision for b in made] == ['float32', 'bfloat16']
    exact, rounded = (
        Model({}, Description(
            'patchcore', PatchCore().resolved([b]).settings(), (streaming.identity(b),), (8, 8), 1))
        for b in made)
    streaming.check(PatchCore(), exact, made[:1])
    streaming.check(PatchCore(), rounded, made[1:])
    with pytest.raises(BankError, match="precision: the model has 'float32', .*'bfloat16'"):
      streaming.check(PatchCore(), exact, made[1:])

  def test_own_factory(self, own):
    backbone = backbones.create(f'{own}:create', layers=('b',))
    assert backbone.name == 'own_backbone:create' and backbone.layers == ('b',)
    assert backbone.apply(backbone.variables, jnp.ones((1, 16, 16, 3)))['b'].shape == (1, 2, 2, 3)

  def test_the_real_one_beside_the_project(self, realdata, monkeypatch):
    monkeypatch.syspath_prepend(realdata / 'mobilenet_v2')
    backbone = backbones.create('mobilenet_v2:create')
    assert backbone.layers == ('block_6_expand', 'block_13_expand')


class TestPrecision:

  @pytest.mark.parametrize('precision_name, name, platform, expected', [
      ('auto', 'resnet18.tv_in1k', 'cpu', 'float32'),
      ('auto', 'resnet18.tv_in1k', 'gpu', resnet.AUTO_PRECISIONS['gpu']),
      ('auto', 'resnet18.tv_in1k', 'tpu', resnet.AUTO_PRECISIONS['tpu']),
      ('auto', 'resnet18.tv_in1k', 'another', 'float32'), ('auto', 'module:factory', 'gpu', 'float32'),
      ('bfloat16', 'resnet18.tv_in1k', 'cpu', 'bfloat16')])
  def test_what_auto_stands_for(self, precision_name, name, platform, expected):
    assert backbones.resolve_precision(precision_name, name, platform) == expected

  def test_a_network_has_a_mode_and_never_auto(self, own, monkeypatch):
    made = backbones.create('resnet18', weights='random')
    expected = backbones.resolve_precision('auto', 'resnet18')
    assert made.precision == streaming.identity(made).precision == expected
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    assert backbones.create('resnet18', weights='random').precision == resnet.AUTO_PRECISIONS['gpu']
    for name in ('auto', 'float32'):
      assert backbones.create(f'{own}:create', precision=name).precision == 'float32'

  def test_configs(self, own, monkeypatch):
    """What is run and written down is the mode, of the machine that began."""
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')

    def resolved(name, config=default):
      config = config.get_config()
      config.backbone.name = name
      return networks.resolved(wiring.settings(config)).backbone.precision

    assert default.get_config().backbone.precision == 'auto'
    assert resolved('resnet18.tv_in1k') == resolved('resnet18.tv_in1k + resnet50.tv_in1k') == (
        resnet.AUTO_PRECISIONS['gpu'])
    assert resolved(f'{own}:create') == 'float32'
    assert resolved('resnet18.tv_in1k', paper) == resolved('resnet18.tv_in1k', anomalib) == 'float32'
    # Of networks that differ in it, each finds its own.
    assert resolved(f'resnet18.tv_in1k+{own}:create') == 'auto'

  def test_elsewhere(self, own, monkeypatch):
    def made(name, precision, **kwargs):
      backbone = backbones.create(name, precision=precision, **kwargs)
      return backbone, backbones.computed_elsewhere(backbone)

    on_cpu = jax.default_backend() == 'cpu'
    for device in ('cpu', 'gpu'):
      monkeypatch.setattr(jax, 'default_backend', lambda device=device: device)
      for mode in resnet.PRECISIONS:
        here, there = made(checkpoints.BUILT_IN, mode)
        images = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), np.uint8)
        run = {k: jax.jit(lambda x, b=b: b.apply(b.variables, backbones.normalize(x, b.mean, b.std)))
               for k, b in (('here', here), ('there', there))}
        assert here.precision == there.precision == mode and here.layers == there.layers
        assert (here.elsewhere is None) == (mode == 'float32')
        if on_cpu:
          found = {k: f(images) for k, f in run.items()}
          same = all((found['here'][k] == found['there'][k]).all() for k in here.layers)
          # A CPU that passes for a GPU still computes tensorfloat32 as float32.
          assert same == (mode == 'float32' or (mode, device) == ('tensorfloat32', 'gpu'))
          np.testing.assert_array_equal(found['here']['colour'], found['there']['colour'])

  def test_elsewhere_of_a_factory(self, own, monkeypatch):
    """JAX gives it float32 on a CPU and less on others, if it does not ask for more itself."""
    assert backbones.create(f'{own}:create').elsewhere is None
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    backbone = backbones.create(f'{own}:product')
    images = jnp.ones((1, 8, 8, 3))
    here, there = (
        precision.lowered(f, backbone.variables, images, platform='cuda')
        for f in (backbone.apply, backbone.elsewhere))
    assert [o.precision for o in here] == ['DEFAULT'] and [o.precision for o in there] == ['HIGHEST']
    first, again = (backbones.create(f'{own}:create').elsewhere for _ in range(2))
    assert first is again is not None  # so that it is compiled once


class TestSimulation:

  def test_equals_rounded_operands(self):
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(s).astype(np.float32) for s in ((3, 40), (40, 5)))

    def bits(values, n):
      shifted = values.astype(np.float64) * (1 + 2.0**(52 - n))  # Veltkamp: to the nearest
      return shifted - (shifted - values)

    def apply(variables, images):
      return jax.nn.relu(images @ variables), jnp.dot(images, variables, precision='highest')

    rounded, exact = jax.jit(simulation.on_gpu(apply))(w, x)
    np.testing.assert_allclose(rounded, np.maximum(bits(x, 10) @ bits(w, 10), 0), rtol=0, atol=1e-5)
    np.testing.assert_allclose(exact, x.astype(np.float64) @ w, rtol=0, atol=1e-5)
    assert np.abs(np.maximum(exact, 0) - rounded).max() > 1e-4
    both = jax.jit(simulation.in_bfloat16(apply))(w, x)
    for found in both:
      np.testing.assert_array_equal(found, found.astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_allclose(both[1], bits(x, 7) @ bits(w, 7), rtol=2.0**-8, atol=1e-5)

  @pytest.mark.parametrize('mode, most', [('float32', 2e-6), ('tensorfloat32', 2e-3), ('bfloat16', 2e-2)])
  def test_a_network_as_on_a_gpu(self, mode, most):
    """What is for CUDA only is taken: bfloat16 arrays, 1x1 convolutions as such."""
    layers = ('layer1', 'layer2')
    variables = resnet.truncate(resnet.init('resnet18_slim'), layers)
    images = np.random.default_rng(0).standard_normal((1, 64, 64, 3)).astype(np.float32)
    apply = resnet.apply_fn('resnet18_slim', layers, mode)
    exact = resnet.apply_fn('resnet18_slim', layers)(variables, images)
    found = jax.jit(simulation.on_gpu(apply))(variables, images)
    for layer in layers:
      off = np.linalg.norm(found[layer] - exact[layer]) / np.linalg.norm(exact[layer])
      assert most / 30 < off < most
    program = str(jax.make_jaxpr(simulation.on_gpu(apply))(variables, images))
    assert ('bf16' in program) == (mode == 'bfloat16')
    assert program.count('dot_general') == (1 if mode == 'float32' else 0)


def test_auto_is_what_is_installed(tmp_path, monkeypatch):
  """tests/checkpoints_test.py has how that is found."""
  monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path))
  monkeypatch.setattr('huggingface_hub.hf_hub_download', None)  # nothing is downloaded
  monkeypatch.setitem(sys.modules, checkpoints.find(checkpoints.OFFLINE).module, None)
  assert backbones.create('auto').name == checkpoints.BUILT_IN


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
