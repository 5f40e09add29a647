"""One torch thread a test process: tiny tensors gain nothing from more, and parallel test processes share the cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
