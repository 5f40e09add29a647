"""Suspects against the plain definition, whatever the order of the batches, the cap and the number of ranks."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tagger.batch import Batch
from tagger.data.index import open_index
from tagger.errors import DivergedError
from tagger.suspects import Suspect, Suspects, write_suspects


def batch_of(rows: np.ndarray, present: np.ndarray, *, mirrored: bool = False) -> Batch:
    offsets = np.concatenate([[0], np.cumsum(present.sum(axis=1))]).astype(np.int32)
    return Batch(
        images=torch.zeros((len(rows), 3, 1, 1), dtype=torch.uint8),
        tag_indices=torch.from_numpy(np.nonzero(present)[1].astype(np.int32)),
        tag_offsets=torch.from_numpy(offsets),
        row_ids=torch.from_numpy(rows.astype(np.int64)),
        valid_sizes=torch.ones((len(rows), 2), dtype=torch.int32),
        mirrored=torch.full((len(rows),), mirrored),
    )


def collect(suspects: Suspects, logits: np.ndarray, present: np.ndarray, batches: list[np.ndarray]) -> Suspects:
    for rows in batches:
        suspects.add(batch_of(rows, present[rows]), torch.from_numpy(logits[rows]))
    return suspects


def by_definition(logits: np.ndarray, present: np.ndarray, limit: int, per_tag: int) -> list[Suspect]:
    num_images = len(logits)
    found: list[Suspect] = []
    for tag in range(logits.shape[1]):
        count = int(present[:, tag].sum())
        share = math.log(count + 0.5) - math.log(num_images - count + 0.5)
        for kind in ("missing", "wrong"):
            own: list[Suspect] = []
            for row in np.flatnonzero(present[:, tag] == (kind == "wrong")).tolist():
                logit = float(logits[row, tag])
                strength = logit if kind == "missing" else share - logit
                own.append(Suspect(row, tag, kind, 1 / (1 + math.exp(-logit)), strength))
            found += sorted(own, key=lambda s: (-s.strength, s.row))[:per_tag]
    return sorted(found, key=lambda s: (-s.strength, s.row, s.tag))[:limit]


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 40),
    st.integers(1, 6),
    st.integers(1, 30),
    st.integers(1, 5),
    st.integers(1, 3),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_the_strongest_are_those_of_the_definition(num_images, num_tags, limit, per_tag, ranks, ties, seed):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (num_images, num_tags)).astype(np.float32)
    if ties:
        logits = np.round(logits / 3) * 3
    present = rng.random((num_images, num_tags)) < 0.4
    pieces = np.array_split(rng.permutation(num_images), rng.integers(1, num_images + 1))
    parts = [collect(Suspects(num_tags, limit, per_tag), logits, present, pieces[rank::ranks]) for rank in range(ranks)]
    for other in parts[1:]:
        parts[0].merge(other)
    found = parts[0].strongest()
    expected = by_definition(logits, present, limit, per_tag)
    assert [(s.row, s.tag, s.kind) for s in found] == [(s.row, s.tag, s.kind) for s in expected]
    assert [s.strength for s in found] == pytest.approx([s.strength for s in expected], abs=1e-9)
    assert [s.score for s in found] == pytest.approx([s.score for s in expected], abs=1e-9)
    in_order = collect(Suspects(num_tags, limit, per_tag), logits, present, [np.arange(num_images)])
    assert in_order.strongest() == found  # bit for bit


def test_memory_is_bounded_and_nothing_is_lost_to_it(monkeypatch):
    monkeypatch.setattr("tagger.suspects._COMPACT_AFTER", 1)
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 3, (400, 5)).astype(np.float32)
    present = rng.random((400, 5)) < 0.3
    suspects = collect(Suspects(5, 40, 3), logits, present, np.array_split(rng.permutation(400), 50))
    assert len(suspects._kept.rows) == 2 * 5 * 3 and sum(len(some.rows) for some in suspects._waiting) < 30
    assert [(s.row, s.tag) for s in suspects.strongest()] == [
        (s.row, s.tag) for s in by_definition(logits, present, 40, 3)
    ]


def test_a_tag_that_scores_low_wherever_it_stands_does_not_crowd_out_a_wrong_one():
    """Tag 0 is rare and not learnt: 0.02 on its own two images. Tag 1 is common, and 0.05 on one that has it."""
    logits = np.full((100, 2), -6.0, dtype=np.float32)
    present = np.zeros((100, 2), dtype=bool)
    present[:2, 0], logits[:2, 0] = True, -3.9
    present[:51, 1], logits[:50, 1], logits[50, 1] = True, 5.0, -2.9
    first, *rest = collect(Suspects(2, 10), logits, present, [np.arange(100)]).strongest()
    assert (first.row, first.tag, first.kind) == (50, 1, "wrong") and first.strength > 2
    assert all(suspect.strength < 0.5 for suspect in rest)


def test_what_cannot_be_judged_is_refused():
    suspects = Suspects(2, 5)
    present = np.ones((1, 2), dtype=bool)
    row = np.zeros(1)
    with pytest.raises(DivergedError, match="NaN"):
        suspects.add(batch_of(row, present), torch.tensor([[0.0, math.nan]]))
    with pytest.raises(ValueError, match="without mirroring"):
        suspects.add(batch_of(row, present, mirrored=True), torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"logits are \[1, 3\]; expected \[1, 2\]"):
        suspects.add(batch_of(row, present), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="make both alike"):
        suspects.merge(Suspects(2, 6))
    with pytest.raises(ValueError, match="at least 1"):
        Suspects(2, 0)
    assert suspects.strongest() == []


def test_the_file_names_images_as_the_index_does(tmp_path: Path):
    root = tmp_path / "set"
    (root / "deep").mkdir(parents=True)
    for name, tags in (("deep/a", ["sun", "sky"]), ("häuser", ["sea"])):
        (root / f"{name}.png").touch()
        (root / f"{name}.json").write_text(json.dumps({"tags": tags, "rating": "g"}))
    index = open_index([root], tmp_path / "index")
    suspects = [Suspect(1, 0, "missing", 0.75, 1.0986), Suspect(0, 1, "wrong", 0.1, 0.5)]
    write_suspects(tmp_path / "suspects.jsonl", suspects, index, ("sun", "sky"), {"weights": "model"})
    header, first, second = map(json.loads, (tmp_path / "suspects.jsonl").read_text("utf-8").splitlines())
    assert header == {"format_version": 1, "num_suspects": 2, "weights": "model"}
    assert (first["image"], first["tag"], first["kind"], first["score"]) == ("häuser.png", "sun", "missing", 0.75)
    assert (second["image"], second["tags"], second["rating"]) == ("deep/a.png", ["sun", "sky"], "general")
    assert first["root"] == str(root) and first["image_id"] == f"{int(index.image_ids[1]):016x}"
    assert first["state"] != second["state"]
