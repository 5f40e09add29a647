"""An ontology in the loader and in whole runs: targets, what a run keeps, and changes that are refused."""

import shutil
from pathlib import Path

import numpy as np
import orjson
import pytest

import train_direct
import validation_loop
from dataset_loader import create_dataloaders, open_dataset
from orientation_handler import OrientationHandler
from scripts import predict
from tagger.artifact import load_artifact
from tagger.data.weighting import class_aware_sampler
from tagger.files import FormatError
from tagger.ontology import Ontology
from tagger.ontology_file import read_ontology
from tests.integration.test_train_direct import arguments, run
from tests.tiny_dataset import assert_same, configure, epoch_of
from vocabulary import TagVocabulary, build_vocabulary

TEXT = """\
format_version: 1
aliases: {square: box}
implications:
  box: shape
  circle: [shape]
  arrow left: [arrow, pointer_l]
  arrow right: [arrow, pointer_r]
exclusive: [[arrow left, arrow right]]
flip_pairs: [[pointer_l, pointer_r]]
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("given") / "tags.yaml"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.mark.parametrize("ignored", [(), ("circle", "pointer_l", "pointer_r"), ("pointer_r",)])
def test_targets_are_the_closed_tags_of_the_sidecar_mirrored_or_not(
    drawn: Path, tmp_path: Path, file: Path, ignored: tuple[str, ...]
) -> None:
    config = configure(drawn, data__index_dir=str(tmp_path / "index"))
    index, ontology = open_dataset(config.data), read_ontology(file)
    vocabulary = build_vocabulary(index, 1, ignored, ontology=ontology)
    assert "square" not in vocabulary and "shape" in vocabulary
    rules = OrientationHandler(None, "balanced", ontology)
    mirrored_rows, plain_arrows = 0, 0
    for loader in create_dataloaders(config, vocabulary, index, ontology=ontology):
        for batch, _ in epoch_of(loader):
            for row, tags, mirrored in zip(
                batch.row_ids.tolist(), batch.tag_lists(), batch.mirrored.tolist(), strict=True
            ):
                record = index.record(row)
                # Mirrored first and closed then: the loader does it the other way round.
                own = [rules.mirror_tag(ontology.canonical(tag)) if mirrored else tag for tag in record.tags]
                closed = {name for tag in own for name in ontology.closed(tag)} | {f"rating:{record.rating}"}
                assert tags == tuple(sorted(vocabulary.index(tag) for tag in closed if tag in vocabulary))
                mirrored_rows += mirrored
                plain_arrows += "arrow left" in record.tags and mirrored
    assert mirrored_rows > 5
    # Where the mirror of an implied tag is not learnt, its image stays as it is.
    assert (plain_arrows == 0) == (ignored == ("pointer_r",))


def test_processes_give_what_threads_give(drawn: Path, tmp_path: Path, file: Path) -> None:
    ontology = read_ontology(file)
    found = []
    for num_processes in (0, 2):
        config = configure(drawn, data__index_dir=str(tmp_path / "index"), data__num_processes=num_processes)
        index = open_dataset(config.data)
        vocabulary = build_vocabulary(index, 1, ontology=ontology)
        train, _ = create_dataloaders(config, vocabulary, index, ontology=ontology)
        found.append(epoch_of(train))
        train.close()
    assert_same(*found)


def test_drawing_by_tag_knows_implied_tags(drawn: Path, tmp_path: Path, file: Path) -> None:
    config = configure(drawn, data__index_dir=str(tmp_path / "index"), data__sampling="class_aware")
    index, ontology = open_dataset(config.data), read_ontology(file)
    vocabulary = TagVocabulary.from_counts({"shape": 2, "pointer_l": 1})
    train, _ = create_dataloaders(config, vocabulary, index, ontology=ontology)
    rows = train._source.sampler.rows
    sampler = class_aware_sampler(train.dataset.table, rows, 0)
    carriers = [{"circle", "square"}, {"arrow left"}]
    expected = [sum(bool(names & set(index.record(int(row)).tags)) for row in rows) for names in carriers]
    assert np.diff(sampler.offsets).tolist() == expected


@pytest.fixture(scope="module")
def finished(images: Path, file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    return run(images, runs, "related", f"vocabulary.ontology_file={file}", "training.num_epochs=1")


def test_a_run_and_its_model_keep_the_ontology(
    finished: Path, images: Path, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = read_ontology(file)
    artifact = load_artifact(finished / "model")
    assert read_ontology(finished / "ontology.json") == given == artifact.ontology
    names = [tag.name for tag in artifact.tags]
    assert "shape" in names and "square" not in names and "pointer_l" in names
    log = (finished / "train.log").read_text(encoding="utf-8")
    assert "1 aliases, 4 tags with implications" in log and "0 of its 9 tags are on no image" in log
    # The run's own copy is what counts from now on, whatever becomes of the file.
    moved = f"vocabulary.ontology_file={file.with_name('gone.yaml')}"
    assert validation_loop.main(["--run", str(finished), moved]) == 0
    picture = str(next(images.rglob("*.png")))
    capsys.readouterr()
    scores = []
    for words in ([], ["--closure"]):
        assert predict.main([str(finished), picture, "--json", "--threshold", "0", *words]) == 0
        scores.append({tag["name"]: tag["score"] for tag in orjson.loads(capsys.readouterr().out)["tags"]})
    plain, closed = scores
    below = {name: [tag for tag in names if name in given.closed(tag)] for name in names}
    assert closed == {name: max(plain[tag] for tag in below[name]) for name in names if name in closed}
    assert closed.keys() == plain.keys()


def test_a_model_without_or_with_another_ontology(finished: Path, images: Path, tmp_path: Path, capsys) -> None:
    folder = shutil.copytree(finished / "model", tmp_path / "model")
    Ontology(implications={"arrow": ("shape",)}).save(folder / "ontology.json")
    with pytest.raises(FormatError, match=r"ontology\.json is not the file that was written with this model"):
        load_artifact(folder)
    (folder / "ontology.json").unlink()
    with pytest.raises(FormatError, match=r"ontology\.json is missing"):
        load_artifact(folder)
    config = orjson.loads((folder / "config.json").read_bytes())
    del config["files_sha256"]["ontology.json"]  # as models before had it
    (folder / "config.json").write_bytes(orjson.dumps(config))
    assert load_artifact(folder).ontology is None
    picture = str(next(images.rglob("*.png")))
    assert predict.main([str(folder), picture, "--closure"]) == 2
    assert "has no ontology" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        (TEXT.replace("circle: [shape]", "circle: [round]"), [], "has changed since this run started"),
        (TEXT, ["vocabulary.ontology_file=null"], "a run keeps the tags that it started with"),
        (None, [], "does not exist"),
        (TEXT.replace("box: shape", "box: box"), [], "line 4: implications: 'box' implies itself"),
    ],
)
def test_a_changed_ontology_is_refused_at_resume(
    finished: Path,
    images: Path,
    file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    text: str | None,
    words: list[str],
    message: str,
) -> None:
    shutil.copytree(finished, tmp_path / "related")
    again = [f"vocabulary.ontology_file={file}", *words, "training.num_epochs=2", "--resume", "latest"]
    if text is None:
        file.unlink()
    else:
        file.write_text(text, encoding="utf-8")
    try:
        assert train_direct.main(arguments(images, tmp_path, "related", *again)) == 2
    finally:
        file.write_text(TEXT, encoding="utf-8")
    assert message in capsys.readouterr().err


def test_a_lost_copy_is_refused_and_another_way_of_writing_is_not_a_change(
    finished: Path, images: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(finished, tmp_path / "related")
    again = [f"vocabulary.ontology_file={file}", "training.num_epochs=2", "--resume", "latest"]
    copy = folder / "ontology.json"
    copy.rename(tmp_path / "kept")
    assert train_direct.main(arguments(images, tmp_path, "related", *again)) == 2
    assert "lost its copy" in capsys.readouterr().err
    (tmp_path / "kept").rename(copy)
    file.write_text(f"# The same, with a comment\n{TEXT}", encoding="utf-8")
    assert train_direct.main(arguments(images, tmp_path, "related", *again)) == 0
