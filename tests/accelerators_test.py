"""Programs for accelerators that are not here: made, looked at, and not run.

`jax.export` makes the program of another kind of device on any machine. What is promised of these can be
seen in their text: which kernels they call, and how precise their products are.
"""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.experimental import topologies
from jax.sharding import Mesh, SingleDeviceSharding

from patchcore_jax import backbones, detectors, parallel
from patchcore_jax.detectors import trained
from patchcore_jax.detectors.patchcore import scores
from patchcore_jax.detectors.trained_settings import Trained
from patchcore_jax.learned import loop
from patchcore_jax.search import k_center, neighbors, search_bank
from patchcore_jax.settings import EmbeddingSpec, ScoringSpec
from tests import small


def _text(function, platform, *args):
  """The program as text. A kernel may be in it, which makes it none to keep."""
  kernels = export.DisabledSafetyCheck.custom_call('__gpu$xla.gpu.triton')
  return export.export(function, platforms=(platform,), disabled_checks=[kernels])(*args).mlir_module()


def _shapes(tree):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), np.asarray(x).dtype), tree)


def _bank(shortlist='bfloat16'):
  rng = np.random.default_rng(0)
  rows = rng.standard_normal((3000, 12)) @ rng.standard_normal((12, 256))
  return _shapes(search_bank.prepare(rows.astype(np.float32), shortlist))


def _search(platform, shortlist='bfloat16'):
  queries = jax.ShapeDtypeStruct((200, 256), jnp.float32)
  return _text(jax.jit(neighbors.nearest_neighbors), platform, queries, _bank(shortlist))


def _prediction(platform):
  backbone = backbones.create('resnet18', weights='random', precision='float32')
  fn = scores.scores_of_embeddings(
      scores.embed_fn_of(backbone, EmbeddingSpec(target_dim=256)), ScoringSpec(), (3000,))
  images = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.uint8)
  return _text(jax.jit(fn), platform, (_shapes(backbone.variables), _bank()), images)


def _round(steps, platform):
  mesh = Mesh(np.array(jax.devices()[:1]), (k_center.AXIS,))
  points = np.zeros((5000, 16), np.float32)
  state = k_center.initial_state(np.zeros(5000, np.float32), 500)
  args = (points, np.zeros((500 + k_center.PADDING, 16), np.float32), np.zeros(16, np.float32), state)
  return _text(k_center.lazy_round(mesh, steps), platform, *_shapes(args))


def _products(text):
  return [line for line in text.splitlines() if 'stablehlo.dot_general' in line]


class TestTpu:

  @pytest.mark.parametrize('make', [
      _search, _prediction, lambda platform: _round(k_center.PLAIN, platform)],
      ids=['search', 'prediction', 'selection'])
  def test_plain_programs_at_the_highest_precision(self, make):
    text = make('tpu')
    assert 'triton' not in text
    products = _products(text)
    assert products and all('precision = [HIGHEST, HIGHEST]' in line for line in products)


class TestNvidiaGpu:

  @pytest.mark.parametrize('shortlist', ['float32', 'bfloat16'])
  def test_a_search_calls_its_kernel(self, shortlist, monkeypatch):
    monkeypatch.setattr(parallel, 'has_kernels', lambda device: True)
    jax.clear_caches()  # of what was traced for this machine
    text = _search('cuda', shortlist)
    jax.clear_caches()
    assert text.count('name = "shortlist"') == 2  # for all queries, and for those in doubt

  @pytest.mark.parametrize('basis', [None, jax.ShapeDtypeStruct((256, 63), jnp.float32)])
  def test_how_far_rounding_moves_a_vector_is_not_optimised_away(self, basis):
    rows, center = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((300, 256), (256,)))
    text = _text(
        jax.jit(lambda *given: search_bank.reduce(*given, 'bfloat16')), 'cuda', rows, center, basis)
    assert 'stablehlo.reduce_precision' in text
    # XLA takes a cast and one back for nothing, unless it is for CPUs.
    assert not [line for line in text.splitlines() if 'stablehlo.convert' in line and 'bf16>) ->' in line]

  def test_programs_to_keep_call_none(self):
    bank = _bank()
    program = export.export(
        jax.jit(lambda q, bank: neighbors.nested_nearest_neighbors(q, bank, (3000,), kernels=False)),
        platforms=('cuda',))(jax.ShapeDtypeStruct((200, 256), jnp.float32), bank)
    assert 'triton' not in program.mlir_module()

  def test_a_round_of_the_selection_is_three_kernels_and_no_loop(self):
    device = type('Device', (), {
        'platform': 'gpu', 'compute_capability': '9.0',
        'client': type('Client', (), {'platform_version': 'cuda 13000'})})
    text = _round(k_center.steps_for(device, 5000, 16), 'cuda')
    for name in ('refresh', 'pairwise', 'select'):
      assert text.count(f'name = "k_center_{name}"') == 1
    assert 'stablehlo.while' not in text  # the host would wait for it

  @pytest.mark.parametrize('change', [
      {'platform': 'cpu'}, {'compute_capability': '7.5'},
      {'client': type('Client', (), {'platform_version': 'rocm 60000'})}])
  def test_other_devices_take_the_plain_steps(self, change):
    fields = {'platform': 'gpu', 'compute_capability': '8.0',
              'client': type('Client', (), {'platform_version': 'cuda 13000'})}
    assert k_center.steps_for(type('Device', (), fields), 5000, 16) is not k_center.PLAIN
    assert k_center.steps_for(type('Device', (), fields | change), 5000, 16) in (
        k_center.PLAIN, k_center.BFLOAT16)
    wide = k_center.steps_for(type('Device', (), fields), 5000, 1024)  # more than a program can hold
    assert wide.refresh is k_center.PLAIN.refresh and wide.select is not k_center.PLAIN.select


class TestCompiled:
  """XLA's compiler for GPUs needs none: it is asked in processes of their own, which its faults end."""

  # What the compiler wants to know of an H100.
  TARGET = '''
      platform_name: "CUDA" device_description_str: "NVIDIA H100 80GB HBM3"
      dnn_version_info { major: 9 minor: 8 }
      gpu_device_info {
        cuda_compute_capability { major: 9 minor: 0 } core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
        threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
        shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
        registers_per_core_limit: 65536 registers_per_block_limit: 65536
        block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
        memory_bandwidth: 3352320000000 device_memory_size: 84978434048 l2_cache_size: 52428800 }'''

  @pytest.mark.slow
  @pytest.mark.parametrize('name', [
      name for name in detectors.DETECTORS if issubclass(detectors.find(name), Trained)])
  def test_training_and_scoring_compile_for_a_gpu(self, name):
    pytest.importorskip('jax_cuda13_plugin', reason='PLUGIN ABSENT: this check did not run')
    script = f'from tests import accelerators_test as t\nt.compile_for_a_gpu({name!r})'
    done = subprocess.run(
        [sys.executable, '-c', script], env=os.environ | {'JAX_PLATFORMS': 'cpu'}, capture_output=True,
        text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def compile_for_a_gpu(name):
  """Compiles a step of training, and scoring."""
  topology = topologies.get_topology_desc(
      'h100', 'cuda', target_config=TestCompiled.TARGET, topology='1x1x1')
  sharding = SingleDeviceSharding(topology.devices[0])

  def compiled(function, *args):
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
    jax.jit(function).trace(*args).lower(lowering_platforms=('cuda',)).compile()

  detector = detectors.Student(teacher_steps=0) if name == 'student' else detectors.find(name)()
  networks = (small.backbone(),) if detector.needs_network else ()
  images, method = np.zeros((8, detector.size, detector.size, 3), np.uint8), trained._method(
      detector, *trained._maps(detector, networks))
  network = networks[0].variables if networks else None
  examples = method.examples(network, images, detectors.Run())
  state, key = loop.init(method.task, 0), jax.random.key_data(jax.random.key(0))
  state['variables'] |= {'given': method.given(network, examples, detectors.Run())}
  compiled(lambda state, examples, key: method.task.step(state, examples, jax.random.wrap_key_data(key)),
           state, examples, key)
  variables = trained._with_network(state['variables'], method, networks)
  with jax.default_matmul_precision('highest'):
    compiled(method.score, {**variables, 'finished': method.finish(variables, images, images[:0])}, images)
