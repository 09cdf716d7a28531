"""The plain ways to do what this package does, for `experiments.benchmark` to measure against.

They are written from their descriptions. torch, faiss and scikit-learn are asked for only when they are used;
`available` says which of them are there. torch runs on the device that JAX runs on; every function waits
for its results.
"""

import contextlib
import importlib.util
import os

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments import timing


def available(*modules: str) -> bool:
  """Tells whether all of these modules can be imported."""
  return all(importlib.util.find_spec(m) is not None for m in modules)


def torch_on_all_cores():
  """Imports torch, and has it use all cores and compute no gradients."""
  import torch
  torch.set_num_threads(os.cpu_count() or 1)
  torch.set_grad_enabled(False)
  return torch


def torch_device() -> str:
  """Names torch's device: 'cuda' if JAX runs on a GPU and torch can too, else 'cpu'."""
  on_gpu = jax.default_backend() not in ('cpu', 'tpu')
  return 'cuda' if on_gpu and torch_on_all_cores().cuda.is_available() else 'cpu'


def torch_wait() -> None:
  """Waits for all that torch has sent to the card."""
  if torch_device() == 'cuda':
    torch_on_all_cores().cuda.synchronize()


def torch_release() -> None:
  """Gives back the memory that torch keeps on the card."""
  if available('torch') and torch_device() == 'cuda':
    torch_on_all_cores().cuda.empty_cache()


def torch_tensor(values):
  """Puts an array or tensor on the device that torch uses."""
  torch = torch_on_all_cores()
  if not isinstance(values, torch.Tensor):
    values = torch.from_numpy(np.require(values, requirements='W'))
  return values.to(torch_device())


@contextlib.contextmanager
def torch_precision(precision: str):
  """Sets the arithmetic of a block: 'float32', 'tensorfloat32', or 'bfloat16', torch's automatic casts.

  The fastest of cuDNN's convolutions are chosen by trying, as anyone does who wants speed.
  """
  torch = torch_on_all_cores()
  torch.backends.cudnn.benchmark = True
  torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision != 'float32'
  with torch.autocast(torch_device(), torch.bfloat16, enabled=precision == 'bfloat16'):
    yield


# Greedy k-center: `num_selected` steps from the mean distance to `start`.


def numpy_k_center(points, num_selected, start):
  """Selects points in NumPy, with one norm for each step."""
  distance = np.mean([np.linalg.norm(points - points[s], axis=1) for s in start], axis=0)
  picks = []
  for _ in range(num_selected):
    picks.append(int(distance.argmax()))
    distance = np.minimum(distance, np.linalg.norm(points - points[picks[-1]], axis=1))
  return np.array(picks)


def torch_k_center(points, num_selected, start):
  """Selects points in torch, with one norm for each step, as the PyTorch versions have it."""
  torch, points = torch_on_all_cores(), torch_tensor(points)
  distance = torch.stack([torch.linalg.norm(points - points[s], dim=1) for s in start]).mean(0)
  picks = []
  for _ in range(num_selected):
    picks.append(int(distance.argmax()))
    distance = torch.minimum(distance, torch.linalg.norm(points - points[picks[-1]], dim=1))
  return np.array(picks)


def torch_anomalib_k_center(points, num_selected, first=0):
  """Selects points in anomalib's loop: from one point, without a copy to the host in a step."""
  torch, points = torch_on_all_cores(), torch_tensor(points)
  pick = torch.tensor(first, device=points.device)
  distance = torch.linalg.norm(points - points[first], dim=1, keepdim=True)
  picks = []
  for _ in range(num_selected):
    center = points[pick].reshape(1, -1)
    distance = torch.minimum(distance, torch.linalg.norm(points - center, ord=2, dim=1, keepdim=True))
    pick = torch.argmax(distance)
    distance[pick] = 0
    picks.append(pick)
  return torch.stack(picks).cpu().numpy()


# Nearest neighbours, k = 1: indices.


@jax.jit
def jax_nearest(queries, bank):
  """Finds the nearest rows in JAX, in one matrix of all distances."""
  products = jnp.dot(queries, bank.T, precision=lax.Precision.HIGHEST)
  return jnp.argmin(jnp.square(bank).sum(1) - 2 * products, axis=1)


def numpy_nearest(queries, bank):
  """Finds the nearest rows in NumPy, in one matrix of all distances."""
  return ((bank**2).sum(1) - 2 * queries @ bank.T).argmin(1)


def sklearn_nearest(queries, bank):
  """Finds the nearest rows by scikit-learn's brute force."""
  from sklearn.neighbors import NearestNeighbors
  search = NearestNeighbors(n_neighbors=1, algorithm='brute').fit(bank)
  return search.kneighbors(queries, return_distance=False)[:, 0]


# Rows of the matrix of distances that a card holds at once: 4 GB for a bank of 250,000.
_CARD_ROWS = 4096


def torch_nearest(queries, bank, how='cdist', precision='float32'):
  """Finds the nearest rows by torch's 'cdist', or by 'product' and minimum; on a card some rows at a time."""
  torch, queries, bank = torch_on_all_cores(), torch_tensor(queries), torch_tensor(bank)
  rows = len(queries) if torch_device() == 'cpu' else _CARD_ROWS
  found = []
  with torch_precision(precision):
    squares = (bank * bank).sum(1)
    for part in torch.split(queries, rows):
      distances = torch.cdist(part, bank) if how == 'cdist' else squares - 2 * (part @ bank.T)
      found.append(distances.min(dim=1).indices)
  return torch.cat(found).cpu().numpy()


def torch_search(bank):
  """Makes a function in torch from queries to the squared distances of their nearest rows."""
  torch = torch_on_all_cores()
  bank = torch.from_numpy(bank)
  return lambda q: torch.cdist(torch.from_numpy(q), bank).min(dim=1).values.square().numpy()


def faiss_index(bank):
  """Makes an exact index, as the paper's code has it; on the card where faiss was built for it."""
  import faiss
  faiss.omp_set_num_threads(os.cpu_count() or 1)
  index = faiss.IndexFlatL2(bank.shape[1])
  if jax.default_backend() == 'gpu' and hasattr(faiss, 'StandardGpuResources') and faiss.get_num_gpus():
    index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
  index.add(bank)
  return index


def faiss_search(bank):
  """Makes the function that `torch_search` makes, with faiss."""
  index = faiss_index(bank)
  return lambda q: index.search(q, 1)[0][:, 0]


# Networks, and the paper's steps.


def torch_wide_resnet():
  """Makes a random WideResNet-50-2 up to layer3: images [b, 3, h, w] -> (layer2, layer3)."""
  torch = torch_on_all_cores()
  nn = torch.nn

  def unit(channels_in, channels, size, stride=1):
    return nn.Sequential(
        nn.Conv2d(channels_in, channels, size, stride, size // 2, bias=False),
        nn.BatchNorm2d(channels))

  class Bottleneck(nn.Module):

    def __init__(self, channels_in, width, stride, shortcut):
      super().__init__()
      self.body = nn.Sequential(
          unit(channels_in, 2 * width, 1), nn.ReLU(inplace=True),
          unit(2 * width, 2 * width, 3, stride), nn.ReLU(inplace=True), unit(2 * width, 4 * width, 1))
      self.shortcut = unit(channels_in, 4 * width, 1, stride) if shortcut else nn.Identity()

    def forward(self, x):
      return torch.relu(self.body(x) + self.shortcut(x))

  def layer(channels_in, width, blocks, stride):
    return nn.Sequential(*[
        Bottleneck(channels_in if i == 0 else 4 * width, width, stride if i == 0 else 1, i == 0)
        for i in range(blocks)])

  class Network(nn.Module):

    def __init__(self):
      super().__init__()
      self.stem = nn.Sequential(
          unit(3, 64, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1), layer(64, 64, 3, 1))
      self.layer2, self.layer3 = layer(256, 128, 4, 2), layer(512, 256, 6, 2)

    def forward(self, x):
      middle = self.layer2(self.stem(x))
      return middle, self.layer3(middle)

  return Network().eval()


def torch_vit_small(patch=14, width=384, blocks=12, heads=6):
  """Makes a random ViT-S/14 as DINOv2 has it, for images of 518 pixels: images [b, 3, 518, 518] -> tokens."""
  torch = torch_on_all_cores()
  nn = torch.nn

  class Block(nn.Module):

    def __init__(self):
      super().__init__()
      self.norm1, self.norm2 = nn.LayerNorm(width, 1e-6), nn.LayerNorm(width, 1e-6)
      self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
      self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
      self.gamma = nn.Parameter(torch.full((2, width), 0.1))

    def forward(self, x):
      b, n, _ = x.shape
      q, k, v = self.qkv(self.norm1(x)).reshape(b, n, 3, heads, -1).permute(2, 0, 3, 1, 4)
      y = nn.functional.scaled_dot_product_attention(q, k, v)
      x = x + self.gamma[0] * self.out(y.transpose(1, 2).reshape(b, n, width))
      return x + self.gamma[1] * self.mlp(self.norm2(x))

  class Network(nn.Module):

    def __init__(self):
      super().__init__()
      self.embed = nn.Conv2d(3, width, patch, patch)
      self.start, self.positions = (
          nn.Parameter(0.02 * torch.randn(1, n, width)) for n in (1, 1 + (518 // patch) ** 2))
      self.blocks = nn.Sequential(*(Block() for _ in range(blocks)))
      self.norm = nn.LayerNorm(width, 1e-6)

    def forward(self, x):
      x = self.embed(x).flatten(2).transpose(1, 2)
      x = torch.cat([self.start.expand(len(x), -1, -1), x], 1) + self.positions
      return self.norm(self.blocks(x)[:, 1:])

  return Network().eval()


def torch_network(precision='float32', *, make=torch_wide_resnet, whole=False, compiled=False):
  """Makes a function of images [b, 3, h, w] float32 -> maps or tokens, channels last on torch's device.

  Args:
    precision: see `torch_precision`.
    make: () -> the network, on the host.
    whole: bfloat16 throughout, weights too, in place of automatic casts.
    compiled: whether torch.compile compiles it, which raises TimeoutError where it takes too long.
  """
  torch = torch_on_all_cores()
  network = make().to(torch_device(), memory_format=torch.channels_last)
  network = network.to(torch.bfloat16) if whole else network
  forward, seconds = torch.compile(network) if compiled else network, _COMPILE_SECONDS

  def run(images):
    nonlocal seconds
    with torch_precision('tensorfloat32' if whole else precision):
      images = images.to(memory_format=torch.channels_last)
      if compiled and seconds:  # the first time
        with timing.at_most(seconds):
          found, seconds = forward(images), 0
        return found
      return forward(images.to(torch.bfloat16) if whole else images)

  return run


_COMPILE_SECONDS = 100


def torch_predict_on_device(network, bank, images, precision='float32'):
  """Scores images in anomalib's steps on torch's device: image scores and anomaly maps, on the host.

  Args:
    network: what `torch_network` made.
    bank: [m, 1024] tensor on the device.
    images: [b, h, w, 3] uint8, on the host.
    precision: precision of all products but those of the network.
  """
  torch = torch_on_all_cores()
  functional = torch.nn.functional
  b, height, width, _ = images.shape
  layer2, layer3 = (x.float() for x in network(torch_tensor(images).permute(0, 3, 1, 2).float() / 255))
  grid = layer2.shape[-2:]
  with torch_precision('float32' if precision == 'float32' else 'tensorfloat32'):
    middle = functional.avg_pool2d(layer2, 3, 1, 1)
    deep = functional.interpolate(functional.avg_pool2d(layer3, 3, 1, 1), grid, mode='bilinear')
    embeddings = torch.cat([middle, deep], 1).permute(0, 2, 3, 1).reshape(-1, 1, 1536)
    embeddings = functional.adaptive_avg_pool1d(embeddings, bank.shape[1])[:, 0]
    parts = [torch.cdist(part, bank).min(1).values for part in torch.split(embeddings, 8192)]
    patches = torch.cat(parts).reshape(b, 1, *grid)
    maps = functional.interpolate(patches, (height, width), mode='bilinear')
    bell = torch.exp(-torch.arange(-16, 17, device=maps.device).float() ** 2 / 32)
    bell = (bell / bell.sum()).reshape(1, 1, 1, -1)
    padded = functional.pad(maps, (16, 16, 16, 16), mode='reflect')
    maps = functional.conv2d(functional.conv2d(padded, bell), bell.transpose(2, 3))
  return patches.amax((1, 2, 3)).cpu().numpy(), maps[:, 0].cpu().numpy()


def torch_embed(network, images):
  """Embeds images [b, h, w, 3] uint8 in the steps of the paper's code: [b * rows * columns, 1024]."""
  torch = torch_on_all_cores()
  functional = torch.nn.functional
  x = torch_tensor(images).permute(0, 3, 1, 2).float() / 255
  mean, std = (torch_tensor(np.float32(v)).view(3, 1, 1) for v in (
      [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
  x = (x - mean) / std
  layers, grid = [], None
  for maps in network(x):
    b, c, *size = maps.shape
    patches = functional.unfold(maps, 3, padding=1).reshape(b, c, 9, *size)
    if grid is None:
      grid = size
    else:
      patches = functional.interpolate(
          patches.reshape(b, c * 9, *size), grid, mode='bilinear', align_corners=False)
    patches = patches.reshape(b, c * 9, -1).permute(0, 2, 1).reshape(-1, 1, c * 9)
    layers.append(functional.adaptive_avg_pool1d(patches, 1024).squeeze(1))
  joined = torch.stack(layers, dim=1).reshape(len(layers[0]), 1, -1)
  return functional.adaptive_avg_pool1d(joined, 1024).squeeze(1)


def torch_predict(network, search, images):
  """Scores images in torch: image scores and anomaly maps.

  `search` gives squared distances [n] of embeddings.
  """
  from scipy.ndimage import gaussian_filter
  torch = torch_on_all_cores()
  embeddings = torch_embed(network, images)
  b, height, width, _ = images.shape
  scores = np.ascontiguousarray(search(embeddings.numpy()))
  scores = torch.from_numpy(scores).reshape(b, 1, height // 8, -1)
  maps = torch.nn.functional.interpolate(
      scores, (height, width), mode='bilinear', align_corners=False)[:, 0].numpy()
  return scores.amax((1, 2, 3)).numpy(), np.stack([gaussian_filter(m, sigma=4) for m in maps])
