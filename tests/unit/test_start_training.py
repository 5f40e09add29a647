"""The driver behind the training launchers: exit codes, signals and paths come through unchanged."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from Configuration_System import FullConfig
from scripts import start_training
from scripts.start_training import CALLED_FROM, Step, from_callers_folder, main, wants_demo_data
from tagger.stop import SIGNALS

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("code", [0, 1, 2, 130, 143])
def test_the_exit_code_of_a_step_is_its_own(code: int) -> None:
    assert Step([sys.executable, "-c", f"raise SystemExit({code})"]).run() == code


@pytest.mark.skipif(os.name == "nt", reason="no process ends by a signal there")
def test_a_step_ended_by_a_signal_gives_128_and_its_number() -> None:
    assert Step([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]).run() == 128 + 9


def start_driver(child: str, ready: Path, **options: Any) -> "subprocess.Popen[bytes]":
    """A process of its own group that runs `child` as a step, once the child has made the file `ready`."""
    driver = (
        f"import sys; from scripts.start_training import Step; sys.exit(Step([sys.executable, '-c', {child!r}]).run())"
    )
    process = subprocess.Popen([sys.executable, "-c", driver], cwd=ROOT, stdin=subprocess.DEVNULL, **options)
    wait_until(ready.exists)
    return process


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert holds()


@pytest.mark.skipif(os.name == "nt", reason="signals are not passed on there")
@pytest.mark.parametrize("number", SIGNALS)
def test_the_child_answers_a_signal_and_the_driver_returns_its_code(tmp_path: Path, number: int) -> None:
    ready = tmp_path / "ready"
    child = (
        "import signal, sys, time; from pathlib import Path; "
        f"signal.signal({int(number)}, lambda n, f: sys.exit(128 + n)); Path({str(ready)!r}).touch(); time.sleep(30)"
    )
    process = start_driver(child, ready)
    try:
        process.send_signal(number)
        assert process.wait(20) == 128 + number
    finally:
        process.kill()


# Counts the requests that reach it for long enough to see a second one, then says how many there were.
COUNTING = (
    "import signal, sys, time; from pathlib import Path; seen = []; "
    "[signal.signal(n, lambda n, f: seen.append(n)) for n in (signal.SIGINT, signal.SIGTERM)]; "
    "Path({ready!r}).touch(); end = time.monotonic() + 30\n"
    "while not seen and time.monotonic() < end: time.sleep(0.01)\n"
    "time.sleep(0.4); sys.exit(10 + len(seen))"
)


@pytest.mark.skipif(os.name == "nt", reason="no process groups there")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("first_to_the_process", [False, True], ids=["group", "process and group"])
def test_a_signal_to_the_whole_group_reaches_the_child_once(
    tmp_path: Path, number: int, first_to_the_process: bool
) -> None:
    ready = tmp_path / "ready"
    process = start_driver(COUNTING.format(ready=str(ready)), ready, process_group=0)
    try:
        if first_to_the_process:
            process.send_signal(number)
            time.sleep(0.05)
        os.killpg(process.pid, number)
        assert process.wait(20) == 11
    finally:
        process.kill()


@pytest.mark.skipif(os.name == "nt", reason="no process groups there")
def test_a_pause_stops_the_child_too_and_both_go_on(tmp_path: Path) -> None:
    beat = tmp_path / "beat"
    child = (
        f"import time; from pathlib import Path; beat = Path({str(beat)!r})\n"
        "for n in range(600): beat.write_text(str(n)); time.sleep(0.02)"
    )
    process = start_driver(child, beat, process_group=0)
    try:
        os.killpg(process.pid, signal.SIGTSTP)
        assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
        time.sleep(0.1)
        paused_at = beat.read_text()
        time.sleep(0.2)
        assert beat.read_text() == paused_at
        os.killpg(process.pid, signal.SIGCONT)
        wait_until(lambda: beat.read_text() not in ("", paused_at))
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(20) == 128 + signal.SIGTERM
    finally:
        process.kill()


def test_waiting_threads_of_a_step_do_not_spin_unless_the_user_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    child = "import os, sys; sys.exit(['PASSIVE', 'ACTIVE'].index(os.environ['OMP_WAIT_POLICY']))"
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert Step([sys.executable, "-c", child]).run() == 0
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert Step([sys.executable, "-c", child]).run() == 1


def test_handlers_are_put_back_after_a_step() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    Step([sys.executable, "-c", ""]).run()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_paths_are_meant_from_where_the_caller_stood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.yaml").touch()
    monkeypatch.setenv(CALLED_FROM, str(tmp_path))
    assert from_callers_folder("mine.yaml") == str(tmp_path / "mine.yaml")
    assert from_callers_folder("configs/demo.yaml") == "configs/demo.yaml"


def test_demo_data_is_made_for_whoever_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = FullConfig()
    assert not wants_demo_data(config)
    config.data.roots = ["data/demo"]
    assert wants_demo_data(config)
    config.data.roots = [str(ROOT / "data" / "demo"), "elsewhere"]
    assert wants_demo_data(config)
    config.data.roots = ["data/demo2"]
    assert not wants_demo_data(config)


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The steps that would run, each of which succeeds."""
    seen: list[list[str]] = []

    def run(step: Step) -> int:
        seen.append(list(step._command[1:]))
        return 0

    monkeypatch.setattr(start_training.Step, "run", run)
    return seen


def recipe(folder: Path) -> str:
    path = folder / "mine.yaml"
    path.write_text(f"run: {{output_dir: {folder}/runs}}\ndata: {{roots: [{folder}]}}\n")
    return str(path)


def test_steps_follow_each_other_with_the_callers_words(tmp_path: Path, commands: list[list[str]]) -> None:
    config = recipe(tmp_path)
    words = ["--config", config, "--resume", "latest", "training.num_epochs=2"]
    assert main(words) == 0
    run = f"{tmp_path}/runs/mine"
    assert commands == [
        ["train_direct.py", "--config", config, "--resume", "latest", "training.num_epochs=2"],
        ["validation_loop.py", "--run", run],
        ["-m", "scripts.report_run", run],
    ]


def test_a_named_run_is_reported_and_validate_only_stops_early(tmp_path: Path, commands: list[list[str]]) -> None:
    config = recipe(tmp_path)
    assert main(["--config", config, "run.name=other"]) == 0
    assert commands[-1][-1] == f"{tmp_path}/runs/other"
    commands.clear()
    assert main(["run.name=other", "--validate-only", "--config", config]) == 0
    assert commands == [["train_direct.py", "--config", config, "--validate-only", "run.name=other"]]


def test_the_first_failing_step_is_the_last(
    tmp_path: Path, commands: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start_training.Step, "run", lambda step: commands.append(list(step._command)) or 130)
    assert main(["--config", recipe(tmp_path)]) == 130
    assert len(commands) == 1


def test_bad_settings_are_one_line_before_any_step(
    tmp_path: Path, commands: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", recipe(tmp_path), "training.num_epoch=2"]) == 2
    assert main(["--config", str(tmp_path / "absent.yaml")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert "training.num_epochs" in errors[0]
    assert commands == []
