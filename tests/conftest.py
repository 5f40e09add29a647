"""One torch thread a test process: tiny tensors gain nothing from more, and parallel test processes share the cores.

No test is held against the clock: a busy machine is no fault of the code. Signals act as in a terminal, also where the
tests were started in the background, which hands down SIGINT and SIGHUP as ignored.
"""

import os
import signal

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

settings.register_profile("no clock", deadline=None)
settings.load_profile("no clock")


@pytest.fixture(autouse=True)
def _no_waiting_for_a_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose last save fails ends at once, in this process; the tests of waiting say how long."""
    monkeypatch.setattr("tagger.checkpoint.writer.PATIENCE_S", 0.0)
