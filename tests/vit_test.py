"""Vision Transformers against definitions in NumPy; `experiments.parity` compares them with timm's."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

import patchcore_jax as pc
from experiments import parity_successors, reference
from patchcore_jax import backbones, settings
from patchcore_jax.backbones import arithmetic, checkpoints, port, vit
from tests import command, precision

pytestmark = pytest.mark.accelerator

FAMILY = vit.family_of(vit.ARCHITECTURES | parity_successors.TINY)
NAMES = tuple(parity_successors.TINY)


@functools.cache
def _variables(name):
  shapes = FAMILY.state_dict_shapes(name)
  return port.port({k: reference.successor_weight(1, k, s) for k, s in shapes.items()}, FAMILY, name)


@functools.cache
def _images(name, rows=3, columns=5, number=1):
  patch = FAMILY.multiple(name)
  rng = np.random.default_rng(0)
  return rng.standard_normal((number, rows * patch, columns * patch, 3)).astype(np.float32)


@functools.cache
def _apply(name, layers, **kwargs):
  model = vit.VisionTransformer(FAMILY.architectures[name], layers, arithmetic.Arithmetic(**kwargs))
  return jax.jit(model.apply)(_variables(name), _images(name))


def _close(found, expected, tolerance):
  difference = np.linalg.norm(np.asarray(found, np.float64) - expected)
  assert difference <= tolerance * np.linalg.norm(expected), difference / np.linalg.norm(expected)


class TestPositions:

  @pytest.mark.parametrize('old, new', [(37, 16), (37, 40), (5, 4), (5, 7)])
  @pytest.mark.parametrize('interpolation', ['timm', 'meta', 'anomalib'])
  def test_a_constant_stays(self, old, new, interpolation):
    matrix = vit.resample_matrix(old, new, interpolation)
    assert matrix.shape == (new, old)
    np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-6)

  def test_a_line_stays_one_inside(self):
    for interpolation, scale in (('timm', 37 / 40), ('meta', 37 / 40.1), ('anomalib', 37 / 40)):
      found = vit.resample_matrix(37, 40, interpolation) @ np.arange(37)
      expected = scale * (np.arange(40) + 0.5) - 0.5
      # A cubic of a = -1/2 keeps lines, one of -3/4 nearly.
      limit = 1e-4 if interpolation == 'timm' else 0.15
      assert np.abs(found - expected)[4:-4].max() < limit

  def test_rows_and_columns_are_not_exchanged(self):
    learnt = np.zeros((1, 25, 2), np.float32)
    learnt[0, :, 0] = np.repeat(np.arange(5), 5)  # by row
    learnt[0, :, 1] = np.tile(np.arange(5), 5)  # by column
    found = np.asarray(vit.resampled(jnp.asarray(learnt), (3, 7))).reshape(3, 7, 2)
    expected = np.stack(np.meshgrid(found[:, 0, 0], found[0, :, 1], indexing='ij'), -1)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert (np.diff(found[:, 0, 0]) > 0.5).all() and (np.diff(found[0, :, 1]) > 0.2).all()

  def test_the_native_grid_is_left_alone(self):
    learnt = jnp.asarray(np.random.default_rng(0).standard_normal((1, 25, 3)), jnp.float32)
    for interpolation in ('timm', 'meta'):
      assert vit.resampled(learnt, (5, 5), interpolation) is learnt

  def test_an_angle_is_two_pi_times_the_coordinate_over_the_period(self):
    sines, cosines = vit.rotary_tables(3, 4, 8)
    for row in range(3):
      for column in range(4):
        u, v = 2 * (row + 0.5) / 3 - 1, 2 * (column + 0.5) / 4 - 1
        angles = [2 * math.pi * u, 2 * math.pi * u / 10, 2 * math.pi * v, 2 * math.pi * v / 10] * 2
        np.testing.assert_allclose(sines[4 * row + column], np.sin(angles), atol=1e-6)
        np.testing.assert_allclose(cosines[4 * row + column], np.cos(angles), atol=1e-6)


class TestAttention:

  @pytest.mark.parametrize('for_cpu', [True, False])
  @pytest.mark.parametrize('rotated', [True, False])
  def test_by_definition(self, for_cpu, rotated):
    arch = vit.Architecture(8, 1, 2, 16, bias='qkv')
    rng = np.random.default_rng(0)
    x, w, wo = (rng.standard_normal(s) / 3 for s in ((2, 5, 8), (8, 24), (8, 8)))
    bias, out_bias = rng.standard_normal(24), rng.standard_normal(8)
    angles = np.concatenate([np.zeros((1, 2)), rng.uniform(0, 6, (4, 2))])
    y = x @ w + bias
    expected = np.zeros((2, 5, 8))
    for image in range(2):
      for head in range(2):
        q, k, v = (y[image, :, 8 * i + 4 * head:8 * i + 4 * head + 4] for i in range(3))
        if rotated:  # channels m and m + d / 2 are the plane that is turned
          q, k = ((z[:, :2] + 1j * z[:, 2:]) * np.exp(1j * angles) for z in (q, k))
          q, k = (np.concatenate([z.real, z.imag], 1) for z in (q, k))
        weights = np.exp(q @ k.T / 2)
        expected[image, :, 4 * head:4 * head + 4] = weights / weights.sum(1, keepdims=True) @ v
    twice = np.tile(angles, 2).astype(np.float32)
    variables = jax.tree.map(np.float32, {
        'qkv': {'kernel': w, 'bias': bias}, 'proj': {'kernel': wo, 'bias': out_bias}})
    rotary = (np.sin(twice), np.cos(twice)) if rotated else None
    found = vit.Attention(arch, arithmetic.Arithmetic(for_cpu=for_cpu)).apply(
        {'params': variables}, jnp.asarray(x, jnp.float32), rotary)
    _close(found, expected @ wo + out_bias, 1e-6)

  def test_large_logits_stay_finite(self):
    arch = vit.Architecture(4, 1, 1, 4)
    variables = {'qkv': {'kernel': np.full((4, 12), 100, np.float32), 'bias': np.zeros(12, np.float32)},
                 'proj': {'kernel': np.eye(4, dtype=np.float32), 'bias': np.zeros(4, np.float32)}}
    found = vit.Attention(arch).apply({'params': variables}, jnp.ones((1, 3, 4)))
    np.testing.assert_allclose(found, 400)


class TestNetwork:

  @pytest.mark.parametrize('name', NAMES)
  def test_the_way_on_cpus_equals_that_on_accelerators(self, name):
    found, expected = (_apply(name, ('blocks.1',), for_cpu=for_cpu)['blocks.1'] for for_cpu in (True, False))
    _close(found, np.asarray(expected, np.float64), 2e-6)

  def test_normed_is_raw_of_mean_0_and_variance_1_scaled(self):
    name = NAMES[1]
    maps, norm = _apply(name, ('blocks.1.raw', 'blocks.1')), _variables(name)['params']['norm']
    raw = np.asarray(maps['blocks.1.raw'], np.float64)
    centred = raw - raw.mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * norm['scale'] + norm['bias']
    _close(maps['blocks.1'], expected, 1e-6)

  @pytest.mark.parametrize('for_cpu', [True, False])
  def test_bfloat16_stays_close_and_differs(self, for_cpu):
    exact, found = (np.asarray(_apply(NAMES[1], ('blocks.1',), precision=mode, for_cpu=for_cpu)['blocks.1'])
                    for mode in ('float32', 'bfloat16'))
    assert 1e-3 < np.linalg.norm(found - exact) / np.linalg.norm(exact) < 2e-2

  @pytest.mark.parametrize('mode, expected', [
      ('float32', ('f32', 'HIGHEST')), ('tensorfloat32', ('f32', 'HIGH')), ('bfloat16', ('bf16', 'DEFAULT'))])
  def test_the_products_that_a_gpu_is_given(self, mode, expected):
    name = NAMES[0]
    apply = FAMILY.build(name, ('blocks.0',), mode)
    found = precision.lowered(apply, _variables(name), _images(name), platform='cuda')
    products = {(*set(operation.operands), operation.precision) for operation in found}
    # Positions are float32 in every mode.
    assert products == {expected, ('f32', 'HIGHEST')}

  def test_a_patch_lies_where_its_pixels_are(self):
    name = 'vit_tiny_swiglu_dinov3'
    images = np.zeros((1, 64, 112, 3), np.float32)
    changed = images.copy()
    changed[0, 32:48, 80:96] = 1  # the patch in row 2, column 5
    embedding = vit.PatchEmbedding(FAMILY.architectures[name])
    variables = {'params': _variables(name)['params']['patch_embed']}
    before, after = (embedding.apply(variables, x)[0] for x in (images, changed))
    (where,) = np.nonzero(np.any(before != after, axis=-1))
    assert where.tolist() == [2 * 7 + 5]


class TestCheckpoints:

  @pytest.mark.parametrize('record', [
      record for record in checkpoints.CHECKPOINTS.values() if record.name.startswith('vit_')],
      ids=lambda record: record.name)
  def test_keys_and_shapes(self, record):
    """What section 1.7 of the reference says of timm's files, counted."""
    arch = vit.ARCHITECTURES[record.name.partition('.')[0]]
    shapes = FAMILY.state_dict_shapes(record.name.partition('.')[0])
    c = arch.width
    last = f'blocks.{arch.blocks - 1}.'
    of_block = {k.removeprefix(last): s for k, s in shapes.items() if k.startswith(last)}
    version_3 = 'dinov3' in record.name
    assert shapes['patch_embed.proj.weight'] == (c, 3, *[16 if version_3 else 14] * 2)
    assert shapes.get('reg_token') == ((1, 4, c) if version_3 or 'reg4' in record.name else None)
    assert shapes.get('pos_embed') == (None if version_3 else (1, 1369 if 'reg4' in record.name else 1370, c))
    assert of_block['attn.qkv.weight'] == (3 * c, c)
    assert ('attn.qkv.bias' in of_block) != version_3
    assert {'attn.q_bias', 'attn.v_bias'} <= of_block.keys() or 'qkvb' not in record.name
    assert of_block['gamma_1' if version_3 else 'ls1.gamma'] == (c,)
    split = any(size in record.name for size in ('plus', '7b'))
    products = {'fc1_g', 'fc1_x', 'fc2'} if split else {'fc1', 'fc2'}
    assert {k.split('.')[1] for k in of_block if k.startswith('mlp.')} == products
    hidden, given = of_block['mlp.fc2.weight'][::-1]
    assert given == c and of_block[f'mlp.{min(products)}.weight'][0] == hidden * (
        2 if 'giant' in record.name else 1)
    if 'small' in record.name and 'plus' not in record.name:
      assert len(shapes) == {(False, False): 174, (False, True): 175, (True, True): 162}[
          version_3, version_3 or 'reg4' in record.name] + 24 * ('qkvb' in record.name)

  @pytest.mark.parametrize('architecture, values', [
      ('vit_small_patch14_dinov2', 22_056_192), ('vit_giant_patch14_dinov2', 1_136_479_232),
      ('vit_base_patch14_reg4_dinov2', 86_579_712 + 3 * 768), ('vit_small_patch16_dinov3', 21_586_944),
      ('vit_small_plus_patch16_dinov3', 28_683_264), ('vit_huge_plus_patch16_dinov3', 840_509_440),
      ('vit_7b_patch16_dinov3', 6_716_030_976),
      ('vit_large_patch16_dinov3_qkvb', 303_079_424 + 2 * 24 * 1024)])
  def test_number_of_values(self, architecture, values):
    assert sum(map(math.prod, FAMILY.state_dict_shapes(architecture).values())) == values

  @pytest.mark.parametrize('name', [
      'vit_small_patch16_dinov3.lvd1689m', 'vit_small_plus_patch16_dinov3_qkvb.lvd1689m'])
  def test_by_name_from_a_file(self, name, tmp_path):
    shapes = FAMILY.state_dict_shapes(name.partition('.')[0])
    state = {k: np.full(s, i, np.float32) for i, (k, s) in enumerate(shapes.items())}
    safetensors.numpy.save_file(state, tmp_path / 'model.safetensors')
    network = backbones.create(name, weights=str(tmp_path / 'model.safetensors'))
    assert (network.name, network.layers, network.mean) == (name, ('blocks.11',), checkpoints.IMAGENET_MEAN)
    # Every array of the file has its place, the deepest layer needs all, and no other value is there.
    values = sorted(float(np.unique(leaf).item()) for leaf in jax.tree.leaves(network.variables))
    assert values == list(range(len(shapes)))

  def test_the_file_of_another_variant_is_refused(self):
    def zeros(name):
      return {k: np.zeros(s, np.float32) for k, s in FAMILY.state_dict_shapes(name).items()}

    with pytest.raises(port.PortError, match='left over in the file: reg_token'):
      port.port(zeros('vit_small_patch14_reg4_dinov2'), FAMILY, 'vit_small_patch14_dinov2')
    with pytest.raises(port.PortError, match='missing in the file: blocks.0.attn.q_bias'):
      port.port(zeros('vit_small_patch16_dinov3'), FAMILY, 'vit_small_patch16_dinov3_qkvb')
    with pytest.raises(port.PortError, match='mlp.fc1_g.weight'):
      port.port(zeros('vit_small_patch16_dinov3'), FAMILY, 'vit_small_plus_patch16_dinov3')

  def test_meta_and_timm_differ_in_positions_only(self, tmp_path):
    name = 'vit_small_patch14_dinov2'
    state = {k: reference.successor_weight(1, k, s) for k, s in FAMILY.state_dict_shapes(name).items()}
    safetensors.numpy.save_file(state, tmp_path / 'model.safetensors')
    timm, meta = (backbones.create(
        f'{name}{kind}.lvd142m', weights=str(tmp_path / 'model.safetensors'), layers=('blocks.0.raw',))
        for kind in ('', '_meta'))
    assert backbones.fingerprint(timm.variables) == backbones.fingerprint(meta.variables)
    images = _images(name, 4, 3)
    maps = [jax.jit(network.apply)(network.variables, images)['blocks.0.raw'] for network in (timm, meta)]
    assert np.abs(maps[0] - maps[1]).max() > 0.1


@pytest.fixture(scope='module')
def parts(tmp_path_factory):
  """A folder of good parts whose sides are no multiples of a patch, a defective one, and random weights."""
  folder = tmp_path_factory.mktemp('parts')
  (folder / 'good').mkdir()
  rng = np.random.default_rng(0)
  for i in range(6):
    pixels = rng.integers(100, 120, (115, 170, 3), np.uint8)
    if i == 5:
      pixels[20:50, 120:150] = 250
    Image.fromarray(pixels).save(folder / ('bad.png' if i == 5 else f'good/{i}.png'))
  name = 'vit_small_patch14_reg4_dinov2'
  state = {k: reference.successor_weight(1, k, s) for k, s in FAMILY.state_dict_shapes(name).items()}
  safetensors.numpy.save_file(state, folder / 'model.safetensors')
  return folder


def _fit(parts, out, *arguments):
  return ('fit', parts / 'good', '--out', out, '--backbone=vit_small_patch14_reg4_dinov2.lvd142m',
          f'--backbone-weights={parts}/model.safetensors', '--folds=2', '--batch-size=2', *arguments)


class TestPatchCore:

  def test_fits_and_finds_the_defect_at_its_place(self, parts, tmp_path):
    said = command.done(
        *_fit(parts, tmp_path / 'bank', '--layers=blocks.1', '--resize=112', '--crop=112,154'))
    assert 'layers blocks.1,' in said
    finding = pc.load(tmp_path / 'bank').inspect(parts / 'bad.png')
    assert finding.anomalous
    row, column = np.unravel_index(np.argmax(finding.map), finding.map.shape)
    assert 15 <= row < 55 and 115 <= column < 155  # in pixels of the file

  def test_another_size_is_refused_in_one_line(self, parts, tmp_path):
    error = command.refused(*_fit(parts, tmp_path / 'bank', '--resize=112', '--crop=112,150'))
    assert 'multiples of 14 pixels; these are 112 x 150' in error and '(112, 140)' in error

  def test_all_channels_of_its_layers_are_kept(self):
    assert settings.embedding_for('vit_small_patch14_dinov2.lvd142m') == 'mean'
