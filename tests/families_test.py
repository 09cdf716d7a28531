"""The contract of a family of networks: what holds for all that are registered, and for one made up here."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from experiments import parity_successors
from patchcore_jax import backbones
from patchcore_jax.backbones import densenet, local_colour, port, registry, vit
from tests import densenet_test, precision

pytestmark = pytest.mark.accelerator


def _transformer() -> backbones.Family:
  """Makes a family as unlike a ResNet as one can be: tokens, a patch size, weights of another layout."""
  patch, width, blocks = 8, 16, ('block0', 'block1', 'block2')
  product = functools.partial(jnp.einsum, precision='highest')

  def needed(layers):
    return blocks[:1 + max(map(blocks.index, layers))]

  @functools.cache
  def build(architecture, layers, precision):

    def apply(variables, images):
      b, h, w, _ = images.shape
      grid = h // patch, w // patch
      patches = images.reshape(b, grid[0], patch, grid[1], patch, 3)
      tokens = product('bypxqc,pqcd->byxd', patches, variables['embed']).reshape(b, -1, width)
      tokens = jnp.concatenate([jnp.tile(variables['cls_token'], (b, 1, 1)), tokens], axis=1)
      maps = {}
      for block in needed(layers):
        attention = jax.nn.softmax(product('bid,bjd->bij', tokens, tokens) / width**0.5)
        tokens = tokens + product('bij,bjd,de->bie', attention, tokens, variables[block])
        maps[block] = tokens[:, 1:].reshape(b, *grid, width)
      return {layer: maps[layer] for layer in layers}

    return apply

  def init(architecture, seed):
    rng = np.random.default_rng(seed)
    shapes = dict.fromkeys(blocks, (width, width)) | {
        'embed': (patch, patch, 3, width), 'cls_token': (1, 1, width)}
    return {key: rng.standard_normal(s, np.float32) / np.float32(width) for key, s in shapes.items()}

  def state_dict_shapes(architecture):
    weights = {f'blocks.{i}.weight': (width, width) for i in range(len(blocks))}
    return weights | {
        'patch_embed.weight': (width, 3, patch, patch), 'cls_token': (1, 1, width), 'head.weight': None}

  def convert(state_dict, architecture):
    weights = {f'block{i}': state_dict[f'blocks.{i}.weight'].T for i in range(len(blocks))}
    embed = state_dict['patch_embed.weight'].transpose(2, 3, 1, 0)
    return weights | {'embed': embed, 'cls_token': state_dict['cls_token']}

  return backbones.Family(
      architectures=('vit_toy_patch8',), layers=lambda architecture: blocks,
      default_layers=lambda architecture: blocks[1:], build=build, init=init,
      state_dict_shapes=state_dict_shapes, convert=convert,
      truncate=lambda variables, layers: {
          k: variables[k] for k in ('embed', 'cls_token', *needed(layers))},
      multiple=lambda architecture: patch)


FAMILIES = (  # the smallest of each is compiled
    *(family for family in registry.FAMILIES if family not in (densenet.FAMILY, vit.FAMILY)),
    densenet_test.FAMILY, vit.family_of(vit.ARCHITECTURES | parity_successors.TINY), _transformer())


@pytest.fixture(scope='module', params=FAMILIES, ids=lambda family: next(iter(family.architectures)))
def family(request):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(registry, 'FAMILIES', FAMILIES)
    yield request.param


@pytest.fixture(scope='module')
def architecture(family):
  """The family's smallest."""
  return min(family.architectures, key=lambda a: sum(map(math.prod, _needed(family, a).values())))


@pytest.fixture(scope='module')
def variables(family, architecture):
  """Makes variables of the whole network."""
  return family.init(architecture, 0)


@pytest.fixture(scope='module')
def images(family, architecture):
  height, width = _size(family, architecture)
  return np.random.default_rng(0).standard_normal((3, height, width, 3)).astype(np.float32)


@pytest.fixture(scope='module')
def apply(family, architecture):
  """All layers, compiled."""
  return jax.jit(family.build(architecture, family.layers(architecture), 'float32'))


@pytest.fixture(scope='module')
def maps(apply, variables, images):
  return apply(variables, images)


class TestLayers:

  def test_names(self, family):
    everywhere = [name for other in FAMILIES for name in other.architectures]
    assert len(everywhere) == len(set(everywhere))
    for architecture in family.architectures:
      assert not set('.:+') & set(architecture) and registry.find_family(architecture) is family
      layers, default = family.layers(architecture), family.default_layers(architecture)
      assert len(set(layers)) == len(layers) and local_colour.NAME not in layers
      learnt = [layer for layer in default if layer != local_colour.NAME]
      assert learnt and learnt == [layer for layer in layers if layer in learnt]

  def test_a_deeper_layer_needs_more_variables(self, family, architecture, variables):
    needed = [_names(family.truncate(variables, (layer,))) for layer in family.layers(architecture)]
    # Two layers may be of one depth.
    assert needed[0] < needed[-1] and all(shallow <= deep for shallow, deep in itertools.pairwise(needed))
    assert needed[-1] == _names(variables)  # nothing lies behind the deepest

  def test_maps(self, family, architecture, variables):
    layers, (height, width) = family.layers(architecture), _size(family, architecture)
    found = {}
    for size in ((height, width), (2 * height, width), (height, 2 * width)):
      shapes = _shapes(family.build(architecture, layers, 'float32'), variables, (2, *size))
      assert shapes.keys() == set(layers)
      assert all(s.dtype == jnp.float32 and s.ndim == 4 and s.shape[0] == 2 for s in shapes.values())
      found[size] = np.array([shapes[layer].shape[1:3] for layer in layers if not layer.endswith('.cls')])
      assert all(s.shape[1:3] == (1, 1) for layer, s in shapes.items() if layer.endswith('.cls'))
      assert (np.diff(found[size], axis=0) <= 0).all()  # shallow to deep
    once, taller, wider = found.values()
    assert (taller // once == (2, 1)).all() and (wider // once == (1, 2)).all()

  @pytest.mark.parametrize('remainder', [1, 5])
  def test_sizes_of_images(self, family, architecture, remainder):
    multiple, (height, width) = family.multiple(architecture), _size(family, architecture)
    backbone = backbones.create(
        architecture, weights='random', layers=(family.layers(architecture)[0], local_colour.NAME))
    assert _shapes(backbone.apply, backbone.variables, (1, height, width)).keys() == set(backbone.layers)
    for size in ((height + remainder, width), (height, width + remainder)):
      if multiple == 1:
        assert _shapes(backbone.apply, backbone.variables, (1, *size)).keys() == set(backbone.layers)
        continue
      words = f'multiples of {multiple} pixels; these are {size[0]} x {size[1]}. Set preprocess.crop .*'
      with pytest.raises(ValueError, match=words + f'\\({height}, {width}\\)'):
        _shapes(backbone.apply, backbone.variables, (1, *size))


class TestValues:

  def test_same_again(self, apply, variables, images, maps):
    for layer, again in apply(variables, images).items():
      np.testing.assert_array_equal(again, maps[layer])
      assert np.isfinite(again).all() and again.std() > 0

  def test_batch_size_has_no_influence(self, apply, variables, images, maps):
    for i in range(len(images)):
      for layer, alone in apply(variables, images[i:i + 1]).items():
        _assert_same(alone[0], maps[layer][i], maps[layer])

  def test_only_the_layers_asked_for(self, family, architecture, images, maps):
    layers = family.layers(architecture)[1::-1]  # in any order
    backbone = backbones.create(architecture, weights='random', layers=layers, precision='float32')
    assert backbone.layers == layers
    assert _names(backbone.variables) < _names(family.init(architecture, 0))
    found = jax.jit(backbone.apply)(backbone.variables, images)
    assert found.keys() == set(layers)
    for layer in layers:
      _assert_same(found[layer], maps[layer], maps[layer])

  def test_random_variables_follow_the_seed(self, family, architecture, variables):
    again, other = (backbones.fingerprint(family.init(architecture, seed)) for seed in (0, 1))
    assert again == backbones.fingerprint(variables) != other


class TestCreate:

  def test_compiled_once(self, family, architecture):
    for layers in ((), family.layers(architecture)[:1], (*family.layers(architecture), local_colour.NAME)):
      for mode in family.precisions:
        first, again = (backbones.create(
            architecture, weights='random', layers=layers, precision=mode, seed=seed) for seed in (0, 1))
        assert first.apply is again.apply and first.elsewhere is again.elsewhere
        assert first.layers == (layers or family.default_layers(architecture))
        assert first.name == f'{architecture}.random'

  def test_precisions(self, family, architecture, variables, monkeypatch):
    assert 'float32' in family.precisions and set(family.auto_precisions.values()) <= set(family.precisions)
    layers, size = family.layers(architecture), _size(family, architecture)
    for device in ('cpu', 'gpu', 'tpu'):
      monkeypatch.setattr(jax, 'default_backend', lambda device=device: device)
      auto = backbones.create(architecture, weights='random')
      assert auto.precision == family.auto_precisions.get(device, 'float32')
      for mode in family.precisions:
        backbone = backbones.create(architecture, weights='random', layers=layers, precision=mode)
        assert backbone.precision == mode and (backbone.elsewhere is None) == (mode == 'float32')
        assert all(s.dtype == jnp.float32 for s in _shapes(backbone.apply, variables, (1, *size)).values())
    expected = f"precision='half': expected 'auto', {', '.join(map(repr, family.precisions))}"
    with pytest.raises(ValueError, match=expected):
      backbones.create(architecture, weights='random', precision='half')

  def test_float32_asks_for_the_highest_precision(self, family, architecture, variables, images):
    apply = family.build(architecture, family.layers(architecture), 'float32')
    precision.assert_highest(apply, variables, images)

  def test_unknown_layer(self, family, architecture):
    there = ', '.join((*family.layers(architecture), local_colour.NAME))
    with pytest.raises(ValueError, match=f"no layer 'nowhere'. It has: {there}"):
      backbones.create(architecture, weights='random', layers=('nowhere',))


class TestCheckpoint:

  def test_fills_every_variable(self, family, architecture, variables, tmp_path):
    state = _state(family, architecture)
    found = port.port(state, family, architecture)
    assert jax.tree.structure(found) == jax.tree.structure(variables)
    for value, like in zip(jax.tree.leaves(found), jax.tree.leaves(variables)):
      assert value.shape == like.shape and value.dtype == like.dtype == np.float32
    safetensors.numpy.save_file(state, tmp_path / 'mine.safetensors')
    backbone = backbones.create(architecture, weights=str(tmp_path / 'mine.safetensors'))
    assert backbone.name == architecture
    learnt = [layer for layer in backbone.layers if layer != local_colour.NAME]
    assert backbones.fingerprint(backbone.variables) == backbones.fingerprint(family.truncate(found, learnt))

  def test_what_has_no_use_may_be_there(self, family, architecture):
    state = _state(family, architecture)
    unused = {k: np.zeros(2) for k in family.state_dict_shapes(architecture).keys() - state.keys()}
    with_unused = port.port(state | unused, family, architecture)
    assert backbones.fingerprint(with_unused) == backbones.fingerprint(port.port(state, family, architecture))

  def test_every_key_counts(self, family, architecture):
    state = _state(family, architecture)
    for key in (next(iter(state)), list(state)[-1]):
      with pytest.raises(port.PortError, match=f'my.pth .*missing in the file: {key}'):
        port.port({k: v for k, v in state.items() if k != key}, family, architecture, source='my.pth')
      with pytest.raises(port.PortError, match=f'wrong shape: {key} \\(7,\\), expected'):
        port.port(state | {key: np.zeros(7)}, family, architecture)
    with pytest.raises(port.PortError, match='left over in the file: layer99.weight'):
      port.port(state | {'layer99.weight': np.zeros(3)}, family, architecture)


def _needed(family, architecture):
  """{key: shape} of what a checkpoint must have."""
  return {k: s for k, s in family.state_dict_shapes(architecture).items() if s is not None}


def _state(family, architecture):
  """A checkpoint; values are positive, as variances must be."""
  rng = np.random.default_rng(0)
  return {k: rng.uniform(0.1, 1, s).astype(np.float32) for k, s in _needed(family, architecture).items()}


def _names(variables):
  return {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(variables)}


def _size(family, architecture):
  """Height and width of small images that the network takes."""
  multiple = family.multiple(architecture)
  side = math.ceil(32 / multiple) * multiple
  return 2 * side, 3 * side


def _shapes(apply, variables, shape):
  return jax.eval_shape(apply, variables, jax.ShapeDtypeStruct((*shape, 3), jnp.float32))


def _assert_same(found, expected, maps):
  # The order of the products' sums may differ; Winograd's transforms enlarge that a little.
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * float(maps.std()))
