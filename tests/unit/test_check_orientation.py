"""The orientation report: what swaps, what lacks an entry, what forbids, and what to add."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts.check_orientation import EXAMPLE, main
from vocabulary import TagVocabulary

REPOSITORY = Path(__file__).resolve().parents[2]
COUNTS = {
    "dog": 90,
    "left_paw": 40,
    "right_paw": 30,
    "left_ear": 20,
    "right_ear": 20,
    "facing_up": 12,
    "left_tail": 9,
    "text": 7,
    "odd_sock": 3,
}
MAP = {
    "explicit_mappings": {"left_paw": "right_paw", "left_horn": "right_horn"},
    "skip_flip_tags": ["text", "logo"],
    "complex_asymmetric_tags": ["odd_sock"],
}


@pytest.fixture
def vocabulary_path(tmp_path: Path) -> Path:
    path = tmp_path / "run" / "vocabulary.json"
    path.parent.mkdir()
    TagVocabulary.from_counts(COUNTS, {}).save(path)
    return path


@pytest.fixture
def map_path(tmp_path: Path) -> Path:
    path = tmp_path / "map.json"
    path.write_text(json.dumps(MAP), encoding="utf-8")
    return path


def report_of(capsys: pytest.CaptureFixture[str], *words: object) -> Any:
    assert main([*map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_lists_mapped_unmapped_and_blocking_tags_with_counts(
    vocabulary_path: Path, map_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = report_of(capsys, vocabulary_path, "--map", map_path)
    assert (found["mode"], found["num_tags"], found["map_tags_in_vocabulary"], found["map_tags"]) == (
        "conservative",
        9,
        4,
        7,
    )
    mapped = [(tag["tag"], tag["count"], tag["mirrored"], tag["source"]) for tag in found["mapped"]]
    assert mapped == [
        ("left_paw", 40, "right_paw", "explicit"),
        ("right_paw", 30, "left_paw", "explicit"),
        ("left_ear", 20, "right_ear", "pattern"),
        ("right_ear", 20, "left_ear", "pattern"),
        ("left_tail", 9, "right_tail", "pattern"),
    ]
    assert [tag["tag"] for tag in found["mapped"] if not tag["in_vocabulary"]] == ["left_tail"]
    sensitive = [tag["tag"] for tag in found["unmapped_sensitive"]]
    assert sensitive == ["left_ear", "right_ear", "facing_up", "left_tail", "odd_sock"]
    blocking = {tag["tag"]: (tag["count"], tag["reason"]) for tag in found["blocking"]}
    assert blocking == {
        "left_ear": (20, "directional without a known mirror"),
        "right_ear": (20, "directional without a known mirror"),
        "facing_up": (12, "directional without a known mirror"),
        "left_tail": (9, "directional without a known mirror"),
        "text": (7, "in skip_flip_tags"),
        "odd_sock": (3, "directional without a known mirror"),
    }


def test_suggests_an_entry_where_the_mirrored_tag_exists(
    vocabulary_path: Path, map_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = report_of(capsys, vocabulary_path, "--map", map_path)
    assert found["suggested_mappings"] == {"left_ear": "right_ear"}
    suggestions = {tag["tag"]: tag["suggestion"] for tag in found["blocking"]}
    assert suggestions["right_ear"] == 'add to explicit_mappings: "right_ear": "left_ear"'
    assert "add to symmetric_tags" in suggestions["facing_up"]
    assert "'right_tail' is too rare for the vocabulary" in suggestions["left_tail"]
    assert "move from complex_asymmetric_tags" in suggestions["odd_sock"]

    improved = {**MAP, "explicit_mappings": {**MAP["explicit_mappings"], **found["suggested_mappings"]}}  # type: ignore[dict-item]
    map_path.write_text(json.dumps(improved), encoding="utf-8")
    after = report_of(capsys, vocabulary_path, "--map", map_path)
    assert not {"left_ear", "right_ear"} & {tag["tag"] for tag in after["blocking"]}
    assert after["suggested_mappings"] == {}


@pytest.mark.parametrize(
    ("mode", "blocking"),
    [("balanced", {"facing_up", "left_tail", "text", "odd_sock"}), ("permissive", {"left_tail", "text"})],
)
def test_reports_the_mode_that_was_asked_for(
    vocabulary_path: Path, map_path: Path, capsys: pytest.CaptureFixture[str], mode: str, blocking: set[str]
) -> None:
    found = report_of(capsys, vocabulary_path, "--map", map_path, "--mode", mode)
    assert {tag["tag"] for tag in found["blocking"]} == blocking
    assert {tag["tag"] for tag in found["unmapped_sensitive"] if tag["blocks"]} == blocking - {"text"}


def test_a_run_brings_its_own_map_and_mode(
    vocabulary_path: Path, map_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAGGER_ORIENTATION__MODE", "conservative")  # this shell, not that run
    recipe = f"orientation:\n  mode: permissive\n  map_path: {json.dumps(str(map_path))}\n"
    (vocabulary_path.parent / "config.yaml").write_text(recipe, encoding="utf-8")
    found = report_of(capsys, vocabulary_path.parent)
    assert found["mode"] == "permissive"
    assert found["map"] == f"orientation map {map_path}"
    assert report_of(capsys, vocabulary_path.parent, "--mode", "balanced", "--map", "none")["map_tags"] == 0


def test_the_text_holds_what_the_json_holds(
    vocabulary_path: Path, map_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = report_of(capsys, vocabulary_path, "--map", map_path)
    assert main([str(vocabulary_path), "--map", str(map_path)]) == 0
    text = capsys.readouterr().out
    assert "mapped: 5 tags" in text
    assert "left_tail -> right_tail  (pattern, not in the vocabulary)" in text
    assert "blocking: 6 tags forbid the mirror, on at most 71 images" in text
    assert '"left_ear": "right_ear"' in text
    for entry in found["blocking"] + found["unmapped_sensitive"]:
        assert entry["suggestion"] in text


def test_errors_are_one_line_and_exit_with_2(
    tmp_path: Path, vocabulary_path: Path, map_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    map_path.write_text('{"explicit_mappings": {"a": "b", "b": "c"}}', encoding="utf-8")
    for words in (
        [vocabulary_path, "--map", map_path],
        [vocabulary_path, "--map", tmp_path / "absent.json"],
        [tmp_path / "absent.json", "--map", "none"],
        [tmp_path, "--map", "none"],
        [map_path, "--map", "none"],
    ):
        assert main([str(word) for word in words]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("error: ")
        assert captured.err.count("\n") == 1


def test_help_shows_the_example_and_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "scripts.check_orientation", "--help"]
    shown = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    assert EXAMPLE in shown
