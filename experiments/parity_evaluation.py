"""Compares metrics with evaluation code of data sets, that of AUPIMO's authors, and exact arithmetic.

Part of `experiments.parity`. The arrays were made by running the originals on seeded inputs; a file may lie
in the folder of all reference arrays or in its subfolder `evaluation`.
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from experiments.comparisons import Row, compare, load, refusal
from patchcore_jax import metrics
from patchcore_jax.metrics import (
    curve,
    false_positive_rate,
    intervals,
    paired,
    ranking,
    saturation,
    segmentation,
    thresholds,
    visa_reference,
)

_LIMITS = (0.01, 0.05, 0.1, 0.3, 1.0)


def mvtec(folder: Path) -> Iterator[Row]:
  """Compares AU-PRO, its curve and AUROC with MVTec's script and with rational arithmetic."""
  arrays = load(folder, 'mvtec.npz')
  for name, maps, masks in _cases(arrays):
    label, get = f'mvtec {name}', _of_case(arrays, name)
    if name.startswith(('nan', 'infinite', 'no_')):
      yield refusal(f'{label}: refused', 'MVTec', lambda maps=maps, masks=masks: metrics.aupro(maps, masks),
                    f'the original gives {get["au_pro"][3]:.3f}')
      continue
    found = curve.of_regions(maps, masks)
    areas = [found.area(limit) for limit in _LIMITS]
    yield _official(f'{label} AU-PRO', 'MVTec', areas, get['au_pro'])
    yield _exact(f'{label} AU-PRO', 'definition', areas, get['exact_au_pro'])
    yield _exact(f'{label} AU-PRO, 4-connected', 'definition',
                 [metrics.aupro(maps, masks, max_fpr=limit, connectivity=4) for limit in _LIMITS],
                 get['exact_au_pro_4'])
    yield _exact(f'{label} pixel AUROC', 'definition', metrics.auroc(masks, maps), get['exact_pixel_auroc'])
    labels, scores = masks.any((1, 2)), maps.max((1, 2))  # as the script has labels
    for origin, key in (('MVTec', 'image_auroc'), ('definition', 'exact_image_auroc')):
      yield _exact(f'{label} image AUROC of the maximum', origin, metrics.auroc(labels, scores), get[key])
    distinct = np.unique(maps)[::-1]
    yield _counts(f'{label}, points of the curve', 'MVTec', distinct.size + 2, get['points'])
    if 'curve_index' in get:
      x, y = _curve_at(found, maps, masks, distinct, get['curve_index'])
      yield _official(f'{label}, curve: false positive rate', 'MVTec', x, get['fpr'])
      yield _exact(f'{label}, curve: PRO', 'MVTec', y, get['pro'])
      yield _exact(f'{label}, image ROC', 'MVTec', metrics.roc_curve(labels, scores),
                   [get['image_fpr'], get['image_tpr']])


def mvtec_large(folder: Path) -> Iterator[Row]:
  """Compares AU-PRO of 25 million pixels with MVTec's script and with anomalib."""
  arrays, anomalib = (load(folder, name) for name in ('mvtec_large.npz', 'anomalib_large.npz'))
  if not arrays:
    return
  maps, masks = _large()
  yield compare('mvtec large, sum of the maps', 'recipe', maps.sum(dtype=np.float64), arrays['maps_sum'],
                1e-6, 'drawn anew')
  found = curve.of_regions(maps, masks)
  areas = [found.area(limit) for limit in _LIMITS]
  yield _official('mvtec large AU-PRO', 'MVTec', areas, arrays['au_pro'])
  yield _exact('mvtec large image AUROC', 'MVTec', metrics.auroc(masks.any((1, 2)), maps.max((1, 2))),
               arrays['image_auroc'])
  distinct = np.unique(maps)[::-1]
  yield _counts('mvtec large, points of the curve', 'MVTec', distinct.size + 2, arrays['points'])
  x, y = _curve_at(found, maps, masks, distinct, arrays['curve_index'])
  yield _official('mvtec large, curve: false positive rate', 'MVTec', x, arrays['fpr'])
  yield _official('mvtec large, curve: PRO', 'MVTec', y, arrays['pro'])
  if anomalib:
    yield _single('mvtec large AU-PRO', 'AL', [found.area(limit) for limit in (0.05, 0.3, 1)],
                  [anomalib[f'aupro_{limit}'] for limit in ('0.05', '0.3', '1.0')])
    yield _single('mvtec large pixel AUROC', 'AL', ranking.auroc_of(found), anomalib['auroc'])


def pixels(folder: Path) -> Iterator[Row]:
  """Compares pixel metrics with scikit-learn, anomalib and rational arithmetic."""
  arrays = load(folder, 'pixel.npz')
  if not arrays:
    return
  for name, maps, masks in _cases(load(folder, 'mvtec.npz')):
    get, label = _of_case(arrays, name), f'pixels {name}'
    if 'exact_auroc' not in get:
      continue
    auroc, ap = metrics.auroc(masks, maps), metrics.average_precision(masks, maps)
    best, found = metrics.f1_optimal(masks, maps), curve.of_regions(maps, masks)
    values = {
        'auroc': auroc, 'ap': ap, 'f1_max': best.f1, 'f1_threshold': best.threshold,
        'pr_trapezoid': visa_reference.visa_image_au_pr(masks, maps)}
    for key, value in values.items():
      yield _exact(f'{label} {key}', 'scikit-learn', value, get[f'sklearn_{key}'])
    yield _exact(f'{label} auroc, ap', 'definition', [auroc, ap], [get['exact_auroc'], get['exact_ap']])
    yield _exact(f'{label} F1-max and its lowest threshold', 'definition', [best.f1, best.threshold],
                 get['exact_f1_max_lowest_highest'][:2])
    if 'anomalib_auroc' in get:
      beyond = np.nextafter(np.float32(0.5), np.float32(1))  # above 0.5 there
      table = metrics.tabulate_regions(maps, masks, threshold=beyond)
      values = {'f1_max': best.f1, 'f1_threshold': best.threshold, 'adaptive': best.threshold,
                'aupro_0.05': found.area(0.05), 'aupro_0.3': found.area(0.3),
                'pro_05': np.mean([region.overlap for region in table.regions])}
      if maps.max() <= 2:  # larger scores lose their differences in a logistic function there
        values |= {'auroc': auroc, 'aupr': ap}
      for key, value in values.items():
        yield _single(f'{label} {key}', 'AL', value, get[f'anomalib_{key}'])
  maps, masks = _basic(load(folder, 'mvtec.npz'))
  for factor in (2, 10, 20, 50):
    scaled = maps * np.float32(factor)
    values = {'f1_max': metrics.f1_optimal(masks, scaled).f1, 'aupro_03': metrics.aupro(scaled, masks)}
    for key, value in values.items():
      yield _single(f'pixels times {factor} {key}', 'AL', value, arrays[f'times_{factor}_anomalib_{key}'])
    # Scores outside of [0, 1] pass a logistic function there, in which large ones become equal.
    squashed = 1 / (1 + np.exp(-scaled))
    values = {'auroc': metrics.auroc(masks, squashed), 'aupr': metrics.average_precision(masks, squashed)}
    for key, value in values.items():
      yield _single(f'pixels times {factor} {key}, squashed', 'AL', value,
                    arrays[f'times_{factor}_anomalib_{key}'])


def ad_2(folder: Path) -> Iterator[Row]:
  """Compares SegF1, its threshold and AU-PRO 0.05 on two made objects of MVTec AD 2's layout."""
  arrays = load(folder, 'ad2.npz')
  means: dict[str, list] = {}
  for name in arrays.get('objects', ()):
    get = _of_case(arrays, name)
    validation, threshold = get['validation'], thresholds.k_sigma(get['validation'])
    mean = thresholds.k_sigma(validation, k=0)
    yield _exact(f'ad2 {name}, mean and deviation', 'NumPy',
                 [mean, thresholds.k_sigma(validation, k=1) - mean], get['validation_mean_std'])
    yield _exact(f'ad2 {name}, mean + 3 deviations', 'NumPy', threshold, get['threshold'])
    yield compare(f'ad2 {name}, maxima', 'NumPy', [thresholds.maximum([values]) for values in validation],
                  get['validation_maxima'], 0, 'no sum')
    shares = (0.95, 0.99, 0.999)
    yield _exact(f'ad2 {name}, quantiles', 'NumPy',
                 [thresholds.quantile(validation, share=share, method='linear') for share in shares],
                 get['validation_quantiles'])
    masks = np.unpackbits(get['masks']).reshape(get['test'].shape)
    for dtype in ('float32', 'float16'):
      maps, label = get['test'].astype(dtype), f'ad2 {name} {dtype}'
      for rule in ('greater', 'greater_equal'):
        stored = _of_case(get, f'{dtype}_{rule}')

        def count(positions, maps=maps, masks=masks, rule=rule, threshold=threshold):
          return segmentation.count_marked(maps[positions], masks[positions], threshold=threshold, rule=rule)

        found = count(slice(None))
        yield _counts(f'{label} {rule}, TP, FP, FN', 'definition', found.pixels, stored['counts'])
        yield _exact(f'{label} {rule}, SegF1', 'scikit-learn', found.seg_f1, stored['seg_f1'])
        yield _single(f'{label} {rule}, SegF1', 'torchmetrics', found.seg_f1, stored['torchmetrics_f1'])
        yield _exact(f'{label} {rule}, F1 of images', 'scikit-learn', found.class_f1, stored['class_f1'])
        yield _exact(f'{label} {rule}, F1 of bad images', 'scikit-learn', count(slice(4, None)).seg_f1,
                     stored['seg_f1_bad_only'])
        yield _exact(f'{label} {rule}, F1 of each bad image', 'scikit-learn',
                     [count(slice(i, i + 1)).seg_f1 for i in range(4, 10)], stored['f1_per_bad_image'])
        means.setdefault(f'{dtype}_{rule}_seg_f1', []).append(found.seg_f1)
      found, stored = curve.of_regions(maps, masks), _of_case(get, dtype)
      areas = [found.area(0.05), found.area(0.3)]
      means.setdefault(f'{dtype}_au_pro_005', []).append(areas[0])
      yield _official(f'{label} AU-PRO', 'MVTec', areas, [stored['au_pro_005'], stored['au_pro_03']])
      yield _exact(f'{label} AU-PRO 0.05', 'definition', areas[0], stored['exact_au_pro_005'])
      yield _exact(f'{label} image AUROC', 'MVTec', metrics.auroc(np.arange(10) >= 4, maps.max((1, 2))),
                   stored['image_auroc'])
  for key, values in means.items():
    if f'mean_{key}' in arrays:
      function = _official if 'au_pro' in key else _exact
      yield function(f'ad2 mean {key}', 'definition', np.mean(values), arrays[f'mean_{key}'])


def aupimo(folder: Path) -> Iterator[Row]:
  """Compares AUPIMO with its authors' library and with anomalib."""
  arrays = load(folder, 'aupimo.npz')
  if not arrays:
    return
  small = arrays['small_maps'], arrays['small_masks']
  for size in ('small', 'large') if 'large_bounds' in arrays else ('small',):
    maps, masks = small if size == 'small' else _aupimo_large()
    bounds, get = tuple(arrays[f'{size}_bounds']), _of_case(arrays, size)
    for key in [key for key in get if key.startswith('authors') and key.endswith('_points')]:
      number = int(key.split('_')[1])
      found = metrics.aupimo(maps, masks, bounds=bounds, num_thresholds=number)
      label = f'aupimo {size} {number:,}'
      for origin, title in (('authors', 'AUPIMO'), ('anomalib', 'AL')):
        yield _exact(label, title, found.values, get[f'{origin}_{number}_aupimo'])
      yield _counts(f'{label}, points', 'AUPIMO', found.points, get[key])
      yield _counts(f'{label}, points', 'AL', found.points, get[f'anomalib_{number}_points'])
      at = [get[f'authors_{number}_at_{bound}'][1:] for bound in bounds]
      yield compare(f'{label}, thresholds', 'AUPIMO', found.thresholds, [a for a, _ in at], 0,
                    'the same float32')
      yield _exact(f'{label}, rates', 'AUPIMO', found.reached, [b for _, b in at])
    found = metrics.aupimo(maps, masks, bounds=bounds, num_thresholds=None)
    yield _exact(f'aupimo {size}, every score', 'definition', found.values, get['limit_nearest'])
    found = metrics.aupimo_interpolated(maps, masks, bounds=bounds)
    yield _exact(f'aupimo {size}, interpolated', 'definition', found.values, get['limit_interpolated'])
    if 'anomalib_mean' in get:
      found = metrics.aupimo(maps, masks, bounds=bounds)
      yield _exact(f'aupimo {size}, mean', 'AL', found.mean, get['anomalib_mean'])
  maps, masks = small
  highest = false_positive_rate.HighestScores(1, len(maps))
  for values in maps[~masks.any((1, 2))]:
    highest.add(values)
  for origin, title in (('authors', 'AUPIMO'), ('anomalib', 'AL')):
    get = _of_case(arrays, f'small_{origin}_1000')
    if 'tprs' in get:
      rates = highest.rates(get['thresholds'])
      yield _exact('aupimo small, curve: shared rate', title, rates, get['shared_fpr'])
      yield _exact('aupimo small, curve: overlaps', title,
                   [1 - np.searchsorted(np.sort(values[mask]), get['thresholds'], 'left') / mask.sum()
                    if mask.any() else np.full(1000, np.nan) for values, mask in zip(maps, masks)],
                   get['tprs'])
  emptied, whole = masks.copy(), masks.copy()
  emptied[9], whole[9] = False, True
  for name, case, number in (('emptied', emptied, 1000), ('whole', whole, 1000), ('forced', masks, 60)):
    found = metrics.aupimo(maps, case, bounds=(1e-3, 1e-1), num_thresholds=number, force=name == 'forced')
    for origin, title in (('authors', 'AUPIMO'), ('anomalib', 'AL')):
      stored = arrays[f'small_{name}_{origin}_{number}_aupimo']
      yield _exact(f'aupimo small, {name}', title, found.values, stored)
  constant, wrong = np.where(masks.any((1, 2))[:, None, None], maps, np.float32(1)), maps.copy()
  wrong[0, 0, 0] = np.nan
  for name, values, case, inputs in (
      ('too few normal pixels', maps, masks, {}),
      ('constant normal maps', constant, masks, {'bounds': (1e-3, 0.1)}),
      ('no normal image', maps, masks | True, {}), ('no anomalous image', maps, masks & False, {}),
      ('few points', maps, masks, {'bounds': (1e-3, 0.1), 'num_thresholds': 60}),
      ('more thresholds than float32 has', maps / np.float32(2**20) + 1, masks, {'bounds': (1e-3, 0.1)}),
      ('nan in normal', wrong, masks, {'bounds': (1e-3, 0.1)})):
    yield refusal(
        f'aupimo {name}: refused', 'AUPIMO',
        lambda values=values, case=case, inputs=inputs: metrics.aupimo(values, case, **inputs),
        'an error there')


def loco(folder: Path) -> Iterator[Row]:
  """Compares sPRO with MVTec's functions for LOCO, every score a threshold."""
  arrays = load(folder, 'loco.npz')
  if not arrays:
    return
  with tempfile.TemporaryDirectory() as temporary:
    path = Path(temporary) / 'defects_config.json'
    path.write_text(json.dumps(json.loads(str(arrays['config_json']))))
    config = saturation.read_config(path)
  maps, kinds, masks = arrays['maps'], arrays['kinds'].tolist(), arrays['channel_masks']
  defects = [config[int(value)] for value in arrays['channel_value']]
  channels: list[list] = [[] for _ in kinds]
  for image, mask, defect in zip(arrays['channel_image'], masks, defects):
    channels[image].append(mask * defect.pixel_value)
  areas = [defect.saturation_area(int(mask.sum())) for mask, defect in zip(masks, defects)]
  yield _counts('loco, areas of defects', 'MVTec', masks.sum((1, 2)), arrays['defect_areas'])
  yield _counts('loco, saturation areas', 'MVTec', areas, arrays['saturation_areas'])
  found = metrics.spro(maps, channels, kinds, config, limits=_LIMITS)
  value = [found.structural.areas, found.logical.areas, found.mean]
  yield _exact('loco sPRO, structural, logical, mean', 'MVTec', value, arrays['all_auc_spro'])
  pooled = saturation.spro_areas(maps, channels, config, limits=_LIMITS)
  yield _exact('loco sPRO, all images', 'MVTec', pooled.areas, arrays['all_auc_spro_all'])
  for distance in ('001', '003'):
    if f'refined_{distance}_auc_spro' in arrays:
      yield compare(f'loco sPRO, refined to 0.{distance}', 'MVTec', value,
                    arrays[f'refined_{distance}_auc_spro'], 2e-3, 'the original approximates')
  # The curve itself, channel by channel; the script marks what lies above a threshold.
  normal = np.sort(np.concatenate([
      values[~np.any([channel > 0 for channel in own], axis=0)] if own else values.ravel()
      for values, own in zip(maps, channels)]))
  at = arrays['all_thresholds']
  rates = 1 - np.searchsorted(normal, at, 'right') / normal.size
  yield _exact('loco, curve: false positive rate', 'MVTec', rates, arrays['all_fp_rates'])
  found_share = np.array([
      np.minimum((mask.sum() - np.searchsorted(np.sort(maps[image][mask]), at, 'right')) / area, 1)
      for image, mask, area in zip(arrays['channel_image'], masks, areas)])
  yield _exact('loco, curve: sPRO', 'MVTec', found_share.mean(axis=0), arrays['all_mean_spros'])
  if 'all_spros_per_channel' in arrays:
    positions = np.searchsorted(arrays['all_index'], arrays['all_spros_per_channel_index'])
    yield _exact('loco, curve: each channel', 'MVTec', found_share[:, positions],
                 arrays['all_spros_per_channel'])
  yield _exact('loco image AUROC, structural, logical, mean', 'MVTec',
               saturation.image_auroc(kinds, maps.max((1, 2)))[:3], arrays['image_auroc'])
  table = [saturation.Defect('', 1, t if relative else int(t), bool(relative)).saturation_area(int(area))
           for t, relative, area in arrays['saturation_table']]
  yield compare('loco, table of saturation areas', 'MVTec', table,
                np.maximum(arrays['saturation_table_area'], 1), 0, 'counts; at least 1 here')


def visa(folder: Path) -> Iterator[Row]:
  """Compares VisA's rule with its own code."""
  arrays = load(folder, 'visa.npz')
  if not arrays:
    return
  for name, maps, masks in _cases(load(folder, 'mvtec.npz')):
    get = _of_case(arrays, name)
    if 'roc_auc' not in get:
      continue
    found = visa_reference.visa_pixels(maps, masks)
    yield compare(f'visa {name}, areas', 'VisA', [found.roc_auc, found.pr_auc],
                  [get['roc_auc'], get['pr_auc']], 0, 'rounded to 4 decimals')
    values = {'thresholds': found.thresholds, 'fpr': found.false_positive_rate,
              'tpr': found.true_positive_rate, 'precision': found.precision, 'f1': found.f1}
    for key, value in values.items():
      if key in get:
        yield _exact(f'visa {name}, {key}', 'VisA', value, get[key])
    labels, scores = masks.any((1, 2)), maps.max((1, 2))
    yield _exact(f'visa {name}, image metrics', 'VisA',
                 [metrics.auroc(labels, scores), visa_reference.visa_image_au_pr(labels, scores)],
                 [get['image_auroc'], get['image_au_pr']])
  labels, scores = arrays['image_labels'], arrays['image_scores']
  yield _exact('visa image metrics of ties', 'VisA',
               [metrics.auroc(labels, scores), visa_reference.visa_image_au_pr(labels, scores)],
               [arrays['image_auroc'], arrays['image_au_pr']])
  yield _exact('visa image metrics of ties', 'definition',
               [metrics.auroc(labels, scores), metrics.average_precision(labels, scores)],
               [arrays['image_exact_auroc'], arrays['image_exact_ap']])
  maps, masks = _basic(load(folder, 'mvtec.npz'))
  yield refusal('visa, masks of 255: refused', 'VisA',
                lambda: visa_reference.visa_pixels(maps, masks * np.uint8(255)), 'an error there')


def regions(folder: Path) -> Iterator[Row]:
  """Compares the table of regions."""
  arrays = load(folder, 'regions.npz')
  if not arrays:
    return
  maps, masks = _basic(load(folder, 'mvtec.npz'))
  names = {'label': 'number', 'max': 'maximum', 'overlap_ge_0.8': 'overlap'}
  rows = metrics.tabulate_regions(maps, masks, threshold=0.8).regions
  for i, column in enumerate(arrays['columns']):
    if column != 'overlap_gt_0.8':
      yield _exact(f'regions, {column}', 'definition', [getattr(r, names.get(column, column)) for r in rows],
                   arrays['regions'][:, i])
  for connectivity in (4, 8):
    rows = metrics.tabulate_regions(maps, masks, threshold=0.8, connectivity=connectivity).regions
    yield _counts(f'regions of each image, {connectivity}-connected', 'definition',
                  np.bincount([r.image for r in rows], minlength=len(maps)), arrays[f'count_{connectivity}'])


def validation_thresholds(folder: Path) -> Iterator[Row]:
  """Compares thresholds from good maps."""
  arrays, maps = load(folder, 'stats.npz'), load(folder, 'ad2.npz').get('can_validation')
  if maps is None or not arrays:
    return
  for k in (1, 2, 3):
    yield _exact(f'threshold, mean + {k} deviations', 'NumPy', thresholds.k_sigma(maps, k=k),
                 arrays[f'val_mean_plus_{k}_std'])
  mean = thresholds.k_sigma(maps, k=0)
  yield _exact('mean and deviation of good pixels', 'NumPy', [mean, thresholds.k_sigma(maps, k=1) - mean],
               arrays['val_mean_std_population'])
  yield compare('threshold, maximum', 'NumPy', thresholds.maximum(maps), arrays['val_maximum'], 0, 'no sum')
  yield _exact('threshold, mean + 3 deviations of maxima', 'NumPy',
               thresholds.k_sigma(maps.max((1, 2))[:, None, None]),
               arrays['val_image_maxima_mean_plus_3_std'])
  for share in (0.95, 0.99, 0.995, 0.999):
    for method in ('higher', 'lower', 'linear'):
      yield _exact(f'threshold, quantile {share} {method}', 'NumPy',
                   thresholds.quantile(maps, share=share, method=method),
                   arrays[f'val_quantile_{share}_{method}'])


def uncertainty(folder: Path) -> Iterator[Row]:
  """Compares intervals and paired tests with SciPy, with AUPIMO's authors, and with given draws."""
  arrays = load(folder, 'stats.npz')
  if not arrays:
    return
  good, bad = arrays['boot_good'], arrays['boot_bad']
  labels, scores = np.repeat([0, 1], [good.size, bad.size]), np.concatenate([good, bad])
  (drawn,) = intervals.image_resamples(ranking.auroc, labels, [scores], resamples=1000, seed=7)
  yield _exact('bootstrap, AUROC of each resample', 'definition', drawn, arrays['boot_values'])
  yield _exact('bootstrap of AUROC, standard error', 'definition', drawn.std(ddof=1),
               arrays['boot_standard_error'])
  for label, picks in zip(('good', 'bad'), intervals.resampled((good.size, bad.size), 1000, 7)):
    yield _counts(f'bootstrap, first draws of {label} images', 'NumPy', picks[:3],
                  arrays[f'boot_{label}_index_head'])
  for method in ('percentile', 'basic'):
    found = intervals.image_interval(ranking.auroc, labels, scores, method=method, resamples=1000, seed=7)
    yield _exact(f'bootstrap of AUROC, {method}', 'definition', [found.estimate, found.low, found.high],
                 [arrays['boot_auroc'], *arrays[f'boot_{method}_95']])
  yield _exact("DeLong's standard error", 'definition', intervals.delong_variance(labels, scores)**0.5,
               arrays['delong_standard_error'])
  yield _exact('bootstrap, average precision', 'scikit-learn', metrics.average_precision(labels, scores),
               arrays['boot_ap'])
  a, b, c = (arrays[f'scores_{name}'] for name in 'abc')
  for name, values in (('a', a), ('a_minus_b', a - b)):
    found = intervals.mean_interval(values, bounds=(-1, 1), resamples=1000, seed=8)
    yield _exact(f'bootstrap of the mean {name}, BCa', 'SciPy', [found.estimate, found.low, found.high],
                 [arrays[f'boot_mean_{name}'], *arrays[f'boot_mean_{name}_scipy_bca_95']])
    generator = np.random.default_rng(7)
    intervals.resampled((30, 20), 1000, generator)  # the reference goes on from there
    found = intervals.mean_interval(
        values, bounds=(-1, 1), method='percentile', resamples=1000, seed=generator)
    yield _exact(f'bootstrap of the mean {name}, percentile', 'definition', [found.low, found.high],
                 arrays[f'boot_mean_{name}_percentile_95'])
  for pair, one, other in (('ab', a, b), ('ac', a, c)):
    for kind, tolerance in (('raw', 0), ('atol', 1e-3)):
      for zeros in ('wilcox', 'pratt'):
        for alternative in ('two-sided', 'greater'):
          found = paired.wilcoxon(one, other, tolerance=tolerance, zeros=zeros, alternative=alternative)
          statistic = found.positive if alternative == 'greater' else min(found.positive, found.negative)
          yield _exact(f'Wilcoxon {pair} {kind} {zeros} {alternative}', 'SciPy', [statistic, found.p_value],
                       arrays[f'scipy_wilcoxon_{pair}_{kind}_{zeros}_{alternative}'])
    found = paired.wilcoxon(one, other)
    yield compare(f'signed ranks {pair}', 'SciPy', [found.positive, found.negative, found.remaining],
                  arrays[f'signed_ranks_{pair}'], 0, 'ranks')
    yield _exact(f'sign test {pair}', 'SciPy', paired.sign_test(one, other), arrays[f'sign_test_{pair}'])
  methods = [arrays[f'scores_{name}'] for name in arrays['names']]
  for test, compute in (('wilcoxon', lambda *args, **kwargs: paired.wilcoxon(*args, **kwargs).p_value),
                        ('ttest', paired.paired_t)):
    for alternative in ('greater', 'less', 'two-sided'):
      truth = arrays[f'authors_{test}_{alternative}_confidence']
      value = [[np.nan if i == j else 1 - compute(methods[i], methods[j], alternative=alternative)
                for j in range(3)] for i in range(3)]
      truth = np.where(np.eye(3, dtype=bool), np.nan, truth)
      yield _exact(f'{test} {alternative}, confidence', 'AUPIMO', value, truth)
  yield _exact('average ranks', 'AUPIMO', np.sort(paired.average_ranks(np.stack(methods, axis=1))),
               arrays['authors_average_ranks'])
  yield _exact('Holm', 'by hand', paired.holm(arrays['holm_input']), arrays['holm_adjusted'])


def peers(folder: Path) -> Iterator[Row]:
  """Compares AU-PRO with exact values beside re-implementations of what others do, which are not compared."""
  arrays = load(folder, 'peers.npz')
  for name, maps, masks in _cases(load(folder, 'mvtec.npz')) if arrays else ():
    if f'{name}_exact' in arrays:
      yield _exact(f'peers {name}, AU-PRO', 'definition', metrics.aupro(maps, masks), arrays[f'{name}_exact'])
    if name == 'basic':
      bad = masks.any((1, 2))
      yield _exact('peers, AU-PRO without good images', 'definition', metrics.aupro(maps[bad], masks[bad]),
                   arrays['bad_images_only_exact'])


CHECKS: tuple[Callable[[Path], Iterator[Row]], ...] = (
    mvtec, mvtec_large, pixels, ad_2, aupimo, loco, visa, regions, validation_thresholds, uncertainty,
    peers)
FILES = (
    'mvtec.npz', 'mvtec_large.npz', 'anomalib_large.npz', 'pixel.npz', 'ad2.npz', 'aupimo.npz', 'loco.npz',
    'visa.npz', 'regions.npz', 'stats.npz', 'peers.npz')


def _exact(quantity, origin, value, truth):
  return compare(quantity, origin, value, truth, 1e-12, 'float64 sums in another order')


def _official(quantity, origin, value, truth):
  return compare(quantity, origin, value, truth, 1e-8, 'the original has a float32 axis')


def _single(quantity, origin, value, truth):
  return compare(quantity, origin, value, truth, 1e-6, 'the original is in float32')


def _counts(quantity, origin, value, truth):
  return compare(quantity, origin, value, truth, 0, 'counts')


def _of_case(arrays, name):
  """Selects the arrays of a case, and cuts its name off theirs."""
  return {key.removeprefix(f'{name}_'): value for key, value in arrays.items() if key.startswith(f'{name}_')}


def _basic(arrays):
  return arrays['basic_maps'], arrays['basic_masks'] > 0


def _cases(arrays):
  """Yields variants of one set of maps and masks: ties, other types, what the originals stumble over."""
  if not arrays:
    return
  maps, masks = _basic(arrays)
  emptied, nan_normal, nan_anomalous, infinite = masks.copy(), maps.copy(), maps.copy(), maps.copy()
  emptied[11] = False
  nan_normal[0, 5, 5] = nan_anomalous[10, 40, 5] = np.nan
  infinite[0, 5, 5] = infinite[1, 6, 6] = infinite[10, 40, 5] = np.inf
  cases = {
      'basic': (maps, masks), 'ties': (np.round(maps * 16).astype(np.float32) / np.float32(16), masks),
      'constant': (np.full_like(maps, 0.5), masks), 'perfect': (masks.astype(np.float32), masks),
      'inverted': (-masks.astype(np.float32), masks), 'empty_mask': (maps, emptied),
      'several_values': (maps, masks),
      'float16': (maps.astype(np.float16), masks), 'float64': (maps.astype(np.float64), masks),
      'scaled_100': (maps * np.float32(100), masks), 'nan_normal': (nan_normal, masks),
      'nan_anomalous': (nan_anomalous, masks), 'infinite': (infinite, masks),
      'no_anomalous_pixel': (maps[:6], masks[:6]), 'no_normal_pixel': (maps[6:8], masks[6:8] | True)}
  for name, (own_maps, own_masks) in cases.items():
    yield name, own_maps, own_masks


def _curve_at(found, maps, masks, distinct, index):
  """Reads a curve at places of one that has a point at every distinct score, and one more at both ends."""
  normal = np.sort(maps[~masks])
  inside = (index > 0) & (index <= distinct.size)
  at = distinct[np.clip(index - 1, 0, distinct.size - 1)]
  alarms = normal.size - np.searchsorted(normal, at, 'left')
  x = (alarms.astype(np.float32).astype(np.float64) / normal.size).astype(np.float32)  # as MVTec rounds
  scores, overlap = (np.concatenate([getattr(part, name) for part in found.parts])
                     for name in ('thresholds', 'overlap'))
  y = np.append(0, overlap)[scores.size - np.searchsorted(scores[::-1], at, 'left')]
  return (np.where(inside, values, index > 0) for values in (x, y))


def _noise(generator, n, height, width):
  """Draws maps of 8 x 8 blocks and white noise."""
  blocks = generator.random((n, -(-height // 8), -(-width // 8))).repeat(8, 1).repeat(8, 2)
  blocks = blocks[:, :height, :width]
  return 0.6 * blocks + 0.4 * generator.random((n, height, width))


def _draw_boxes(generator, masks):
  """Draws one to three boxes into each mask."""
  _, height, width = masks.shape
  for mask in masks:
    for _ in range(generator.integers(1, 4)):
      top, left = generator.integers(0, height - 4), generator.integers(0, width - 4)
      rows, columns = generator.integers(2, max(3, height // 4)), generator.integers(2, max(3, width // 4))
      mask[top:top + rows, left:left + columns] = True


def _large():
  """Draws 24 maps of 1024 x 1024, and masks of the last 12."""
  generator = np.random.default_rng(20251102)
  maps, masks = np.empty((24, 1024, 1024), np.float32), np.zeros((24, 1024, 1024), bool)
  _draw_boxes(generator, masks[12:])
  for own, mask in zip(maps, masks):
    noise = _noise(generator, 1, 1024, 1024)[0]
    own[:] = noise + mask * (0.1 + 0.5 * generator.random())
  return maps, masks


def _aupimo_large():
  """Draws 20 maps of 320 x 320, and masks of the last 8."""
  generator = np.random.default_rng(20251104)
  maps, masks = _noise(generator, 20, 320, 320), np.zeros((20, 320, 320), bool)
  _draw_boxes(generator, masks[12:])
  return (maps + masks * (0.2 + 0.9 * generator.random(20))[:, None, None]).astype(np.float32), masks
