"""Kills, damage and full disks lose nothing; and the checks that say so do find what they look for."""

import subprocess
import sys
from pathlib import Path

import orjson
import pytest

from scripts.faults.full_disk import full_disks, reason_to_skip
from scripts.faults.kills import REQUIRED_POINTS, Tripwire
from scripts.faults.mutations import KINDS, mutations
from scripts.faults.toy_run import METRIC, audit, audit_next_start, set_step, toy_state
from tagger.checkpoint import writer
from training_utils import CheckpointManager

ROOT = Path(__file__).resolve().parents[2]


def save(folder: Path, *steps: int, keep_last: int = 2) -> list[str]:
    """Names of the checkpoints of a run that saved at these steps, each better than the one before."""
    state = toy_state(16)
    with CheckpointManager(folder, keep_last, METRIC) as manager:
        for step in steps:
            set_step(state, step)
            manager.save(state, {METRIC: step / 100}, wait=True)
    return sorted(path.name for path in folder.glob("step-*"))


def test_an_operation_trace_shows_the_durable_order(tmp_path: Path) -> None:
    """Files, then the manifest, then their folder, each synced; renamed; synced; recorded; synced; then deletions."""
    state = toy_state(16)
    tripwire = Tripwire(tmp_path)
    with CheckpointManager(tmp_path, 1, METRIC) as manager:
        set_step(state, 1)
        manager.save(state, {METRIC: 0.1}, wait=True)
        tripwire.install()
        try:
            set_step(state, 2)
            manager.save(state, {METRIC: 0.2}, wait=True)
        finally:
            tripwire.uninstall()
    done = [point.removeprefix("after ") for point in tripwire.order if point.startswith("after ")]
    parts = ("model", "optimizer", "rng", "ema")
    files = [*(f"{part}.safetensors" for part in parts), "state.json", "manifest.json"]
    expected = [f"{what} {name}" for name in files for what in ("fsync", "write")]  # fsync lies within the write
    expected += ["fsync temporary", "rename temporary", "fsync folder"]
    for record in ("best.json", "last.json"):
        expected += [f"fsync {record}", f"write {record}", f"replace {record}"]
    expected += ["fsync folder", "rename checkpoint"]
    assert done[: len(expected)] == expected
    rest = done[len(expected) :]
    assert rest[-1] == "rmdir removed" and {what.split()[0] for what in rest[:-1]} == {"unlink"}
    assert {point for point in REQUIRED_POINTS if not point.endswith("rmdir temporary")} <= tripwire.counts.keys()


def test_the_audit_finds_what_a_kill_must_not_leave(tmp_path: Path) -> None:
    assert save(tmp_path, 1, 2, 3) == ["step-000000002", "step-000000003"]
    assert audit(tmp_path, (3, 0.03), keep_every=None) == []
    assert "acknowledged was 4" in audit(tmp_path, (4, 0.03), keep_every=None)[0]
    assert "acknowledged was 0.5" in audit(tmp_path, (3, 0.5), keep_every=None)[0]
    assert audit(tmp_path, (3, 0.03), keep_every=1) == ["history lacks the steps [1]"]
    for name in (".tmp-step-000000004-a", ".last.json.x.tmp"):
        (tmp_path / name).mkdir()
    assert "2 stray temporaries" in audit(tmp_path, None)[0]
    assert audit_next_start(tmp_path) == [] and audit(tmp_path, None) == []
    model = tmp_path / "step-000000003" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1])
    assert audit(tmp_path, None)[0].startswith("unloadable: ")


def test_the_audit_finds_a_state_that_mixes_two_steps(tmp_path: Path) -> None:
    state = toy_state(16)
    with CheckpointManager(tmp_path, 2, METRIC) as manager:
        set_step(state, 5)
        next(iter(state.model.parameters())).data[3, 3] = 4.0
        manager.save(state, wait=True)
    assert audit(tmp_path, None) == ["step-000000005: model weight is not that of step 5"]


@pytest.mark.skipif(sys.platform != "linux", reason="children are forked on Linux alone; elsewhere each takes seconds")
@pytest.mark.slow
def test_a_writer_without_a_temporary_folder_is_caught() -> None:
    """The same kills, of a writer that writes under the final name, leave unloadable checkpoints that are found."""
    code = """
import sys, tempfile
from pathlib import Path
from scripts.faults.kills import kills_at_points
from tagger.checkpoint import writer
writer.TEMPORARY_PREFIX = ""
real = writer.secrets.token_hex
writer.secrets.token_hex = lambda n: "2"
with tempfile.TemporaryDirectory() as folder:
    outcome = kills_at_points(Path(folder), 1, only=["before fsync manifest.json", "amid write optimizer.safetensors"])
print(outcome.violations)
sys.exit(0 if any("unloadable" in each for each in outcome.violations) else 1)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_damage_is_refused_and_the_checkpoint_before_is_used(tmp_path: Path) -> None:
    """A sample of the 500 of `scripts.crash_test`: every file in every way at least twice."""
    outcome = mutations(tmp_path, 2 * 6 * len(KINDS))
    assert outcome.violations == []
    assert outcome.trials == 36 and outcome.facts["files"] == 6


def test_damage_that_goes_unnoticed_would_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tagger.checkpoint import format as checkpoint_format

    monkeypatch.setattr(checkpoint_format, "_verify_content", lambda *_: None)
    assert mutations(tmp_path, 36).violations


@pytest.mark.slow
def test_a_disk_that_runs_full_stops_nothing(tmp_path: Path) -> None:
    reason = reason_to_skip()
    if reason is not None:
        pytest.skip(f"no full disk can be made here: {reason}")
    outcome = full_disks(tmp_path / "disk", 5)
    assert outcome.violations == [] and outcome.trials == 5 and outcome.facts["failures told"] == 5


@pytest.mark.slow
def test_the_command_runs_all_parts_and_writes_its_figures(tmp_path: Path) -> None:
    words = ["--quick", "--points", "1", "--train", "1", "--output", str(tmp_path / "figures.json")]
    done = subprocess.run(
        [sys.executable, "-m", "scripts.crash_test", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    parts = orjson.loads((tmp_path / "figures.json").read_bytes())["parts"]
    assert len(parts) == 5
    assert all((part["trials"] > 0 and not part["violations"]) or part["skipped"] for part in parts)


def test_a_violation_makes_the_exit_code(tmp_path: Path) -> None:
    from rich.console import Console

    from scripts.crash_test import report
    from scripts.faults.toy_run import Outcome

    console = Console(quiet=True)
    assert report(console, [Outcome("a", 3)], tmp_path / "x.json") == 0
    assert report(console, [Outcome("a", 3), Outcome("b", 3, ["lost"])], None) == 1


def test_temporaries_of_records_are_known_by_their_names(tmp_path: Path) -> None:
    (tmp_path / ".best.json.abc.tmp").write_bytes(b"")
    (tmp_path / ".other.tmp").write_bytes(b"")
    assert writer.remove_temporaries(tmp_path) == 1
    assert [path.name for path in tmp_path.iterdir()] == [".other.tmp"]
