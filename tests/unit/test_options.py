"""Options of commands: what is wrong is told in one line, with exit code 2, before the work."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from scripts import (
    benchmark_checkpoint,
    benchmark_index,
    build_cache,
    crash_test,
    index,
    inspect_dataset,
    make_demo_dataset,
    predict,
    report_run,
    verify_resume,
)
from tagger.options import Parser, input_file, input_folder, number, output_file, output_folder, whole

ROOT = Path(__file__).resolve().parent.parent.parent


def refusal(capsys: pytest.CaptureFixture[str], kind: object, text: str) -> str:
    parser = Parser(prog="command")
    parser.add_argument("--it", type=kind)  # type: ignore[arg-type]
    with pytest.raises(SystemExit) as ended:
        parser.parse_args([f"--it={text}"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: argument --it: ") and said.count("\n") == 1
    return said


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "0", "-1", "1e400", "2e12", "", "one", "9" * 5000])
def test_numbers_out_of_range_are_refused(capsys: pytest.CaptureFixture[str], text: str) -> None:
    assert "is not a number above 0 up to 1e+12" in refusal(capsys, number(), text)
    assert "is not a whole number in 1..50" in refusal(capsys, whole(1, 50), text)


def test_numbers_in_range_are_taken() -> None:
    assert number()("0.5") == 0.5 and number(least=0, most=1)("0") == 0
    assert [whole()("1"), whole(0, 8)("0"), whole(0, 8)("8")] == [1, 0, 8]


def test_places_of_the_wrong_kind_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "a file"
    file.touch()
    assert "is a folder; name a file" in refusal(capsys, output_file, str(tmp_path))
    assert "a file is not a folder" in refusal(capsys, output_file, str(file / "below" / "x.json"))
    assert "a file is not a folder" in refusal(capsys, output_folder, str(file))
    assert "is not a file" in refusal(capsys, input_file, str(tmp_path))
    assert "is not a folder" in refusal(capsys, input_folder, str(file))
    assert "does not exist" in refusal(capsys, input_file, str(tmp_path / "absent"))
    for kind in (output_file, output_folder, input_file):
        assert "cannot use" in refusal(capsys, kind, str(tmp_path / ("x" * 5000)))


def test_a_place_that_can_be_written_is_left_as_it_was(tmp_path: Path) -> None:
    place = tmp_path / "ü b" / "deeper" / "out.json"
    assert output_file(str(place)) == place and output_folder(str(place.parent)) == place.parent
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has other permissions")
def test_what_another_user_may_not_touch_is_refused() -> None:
    code = (
        "import os, sys; from tagger.options import *; parser = Parser()\n"
        "os.geteuid() or (os.setgid(65534), os.setuid(65534))\n"
        "parser.add_argument('--in', type=input_file); parser.add_argument('--out', type=output_file)\n"
        "parser.parse_args(sys.argv[1:])"
    )
    with tempfile.TemporaryDirectory() as name:
        secret = Path(name) / "secret"
        secret.write_text("{}")
        secret.chmod(0)
        Path(name).chmod(0o555)
        for words, said in (
            ([f"--in={secret}"], "secret may not be read by this user"),
            ([f"--out={secret}"], "cannot write"),
            ([f"--out={name}/new/x.json"], "Permission denied; name another place"),
        ):
            done = subprocess.run(
                [sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, check=False
            )
            assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
            assert said in done.stderr
        Path(name).chmod(0o755)


COMMANDS = {
    "index": (index.main, "{good}"),
    "inspect": (inspect_dataset.main, "{good}"),
    "build": (build_cache.main, "configs/demo.yaml --folder {tmp}/cache"),
    "demo": (make_demo_dataset.main, ""),
    "predict": (predict.main, "{good} {good}"),
    "report": (report_run.main, "{good}"),
    "resume": (verify_resume.main, "--config configs/demo.yaml"),
    "checkpoint": (benchmark_checkpoint.main, ""),
    "rows": (benchmark_index.main, ""),
    "crash": (crash_test.main, ""),
}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("index", "--list-rejected {good}"),
        ("index", "--annotations {good}"),
        ("inspect", "--max-megapixels nan"),
        ("inspect", "--max-megapixels inf"),
        ("inspect", "--bits 9"),
        ("inspect", "--output {file}/page.html"),
        ("build", "--shard-mb nan"),
        ("build", "--shard-mb=-1"),
        ("build", "--shard-images 0"),
        ("build", "--quality 101"),
        ("build", "--size 0"),
        ("build", "--workers=-1"),
        ("build", "--folder {file}"),
        ("demo", "--count 0"),
        ("demo", "--output {file}"),
        ("predict", "--threshold nan"),
        ("predict", "--threshold 35"),
        ("predict", "--top 0"),
        ("predict", "--batch-size 0"),
        ("predict", "--sheet {file}/sheet.png"),
        ("report", "--predict=-1"),
        ("resume", "--steps 1"),
        ("checkpoint", "--megabytes 0"),
        ("checkpoint", "--folder {tmp}/absent"),
        ("rows", "--turns 0"),
        ("crash", "--kills=-1"),
        ("crash", "--output {good}"),
    ],
)
def test_every_command_refuses_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, words: str
) -> None:
    main, needed = COMMANDS[name]
    places = {"tmp": tmp_path, "good": tmp_path / "good", "file": tmp_path / "a.txt"}
    places["good"].mkdir()
    places["file"].touch()
    with pytest.raises(SystemExit) as ended:
        main(f"{needed} {words}".format(**places).split())
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: argument --") and said.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "good"]


def test_a_cache_that_would_be_refused_is_refused_before_the_images_are_looked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "letter.txt").touch()
    words = ["configs/demo.yaml", f"data.roots=[{tmp_path}/absent]", "--folder"]
    assert build_cache.main([*words, str(tmp_path / "papers")]) == 2
    assert "holds letter.txt" in capsys.readouterr().err
    assert build_cache.main([*words, str(tmp_path / "absent" / "cache")]) == 2
    assert "inside data.roots" in capsys.readouterr().err


def test_an_index_that_cannot_be_kept_is_refused_before_the_files_are_looked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").touch()
    assert index.main([str(tmp_path / "absent"), "--index-dir", str(tmp_path / "a.txt")]) == 2
    assert "data.index_dir: cannot write" in capsys.readouterr().err
