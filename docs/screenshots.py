"""Makes the pictures of the report and of the service that the docs show, from the built-in data.

    python -m experiments.mvtec --config=configs/demo.py --workdir=runs/demo
    patchcore fit runs/synthetic/circuit_board/train/good --out runs/circuit_board --ratio 0.01 \
        --backbone resnet18_slim.procedural
    patchcore serve runs/circuit_board --port 8000 &     until it says "Ready"
    python docs/screenshots.py      needs -e '.[test]', Chromium and its driver
"""

import io
import shutil
import tempfile
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.select import Select
from selenium.webdriver.support.wait import WebDriverWait

REPORT = Path('runs/demo/report.html')
SERVICE = 'http://127.0.0.1:8000/'
TEST = Path('runs/synthetic/circuit_board/test')
SENT = ('good', 'wrong_part', 'solder_bridge', 'misplaced_part', 'scratch', 'missing_part')
TO_SHOW = 'misplaced_part/003.png'
DOCS = Path('docs')


def browser() -> webdriver.Chrome:
  options = webdriver.ChromeOptions()
  for argument in ('--headless=new', '--hide-scrollbars', '--no-sandbox', '--disable-dev-shm-usage'):
    options.add_argument(argument)
  return webdriver.Chrome(options, webdriver.ChromeService(shutil.which('chromedriver')))


def resize(driver, width: int, height: int, scale: int = 1) -> None:
  driver.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', {
      'width': width, 'height': height, 'deviceScaleFactor': scale, 'mobile': width < 500})


def save(driver, name: str) -> None:
  """Saves the page with a palette of 256 colours: a third of the size."""
  image = Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert('RGB')
  image.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(DOCS / name, optimize=True)


def report(driver) -> None:
  driver.get(REPORT.absolute().as_uri())
  resize(driver, 1280, 1180)
  save(driver, 'report.png')
  _scroll(driver, 'pictures')
  save(driver, 'report_images.png')
  _choose(driver, 'category', 'circuit_board')
  driver.find_element(By.XPATH, f'//*[@id="gallery"]//button[.//*[contains(text(), "{TO_SHOW}")]]').click()
  resize(driver, 1280, 840)
  save(driver, 'report_image.png')
  driver.find_element(By.ID, 'viewer-close').click()
  resize(driver, 375, 812, scale=2)
  _choose(driver, 'category', 'gear')
  _scroll(driver, 'pictures')
  save(driver, 'report_phone.png')


def service(driver, folder: Path) -> None:
  """Saves the page of the service; `folder` is for images named after their defects."""
  for defect in SENT:
    shutil.copy(TEST / defect / '003.png', folder / f'{defect}.png')
  for name, width, height, scale, sent in (
      ('service.png', 1000, 1014, 1, SENT), ('service_phone.png', 375, 812, 2, SENT[-1:])):
    resize(driver, width, height, scale)
    driver.get(SERVICE)
    for count, defect in enumerate(sent, 1):
      driver.find_element(By.ID, 'file').send_keys(str(folder / f'{defect}.png'))
      WebDriverWait(driver, 60).until(lambda d, n=count: d.execute_script('return past.length') == n)
    WebDriverWait(driver, 60).until(lambda d: all(
        d.execute_script('return document.getElementById(arguments[0]).naturalWidth', image)
        for image in ('image', 'heat', 'patch', 'nearest')))
    save(driver, name)


def _choose(driver, name, value):
  Select(driver.find_element(By.NAME, name)).select_by_visible_text(value)


def _scroll(driver, name):
  driver.execute_script('document.getElementById(arguments[0]).scrollIntoView()', name)


if __name__ == '__main__':
  with browser() as driver, tempfile.TemporaryDirectory() as folder:
    report(driver)
    service(driver, Path(folder))
