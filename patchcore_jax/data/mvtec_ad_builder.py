"""The builder of MVTec AD for TensorFlow Datasets, one config for each category."""

import contextlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from PIL import Image

from patchcore_jax.data import image_files, mvtec_ad
from patchcore_jax.data.folder import MVTEC, Example


class MVTecAD(tfds.core.GeneratorBasedBuilder):
  """The builder; `mvtec_ad.prepare` and `mvtec_ad.load_category` are the short way.

  Features: `image` and `mask` (an empty one, made here, for good images; the only thing that is not a
  file of the data set), `label` (0 good, 1 anomalous), `defect`, `name`. Splits train and test.
  """

  name = mvtec_ad.NAME
  VERSION = tfds.core.Version(mvtec_ad.VERSION)
  BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=category) for category in mvtec_ad.CATEGORIES]
  MANUAL_DOWNLOAD_INSTRUCTIONS = (
      'manual_dir is the extracted archive, with a folder for each category.')
  url_infos = None  # nothing is downloaded; the inherited one needs importlib_resources, undeclared in 4.9.10

  def write(self, folder: str | os.PathLike) -> None:
    """Writes the records of the category from the extracted archive in `folder`."""
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):  # it prints sizes that it does not know
      self.download_and_prepare(
          file_format='array_record', download_config=tfds.download.DownloadConfig(manual_dir=folder))

  def files(self, split: str) -> Sequence[dict[str, Any]]:
    """Returns the records of a split, with the bytes of the files of images and masks."""
    skip = tfds.decode.SkipDecoding()
    return self.as_data_source(split, decoders={'image': skip, 'mask': skip})

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
        builder=self,
        description='Photographs of industrial parts and surfaces, good ones to train on, good and '
                    'defective ones to test with, and a mask of each defect.',
        features=tfds.features.FeaturesDict({
            'image': tfds.features.Image(),
            'mask': tfds.features.Image(shape=(None, None, 1)),
            'label': tfds.features.ClassLabel(names=['good', 'anomalous']),
            'defect': tfds.features.Text(),
            'name': tfds.features.Text()}),
        homepage=mvtec_ad.HOMEPAGE, citation=mvtec_ad.CITATION, license=mvtec_ad.LICENCE,
        disable_shuffling=True,  # the order is part of the results
        metadata=tfds.core.MetadataDict())

  def _split_generators(self, dl_manager):
    category = MVTEC.load_category(dl_manager.manual_dir, self.builder_config.name)
    if not category.has_masks:
      raise ValueError(
          f'No masks of {category.name} in {dl_manager.manual_dir}: expected {category.name}/'
          'ground_truth with a mask for each defective image. Extract the archive again.')
    splits = {'train': category.train, 'test': category.test}
    for split, examples in splits.items():
      # A listing then needs no images.
      self.info.metadata[split] = [
          [_name(e.image_path), [_name(m) for m in e.mask_paths], e.label, e.defect] for e in examples]
    return {split: self._generate_examples(examples) for split, examples in splits.items()}

  def _generate_examples(self, examples: Sequence[Example]):
    for i, example in enumerate(examples):
      if (file := image_files.file_of(example.image_path)) != example.image_path:
        raise ValueError(f'{file} has several pages: expected one. Extract the archive again.')
      image = Path(example.image_path).read_bytes()
      if len(example.mask_paths) > 1:
        raise ValueError(
            f'Several masks for {example.image_path}: {", ".join(example.mask_paths)}. Remove all but one.')
      mask = _no_mask(image, example.image_path)
      if example.mask_paths:
        mask = Path(example.mask_paths[0]).read_bytes()
      yield i, {
          'image': image, 'mask': mask, 'label': example.label, 'defect': example.defect,
          'name': _name(example.image_path)}


def _name(path: str) -> str:
  """Cuts the path of a file down to its part below the root of the data set."""
  return '/'.join(Path(path).parts[-4:])


def _no_mask(image: bytes, path: str) -> bytes:
  """Makes an all-zero PNG of the size of the image, of which only the header is read."""
  try:
    size = Image.open(io.BytesIO(image)).size
  except OSError as e:
    raise ValueError(f'{path} is not an image: replace or remove it.') from e
  buffer = io.BytesIO()
  Image.new('L', size).save(buffer, 'png')
  return buffer.getvalue()
