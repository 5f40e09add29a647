"""A reader that leaves early ends a command quietly, whatever prints."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BEGIN = "from tagger.output import reader_may_leave\n"
PRINTS = "with reader_may_leave(): print('x' * 100_000); print('more')"
BUFFERED = "with reader_may_leave(): print('short')"
RICH = "from rich.console import Console\nwith reader_may_leave(): Console().print('x\\n' * 50_000); print('more')"
SHOW = "import sys, Configuration_System\nsys.exit(Configuration_System.main(['show', 'configs/demo.yaml']))"


@pytest.mark.parametrize("code", [PRINTS, BUFFERED, RICH, SHOW], ids=["print", "buffered", "rich", "show"])
def test_a_reader_that_leaves_ends_the_command_without_a_word(code: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", BEGIN + code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(30) == 1


def test_what_a_reader_stays_for_is_printed() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + BUFFERED], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "short\n", "")
