"""The report page in a real browser, headless Chromium.

Debian and Ubuntu: `apt-get install chromium chromium-driver`. Elsewhere: Chrome and the chromedriver of its
version on the PATH. Without them these tests are skipped.
"""

import numpy as np
import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select
from selenium.webdriver.support.wait import WebDriverWait

from patchcore_jax.report import page

_NASTY = '</script><script>document.title="owned"</script><img src=x onerror=document.title="owned">'


@pytest.fixture(scope='module')
def path(tmp_path_factory):
  """Two categories; in the first, threshold 0.5, 'bent/0' is missed and 'good/1' is called anomalous."""
  rng = np.random.default_rng(0)
  image = rng.integers(0, 255, (48, 64, 3)).astype(np.uint8)
  mask = np.zeros((48, 64), bool)
  mask[10:30, 20:40] = True
  near = page.Patch('train/good/7.png', page.encode(image), (0.2, 0.2, 0.3, 0.3))
  nut = [page.picture(f'good/{i}.png', s, image, anomaly_map=mask * s, label=0)
         for i, s in enumerate((0.1, 0.6, 0.2, 0.3))]
  nut += [page.picture(f'bent/{i}.png', s, image, anomaly_map=mask * s, mask=mask, label=1, defect='bent',
                       patch=(0.4, 0.4, 0.5, 0.5), nearest=near, regions=((0.3, 0.2, 0.7, 0.6),),
                       facts=(('p-value', '0.03'),))
          for i, s in enumerate((0.4, 0.8, 0.9))]
  many = [page.picture(f'many/{i:03}.png', i / 200 + 0.001, image, label=i // 100) for i in range(200)]
  many[7] = many[7]._replace(name=_NASTY, defect=_NASTY)
  categories = [
      page.Category('nut', [p.score for p in nut], [p.label for p in nut],
                    (page.Threshold('5 % false alarms', 0.5), page.Threshold('best F1', 0.35, True)),
                    tuple(nut)),
      page.Category('many', [p.score for p in many], [p.label for p in many],
                    (page.Threshold('5 % false alarms', 0.5),), tuple(many)),
      page.Category('unscored', [])]
  result = tmp_path_factory.mktemp('page') / 'report.html'
  page.write(result, page.Page(
      'A run', (('Backbone', 'a_name_that_is_longer_than_a_phone_is_wide_and_has_no_place_to_break'),),
      (page.Column('Category'), page.Column('AUROC', 'percent'), *[page.Column('Patches', 'count')] * 9),
      [('nut', 0.91, *[10] * 9), ('many', 0.9, *[9] * 9), ('unscored', None, *[100] * 9)],
      [('mean', 0.95, *[None] * 9)], categories, ('A note.',), (('data.root', '/long' * 30),)))
  return result


@pytest.fixture
def opened(browser, path):
  """The page, freshly opened, as a desktop shows it."""
  browser.get_log('browser'), browser.get_log('performance')
  _resize(browser, 1280, 900)
  browser.get(path.as_uri())
  return browser


def _resize(browser, width, height, *, mobile=False, dark=False):
  browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', {
      'width': width, 'height': height, 'deviceScaleFactor': 1, 'mobile': mobile})
  browser.execute_cdp_cmd('Emulation.setEmulatedMedia', {
      'features': [{'name': 'prefers-color-scheme', 'value': 'dark' if dark else 'light'}]})


def _names(browser):
  """Lists the names of the pictures that the gallery shows, in order, as far as they are there."""
  return browser.execute_script('return [...document.querySelectorAll(".tile")].map(t => t.title)')


def _field(browser, name):
  return Select(browser.find_element(By.NAME, name))


def _keys(browser, *keys):
  webdriver.ActionChains(browser).send_keys(*keys).perform()


def _focused(browser):
  element = browser.switch_to.active_element
  return element.get_attribute('aria-label') or element.text


def _shown(browser, selector):
  return browser.find_element(By.CSS_SELECTOR, selector).is_displayed()


class TestLoading:

  def test_no_network_no_errors_and_nothing_injected(self, opened):
    WebDriverWait(opened, 20).until(lambda b: b.execute_script(
        'return [...document.images].every(i => i.complete && i.naturalWidth)'))
    assert opened.get_log('browser') == []
    log = ' '.join(entry['message'] for entry in opened.get_log('performance'))
    assert 'Network.requestWillBeSent' in log  # the page itself: so requests are seen
    assert '"url":"http' not in log and '"url":"ws' not in log
    opened.find_element(By.NAME, 'name').send_keys('owned')
    assert _names(opened) == [_NASTY] and opened.title == 'A run'

  def test_a_script_from_elsewhere_is_not_run(self, opened):
    opened.execute_script(
        'const s = document.createElement("script"); s.textContent = "document.title = \'owned\'";'
        'document.body.append(s);'
        'const i = document.createElement("img"); i.src = "https://example.org/a.png";'
        'document.body.append(i);')
    assert opened.title == 'A run'
    refused = [entry['message'] for entry in opened.get_log('browser')]
    assert len(refused) == 2 and all('Content Security Policy' in message for message in refused)

  def test_only_what_is_near_is_drawn_and_scrolling_adds(self, opened):
    first = len(_names(opened))
    assert 48 <= first < 207
    for _ in range(10):
      opened.execute_script('window.scrollTo(0, document.body.scrollHeight)')
      opened.execute_async_script('requestAnimationFrame(() => setTimeout(arguments[0], 50))')
    assert len(_names(opened)) == 207 and not _shown(opened, '#more')

  def test_heat_is_clear_yellow_and_red(self, opened):
    opened.find_element(By.NAME, 'name').send_keys('bent/2')
    WebDriverWait(opened, 20).until(lambda b: b.execute_script(
        'return document.querySelector(".tile canvas").width > 1 && document.querySelector(".tile canvas").'
        'getContext("2d").getImageData(30, 20, 1, 1).data[3] > 0'))
    outside, inside = opened.execute_script(
        'const c = document.querySelector(".tile canvas").getContext("2d");'
        'return [[2, 2], [30, 20]].map(([x, y]) => [...c.getImageData(x, y, 1, 1).data])')
    assert outside[3] < 10
    # 0.9 of the way: alpha at its most, red, and hardly any yellow.
    assert inside[3] == pytest.approx(191, abs=2) and inside[0] > 250 and inside[1] < 50 and inside[2] == 0


class TestTable:

  def column(self, browser):
    return browser.execute_script(
        'return [...document.querySelectorAll("#results tbody th")].map(c => c.textContent)')

  def test_sorts_by_mouse_and_keyboard_what_is_missing_last(self, opened):
    button = opened.find_elements(By.CSS_SELECTOR, '#results thead button')[1]
    header = opened.find_elements(By.CSS_SELECTOR, '#results thead th')[1]
    button.click()
    assert self.column(opened) == ['nut', 'many', 'unscored']
    assert header.get_attribute('aria-sort') == 'descending'
    button.send_keys(Keys.ENTER)
    assert self.column(opened) == ['many', 'nut', 'unscored']
    assert header.get_attribute('aria-sort') == 'ascending'
    opened.find_elements(By.CSS_SELECTOR, '#results thead button')[0].send_keys(Keys.SPACE)
    assert self.column(opened) == ['many', 'nut', 'unscored'] and header.get_attribute('aria-sort') == 'none'
    assert opened.find_element(By.CSS_SELECTOR, '#results tfoot').text.startswith('mean')

  def test_a_category_leads_to_its_images(self, opened):
    opened.find_element(By.LINK_TEXT, 'nut').click()
    WebDriverWait(opened, 20).until(lambda b: len(_names(b)) == 7)
    assert _field(opened, 'category').first_selected_option.text == 'nut'
    assert not opened.find_elements(By.LINK_TEXT, 'unscored')


class TestFilters:

  def test_by_category_error_and_label(self, opened):
    _field(opened, 'category').select_by_visible_text('nut')
    assert opened.find_element(By.ID, 'count').text == '7 of 207 images, 2 classified wrongly'
    for decision, expected in (
        ('wrong, all', ['good/1.png', 'bent/0.png']), ('wrong: good called anomalous', ['good/1.png']),
        ('wrong: anomalous called good', ['bent/0.png']),
        ('anomalous', ['bent/2.png', 'bent/1.png', 'good/1.png'])):
      _field(opened, 'decision').select_by_visible_text(decision)
      assert _names(opened) == expected
    _field(opened, 'label').select_by_visible_text('anomalous: bent')
    assert _names(opened) == ['bent/2.png', 'bent/1.png']
    _field(opened, 'decision').select_by_visible_text('wrong: good called anomalous')
    assert _names(opened) == [] and _shown(opened, '#empty')
    opened.find_element(By.CSS_SELECTOR, '#empty button').click()
    WebDriverWait(opened, 20).until(lambda b: len(_names(b)) >= 48)
    assert not _shown(opened, '#empty')

  def test_order(self, opened):
    _field(opened, 'category').select_by_visible_text('nut')
    for order, expected in (
        ('lowest score first', ['good/0.png', 'good/2.png', 'good/3.png']),
        ('nearest to the threshold', ['good/1.png', 'bent/0.png', 'good/3.png']),
        ('name', ['bent/0.png', 'bent/1.png', 'bent/2.png'])):
      _field(opened, 'order').select_by_visible_text(order)
      assert _names(opened)[:3] == expected

  def test_another_threshold_decides_anew(self, opened):
    _field(opened, 'category').select_by_visible_text('nut')
    _field(opened, 'decision').select_by_visible_text('wrong: anomalous called good')
    assert _names(opened) == ['bent/0.png']
    _field(opened, 'threshold').select_by_visible_text('best F1 (needs labels)')
    assert _names(opened) == []

  def test_by_keyboard_alone(self, opened):
    opened.find_element(By.NAME, 'category').send_keys('n')  # as typed: the first option that begins so
    assert len(_names(opened)) == 7
    _keys(opened, Keys.TAB)
    _keys(opened, Keys.ARROW_DOWN)
    assert _field(opened, 'decision').first_selected_option.text == 'anomalous'
    assert _names(opened) == ['bent/2.png', 'bent/1.png', 'good/1.png']
    opened.find_element(By.CSS_SELECTOR, '#filters button[type=reset]').send_keys(Keys.ENTER)
    WebDriverWait(opened, 20).until(lambda b: len(_names(b)) >= 48)

  def test_boxes_of_good_images_are_off_until_asked_for(self, opened):
    opened.find_element(By.NAME, 'name').send_keys('bent')
    boxes, good = (opened.find_element(By.CSS_SELECTOR, f'.status [data-layer={kind}]')
                   for kind in ('boxes', 'good'))
    assert good.get_attribute('aria-pressed') == 'false'

    def shown():
      return {t.get_attribute('title') for t in opened.find_elements(By.CSS_SELECTOR, '.tile')
              if any(r.is_displayed() for r in t.find_elements(By.CSS_SELECTOR, 'rect.region'))}

    assert shown() == set()  # masks are shown
    boxes.click()
    assert shown() == {'bent/1.png', 'bent/2.png'}
    good.click()
    assert shown() == {'bent/0.png', 'bent/1.png', 'bent/2.png'}  # the first is called good

  def test_decisions_are_told_apart_by_colour_and_shape(self, opened):
    opened.find_element(By.NAME, 'name').send_keys('bent')
    looks = opened.execute_script('''
      const look = badge => [
        getComputedStyle(badge).borderTopColor, getComputedStyle(badge, '::before').content];
      return Object.fromEntries(
        [...document.querySelectorAll('.tile .badge')].map(badge => [badge.textContent, look(badge)]))''')
    assert set(looks) == {'anomalous', 'good'}
    assert all(a != b for a, b in zip(looks['anomalous'], looks['good'], strict=True))

  def test_layers_can_be_hidden(self, opened):
    opened.find_element(By.NAME, 'name').send_keys('bent/2')
    heat = opened.find_element(By.CSS_SELECTOR, '.status [data-layer=heat]')
    assert _shown(opened, '.tile canvas') and _shown(opened, '.tile .outline')
    heat.click()
    assert not _shown(opened, '.tile canvas') and heat.get_attribute('aria-pressed') == 'false'
    opened.find_element(By.CSS_SELECTOR, '.status [data-layer=mask]').send_keys(Keys.SPACE)
    assert not _shown(opened, '.tile .outline')


class TestViewer:

  def open(self, browser):
    _field(browser, 'category').select_by_visible_text('nut')
    browser.find_element(By.CSS_SELECTOR, '.tile').send_keys(Keys.ENTER)
    assert _shown(browser, '#viewer')

  def name(self, browser):
    return browser.find_element(By.ID, 'viewer-name').text

  def test_opens_turns_and_closes_by_keyboard(self, opened):
    self.open(opened)
    assert self.name(opened) == 'bent/2.png' and _focused(opened) == 'Close'
    _keys(opened, Keys.ARROW_RIGHT)
    assert self.name(opened) == 'bent/1.png'
    assert opened.find_element(By.ID, 'viewer-position').text == '2 of 7'
    _keys(opened, Keys.END)
    _keys(opened, Keys.ARROW_RIGHT)
    assert self.name(opened) == 'good/0.png'  # the last
    _keys(opened, Keys.ARROW_LEFT)
    _keys(opened, Keys.ESCAPE)
    assert not _shown(opened, '#viewer')
    assert 'good/2.png' in _focused(opened)  # where one had come to
    assert opened.get_log('browser') == []

  def test_opens_turns_and_closes_by_mouse(self, opened):
    _field(opened, 'category').select_by_visible_text('nut')
    opened.find_elements(By.CSS_SELECTOR, '.tile')[1].click()
    assert self.name(opened) == 'bent/1.png'
    opened.find_element(By.CSS_SELECTOR, '[data-step="-1"]').click()
    assert self.name(opened) == 'bent/2.png'
    assert not opened.find_element(By.CSS_SELECTOR, '[data-step="-1"]').is_enabled()
    opened.find_element(By.ID, 'viewer-close').click()
    assert not _shown(opened, '#viewer')

  def test_a_click_beside_it_closes_it_and_one_inside_does_not(self, opened):
    self.open(opened)
    opened.find_element(By.ID, 'viewer-facts').click()
    assert _shown(opened, '#viewer')
    webdriver.ActionChains(opened).move_by_offset(5, 5).click().perform()
    assert not _shown(opened, '#viewer')

  def test_says_all_there_is(self, opened):
    self.open(opened)
    WebDriverWait(opened, 20).until(lambda b: _shown(b, '#viewer-nearest'))
    text = opened.find_element(By.ID, 'viewer').text
    for words in ('anomalous', '0.9', 'bent', 'nut', '0.5 (5 % false alarms)', 'p-value', '0.03',
                  'training image train/good/7.png'):
      assert words in text
    _keys(opened, Keys.END)  # a good one, of which no reason is known
    assert not _shown(opened, '#viewer-nearest')

  def test_keys_of_the_layers(self, opened):
    self.open(opened)
    for key, selector in (('h', '#viewer canvas'), ('m', '#viewer .outline'), ('b', '#viewer .boxes')):
      before = _shown(opened, selector)
      _keys(opened, key)
      assert _shown(opened, selector) != before


class TestPhone:

  @pytest.mark.parametrize('width', [320, 375, 768, 1280])
  def test_nothing_is_wider_than_the_screen(self, opened, width):
    _resize(opened, width, 812, mobile=width < 500)
    opened.refresh()
    assert opened.execute_script('return document.documentElement.scrollWidth') == width
    _field(opened, 'category').select_by_visible_text('nut')
    opened.execute_script('document.querySelector(".tile").click()')
    wide = opened.execute_script('const d = document.getElementById("viewer"); '
                                 'return [d.scrollWidth - d.clientWidth, d.getBoundingClientRect().right]')
    assert wide[0] <= 0 and wide[1] <= width

  def test_no_chart_and_no_word_is_cut_off(self, opened):
    _resize(opened, 390, 844, mobile=True)
    opened.refresh()
    cut = opened.execute_script('''
      return [...document.querySelectorAll('figure, .tile .caption *')].filter(e => {
        const around = e.closest('.charts, .tile').getBoundingClientRect(), own = e.getBoundingClientRect();
        return own.width && (own.right > Math.min(around.right, 390) + 1 || own.left < around.left - 1);
      }).map(e => e.outerHTML)''')
    assert cut == [] and len(opened.find_elements(By.TAG_NAME, 'figure')) > 3

  def test_fingers_find_what_they_touch(self, opened):
    _resize(opened, 375, 812, mobile=True)
    opened.refresh()
    small = opened.execute_script(
        'return [...document.querySelectorAll("button, select, input")].filter(e => e.offsetParent)'
        '.map(e => [e.textContent, e.getBoundingClientRect()]).filter(([, r]) => r.height < 39.5 || '
        'r.width < 39.5).map(([text]) => text)')
    assert small == []


class TestColours:

  @pytest.mark.parametrize('dark', [False, True])
  def test_text_stands_out(self, opened, dark):
    """WCAG 2.1, 1.4.3: 4.5 to 1."""
    _resize(opened, 1280, 900, dark=dark)
    opened.refresh()
    poor = opened.execute_script(_CONTRAST)
    assert poor == []
    background = opened.execute_script('return getComputedStyle(document.body).backgroundColor')
    assert (background == 'rgb(16, 20, 25)') == dark


# Texts whose contrast with what lies behind them is below 4.5.
_CONTRAST = r'''
const parse = text => (text.match(/[\d.]+/g) || []).map(Number);
const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(
  v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4).reduce(
  (sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const behind = e => {
  for (; e; e = e.parentElement) {
    const c = parse(getComputedStyle(e).backgroundColor);
    if (c.length === 3 || c[3] > 0) return c;
  }
  return [255, 255, 255];
};
const poor = [];
for (const e of document.querySelectorAll('body *')) {
  const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
  if (!own || !e.getClientRects().length || e.disabled) continue;
  const style = getComputedStyle(e);
  const [a, b] = [light(parse(e instanceof SVGElement ? style.fill : style.color)), light(behind(e))];
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (ratio < 4.5) poor.push(`${e.tagName} ${e.className.baseVal ?? e.className} ${e.textContent} ${ratio}`);
}
return poor;
'''
