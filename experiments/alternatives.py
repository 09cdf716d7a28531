"""The plain ways to do what this package does, for `experiments.benchmark` to measure against.

Written from their descriptions. torch, faiss and scikit-learn are asked for only when they are used;
`available` says which of them are there.
"""

import importlib.util
import os

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def available(*modules: str) -> bool:
  """Whether all can be imported."""
  return all(importlib.util.find_spec(m) is not None for m in modules)


def torch_on_all_cores():
  import torch
  torch.set_num_threads(os.cpu_count() or 1)
  torch.set_grad_enabled(False)
  return torch


# Greedy k-center: `num_selected` steps from the mean distance to `start`.


def numpy_k_center(points, num_selected, start):
  """One norm for each step."""
  distance = np.mean([np.linalg.norm(points - points[s], axis=1) for s in start], axis=0)
  picks = []
  for _ in range(num_selected):
    picks.append(int(distance.argmax()))
    distance = np.minimum(distance, np.linalg.norm(points - points[picks[-1]], axis=1))
  return np.array(picks)


def torch_k_center(points, num_selected, start):
  """One norm for each step, as the PyTorch versions have it."""
  torch = torch_on_all_cores()
  points = torch.from_numpy(np.asarray(points))
  distance = torch.stack([torch.linalg.norm(points - points[s], dim=1) for s in start]).mean(0)
  picks = []
  for _ in range(num_selected):
    picks.append(int(distance.argmax()))
    distance = torch.minimum(distance, torch.linalg.norm(points - points[picks[-1]], dim=1))
  return np.array(picks)


# Nearest neighbours, k = 1: indices.


@jax.jit
def jax_nearest(queries, bank):
  """One matrix of all distances."""
  products = jnp.dot(queries, bank.T, precision=lax.Precision.HIGHEST)
  return jnp.argmin(jnp.square(bank).sum(1) - 2 * products, axis=1)


def numpy_nearest(queries, bank):
  return ((bank**2).sum(1) - 2 * queries @ bank.T).argmin(1)


def sklearn_nearest(queries, bank):
  from sklearn.neighbors import NearestNeighbors
  search = NearestNeighbors(n_neighbors=1, algorithm='brute').fit(bank)
  return search.kneighbors(queries, return_distance=False)[:, 0]


def torch_nearest(queries, bank):
  torch = torch_on_all_cores()
  return torch.cdist(torch.from_numpy(queries), torch.from_numpy(bank)).min(dim=1).indices.numpy()


def torch_search(bank):
  """A function from queries to the squared distances of their nearest."""
  torch = torch_on_all_cores()
  bank = torch.from_numpy(bank)
  return lambda q: torch.cdist(torch.from_numpy(q), bank).min(dim=1).values.square().numpy()


def faiss_index(bank):
  """Exact, as the paper's code uses it."""
  import faiss
  faiss.omp_set_num_threads(os.cpu_count() or 1)
  index = faiss.IndexFlatL2(bank.shape[1])
  index.add(bank)
  return index


def faiss_search(bank):
  """As `torch_search`."""
  index = faiss_index(bank)
  return lambda q: index.search(q, 1)[0][:, 0]


# The paper's network and steps.


def torch_wide_resnet():
  """WideResNet-50-2 up to layer3, random: images [b, 3, h, w] -> (layer2, layer3)."""
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


def torch_embed(network, images):
  """Images [b, h, w, 3] uint8 -> embeddings [b * rows * columns, 1024], in the paper's code's steps."""
  torch = torch_on_all_cores()
  functional = torch.nn.functional
  x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
  x = (x - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor(
      [0.229, 0.224, 0.225]).view(3, 1, 1)
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
  """Images -> image scores and anomaly maps; `search` gives squared distances [n] of embeddings."""
  from scipy.ndimage import gaussian_filter
  torch = torch_on_all_cores()
  embeddings = torch_embed(network, images)
  b, height, width, _ = images.shape
  scores = np.ascontiguousarray(search(embeddings.numpy()))
  scores = torch.from_numpy(scores).reshape(b, 1, height // 8, -1)
  maps = torch.nn.functional.interpolate(
      scores, (height, width), mode='bilinear', align_corners=False)[:, 0].numpy()
  return scores.amax((1, 2, 3)).numpy(), np.stack([gaussian_filter(m, sigma=4) for m in maps])
