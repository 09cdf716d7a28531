"""An archive scored by Ray Data, as docs/archives.md says."""

import json
import runpy

import pytest

import patchcore_jax as pc
from tests import plates
from tests.conftest import ROOT


@pytest.mark.slow
def test_findings_are_those_of_inspect(tmp_path):
  ray = pytest.importorskip('ray', reason='RAY ABSENT: the extra [ray]; this check did not run')
  plates.draw(tmp_path)
  good, archive = tmp_path / 'bolt/train/good', tmp_path / 'archive'
  inspector = pc.fit(str(good), backbone='resnet18_slim.procedural', false_alarm_rate=0.2)
  inspector.save(tmp_path / 'bank')
  (tmp_path / 'bolt/test').rename(archive)
  (archive / 'broken.png').write_bytes(b'no image')
  inspected = runpy.run_path(str(ROOT / 'docs/archive.py'))['inspected']
  ray.init(num_cpus=2, include_dashboard=False, runtime_env={'env_vars': {'PYTHONPATH': str(ROOT)}})
  try:
    rows = {row['path']: row for row in inspected(tmp_path / 'bank', archive, batch_size=4).take_all()}
  finally:
    ray.shutdown()
  files = sorted(map(str, archive.rglob('*.png')))
  assert sorted(rows) == files and len(files) > 4
  broken = rows.pop(str(archive / 'broken.png'))
  assert broken['decision'] == 'not scored' and 'Cannot read' in broken['error'] and not broken['finding']
  for path, row in rows.items():
    finding = inspector.inspect(path)
    assert row['decision'] == finding.decision and row['score'] == pytest.approx(finding.score, rel=1e-5)
    assert json.loads(row['finding'])['box'] == finding.to_json()['box']
