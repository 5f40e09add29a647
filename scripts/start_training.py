"""One training run from start to end: demo data where it is wanted, training, evaluation, three tagged images, a table.

The mechanism behind start_training.sh and Start_AI_Training.ps1, which make the environment first. Stops at the first
step that fails and exits with that step's code; asks nothing.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from Configuration_System import FullConfig, load_config
from scripts.make_demo_dataset import DEFAULT_OUTPUT, make_demo_dataset
from tagger.command import command
from tagger.options import Parser
from tagger.stop import SAME_REQUEST_S

DEMO_CONFIG = "configs/demo.yaml"
RESUME_WORDS = ("latest", "best", "auto", "none")
CALLED_FROM = "TAGSMITH_CALLED_FROM"  # the launchers change to the project's folder and leave word of where they were
# OpenMP's threads spin while they wait, which takes the core from whoever works: a busy machine then trains 3 to 6
# times slower. It is read once, when torch is imported, so it must stand in the child's environment.
CHILD_DEFAULTS = {"OMP_WAIT_POLICY": "PASSIVE"}


IS_POSIX = os.name == "posix"


class Step:
    """A child process whose exit code is this program's, signals included.

    On POSIX the child has a process group of its own: a signal sent to the whole group, as a terminal sends Ctrl-C,
    reaches this process alone, which passes it on. So the child gets each request once; a second one would end a
    training before its checkpoint. Ctrl-Z is passed on too. On Windows the console sends Ctrl-C to both by itself.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self._child: subprocess.Popen[bytes] | None = None
        self._pending: int | None = None
        self._passed_on_at: dict[int, float] = {}

    def run(self) -> int:
        """Run to the end; 128 + N where signal N ended it. A signal that arrives meanwhile is the child's to answer."""
        previous = self._take_signals()
        try:
            self._child = subprocess.Popen(
                self._command, env=CHILD_DEFAULTS | os.environ, process_group=0 if IS_POSIX else None
            )
            if self._pending is not None:
                self._child.send_signal(self._pending)
            code = self._child.wait()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        return 128 - code if code < 0 else code

    def _take_signals(self) -> dict[int, Any]:
        """Answer what is passed on, and Ctrl-Z; gives the handlers before, by number."""
        handlers: dict[int, Any] = {signal.SIGINT: self._pass_on, signal.SIGTERM: self._pass_on}
        if IS_POSIX:
            others = {signal.SIGHUP: self._pass_on, signal.SIGQUIT: self._pass_on, signal.SIGTSTP: self._pause}
            # What was ignored from the start stays so, as `nohup` wants it.
            handlers |= {n: handler for n, handler in others.items() if signal.getsignal(n) != signal.SIG_IGN}
        return {number: signal.signal(number, handler) for number, handler in handlers.items()}

    def _pass_on(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if not IS_POSIX or now - self._passed_on_at.get(number, -SAME_REQUEST_S) < SAME_REQUEST_S:
            return
        self._passed_on_at[number] = now
        if self._child is None:
            self._pending = number
        else:
            self._child.send_signal(number)

    def _pause(self, _number: int, _frame: FrameType | None) -> None:
        """Stop the child's group and this process; `fg` and `bg` wake this process, which wakes the group."""
        if self._child is None or self._child.poll() is not None:
            return
        os.killpg(self._child.pid, signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        os.killpg(self._child.pid, signal.SIGCONT)


def wants_demo_data(config: FullConfig) -> bool:
    """Whether the configuration reads the demo data set's usual folder."""
    return any(Path(root).resolve() == DEFAULT_OUTPUT.resolve() for root in config.data.roots)


def from_callers_folder(path: str) -> str:
    """A path as the caller meant it: relative to the caller's folder where it exists there, else to the project's."""
    seen_from_there = Path(os.environ.get(CALLED_FROM) or ".") / path
    return str(seen_from_there.resolve()) if seen_from_there.exists() else path


def run_all(config_file: str, resume: str | None, overrides: Sequence[str], *, validate_only: bool = False) -> int:
    """Every step in turn; the exit code of the first that fails, else 0. Raises InputError before the first."""
    config = load_config(config_file, overrides)
    if wants_demo_data(config):
        demo = make_demo_dataset()
        print(f"demo data set: {demo.num_images} images in {demo.folder}{'' if demo.drawn else ' (found)'}", flush=True)
    run = str(config.run.folder)
    flags = [] if resume is None else ["--resume", resume]
    flags += ["--validate-only"] if validate_only else []
    train = ["train_direct.py", "--config", config_file, *flags, *overrides]
    afterwards = (["validation_loop.py", "--run", run], ["-m", "scripts.report_run", run])
    for words in (train, *(() if validate_only else afterwards)):
        code = Step([sys.executable, *words]).run()
        if code:
            return code
    return 0


@command()
def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 0 done, else the code of the step that failed; 2 for bad settings."""
    parser = Parser(
        prog="python -m scripts.start_training",
        description="Train, evaluate and show a tagger. Paths in settings start at the project's folder.",
        epilog="example: python -m scripts.start_training training.num_epochs=3 run.name=short",
    )
    parser.add_argument("--config", default=DEMO_CONFIG, metavar="FILE", help="a recipe (default: %(default)s)")
    parser.add_argument("--resume", metavar="latest|best|auto|none|PATH", help="continue the run; auto: or start it")
    parser.add_argument("--validate-only", action="store_true", help="check settings and data, train nothing")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="settings, e.g. training.num_epochs=3"
    )
    options = parser.parse_intermixed_args(arguments)
    resume = options.resume
    if resume is not None and resume not in RESUME_WORDS:
        resume = from_callers_folder(resume)
    config_file = from_callers_folder(options.config)
    return run_all(config_file, resume, options.overrides, validate_only=options.validate_only)


if __name__ == "__main__":
    sys.exit(main())
