"""What files have beyond 8 bits, three bands and opaque pixels: read as the settings say, or refused."""

import io
import struct
import threading
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from patchcore_jax.data import decoding, decoding_memory, image_contents, image_files, preprocess
from patchcore_jax.data.folder import Example
from patchcore_jax.data.image_errors import ImageError, TooManyPixelsError
from patchcore_jax.settings import DataSpec, Preprocessing
from tests import fuzz_decoding, tiff

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (11, 14, 3), np.uint8)
RANGE = Preprocessing(value_range=(1000.0, 3550.0))  # ten values a level


def _png(values, colour_type, *chunks):
  """Writes 16-bit values [h, w, samples] as a PNG, which Pillow cannot."""
  rows = b''.join(b'\0' + row.astype('>u2').tobytes() for row in values)
  header = struct.pack('>IIBBBBB', values.shape[1], values.shape[0], 16, colour_type, 0, 0, 0)
  return fuzz_decoding.png([[b'IHDR', header], *chunks, [b'IDAT', zlib.compress(rows)], [b'IEND', b'']])


def _scaled(values):
  """Scales values by the definition: low to 0, high to 255, rounded."""
  return np.rint((np.clip(values.astype(float), 1000, 3550) - 1000) / 10).astype(np.uint8)


def _decode(data, preprocessing=RANGE):
  return decoding.decode('i', preprocessing, lambda _: data)


class TestValueRange:

  @pytest.mark.parametrize('dtype, settings, full_range', [
      (np.uint16, RANGE, False), (np.uint16, Preprocessing(), True), (np.uint8, Preprocessing(), False)])
  def test_values_without_a_range_are_marked(self, dtype, settings, full_range):
    for shape in ((4, 5), (4, 5, 3)):
      assert _decode(tiff.tiff([np.full(shape, 7, dtype)]), settings).full_range == full_range

  @pytest.mark.parametrize('form', ['png', 'tif', 'float', 'pgm'])
  def test_gray(self, form):
    values = RNG.integers(900, 3650, (11, 14))
    file = io.BytesIO()
    if form == 'float':
      values = values + 0.25
      Image.fromarray(values.astype(np.float32)).save(file, 'TIFF')
    else:
      Image.fromarray(values.astype(np.uint16)).save(file, {'pgm': 'PPM', 'tif': 'TIFF'}.get(form, 'PNG'))
    image, outside, _ = _decode(file.getvalue())
    np.testing.assert_array_equal(np.asarray(image), np.repeat(_scaled(values)[..., None], 3, axis=2))
    assert outside == pytest.approx(((values < 1000) | (values > 3550)).mean()) and outside > 0

  @pytest.mark.parametrize('form', ['png', 'tif', 'ppm', 'plain'])
  def test_colours_keep_their_lower_bits(self, form):
    """Pillow reads the upper 8 of 16 bits: of a 12-bit camera's colours 16 levels would be left."""
    values = RNG.integers(900, 3650, (11, 14, 3)).astype(np.uint16)
    data = {
        'png': lambda: _png(values, 2), 'tif': lambda: tiff.tiff([values], deflate=True, rows=4),
        'ppm': lambda: b'P6 14 11 65535\n' + values.astype('>u2').tobytes(),
        'plain': lambda: b'P3 # a comment\n14 11 65535\n' + b' '.join(b'%d' % v for v in values.flat)}[form]()
    image, outside, _ = _decode(data)
    np.testing.assert_array_equal(np.asarray(image), _scaled(values))
    assert outside == pytest.approx(((values < 1000) | (values > 3550)).any(axis=-1).mean())

  def test_without_a_range_colours_are_as_before(self):
    values = RNG.integers(0, 65536, (11, 14, 3)).astype(np.uint16)
    for data in (_png(values, 2), tiff.tiff([values])):
      np.testing.assert_array_equal(np.asarray(_decode(data, Preprocessing()).image), values >> 8)

  def test_files_of_8_bits_have_none(self):
    file = io.BytesIO()
    Image.fromarray(RGB).save(file, 'PNG')
    image, outside, _ = _decode(file.getvalue())
    np.testing.assert_array_equal(np.asarray(image), RGB)
    assert outside == 0

  def test_what_is_no_number_lies_outside(self):
    values = np.full((4, 5), 2000, np.float32)
    values[0, :3] = np.nan, np.inf, -np.inf
    image, outside, _ = _decode(tiff.tiff([values]))
    assert outside == pytest.approx(3 / 20)
    assert np.asarray(image)[0, :4, 0].tolist() == [0, 255, 0, 100]

  @pytest.mark.parametrize('dtype, words', [('f4', '32-bit floats'), ('f8', '64-bit floats'),
                                            ('i4', '32-bit integers')])
  def test_unknown_ranges_are_refused_with_the_reason(self, dtype, words):
    data = tiff.tiff([np.full((4, 5), -7, dtype)])
    with pytest.raises(ImageError, match=f'i holds {words} whose range is not known.*--value-range'):
      _decode(data, Preprocessing())
    assert _decode(data, Preprocessing(value_range=(-10.0, 0.0))).image.size == (5, 4)

  def test_large_images_are_scaled_in_parts(self):
    values = RNG.integers(900, 3650, (1100, 1000)).astype(np.uint16)  # more than a block
    image = decoding.convert(Image.fromarray(values), RANGE).image
    np.testing.assert_array_equal(np.asarray(image)[..., 0], _scaled(values))

  @pytest.mark.parametrize('orientation', range(1, 9))
  @pytest.mark.parametrize('bands', [1, 3])
  def test_deep_files_are_turned_upright(self, orientation, bands):
    """As a file of 8 bits with the same tag is, whoever reads the pixels."""
    small = RNG.integers(0, 256, (4, 6, bands)).astype(np.uint8)
    deep = _decode(tiff.tiff([small.astype(np.uint16) * 10 + 1000], tags=[(274, orientation)])).image
    flat = _decode(tiff.tiff([small], tags=[(274, orientation)])).image
    np.testing.assert_array_equal(np.asarray(deep), np.asarray(flat))
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(small.squeeze()).save(file, 'PNG', exif=exif)
    np.testing.assert_array_equal(np.asarray(_decode(file.getvalue()).image), np.asarray(flat))


class TestTransparency:

  @pytest.mark.parametrize('form', ['png', 'webp', 'tif', 'png16', 'tif16', 'premultiplied'])
  def test_hidden_pixels_get_the_background(self, form):
    """Whatever a cutting tool left in them."""
    alpha, files = np.where(RNG.random((11, 14)) < 0.5, 0, 255).astype(np.uint8), []
    for hidden in (0, 77, 255):
      rgb = np.where(alpha[..., None] > 0, RGB, 0 if form == 'premultiplied' else hidden).astype(np.uint8)
      rgba, file = np.dstack([rgb, alpha]), io.BytesIO()
      if form == 'premultiplied':
        file.write(tiff.tiff([rgba], extra=[1]))
      elif form.endswith('16'):
        deep = rgba.astype(np.uint16) * 10 + 1000
        deep[..., 3] = alpha.astype(np.uint16) * 257
        file.write(_png(deep, 6) if form == 'png16' else tiff.tiff([deep], extra=[2]))
      else:
        Image.fromarray(rgba).save(file, {'tif': 'TIFF'}.get(form, form), lossless=True, exact=True)
      files.append(file.getvalue())
    settings = Preprocessing(value_range=(1000.0, 3550.0), background=(9, 200, 31))
    images = [np.asarray(_decode(data, settings).image) for data in files]
    expected = np.where(alpha[..., None] > 0, RGB, [9, 200, 31])
    for image in images:
      np.testing.assert_array_equal(image, expected)

  def test_half_transparent_pixels_are_mixed(self):
    for mode in ('PNG', 'TIFF'):
      file = io.BytesIO()
      Image.new('RGBA', (2, 2), (100, 0, 200, 51)).save(file, mode)
      assert _decode(file.getvalue()).image.getpixel((0, 0)) == (224, 204, 244)  # 20 % of it on white

  @pytest.mark.parametrize('kind', [
      'colour of RGB', 'gray', 'gray of 16 bits', 'palette', 'colour of 16 bits'])
  def test_a_colour_that_stands_for_transparent(self, kind):
    settings, file = Preprocessing(value_range=(0.0, 255.0), background=(255, 0, 0)), io.BytesIO()
    values = np.array([[7, 8, 7]], np.uint8)
    if kind == 'colour of RGB':
      Image.fromarray(np.repeat(values[..., None], 3, 2)).save(file, 'PNG', transparency=(7, 7, 7))
    elif kind == 'gray':
      Image.fromarray(values).save(file, 'PNG', transparency=7)
    elif kind == 'palette':
      Image.fromarray(values).convert('P').save(file, 'PNG', transparency=7)
    elif kind == 'gray of 16 bits':
      file.write(_png(values[..., None].astype(np.uint16), 0, [b'tRNS', struct.pack('>H', 7)]))
    else:
      file.write(_png(np.repeat(values[..., None], 3, 2).astype(np.uint16), 2,
                      [b'tRNS', struct.pack('>3H', 7, 7, 7)]))
    image = np.asarray(_decode(file.getvalue(), settings).image)
    assert image.tolist() == [[[255, 0, 0], [8, 8, 8], [255, 0, 0]]]

  def test_models_from_before_drop_it(self):
    rgba, file = np.dstack([RGB, RGB[..., 0]]), io.BytesIO()
    Image.fromarray(rgba).save(file, 'PNG')
    np.testing.assert_array_equal(
        np.asarray(_decode(file.getvalue(), Preprocessing(background=())).image), RGB)

  def test_hidden_values_do_not_lie_outside(self):
    deep = np.full((4, 5, 2), 2000, np.uint16)
    deep[..., 1] = 65535
    deep[0] = 9, 0  # transparent, and far below
    assert _decode(_png(deep, 4)).outside == 0


class TestBands:

  @pytest.mark.parametrize('bands', [2, 4, 5])
  def test_more_than_three_are_refused_with_what_can_be_done(self, bands):
    data = tiff.tiff([RNG.integers(0, 256, (5, 6, bands)).astype(np.uint8)])
    with pytest.raises(ImageError, match=f'i has {bands} bands, and the network sees three: .*--bands 1,2,'):
      _decode(data)

  @pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
  @pytest.mark.parametrize('planar', [False, True])
  def test_three_are_chosen(self, dtype, planar):
    values = RNG.integers(0, 256, (5, 6, 6)).astype(dtype)
    settings = Preprocessing(bands=(6, 2, 2), value_range=(0.0, 255.0))
    image, *_ = _decode(tiff.tiff([values], planar=planar), settings)
    np.testing.assert_array_equal(np.asarray(image), values[..., [5, 1, 1]])

  def test_of_files_with_fewer(self):
    settings, file = Preprocessing(bands=(3, 2, 1)), io.BytesIO()
    Image.fromarray(RGB).save(file, 'PNG')
    np.testing.assert_array_equal(np.asarray(_decode(file.getvalue(), settings).image), RGB[..., ::-1])
    file = io.BytesIO()
    Image.fromarray(RGB[..., 0]).save(file, 'PNG')
    with pytest.raises(ImageError, match='i has 1 band, and the bands 3, 2, 1 are to be read'):
      _decode(file.getvalue(), settings)

  def test_gray_with_three_samples_is_a_colour_image(self):
    values = RNG.integers(0, 256, (5, 6, 3)).astype(np.uint8)
    image, *_ = _decode(tiff.tiff([values], photometric=1, extra=[0, 0]))
    np.testing.assert_array_equal(np.asarray(image), values)


class TestPages:

  def _gif(self, path):
    frames = [Image.new('RGB', (6, 4), (90 * i, 0, 0)) for i in range(3)]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    return str(path)

  @pytest.mark.parametrize('suffix', ['gif', 'tif', 'webp', 'png'])
  def test_each_is_an_image(self, suffix, tmp_path):
    path = self._gif(tmp_path / f'i.{suffix}')
    assert image_contents.num_pages(path) == 3
    for i in range(3):
      red = np.asarray(decoding.read_image(f'{path}#{i + 1}'))[..., 0]
      assert abs(red.astype(int) - 90 * i).max() < 8
    with pytest.raises(ImageError, match=f'i.{suffix} has 3 pages: there is no page 4'):
      decoding.read_image(f'{path}#4')

  def test_of_bands_and_bits_of_their_own(self):
    data = tiff.tiff([RNG.integers(1000, 3550, (5, 6, 1 + 2 * (i % 2))).astype(np.uint16) for i in range(3)])
    assert image_contents.num_pages('i', lambda _: data) == 3
    assert [image_contents.contents(f'i#{i}', lambda _: data).bands for i in (1, 2, 3)] == [1, 3, 1]
    for i in (1, 2, 3):
      assert decoding.decode(f'i#{i}', RANGE, lambda _: data).outside == 0

  def test_a_file_that_has_such_a_name_wins(self, tmp_path):
    path = self._gif(tmp_path / 'i.gif')
    Image.new('RGB', (9, 9)).save(tmp_path / 'i.gif#2', 'PNG')
    assert image_files.split_page(f'{path}#2') == (f'{path}#2', 0)
    assert decoding.read_image(f'{path}#2').size == (9, 9)
    assert decoding.read_image(f'{path}#3').size == (6, 4)


class TestContents:

  @pytest.mark.parametrize('data, kind', [
      (lambda: _png(np.zeros((4, 5, 3), np.uint16), 2), 'RGB of 16 bits'),
      (lambda: _png(np.zeros((4, 5, 2), np.uint16), 4), 'gray of 16 bits with transparency'),
      (lambda: tiff.tiff([np.zeros((4, 5), 'f4')]), 'gray of 32-bit floats'),
      (lambda: tiff.tiff([np.zeros((4, 5, 7), 'u1')]), 'multiband (7 bands)'),
      (lambda: tiff.tiff([np.zeros((4, 5, 3), 'u1')]), 'RGB'),
      (lambda: tiff.tiff([np.zeros((4, 5), 'u1')]), 'L')])
  def test_kinds(self, data, kind):
    found = image_contents.contents('i', lambda _: data())
    assert found.kind == kind and found.size == (5, 4)

  @pytest.mark.parametrize('data', fuzz_decoding.seeds(), ids=lambda data: str(data[:4]))
  def test_the_header_tells_what_decoding_gives(self, data):
    """Size, and that nothing is deep which Pillow decodes to 8 bits without loss."""
    found = image_contents.contents('i', lambda _: data)
    settings = Preprocessing(value_range=(0.0, 1e6), bands=(1, 2, 3) if found.bands > 3 else ())
    assert decoding.decode('i', settings, lambda _: data).image.size == found.size

  def test_no_pixel_is_decoded(self, tmp_path):
    for suffix in ('png', 'jpg', 'tif'):
      path = tmp_path / f'i.{suffix}'
      Image.new('RGB', (4000, 3000)).save(path)
      data = path.read_bytes()
      if suffix != 'tif':  # whose directory lies behind the pixels
        path.write_bytes(data[:len(data) // 2])
      assert image_contents.contents(path).size == (4000, 3000)


class TestLimit:

  def test_the_default_lets_large_frames_through(self):
    assert DataSpec().max_pixels > 182e6
    header = struct.pack('>IIBBBBB', 60000, 60000, 8, 2, 0, 0, 0)
    bomb = fuzz_decoding.png([[b'IHDR', header], [b'IDAT', b''], [b'IEND', b'']])
    with pytest.raises(TooManyPixelsError, match='3600 megapixels; allowed are 250. .*--max-megapixels'):
      _decode(bomb)

  def test_it_counts_for_every_kind_of_file(self):
    values = np.zeros((40, 50, 5), np.uint16)
    for data in (_png(values[..., :3], 2), tiff.tiff([values]), tiff.tiff([values[..., 0]])):
      with pytest.raises(TooManyPixelsError, match='50 x 40 pixels'):
        decoding.decode('i', Preprocessing(bands=(1, 1, 1)), lambda _, d=data: d, max_pixels=1999)

  def test_large_images_wait_for_each_other(self, monkeypatch):
    """Checks that images that would not fit together are decoded one after the other; small ones pass."""
    memory, inside, most = decoding_memory._Memory(100), [0], [0]
    lock = threading.Lock()

    def use(pixels):
      with memory.kept(), memory.room(pixels):
        with lock:
          inside[0] += pixels
          most[0] = max(most[0], inside[0])
        time.sleep(0.002)
        with lock:
          inside[0] -= pixels

    threads = [threading.Thread(target=use, args=(pixels,)) for pixels in (90, 30, 60, 250, 40, 50) * 5]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    assert 90 <= most[0] <= 250 and memory._used == 0

  def test_who_has_room_does_not_wait_for_more(self):
    memory = decoding_memory._Memory(10)
    with memory.kept():
      with memory.room(8):
        pass
      assert memory._used == 8  # until the end, although the image is decoded
      with memory.room(8):
        assert memory._used == 16
    assert memory._used == 0


class TestMasks:

  def test_transparency_of_one_colour_is_the_mask(self, tmp_path):
    alpha = np.zeros((9, 12), np.uint8)
    alpha[2:5, 3:6] = 255
    for colour in (0, 255):
      rgba = np.dstack([np.full((9, 12, 3), colour, np.uint8), alpha])
      Image.fromarray(rgba).save(tmp_path / 'm.png')
      np.testing.assert_array_equal(np.asarray(decoding.read_mask(tmp_path / 'm.png')), alpha)

  def test_of_others_transparent_pixels_are_none(self, tmp_path):
    rgba = np.full((9, 12, 4), 255, np.uint8)
    rgba[0, :, :3] = 0
    rgba[1, :, 3] = 0
    Image.fromarray(rgba).save(tmp_path / 'm.png')
    assert np.asarray(decoding.read_mask(tmp_path / 'm.png'))[:3, 0].tolist() == [0, 0, 255]

  def test_small_values_of_16_bits_are_positive(self, tmp_path):
    values = np.zeros((4, 5, 3), np.uint16)
    values[1, 2] = 1
    (tmp_path / 'm.png').write_bytes(_png(values, 2))
    assert np.argwhere(np.asarray(decoding.read_mask(tmp_path / 'm.png'))).tolist() == [[1, 2]]

  def test_several_pages_are_refused(self, tmp_path):
    page = Image.new('L', (5, 4))
    page.save(tmp_path / 'm.tif', save_all=True, append_images=[page])
    with pytest.raises(ImageError, match='m.tif has 2 pages: expected one'):
      decoding.read_mask(tmp_path / 'm.tif')

  @pytest.mark.parametrize('orientation', range(1, 9))
  def test_an_unturned_mask_is_turned_with_its_image(self, orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image, mask = np.zeros((8, 12, 3), np.uint8), np.zeros((8, 12), np.uint8)
    image[1:3, 2:9], mask[1:3, 2:9] = 200, 255
    Image.fromarray(image).save(tmp_path / 'i.png', exif=exif)
    example = Example(str(tmp_path / 'i.png'), (str(tmp_path / 'm.png'),), 1, 'c', 'd')
    whole = Preprocessing(resize=(), crop=())
    upright = decoding.turned(Image.fromarray(mask), orientation)
    # As the photograph is stored, where the sizes tell; as it is shown; and with a tag of its own.
    masks = [upright.save] + [Image.fromarray(mask).save] * (orientation >= 5)
    masks.append(lambda path: Image.fromarray(mask).save(path, exif=exif))
    for save in masks:
      save(tmp_path / 'm.png')
      pixels, found = preprocess.load(example, whole, with_mask=True)
      np.testing.assert_array_equal(found, pixels[..., 0] > 0)
