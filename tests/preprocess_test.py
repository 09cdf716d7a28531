"""Decoding and geometry. `parity_test` compares with the paper's data loader."""

import dataclasses
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from experiments import reference
from patchcore_jax import settings
from patchcore_jax.data import decoding, image_contents, preprocess
from patchcore_jax.data.folder import Example
from patchcore_jax.data.image_errors import ImageError, TooManyPixelsError, UnknownFormatError
from patchcore_jax.settings import Preprocessing
from tests import drawn_files, fuzz_decoding

RGB = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)


def _save(path, array, mode=None, **kwargs):
  image = Image.fromarray(array) if mode is None else Image.fromarray(array).convert(mode)
  image.save(path, **kwargs)
  return path


class TestReadImage:

  @pytest.mark.parametrize('suffix', ['png', 'bmp', 'tif'])
  def test_lossless_formats(self, suffix, tmp_path):
    path = _save(tmp_path / f'i.{suffix}', RGB)
    np.testing.assert_array_equal(np.asarray(decoding.read_image(path)), RGB)

  def test_lossless_webp_and_jpeg_are_read(self, tmp_path):
    path = _save(tmp_path / 'i.webp', RGB, lossless=True)
    np.testing.assert_array_equal(np.asarray(decoding.read_image(path)), RGB)
    smooth = np.tile(np.linspace(0, 255, 60, dtype=np.uint8)[None, :, None], (40, 1, 3))
    path = _save(tmp_path / 'i.jpg', smooth, quality=95)
    assert np.abs(np.asarray(decoding.read_image(path)).astype(int) - smooth).max() < 8

  def test_gray_is_repeated(self, tmp_path):
    path = _save(tmp_path / 'i.png', RGB[..., 0])
    np.testing.assert_array_equal(
        np.asarray(decoding.read_image(path)), np.repeat(RGB[..., :1], 3, axis=2))

  @pytest.mark.parametrize('suffix', ['png', 'tif'])
  def test_16_bit_gray_uses_the_full_range(self, suffix, tmp_path):
    values = np.array([[0, 257, 128, 129, 32896, 65535]], np.uint16)
    path = _save(tmp_path / f'i.{suffix}', values)
    np.testing.assert_array_equal(
        np.asarray(decoding.read_image(path))[0, :, 0], [0, 1, 0, 1, 128, 255])


  def test_palette_with_transparency(self, tmp_path):
    image = Image.fromarray(RGB).quantize(16)
    expected = np.asarray(image.convert('RGB')).copy()
    expected[np.asarray(image) == 3] = 255
    image.save(tmp_path / 'i.png', transparency=3)
    np.testing.assert_array_equal(np.asarray(decoding.read_image(tmp_path / 'i.png')), expected)

  def test_cmyk(self, tmp_path):
    red = np.zeros((8, 8, 4), np.uint8)
    red[..., 1:3] = 255  # magenta and yellow ink
    Image.fromarray(red, 'CMYK').save(tmp_path / 'i.tif')
    np.testing.assert_array_equal(
        np.asarray(decoding.read_image(tmp_path / 'i.tif'))[0, 0], [255, 0, 0])

  def test_exif_orientation(self, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to show
    path = _save(tmp_path / 'i.png', RGB, exif=exif)
    np.testing.assert_array_equal(
        np.asarray(decoding.read_image(path)), np.rot90(RGB, -1))

  @pytest.mark.parametrize('content, words', [
      (b'', 'not a known image format'), (b'hello', 'not a known image format'), (None, 'damaged')])
  def test_unusable_file_is_named(self, content, words, tmp_path):
    path = tmp_path / 'broken.png'
    if content is None:
      buffer = io.BytesIO()
      Image.fromarray(RGB).save(buffer, 'png')
      content = buffer.getvalue()[:len(buffer.getvalue()) // 2]
    path.write_bytes(content)
    with pytest.raises(ImageError, match=words) as error:
      decoding.read_image(path)
    assert 'broken.png' in str(error.value)

  def test_missing_file(self, tmp_path):
    with pytest.raises(ImageError, match='No such image file'):
      decoding.read_image(tmp_path / 'none.png')

  def test_decompression_bomb_is_refused(self, tmp_path):
    def chunk(kind, data):
      return (struct.pack('>I', len(data)) + kind + data
              + struct.pack('>I', zlib.crc32(kind + data)))
    header = struct.pack('>IIBBBBB', 60000, 60000, 8, 2, 0, 0, 0)
    path = tmp_path / 'bomb.png'
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', b'')
                     + chunk(b'IEND', b''))
    with pytest.raises(ImageError, match='bomb.png is refused'):
      decoding.read_image(path)

  def test_a_limit_of_pixels_is_seen_in_the_header(self, tmp_path):
    with Image.open(_save(tmp_path / 'i.png', RGB)) as whole:
      assert decoding.read_image(tmp_path / 'i.png', max_pixels=40 * 60).size == whole.size
    # The rest of the file is gone, which decoding would tell.
    (tmp_path / 'i.png').write_bytes((tmp_path / 'i.png').read_bytes()[:100])
    with pytest.raises(TooManyPixelsError, match='60 x 40 pixels, 0.0024 megapixels; allowed are 0.0023'):
      decoding.read_image(tmp_path / 'i.png', max_pixels=2300)

  def test_pillows_limit_is_no_second_one(self, tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 40 * 60 // 2 - 1)
    path = _save(tmp_path / 'i.png', RGB)
    assert decoding.read_image(path).size == (60, 40)
    assert not recwarn.list
    assert Image.MAX_IMAGE_PIXELS == 40 * 60 // 2 - 1  # that of other code in the process
    with pytest.raises(TooManyPixelsError, match='--max-megapixels'):
      decoding.read_image(path, max_pixels=2399)

  @pytest.mark.parametrize('suffix', ['eps', 'pcx', 'tga'])
  def test_formats_that_are_not_meant(self, suffix, tmp_path):
    path = _save(tmp_path / f'i.{suffix}', RGB)
    with pytest.raises(UnknownFormatError, match='not a known image format .PNG, JPEG'):
      decoding.read_image(path)

  @pytest.mark.parametrize('data', fuzz_decoding.seeds(), ids=lambda data: str(data[:4]))
  def test_every_format_and_mode(self, data):
    """Found by fuzzing: with a wrong name among the formats, Pillow failed at all but the first two."""
    with Image.open(io.BytesIO(data)) as original:
      original.load()
    if original.mode == 'F':
      with pytest.raises(ImageError, match='range is not known'):
        decoding.read_image('i', lambda _: data)
      return
    image = decoding.read_image('i', lambda _: data)
    assert image.mode == 'RGB' and sorted(image.size) == sorted(original.size)

  def test_a_frame_that_is_larger_than_the_limit(self):
    """Found by fuzzing: frames before the one that was asked for were decoded whatever their size."""
    file = io.BytesIO()
    frames = [Image.new('RGB', (8, 8), colour) for colour in ('red', 'green', 'blue')]
    frames[0].save(file, 'GIF', save_all=True, append_images=frames[1:])
    data = file.getvalue()
    second = data.index(b'\x2c', data.index(b'\x2c') + 1)  # where the frame's place and size stand
    damaged = data[:second + 5] + struct.pack('<HH', 60_000, 60_000) + data[second + 9:]
    assert image_contents.num_pages('i', lambda _: damaged) == 3
    assert decoding.read_image('i#1', lambda _: damaged).size == (8, 8)
    for read in (decoding.read_image, image_contents.contents, decoding.mask_values):
      with pytest.raises(TooManyPixelsError, match='i#3 is refused: it is 60000 x 60000 pixels'):
        read('i#3', lambda _: damaged)

  def test_a_tiff_of_two_sizes(self):
    """Found by fuzzing: of a tag that comes twice, the size that was checked was not the one decoded."""
    data = drawn_files.tiff([np.zeros((24, 32, 1), np.uint8)])
    height, other = struct.pack('<HHI', 257, 4, 1), struct.pack('<HHI', 278, 4, 1)
    assert data.count(height) == data.count(other) == 1
    damaged = data.replace(other, height)
    damaged = damaged.replace(height + struct.pack('<I', 24), height + struct.pack('<I', 23), 1)
    for read in (image_contents.contents, decoding.read_image):
      read('i', lambda _: data)
      with pytest.raises(ImageError, match='tells of two sizes'):
        read('i', lambda _: damaged)

  def test_an_animation_that_tells_of_too_many_frames(self):
    """Found by fuzzing: a list of two billion pages took all memory."""
    file = io.BytesIO()
    Image.new('RGB', (8, 8)).save(file, 'PNG', save_all=True, append_images=[Image.new('RGB', (8, 8), 'red')])
    data = file.getvalue()
    at = data.index(b'acTL')
    content = b'acTL' + struct.pack('>II', 2**31 - 1, 0)
    damaged = data[:at] + content + struct.pack('>I', zlib.crc32(content)) + data[at + 16:]
    assert image_contents.num_pages('i', lambda _: data) == 2
    assert 2 <= image_contents.num_pages('i', lambda _: damaged) <= 3
    assert decoding.read_image('i#2', lambda _: damaged).getpixel((0, 0)) == (255, 0, 0)

  @pytest.mark.parametrize('kind, head', [(b'zTXt', b'a\0\0'), (b'iTXt', b'a\0\1\0\0\0')])
  def test_text_that_unpacks_to_a_lot(self, kind, head):
    header = struct.pack('>IIBBBBB', 1, 1, 8, 0, 0, 0, 0)
    data = fuzz_decoding.png([
        [b'IHDR', header], [kind, head + zlib.compress(bytes(2**24))], [b'IDAT', zlib.compress(bytes(2))],
        [b'IEND', b'']])
    with pytest.raises(ImageError, match='too large'):
      decoding.read_image('i', lambda _: data)

  def test_large_16_bit_images(self):
    values = np.random.default_rng(0).integers(0, 65536, (1100, 1000), np.uint16)  # more than a block
    image = decoding.convert(Image.fromarray(values), Preprocessing()).image
    np.testing.assert_array_equal(np.asarray(image)[..., 0], (values.astype(np.uint32) + 128) // 257)

  def test_floats_are_refused(self, tmp_path):
    path = _save(tmp_path / 'i.tif', RGB[..., 0].astype(np.float32))
    with pytest.raises(ImageError, match='range is not known'):
      decoding.read_image(path)


class TestReadMask:

  @pytest.mark.parametrize('on', [1, 255])
  def test_any_nonzero_value_is_positive(self, on, tmp_path):
    values = (RGB[..., 0] > 128).astype(np.uint8)
    mask = decoding.read_mask(_save(tmp_path / 'm.png', values * on))
    np.testing.assert_array_equal(np.asarray(mask), values * 255)

  @pytest.mark.parametrize('mode', ['RGB', '1', 'P'])
  def test_modes(self, mode, tmp_path):
    values = (RGB[..., 0] > 128).astype(np.uint8) * 255
    mask = decoding.read_mask(_save(tmp_path / 'm.png', values, mode))
    np.testing.assert_array_equal(np.asarray(mask), values)


class TestLoad:

  def test_mask_of_another_size_is_named(self, tmp_path):
    example = Example(str(_save(tmp_path / 'i.png', RGB)),
                      (str(_save(tmp_path / 'm.png', RGB[:20, :, 0])),), 1, 'c', 'd')
    with pytest.raises(ImageError, match=r'm.png is 60 x 20 pixels.*i.png is 60 x 40'):
      preprocess.load(example, Preprocessing(), with_mask=True)

  def test_good_image_has_an_empty_mask(self, tmp_path):
    example = Example(str(_save(tmp_path / 'i.png', RGB)), (), 0, 'c', 'good')
    image, mask = preprocess.load(example, Preprocessing(), with_mask=True)
    assert mask.shape == image.shape[:2] and not mask.any()

  def test_image_smaller_than_the_crop_is_named(self, tmp_path):
    example = Example(str(_save(tmp_path / 'small.png', RGB)), (), 0, 'c', 'good')
    with pytest.raises(ImageError, match=r'small.png.*smaller than the crop of 224 x 224'):
      preprocess.load(example, Preprocessing(resize=()))


class TestTransform:

  @pytest.mark.parametrize('spec, size', [
      (Preprocessing(crop=()), (384, 256)),
      (Preprocessing(resize=(100, 50), crop=()), (50, 100)),
      (Preprocessing(resize=(), crop=()), (60, 40)),
      (Preprocessing(resize=(120,), resize_side='long', crop=()), (120, 80)),
      (Preprocessing(resize=(120,), resize_side='long', pad=(120,), crop=()), (120, 120)),
      (Preprocessing(resize=(), pad=(50, 64), crop=(48, 64)), (64, 48))])
  def test_sizes(self, spec, size):
    assert preprocess.transform(Image.fromarray(RGB), spec).size == size

  def test_padding_repeats_edges_and_leaves_masks_empty(self):
    spec = Preprocessing(resize=(), pad=(44, 60), crop=())
    image = np.asarray(preprocess.transform(Image.fromarray(RGB), spec))
    np.testing.assert_array_equal(image[:2], np.repeat(RGB[:1], 2, axis=0))
    np.testing.assert_array_equal(image[2:42], RGB)
    mask = preprocess.transform(Image.fromarray(np.full((40, 60), 255, np.uint8)), spec)
    assert not np.asarray(mask)[[0, 1, 42, 43]].any() and np.asarray(mask)[2:42].all()


  def test_nearest_takes_the_upper_left(self):
    values = np.arange(24, dtype=np.uint8).reshape(4, 6)
    spec = Preprocessing(resize=(2, 3), crop=())
    small = preprocess.transform(Image.fromarray(values), spec, nearest=True)
    np.testing.assert_array_equal(np.asarray(small), values[::2, ::2])

  def test_nearest_masks_of_anomalib(self, tmp_path):
    spec = Preprocessing(resize=(256, 256), mask_resize='nearest')
    # Positive pixels of anomalib 2.7.0's own masks.
    for path, pixels in {'test/good/000.png': 0, 'test/invert/000.png': 1092,
                         'test/invert/001.png': 2107}.items():
      image, mask = reference.part(path)
      example = Example(str(_save(tmp_path / 'i.png', image)), (str(_save(tmp_path / 'm.png', mask)),),
                        1, 'c', 'd')
      assert preprocess.load(example, spec, with_mask=True)[1].sum() == pixels


class TestWholeImages:

  @pytest.mark.parametrize('size, expected', [  # (height, width)
      ((1024, 1024), (224, 224)), ((60, 72), (224, 256)), ((720, 1280), (224, 384)),
      ((480, 1280), (224, 608)), ((1280, 480), (608, 224)), ((500, 2000), (224, 896)),
      ((300, 3000), (128, 1280)), ((20, 20_000), (32, 6272)), ((20_000, 20), (6272, 32)),
      ((1, 1), (224, 224))])
  def test_the_short_side_is_224_and_the_area_at_most_four_squares(self, size, expected):
    assert preprocess.whole_size(*size) == expected

  @pytest.mark.parametrize('multiple', [1, 14, 16, 32, 100, 300])
  def test_sides_are_multiples_and_the_aspect_is_kept(self, multiple):
    rng = np.random.default_rng(0)
    for height, width in np.rint(np.exp(rng.uniform(2, 9, (200, 2)))).astype(int).tolist():
      tall, wide = preprocess.whole_size(height, width, multiple)
      assert tall % multiple == wide % multiple == 0 < min(tall, wide)
      assert tall * wide <= max(4 * 224**2, multiple**2) and (tall - wide) * (height - width) >= 0
      if max(height / width, width / height) <= 4 and multiple <= 32:  # both sides are rounded
        assert 0.86 < (wide / tall) / (width / height) < 1.16

  def test_all_of_every_image_is_seen(self):
    sizes = [(640, 480)] * 3 + [(500, 500), (1, 9), (2000, 30)]
    spec = preprocess.whole_image(sizes)
    assert spec == Preprocessing(resize=(224, 288), crop=())
    for width, height in sizes:
      assert preprocess.not_inspected(height, width, spec) == 0
      assert preprocess.transform(Image.new('RGB', (width, height)), spec).size == (288, 224)

  @pytest.mark.parametrize('sizes, expected', [
      ([(640, 480)] * 3 + [(500, 500)] * 2, (640, 480)),
      ({(640, 480): 2, (500, 500): 3}, (500, 500)),
      ([(641, 480), (640, 481), (1280, 960), (300, 100), (300, 100)], (1280, 960)),  # the shape counts first
      ([(400, 100), (400, 400), (400, 300)], (400, 300))])  # the median of shapes
  def test_the_size_that_stands_for_all(self, sizes, expected):
    assert preprocess.usual_size(sizes) == expected

  @pytest.mark.parametrize('spec', [
      Preprocessing(), Preprocessing(crop=()), Preprocessing(resize=(), crop=(7, 30)),
      Preprocessing(resize=(50, 40), crop=(30,)), Preprocessing(resize=(), pad=(80, 30), crop=(60, 20)),
      Preprocessing(resize=(30,), resize_side='long', pad=(40,), crop=()),
      Preprocessing(resize=(), pad=(200,), crop=(190,))])
  @pytest.mark.parametrize('size', [(40, 60), (61, 33), (50, 50)])
  def test_the_share_that_is_not_inspected_is_that_of_pixels_without_effect(self, spec, size):
    """Counted in an image whose pixels all differ."""
    (height, width), (rows, columns) = size, preprocess.resized_size(*size, spec)
    exact = dataclasses.replace(spec, resize=())
    if exact.crop and any(c > max(s, p) for c, s, p in zip(
        settings.as_pair(exact.crop), (rows, columns), settings.as_pair(exact.pad or (0,)))):
      with pytest.raises(ValueError, match='smaller than the crop'):
        preprocess.not_inspected(height, width, spec)
      return
    numbers = np.arange(rows * columns)
    pixels = np.stack([numbers % 256, numbers // 256 % 256, numbers // 65536], -1).astype(np.uint8)
    result = preprocess.transform(Image.fromarray(pixels.reshape(rows, columns, 3)), exact)
    share = len(np.unique(np.asarray(result).reshape(-1, 3), axis=0)) / (rows * columns)
    assert preprocess.not_inspected(height, width, spec) == pytest.approx(1 - share)


class TestPreprocessing:

  @pytest.mark.parametrize('kwargs, words', [
      ({'crop': (0,)}, 'preprocess.crop'), ({'resize': (1, 2, 3)}, 'preprocess.resize'),
      ({'resize_side': 'wide'}, 'resize_side'), ({'mask_resize': 'x'}, 'mask_resize'),
      ({'mask_threshold': 0}, 'mask_threshold'),
      ({'resize': (100, 300), 'crop': (200,)}, 'does not fit'),
      ({'resize': (200,), 'crop': (224,)}, 'does not fit')])
  def test_errors_name_the_field(self, kwargs, words):
    with pytest.raises(ValueError, match=words):
      Preprocessing(**kwargs)


def test_pages_are_read_by_their_number(tmp_path):
  pages = [Image.new('RGB', (6, 4), (40 * i,) * 3) for i in range(3)]
  pages[0].save(tmp_path / 'i.tif', save_all=True, append_images=pages[1:])
  for i in range(3):
    assert np.asarray(decoding.read_image(f'{tmp_path}/i.tif#{i + 1}')).max() == 40 * i
  with pytest.raises(ImageError, match='i.tif has 3 pages: there is no page 4'):
    decoding.read_image(f'{tmp_path}/i.tif#4')
