"""Training a backbone: views, objectives, the network, the pool, a few steps."""

import csv
import dataclasses
import functools
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from configs import pretrain as pretrain_config
from experiments import pretrain
from patchcore_jax import backbones
from patchcore_jax.backbones import cpu_convolutions, port, resnet
from patchcore_jax.builtin import network, objectives, pool, procedural, training, views
from patchcore_jax.learned import loop
from tests import conftest, precision, small

# Light and camera change nothing: what a view shows is what lies there.
PLAIN = views.ViewSpec(
    size=32, gain=0.0, channel_gain=0.0, bias=0.0, gray=0.0, slope=0.0, blur=0.0, noise=0.0, points=4)
SPEC = views.ViewSpec(size=32, points=3)
# Of two layers and a few channels, which compiles in seconds.
TINY = {'resnet_tiny': resnet.Architecture((1, 2), bottleneck=False, width=8)}
LAYERS = ('layer1', 'layer2')


def _recipe(**changes):
  return training.Recipe('resnet_tiny', **{
      'layers': LAYERS, 'views': SPEC, 'batch_size': 4, 'steps': 20, 'warmup': 2, 'head_width': 16,
      'head_features': 8, **changes})


@pytest.fixture(autouse=True)
def tiny_architecture(monkeypatch):
  monkeypatch.setitem(resnet.ARCHITECTURES, 'resnet_tiny', TINY['resnet_tiny'])


def _coordinates(n=5, size=128):
  """Images whose red and green are x and y."""
  x, y = np.meshgrid(np.arange(size), np.arange(size))
  return np.stack([np.stack([x, y, 0 * x], -1)] * n).astype(np.uint8)


class TestViews:

  @pytest.mark.slow
  def test_points_of_both_views_show_the_same_place(self):
    (first, second), points, visible = views.draw(jax.random.key(0), _coordinates(40), PLAIN)
    assert first.shape == (40, 32, 32, 3) and points.shape == (2, 40, 16, 2)
    assert 0.3 < visible.mean() < 1
    shown = [255 * np.asarray(views.at_points(v, p, 1)) for v, p in zip((first, second), points)]
    # Where nothing was mirrored, positions are linear, and bilinear interpolation of them exact.
    inside = visible & (np.abs(shown[0][..., :2] - 63.5) < 40).all(-1)
    assert inside.sum() > 100
    np.testing.assert_allclose(shown[0][inside], shown[1][inside], atol=0.02)
    assert np.abs(np.asarray(points[0] - points[1]))[inside].mean() > 2  # they are not the same pixels

  def test_positions_are_exact_on_every_device(self):
    precision.assert_highest(
        lambda images: views.draw(jax.random.key(0), images, PLAIN), np.zeros((2, 64, 64, 3), np.uint8))

  def test_a_view_by_hand(self):
    image = np.arange(16, dtype=np.uint8).reshape(1, 4, 4, 1).repeat(3, -1)
    shift = jnp.array([[[1.0, 0, 0.5], [0, 1.0, 1.0]]])  # half a pixel right, one down
    view = 255 * views.sample(image, shift, 2)[0, ..., 0]
    np.testing.assert_allclose(view, [[4.5, 5.5], [8.5, 9.5]], rtol=1e-6)
    outside = jnp.array([[[1.0, 0, -1.0], [0, 1.0, 0]]])  # mirrored about the first column
    np.testing.assert_allclose(255 * views.sample(image, outside, 3)[0, 0, :, 0], [1, 0, 1], atol=1e-5)

  def test_follow_is_undone_by_the_way_back(self):
    first, second = views._transforms(jax.random.key(1), 3, (128, 128), SPEC)
    points = jax.random.uniform(jax.random.key(2), (3, 7, 2)) * 31
    back = views.follow(views.follow(points, first, second), second, first)
    np.testing.assert_allclose(back, points, atol=1e-3)

  def test_cells_of_a_map_lie_where_the_module_says(self):
    # A bright pixel at (x, y) = (24, 16) is the centre of cell (2, 3) at stride 8.
    maps = jnp.zeros((1, 4, 4, 1)).at[0, 2, 3].set(1)
    value = views.at_points(maps, jnp.array([[[24.0, 16.0], [20.0, 16.0], [24.0, 22.0], [40.0, 16.0]]]), 8)
    np.testing.assert_allclose(value[0, :, 0], [1, 0.5, 0.25, 1])

  def test_light_and_camera(self):
    flat = jnp.full((400, 8, 8, 3), 0.5)
    brighter = views.photograph(jax.random.key(0), flat, dataclasses.replace(PLAIN, gain=0.3))
    assert abs(float(jnp.log(brighter[:, 0, 0, 0] / 0.5).std()) - 0.3) < 0.04
    colour = flat * jnp.array([1.0, 0.5, 0.2])
    gray = views.photograph(jax.random.key(0), colour, dataclasses.replace(PLAIN, gray=0.3))
    share = float((jnp.ptp(gray, axis=-1) < 1e-6).all((1, 2)).mean())
    assert abs(share - 0.3) < 0.08
    noisy = views.photograph(jax.random.key(0), flat, dataclasses.replace(PLAIN, noise=0.1))
    assert 0.03 < float(noisy.std()) < 0.1
    np.testing.assert_allclose(views.photograph(jax.random.key(0), colour, PLAIN), colour, rtol=1e-6)


def _single(*arrays):
  return [jnp.asarray(x, jnp.float32) for x in arrays]


class TestInfoNce:

  def test_by_hand(self):
    first = jnp.array([[2.0, 0], [0, 1]])  # lengths do not count
    loss = objectives.info_nce(first, first, jnp.ones(2), temperature=0.5)
    assert float(loss) == pytest.approx(np.log(1 + np.exp(-2)), rel=1e-5)
    swapped = objectives.info_nce(first, first[::-1], jnp.ones(2), temperature=0.5)
    assert float(swapped) == pytest.approx(np.log(1 + np.exp(2)), rel=1e-5)

  def test_equals_float64(self):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 9, 5))
    weights = (np.arange(9) % 3 > 0).astype(float)
    u, v = (x[weights > 0] / np.linalg.norm(x[weights > 0], axis=1, keepdims=True) for x in (a, b))
    p = np.exp(u @ v.T / 0.1)
    expected = -np.mean(np.log(np.diag(p) / p.sum(0)) + np.log(np.diag(p) / p.sum(1))) / 2
    found = objectives.info_nce(*_single(a, b, weights))
    assert float(found) == pytest.approx(expected, rel=1e-4)


class TestVicreg:

  def test_by_hand(self):
    # Spread 0 and no difference: only the variance term, of both views.
    same = jnp.ones((4, 3))
    loss = objectives.vicreg(same, same, jnp.ones(4))
    assert float(loss) == pytest.approx(25 * (1 - 0.01), rel=1e-4)

  def test_equals_float64(self):
    rng = np.random.default_rng(0)
    a, b = 0.5 * rng.standard_normal((2, 12, 5))
    weights = (np.arange(12) % 3 > 0).astype(float)
    x, y = a[weights > 0], b[weights > 0]
    expected = 25 * np.mean((x - y) ** 2)
    for z in (x, y):
      matrix = np.cov(z.T)
      expected += 12.5 * np.maximum(0, 1 - np.sqrt(np.diag(matrix) + 1e-4)).mean()
      expected += (np.sum(matrix**2) - np.sum(np.diag(matrix) ** 2)) / 5
    found = objectives.vicreg(*_single(a, b, weights))
    assert float(found) == pytest.approx(expected, rel=1e-4)


@functools.cache
def _trained():
  """State and losses of three steps, so that statistics of batch norm are not those of the start."""
  task, images = training.task(_recipe()), np.stack([procedural.draw(0, i, 64) for i in range(4)])
  state, losses = loop.init(task, 0), []
  for done in loop.run(task, loop.Shuffled(images, 0), state, batch_size=4, seed=0, last=3):
    losses += [report['loss'] for report in done.reports]
  return jax.device_get(done.state), losses


class TestNetwork:

  @pytest.mark.slow
  def test_what_is_exported_is_what_was_trained(self, tmp_path):
    state, _ = _trained()
    images = np.stack([procedural.draw(0, i, 64) for i in range(8)])
    training.export(tmp_path / 'net.safetensors', _recipe(), state, images)
    found = backbones.create(
        'resnet_tiny', weights=str(tmp_path / 'net.safetensors'), layers=LAYERS, precision='float32')
    x = backbones.normalize(images, found.mean, found.std)
    trunk = {'params': state['params']['trunk'], 'batch_stats': state['stats']['trunk']}
    trained = network.ResNet(TINY['resnet_tiny'], LAYERS)
    expected, maps = trained.apply(trunk, x, train=False), found.apply(found.variables, x)
    for layer in LAYERS:
      assert float(jnp.square(maps[layer]).sum(-1).mean()) == pytest.approx(1, abs=0.01)
      scaled = expected[layer] / jnp.sqrt(jnp.square(expected[layer]).sum(-1).mean())
      # Weights rounded to 11 bits, layer upon layer.
      assert float(jnp.linalg.norm(scaled - maps[layer]) / jnp.linalg.norm(scaled)) < 3e-3
    assert {v.dtype for v in safetensors.numpy.load_file(tmp_path / 'net.safetensors').values()} == {
        np.dtype(np.float16)}

  @pytest.mark.slow
  def test_rescaled_changes_each_layer_by_its_factor_alone(self):
    state, _ = _trained()
    named = network.state_dict({'params': state['params']['trunk'], 'batch_stats': state['stats']['trunk']})
    rng = np.random.default_rng(0)
    images = rng.standard_normal((1, 64, 64, 3)).astype(np.float32)
    apply = jax.jit(resnet.apply_fn('resnet_tiny', LAYERS))
    scales = {'layer1': 3.0, 'layer2': rng.uniform(0.5, 2, 16)}
    before, after = (
        apply(port.port(s, resnet.FAMILY, 'resnet_tiny'), images)
        for s in (named, network.rescaled(named, scales)))
    for layer in LAYERS:
      expected = before[layer] * scales.get(layer, 1.0)
      np.testing.assert_allclose(after[layer], expected, atol=2e-5 * float(expected.max()))

  def test_without_gray(self):
    kernel = network.without_gray(jax.random.normal(jax.random.key(0), (7, 7, 3, 4)))
    offset = jnp.full((1, 16, 16, 3), 0.3) / jnp.array(backbones.checkpoints.IMAGENET_STD)
    x = jax.random.normal(jax.random.key(1), (1, 16, 16, 3))
    plain, brighter = (network._library(i, kernel, 2)[:, 2:-2, 2:-2] for i in (x, x + offset))
    np.testing.assert_allclose(plain, brighter, atol=1e-4)
    tinted = network._library(x + offset * jnp.array([1.0, 0, 0]), kernel, 2)[:, 2:-2, 2:-2]
    assert float(jnp.abs(tinted - plain).max()) > 0.1  # colour it does see
    np.testing.assert_allclose(network.without_gray(kernel), kernel, atol=1e-6)

  def test_fast_ways_equal_the_library(self):
    x = jax.random.normal(jax.random.key(0), (2, 20, 24, 3))
    kernel = jax.random.normal(jax.random.key(1), (7, 7, 3, 5))
    np.testing.assert_allclose(
        cpu_convolutions.convolve_7x7(x, kernel), network._library(x, kernel, 2), atol=1e-4)
    for size in (8, 9):
      x = jax.nn.relu(jax.random.normal(jax.random.key(2), (2, size, size, 3)))
      expected = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
      np.testing.assert_array_equal(network._max_pool(x), expected)


def _alive(pid):
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  return True


class TestPool:

  def test_a_step_sees_what_its_number_says(self):
    whole = pool.Pool(0, 20, image_size=32, fresh=3)
    batches = [whole.batch(step, 6) for step in range(9)]
    resumed = pool.Pool(0, 20, image_size=32, fresh=3)
    for step in range(7, 9):
      np.testing.assert_array_equal(resumed.batch(step, 6), batches[step])
    window = {procedural.draw(0, i, 32).tobytes() for i in range(24, 44)}  # of step 8
    shown = [image.tobytes() for image in batches[8]]
    assert set(shown) <= window and len(set(shown)) == 6
    first = {procedural.draw(0, i, 32).tobytes() for i in range(20)}
    assert {image.tobytes() for image in batches[0]} <= first

  def test_workers_draw_the_same(self):
    told = []
    several = pool.Pool(0, 20, image_size=32, fresh=3, num_workers=2)
    try:
      found = [several.batch(step, 6, lambda done, total: told.append((done, total))) for step in range(2)]
    finally:
      several.close()
    alone = pool.Pool(0, 20, image_size=32, fresh=3)
    for step in range(2):
      np.testing.assert_array_equal(found[step], alone.batch(step, 6))
    assert told[19] == (20, 20)

  def test_workers_end_with_a_process_that_is_killed(self):
    script = (
        'import time\nfrom patchcore_jax.builtin import pool\n'
        'if __name__ == "__main__":\n'
        '  images = pool.Pool(0, 4, image_size=16, num_workers=2)\n'
        '  images.batch(0, 2)\n'
        '  print(*images._workers._processes, flush=True)\n'
        '  time.sleep(100)\n')
    # From a file, which workers can import again.
    with tempfile.TemporaryDirectory() as folder:
      path = Path(folder) / 'draws.py'
      path.write_text(script)
      process = subprocess.Popen(
          [sys.executable, path], env=os.environ | {'PYTHONPATH': str(conftest.ROOT)},
          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
      workers = [int(pid) for pid in process.stdout.readline().split()]
      process.kill()
      process.wait()
    deadline = time.monotonic() + 20
    while any(map(_alive, workers)) and time.monotonic() < deadline:
      time.sleep(0.05)
    assert len(workers) == 2 and not any(map(_alive, workers))

  def test_errors(self):
    with pytest.raises(ValueError, match='pool.size=0'):
      pool.Pool(0, 0)
    with pytest.raises(ValueError, match='batch_size=5: expected at most pool.size=4'):
      pool.Pool(0, 4, image_size=16).batch(0, 5)


def losses_of_three_steps():
  """Computes the losses that a process with other devices must have too."""
  resnet.ARCHITECTURES |= TINY
  return np.array(_trained()[1])


class TestStep:

  @pytest.mark.slow
  def test_number_of_devices_has_no_influence(self):
    # Sums over the batch are taken in another order.
    np.testing.assert_allclose(
        small.on_devices(2, 'pretraining_test', 'losses_of_three_steps()'), _trained()[1], rtol=1e-4)

  def test_the_loss_falls_on_one_batch(self):
    task, losses = training.task(_recipe()), []
    step, state = jax.jit(task.step), loop.init(task, 0)
    images = np.stack([procedural.draw(0, i, 64) for i in range(4)])
    for _ in range(60):
      state, report = step(state, images, jax.random.key(0))  # the same views again
      losses.append(float(report['loss']))
    assert losses[-1] < 0.5 * losses[0]

  @pytest.mark.parametrize('changes, words', [
      ({'architecture': 'resnet50'}, "architecture='resnet50': expected one of resnet18, resnet34, "),
      ({'objective': 'jigsaw'}, "objective='jigsaw': expected one of info_nce, vicreg"),
      ({'layers': ('layer3',)}, r"layers=\('layer3',\): expected some of layer1, layer2"),
      ({'warmup': 20}, 'warmup=20, steps=20')])
  def test_errors(self, changes, words):
    with pytest.raises(ValueError, match=words):
      dataclasses.replace(_recipe(), **changes)


def _config(**changes):
  config = pretrain_config.get_config()
  config.update_from_flattened_dict({
      'architecture': 'resnet_tiny', 'layers': LAYERS, 'head_width': 16, 'head_features': 8, 'batch_size': 4,
      'steps': 12, 'warmup': 2, 'views.size': 32, 'views.points': 3, 'pool.size': 16,
      'pool.image_size': 64, 'pool.fresh': 2, 'pool.num_workers': 0, 'report_every': 3, 'save_every': 5,
      **changes})
  return config


class TestRun:

  @pytest.mark.slow
  def test_same_seed_same_losses_and_resumed_as_uninterrupted(self, tmp_path):
    whole = pretrain.run(_config(), tmp_path / 'whole')
    assert len(whole) == 12
    # Stopped where neither a line nor a checkpoint is due; and with other settings that do not matter.
    parts = pretrain.run(_config(), tmp_path / 'parts', until=7)
    parts += pretrain.run(_config(report_every=4), tmp_path / 'parts')
    assert parts == whole  # to the last bit
    files = [(tmp_path / name / 'backbone.safetensors').read_bytes() for name in ('whole', 'parts')]
    assert files[0] == files[1]
    other = pretrain.run(_config(seed=1), tmp_path / 'other', until=2)
    assert min(np.abs(np.subtract(other, whole[:2]))) > 1e-3
    with open(tmp_path / 'whole' / 'log.csv', newline='') as f:
      rows = list(csv.DictReader(f))
    assert [row['step'] for row in rows] == ['3', '6', '9', '12']
    assert float(rows[1]['loss']) == pytest.approx(np.mean(whole[3:6]), abs=1e-5)
    assert loop.Checkpoints(tmp_path / 'whole' / 'checkpoints', {}).steps() == [10, 12]

    with pytest.raises(ValueError, match='another --workdir.*learning_rate'):
      pretrain.run(_config(learning_rate=1e-4), tmp_path / 'whole')

  @pytest.mark.slow
  def test_killed_and_started_again(self, tmp_path):
    command = [
        sys.executable, '-m', 'experiments.pretrain', '--config=configs/pretrain.py', '--config.steps=300',
        '--config.batch_size=4', '--config.pool.size=64', '--config.save_every=10',
        '--config.pool.num_workers=1', f'--workdir={tmp_path / "run"}']
    process = subprocess.Popen(command, cwd=conftest.ROOT, stdout=subprocess.DEVNULL)
    while len(loop.Checkpoints(tmp_path / 'run' / 'checkpoints', {}).steps()) < 2:
      assert process.poll() is None
      time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run(command, cwd=conftest.ROOT, check=True)
    subprocess.run(command[:-1] + [f'--workdir={tmp_path / "whole"}'], cwd=conftest.ROOT, check=True)
    files = [(tmp_path / name / 'backbone.safetensors').read_bytes() for name in ('run', 'whole')]
    assert files[0] == files[1]

  @pytest.mark.slow
  def test_the_first_steps_of_the_built_in_backbone(self, tmp_path):
    with open(conftest.ROOT / 'tests/testdata/pretraining_losses.csv', newline='') as f:
      recorded = list(csv.DictReader(f))
    pretrain.run(pretrain_config.get_config(), tmp_path / 'run', until=int(recorded[-1]['step']))
    with open(tmp_path / 'run/log.csv', newline='') as f:
      rows = list(csv.DictReader(f))
    for row, expected in zip(rows, recorded, strict=True):
      assert row['step'] == expected['step']
      # The same to the last digit where it was recorded; another processor rounds in another way, and
      # every step enlarges that.
      assert float(row['loss']) == pytest.approx(float(expected['loss']), rel=0.02)
