"""The page of the service in a real browser; see `page_browser_test`."""

import pytest
from PIL import Image
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

from patchcore_jax.detectors import MahalanobisAD
from patchcore_jax.serving.app import Options
from tests import small
from tests.serve_test import parts, running

_NASTY = '<img src=x onerror=document.title="owned">.png'


@pytest.fixture(scope='module')
def address():
  with running(small.inspector(), Options(batch_size=1)) as (host, port):
    yield f'http://{host}:{port}/'


@pytest.fixture
def files(tmp_path):
  """A good image, a bad one with a name to fear, the same as TIFF, and none at all."""
  good, bad = parts(2)
  paths = [tmp_path / name for name in ('good.png', _NASTY, 'bad.tif', 'none.png')]
  Image.fromarray(good).save(paths[0])
  Image.fromarray(bad).save(paths[1])
  Image.fromarray(bad).save(paths[2])
  paths[3].write_text('no image')
  return [str(path) for path in paths]


def _open(browser, address, width=1200):
  browser.get_log('browser')
  browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', {
      'width': width, 'height': 800, 'deviceScaleFactor': 1, 'mobile': width < 500})
  browser.get(address)
  _wait(browser, lambda b: _text(b, 'bank') == 'noise')


def _text(browser, name):
  return browser.find_element(By.ID, name).text


def _wait(browser, condition):
  WebDriverWait(browser, 20, 0.05).until(condition)


def _send(browser, path, count):
  browser.find_element(By.ID, 'file').send_keys(path)
  _wait(browser, lambda b: b.execute_script('return past.length') == count)


def _loaded(browser, name):
  return browser.execute_script('return document.getElementById(arguments[0]).naturalWidth', name)


def test_images_are_answered(browser, address, files):
  _open(browser, address)
  _send(browser, files[0], 1)
  assert _text(browser, 'verdict') == 'good'
  svg = browser.find_element(By.CSS_SELECTOR, '#stage svg')
  assert not svg.is_displayed()  # boxes of good images are off until asked for
  browser.find_element(By.ID, 'boxed').send_keys(Keys.SPACE)
  assert svg.is_displayed()
  _send(browser, files[1], 2)
  assert _text(browser, 'verdict') == 'anomalous'
  assert _text(browser, 'name') == _NASTY and browser.title == 'noise'
  _wait(browser, lambda b: all(_loaded(b, name) for name in ('image', 'heat', 'patch', 'nearest')))
  assert 'most similar normal place' in _text(browser, 'origin')
  # The heatmap lies on the image, and the box in it.
  image, heat, box = (
      browser.find_element(By.CSS_SELECTOR, f'#stage {s}').rect for s in ('#image', '#heat', 'rect'))
  assert image == heat and image['width'] / image['height'] == pytest.approx(40 / 50, rel=0.01)
  assert image['x'] <= box['x'] < box['x'] + box['width'] <= image['x'] + image['width'] + 2
  # Nothing was blocked, nothing failed.
  assert [entry for entry in browser.get_log('browser') if entry['level'] == 'SEVERE'] == []


def test_what_a_browser_cannot_show_is_shown_all_the_same(browser, address, files):
  _open(browser, address)
  _send(browser, files[2], 1)
  _wait(browser, lambda b: _loaded(b, 'image') == 40)


def test_each_page_of_a_file_is_answered(browser, address, tmp_path):
  first, second = map(Image.fromarray, parts(2))
  first.save(tmp_path / 'stack.tif', save_all=True, append_images=[second])
  _open(browser, address)
  _send(browser, str(tmp_path / 'stack.tif'), 2)
  assert [b.text.split()[-1] for b in browser.find_elements(By.CSS_SELECTOR, '#list button')] == [
      'stack.tif#2', 'stack.tif#1']
  assert _text(browser, 'name') == 'stack.tif#2' and _text(browser, 'verdict') == 'anomalous'


def test_errors_are_said(browser, address, files):
  _open(browser, address)
  browser.find_element(By.ID, 'file').send_keys(files[3])
  _wait(browser, lambda b: 'none.png' in _text(b, 'message') and 'known format' in _text(b, 'message'))
  _send(browser, files[0], 1)
  assert not browser.find_element(By.ID, 'message').is_displayed()


def test_keyboard(browser, address, files):
  _open(browser, address)
  body = browser.find_element(By.TAG_NAME, 'body')
  body.send_keys(Keys.TAB)
  assert browser.switch_to.active_element.get_attribute('id') == 'file'
  _send(browser, files[0], 1)
  _send(browser, files[1], 2)
  browser.find_element(By.ID, 'strength').send_keys(Keys.HOME)
  assert browser.find_element(By.ID, 'heat').value_of_css_property('opacity') == '0'
  browser.find_element(By.ID, 'boxed').send_keys(Keys.SPACE)
  assert not browser.find_element(By.CSS_SELECTOR, '#stage svg').is_displayed()
  browser.find_elements(By.CSS_SELECTOR, '#list button')[1].send_keys(Keys.ENTER)
  assert _text(browser, 'verdict') == 'good'
  assert browser.switch_to.active_element.get_attribute('aria-current') == 'true'


def test_phone(browser, address, files):
  _open(browser, address, width=360)
  _send(browser, files[1], 1)
  assert browser.execute_script('return document.documentElement.scrollWidth') <= 360
  assert browser.find_element(By.ID, 'stage').rect['width'] > 150


def test_methods_that_score_whole_images(browser, files):
  """What they do not know is not shown, and nothing fails."""
  with running(small.inspector(MahalanobisAD()), Options(batch_size=1)) as (host, port):
    _open(browser, f'http://{host}:{port}/')
    _send(browser, files[1], 1)
    assert _text(browser, 'verdict') == 'anomalous'
    _wait(browser, lambda b: _loaded(b, 'image') == 40)
    for name in ('heat', 'patch', 'nearest'):
      assert not browser.find_element(By.ID, name).is_displayed()
    assert not browser.find_elements(By.CSS_SELECTOR, '#stage rect')
    assert [entry for entry in browser.get_log('browser') if entry['level'] == 'SEVERE'] == []


def test_token(browser, files):
  with running(small.inspector(), Options(batch_size=1), token='secret') as (host, port):
    browser.get(f'http://{host}:{port}/')
    _wait(browser, lambda b: b.find_element(By.ID, 'token').is_displayed())
    browser.find_element(By.ID, 'secret').send_keys('secret', Keys.ENTER)
    _wait(browser, lambda b: not b.find_element(By.ID, 'token').is_displayed())
    _send(browser, files[0], 1)
    assert _text(browser, 'verdict') == 'good'
