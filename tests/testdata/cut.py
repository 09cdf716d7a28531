"""Makes the arrays beside this file from the full set of reference arrays.

    python tests/testdata/cut.py ../shared/golden

Keeps what derives from no image of others, fewer samples of each array, and what
`experiments.parity` reads. See README.md for where the full set comes from.
"""

import re
import sys
from pathlib import Path

import numpy as np

_KEEP = {
    'preprocessing.npz': r'synthetic_\d+x\d+/(u8_crc32|mask_u8_crc32|mask_counts|float_.*)',
    'backbones.npz': r'((wide_)?resne|densenet)[^/]+/synthetic/[^/]+/(shape|idx|f64|stats_f64)',
    'embedding.npz': r'[^/]+/(patchsize_pretrain_target|layers|feature_shapes|shape|idx|f64|stats_f64)',
    'coreset.npz': r'[^/]+/(pi_approx|anomalib)/(indices|projection|start_points)',
    'metrics.npz': (
        r'(plain|ties)/(maps|masks|labels|scores|(image|pixel|anomaly_pixel)_.*'
        r'|(aupro[48]|anomalib_aupro)_\d.*)'),
    'scoring_synthetic_pi.npz': (
        r'train_paths|test_paths|coreset_indices|projection|start_points'
        r'|(train|test)_embedding/(shape|idx|f64|stats_f64)'
        r'|nn[15]/(patch_scores_.*|image_scores_f64|segmentation/(idx|f64))'),
    'scoring_synthetic_anomalib.npz': (
        r'train_paths|own/order_of_train_paths|own/projection|(own|given)/coreset_indices'
        r'|(own|given)/nn\d/(image_scores_f64|patch_scores_.*|maps/(idx|f64))'),
    'evaluation/mvtec.npz': (
        r'limits|basic_(maps|masks)|\w+_(au_pro|exact_\w+|image_auroc|image_[ft]pr|points)'
        r'|(ties|constant|perfect|inverted)_(curve_index|fpr|pro)'),
    'evaluation/pixel.npz': r'(?!.*partial).*',
    'evaluation/aupimo.npz': r'small_(bounds|maps|masks|limit_\w+|\w+_(aupimo|points)|authors_\w+_at_[\d.]+)',
    'evaluation/loco.npz': (
        r'maps|kinds|config_json|channel_\w+|\w+_areas|all_(auc_spro|auc_spro_all|thresholds|mean_spros|fp_rates)'
        r'|image_auroc|saturation_table\w*'),
    'evaluation/visa.npz': r'.*',
    'evaluation/regions.npz': r'.*',
    'evaluation/stats.npz': r'.*',
    'evaluation/peers.npz': r'\w+_exact',
}
_SAMPLES = 512


def main(source: Path, target: Path) -> None:
  for name, pattern in _KEEP.items():
    with np.load(source / name) as arrays:
      kept = {k: arrays[k] for k in arrays.files if re.fullmatch(pattern, k)}
    for key, value in kept.items():
      if re.search(r'(^|[/_])(idx|f64|float_f32)$', key) and value.ndim == 1 and len(value) > _SAMPLES:
        kept[key] = value[::len(value) // _SAMPLES]  # positions and values alike
      if key.endswith('idx'):
        kept[key] = kept[key].astype(np.int32)
    (target / name).parent.mkdir(exist_ok=True)
    np.savez_compressed(target / name, **kept)
    print(f'{name}: {len(kept)} arrays, {(target / name).stat().st_size / 1e3:.0f} kB')


if __name__ == '__main__':
  main(Path(sys.argv[1]), Path(__file__).parent)
