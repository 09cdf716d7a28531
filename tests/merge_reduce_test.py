"""Selection in one pass: against brute force, and as a fit that does not hold the embeddings."""

import dataclasses

import jax
import numpy as np
import pytest

import patchcore_jax as pc
from patchcore_jax.banks import editing, provenance
from patchcore_jax.detectors import PatchCore, Run, patchcore
from patchcore_jax.detectors.patchcore import fit_plan, one_pass
from patchcore_jax.search import coreset, merge_reduce
from patchcore_jax.search.merge_reduce import Part, Reducer, Tree
from patchcore_jax.settings import CoresetSpec, EmbeddingSpec
from tests import small

POINTS = np.random.default_rng(3).standard_normal((2000, 3)).astype(np.float32)
KEY = jax.random.key(5)
NETWORK = small.backbone(('a', 'b'))  # 48 patches
GOOD = small.images(30)
ONE_PASS = PatchCore(0.02, EmbeddingSpec('mean', 1), CoresetSpec('merge_reduce', projection_dim=8))
GREEDY = dataclasses.replace(ONE_PASS, coreset=CoresetSpec(projection_dim=8))


def blocks(size, points=POINTS):
  """Blocks of so many points, which carry themselves."""
  for i in range(0, len(points), size):
    part = points[i:i + size]
    yield Part(part, np.arange(i, i + len(part)), part)


def reducer(**start):
  return Reducer(KEY, **start)


def radius(points, selected):
  """The covering radius by brute force, in float64."""
  return np.linalg.norm(points[:, None].astype(np.float64) - selected, axis=-1).min(1).max()


@pytest.fixture
def short_blocks(monkeypatch):
  """Blocks of one image, so that trees have levels."""
  monkeypatch.setattr(fit_plan, 'images_in_block', lambda *_: 1)


@pytest.fixture
def few_parts(monkeypatch):
  monkeypatch.setattr(one_pass, 'PARTS', 3)


class TestMergeReduce:

  @pytest.mark.parametrize('size, num_selected, select_start', [
      (37, 50, False), (300, 1, False), (300, 50, False), (300, 50, True), (1000, 2, True)])
  def test_every_point_is_within_the_bound(self, size, num_selected, select_start):
    found = merge_reduce.merge_reduce(blocks(size), num_selected, reducer(select_start=select_start))
    assert len(set(found.rows)) == num_selected
    np.testing.assert_array_equal(found.points, POINTS[found.rows])
    np.testing.assert_array_equal(found.values, POINTS[found.rows])
    reached = radius(POINTS, found.points)
    assert 0 < reached <= found.bound * (1 + 1e-5)

  def test_is_near_to_the_selection_from_all(self):
    whole = POINTS[coreset.greedy_k_center(POINTS, 50, start=np.arange(10))]
    found = merge_reduce.merge_reduce(blocks(200), 50, reducer())
    assert radius(POINTS, found.points) < 1.5 * radius(POINTS, whole)
    chance = POINTS[np.random.default_rng(0).permutation(2000)[:50]]
    assert radius(POINTS, found.points) < 0.8 * radius(POINTS, chance)

  @pytest.mark.parametrize('select_start', [False, True])
  def test_one_block_is_the_greedy_selection(self, select_start):
    start = jax.random.choice(KEY, 2000, (1 if select_start else 10,), replace=False)
    expected = coreset.greedy_k_center(POINTS, 50, start=start, select_start=select_start)
    found = merge_reduce.merge_reduce(blocks(2000), 50, reducer(select_start=select_start))
    assert found.rows.tolist() == expected.tolist()
    exact = radius(POINTS, found.points)
    assert exact <= found.bound * (1 + 1e-5) and found.bound <= 1.5 * exact

  def test_rows_are_in_the_order_of_the_last_selection(self):
    found = merge_reduce.merge_reduce(blocks(300), 50, reducer(select_start=True))
    distance = [np.linalg.norm(found.points[:i] - found.points[i], axis=1).min() for i in range(1, 50)]
    assert (np.diff(distance) <= 1e-6).all()  # each is no farther from those before it than the last was
    few = merge_reduce.merge_reduce(blocks(300), 10, reducer(select_start=True))
    assert radius(POINTS, found.points[:10]) < 1.5 * radius(POINTS, few.points)

  def test_the_same_key_gives_the_same_rows(self):
    first, again, other = (
        merge_reduce.merge_reduce(blocks(300), 50, Reducer(key)).rows.tolist()
        for key in (KEY, KEY, jax.random.key(6)))
    assert first == again != other

  def test_order_of_the_parts_has_no_influence(self):
    parts = list(blocks(500))
    one, other = (reducer().reduce(p, 50) for p in (parts, parts[::-1]))
    np.testing.assert_array_equal(one.rows, other.rows)
    np.testing.assert_array_equal(one.values, other.values)

  def test_what_is_held_grows_with_the_logarithm(self):
    tree, most = Tree(10, reducer()), 0
    for i, block in enumerate(blocks(20)):  # 100 blocks
      tree.add(block)
      held = tree.parts
      assert all(len(part.rows) <= 10 for part in held)
      digits = np.base_repr(i + 1, merge_reduce.MERGED)
      assert len(held) == sum(map(int, digits))
      most = max(most, len(held))
    assert most == 9  # 3 of 1, of 4 and of 16 blocks
    assert len(tree.root().rows) == 10

  def test_few_points_are_kept_as_they_are(self):
    tree = Tree(100, reducer())
    for block in blocks(9, POINTS[:90]):
      tree.add(block)
    root = tree.root()
    assert sorted(root.rows) == list(range(90)) and root.bound == 0

  def test_points_that_the_start_hides_count(self):
    # All of the near ones have a mean distance to the start below that between the picks.
    points = np.float32([[0], [0.1], [0.2], [100], [103]])
    assert merge_reduce.radius_bound(points, np.array([4, 3]), start=[0, 1, 2]) == 100

  def test_selects_from_the_outermost_point_on(self):
    points = np.float32([[0], [1], [2], [10]])  # their mean is 3.25
    found = Reducer(KEY, outermost=True).reduce([merge_reduce.Part(points, np.arange(4), points)], 3)
    assert found.rows.tolist() == [3, 0, 2] and found.bound == 2  # no farther than the last was

  def test_two_of_a_level_are_merged_where_that_is_asked_for(self):
    tree, held = Tree(10, Reducer(KEY, outermost=True), merged=2), []
    for block in blocks(200):
      tree.add(block)
      held.append(len(tree.parts))
    assert held == [bin(i + 1).count('1') for i in range(len(held))] and len(held) > 4
    assert len(tree.root(15).rows) == min(15, 10 * held[-1])

  def test_errors(self):
    with pytest.raises(ValueError, match='num_selected=5: there are 0 points'):
      merge_reduce.merge_reduce([], 5, reducer())
    with pytest.raises(ValueError, match='num_selected=5: there are 3 points'):
      merge_reduce.merge_reduce(blocks(2, POINTS[:3]), 5, reducer())


class TestFit:

  def fit(self, detector=ONE_PASS, **run):
    return small.fit(detector, GOOD, network=NETWORK, **run)

  def test_rows_are_patches_with_their_indices(self, short_blocks):
    model, (everything, _) = self.fit(), patchcore.embed(
        NETWORK, small.data(GOOD), embedding=ONE_PASS.embedding)
    assert model.arrays['embeddings'].shape == (28, 13) and len(set(model.arrays['indices'])) == 28
    np.testing.assert_array_equal(
        model.arrays['embeddings'], everything.reshape(-1, 13)[model.arrays['indices']])
    assert model.description.images == tuple(f'/line/good/{i}.png' for i in range(30))

  def test_what_is_reduced_covers_like_the_selection_from_all(self, short_blocks):
    everything = patchcore.embed(NETWORK, small.data(GOOD), embedding=ONE_PASS.embedding)[0].reshape(-1, 13)
    one_pass_radius, exact = (
        radius(everything, self.fit(detector).arrays['embeddings']) for detector in (ONE_PASS, GREEDY))
    assert one_pass_radius < 2 * exact

  @pytest.mark.parametrize('start', ['mean', 'point'])
  def test_where_nothing_need_be_left_out_it_is_the_greedy_bank(self, start):
    found, expected = (
        self.fit(dataclasses.replace(d, ratio=0.2, coreset=dataclasses.replace(d.coreset, start=start)))
        for d in (ONE_PASS, GREEDY))
    for name in ('embeddings', 'indices'):
      np.testing.assert_array_equal(found.arrays[name], expected.arrays[name])

  def test_is_the_same_again_and_in_other_batches(self, short_blocks):
    first, again, other = self.fit(), self.fit(batch_size=5), self.fit(seed=1)
    np.testing.assert_array_equal(first.arrays['indices'], again.arrays['indices'])
    assert first.arrays['indices'].tolist() != other.arrays['indices'].tolist()

  def test_tells_its_memory_and_in_the_end_the_radius(self, tmp_path):
    lines, calls = [], []
    self.fit(notify=lines.append, progress=lambda *call: calls.append(call), scratch=tmp_path)
    said, *_, reached = lines
    assert said.startswith('28 of 1440 patches') and said.endswith('none of disk for a time')
    words = reached.split()
    assert reached.startswith('covering radius') and float(words[2]) <= float(words[words.index('most') + 1])
    assert calls[-1] == ('coreset', 28, 28) and ('embed', 30, 30) in calls
    assert not list(tmp_path.iterdir())

  def test_at_most_a_block_of_embeddings_is_held(self, monkeypatch, few_parts, short_blocks):
    sizes = []
    add = Tree.add

    def noted(tree, block):
      add(tree, block)
      sizes.append((len(block.rows), sum(len(part.rows) for part in tree.parts)))

    monkeypatch.setattr(Tree, 'add', noted)
    self.fit()
    assert {block for block, _ in sizes} == {48}
    assert max(held for _, held in sizes) <= 6 * 28  # of 480 in a part

  def test_pictures_and_names_are_in_the_order_of_the_images(self):
    model = self.fit(keep_images=True)
    for i in (0, 17, 29):
      assert np.abs(provenance.thumbnail(model, i).astype(int) - GOOD[i]).mean() < 30

  def test_a_smaller_bank_is_its_first_rows(self):
    model = self.fit(dataclasses.replace(ONE_PASS, ratio=0.1))
    smaller = editing.shrink(model, 0.05)
    np.testing.assert_array_equal(smaller.arrays['indices'], model.arrays['indices'][:72])

  def test_a_fit_that_stops_leaves_nothing(self, tmp_path):

    def stop(stage, *_):
      if stage == 'coreset':
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
      self.fit(progress=stop, scratch=tmp_path, checkpoints=tmp_path)
    assert not list(tmp_path.iterdir())

  def test_errors(self):
    with pytest.raises(ValueError, match="'merge_reduce' is not for several processes: use 'greedy'"):
      self.fit(several_processes=True)
    with pytest.raises(ValueError, match=r'memory_gb=0.01: the fit in one pass takes about \d.\d GB'):
      self.fit(memory_gb=0.01)


class TestCrossScores:

  def run(self, **arguments):
    arguments = {'folds': 3} | arguments
    return ONE_PASS.fit_and_cross_score(small.data(GOOD), (NETWORK,), Run(), **arguments)

  def test_no_image_meets_its_own_patches(self, short_blocks, few_parts):
    """Scores follow from images of the other parts alone."""
    model, scores = self.run()
    np.testing.assert_array_equal(model.arrays['indices'], small.fit(
        ONE_PASS, GOOD, network=NETWORK).arrays['indices'])
    part_of = np.random.default_rng(0).permutation(np.arange(30) % 3)
    changed = GOOD.copy()
    changed[part_of == 1] = small.images(30, 9)[part_of == 1]
    others = ONE_PASS.fit_and_cross_score(small.data(changed), (NETWORK,), Run(), folds=3)[1]
    same = scores.image == others.image
    assert not same[part_of == 1].any() and not same[part_of != 1].all()
    moved = GOOD.copy()
    moved[part_of == 1] = GOOD[np.flatnonzero(part_of == 1)[::-1]]  # the bank of the others is as it was
    swapped = ONE_PASS.fit_and_cross_score(small.data(moved), (NETWORK,), Run(), folds=3)[1]
    np.testing.assert_allclose(
        swapped.image[part_of == 1], scores.image[part_of == 1][::-1], rtol=1e-5)

  def test_like_those_of_the_exact_selection(self, short_blocks):
    found = self.run(folds=5)[1].image
    exact = GREEDY.fit_and_cross_score(small.data(GOOD), (NETWORK,), Run(), folds=5)[1].image
    assert abs(np.log(found.mean() / exact.mean())) < 0.25  # the folds are others

  def test_as_many_folds_as_parts_at_the_most(self):
    np.testing.assert_array_equal(self.run(folds=10)[1].image, self.run(folds=30)[1].image)

  def test_thresholds_by_the_front_door(self, short_blocks):
    inspector = pc.fit(GOOD, detector=ONE_PASS, backbone=NETWORK, false_alarm_rate=0.1)
    assert len(inspector.calibration.image_scores) == 30
    assert not inspector.inspect(GOOD[0]).anomalous
    assert inspector.inspect(np.full((32, 24, 3), (255, 0, 255), np.uint8)).anomalous


class TestPlan:

  def test_memory_hardly_grows_with_the_images(self):
    def memory(num_images, **arguments):
      return fit_plan.one_pass(
          num_images, 784, 10_000, 1024, 128, parts=10, memory_gb=8, folds=True, **arguments).memory_bytes

    assert memory(50_000) < 2.5e9 and memory(500_000) - memory(50_000) < 0.5e9
    assert memory(50_000, picture_bytes=10_000) - memory(50_000) == 5 * 10**8  # the pictures do

  @pytest.mark.parametrize('num_images', [1, 5, 30, 213, 50_000])
  def test_blocks_of_like_size(self, num_images):
    images, of_part = fit_plan.images_in_block(num_images, 784, 10_000, 10), -(-num_images // 10)
    assert 1 <= images <= of_part and images * 784 <= 131_072 + 784
    assert of_part % images == 0 or of_part % images > images / 2
