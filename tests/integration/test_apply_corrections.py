"""From suspects to corrected training data and back: the command, its bad inputs, and what a run makes of a journal."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import validation_loop
from dataset_loader import create_dataloaders, open_dataset
from scripts import apply_corrections, index
from tagger import mending
from tagger.data.correction_log import CorrectionLog, locked_log
from tagger.ontology import ONTOLOGY_FILE, Ontology
from tests.tiny_dataset import assert_same, configure, epoch_of, loaders
from vocabulary import TagVocabulary, build_vocabulary

CIRCLE = "even/img002.webp"  # tagged circle; rated general


@pytest.fixture
def run(root: Path, tmp_path: Path) -> Path:
    """A run folder over the tiny set, as far as corrections need one."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(
        f"data:\n  roots: [{root}]\n  index_dir: {tmp_path / 'index'}\n  extra_fields: [categories]\n"
    )
    return run


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "corrections.jsonl"


Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(run: Path, journal: Path, capsys: pytest.CaptureFixture[str]) -> Call:
    """(exit code, stdout, stderr) of the command on lines of (image, tag, kind, further fields)."""

    def call(lines: list[tuple[str, str, str] | dict[str, object]], *words: str) -> tuple[int, str, str]:
        path = run / "suspects.jsonl"
        entries = [
            dict(zip(("image", "tag", "kind"), line, strict=True)) if isinstance(line, tuple) else line
            for line in lines
        ]
        path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        capsys.readouterr()
        files = [str(path)] if lines else []
        code = apply_corrections.main([*files, "--journal", str(journal), *words])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def tags_of(root: Path, journal: Path | None, image: str = CIRCLE) -> tuple[set[str], str | None]:
    opened = open_dataset(configure(root, data__corrections_file=journal and str(journal)).data)
    row = opened.find_row(0, image)
    assert row is not None
    record = opened.record(row)
    return set(record.tags), record.rating


def bytes_of(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_marked_lines_act_on_the_data_set_and_undo_brings_back_the_first(call: Call, root: Path, journal: Path) -> None:
    files = bytes_of(root)
    lines = [
        {"image": CIRCLE, "tag": "square", "kind": "missing", "accept": True},
        {"image": CIRCLE, "tag": "circle", "kind": "wrong", "accept": True},
        {"image": CIRCLE, "tag": "rating:sensitive", "kind": "missing", "accept": True},
        {"image": CIRCLE, "tag": "arrow", "kind": "missing", "strength": 9.0},
        {"image": CIRCLE, "tag": "text", "kind": "missing", "strength": 9.0, "accept": False},
    ]
    code, out, _ = call(lines, "--dry-run")
    assert code == 0 and out.count("would write: ") == 3 and not journal.exists()
    code, out, err = call(lines)
    assert code == 0 and "error" not in err and "3 corrections of 1 images written" in out
    assert "data.corrections_file=" in out
    assert tags_of(root, journal) == ({"square", "category:shape"}, "sensitive")
    assert tags_of(root, None) == ({"circle", "category:shape"}, "general") and bytes_of(root) == files
    code, out, _ = call(lines, "--accept-all-above", "5")
    assert code == 0 and "1 corrections of 1 images" in out and "3 needless" in out
    assert "'arrow'" in call([], "--list")[1].splitlines()[3]
    assert call([], "--undo", "2", "--dry-run")[0] == 0 and len(CorrectionLog(journal).undone) == 0
    assert call([], "--undo", "2")[0] == 0 and "circle" in tags_of(root, journal)[0]
    assert call([], "--undo", "all")[0] == 0
    assert tags_of(root, journal) == tags_of(root, None)
    code, out, _ = call([], "--list")
    assert out.count("(undone ") == 4 and "4 corrections" in out
    code, _, err = call([], "--undo", "2")
    assert code == 2 and "correction 2 is undone already" in err
    assert call([], "--undo", "9")[2].startswith("error: there is no correction 9")
    assert call([], "--undo", "x")[2].startswith("error: --undo x: give ids")


@pytest.mark.parametrize(
    ("line", "words", "message"),
    [
        (("even/none.png", "circle", "missing"), [], "line 1: even/none.png: no such image in the data set"),
        ((CIRCLE, "squar", "missing"), [], "no image has the tag 'squar', did you mean 'square'?; --new-tags adds it"),
        (
            (CIRCLE, "square", "present"),
            [],
            "line 1 is not a suspect: kind 'present' is not known; write missing or wrong",
        ),
        ((CIRCLE, " square", "missing"), [], "line 1 is not a suspect: tag ' square' has stray white space"),
        ({"image": CIRCLE, "kind": "wrong"}, [], "line 1 is not a suspect: 'tag' is missing"),
        ({"image": CIRCLE, "tag": "a", "kind": "wrong", "accept": "yes"}, [], '"accept" is "yes"; write true or false'),
        (
            {"image": CIRCLE, "tag": "arrow", "kind": "missing", "state": "0"},
            [],
            "its sidecar has changed since; evaluate",
        ),
        ({"format_version": 9}, [], "format_version 9, this program reads up to 1; update the program"),
    ],
)
def test_bad_lines_are_named_and_nothing_is_written(
    call: Call, journal: Path, line: tuple[str, str, str] | dict[str, object], words: list[str], message: str
) -> None:
    good = (CIRCLE, "arrow", "missing")
    code, _, err = call([line, good], "--accept-all", *words)
    assert code == 2 and message in err and not journal.exists()
    assert "Traceback" not in err


def test_lines_of_ones_own_may_name_images_by_absolute_paths(
    call: Call, run: Path, root: Path, journal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own" / "lines.jsonl"
    own.parent.mkdir()
    own.write_text(json.dumps({"image": str(root / CIRCLE), "tag": "square", "kind": "missing", "accept": True}))
    assert apply_corrections.main([str(own), "--run", str(run), "--journal", str(journal)]) == 0
    assert "square" in tags_of(root, journal)[0]
    capsys.readouterr()
    line = (str(tmp_path / CIRCLE), "square", "missing")
    code, _, err = call([line], "--accept-all")
    assert code == 2 and "no such image in the data set" in err


def test_a_tag_that_another_gives_is_corrected_with_that(call: Call, run: Path, root: Path, journal: Path) -> None:
    ontology = Ontology(aliases={"ring": "circle"}, implications={"arrow left": ("arrow",), "square": ("circle",)})
    ontology.save(run / ONTOLOGY_FILE)
    image = "even/img000.jpg"  # tagged arrow, arrow left
    alone = (image, "arrow", "wrong")
    code, _, err = call([alone], "--accept-all")
    assert code == 2 and "line 1: even/img000.jpg: 'arrow' is implied by 'arrow left': correct that" in err
    assert not journal.exists()
    code, out, _ = call([alone, (image, "arrow left", "wrong")], "--accept-all")
    assert code == 0 and "2 corrections of 1 images" in out
    assert tags_of(root, journal, image)[0] == {"category:shape"}


def test_suspects_of_another_folder_are_refused_unless_it_is_named(
    call: Call, root: Path, journal: Path, tmp_path: Path
) -> None:
    files = bytes_of(root)
    moved = shutil.copytree(root, tmp_path / "moved")
    line: dict[str, object] = {"image": CIRCLE, "tag": "square", "kind": "missing", "root": str(moved)}
    lines: list[tuple[str, str, str] | dict[str, object]] = [{"format_version": 1, "roots": [str(moved)]}, line]
    code, _, err = call(lines, "--accept-all", "--write-sidecars")
    assert code == 2 and f"are of {moved}, the run's" in err and "--roots" in err
    assert not journal.exists() and bytes_of(root) == files
    assert call(lines, "--accept-all", "--write-sidecars", "--roots", str(moved))[0] == 0
    assert bytes_of(root) == files and "square" in (moved / CIRCLE).with_suffix(".json").read_text(encoding="utf-8")
    assert call([{"format_version": 1, "roots": [str(root)]}, (CIRCLE, "text", "missing")], "--accept-all")[0] == 0


def test_bad_lines_can_be_left_out_and_new_tags_asked_for(call: Call, root: Path, journal: Path) -> None:
    lines = [("even/none.png", "circle", "missing"), (CIRCLE, "brand new", "missing")]
    code, out, err = call(lines, "--accept-all", "--skip-bad", "--new-tags")
    assert code == 0 and "1 corrections of 1 images" in out and "1 refused" in out and "none.png" in err
    assert "brand new" in tags_of(root, journal)[0]
    code, _, err = call(
        [(CIRCLE, "brand new", "wrong"), (CIRCLE, "circle", "wrong"), (CIRCLE, "category:shape", "wrong")],
        "--accept-all",
    )
    assert code == 2 and "would leave the image without a tag: 'category:shape' is its only one" in err
    assert call([(CIRCLE, "arrow", "missing")])[2].startswith("error: no line of")
    assert call([], "--list")[0] == 0


def test_a_tag_outside_the_vocabulary_is_said(call: Call, run: Path, root: Path) -> None:
    build_vocabulary(open_dataset(configure(root).data), 1, ignore=["text"]).save(run / "vocabulary.json")
    code, out, _ = call([(CIRCLE, "text", "missing")], "--accept-all")
    assert code == 0 and "note: line 1: even/img002.webp: 'text' is not in the vocabulary; it corrects the data" in out


def test_a_second_process_is_told_to_wait(call: Call, journal: Path) -> None:
    with locked_log(journal):
        code, _, err = call([(CIRCLE, "arrow", "missing")], "--accept-all")
    assert code == 2 and "in use by process" in err and "try again when it is done" in err and not journal.exists()


def test_sidecars_are_written_where_asked_and_come_back_byte_for_byte(call: Call, root: Path, journal: Path) -> None:
    files = bytes_of(root)
    sidecar = (root / CIRCLE).with_suffix(".json")
    assert (
        call([(CIRCLE, "square", "missing"), (CIRCLE, "arrow", "missing")], "--accept-all", "--write-sidecars")[0] == 0
    )
    content = json.loads(sidecar.read_text())
    assert content == {
        "filename": "img002.webp",
        "tags": ["circle", "square", "arrow"],
        "rating": "g",
        "categories": ["shape"],
    }
    assert tags_of(root, None) == tags_of(root, journal) == ({"circle", "square", "arrow", "category:shape"}, "general")
    assert call([(CIRCLE, "text", "missing")], "--accept-all", "--write-sidecars")[0] == 0
    assert call([], "--undo", "2")[0] == 0
    assert json.loads(sidecar.read_text())["tags"] == ["circle", "square", "text"]
    assert call([], "--undo", "all")[0] == 0
    assert bytes_of(root) == files
    code, _, err = call([(CIRCLE, "category:shape", "wrong")], "--accept-all", "--write-sidecars")
    assert code == 2 and "cannot be written: the tag comes from another field" in err and bytes_of(root) == files


def test_a_sidecar_that_was_edited_since_is_left_alone(call: Call, root: Path) -> None:
    sidecar = (root / CIRCLE).with_suffix(".json")
    assert call([(CIRCLE, "square", "missing")], "--accept-all", "--write-sidecars")[0] == 0
    edited = sidecar.read_bytes().replace(b"circle", b"ring")
    sidecar.write_bytes(edited)
    code, _, err = call([], "--undo", "all")
    assert code == 2 and "has changed since corrections 1 were written to it; mend it by hand" in err
    assert sidecar.read_bytes() == edited
    assert call([(CIRCLE, "arrow", "missing")], "--accept-all", "--write-sidecars")[0] == 0
    assert call([], "--undo", "2")[0] == 0 and sidecar.read_bytes() == edited


@pytest.mark.parametrize("writes", [0, 1, 2])
def test_a_kill_between_the_journal_and_the_sidecars_can_be_undone(
    call: Call, root: Path, journal: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    """Killed before the n-th atomic write: the kept original, the sidecar."""
    files = bytes_of(root)
    write, done = mending.write_atomic, []

    def write_or_die(path: Path, content: bytes) -> None:
        if len(done) == writes:
            raise KeyboardInterrupt
        done.append(path)
        write(path, content)

    monkeypatch.setattr(mending, "write_atomic", write_or_die)
    lines = [(CIRCLE, "square", "missing")]
    if writes < 2:
        assert call(lines, "--accept-all", "--write-sidecars")[0] == 130
        assert bytes_of(root) == files
    else:
        assert call(lines, "--accept-all", "--write-sidecars")[0] == 0
    monkeypatch.undo()
    acts = "square" in tags_of(root, journal if journal.exists() else None)[0]
    assert acts == (writes > 0)
    assert call([(CIRCLE, "arrow", "missing")], "--accept-all", "--write-sidecars")[0] == 0
    written = json.loads((root / CIRCLE).with_suffix(".json").read_text())["tags"]
    assert written == (["circle", "square", "arrow"] if writes else ["circle", "arrow"])
    assert call([], "--undo", "all")[0] == 0 and bytes_of(root) == files
    assert tags_of(root, journal) == tags_of(root, None)


def test_threads_and_processes_serve_the_corrected_tags_and_the_vocabulary_counts_them(
    call: Call, root: Path, journal: Path
) -> None:
    plain, _, vocabulary = loaders(root, data__val_fraction=0.1)
    names = [plain.dataset.index.relative_path(row) for row in range(0, 60, 3)]
    assert call([(name, "brand new", "missing") for name in names], "--accept-all", "--new-tags")[0] == 0
    settings = {"data__val_fraction": 0.1, "data__corrections_file": str(journal), "data__num_threads": 2}
    threads, _, corrected = loaders(root, **settings)
    assert "brand new" not in vocabulary and corrected.counts[corrected.index("brand new")] == len(names)
    processes, _, _ = loaders(root, **settings, data__num_processes=1)
    try:
        epoch = epoch_of(threads, 1)
        assert_same(epoch_of(processes, 1), epoch)
    finally:
        processes.close()
    new = corrected.index("brand new")
    for batch, _ in epoch:
        assert [new in tags for tags in batch.tag_lists()] == [row % 3 == 0 for row in batch.row_ids.tolist()]
    assert not any(
        torch.equal(batch.tag_indices, other.tag_indices)
        for (batch, _), (other, _) in zip(epoch, epoch_of(plain, 1), strict=True)
    )


def test_a_resume_with_other_corrections_goes_on_and_says_so(
    call: Call, root: Path, journal: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain, _, vocabulary = loaders(root)
    whole = epoch_of(plain, 1)
    position = whole[1][1]
    assert "corrections" not in position
    assert call([(CIRCLE, "arrow", "missing")], "--accept-all")[0] == 0
    config = configure(root, data__corrections_file=str(journal))
    train, _ = create_dataloaders(config, vocabulary)
    with pytest.raises(ValueError, match=r"data.corrections_file \(hash\) 0 there"):
        train.seek(position)
    caplog.clear()
    carried = train.carry_over(position)
    assert "tags were corrected since the checkpoint" in caplog.text and "goes on with the new ones" in caplog.text
    train.seek(carried)
    rest = list(train)
    assert [batch.row_ids.tolist() for batch, _ in rest] == [batch.row_ids.tolist() for batch, _ in whole[2:]]
    assert all(place["corrections"] == carried["corrections"] != 0 for _, place in rest)
    assert train.carry_over(rest[0][1]) == rest[0][1]
    assert call([], "--undo", "all")[0] == 0
    undone, _ = create_dataloaders(config, vocabulary)
    undone.seek(position)
    assert_same(list(undone), whole[2:])
    caplog.clear()
    assert undone.carry_over(carried) == position and "tags were corrected" in caplog.text


def test_the_index_command_says_what_acts(call: Call, root: Path, journal: Path, tmp_path: Path, capsys) -> None:
    assert (
        call([(CIRCLE, "arrow", "missing"), ("even/img004.jpg", "arrow", "missing")], "--accept-all", "--skip-bad")[0]
        == 0
    )
    (root / CIRCLE).unlink()
    words = [str(root), "--index-dir", str(tmp_path / "index"), "--corrections", str(journal)]
    assert index.main(words) == 0
    out = capsys.readouterr().out
    assert f"point to 1 images that are not there: {CIRCLE}" in out
    with pytest.raises(SystemExit, match="2"):
        index.main([*words[:-1], str(tmp_path / "none.jsonl")])
    assert "--corrections" in capsys.readouterr().err


def test_planted_errors_are_found_first_and_mended(root: Path, tmp_path: Path) -> None:
    """The whole way with a model that knows the pictures by heart: its scores are the true tags."""
    config = configure(root, data__val_fraction=0.5, orientation__mirror_probability=0.0)
    opened = open_dataset(config.data)
    vocabulary: TagVocabulary = build_vocabulary(opened, 1)
    truth = np.zeros((len(opened), len(vocabulary)), dtype=bool)
    for row in range(len(opened)):
        truth[row, [vocabulary.index(tag) for tag in opened.record(row).tags]] = True
    _, validation = create_dataloaders(config, vocabulary, opened)
    suspects = validation_loop.Suspects(len(vocabulary), 4)
    planted = sorted(int(row) for batch, _ in validation for row in batch.row_ids)[:4]
    arrow = vocabulary.index("arrow")
    for batch, _ in validation:
        logits = torch.from_numpy(np.where(truth[batch.row_ids.numpy()], 4.0, -4.0).astype(np.float32))
        for place, row in enumerate(batch.row_ids.tolist()):
            if row in planted:  # the label is wrong where the picture says the opposite
                logits[place, arrow] *= -2
        suspects.add(batch, logits)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(
        f"data:\n  roots: [{root}]\n  index_dir: {tmp_path / 'i'}\n  extra_fields: [categories]\n"
    )
    validation_loop.write_suspects(run / "suspects.jsonl", suspects.strongest(), opened, vocabulary.tags, {})
    journal = tmp_path / "corrections.jsonl"
    assert apply_corrections.main([str(run / "suspects.jsonl"), "--journal", str(journal), "--accept-all"]) == 0
    corrected = open_dataset(configure(root, data__corrections_file=str(journal)).data)
    for row in range(len(corrected)):
        differs = set(corrected.record(row).tags) ^ set(opened.record(row).tags)
        assert differs == ({"arrow"} if row in planted else set())
