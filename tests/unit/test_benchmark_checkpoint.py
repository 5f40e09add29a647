"""The benchmark measures what it says on a small state; its figures are not judged here."""

from pathlib import Path

import orjson

from scripts.benchmark_checkpoint import PlainCopy, main, make_state, repeated


def test_it_writes_a_ratio_for_every_case(tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    main(["--megabytes", "7", "--rounds", "2", "--folder", str(tmp_path), "--output", str(output)])
    figures = orjson.loads(output.read_bytes())
    assert set(figures["ratios"]) == {
        "first save, memory not reserved",
        "first save, memory reserved",
        "writer idle",
        "writer writing",
        "writer stopped",
    }
    assert all(ratio > 0 for ratio in figures["ratios"].values())
    assert 6e6 < figures["num_bytes"] < 8e6
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]


def test_a_stopped_disk_does_not_stop_saving(tmp_path: Path) -> None:
    state = make_state(7)
    assert len(repeated(tmp_path, state, PlainCopy(state), 5, "stopped")) == 5
