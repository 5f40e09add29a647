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


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder to submit from, with an `srun` that writes down its words and works until runs/mine/STOP is there."""
    (tmp_path / "bin").mkdir()
    for name, text in {
        "scontrol": "printf 'node3\\nnode4\\n'",
        "srun": 'echo "$@" > words; mkdir -p runs/mine; touch began\n'
        "while [ ! -e runs/mine/STOP ]; do sleep 0.05; done; exit 6",
    }.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
        path.chmod(0o755)
    return tmp_path


def submitted(place: Path, *words: str) -> subprocess.Popen[str]:
    environment = {
        "PATH": f"{place / 'bin'}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(place),
        "SLURM_JOB_NODELIST": "node[3-4]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_JOB_ID": "41007",
    }
    return subprocess.Popen(["bash", str(SCRIPT), *words], env=environment, stderr=subprocess.PIPE, text=True)


def test_the_end_of_its_time_stops_the_run_and_its_exit_code_comes_through(place: Path) -> None:
    with submitted(place, "configs/mine.yaml", "training.num_epochs=3") as job:
        while not (place / "began").exists():
            assert job.poll() is None
            time.sleep(0.01)
        job.send_signal(signal.SIGTERM)
        assert job.wait(timeout=60) == 6
    words = (place / "words").read_text(encoding="utf-8").split()
    assert {"--nnodes=2", "--nproc-per-node=8", "--rdzv-endpoint=node3:21007"} <= set(words)
    assert words[words.index("train_direct.py") :] == [
        *("train_direct.py", "--config", "configs/mine.yaml", "--resume", "auto", "training.num_epochs=3"),
        *("run.output_dir=runs", "run.name=mine"),
    ]


def test_a_job_without_a_recipe_says_how_to_submit(place: Path) -> None:
    with submitted(place) as job:
        assert job.wait(timeout=60) == 2
        assert job.stderr is not None and "sbatch scripts/slurm_train.sh RECIPE" in job.stderr.read()
