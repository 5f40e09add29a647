"""One torch thread a test process: tiny tensors gain nothing from more, and parallel test processes share the cores.

No test is held against the clock: a busy machine is no fault of the code.
"""

import os

from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

settings.register_profile("no clock", deadline=None)
settings.load_profile("no clock")
