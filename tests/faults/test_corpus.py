"""Every hostile file through the real path, index to loader; each gives exactly its outcome in the table."""

from pathlib import Path

import numpy as np
import pytest

from dataset_loader import DataLoader, DatasetLoader, LoadOptions, SidecarJsonDataset
from tagger.data.decode import describe_decoder
from tagger.data.index import MetadataIndex, open_index
from tagger.data.quarantine_log import Quarantine
from tagger.data.scan import printable
from tagger.preprocess import Preprocess
from tests.faults.corpus import CASES, SIDE, Case, NotARow, Refused, Row, Served
from tests.faults.images import BACKGROUND, encode, photo
from vocabulary import TagVocabulary

OPTIONS = LoadOptions(Preprocess(image_size=SIDE, background=BACKGROUND), max_pixels=1_000_000, num_threads=1)
# Pillow warns of what it finds in damaged TIFF headers.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")


def test_the_corpus_is_large_and_names_each_case_once() -> None:
    assert len(CASES) >= 60
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_hostile_file_gives_its_outcome(case: Case, tmp_path: Path) -> None:
    root = tmp_path / "images"
    root.mkdir()
    (root / "good.png").write_bytes(encode(photo(), "PNG"))
    (root / "good.json").write_bytes(b'{"tags":["y"]}')
    case.make(root)
    annotations = root / "annotations.json"
    index = open_index([root], tmp_path / "index", annotations=annotations if annotations.exists() else None)
    rows = {index.image_path(row).name: row for row in range(len(index))}
    good = rows.pop("good.png")
    assert index.record(good).tags == ("y",)
    expected = case.outcome
    if isinstance(expected, NotARow):
        assert not rows
        check_report(index, expected)
        return
    ((name, row),) = rows.items()
    assert name.startswith("case")
    if isinstance(expected, Row):
        assert index.record(row).tags == expected.tags
        return
    check_loaded(index, row, good, expected, tmp_path / "quarantine.jsonl")


def check_report(index: MetadataIndex, expected: NotARow) -> None:
    if expected.where == "skipped":
        assert any(expected.kind in line and "skipped" in line for line in index.report())
    elif expected.where == "rejected":
        (rejected,) = index.rejected
        assert rejected.kind == expected.kind
    else:
        (path,) = {"images": index.images_without_sidecar, "sidecars": index.sidecars_without_image}[
            expected.where.partition("_")[0]
        ]
        assert Path(path).name.startswith("case")


def check_loaded(index: MetadataIndex, row: int, good: int, expected: Served | Refused, log: Path) -> None:
    vocabulary = TagVocabulary(["x", "y"], [1, 1], ["general", "general"])
    dataset = (DatasetLoader if index.path.name == "a" else SidecarJsonDataset)([], vocabulary, index=index)
    quarantine = Quarantine(log, describe_decoder(OPTIONS.decoding))
    loader = DataLoader(dataset, np.array(sorted((row, good))), 2, OPTIONS, quarantine=quarantine)
    for epoch in range(2):
        loader.set_epoch(epoch)
        ((batch, _),) = list(loader)
        served = batch.row_ids.tolist()
        if isinstance(expected, Refused):
            assert served == [good]
            (refusal,) = loader.refusals
            assert (refusal.path, refusal.reason) == (printable(index.image_path(row)), expected.reason)
            assert quarantine.num_files == (epoch == 1 and expected.recorded)
            continue
        assert loader.refusals == () and sorted(served) == sorted((row, good))
        place = served.index(row)
        height, width = batch.valid_sizes[place].tolist()
        assert (height, width) == OPTIONS.preprocess.content_size(*expected.golden.shape[:2])
        if expected.golden.shape[:2] == (height, width):
            top, left = (SIDE - height) // 2, (SIDE - width) // 2
            found = batch.images[place, :, top : top + height, left : left + width].permute(1, 2, 0).numpy()
            assert np.abs(found.astype(int) - expected.golden).max() <= expected.tolerance
        else:
            check_decoded(index.image_path(row), expected)


def check_decoded(path: Path, expected: Served) -> None:
    """Images that the letterbox enlarges are compared as decoded."""
    from tagger.data.decode import decode

    found = decode(path.read_bytes(), OPTIONS.decoding).pixels
    assert found.shape == expected.golden.shape
    assert np.abs(found.astype(int) - expected.golden).max() <= expected.tolerance
