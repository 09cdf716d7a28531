"""The ONNX file, where the extra `onnx` is installed; the rewriting of programs, everywhere."""

import dataclasses
import json
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from patchcore_jax import foreground
from patchcore_jax.export import folder, onnx, program
from patchcore_jax.learned import transforms
from patchcore_jax.settings import ScoringSpec
from tests import export_test


@pytest.fixture(scope='module')
def inspector():
  return export_test.fitted()


def test_settled_programs_have_the_same_results():
  def fn(images):
    x = images.astype(jnp.float32)
    x = lax.platform_dependent(x, cpu=lambda x: -x, default=lambda x: nn.relu(x - 100))
    return nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))

  images = np.random.default_rng(0).integers(0, 256, (2, 9, 12, 3), dtype=np.uint8)
  closed = jax.make_jaxpr(fn)(images)

  def settled(images):
    return onnx._settled(closed.jaxpr, closed.consts, images)[0]

  text = str(jax.make_jaxpr(settled)(images))
  assert 'platform_index' not in text and 'reduce_window' not in text
  x = np.pad(np.maximum(images.astype(np.float32) - 100, 0), ((0, 0), (1, 1), (1, 1), (0, 0)))
  windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))[:, ::2, ::2]
  np.testing.assert_array_equal(settled(images), windows.max(axis=(-1, -2)))


def test_the_extra_is_named_where_it_is_missing(inspector, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'jax2onnx', None)
  with pytest.raises(ValueError, match=r"jax2onnx, which is not .* pip install 'patchcore_jax\[onnx\]'"):
    folder.write(tmp_path / 'made', inspector, onnx=True)
  assert not list(tmp_path.iterdir())


class TestFile:

  @pytest.fixture(autouse=True)
  def _installed(self):
    for module in 'jax2onnx', 'onnxruntime':
      pytest.importorskip(module, reason=f'{module} ABSENT (extra onnx); this check did not run')

  @pytest.mark.parametrize('camera', [None, export_test.CAMERA])
  def test_written_and_compared(self, inspector, camera, tmp_path):
    folder.write(tmp_path / 'made', inspector, onnx=True, platforms=['cpu'], camera=camera, at_once=2)
    description = json.loads((tmp_path / 'made/description.json').read_text())['onnx']
    assert description['largest_difference'] < 1e-5 and description['batch'] == 1
    images = folder.probes(inspector, 3, camera)
    results = onnx.runner(tmp_path / 'made/program.onnx')(images)
    assert results['anomaly_map'].shape == (3, 32, 24) and results['anomalous'].dtype == bool

  def test_a_gradient_and_a_mean_that_is_rounded(self, tmp_path):
    """Trained methods score by such."""
    kernel = jnp.asarray(np.random.default_rng(0).standard_normal((3, 3, 3, 2)), jnp.float32)

    def energy(x):
      return (nn.softplus(lax.conv_general_dilated(
          x, kernel, (2, 2), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))) ** 2).sum()

    def fn(images):
      return {'gradient': jax.grad(energy)(transforms.scaled(transforms.squared(images, 16)))}

    images = np.random.default_rng(1).integers(0, 256, (1, 32, 24, 3), dtype=np.uint8)
    onnx.convert(fn, images.shape, tmp_path / 'program.onnx')
    found = onnx.runner(tmp_path / 'program.onnx')(images)['gradient']
    np.testing.assert_allclose(found, jax.jit(fn)(images)['gradient'], atol=1e-4)

  def test_foregrounds(self, tmp_path):
    """ONNX Runtime has no selection of truths, among others."""

    def fn(images):
      tokens = images.astype(jnp.float32)
      return {'objects': foreground.objects(tokens), 'masks': foreground.masks(tokens)}

    images = np.random.default_rng(0).integers(0, 9, (1, 12, 10, 3), dtype=np.uint8)
    images[:, 4:9, 3:8] += 90
    onnx.convert(fn, images.shape, tmp_path / 'program.onnx')
    found = onnx.runner(tmp_path / 'program.onnx')(images)
    for name, cells in fn(images).items():
      assert 0 < cells.mean() < 1
      np.testing.assert_array_equal(found[name], cells)

  def test_what_onnx_runtime_refuses_is_one_line(self, tmp_path):
    (tmp_path / 'program.onnx').write_bytes(b'none')
    with pytest.raises(ValueError, match='^ONNX Runtime does not take .* Write it without --onnx.$'):
      onnx.runner(tmp_path / 'program.onnx')

  def test_another_program_does_not_pass(self, inspector, tmp_path, monkeypatch):
    in_one_pass = program.program_in_one_pass
    detector = dataclasses.replace(inspector.detector, scoring=ScoringSpec(distance='root'))
    other = dataclasses.replace(inspector, detector=detector)
    monkeypatch.setattr(
        program, 'program_in_one_pass', lambda _, **arguments: in_one_pass(other, **arguments))
    with pytest.raises(folder.ParityError, match='image_score'):
      folder.write(tmp_path / 'made', inspector, onnx=True, platforms=['cpu'], at_once=2)
    assert not list(tmp_path.iterdir())
