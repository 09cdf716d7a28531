"""How large the frames of a GIF are is what Pillow makes of it, in damaged files too."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from patchcore_jax.data import decoding, gif_files, image_contents
from patchcore_jax.data.image_errors import TooManyPixelsError


def _animation():
  """Three frames, of which the later ones cover a part; with a comment, a loop, palettes and transparency."""
  rng, file = np.random.default_rng(0), io.BytesIO()
  frames = [Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8)).quantize(16) for _ in range(3)]
  frames[0].save(file, 'GIF', save_all=True, append_images=frames[1:], loop=0, disposal=2, comment=b'a part',
                 transparency=1, duration=10)
  return file.getvalue()


def _of_pillow(data):
  """The sizes of the picture after each frame, as far as Pillow gets."""
  sizes = []
  try:
    with Image.open(io.BytesIO(data), formats=['GIF']) as image:
      while True:
        sizes.append(image.size)
        image.seek(len(sizes))
  except image_contents.DECODING_ERRORS:
    return sizes


def test_whole_files():
  assert list(gif_files.sizes(io.BytesIO(_animation()))) == _of_pillow(_animation()) == [(12, 9)] * 3


@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
def test_damaged_files(monkeypatch):
  monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 10**6)  # larger frames end Pillow's list
  rng, data, compared = np.random.default_rng(1), _animation(), set()
  for _ in range(2000):
    damaged = bytearray(data)
    for at in rng.integers(6, len(data), rng.integers(1, 4)):
      damaged[at] = rng.choice([0, 1, 2, 0x21, 0x2C, 0x3B, 0xF9, 0xFE, 0xFF, rng.integers(256)])
    expected = _of_pillow(bytes(damaged))
    found = list(gif_files.sizes(io.BytesIO(damaged)))
    assert found[:len(expected)] == expected
    compared.add(tuple(expected))
  assert len(compared) > 50  # otherwise nothing was compared


@pytest.mark.parametrize(
    'read', [image_contents.num_pages, image_contents.contents, decoding.read_image, decoding.mask_values])
def test_a_large_frame_is_refused_before_there_is_room_for_it(read):
  frame = struct.pack('<4HB', 0, 0, 65535, 65535, 0)
  data = (b'GIF89a' + struct.pack('<HHBBB', 4, 3, 0, 0, 0) + b'!\xf9\x04\x08\0\0\0\0,' + frame
          + b'\x02\x01\x00\x00;')  # what the frame leaves behind is to be wiped, which takes as much room
  if read is image_contents.num_pages:
    assert read('i', lambda _: data) == 1
  else:
    with pytest.raises(TooManyPixelsError, match='65535 x 65535 pixels'):
      read('i', lambda _: data)
