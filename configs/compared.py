"""The compared methods of tables S1 to S3, and with configs/wrn50.py the curves of figure S3.

    python -m experiments.sweep --config=configs/compared.py --config.data.root=PATH --workdir=runs/s1/rest
    python -m experiments.mvtec --config=configs/wrn50.py --config.data.root=PATH --workdir=runs/s1/patchcore
    python -m experiments.tables --workdir=runs/s1 --table=S1

SPADE, PaDiM, MahalanobisAD and OC-SVM have the networks and images of configs/wrn50.py, each with the
layers of its own paper. The methods whose network is trained, in their reduced settings (docs/trained.md),
and the statistics of pixels that stand beside them as controls, see all of every image at 128 pixels, or as
many as they take; DifferNet and the students' teacher stand on the network's own layers.

Mean over the 15 categories, in percent (MahalanobisAD and OC-SVM were published with other networks):

| | | image AUROC | pixel AUROC | AUPRO |
|---|---|---|---|---|
| SPADE | published | 85.5 | 96.0 | 91.7 |
| PaDiM | published | 95.3 | 97.5 | 92.1 |
| MahalanobisAD | published | 95.8 | - | - |
| OC-SVM | published | 71.9 | - | - |
| GeoTrans | published | 67.2 | - | - |
| ITAE | published | 83.9 | - | - |
| PatchSVDD | published | 92.1 | 95.7 | - |
| DifferNet | published | 94.9 | - | - |
| GANomaly | published | 76.2 | - | - |
| DSEBM | published | 70.9 | - | - |
| CAVGA-Rw | published | 90 | 89 | - |
| vis. expl. VAE | published | - | 86 | - |
| AE-SSIM | published | - | 87 | 69.4 |
| γ-VAE + grad. | published | - | 88.8 | - |
| Student | published | - | - | 85.7 |
| all | measured | two categories: docs/results/README.md, docs/trained.md; all take the full data set |

Hardware: any; SPADE and PaDiM keep up to 7 and 2 GB on disk, and SPADE needs as much memory. Time: SPADE
does 1.8e12 operations an image, 12 s expected on two CPU cores, the others some milliseconds beside the
network's 93; a training takes 1 to 10 minutes a category there. Reduced: `--only=padim`. On two categories
with another network (`--set='backbone.layers='`): docs/results/README.md.
"""

from configs import default

# Images that a method's network sees at more than 128 pixels.
_LARGER = {'differnet': '224,224', 'patch_svdd': '256,256'}
_TRAINED = (
    'ae_ssim', 'gamma_vae', 'explained_vae', 'ganomaly', 'dsebm', 'cavga', 'differnet', 'patch_svdd',
    'student', 'geotrans', 'itae')
_CONTROLS = ('brightness', 'deviation', 'half_norm', 'brightness_distance', 'mean_image', 'nearest_image')


def _whole(name):
  return f'preprocess.resize={_LARGER.get(name, "128,128")} preprocess.crop='


def get_config():
  config = default.get_config()
  config.report.gallery = 0  # a page for each point, without images
  config.sweep = (
      'detector=spade backbone.layers=layer1,layer2,layer3,layer4',
      'detector=padim backbone.layers=layer1,layer2,layer3',
      'detector=mahalanobis_ad backbone.layers=layer1,layer2,layer3,layer4',
      'detector=ocsvm backbone.layers=layer4',
      *(f'detector={name} {_whole(name)}' for name in _TRAINED),
      f'detector=cavga cavga.weak=True data.labelled_defects=0.02 {_whole("cavga")}',
      f'detector=gamma_vae gamma_vae.map=residual {_whole("gamma_vae")}',
      *(f'detector={name} {name}.standardise=True {_whole(name)}' for name in (
          'ganomaly', 'dsebm', 'geotrans', 'itae')),
      *(f'detector={name} {name}.steps=0 {_whole(name)}' for name in _TRAINED),
      *(f'detector=pixel_statistics pixel_statistics.statistic={name} {_whole(name)}' for name in _CONTROLS),
      f'detector=pixel_statistics pixel_statistics.standardise=True {_whole("pixel_statistics")}')
  return config
