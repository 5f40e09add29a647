"""The trainer never waits for Weights & Biases: a client that hangs, fails or dies, and the real one offline."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from scripts import benchmark_logging
from tagger import wandb_sink
from tagger.errors import SinkError
from tagger.metrics.levels import Levels
from tagger.wandb_sink import MAX_ENTRIES, WandbSink

ROOT = Path(__file__).resolve().parents[2]

# A client that does as the file `do` beside it says, and writes down what it was given.
CLIENT = """
import json, os, pathlib, time
here = pathlib.Path(__file__).parent
do = (here / "do").read_text()
secret = os.environ.get("TAGSMITH_ALERT_URL")
def note(value):
    with (here / "notes").open("a") as file:
        file.write(json.dumps(value) + "\\n")
class Settings(dict):
    pass
class Image:
    def __init__(self, picture): self.size = picture.size
class Histogram:
    def __init__(self, np_histogram): self.counts = np_histogram[0]
class plot:
    @staticmethod
    def line_series(**words): return words
class Run:
    def define_metric(self, *_, **__): pass
    def log(self, values):
        print("chatter")
        if do == "fail":
            raise OSError("log\\nfailed")
        shown = {k: v.size if isinstance(v, Image) else sum(v.counts) if isinstance(v, Histogram) else v
                 for k, v in values.items()}
        note(shown)
    def finish(self):
        if do == "slow finish":
            time.sleep(1000)
        note("finished")
def init(**words):
    note({"pid": os.getpid(), "id": words["id"], "secret": secret})
    if do == "hang":
        time.sleep(1000)
    if do == "refuse":
        raise ValueError("no key\\nconfigured")
    if do == "die":
        os._exit(7)
    return Run()
"""


# Of 4 images with 2 positives; at the highest level nothing is taken.
CURVES = {"all": Levels(np.array([2, 1, 0]), np.array([4, 1, 0]), 4, 2)}


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "client"
    folder.mkdir()
    (folder / "wandb.py").write_text(CLIENT)
    (folder / "do").write_text("work")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    return folder


def notes(client: Path) -> list[object]:
    path = client / "notes"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def started(client: Path) -> int:
    """The number of the client's process, once it has begun."""
    deadline = time.monotonic() + 60
    while not notes(client):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    first = notes(client)[0]
    assert isinstance(first, dict)
    return int(first["pid"])


def opened(folder: Path, close_s: float = 60.0, resume_step: int | None = None) -> WandbSink:
    words = {"project": "tests", "run_name": "a", "settings": {"training.seed": 1}}
    return WandbSink(folder, mode="offline", resume_step=resume_step, close_s=close_s, **words)  # type: ignore[arg-type]


def failure_of(sink: WandbSink) -> str:
    """What the sink says once the news of its process have arrived."""
    for step in range(6000):
        try:
            sink.write_scalars({"train/loss": 0.5}, step, 0, 0.0)
        except SinkError as error:
            return str(error)
        time.sleep(0.01)
    raise AssertionError("no failure was told")


def test_everything_arrives_in_order(client: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAGSMITH_ALERT_URL", "https://secret")
    sink = opened(tmp_path)
    sink.write_scalars({"train/loss": 0.5, "val/mAP": float("inf")}, 6, 1, 2.0)
    sink.write_picture("val/samples", Image.new("L", (8, 5)), 6, 3.0)
    sink.write_histogram("val/average_precision", np.array([0.1, 0.9, 0.9]), 6, 4.0)
    sink.write_curves("val/precision_recall", CURVES, 6, 5.0)
    sink.close()
    begun, *rest = notes(client)
    assert isinstance(begun, dict) and begun["secret"] is None
    assert begun["id"] == (tmp_path / "wandb-id").read_text()
    title = {"title": "val/precision_recall", "xname": "recall"}
    drawn = {"keys": ["all"], "xs": [[1.0, 0.5]], "ys": [[0.5, 1.0]], **title}
    assert rest == [
        {"train/loss": 0.5, "val/mAP": float("inf"), "step": 6, "epoch": 1, "time": 2.0},
        {"step": 6, "time": 3.0, "val/samples": [8, 5]},
        {"step": 6, "time": 4.0, "val/average_precision": 3},
        {"step": 6, "time": 5.0, "val/precision_recall": drawn},
        "finished",
    ]


def test_a_client_that_hangs_is_never_waited_for(client: Path, tmp_path: Path) -> None:
    """It never reads again, so a call that waited for it would not return."""
    (client / "do").write_text("hang")
    sink = opened(tmp_path, close_s=0.01)
    pid = started(client)
    taken = 0
    for step in range(10 * MAX_ENTRIES):
        try:
            sink.write_scalars({f"train/{name}": 0.5 for name in range(20)}, step, 0, 0.0)
            taken += 1
        except SinkError as error:
            assert "queue is full" in str(error)
    in_the_pipe = 1 << 17
    assert MAX_ENTRIES <= taken <= MAX_ENTRIES + in_the_pipe // 400
    with pytest.raises(SinkError, match="not everything was taken"):
        sink.close()
    assert not psutil.pid_exists(pid)


def test_the_queue_is_bounded_in_bytes_too(client: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (client / "do").write_text("hang")
    monkeypatch.setattr(wandb_sink, "MAX_BYTES", 10_000_000)
    sink = opened(tmp_path, close_s=0.01)
    picture = Image.new("RGB", (1000, 1000))
    for step in range(3):
        sink.write_picture("val/samples", picture, step, 0.0)
    with pytest.raises(SinkError, match="queue is full"):
        sink.write_picture("val/samples", picture, 3, 0.0)
    sink.write_scalars({"train/loss": 0.5}, 3, 0, 0.0)
    with pytest.raises(SinkError):
        sink.close()


def test_what_the_client_raises_comes_back_as_one_line(client: Path, tmp_path: Path) -> None:
    (client / "do").write_text("fail")
    sink = opened(tmp_path)
    assert failure_of(sink) == "OSError: log failed"
    with pytest.raises(SinkError, match="log failed"):
        for step in range(3):
            sink.write_scalars({"train/loss": 0.5}, step, 0, 0.0)
        sink.close()
    sink._process.kill()


@pytest.mark.parametrize(("do", "message"), [("refuse", "ValueError: no key configured"), ("die", "ended with code 7")])
def test_a_client_that_cannot_begin_takes_nothing_and_says_why(
    client: Path, tmp_path: Path, do: str, message: str
) -> None:
    (client / "do").write_text(do)
    sink = opened(tmp_path)
    for _ in range(2):
        assert message in failure_of(sink)
    sink.close()


def test_a_close_that_takes_too_long_is_cut_short(client: Path, tmp_path: Path) -> None:
    (client / "do").write_text("slow finish")
    sink = opened(tmp_path, close_s=0.01)
    sink.write_scalars({"train/loss": 0.5}, 1, 0, 0.0)
    with pytest.raises(SinkError, match=r"metrics\.jsonl has it"):
        sink.close()
    assert sink._process.poll() is not None


@pytest.mark.parametrize("do", ["work", "hang"])
def test_it_ends_with_a_trainer_that_is_killed(client: Path, tmp_path: Path, do: str) -> None:
    (client / "do").write_text(do)
    code = (
        f"import sys, time; sys.path[:0] = [{str(client)!r}, {str(ROOT)!r}]; from pathlib import Path\n"
        "from tagger.wandb_sink import WandbSink\n"
        f"s = WandbSink(Path({str(tmp_path)!r}), project='p', run_name='a', mode='offline', settings={{}})\n"
        "time.sleep(1000)"
    )
    trainer = subprocess.Popen([sys.executable, "-c", code])
    child = psutil.Process(started(client))
    if os.name != "nt":
        child.send_signal(signal.SIGINT)
        child.send_signal(signal.SIGTERM)
        assert child.is_running()
    trainer.kill()
    trainer.wait()
    child.wait(timeout=60)


def test_without_the_package_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SinkError, match="pip install wandb"):
        opened(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_real_client_works_offline_and_a_resumed_run_keeps_its_identity(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("wandb")
    identities = []
    with caplog.at_level(logging.WARNING):
        for resume_step in (None, 5):
            sink = opened(tmp_path, resume_step=resume_step)
            sink.write_scalars({"train/loss": 0.5}, 6, 0, 0.0)
            sink.write_picture("val/samples", Image.new("RGB", (8, 8)), 6, 0.0)
            sink.write_histogram("val/average_precision", np.array([0.1, 0.9]), 6, 0.0)
            sink.write_curves("val/precision_recall", CURVES, 6, 0.0)
            sink.close()
            identities.append((tmp_path / "wandb-id").read_text())
    assert identities[0] == identities[1] and not caplog.records
    (written, *_) = (tmp_path / "wandb").glob(f"offline-run-*-{identities[0]}/run-{identities[0]}.wandb")
    content = written.read_bytes()
    assert b"train/loss" in content and b"val/average_precision" in content
    (table,) = written.parent.rglob("files/media/table/val/precision_recall*.json")
    assert json.loads(table.read_text())["data"] == [[1.0, "all", 0.5], [0.5, "all", 1.0]]
    assert list(written.parent.rglob("files/media/images/val/samples*.png"))


def test_the_benchmark_measures_a_client_that_is_stuck() -> None:
    step_s, report_s, refused = benchmark_logging.measure(MAX_ENTRIES + 500, 100)
    assert step_s > 0 and report_s > 0
    assert 0 < refused <= 500 + 1
