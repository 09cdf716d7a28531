"""The report page as text: what is in it, and that nothing outside it is needed."""

import base64
import html.parser
import io
import json
import math
import re

import numpy as np
import pytest
from PIL import Image

from patchcore_jax.report import charts, page

_LINKS = ('src', 'href', 'srcset', 'action', 'data', 'poster', 'background', 'formaction', 'ping')
_NASTY = '</script><script>document.title="owned"</script><img src=x onerror=alert(1)>&\'"\u2028.png'


class Html(html.parser.HTMLParser):
  """Tags with their attributes; the text of each kind of tag."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.texts, self._open = [], {}, []
    self.feed(text)

  def handle_starttag(self, tag, attributes):
    self.tags.append((tag, dict(attributes)))
    self._open.append(tag)

  def handle_endtag(self, tag):
    if tag in self._open:
      while self._open.pop() != tag:
        pass

  def handle_data(self, text):
    if self._open:
      self.texts.setdefault(self._open[-1], []).append(text)

  def all(self, tag, **attributes):
    return [a for t, a in self.tags if t == tag and attributes.items() <= a.items()]

  @property
  def data(self):
    (text,) = (t for t in self.texts['script'] if t.startswith('{'))
    return json.loads(text)

  @property
  def text(self):
    parts = [text for tag, part in self.texts.items() if tag not in ('script', 'style') for text in part]
    return re.sub('[ \n]+', ' ', ' '.join(parts))


def decoded(image):
  return np.asarray(Image.open(io.BytesIO(image)))


def picture(name='a.png', score=0.5, value=100, **fields):
  return page.picture(name, score, np.full((6, 8, 3), value, np.uint8), **fields)


def small_page(**fields):
  pictures = (
      picture('test/good/0.png', 0.1, label=0), picture('test/good/1.png', 0.7, label=0),
      picture('test/bent/0.png', 0.9, label=1, defect='bent', anomaly_map=np.eye(4), mask=np.eye(6) > 0),
      picture('test/bent/1.png', 0.3, label=1, defect='bent'))
  category = page.Category(
      'nut', [0.1, 0.7, 0.9, 0.3], [0, 0, 1, 1],
      (page.Threshold('5 % false alarms', 0.5), page.Threshold('best F1', 0.3, needs_labels=True)), pictures)
  return page.Page(**{
      'title': 'A run', 'facts': (('Backbone', 'resnet18'),), 'settings': (('seed', '7'),),
      'columns': (page.Column('Category'), page.Column('AUROC', 'percent'), page.Column('Bank', 'count'),
                  page.Column('Seconds', 'number')),
      'rows': [('nut', 0.98765, 18816, 12.34567), ('bolt', float('nan'), None, None)],
      'totals': [('mean', None, None, None)], 'categories': (category,)} | fields)


class TestRender:

  def test_every_number_of_the_records(self):
    found = Html(page.render(small_page()))
    for word in ('98.8', '18\N{NARROW NO-BREAK SPACE}816', '12.35', 'resnet18', '7', 'mean', '–'):
      assert f' {word} ' in found.text
    assert [c['data-key'] for c in found.all('td')] == ['0.98765', '18816.0', '12.34567'] + [''] * 6
    assert ' nan ' not in found.text.lower()
    assert [(p['name'], p['score'], p['label'], p['defect']) for p in found.data['pictures']] == [
        ('test/good/0.png', 0.1, 0, ''), ('test/good/1.png', 0.7, 0, ''),
        ('test/bent/0.png', 0.9, 1, 'bent'), ('test/bent/1.png', 0.3, 1, 'bent')]
    assert found.data['categories'] == [{'name': 'nut', 'thresholds': [
        {'name': '5 % false alarms', 'value': 0.5, 'needs_labels': False},
        {'name': 'best F1', 'value': 0.3, 'needs_labels': True}]}]
    labels = ' '.join(a['aria-label'] for a in found.all('svg', role='img'))
    assert '2 good: 0.1 to 0.7. 2 anomalous: 0.3 to 0.9.' in ' '.join(labels.split())
    assert 'AUROC 75.0 %' in labels  # 3 of 4 pairs are in order
    assert 'needs labels; not known on the line' in found.text

  def test_needs_nothing_outside(self):
    text = page.render(small_page())
    found = Html(text)
    links = [a[k] for _, a in found.tags for k in _LINKS if k in a]
    assert links and all(link.startswith(('data:', '#')) for link in links)
    style, script = found.texts['style'][0], found.texts['script'][-1]
    assert '@import' not in style and 'url(' not in style
    assert not any(word in script for word in ('fetch(', 'XMLHttpRequest', 'import(', 'sendBeacon'))
    # What the browser is told: nothing may be loaded, and only this script and style may be used.
    (policy,) = (a['content'] for a in found.all('meta') if 'http-equiv' in a)
    assert "default-src 'none'" in policy and 'unsafe' not in policy
    assert not [a for _, a in found.tags if 'style' in a or any(k.startswith('on') for k in a)]

  def test_text_of_users_is_never_markup(self):
    category = page.Category(_NASTY, [0.5], [1], (page.Threshold(_NASTY, 0.4),), (picture(
        _NASTY, label=1, defect=_NASTY, nearest=page.Patch(_NASTY, page.encode(np.zeros((4, 4, 3), np.uint8)),
                                                           (0, 0, 1, 1)),
        facts=((_NASTY, _NASTY),)),))
    text = page.render(page.Page(
        _NASTY, ((_NASTY, _NASTY),), (page.Column(_NASTY),), [(_NASTY,)], [(_NASTY,)], (category,), (_NASTY,),
        ((_NASTY, _NASTY),)))
    found = Html(text)
    assert len(found.all('script')) == 2 and not found.all('img')
    (shown,) = found.data['pictures']
    assert shown['name'] == shown['defect'] == shown['nearest']['name'] == _NASTY
    assert shown['facts'] == [[_NASTY, _NASTY]]
    assert found.texts['title'][0] == found.texts['h1'][0] == _NASTY

  def test_an_image_is_stored_once(self):
    same = page.Patch('train/0.png', page.encode(np.zeros((64, 64, 3), np.uint8)), (0.1, 0.2, 0.3, 0.4))
    pictures = tuple(picture(f'{i}.png', 0.5, value=50 * i, nearest=same) for i in range(5))
    found = Html(page.render(page.Page('t', categories=[page.Category('a', [0.5] * 5, pictures=pictures)])))
    assert len(found.data['images']) == 6
    assert {p['nearest']['image'] for p in found.data['pictures']} == {1}
    first = found.data['images'][0]
    assert first.startswith('data:image/webp;base64,')
    assert decoded(base64.b64decode(first.partition(',')[2])).shape == (6, 8, 3)

  def test_without_labels(self):
    category = page.Category('a', [0.2, 0.8], thresholds=(page.Threshold('t', 0.5),), pictures=(picture(),))
    found = Html(page.render(page.Page('t', categories=[category])))
    assert '2 unlabelled' in found.text and len(found.all('svg', role='img')) == 1

  @pytest.mark.parametrize('label', [0, 1])
  def test_one_label_only_has_no_curves(self, label):
    category = page.Category('a', [0.2, 0.8], [label] * 2, pictures=(picture(label=label),))
    found = Html(page.render(page.Page('t', categories=[category])))
    assert len(found.all('svg', role='img')) == 1

  def test_empty_runs(self):
    for empty in (page.Page('t'), page.Page('t', categories=[page.Category('a', [])])):
      found = Html(page.render(empty))
      assert 'No images are kept in this report.' in found.text
      assert not found.all('svg', role='img') and not found.all('form')

  def test_pictures_come_first_if_wished(self):
    order = ['results', 'scores', 'pictures']
    for first, expected in ((False, order), (True, order[::-1])):
      text = page.render(small_page()._replace(pictures_first=first))
      assert re.findall('<h2 id="(results|scores|pictures)-heading"', text) == expected
      assert [a.split('-')[0] for a in re.findall('<a href="#([a-z-]+)"', text)][:3] == expected

  def test_says_which_images_are_left_out(self):
    scores, labels = np.linspace(0, 1, 50), np.arange(50) % 2
    everything = [picture(f'{i}.png', s, label=int(y)) for i, (s, y) in enumerate(zip(scores, labels))]
    for most, words in (
        (40, 'a: 40 of 50 images: all 24 errors, then the highest scores'),
        (8, 'a: 8 of 50 images: 8 of 24 errors, those farthest from the threshold')):
      category = page.Category(
          'a', scores, labels, (page.Threshold('t', 0.5),), tuple(page.keep(everything, 0.5, most)))
      assert words in Html(page.render(page.Page('t', categories=[category]))).text
    whole = category._replace(pictures=tuple(everything))
    assert 'most telling' not in Html(page.render(page.Page('t', categories=[whole]))).text

  @pytest.mark.parametrize('bad, message', [
      ({'rows': [('nut', 1.0)]}, 'Expected 4 values in a row'),
      ({'columns': (page.Column('a', 'money'),), 'rows': [(1,)], 'totals': ()}, "kind 'money'"),
      ({'categories': [page.Category('a', [0.5, float('nan')])]}, 'a: expected finite scores'),
      ({'categories': [page.Category('a', [0.5, 0.5], [1])]}, 'a: 2 scores and 1 labels'),
      ({'categories': [page.Category('a', [0.5], pictures=(
          picture()._replace(image=b'<svg onload=alert(1)>'),))]}, 'Expected a WebP, JPEG or PNG'),
  ])
  def test_what_does_not_fit(self, bad, message):
    with pytest.raises(ValueError, match=message):
      page.render(small_page(**bad))


class TestWrite:

  def test_replaces_in_one_step(self, tmp_path):
    path = tmp_path / 'report.html'
    page.write(path, small_page())
    before = path.read_text(encoding='utf-8')
    assert before == page.render(small_page())
    with pytest.raises(ValueError, match='finite'):
      page.write(path, small_page(categories=[page.Category('a', [math.inf])]))
    assert path.read_text(encoding='utf-8') == before and [p.name for p in tmp_path.iterdir()] == [path.name]


class TestJson:

  def test_there_and_back(self):
    rich = picture(
        label=1, defect='bent', anomaly_map=np.eye(4), mask=np.eye(6) > 0, regions=((0.1, 0.2, 0.3, 0.4),),
        patch=(0.0, 0.0, 0.5, 0.5), facts=(('p-value', '0.1'),),
        nearest=page.Patch('n', page.encode(np.zeros((4, 4, 3), np.uint8)), (0.0, 0.0, 1.0, 1.0)))
    for category in (
        page.Category('a', [0.5], [1], (page.Threshold('t', 0.5, True),), (rich, picture())),
        page.Category('b', [])):
      assert page.from_json(page.to_json(category)) == category

  def test_pages_kept_before_there_were_several_regions(self):
    values = json.loads(page.to_json(page.Category('a', [0.5], [1], (), (picture(),))))
    (kept,) = values['pictures']
    del kept['regions'], kept['anomalous']
    kept['region'] = [0.1, 0.2, 0.3, 0.4]
    assert page.from_json(json.dumps(values)).pictures[0].regions == ((0.1, 0.2, 0.3, 0.4),)
    kept['region'] = None
    assert page.from_json(json.dumps(values)).pictures[0].regions == ()

  def test_numpy_values(self):
    category = page.Category('a', np.float32([0.5]), np.array([1]), (page.Threshold('t', np.float32(0.25)),))
    assert page.from_json(page.to_json(category)) == page.Category(
        'a', [0.5], [1], (page.Threshold('t', 0.25),))


class TestPicture:

  def test_a_large_image_becomes_small_and_keeps_its_shape(self):
    result = page.picture('a', 0.5, np.zeros((1000, 500, 3), np.uint8), anomaly_map=np.zeros((1000, 500)))
    assert result.size == (256, 128) and decoded(result.image).shape == (256, 128, 3)
    assert decoded(result.heat).shape[:2] == (96, 48)

  def test_what_was_not_seen_is_dark(self):
    image = np.full((400, 800, 3), 200, np.uint8)
    shown = decoded(page.picture('a', 0.5, image, seen=(0.25, 0.0, 0.75, 1.0)).image).astype(int)
    assert shown.shape == (128, 256, 3)
    assert abs(shown[:, 70:186] - 200).max() < 12 and shown[:, :58].max() < 110 and shown[:, 198:].max() < 110

  @pytest.mark.parametrize('size', [(1, 1), (20, 20000), (20000, 20)])
  def test_odd_shapes(self, size):
    image = Image.new('L', size[::-1], 128)
    result = page.picture('a', 0.5, image, anomaly_map=np.ones(size, np.float32), mask=np.ones(size, bool))
    assert decoded(result.image).shape[:2] == result.size and min(result.size) >= 1
    assert np.abs(decoded(result.image).astype(int) - 128).max() < 4

  def test_heat_runs_from_low_to_high_and_unknown_is_nothing(self):
    values = np.repeat([[-5.0, 2.0, 3.0, 4.0, 9.0, np.nan]], 6, 0).repeat(8, 1).repeat(8, 0)
    grey = decoded(picture(anomaly_map=values, low=2.0, high=4.0).heat)[24, 4::8, 0]
    np.testing.assert_allclose(grey, [0, 0, 127.5, 255, 255, 0], atol=12)  # as WebP keeps it

  @pytest.mark.parametrize('arguments, message', [
      ({'score': float('nan')}, 'a.png: expected a finite score'),
      ({'anomaly_map': np.eye(3), 'low': 1.0, 'high': 1.0}, 'Expected low < high'),
  ])
  def test_what_does_not_fit(self, arguments, message):
    with pytest.raises(ValueError, match=message):
      picture(**arguments)


class TestOutline:

  def points(self, mask):
    return [[tuple(map(int, p.split())) for p in part.rstrip('Z').split('L')]
            for part in page.outline(mask).split('M')[1:]]

  def test_lies_where_the_mask_ends(self):
    mask = np.zeros((10, 20), bool)
    mask[2:5, 6:16] = True
    (line,) = self.points(mask)
    xs, ys = zip(*line)
    assert (min(xs), max(xs), min(ys), max(ys)) == (300, 800, 200, 500)
    assert len(line) == 8  # four corners, each cut

  def test_holes_and_parts_have_lines_of_their_own(self):
    mask = np.zeros((20, 20), bool)
    mask[1:10, 1:10] = True
    mask[4:6, 4:6] = False
    mask[15:18, 15:18] = True
    assert len(self.points(mask)) == 3

  def test_whole_empty_and_large_masks(self):
    assert page.outline(np.zeros((5, 5), bool)) == ''
    (line,) = self.points(np.ones((5, 5), bool))
    assert {x for p in line for x in p} >= {0, 1000}
    large = np.zeros((3000, 2000), bool)
    large[1500, 1000] = True  # a single pixel is not lost
    (line,) = self.points(large)
    assert all(498 <= x <= 504 for p in line for x in p)

  def test_a_round_mask(self):
    y, x = np.mgrid[:224, :224]
    mask = (y - 100) ** 2 + (x - 120) ** 2 < 80**2
    (line,) = self.points(mask)
    assert 12 < len(line) < 250  # of more than 600
    radius = np.hypot(*(np.array(line) / 1000 * 224 - [120.5, 100.5]).T)
    assert abs(radius - 80).max() < 1.5


class TestTelling:

  def test_errors_then_high_and_borderline_in_turns(self):
    scores = [0.1, 0.48, 0.9, 0.95, 0.52, 0.99, 0.3, 0.7]
    labels = [1, 0, 1, 1, 1, 1, 0, 0]
    order = [sorted(set(page.telling(scores, labels, 0.5, n)) - set(page.telling(scores, labels, 0.5, n - 1)))
             for n in range(1, 9)]
    # Errors are 0 (missed by 0.4) and 7; then the highest, the nearest, the second highest ...
    assert order == [[0], [7], [5], [1], [3], [4], [2], [6]]

  def test_without_labels_or_threshold(self):
    scores = [0.1, 0.5, 0.9, 0.45, 0.8]
    assert page.telling(scores, None, 0.44, 2) == [2, 3]
    assert page.telling(scores, None, None, 2) == [2, 4]
    assert page.telling(scores, None, 0.44, 0) == [] and page.telling([], None, 0.5, 3) == []
    assert page.telling(scores, None, 0.44, 9) == [0, 1, 2, 3, 4]

  def test_what_the_score_does_not_decide_is_kept_first(self):
    pictures = [picture(score=s) for s in (0.1, 0.8, 0.9, 0.2)]
    pictures[0] = pictures[0]._replace(anomalous=True)
    pictures[3] = pictures[3]._replace(anomalous=False)
    assert page.keep(pictures, 0.5, 2) == [pictures[0], pictures[3]]

  def test_keeping_now_and_then_is_keeping_at_the_end(self):
    rng = np.random.default_rng(0)
    blank = picture()
    everything = [blank._replace(name=str(i), score=float(s)) for i, s in enumerate(rng.random(300))]
    held = []
    for one in everything:
      held.append(one)
      if len(held) == 40:
        held = page.keep(held, 0.6, 20)
    assert page.keep(held, 0.6, 20) == page.keep(everything, 0.6, 20)


class TestHistogram:

  def test_bars_stand_for_all_images_where_their_scores_are(self):
    scores, labels = np.random.default_rng(0).random(200) + 1, np.arange(200) % 3 // 2
    chart = charts.histogram(scores, labels, (page.Threshold('t', 1.5),))
    total = {'good': 0, 'anomalous': 0}
    for bar in chart['bars']:
      total[bar.kind] += int(bar.text.split()[0])
      assert bar.x >= 0 and bar.x + bar.width <= charts.WIDTH
      assert bar.y >= -1e-9 and bar.y + bar.height <= charts.HEIGHT + 1e-9
      edge = bar.y if bar.kind == 'anomalous' else bar.y + bar.height
      assert edge == pytest.approx(chart['base'])
    assert total == {'good': (labels == 0).sum(), 'anomalous': labels.sum()}
    ((x, text, needs_labels),) = chart['lines']
    assert x == pytest.approx(charts.WIDTH / 2, abs=3) and (text, needs_labels) == ('t: 1.5', False)
    assert not chart['logarithmic']

  @pytest.mark.parametrize('scores', [[0.5], [0.0, 0.0], [-1.0, 3.0], [1e-9, 1e9], [0.01, 0.9]])
  def test_any_scores(self, scores):
    chart = charts.histogram(np.array(scores), None, ())
    assert sum(int(b.text.split()[0]) for b in chart['bars']) == len(scores)
    assert chart['logarithmic'] == (scores[0] > 0 and len(scores) > 1)
    assert len(chart['ticks']) <= 12 and all(0 <= x <= charts.WIDTH for x, _ in chart['ticks'])


class TestCurves:

  def test_points_of_the_thresholds(self):
    roc, precision = charts.curves(
        np.array([0.1, 0.4, 0.35, 0.8]), np.array([0, 0, 1, 1]),
        (page.Threshold('a', 0.35), page.Threshold('b', 2.0, True)))
    assert roc['area'] == 0.75 and precision['area'] == pytest.approx(5 / 6)
    width, height = charts.WIDTH, charts.HEIGHT
    points = ((0, height), (0, height / 2), (width / 2, height / 2), (width / 2, 0), (width, 0))
    assert [p[:2] for p in roc['points']] == [(width / 2, 0), (0, height)]
    assert [p[:2] for p in precision['points']] == [(width, pytest.approx(height / 3, abs=0.1))]
    assert roc['path'] == 'M' + 'L'.join(f'{x:g} {y:g}' for x, y in points)

  def test_many_images_are_few_points(self):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 20000)
    roc, precision = charts.curves(rng.random(20000) + labels, labels, ())
    assert len(roc['path']) < 60000 and len(precision['path']) < 60000
