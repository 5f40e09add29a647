"""How commands end: one line, the right code, nothing left behind."""

import errno
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tagger.command import Stopped, command, held_back
from tagger.errors import DivergedError, InputError, RunFailedError, StorageError
from tagger.stop import SIGNALS

ROOT = Path(__file__).resolve().parent.parent.parent
POSIX_ONLY = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signals for another process")


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("wrong; mend it"), 2, "error: wrong; mend it"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a.txt"), 2, "error: a.txt: No such file"),
        (PermissionError(errno.EACCES, "Permission denied", "b"), 2, "error: b: Permission denied"),
        (DivergedError("the loss is no number"), 4, "error: the loss is no number"),
        (MemoryError(), 5, "error: out of memory"),
        (StorageError("the disk went"), 6, "error: the disk went"),
        (OSError(errno.ENOSPC, "No space left", "c"), 6, "error: [Errno 28] No space left"),
        (RunFailedError("said before", 7), 7, ""),
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C; all is well"),
    ],
)
def test_what_is_known_is_one_line(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, line: str
) -> None:
    @command("all is well")
    def main() -> int:
        raise error

    assert main() == code
    said = capsys.readouterr().err
    assert said.startswith(line) and said.count("\n") == (1 if line else 0)


def test_what_is_not_known_keeps_its_traceback_and_handlers_come_back() -> None:
    @command()
    def main(fault: bool) -> int:
        return 1 // int(not fault)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError):
        main(True)
    assert main(fault=False) == 1
    assert signal.getsignal(signal.SIGINT) is before


@POSIX_ONLY
@pytest.mark.parametrize(("number", "code"), [(1, 129), (signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_unwinds_and_a_second_at_once_is_the_same_request(
    capsys: pytest.CaptureFixture[str], number: signal.Signals, code: int
) -> None:
    folders: list[Path] = []

    @command("start again")
    def main() -> int:
        with tempfile.TemporaryDirectory() as scratch:
            folders.append(Path(scratch))
            try:
                signal.raise_signal(number)
            finally:
                signal.raise_signal(number)
                folders.append(Path(scratch))
        return 0

    assert main() == code
    assert len(folders) == 2 and not folders[0].exists()
    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    assert capsys.readouterr().err == f"stopped by {name}; start again\n"


@POSIX_ONLY
def test_what_breaks_on_the_way_out_does_not_hide_the_signal(capsys: pytest.CaptureFixture[str]) -> None:
    @command()
    def main() -> int:
        try:
            signal.raise_signal(signal.SIGTERM)
        except Stopped as error:
            raise RuntimeError("a pool that is broken") from error
        return 0

    assert main() == 143
    assert capsys.readouterr().err == "stopped by SIGTERM\n"


@POSIX_ONLY
def test_a_signal_that_a_finaliser_swallows_comes_again(capsys: pytest.CaptureFixture[str]) -> None:
    class Finalised:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    @command()
    def main() -> int:
        thing = Finalised()
        del thing
        time.sleep(60)
        return 0

    assert main() == 143
    assert capsys.readouterr().err == "stopped by SIGTERM\n"


@POSIX_ONLY
def test_a_process_started_while_signals_are_held_back_never_sees_them() -> None:
    code = "import signal, sys; sys.exit(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ()))"
    with held_back(signal.SIGINT):
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 1
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Real processes


def _start(code: str, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _stop(process: subprocess.Popen[str], number: signal.Signals, wait: bool = True) -> str:
    """Signal the whole group, as a terminal does, once it says "busy"; what it said to stderr at the end."""
    assert process.stdout is not None
    while wait and (line := process.stdout.readline()) != "busy\n":
        assert line, process.communicate()
    children = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=60)
    deadline = time.monotonic() + 60
    while any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children):
        assert time.monotonic() < deadline, "a child outlived the command"
        time.sleep(0.05)
    return errors


ENDINGS = pytest.mark.parametrize(
    ("number", "code", "line"),
    [(signal.SIGINT, 130, "stopped by Ctrl-C"), (signal.SIGTERM, 143, "stopped by SIGTERM")],
)

WAIT = "import sys, time\ndef wait(*_, **__):\n    print('busy', flush=True)\n    time.sleep(600)\n"
# The reading of sidecars stands still, with the folder of the new index already made.
INDEX = WAIT + "import tagger.data.index as it\nit.add_scanned_rows = wait\n"


@POSIX_ONLY
@pytest.mark.slow
@ENDINGS
@pytest.mark.parametrize("run", ["scripts.index", "scripts.inspect_dataset", "vocabulary", "train_direct"])
def test_a_stopped_indexing_leaves_nothing(
    tmp_path: Path, run: str, number: signal.Signals, code: int, line: str
) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.png").touch()
    (tmp_path / "set" / "a.json").write_text('{"tags": ["thing"]}')
    words = [str(tmp_path / "set"), "--index-dir", str(tmp_path / "index")]
    if run == "vocabulary":
        words += ["--min-frequency", "1", "--output", str(tmp_path / "vocabulary.json")]
    if run == "train_direct":
        settings = (f"data.roots=[{tmp_path}/set]", f"data.index_dir={tmp_path}/index", f"run.output_dir={tmp_path}")
        words = ["--config", "configs/unified_config.yaml", "run.name=run", *settings]
    start = f"import {run} as command\nsys.exit(command.main(sys.argv[1:]))"
    process = _start(INDEX + start, *words)
    errors = _stop(process, number)
    assert process.returncode == code
    if run == "train_direct":
        line = f"WARNING: {number.name} before the first update: there is nothing to save, {tmp_path}/run is removed"
    assert errors.splitlines()[-1] == line and "Traceback" not in errors
    assert [path.name for path in (tmp_path / "index").rglob("*") if path.name.startswith(".")] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index", "set"]


@POSIX_ONLY
@pytest.mark.slow
@ENDINGS
def test_processes_that_parse_sidecars_end_with_a_stopped_indexing(
    tmp_path: Path, number: signal.Signals, code: int, line: str
) -> None:
    for name in "abcdef":
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / "set" / f"{name}.png").touch()
        (tmp_path / "set" / f"{name}.json").write_text('{"tags": ["thing"]}')
    start = (
        "import tagger.data.parse_pool as pool\nfrom pathlib import Path\nfrom tagger.command import command\n"
        "from tagger.data.index import open_index\npool._Helpers.run = wait\n"
        "main = command()(lambda: bool(open_index([sys.argv[1]], Path(sys.argv[2]), processes=2)))\nsys.exit(main())"
    )
    process = _start(WAIT + start, str(tmp_path / "set"), str(tmp_path / "index"))
    errors = _stop(process, number)
    assert process.returncode == code
    assert errors == f"{line}\n"


@POSIX_ONLY
@pytest.mark.slow
@ENDINGS
def test_a_stopped_drawing_of_the_demo_set_leaves_nothing(
    tmp_path: Path, number: signal.Signals, code: int, line: str
) -> None:
    start = "import sys\nfrom scripts import make_demo_dataset as demo\nsys.exit(demo.main(sys.argv[1:]))"
    process = _start(start, "--output", str(tmp_path / "demo"), "--count", "100000")
    while not list(tmp_path.glob(".demo.partial-*/part-00/*.json")):
        assert process.poll() is None
        time.sleep(0.01)
    errors = _stop(process, number, wait=False)
    assert process.returncode == code
    assert errors == f"{line}; nothing is left of an unfinished set\n"
    assert list(tmp_path.iterdir()) == []


@POSIX_ONLY
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("patient", [True, False])
def test_a_later_signal_ends_at_once(number: signal.Signals, code: int, patient: bool) -> None:
    start = (
        "from tagger.command import command\n@command()\ndef main():\n    try:\n        wait()\n    finally:\n"
        "        print('tidying', flush=True)\n        time.sleep(float(sys.argv[1]))\n        print('tidy')\n"
        "    return 0\nsys.exit(main())"
    )
    process = _start(WAIT + start, "1" if patient else "600")
    assert process.stdout is not None
    assert process.stdout.readline() == "busy\n"
    process.send_signal(number)
    assert process.stdout.readline() == "tidying\n"
    if not patient:
        time.sleep(0.6)
        process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == code and (out == "tidy\n") == patient


@POSIX_ONLY
@pytest.mark.slow
@pytest.mark.parametrize("words", [["-m", "scripts.predict", "a", "b"], ["train_direct.py", "--config", "x"]])
def test_ctrl_c_while_a_command_still_imports_is_one_line(words: list[str]) -> None:
    # torch stands still while it is imported.
    code = "import sys, time\nprint('busy', flush=True)\ntime.sleep(600)\n"
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "torch.py").write_text(code)
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": scratch},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        errors = _stop(process, signal.SIGINT)
    assert process.returncode == 130 and errors == "stopped by Ctrl-C\n"


@POSIX_ONLY
def test_a_worker_that_was_ended_while_it_started_ends() -> None:
    """SIGTERM comes while it is still held back, and must not be thrown away."""
    code = (
        "import multiprocessing, os, signal, sys, time\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])\n"
        "from tagger import command\n"
        "command._end_with_parent = lambda: None\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "command.serve_parent()\n"
        "time.sleep(60)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=50, check=False)
    assert ended.returncode == -signal.SIGTERM
