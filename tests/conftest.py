"""Fixtures. Reference arrays of the originals lie beside the project, in ../shared, and may be absent."""

import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import pytest

# Before JAX and others read it. What tests compile and cache is nobody's, and the next run is quicker by it.
os.environ['XDG_CACHE_HOME'] = str(Path(tempfile.gettempdir()) / f'patchcore_jax_tests_{os.getuid()}')
# Most of the time of small tests is the compiler's.
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', os.path.join(os.environ['XDG_CACHE_HOME'], 'programs'))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.1')
# Several workers on one GPU write XLA's own cache at once, which ends them.
os.environ.setdefault('JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES', 'none')

# A shell that starts the tests in the background has them, and what they start, ignore Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
  signal.signal(signal.SIGINT, signal.default_int_handler)

from tests import plates  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / 'shared'


@pytest.hookimpl(tryfirst=True)  # before slow ones are deselected
def pytest_collection_modifyitems(items):
  """Marks cases of a test as slow: those that `slow_for` names, by an id of its parameters."""
  for item in items:
    ids = set(item.callspec.id.split('-') if hasattr(item, 'callspec') else ())
    if any(ids & set(marker.args) for marker in item.iter_markers('slow_for')):
      item.add_marker(pytest.mark.slow)


def _folder(path):
  if not path.is_dir():
    pytest.skip(f'REFERENCE DATA ABSENT: {path}; this check did not run')
  return path


@pytest.fixture(scope='module', autouse=True)
def forgetful():
  """Frees the programs that a module compiled: together they would take many gigabytes."""
  yield
  jax = sys.modules.get('jax')
  if jax is not None:
    jax.clear_caches()


@pytest.fixture(scope='module', autouse=True)
def small_programs(request):
  """Has programs made small and compiled with little care, also in processes that tests start.

  The compiler takes most of the time of small tests, and a third of it is enough: banks are compared as a
  whole, learnt layers convolve by products, and products are in float32 only, as a second type is compiled
  anew. Modules that are about these, about rounding or about speed are marked `as_shipped`.
  """
  if request.node.get_closest_marker('as_shipped'):
    yield
    return
  import jax

  from patchcore_jax.learned import layers
  from patchcore_jax.search import neighbors, slots

  on_cpu = jax.default_backend() == 'cpu'
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(slots, '_may_be_fast', lambda: False)
    patch.setattr(layers, '_FEWEST_CELLS', 10**9)
    if on_cpu:
      patch.setattr(neighbors, '_in_stages', _with_all_of_small_banks(neighbors._in_stages))
      patch.setenv('JAX_DISABLE_MOST_OPTIMIZATIONS', 'true')
      jax.config.update('jax_disable_most_optimizations', True)
    yield
  jax.config.update('jax_disable_most_optimizations', False)


def _with_all_of_small_banks(in_stages):
  """Makes `neighbors._in_stages` compare a query with all rows of a bank, where these are few."""
  from patchcore_jax.search import neighbors

  def search(queries, bank, *, sizes, k, **arguments):
    if len(queries) * bank.rows.size > 2**24:
      return in_stages(queries, bank, sizes=sizes, k=k, **arguments)
    return neighbors._by_all(queries, bank, sizes, k)[0]

  return search


@pytest.fixture(scope='session')
def golden():
  """Folder of reference arrays made by running the PyTorch originals."""
  return _folder(SHARED / 'golden')


@pytest.fixture(scope='session')
def realdata():
  """Folder of real MVTec AD categories and a real pretrained backbone."""
  return _folder(SHARED / 'realdata')


@pytest.fixture(scope='session')
def pristine(tmp_path_factory):
  """Folder of the plates; not to be changed."""
  root = tmp_path_factory.mktemp('data')
  plates.draw(root)
  return root


@pytest.fixture
def data(pristine, tmp_path):
  """A copy that a test may damage."""
  return shutil.copytree(pristine, tmp_path / 'data')


@pytest.fixture(scope='session')
def browser():
  """Headless Chromium."""
  from selenium import webdriver  # which few tests need

  chromium = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
  driver = shutil.which('chromedriver')
  if not chromium or not driver:
    pytest.skip('NO BROWSER: pages are not tested. apt-get install chromium chromium-driver')
  options = webdriver.ChromeOptions()
  options.binary_location = chromium
  for argument in ('--headless=new', '--disable-gpu', '--disable-dev-shm-usage', '--hide-scrollbars',
                   *(['--no-sandbox'] if os.geteuid() == 0 else [])):  # root has none
    options.add_argument(argument)
  options.set_capability('goog:loggingPrefs', {'browser': 'ALL', 'performance': 'ALL'})
  with webdriver.Chrome(options, webdriver.ChromeService(driver)) as opened:
    yield opened
