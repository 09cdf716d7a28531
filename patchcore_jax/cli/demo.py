"""`patchcore demo`: draws parts, fits, measures, and says what to type next."""

import shlex
import time
from pathlib import Path

import click

from patchcore_jax.cli import evaluate, options, terminal
from patchcore_jax.detectors import PatchCore
from patchcore_jax.evaluation.settings import Settings
from patchcore_jax.settings import BackboneSpec, DataSpec, EmbeddingSpec, ReportSpec

_BACKBONE = 'resnet18_slim.procedural'  # comes with the package
_RATIOS = (0.02,)


@click.command('demo', cls=options.Command)
@options.option('--out', default='patchcore_demo', metavar='DIR', group='Common',
                help='Folder for the drawn images and the results. A demo that was stopped goes on.')
@options.of_record('data', DataSpec, group='Common', only=('categories',))
@options.common
def command(out: str, data__categories: tuple[str, ...], debug: bool, compilation_cache: str) -> None:
  """Try everything on drawn parts, with the network that comes along: no data and no network connection.

  DIR then holds data/, the drawn parts in the layout of MVTec AD, and results/, with report.html. The same as
  experiments.mvtec with configs/demo.py; the numbers show that the software works, and not how well.
  """
  with terminal.readable_errors(debug):
    began = time.monotonic()
    folder = Path(out)
    settings = Settings(
        DataSpec('synthetic', str(folder / 'data'), data__categories),
        PatchCore(embedding=EmbeddingSpec('mean')), _RATIOS, backbone=BackboneSpec(_BACKBONE),
        report=ReportSpec(errors=True))
    rows = evaluate.run(settings, str(folder / 'results'), compilation_cache)
    terminal.say(f'This took {time.monotonic() - began:.0f} s.')
    for line in next_steps(folder, rows[-1]['category']):
      terminal.say(line)


def next_steps(folder: Path, category: str) -> list[str]:
  """Lists the commands that follow on a demo in a folder."""
  images = folder / 'data' / category
  defects = min(p for p in (images / 'test').iterdir() if p.is_dir() and p.name != 'good')
  good, bank, defects, findings = (shlex.quote(str(p)) for p in (
      images / 'train' / 'good', folder / category, defects, folder / f'{category}_findings'))
  return [
      'Next, learn a part with thresholds, and look at new images of it:',
      f'  patchcore fit {good} --out {bank}',
      f'  patchcore predict {bank} {defects} --out {findings} --why',
      'With images of your own, give the folder of good ones in place of the first path.']
