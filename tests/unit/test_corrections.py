"""Corrected tags over an index: the same as an index of corrected sidecars, wherever tags are read."""

import ast
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tagger.data.correction_log import Change, CorrectionLog, LastTagError, change_tags, state_of
from tagger.data.corrections import RowFinder, lay_over
from tagger.data.index import MetadataIndex, open_index
from tagger.data.split import SplitRule, split_index
from tagger.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
IMAGES = {
    "one/a.png": (["sun", "sea"], "general"),
    "one/a-b.png": (["sun"], None),
    "one/deep/c.png": (["sea", "sky", "boat"], "explicit"),
    "two/a.png": (["sky"], "general"),
    "two/é.png": (["boat", "sun"], None),
}


def write(folder: Path, content: dict[str, tuple[list[str], str | None]]) -> list[Path]:
    for name, (tags, rating) in content.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        path.with_suffix(".json").write_text(json.dumps({"tags": tags, "rating": rating}))
    return [folder / "one", folder / "two"]


def change(folder: Path, number: int, name: str, action: str, tag: str) -> Change:
    root, _, image = name.partition("/")
    return Change(number, "t", action, tag, str(folder / root), image, "0" * 16, ((), None), "s")


def rows_by_name(index: MetadataIndex) -> dict[str, int]:
    return {index.image_path(row).relative_to(index.roots[0].parent).as_posix(): row for row in range(len(index))}


def what_it_says(index: MetadataIndex) -> dict[str, object]:
    """Everything that readers of tags see, by names."""
    rows = np.arange(len(index))
    numbers, places = index.gather_tags(rows)
    assert (np.diff(places) >= 0).all()
    gathered: dict[int, set[str]] = {row: set() for row in rows.tolist()}
    for number, place in zip(numbers.tolist(), places.tolist(), strict=True):
        gathered[place].add(index.tag_names[number])
    assert [len(tags) for tags in gathered.values()] == index.tag_lengths().tolist()
    for row in rows.tolist():
        assert {index.tag_names[number] for number in index.row_tag_ids(row)} == gathered[row]
        assert set(index.record(row).tags) == gathered[row]
    counts = zip(index.tag_names, index.tag_counts().tolist(), strict=True)
    return {
        "rows": {name: (gathered[row], index.rating(row)) for name, row in rows_by_name(index).items()},
        "codes": index.ratings.tolist(),
        "counts": {name: count for name, count in counts if count},
        "ratings": index.rating_counts(),
        "first line": index.report()[0],
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("set")
    write(folder, IMAGES)
    return folder


def open_set(folder: Path, corrections: Path | None = None) -> MetadataIndex:
    return open_index([folder / "one", folder / "two"], folder / "index", corrections=corrections)


CHANGES = st.lists(
    st.tuples(
        st.sampled_from(sorted(IMAGES)),
        st.sampled_from(["add", "remove"]),
        st.sampled_from(["sun", "sea", "sky", "boat", "new", "rating:general", "rating:sensitive"]),
    ),
    max_size=12,
)


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(CHANGES, st.data())
def test_a_corrected_index_is_that_of_corrected_sidecars_and_undoing_gives_the_first(folder, tmp_path, wanted, data):
    journal = tmp_path / "corrections.jsonl"
    journal.unlink(missing_ok=True)
    log = CorrectionLog(journal)
    log.append([change(folder, number, *one) for number, one in enumerate(wanted, 1)])
    kept = data.draw(st.lists(st.integers(1, max(1, len(wanted))), unique=True)) if wanted else []
    if kept:
        log.append_undo(kept)
    content = {name: (tuple(tags), rating) for name, (tags, rating) in IMAGES.items()}
    for number, (name, action, tag) in enumerate(wanted, 1):
        if number not in kept:
            try:
                content[name] = change_tags(*content[name], action, tag) or content[name]
            except LastTagError:
                continue
    plain = open_set(folder)
    corrected = MetadataIndex.load(plain.path, corrections=lay_over(CorrectionLog(journal), plain))
    expected = open_set_of(
        tmp_path / "expected", {name: (list(tags), rating) for name, (tags, rating) in content.items()}
    )
    assert what_it_says(corrected) == what_it_says(expected)
    for stretch in (np.array([3, 0, 3]), np.array([2]), np.empty(0, dtype=np.int64)):
        numbers, places = corrected.gather_tags(stretch)
        for place, row in enumerate(stretch.tolist()):
            assert set(numbers[places == place]) == set(corrected.row_tag_ids(row))
    again = pickle.loads(pickle.dumps(corrected))
    assert what_it_says(again) == what_it_says(corrected)
    assert corrected.corrections.hash == 0 or what_it_says(corrected) != what_it_says(plain)
    log.append_undo([c.id for c in log.active])
    undone = open_set(folder, journal)
    assert what_it_says(undone) == what_it_says(plain) and undone.corrections.hash == 0


def open_set_of(folder: Path, content: dict[str, tuple[list[str], str | None]]) -> MetadataIndex:
    roots = write(folder, content)
    return open_index(roots, folder / "index")


def test_the_hash_is_of_what_acts_and_not_of_how_it_came_about(folder, tmp_path):
    def hash_of(*wanted: tuple[str, str, str]) -> int:
        journal = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        CorrectionLog(journal).append([change(folder, number, *one) for number, one in enumerate(wanted, 1)])
        return lay_over(CorrectionLog(journal), open_set(folder)).hash

    add, other = ("one/a.png", "add", "boat"), ("two/a.png", "add", "boat")
    assert (
        hash_of(add, other)
        == hash_of(other, add, add)
        == hash_of(other, ("one/a.png", "add", "x"), add, ("one/a.png", "remove", "x"))
    )
    assert (
        len({hash_of(add), hash_of(other), hash_of(add, other), hash_of(("one/a.png", "add", "rating:explicit"))}) == 4
    )
    assert 0 < hash_of(add) < 2**53 and hash_of(("one/a.png", "add", "sun")) == 0


def test_what_does_not_act_is_counted(folder, tmp_path):
    journal = tmp_path / "corrections.jsonl"
    changes = [
        change(folder, 1, "one/a.png", "add", "boat"),
        change(folder, 2, "one/a.png", "add", "sun"),
        change(folder, 3, "one/gone.png", "add", "sun"),
        change(folder, 4, "one/a-b.png", "remove", "sun"),
    ]
    CorrectionLog(journal).append(changes)
    journal.write_bytes(journal.read_bytes() + b'{"id": 5, "ti')
    lines = open_set(folder, journal).report()[1:]
    assert lines == (
        f"corrections: 1 of 4 act, on 1 images ({journal})",
        "corrections: 1 are needless, the sidecars say so already",
        "corrections: 1 are left out, they would leave an image without a tag",
        "corrections: 1 point to 1 images that are not there: gone.png",
        "corrections: the last line is torn and left out (13 bytes)",
    )
    with pytest.raises(InputError, match=r"data.corrections_file: .*none.jsonl does not exist; make it with"):
        open_set(folder, tmp_path / "none.jsonl")


def test_images_are_found_in_their_root_and_in_a_set_that_has_moved(folder):
    index = open_set(folder)
    rows = rows_by_name(index)
    finder = RowFinder(index)
    assert [finder.row_of(str(folder / name.partition("/")[0]), name.partition("/")[2]) for name in rows] == [
        *rows.values()
    ]
    for row in range(len(index)):
        assert index.find_row(*index.locate(row)) == row
    assert finder.row_of("/elsewhere", "deep/c.png") == finder.row_of(None, "deep/c.png") == rows["one/deep/c.png"]
    assert finder.row_of("/elsewhere", "a.png") is None  # both roots have one
    assert finder.row_of(str(folder / "two"), "deep/c.png") is None
    for image in ("", "a", "a.png0", "zz"):
        assert index.find_row(0, image) is None


def test_a_correction_moves_no_image_between_the_parts_of_a_stratified_split(tmp_path):
    rng = np.random.default_rng(3)
    content = {f"one/{n}.png": (rng.choice(list("abcdef"), 2, replace=False).tolist(), None) for n in range(60)}
    write(tmp_path, {**content, "two/x.png": (["a"], None)})
    journal = tmp_path / "corrections.jsonl"
    CorrectionLog(journal).append([change(tmp_path, n + 1, f"one/{n}.png", "add", "abcdef"[n % 6]) for n in range(60)])
    rule = SplitRule(0.2, 0.0, 0.0, stratified=True)
    parts = [split_index(open_set(tmp_path, path), rule, max_pixels=1).parts for path in (None, journal)]
    assert np.array_equal(*parts)


def test_the_state_of_an_image_is_that_of_its_sidecar(folder, tmp_path):
    journal = tmp_path / "corrections.jsonl"
    CorrectionLog(journal).append([change(folder, 1, "one/a.png", "add", "boat")])
    plain, corrected = open_set(folder), open_set(folder, journal)
    row = rows_by_name(plain)["one/a.png"]
    assert corrected.sidecar_record(row) == plain.record(row) != corrected.record(row)
    assert state_of(plain.record(row)) != state_of(corrected.record(row))


def test_nobody_reads_tags_past_the_corrections():
    """The columns of what sidecars say are for the index and for the split, which corrections must not move."""
    allowed = {"index.py", "index_update.py", "sidecar_rows.py", "parse_pool.py", "split.py", "corrections.py"}
    found = set()
    for path in [*ROOT.glob("*.py"), *(ROOT / "tagger").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")]:
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)) if "tag_ids" in text or "sidecar_ratings" in text else ():
            if isinstance(node, ast.Attribute) and node.attr in ("tag_ids", "_sidecar_tag_ids", "sidecar_ratings"):
                found.add(path.name)
    assert found <= allowed, f"{found - allowed} should use gather_tags, tag_lengths or ratings"
