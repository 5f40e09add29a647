"""The report of a run as the command writes it, and what a run in progress shows of it."""

import sys
from html.parser import HTMLParser
from pathlib import Path

import orjson
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import validation_loop
from dataset_loader import create_dataloaders, open_dataset
from tests.integration.test_ontology_runs import TEXT
from tests.integration.test_train_direct import run
from tests.tiny_dataset import configure
from vocabulary import TagVocabulary


@pytest.fixture(scope="module")
def finished(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reported")
    (folder / "tags.yaml").write_text(TEXT, encoding="utf-8")
    words = (f"vocabulary.ontology_file={folder / 'tags.yaml'}", "training.num_epochs=2", "data.calib_fraction=0.15")
    return run(images, folder / "runs", "reported", *words)


class Words(HTMLParser):
    """The words of a page, and its tables row by row."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.text = ""
        self.in_cell = False
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, _attributes: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.in_cell = False

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.in_cell:
            self.rows[-1][-1] += data.strip()


def test_the_page_has_the_numbers_of_the_evaluation(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plots = tmp_path / "plots"
    assert validation_loop.main(["--run", str(finished), "--create-plots", str(plots), "--report"]) == 0
    assert str(finished / "report.html") in capsys.readouterr().out
    assert len(list(plots.glob("*.svg"))) == 6
    page = Words(finished / "report.html")
    found = orjson.loads((finished / "evaluation.json").read_bytes())
    assert f"{found['val/mAP']:.3f}" in page.text and f"{found['val/f1_micro']:.3f}" in page.text
    assert found["vocabulary_sha256"][:12] in page.text
    assert found["thresholds"] in page.text and f"{found['fitted_thresholds']['f1_micro']:.3f}" in page.text
    assert f"{found['hierarchy']['all_tags']['f1']:.3f}" in page.text
    precision = {tag["name"]: tag["average_precision"] for tag in found["tags"]}
    rows = {row[0]: row for row in page.rows if len(row) == 9 and row[0] != "tag"}
    assert {name: row[8] for name, row in rows.items()} == {
        name: "–" if value is None else f"{value:.3f}" for name, value in precision.items()
    }
    assert {name: row[4] for name, row in rows.items()} == {
        tag["name"]: f"{round(tag['threshold'], 4):.3f}" for tag in found["tags"]
    }
    assert "Hierarchy" in page.text and "arrow left, arrow right" in page.text
    named = tmp_path / "elsewhere" / "page.html"
    assert validation_loop.main(["--run", str(finished), "--report", str(named)]) == 0
    assert Words(named).rows == page.rows


def test_training_images_are_counted_in_the_training_part(images: Path, finished: Path, tmp_path: Path) -> None:
    config = configure(images, data__index_dir=str(tmp_path / "index"), data__calib_fraction=0.15)
    index, vocabulary = open_dataset(config.data), TagVocabulary.load(finished / "vocabulary.json")
    train, _ = create_dataloaders(config, vocabulary, index)
    assert train.split is not None
    counts = train.dataset.table.count(train.split.training_rows)
    expected = [0] * len(vocabulary)
    for row in train.split.training_rows.tolist():
        record = index.record(row)
        for tag in {*record.tags, f"rating:{record.rating}"}:
            if tag in vocabulary:
                expected[vocabulary.index(tag)] += 1
    assert counts.tolist() == expected and any(name.startswith("rating:") for name in vocabulary.tags)


def test_a_run_shows_curves_and_mistakes_at_every_validation(finished: Path) -> None:
    events = EventAccumulator(str(finished / "tensorboard"))
    events.Reload()
    steps = [event.step for event in events.Scalars("val/mAP")]
    curves = sorted(events.PluginTagToContent("pr_curves"))
    assert "val/precision_recall/all decisions" in curves and len(curves) > 2
    for name in curves:
        assert [event.step for event in events.Tensors(name)] == steps and len(steps) == 2
    assert "val/mistakes/missed" in events.Tags()["images"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--report", "data.num_threads=1"], "reads as a setting"),
        (["--create-plots", "{run}/config.yaml"], "cannot write"),
        (["--report", "{run}"], "is a folder"),
    ],
)
def test_bad_places_are_refused_in_one_line(
    finished: Path, words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        validation_loop.main(["--run", str(finished), *(word.format(run=finished) for word in words)])
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and told in message and message.count("\n") == 1


@pytest.mark.parametrize("flag", ["--report", "--create-plots"])
def test_without_the_extra_the_work_is_not_begun(
    finished: Path, flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.setattr(validation_loop, "evaluate", lambda *_, **__: pytest.fail("evaluated"))
    assert validation_loop.main(["--run", str(finished), flag, str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert flag in message and "pip install" in message and message.count("\n") == 1
