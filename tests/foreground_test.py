"""Objects and their background, told apart by features that are made for it."""

import jax.numpy as jnp
import numpy as np
import pytest

from patchcore_jax import foreground

pytestmark = pytest.mark.accelerator


def test_principal_scores_equal_float64():
  rng = np.random.default_rng(0)
  for tokens, dim in ((60, 40), (9, 40), (50, 5)):  # also fewer tokens than channels, and few of both
    values = rng.standard_normal((3, tokens, dim)) * 0.8 ** np.arange(dim)
    found = np.asarray(foreground.principal_scores(jnp.asarray(values, jnp.float32)))
    for image, scores in zip(values, found, strict=True):
      centred = image - image.mean(0)
      axis = np.linalg.eigh(centred.T @ centred)[1][:, -1]
      expected = centred @ (axis * np.sign(axis[np.abs(axis).argmax()]))
      np.testing.assert_allclose(scores, expected, atol=2e-5 * np.abs(expected).max())


def _part(rows, columns, object_of=1.0):
  """Makes features [20, 16, 6] of a part on a plain background, with a little noise."""
  values = np.random.default_rng(0).normal(0, 0.05, (20, 16, 6))
  values[rows, columns, :3] += object_of
  return values


class TestObjects:

  @pytest.mark.parametrize('object_of', [1.0, -1.0])  # the axis has no sign of its own
  @pytest.mark.parametrize('rows, columns', [
      (slice(5, 12), slice(4, 11)), (slice(9, 11), slice(3, 13)),  # a block, a bar
      (slice(3, 17), slice(3, 13))])  # nearly all of the image
  def test_are_what_the_border_is_not(self, rows, columns, object_of):
    expected = np.zeros((20, 16), bool)  # with a cell around it
    expected[rows.start - 1:rows.stop + 1, columns.start - 1:columns.stop + 1] = True
    found = foreground.objects(jnp.asarray(_part(rows, columns, object_of)[None], jnp.float32))
    np.testing.assert_array_equal(found[0], expected)

  def test_gaps_are_closed(self):
    values = _part(slice(5, 14), slice(4, 12))
    values[8:12, 6:10] = values[:4, :4]  # a hole of 4 x 4, of which 2 x 2 are left by the dilation
    assert foreground.objects(jnp.asarray(values[None], jnp.float32))[0, 4:15, 3:13].all()

  def test_all_of_an_image_without_any_difference(self):
    assert foreground.objects(jnp.ones((2, 5, 4, 3))).all()
