"""Every field there is, with the paper's values. The other configs start from here and change a few.

Sizes are in pixels; () means none. Lists on the command line are separated by commas:
`--config.data.categories=screw,transistor --config.coreset.ratios=0.1,0.01`.
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
  config = ConfigDict()
  config.seed = 0
  config.detector = 'patchcore'  # or 'spade', 'padim', 'mahalanobis_ad', 'ocsvm'

  config.data = ConfigDict()
  # 'folder' (MVTec layout), 'synthetic' (drawn into root if absent), 'tfds' (by experiments.prepare), or
  # a data set as published: 'visa', 'btad', 'mvtec_loco', 'mvtec_ad_2', 'kolektor_sdd2', 'mpdd'
  config.data.source = 'folder'
  config.data.root = ''
  config.data.categories = ()  # () for all
  config.data.shots = 0  # training images to fit on, drawn at random; 0 for all
  config.data.draw = 0  # number of the draw
  config.data.batch_size = 32
  config.data.num_workers = 2  # processes that decode images; 0 for threads
  config.data.on_error = 'raise'  # or 'skip': leave out unreadable images, and count them

  config.preprocess = ConfigDict()
  config.preprocess.resize = (256,)  # (short side,), (height, width) or ()
  config.preprocess.resize_side = 'short'  # or 'long'
  config.preprocess.pad = ()
  config.preprocess.crop = (224,)
  config.preprocess.mask_resize = 'antialiased'  # or 'nearest'
  config.preprocess.mask_threshold = 1.0  # positive where the antialiased mask reaches this

  config.backbone = ConfigDict()
  # architecture.tag or module:factory; several, joined by '+', make an ensemble; 'auto' for the one below
  # where it can be had, else the built-in 'resnet18_slim.procedural'
  config.backbone.name = 'wide_resnet50_2.tv_in1k'
  config.backbone.weights = ''  # '' for the tag's checkpoint, a file, or 'random'
  config.backbone.layers = ()  # () for the backbone's own, layer2 and layer3 for ResNets
  # 'float32', 'tensorfloat32' or 'bfloat16'; 'auto' for the fastest that is good enough: docs/precision.md
  config.backbone.precision = 'auto'

  config.embedding = ConfigDict()
  config.embedding.kind = 'adaptive'  # or 'mean', or 'auto': 'mean' for networks that are no usual ResNets
  config.embedding.patch_size = 3
  config.embedding.pretrain_dim = 1024
  config.embedding.target_dim = 1024

  config.coreset = ConfigDict()
  config.coreset.ratios = (0.25, 0.10, 0.01)  # one fit at the largest serves all
  config.coreset.method = 'greedy'  # or 'random', 'identity' (ratio 1), 'kmeans' (one ratio)
  config.coreset.projection = 'dense'  # or 'sparse'
  config.coreset.projection_dim = 128  # 0 for as many as the Johnson-Lindenstrauss bound asks for
  config.coreset.start = 'mean'  # mean distance to random points, or 'point': one, itself selected
  config.coreset.num_start_points = 10  # only read with start='mean'

  config.fit = ConfigDict()
  config.fit.memory_gb = 8.0  # of the host; what exceeds it lies in the workdir until the bank is made

  # Thresholds from good images alone; read by experiments.fit.
  config.calibration = ConfigDict()
  config.calibration.false_alarm_rate = 0.01  # of good images
  config.calibration.folds = 5  # parts of the training images, each scored against the others; 0 for none
  config.fit.keep_images = True  # small pictures of the training images in the bank, to show why

  config.scoring = ConfigDict()
  config.scoring.num_neighbors = 1
  config.scoring.distance = 'squared'  # or 'root'
  config.scoring.image_score = 'max'  # or 'reweighted', the paper's equation 7
  config.scoring.support_neighbors = 9  # of equation 7
  config.scoring.upsampling = 'bilinear'  # or 'nearest'
  config.scoring.sigma = 4.0
  config.scoring.blur_edges = 'symmetric'  # or 'reflect', as numpy.pad names them

  config.search = ConfigDict()  # of nearest neighbours; no influence on results
  config.search.shortlist = 'auto'  # 'float32' or 'bfloat16', which is faster on CPUs that have it
  config.search.bank = 'replicated'  # on every device, or 'sharded' over them when it is too large

  # The other detectors, each read with detector=its name.
  config.spade = ConfigDict()
  config.spade.num_images = 50  # K: training images that an image is compared with
  config.spade.num_neighbors = 1  # kappa: pixels of those
  config.spade.distance = 'squared'  # or 'root'
  config.spade.sigma = 4.0

  config.padim = ConfigDict()
  config.padim.num_dims = 550  # channels chosen at random; 100 for ResNet-18, 0 for all
  config.padim.epsilon = 0.01
  config.padim.sigma = 4.0
  config.padim.image_score = 'position'  # largest position, or 'map': of the enlarged, blurred map

  config.mahalanobis_ad = ConfigDict()
  config.mahalanobis_ad.shrinkage = config_dict.placeholder(float)  # None for Ledoit and Wolf's

  config.ocsvm = ConfigDict()
  config.ocsvm.nu = 0.1
  config.ocsvm.gamma = 0.0  # 0 scales by the data

  config.metrics = ConfigDict()
  config.metrics.max_fpr = 0.3  # limit of AUPRO
  config.metrics.connectivity = 8  # of AUPRO's regions, or 4

  # Published numbers to print beside ours: the method of each coreset ratio, and its tables.
  config.published = ConfigDict()
  config.published.ratios = ()
  config.published.methods = ()
  config.published.image_auroc = 'third_party/paper_tables/table_s1_image_auroc.csv'
  config.published.pixel_auroc = 'third_party/paper_tables/table_s2_pixel_auroc.csv'
  config.published.aupro = 'third_party/paper_tables/table_s3_aupro.csv'

  config.report = ConfigDict()
  config.report.errors = False  # keep wrongly classified images, for figures S1 and S2
  # Images of each category in report.html: errors first, then the highest-scoring and borderline ones;
  # 60 take 1 to 2 MB. 0 for none.
  config.report.gallery = 60

  # For experiments.sweep: each point is written as on the command line, 'data.shots=5 data.draw=2'.
  config.sweep = ()
  return config
