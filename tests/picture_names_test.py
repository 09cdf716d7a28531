"""What the pictures of images are called."""

import pytest

from patchcore_jax.report.picture_names import PictureNames

KINDS = [('overlays', '.png'), ('maps', '.npy')]


def _write(folder, name):
  for kind, suffix in KINDS:
    path = folder / kind / f'{name}{suffix}'
    path.parent.mkdir(parents=True, exist_ok=True)
    assert not path.exists()
    path.touch()


@pytest.mark.parametrize('written', [True, False], ids=['written', 'being written'])
@pytest.mark.parametrize('images, names', [
    (['a/0.png', 'a/1.jpg', 'b/0.png'], ['a/0', 'a/1', 'b/0']),
    (['p.PNG', 'p.bmp', 'p.jpg', 'p.png', 'p.png.png'], ['p', 'p.bmp', 'p.jpg', 'p.2', 'p.png']),
    (['p.png', 'P.png', 'p.jpg', 'p.JPG'], ['p', 'P', 'p.jpg', 'p.JPG']),
    (['p.jpg', 'p.jpg', 'p.jpg'], ['p', 'p.jpg', 'p.2']),
    (['p.tif', 'p.tif'], ['p', 'p.tif'])])
def test_each_has_its_own_and_most_are_those_of_the_images(images, names, written, tmp_path):
  chosen = PictureNames(tmp_path, KINDS)
  for image, name in zip(images, names, strict=True):
    assert chosen.reserve(image) == name
    if written:
      _write(tmp_path, name)
      chosen.release(name)


def test_where_capitals_do_not_tell_names_apart(tmp_path):
  (tmp_path / 'OUT').symlink_to('out')  # as if it were the same folder
  (tmp_path / 'out').mkdir()
  chosen = PictureNames(tmp_path / 'out', KINDS)
  assert [chosen.reserve(name) for name in ('p.png', 'P.png', 'p.JPG')] == ['p', 'P.2', 'p.JPG']


def test_a_name_is_free_again_where_nothing_was_written(tmp_path):
  chosen = PictureNames(tmp_path, KINDS)
  chosen.release(chosen.reserve('a.png'))
  assert chosen.reserve('a.png') == 'a'


def test_long_names_leave_room_for_what_is_added(tmp_path):
  chosen = PictureNames(tmp_path, KINDS)
  names = [chosen.reserve(f'{"ü" * 120}{i}.png') for i in range(12)]
  assert len(set(names)) == 12
  for name in names:
    _write(tmp_path, f'{name}.npy.tmp')


def test_control_characters_are_left_out(tmp_path):
  assert PictureNames(tmp_path, KINDS).reserve('a/b\nc\x1b.png') == 'a/b_c_'
