"""Tag details against counting by hand, comparisons against drawing by hand, subsets and files of predictions."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from evaluation_metrics import MetricComputer
from tagger.batch import Batch
from tagger.data.index import MetadataIndex
from tagger.errors import InputError
from tagger.evaluation.comparison import common_tags, compare
from tagger.evaluation.predictions import Keep, PredictionFile
from tagger.evaluation.subset import hashed_subset
from tagger.evaluation.tag_details import TagDetails, curve_points
from tagger.metrics import intervals
from tagger.metrics.reference import reference_average_precision

NUM_IMAGES, NUM_TAGS = 90, 6


def made(seed: int) -> tuple[Tensor, Tensor]:
    """(logits with ties [N, C], targets [N, C])."""
    generator = torch.Generator().manual_seed(seed)
    targets = (torch.rand(NUM_IMAGES, NUM_TAGS, generator=generator) < 0.3).float()
    logits = torch.randn(NUM_IMAGES, NUM_TAGS, generator=generator) + targets
    return logits.mul(4).round().div(4), targets


def batch_of(targets: Tensor, rows: Tensor) -> Batch:
    count = len(targets)
    lengths = targets.sum(dim=1).int()
    return Batch(
        images=torch.zeros(count, 3, 2, 2, dtype=torch.uint8),
        tag_indices=targets.nonzero()[:, 1].int(),
        tag_offsets=torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).int()]),
        row_ids=rows,
        valid_sizes=torch.full((count, 2), 2, dtype=torch.int32),
        mirrored=torch.zeros(count, dtype=torch.bool),
    )


def counted(logits: Tensor, targets: Tensor, order: Tensor | None = None, threshold: float = 0.6) -> MetricComputer:
    order = torch.arange(len(logits)) if order is None else order
    computer = MetricComputer(logits.shape[1], threshold)
    computer.update(logits[order], targets[order], image_ids=order)
    return computer


@pytest.mark.parametrize("size", [7, 90])
def test_tag_details_are_what_counting_by_hand_gives(size: int) -> None:
    logits, targets = made(1)
    computer = counted(logits, targets)
    found = TagDetails([4, 1], NUM_TAGS, computer.logit_thresholds, num_hard=3)
    order = torch.randperm(NUM_IMAGES, generator=torch.Generator().manual_seed(size))
    for rows in order.split(size):
        found.add(batch_of(targets[rows], rows), logits[rows])
    predicted = logits.numpy() >= computer.logit_thresholds
    present = targets.numpy() > 0
    for detail, tag in zip(found.details(computer), (4, 1), strict=True):
        assert (detail.tag, detail.num_images, detail.num_positives) == (tag, NUM_IMAGES, present[:, tag].sum())
        for table, images, other in (
            (detail.missed, present[:, tag] & ~predicted[:, tag], predicted & ~present),
            (detail.wrong, ~present[:, tag] & predicted[:, tag], present & ~predicted),
        ):
            counts, rates = other[images].sum(axis=0), other.mean(axis=0)
            excess = counts - rates * images.sum()
            expected = {t: counts[t] for t in range(NUM_TAGS) if counts[t] and excess[t] > 0}
            assert table.num_images == images.sum()
            assert {each.tag: each.count for each in table.others} == expected
            ranked = [excess[each.tag] for each in table.others]
            assert ranked == sorted(ranked, reverse=True) and tag not in expected
            assert all(each.rate == rates[each.tag] for each in table.others)
        low = sorted((float(logits[row, tag]), row) for row in np.flatnonzero(present[:, tag]).tolist())[:3]
        high = sorted((-float(logits[row, tag]), row) for row in np.flatnonzero(~present[:, tag]).tolist())[:3]
        assert [image.row for image in detail.lowest] == [row for _, row in low]
        assert [image.row for image in detail.highest] == [row for _, row in high]
        assert detail.lowest[0].score == pytest.approx(1 / (1 + np.exp(-low[0][0])), abs=1e-12)
        own = predicted[:, tag]
        assert detail.at_threshold.precision == present[own, tag].mean()


def test_a_long_curve_is_thinned_and_keeps_its_ends() -> None:
    generator = torch.Generator().manual_seed(2)
    targets = (torch.rand(3000, 1, generator=generator) < 0.4).float()
    computer = MetricComputer(1)
    computer.update(torch.randn(3000, 1, generator=generator) + targets, targets)
    (curve,) = computer.curves()
    points = curve_points(curve, 50)
    assert len(curve.logits) > 1000 and 40 <= len(points) <= 50
    assert points[0].predicted == curve.predicted[0] and points[-1].recall == 1
    recalls = [point.recall or 0.0 for point in points]
    assert max(np.diff(recalls)) < 0.05
    at = {float(logit): place for place, logit in enumerate(curve.logits)}
    for point in points:
        place = at[point.logit]
        assert (point.predicted, point.hits) == (curve.predicted[place], curve.hits[place])


def test_a_comparison_is_what_drawing_both_by_hand_gives() -> None:
    logits, targets = made(3)
    better = logits + 0.7 * (targets - 0.3) + torch.randn(logits.shape, generator=torch.Generator().manual_seed(9)) / 4
    order = torch.randperm(NUM_IMAGES, generator=torch.Generator().manual_seed(5))
    found = compare(counted(logits, targets), counted(better, targets, order), map_draws=400)
    halves = [values.half().double().numpy() for values in (logits, better)]
    truth = targets.numpy()

    def mean_ap(scores: np.ndarray, rows: np.ndarray) -> float:
        return float(np.mean(reference_average_precision(scores[rows], *np.nonzero(truth[rows]))))

    everyone = np.arange(NUM_IMAGES)
    score = found.scores["mAP"]
    assert (score.a, score.b) == pytest.approx([mean_ap(half, everyone) for half in halves], abs=1e-12)
    generator = np.random.default_rng(7)
    drawn = [generator.integers(NUM_IMAGES, size=NUM_IMAGES) for _ in range(300)]
    by_hand = np.std([mean_ap(halves[1], rows) - mean_ap(halves[0], rows) for rows in drawn])
    assert score.method == "bootstrap" and score.standard_error == pytest.approx(by_hand, rel=0.2)
    apart = np.hypot(*(np.std([mean_ap(half, rows) for rows in drawn]) for half in halves))
    assert score.standard_error < 0.9 * apart  # pairs say more than two intervals
    taken = [half >= np.log(0.6 / 0.4) for half in halves]

    def micro(told: np.ndarray, rows: np.ndarray) -> float:
        return float(2 * (told & (truth > 0))[rows].sum() / (told[rows].sum() + truth[rows].sum()))

    f1 = found.scores["f1_micro"]
    assert (f1.a, f1.b) == pytest.approx([micro(told, everyone) for told in taken], abs=1e-12)
    by_hand = np.std([micro(taken[1], rows) - micro(taken[0], rows) for rows in drawn])
    assert f1.standard_error == pytest.approx(by_hand, rel=0.2)

    def macro(told: np.ndarray, rows: np.ndarray) -> float:
        hits = (told & (truth > 0))[rows].sum(axis=0)
        return float(np.mean(2 * hits / (told[rows].sum(axis=0) + truth[rows].sum(axis=0))))

    by_hand = np.std([macro(taken[1], rows) - macro(taken[0], rows) for rows in drawn])
    f1 = found.scores["f1_macro"]
    assert (f1.a, f1.b) == pytest.approx([macro(told, everyone) for told in taken], abs=1e-12)
    assert f1.standard_error == pytest.approx(by_hand, rel=0.25)
    assert len(found.won) > len(found.lost)


def test_a_large_comparison_by_influence_agrees_with_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets = made(4)
    better = logits + 0.3 * targets
    sides = counted(logits, targets), counted(better, targets)
    drawn = compare(*sides).scores["mAP"]
    monkeypatch.setattr(intervals, "_DRAWS_AFFORDABLE", 0)
    influence = compare(*sides).scores["mAP"]
    assert influence.method == "influence"
    assert influence.standard_error == pytest.approx(drawn.standard_error, rel=0.3)
    monkeypatch.setattr(intervals, "_INFLUENCES_AFFORDABLE", 60 * NUM_TAGS)
    part = compare(*sides).scores["mAP"]
    assert (part.method, part.num_images) == ("influence of a sample of images", 60)
    assert part.standard_error == pytest.approx(influence.standard_error, rel=0.4)


def test_a_model_against_itself_differs_nowhere() -> None:
    computer = counted(*made(5))
    found = compare(computer, computer)
    for score in found.scores.values():
        assert score.a == score.b and score.difference == 0 and score.standard_error < 1e-12
    assert not found.won and not found.lost


def test_a_comparison_refuses_other_images_and_other_truth() -> None:
    logits, targets = made(6)
    with pytest.raises(InputError, match="both must read the same"):
        compare(counted(logits, targets), counted(logits, targets, torch.arange(80)))
    with pytest.raises(ValueError, match="other tags in the two"):
        compare(counted(logits, targets), counted(logits, 1 - targets))
    with pytest.raises(InputError, match="none in common"):
        common_tags(["a", "b"], [["a"], ["b"]])
    assert common_tags(["b", "a", "c"], [["c", "a", "b"], ["a", "d", "b"]]) == ["b", "a"]


def test_tags_are_numbered_anew() -> None:
    _, targets = made(7)
    batch = batch_of(targets, torch.arange(NUM_IMAGES))
    numbers = torch.tensor([-1, 0, -1, 1, 2, -1])
    again = batch.with_tags(numbers)
    assert torch.equal(again.dense_targets(3), targets[:, [1, 3, 4]])
    assert again.tag_offsets.dtype == batch.tag_offsets.dtype


def test_a_subset_is_stable_as_the_set_grows() -> None:
    ids = np.random.default_rng(0).integers(0, 2**63, 2000).astype(np.uint64)
    few, rows = np.arange(0, 1000, 2), np.arange(2000)
    small = hashed_subset(few, ids, fraction=0.1)
    assert 30 < len(small) < 75 and set(small) == set(hashed_subset(rows, ids, fraction=0.1)) & set(few)
    chosen = hashed_subset(rows, ids, count=25)
    assert len(chosen) == 25 and (np.diff(chosen) > 0).all()
    assert set(hashed_subset(rows, ids, count=10)) < set(chosen)
    assert len(hashed_subset(few, ids, count=10_000)) == len(few)


class OneFolder:
    """What a file of predictions asks of an index."""

    roots = (Path("/pictures"),)
    image_ids = np.arange(1000, dtype=np.uint64)

    def locate(self, row: int) -> tuple[int, str]:
        # The third name has a byte that is no UTF-8.
        return 0, "odd\udcff.png" if row == 2 else f"{row}.png"


INDEX: MetadataIndex = OneFolder()  # type: ignore[assignment]
TAGS = [f"tag {number}" for number in range(NUM_TAGS)]


def write(path: Path, keep: Keep, **more: Any) -> None:
    logits, targets = made(8)
    with PredictionFile(path, INDEX, TAGS, keep, {"part": "val"}, **more) as file:
        for rows in torch.arange(NUM_IMAGES).split(32):
            file.add(batch_of(targets[rows], rows), logits[rows])
        assert not path.exists()
    assert file.num_images == NUM_IMAGES


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("keep", [Keep(), Keep(top=2), Keep(min_score=0.5), Keep(min_score=0.5, top=1)])
def test_predictions_hold_the_scores_that_were_asked_for(
    tmp_path: Path, suffix: str, keep: Keep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tagger.evaluation.predictions._GROUP_ROWS", 40)
    path = tmp_path / f"p{suffix}"
    write(path, keep)
    logits, targets = made(8)
    scores = logits.sigmoid()
    if suffix == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        assert parquet.ParquetFile(path).num_row_groups > 1
        table = parquet.read_table(path)
        header, rows = json.loads(table.schema.metadata[b"tagsmith"]), table.to_pylist()
        if not keep.everything:
            for row in rows:
                row["scores"] = dict(zip(row["scored_tags"], row["scores"], strict=True))
    else:
        header, *rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
        assert rows[2]["image"] == "odd\udcff.png"
    assert header["format_version"] == 1 and header["part"] == "val"
    assert ("vocabulary" in header) == keep.everything
    for row, own, truth in zip(rows, scores, targets, strict=True):
        assert row["tags"] == [TAGS[tag] for tag in truth.nonzero().flatten().tolist()]
        if keep.everything:
            assert row["scores"] == pytest.approx(own.tolist())
            continue
        ranked = sorted(range(NUM_TAGS), key=lambda tag: (-float(own[tag]), tag))
        kept = [tag for tag in ranked if keep.min_score is None or own[tag] >= keep.min_score][: keep.top]
        assert list(row["scores"]) == [TAGS[tag] for tag in kept]
        assert list(row["scores"].values()) == pytest.approx([float(own[tag]) for tag in kept])


def test_ratings_that_exclude_each_other_share_one(tmp_path: Path) -> None:
    write(tmp_path / "p.jsonl", Keep(), exclusive=(0, 1, 2))
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text(encoding="utf-8").splitlines()[1:]]
    assert all(sum(row["scores"][:3]) == pytest.approx(1, abs=1e-5) for row in rows)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_an_interrupted_file_leaves_the_older_one(tmp_path: Path, suffix: str) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    path = tmp_path / f"p{suffix}"
    path.write_bytes(b"older")
    with pytest.raises(KeyboardInterrupt), PredictionFile(path, INDEX, TAGS, Keep(), {}) as file:
        logits, targets = made(8)
        file.add(batch_of(targets[:5], torch.arange(5)), logits[:5])
        raise KeyboardInterrupt
    assert path.read_bytes() == b"older" and list(tmp_path.iterdir()) == [path]
