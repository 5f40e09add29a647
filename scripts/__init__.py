"""Commands: thin programs over the chapters, each run as `python -m scripts.NAME`."""

import sys

from tagger.command import start_quietly

if sys.argv[:1] == ["-m"]:  # what it is while the command itself is not imported yet
    start_quietly()
