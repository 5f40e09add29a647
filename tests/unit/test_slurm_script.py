"""The Slurm job starts one torchrun a machine with its own words, and makes the end of its time a STOP file."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "slurm_train.sh"
pytestmark = pytest.mark.skipif(os.name == "nt", reason="Slurm runs on POSIX systems")


WORKS_UNTIL_STOPPED = "mkdir -p runs/mine; touch began\nwhile [ ! -e runs/mine/STOP ]; do sleep 0.05; done"


def write_srun(place: Path, text: str) -> None:
    path = place / "bin" / "srun"
    path.write_text(f'#!/bin/sh\necho "$@" > words\n{text}\n', encoding="utf-8")
    path.chmod(0o755)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder to submit from, with an `srun` that writes down its words and works until runs/mine/STOP is there."""
    (tmp_path / "bin").mkdir()
    path = tmp_path / "bin" / "scontrol"
    path.write_text("#!/bin/sh\nprintf 'node3\\nnode4\\n'\n", encoding="utf-8")
    path.chmod(0o755)
    write_srun(tmp_path, f"{WORKS_UNTIL_STOPPED}; exit 6")
    return tmp_path


def submitted(place: Path, *words: str) -> subprocess.Popen[str]:
    environment = {
        "PATH": f"{place / 'bin'}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(place),
        "SLURM_JOB_NODELIST": "node[3-4]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_JOB_ID": "41007",
        "SLURM_CPUS_PER_TASK": "96",
    }
    return subprocess.Popen(["bash", str(SCRIPT), *words], env=environment, stderr=subprocess.PIPE, text=True)


def wait_until(file: Path, job: subprocess.Popen[str]) -> None:
    while not file.exists():
        assert job.poll() is None
        time.sleep(0.01)


def test_the_end_of_its_time_stops_the_run_and_its_exit_code_comes_through(place: Path) -> None:
    with submitted(place, "configs/mine.yaml", "training.num_epochs=3") as job:
        wait_until(place / "began", job)
        job.send_signal(signal.SIGTERM)
        assert job.wait(timeout=60) == 6
    words = (place / "words").read_text(encoding="utf-8").split()
    assert words[: words.index(".venv/bin/python")] == ["--kill-on-bad-exit=1", "--cpus-per-task=96"]
    assert {"--nnodes=2", "--nproc-per-node=8", "--rdzv-endpoint=node3:21007"} <= set(words)
    assert words[words.index("train_direct.py") :] == [
        *("train_direct.py", "--config", "configs/mine.yaml", "--resume", "auto", "training.num_epochs=3"),
        *("run.output_dir=runs", "run.name=mine"),
    ]


def test_a_signal_before_the_folder_is_there_goes_to_the_training(place: Path) -> None:
    write_srun(place, "trap 'exit 7' TERM; touch began; while :; do sleep 0.05; done")
    with submitted(place, "configs/mine.yaml") as job:
        wait_until(place / "began", job)
        job.send_signal(signal.SIGTERM)
        assert job.wait(timeout=60) == 7
    assert not (place / "runs").exists()


def test_a_second_signal_does_not_leave_the_training_alone(place: Path) -> None:
    write_srun(place, f"{WORKS_UNTIL_STOPPED}; touch saving; while [ ! -e saved ]; do sleep 0.05; done; exit 6")
    with submitted(place, "configs/mine.yaml") as job:
        wait_until(place / "began", job)
        job.send_signal(signal.SIGTERM)
        wait_until(place / "saving", job)
        job.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        (place / "saved").touch()
        assert job.wait(timeout=60) == 6


def test_a_job_without_a_recipe_says_how_to_submit(place: Path) -> None:
    with submitted(place) as job:
        assert job.wait(timeout=60) == 2
        assert job.stderr is not None and "sbatch scripts/slurm_train.sh RECIPE" in job.stderr.read()
