"""Who may write into a run's folder, and what it says about itself."""

import json
import logging
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tagger import run_folder
from tagger.endings import KILLED_REASON, Status
from tagger.errors import InputError
from tagger.files import FormatError
from tagger.logs import ConsoleLogHandler, RunLogHandler, log_to_console
from tagger.run_folder import (
    BestResult,
    RunFolder,
    RunFolderError,
    RunResults,
    code_commit,
    describe_run,
    probe_checkpoints,
    read_results,
    require_checkpoints,
    resume_origin,
)

ROOT = Path(__file__).resolve().parents[2]
HOLD = (
    "import sys; from pathlib import Path; from tagger.run_folder import RunFolder\n"
    "RunFolder.open(Path(sys.argv[1]), resume=True); print('held', flush=True); sys.stdin.read()"
)


def test_a_new_run_makes_its_folder_and_log(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path / "runs" / "demo", resume=False) as folder:
        assert folder.is_new and folder.name == "demo"
        logging.getLogger("tagger.example").info("reading %d images", 3)
    assert "INFO    tagger.example: reading 3 images" in folder.log_path.read_text(encoding="utf-8")
    assert {path.name for path in folder.path.iterdir()} == {"train.log"}


def test_tracebacks_go_to_the_log(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path / "demo", resume=False) as folder:
        try:
            raise RuntimeError("no luck")
        except RuntimeError:
            logging.getLogger("tagger").exception("the run failed")
    assert "Traceback" in folder.log_path.read_text(encoding="utf-8")
    assert "no luck" in folder.log_path.read_text(encoding="utf-8")


def test_an_existing_run_is_refused_with_its_state_and_both_ways_on(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path / "demo", resume=False) as folder:
        RunResults("completed", steps=900).write(folder.results_path)
        (folder.checkpoints_dir / "step-000000900").mkdir(parents=True)
    (tmp_path / "demo-2").mkdir()
    before = {path: path.stat().st_mtime_ns for path in folder.path.rglob("*")}
    with pytest.raises(RunFolderError) as caught:
        RunFolder.open(tmp_path / "demo", resume=False)
    assert str(caught.value) == (
        f"{tmp_path / 'demo'} already exists (completed, step 900); continue it with --resume latest, "
        "or start another run with run.name=demo-3"
    )
    assert isinstance(caught.value, InputError)
    assert {path: path.stat().st_mtime_ns for path in folder.path.rglob("*")} == before


def test_resume_opens_an_existing_run_and_makes_a_missing_one(tmp_path: Path) -> None:
    for is_new in (True, False):
        with RunFolder.open(tmp_path / "demo", resume=True) as folder:
            assert folder.is_new is is_new


def test_a_run_that_could_not_start_leaves_its_name_free(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path / "demo", resume=False) as folder:
        folder.discard_if_new()
    assert not (tmp_path / "demo").exists()
    RunFolder.open(tmp_path / "demo", resume=False).close()
    with RunFolder.open(tmp_path / "demo", resume=True) as folder:
        folder.discard_if_new()
    assert (tmp_path / "demo").exists()


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "demo").write_text("x")
    with pytest.raises(RunFolderError, match="is a file"):
        RunFolder.open(tmp_path / "demo", resume=True)


def lives(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_a_live_lock_is_refused_and_a_killed_process_leaves_none(tmp_path: Path, caplog) -> None:
    path = tmp_path / "demo"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stdout.readline().strip() == b"held"
        with pytest.raises(RunFolderError, match=f"in use by process {process.pid}"):
            RunFolder.open(path, resume=True)
        process.kill()  # not waited for yet: a process that is dead but not collected holds no lock either
        deadline = time.monotonic() + 5
        while lives(process.pid) and time.monotonic() < deadline:
            time.sleep(0.01)
        with caplog.at_level(logging.INFO), RunFolder.open(path, resume=True) as folder:
            assert not folder.is_new
    assert "took over run.lock" in caplog.text
    assert not (path / "run.lock").exists() and not (path / "run.lock.taking").exists()


def test_one_process_cannot_hold_a_folder_twice(tmp_path: Path) -> None:
    with (
        RunFolder.open(tmp_path / "demo", resume=False),
        pytest.raises(RunFolderError, match=f"in use by process {os.getpid()}"),
    ):
        RunFolder.open(tmp_path / "demo", resume=True)
    RunFolder.open(tmp_path / "demo", resume=True).close()


def change_lock(path: Path, **values: object) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, **values}), encoding="utf-8")


def held_lock(path: Path, **values: object) -> Path:
    folder = RunFolder.open(path, resume=True)
    content = (path / "run.lock").read_bytes()
    folder.close()
    (path / "run.lock").write_bytes(content)
    change_lock(path / "run.lock", **values)
    return path / "run.lock"


def test_a_number_that_another_process_got_since_holds_no_lock(tmp_path: Path) -> None:
    held_lock(tmp_path / "demo", created=1.0, created_after_boot=-1000.0)
    RunFolder.open(tmp_path / "demo", resume=True).close()


@pytest.mark.parametrize("moved", [{"created": 1.0}, {"created_after_boot": -1000.0}])
def test_a_clock_that_was_set_does_not_free_a_live_lock(tmp_path: Path, moved: dict[str, float]) -> None:
    held_lock(tmp_path / "demo", **moved)
    with pytest.raises(RunFolderError, match="in use"):
        RunFolder.open(tmp_path / "demo", resume=True)


def test_a_lock_of_another_host_is_believed(tmp_path: Path) -> None:
    held_lock(tmp_path / "demo", host=f"not-{socket.gethostname()}")
    with pytest.raises(RunFolderError, match=r"delete .*run\.lock"):
        RunFolder.open(tmp_path / "demo", resume=True)


def test_a_lock_that_is_being_written_is_respected_and_an_old_torn_one_is_not(tmp_path: Path) -> None:
    lock = held_lock(tmp_path / "demo")
    lock.write_bytes(b"")
    with pytest.raises(RunFolderError, match="being written"):
        RunFolder.open(tmp_path / "demo", resume=True)
    os.utime(lock, (time.time() - 60, time.time() - 60))
    RunFolder.open(tmp_path / "demo", resume=True).close()


def test_a_lock_taken_over_by_hand_is_not_released(tmp_path: Path) -> None:
    folder = RunFolder.open(tmp_path / "demo", resume=False)
    change_lock(folder.path / "run.lock", token="another")
    folder.close()
    assert (folder.path / "run.lock").exists()


@pytest.mark.slow
def test_of_many_that_find_a_dead_lock_one_takes_it(tmp_path: Path) -> None:
    held_lock(tmp_path / "demo", created=1.0, created_after_boot=-1000.0)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path / "demo")],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        for _ in range(6)
    ]
    holders = [process for process in processes if process.stdout and process.stdout.readline().strip() == b"held"]
    for process in processes:
        process.communicate()
    assert len(holders) == 1


def test_results_read_back_equal(tmp_path: Path) -> None:
    results = RunResults(
        "completed",
        best=BestResult("val/mAP", 0.97, 800),
        final={"val/mAP": 0.96, "val/loss": 1.5},
        seconds=12.5,
        images_per_second=640.0,
        steps=900,
        commit="0" * 40,
        vocabulary_sha256="1" * 64,
    )
    results.write(tmp_path / "results.json")
    assert RunResults.read(tmp_path / "results.json") == results
    content = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert content["format_version"] == 1 and content["best"] == {"metric": "val/mAP", "value": 0.97, "step": 800}
    assert content["error"] is None


def test_what_is_not_finite_becomes_null_in_results(tmp_path: Path) -> None:
    RunResults("diverged", final={"val/loss": math.nan}, error="the loss is nan").write(tmp_path / "results.json")
    assert RunResults.read(tmp_path / "results.json").final == {"val/loss": None}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"format_version": 2}', "format_version 2"),
        ('{"format_version": 1, "status": "asleep"}', "cannot be read"),
        ('{"format_version": 1, "sta', "not valid JSON"),
        ('{"format_version": 1, "status": "completed"}', "cannot be read"),
    ],
)
def test_results_that_cannot_be_read_say_so_in_one_line(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "results.json").write_text(content, encoding="utf-8")
    with pytest.raises(FormatError, match=words) as caught:
        RunResults.read(tmp_path / "results.json")
    assert "\n" not in str(caught.value)


RUN = (
    "import sys, time; from pathlib import Path; from tagger.run_folder import RunFolder, RunResults\n"
    "from tagger.stop import StopRequest\n"
    "with StopRequest(), RunFolder.open(Path(sys.argv[1]), resume=False) as folder:\n"
    "    RunResults('running', steps=40).write(folder.results_path); print('at work', flush=True)\n"
    "    while True: time.sleep(0.01)"
)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals to send to another process")
@pytest.mark.parametrize("signals", [[signal.SIGKILL], [signal.SIGTERM] * 2, [signal.SIGINT] * 2], ids=str)
def test_a_process_that_was_killed_is_not_said_to_run(tmp_path: Path, signals: list[signal.Signals]) -> None:
    path = tmp_path / "demo"
    log = path / "train.log"
    with subprocess.Popen([sys.executable, "-c", RUN, str(path)], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline().strip() == b"at work"
        assert read_results(path) == RunResults("running", steps=40)
        for number in signals:
            assert process.poll() is None
            process.send_signal(number)
            deadline = time.monotonic() + 10
            while number != signal.SIGKILL and "once more to end at once" not in log.read_text(encoding="utf-8"):
                assert time.monotonic() < deadline
                time.sleep(0.01)
        assert process.wait(10) == -signals[-1]
    assert RunResults.read(path / "results.json").status == "running"  # nobody was left to write it
    assert read_results(path) == RunResults("killed", steps=40, error=KILLED_REASON)
    assert describe_run(path) == "killed, step 40"


def test_a_run_of_another_host_is_believed_to_run(tmp_path: Path) -> None:
    held_lock(tmp_path / "demo", host=f"not-{socket.gethostname()}")
    RunResults("running", steps=40).write(tmp_path / "demo" / "results.json")
    assert describe_run(tmp_path / "demo") == "running, step 40"
    assert describe_run(tmp_path) == "no results yet"


@pytest.mark.parametrize("status", ["completed", "stopped", "failed", "diverged"])
def test_how_a_run_ended_is_not_changed_by_reading(tmp_path: Path, status: Status) -> None:
    RunResults(status, steps=40).write(tmp_path / "results.json")
    assert read_results(tmp_path) == RunResults(status, steps=40)


def test_nothing_to_resume_names_the_runs_that_there_are(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "iconz"
    with pytest.raises(RunFolderError, match=r"no run .*iconz to resume; .*runs has no run with checkpoints; .*auto$"):
        require_checkpoints(run)
    for name in ("demo", "a", "b", "c", "d", "icons", "icons-2"):
        (tmp_path / "runs" / name / "checkpoints" / "step-000000001").mkdir(parents=True)
    (tmp_path / "runs" / "iconzz" / "checkpoints").mkdir(parents=True)  # nothing to resume in there
    (tmp_path / "runs" / "notes.txt").write_text("x")
    with pytest.raises(RunFolderError) as caught:
        require_checkpoints(run)
    assert str(caught.value) == (
        f"there is no run {run} to resume; did you mean run.name=icons? {run.parent} has icons, icons-2, a, b, c and 2 "
        "more; to start a new run of this name: --resume auto"
    )
    require_checkpoints(tmp_path / "runs" / "icons")
    with pytest.raises(RunFolderError, match=r"no checkpoint to resume \(no results yet\); start it over with .*auto"):
        require_checkpoints(tmp_path / "runs" / "iconzz")
    with pytest.raises(RunFolderError, match=r"already exists .*; start it over with --resume auto, or start another"):
        RunFolder.open(tmp_path / "runs" / "iconzz", resume=False)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_gits_and_none_outside_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    source = tmp_path / "tagger" / "run_folder.py"
    source.parent.mkdir()
    source.write_text("")
    monkeypatch.setattr(run_folder, "__file__", str(source))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert code_commit.__wrapped__() is None
    for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "x"]):
        subprocess.run(git + arguments, check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert code_commit.__wrapped__() == head
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    assert code_commit.__wrapped__() == head
    monkeypatch.setenv("PATH", "")
    assert code_commit.__wrapped__() is None


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_log_disk_drops_and_counts(capsys: pytest.CaptureFixture[str]) -> None:
    handler = RunLogHandler(Path("/dev/full"))
    for number in range(3):
        handler.handle(logging.LogRecord("tagger", logging.INFO, "", 0, "line %d", (number,), None))
    assert handler.dropped == 3
    handler.close()
    shown = capsys.readouterr().err
    assert shown.count("does not take more lines") == 1 and "lacks up to 3 lines" in shown
    assert "Traceback" not in shown


def test_the_console_shows_one_line_an_event(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    try:
        log_to_console()
        log_to_console()
        logger = logging.getLogger("tagger.example")
        logger.info("reading")
        try:
            raise ValueError("hidden in the log file")
        except ValueError:
            logger.warning("careful", exc_info=True)
    finally:
        root.handlers, root.level = handlers, level
    assert capsys.readouterr().err == "reading\nWARNING: careful\n"


def test_a_console_that_is_closed_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    ConsoleLogHandler().handle(logging.LogRecord("tagger", logging.INFO, "", 0, "line", None, None))


def test_a_run_is_laid_out_as_documented(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path / "demo", resume=False) as folder:
        paths = [
            folder.config_path,
            folder.log_path,
            folder.metrics_path,
            folder.tensorboard_dir,
            folder.checkpoints_dir,
            folder.vocabulary_path,
            folder.results_path,
            folder.model_dir,
            run_folder.lock_path(folder.path),
        ]
    assert [path.name for path in paths] == [
        "config.yaml",
        "train.log",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "vocabulary.json",
        "results.json",
        "model",
        "run.lock",
    ]


@pytest.mark.parametrize(
    ("results", "measured", "folder", "refused"),
    [
        (RunResults("completed", steps=96), False, False, True),
        (RunResults("completed", steps=96), False, True, True),  # an empty mount point
        (RunResults("running", best=BestResult("val/mAP", 0.5, 64), steps=96), False, True, True),
        (None, True, False, True),
        (RunResults("running", steps=3), True, True, False),  # killed during its first save
        (RunResults("failed", steps=3), True, True, False),
        (RunResults("running"), False, False, False),
        (None, False, False, False),
    ],
)
def test_checkpoints_that_are_gone_are_no_fresh_start(
    tmp_path: Path, results: RunResults | None, measured: bool, folder: bool, refused: bool
) -> None:
    run = tmp_path / "icons"
    run.mkdir()
    if results is not None:
        results.write(run / "results.json")
    if measured:
        (run / "metrics.jsonl").write_text("{}\n", encoding="utf-8")
    if folder:
        (run / "checkpoints").mkdir()
    if not refused:
        assert resume_origin(run, "auto") == run
        return
    with pytest.raises(RunFolderError, match=r"would erase .*; bring .*back, or .* run\.name=icons-2, or remove"):
        resume_origin(run, "auto")
    with pytest.raises(RunFolderError, match=r"no checkpoint to resume .*; bring .*checkpoints back$"):
        resume_origin(run, "latest")


def test_checkpoints_that_cannot_be_written_are_found_at_the_start(tmp_path: Path) -> None:
    probe_checkpoints(tmp_path)
    assert list((tmp_path / "checkpoints").iterdir()) == []
    (tmp_path / "checkpoints").rmdir()
    (tmp_path / "checkpoints").write_text("not a folder", encoding="utf-8")
    with pytest.raises(RunFolderError, match=r"cannot be written into .*checkpoints: .*run\.output_dir="):
        probe_checkpoints(tmp_path)


def test_a_mistyped_word_and_the_name_of_a_run_are_told(tmp_path: Path) -> None:
    (tmp_path / "a6" / "checkpoints" / "step-000000001").mkdir(parents=True)
    for which, meant in (("besst", "best"), ("a6", "run.name=a6"), (str(tmp_path / "a6"), "run.name=a6")):
        with pytest.raises(InputError, match=rf"did you mean {meant}"):
            resume_origin(tmp_path / "a5", which)
