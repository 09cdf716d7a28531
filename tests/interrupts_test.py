"""Ctrl-C ends a process whatever its main thread does."""

import signal
import subprocess
import sys

import pytest

from tests.conftest import ROOT


def _interrupted(script):
  """(exit code, standard error) of a script that is interrupted when it has printed a line."""
  with subprocess.Popen(
      [sys.executable, '-c', script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
      text=True) as process:
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
  return process.returncode, said


def test_what_swallows_exceptions_does_not_keep_it():
  assert _interrupted("""
import time
from patchcore_jax.cli import interrupts
with interrupts.ends_at_once('bye', 7):
  print('here', flush=True)
  while True:
    try:
      time.sleep(60)
    except BaseException:
      pass
""") == (7, 'bye\n')


# What a busy machine does: the first thread takes long to start, or its signal comes at the wrong moment.
_BUSY = {
    'never': '',
    'start': '''
start = threading.Thread.start

def start_slowly(thread):
  threading.Thread.start = start
  start(thread)
  time.sleep(0.2)

threading.Thread.start = start_slowly
''',
    'signal': '''
kill = os.kill

def unnoticed(*_):
  os.kill = kill

os.kill = unnoticed
'''}


@pytest.mark.parametrize('busy', _BUSY)
def test_it_is_not_lost_while_garbage_is_collected(busy):
  assert _interrupted("""
import gc, os, signal, sys, threading, time
from patchcore_jax.cli import interrupts
""" + _BUSY[busy] + """

def _xla_gc_callback(*args):  # as JAX's, which blocks while the network computes
  if args[0] == 'start':
    print('here', flush=True)
    end = time.monotonic() + 1
    while time.monotonic() < end:
      pass

gc.disable()
gc.callbacks.append(_xla_gc_callback)
try:
  with interrupts.never_lost():
    gc.collect()
    time.sleep(60)
except KeyboardInterrupt:
  assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
  raise SystemExit(3)
""") == (3, '')


def test_afterwards_it_is_an_exception_again():
  assert _interrupted("""
import time
from patchcore_jax.cli import interrupts
with interrupts.ends_at_once('bye', 7):
  pass
try:
  print('here', flush=True)
  time.sleep(60)
except KeyboardInterrupt:
  raise SystemExit(3)
""") == (3, '')
