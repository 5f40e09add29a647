"""The commands over the index: every unusable file is named, and the benchmark measures what it says."""

import os
import re
import shlex
from pathlib import Path

import orjson
import pytest

from scripts import benchmark_index, index


def _pair(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"not an image")
    path.with_suffix(".json").write_bytes(content)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    _pair(tmp_path / "set/good.png", b'{"tags": "sun sky", "rating": "g", "moods": ["calm"]}')
    _pair(tmp_path / "set/odd.png", b'{"tags": "sun", "rating": "unrated"}')
    for number in range(5):
        _pair(tmp_path / "set" / f"[_red]{number}.png", b"{}")
    _pair(tmp_path / "set/twice.png", b'{"tags": "a", "tags": "b"}')
    (tmp_path / "set/alone.png").touch()
    (tmp_path / "set/orphan.json").write_bytes(b'{"tags": "a"}')
    return tmp_path / "set"


def _run(root: Path, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert index.main([str(root), "--index-dir", str(root.parent / "index"), *words]) == 0
    return capsys.readouterr().out


def test_every_unusable_file_is_listed_with_its_reason(root, capsys):
    listed = root.parent / "rejected.txt"
    output = _run(root, capsys, "--extra-fields", "moods", "--headers", "--list-rejected", str(listed))
    lines = dict(line.split("\t") for line in listed.read_text().splitlines()[:9])
    assert {Path(path).name: reason for path, reason in lines.items()} == {
        **{f"[_red]{number}.json": "no 'tags' key" for number in range(5)},
        "twice.json": "a key given twice: 'tags'",
        "alone.png": "image without sidecar",
        "orphan.json": "sidecar without image",
        "odd.json": "rating not understood: unrated",
    }
    assert len(listed.read_text().splitlines()) == 11  # and two images that are none
    assert "2 images with 3 distinct tags" in output and "2 broken" in output and "ratings: general 1" in output
    assert re.search(r"no 'tags' key\s*│ 5\s", output) and "[_red]0.json" in output.replace("\n", "")
    problems = orjson.loads(next((root.parent / "index").glob("*/*/problems.json")).read_bytes())
    assert len(problems["rejected"]) == 6 and len(problems["images_without_sidecar"]) == 1


def test_a_second_call_says_what_changed(root, capsys):
    _run(root, capsys)
    (root / "odd.json").unlink()
    assert "index: +0 new, 0 changed, 1 vanished images; 7 kept" in _run(root, capsys)


@pytest.mark.skipif(os.name == "nt", reason="file names there have no line breaks")
def test_a_name_with_a_line_break_stays_one_line(tmp_path, capsys):
    _pair(tmp_path / "set/good.png", b'{"tags": "sun"}')
    (tmp_path / "set/two\nlines\t.png").touch()
    _run(tmp_path / "set", capsys, "--list-rejected", str(tmp_path / "list"))
    (line,) = (tmp_path / "list").read_text().splitlines()
    assert line.endswith("two\\x0alines\\x09.png\timage without sidecar")


def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys):
    assert index.main([str(tmp_path / "nowhere"), "--index-dir", str(tmp_path / "index")]) == 2
    assert re.fullmatch(r"error: data\.roots: .* does not exist\n", capsys.readouterr().err)


@pytest.mark.parametrize("command", [index, benchmark_index])
def test_the_example_of_the_help_can_be_parsed(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        command.main(["--help"])
    example = shlex.split(re.search(r"example: (.*)", capsys.readouterr().out)[1])
    assert example[:3] == ["python", "-m", command.__name__]
    if command is index:
        assert command.main(example[3:]) == 2 and "data/demo does not exist" in capsys.readouterr().err


def test_the_benchmark_measures_all_it_promises(tmp_path, capsys):
    output = tmp_path / "figures.json"
    words = ["--files", "2000", "--rows", "30000", "--turns", "1", "--folder", str(tmp_path), "--output", str(output)]
    assert benchmark_index.main(words) == 0
    figures = orjson.loads(output.read_bytes())
    assert 0 < figures["ratio"] < 2 and figures["ratio"] < figures["ratio_without_scan"]
    assert 100 < figures["column_bytes_a_row"] <= 120 and figures["reopen"]["num_rows"] == 30_000
    assert "build / bare loop" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]


def test_a_benchmark_that_shows_nothing_is_refused(capsys):
    with pytest.raises(SystemExit):
        benchmark_index.main(["--files", "10"])
    assert "argument --files: 10 is not a whole number in 2000" in capsys.readouterr().err
