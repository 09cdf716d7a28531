'use strict';
(() => {
  const data = JSON.parse(document.getElementById('data').textContent);
  const $ = id => document.getElementById(id);
  const PER_STEP = 48;

  // -- Elements. Text only ever goes in as text.

  function element(name, fields = {}, ...children) {
    const node = document.createElement(name);
    for (const [key, value] of Object.entries(fields)) {
      if (key in node) node[key] = value;
      else node.setAttribute(key, value);
    }
    node.append(...children);
    return node;
  }

  function drawing(name, attributes = {}, ...children) {
    const node = document.createElementNS('http://www.w3.org/2000/svg', name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.append(...children);
    return node;
  }

  const number = value => String(Number(value.toPrecision(4)));

  // -- The table.

  function sortTable(table, column, ascending) {
    const body = table.tBodies[0];
    const key = row => row.cells[column].dataset.key;
    const numeric = table.tHead.rows[0].cells[column].classList.contains('number');
    const rows = [...body.rows].sort((a, b) => {
      const [p, q] = [key(a), key(b)];
      if (!p || !q) return !p - !q;  // what is not defined comes last, either way
      const order = numeric ? p - q : p.localeCompare(q, undefined, {numeric: true});
      return ascending ? order : -order;
    });
    body.append(...rows);
    [...table.tHead.rows[0].cells].forEach((cell, i) => {
      cell.setAttribute('aria-sort', i !== column ? 'none' : ascending ? 'ascending' : 'descending');
    });
  }

  const table = $('results');
  if (table) {
    [...table.tHead.rows[0].cells].forEach((cell, i) => {
      cell.firstElementChild.addEventListener('click', () => {
        const first = !cell.classList.contains('number');  // numbers: the largest first
        const now = cell.getAttribute('aria-sort');
        sortTable(table, i, now === 'none' ? first : now === 'descending');
      });
    });
  }

  if (!data.pictures.length) return;

  // -- What is known of a picture.

  let thresholdName = '';  // the one chosen; where a category has none of that name, its first

  function thresholdOf(picture) {
    const all = data.categories[picture.category].thresholds;
    return all.find(t => t.name === thresholdName) || all[0] || null;
  }

  function decisionOf(picture) {
    const threshold = thresholdOf(picture);
    const anomalous = picture.anomalous ?? (threshold ? picture.score >= threshold.value : null);
    const error = anomalous !== null && picture.label !== null && anomalous !== (picture.label === 1);
    return {anomalous, error, text: anomalous === null ? '' : anomalous ? 'anomalous' : 'good'};
  }

  const labelOf = picture => picture.label === null ? '' : picture.label === 0 ? 'good'
      : (picture.defect || 'anomalous').replaceAll('_', ' ');

  // -- A picture and what lies over it.

  function toCanvas(canvas, uri) {
    const image = new Image();
    image.src = uri;
    image.decode().then(() => {
      canvas.width = image.naturalWidth;
      canvas.height = image.naturalHeight;
      const context = canvas.getContext('2d', {willReadFrequently: true});
      context.drawImage(image, 0, 0);
      const pixels = context.getImageData(0, 0, canvas.width, canvas.height);
      const values = pixels.data;
      for (let i = 0; i < values.length; i += 4) {  // from clear over yellow to red
        const heat = values[i] / 255;
        values[i] = 255;
        values[i + 1] = 204 * (1 - heat);
        values[i + 2] = 0;
        values[i + 3] = 191 * Math.min(2 * heat, 1);
      }
      context.putImageData(pixels, 0, 0);
    });
  }

  const outlined = (shape, attributes, kind) =>
    [drawing(shape, {...attributes, class: 'halo'}), drawing(shape, {...attributes, class: kind})];

  const square = box => ({
    x: 1000 * box[0], y: 1000 * box[1], width: 1000 * (box[2] - box[0]), height: 1000 * (box[3] - box[1])});

  const hasBoxes = picture => picture.regions.length > 0 || picture.patch;

  function layers(picture) {
    const [height, width] = picture.size;
    const node = element('span', {className: 'layers'},
      element('img', {src: data.images[picture.image], alt: '', decoding: 'async', width, height}));
    node.style.aspectRatio = `${width} / ${height}`;
    node.style.width = `${100 * Math.min(1, width / height)}%`;
    if (picture.heat !== null) {
      const canvas = element('canvas');
      toCanvas(canvas, data.images[picture.heat]);
      node.append(canvas);
    }
    const over = drawing('svg', {viewBox: '0 0 1000 1000', preserveAspectRatio: 'none', 'aria-hidden': true});
    if (picture.outline) {
      over.append(drawing('g', {class: 'outline'}, ...outlined('path', {d: picture.outline}, 'mask')));
    }
    if (hasBoxes(picture)) {
      over.append(drawing('g', {class: decisionOf(picture).anomalous === false ? 'of-good' : 'boxes'},
        ...picture.regions.flatMap(box => outlined('rect', square(box), 'region')),
        ...picture.patch ? outlined('rect', square(picture.patch), 'patch') : []));
    }
    if (over.childElementCount) node.append(over);
    return node;
  }

  // -- Toggles of the layers, in the gallery and in the viewer.

  const kinds = [
    ['heat', 'Heat map', 'h', p => p.heat !== null], ['mask', 'Mask', 'm', p => p.outline],
    ['boxes', 'Boxes', 'b', hasBoxes],
    ['good', 'Boxes of good images', 'g', p => hasBoxes(p) && decisionOf(p).anomalous !== null],
  ].filter(([, , , has]) => data.pictures.some(has));

  function toggle(kind) {
    const hidden = document.body.classList.toggle(`hide-${kind}`);
    document.querySelectorAll(`[data-layer=${kind}]`).forEach(b => { b.setAttribute('aria-pressed', !hidden); });
  }

  for (const group of document.querySelectorAll('.layers-toggles')) {
    for (const [kind, name, key] of kinds) {
      const button = element('button', {type: 'button', 'aria-pressed': true, title: `Key ${key}`,
                                        'data-layer': kind}, name);
      button.addEventListener('click', () => toggle(kind));
      group.append(button);
    }
  }
  // Too much at once: what lies over good images, and boxes beside masks.
  for (const [kind] of kinds) if (kind === 'good' || kind === 'boxes' && kinds.some(k => k[0] === 'mask')) toggle(kind);

  // -- Filters.

  const form = $('filters');
  const field = form.elements;

  function fill(select, options) {
    select.append(...options.map(([value, text]) => element('option', {value}, text)));
  }

  const labels = [...new Set(data.pictures.map(labelOf))].filter(Boolean).sort();
  const thresholds = new Map(data.categories.flatMap(c => c.thresholds).map(t => [t.name, t]));
  fill(field.category, [['', 'all'], ...data.categories.map((c, i) => [i, c.name])
    .filter(([i]) => data.pictures.some(p => p.category === i))]);
  fill(field.decision, [['', 'all'], ['anomalous', 'anomalous'], ['good', 'good'],
    ...labels.length ? [['error', 'wrong, all'], ['false', 'wrong: good called anomalous'],
                        ['missed', 'wrong: anomalous called good']] : []]);
  fill(field.label, [['', 'all'], ...labels.includes('good') ? [['=good', 'good']] : [],
    ...labels.some(l => l !== 'good') ? [['1', 'anomalous, all']] : [],
    ...labels.filter(l => l !== 'good' && l !== 'anomalous').map(l => [`=${l}`, `anomalous: ${l}`])]);
  fill(field.threshold, [...thresholds.values()].map(
    t => [t.name, t.needs_labels ? `${t.name} (needs labels)` : t.name]));
  const several = field.category.length > 2;  // 'all' is one
  $('by-category').hidden = !several;
  $('by-label').hidden = !labels.length;
  $('by-threshold').hidden = thresholds.size < 2;
  field.decision.parentElement.hidden = !thresholds.size;
  if (!thresholds.size) field.order.querySelector('[value=near]').remove();

  const accepts = {
    '': () => true, anomalous: d => d.anomalous, good: d => d.anomalous === false, error: d => d.error,
    false: d => d.error && d.anomalous, missed: d => d.error && !d.anomalous};

  function distance(picture) {
    const threshold = thresholdOf(picture);
    return threshold ? Math.abs(picture.score - threshold.value) / (Math.abs(threshold.value) || 1) : Infinity;
  }

  const orders = {
    high: (a, b) => b.score - a.score, low: (a, b) => a.score - b.score,
    near: (a, b) => distance(a) - distance(b),
    name: (a, b) => a.name.localeCompare(b.name, undefined, {numeric: true})};

  // In the table, a category's name leads to its images.
  for (const cell of table ? table.tBodies[0].querySelectorAll('th') : []) {
    const at = data.categories.findIndex(c => c.name === cell.dataset.key);
    if (!data.pictures.some(p => p.category === at)) continue;
    const link = element('a', {href: '#pictures', title: `Images of ${cell.dataset.key}`}, cell.textContent);
    link.addEventListener('click', () => {
      form.reset();
      field.category.value = at;
    });
    cell.replaceChildren(link);
  }

  const gallery = $('gallery');
  let shown = [];

  function refresh() {
    thresholdName = field.threshold.value;
    const {category, decision, label, order, name} =
      Object.fromEntries([...form.querySelectorAll('select, input')].map(f => [f.name, f.value]));
    const part = name.trim().toLowerCase();
    shown = data.pictures.filter(p =>
      (category === '' || p.category === Number(category)) && accepts[decision](decisionOf(p)) &&
      (label === '' || (label === '1' ? p.label === 1 : labelOf(p) === label.slice(1))) &&
      p.name.toLowerCase().includes(part)).sort(orders[order]);
    gallery.replaceChildren();
    const errors = shown.filter(p => decisionOf(p).error).length;
    const total = data.pictures.length;
    $('count').textContent = (shown.length === total ? `${total} images` : `${shown.length} of ${total} images`) +
      (labels.length && thresholds.size ? `, ${errors} classified wrongly` : '');
    $('empty').hidden = shown.length > 0;
    more(PER_STEP);
  }

  function tile(picture, at) {
    const decision = decisionOf(picture);
    const title = labelOf(picture);
    const said = [decision.text, decision.error && 'wrong', title && `label ${title}`, `score ${number(picture.score)}`, picture.name];
    const button = element('button', {
      type: 'button', className: `tile ${decision.error ? 'wrong' : decision.text}`,
      'aria-label': said.filter(Boolean).join(', '), title: picture.name},
      element('span', {className: 'frame'}, layers(picture)),
      element('span', {className: 'caption'},
        element('span', {className: 'first'},
          element('span', {className: 'score'}, number(picture.score)), ...badge(decision)),
        ...labels.length || several ? [element('span', {className: decision.error ? 'second wrong-text' : 'second'},
          [decision.error ? `✗ labelled ${title}` : title, several && data.categories[picture.category].name].filter(Boolean).join(' · ') ||
          '\u00a0')] : [],
        element('span', {className: 'second'}, picture.name)));
    button.addEventListener('click', () => open(at));
    return element('li', {}, button);
  }

  const badge = d => d.text ? [element('span', {className: `badge ${d.text}`}, d.text)] : [];

  function more(count) {
    const from = gallery.childElementCount;
    gallery.append(...shown.slice(from, from + count).map((p, i) => tile(p, from + i)));
    $('more').hidden = gallery.childElementCount >= shown.length;
  }

  for (const select of form.querySelectorAll('select')) select.addEventListener('change', refresh);
  field.name.addEventListener('input', refresh);
  form.addEventListener('submit', event => event.preventDefault());
  form.addEventListener('reset', () => setTimeout(refresh));
  $('empty').querySelector('button').addEventListener('click', () => form.reset());
  $('more').addEventListener('click', () => {
    const at = gallery.childElementCount;
    more(PER_STEP);
    gallery.children[at]?.firstElementChild.focus();
  });
  new IntersectionObserver(entries => {
    if (entries.some(e => e.isIntersecting)) more(PER_STEP);
  }, {rootMargin: '600px'}).observe($('more'));

  // -- One image.

  const viewer = $('viewer');
  let current = 0;

  const explained = {
    'Score': 'How far the least normal place lies from what is known of good images; larger is more unusual.',
    'Threshold': 'Scores from here on are anomalous.',
    'p-value': 'Share of good images that score as high: 0.01 is one in a hundred.',
    'calibrated score': 'The score from 0 to 1: 0.5 at the threshold, 0.1 for usual good images.',
    'not inspected': 'Share of the image that the network does not see: it is dark here.'};

  function fact(name, value, wide = false) {
    return element('div', {className: wide ? 'wide' : ''}, element('dt', {}, name), element('dd', {}, value),
      ...explained[name] ? [element('small', {}, explained[name])] : []);
  }

  function crop(uri, size, box, caption) {
    const [height, width] = size;
    const [left, top, right, bottom] = [box[0] * width, box[1] * height, box[2] * width, box[3] * height];
    const side = Math.min(Math.max(5 * (right - left), 5 * (bottom - top), width / 6), Math.max(width, height));
    const x = (left + right - side) / 2, y = (top + bottom - side) / 2;
    return element('figure', {},
      drawing('svg', {viewBox: `${x} ${y} ${side} ${side}`, 'aria-hidden': true},
        drawing('image', {href: uri, width, height, preserveAspectRatio: 'none'}),
        drawing('rect', {x: left, y: top, width: right - left, height: bottom - top})),
      element('figcaption', {}, caption));
  }

  async function showNearest(picture) {
    const place = $('viewer-nearest');
    place.hidden = !(picture.nearest && picture.patch);
    if (place.hidden) return;
    const uri = data.images[picture.nearest.image];
    const image = new Image();
    image.src = uri;
    await image.decode();
    if (shown[current] !== picture) return;  // turned over meanwhile
    place.replaceChildren(
      element('h3', {}, 'Why? The most anomalous patch, and the normal one most like it'),
      element('div', {className: 'pair'},
        crop(data.images[picture.image], picture.size, picture.patch, 'this image'),
        crop(uri, [image.naturalHeight, image.naturalWidth], picture.nearest.box,
             `training image ${picture.nearest.name}`)));
  }

  function show(at) {
    current = at;
    const picture = shown[at], decision = decisionOf(picture), title = labelOf(picture);
    $('viewer-name').textContent = $('viewer-name').title = picture.name;
    $('viewer-position').textContent = `${at + 1} of ${shown.length}`;
    const large = layers(picture);
    large.querySelector('img').alt = picture.name;
    large.style.width = `min(100%, ${65 * picture.size[1] / picture.size[0]}dvh)`;
    $('viewer-stage').replaceChildren(large);
    const used = thresholdOf(picture);
    $('viewer-facts').replaceChildren(
      ...decision.text ? [fact('Decision', badge(decision)[0], true)] : [],
      fact('Score', number(picture.score)),
      ...title ? [fact('Label', decision.error ? element('span', {className: 'wrong-text'}, `✗ ${title}`) : title)] : [],
      fact('Category', data.categories[picture.category].name),
      ...used ? [fact('Threshold', `${number(used.value)} (${used.name}${used.needs_labels ? ', needs labels' : ''})`, true)] : [],
      ...picture.facts.map(([name, value]) => fact(name, value)));
    viewer.querySelector('[data-step="-1"]').disabled = at === 0;
    viewer.querySelector('[data-step="1"]').disabled = at === shown.length - 1;
    showNearest(picture);
  }

  function open(at) {
    show(at);
    viewer.showModal();
    $('viewer-close').focus();
  }

  function step(by) {
    const at = current + by;
    if (at >= 0 && at < shown.length) show(at);
  }

  viewer.addEventListener('click', event => {
    if (event.target === viewer) viewer.close();  // beside it
    const button = event.target.closest('[data-step]');
    if (button) step(Number(button.dataset.step));
  });
  $('viewer-close').addEventListener('click', () => viewer.close());
  viewer.addEventListener('keydown', event => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const by = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -1, ArrowDown: 1}[event.key];
    const kind = kinds.find(([, , key]) => key === event.key);
    if (by) step(by);
    else if (event.key === 'Home') show(0);
    else if (event.key === 'End') show(shown.length - 1);
    else if (kind) toggle(kind[0]);
    else return;
    event.preventDefault();
  });
  viewer.addEventListener('close', () => {
    const missing = current + 1 - gallery.childElementCount;
    if (missing > 0) more(missing);
    gallery.children[current]?.firstElementChild.focus();
  });

  refresh();
})();
