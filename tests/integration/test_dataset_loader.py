import errno
import json
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dataset_loader import (
    DataLoader,
    DatasetLoader,
    LoadOptions,
    SidecarJsonDataset,
    create_dataloaders,
    create_part_loader,
    split_dataset,
)
from tagger.data import image_reader
from tagger.data.decode import decode_image
from tagger.data.position import PositionError
from tagger.data.quarantine import FailureBudget, FileFacts, read_with_facts
from tagger.data.split import Part, SplitError
from tagger.errors import DataFailureError
from tagger.preprocess import Preprocess
from tests.tiny_dataset import NUM_IMAGES, assert_same, configure, epoch_of, loaders, path_of, rows_of


def test_a_batch_holds_what_the_files_hold(root: Path) -> None:
    train, _, vocabulary = loaders(root)
    index = train.dataset.index
    preprocess = Preprocess(image_size=32)
    for batch, _ in epoch_of(train):
        assert batch.images.dtype == torch.uint8 and batch.images.shape == (8, 3, 32, 32)
        assert batch.tag_indices.dtype == batch.tag_offsets.dtype == torch.int32
        assert batch.row_ids.dtype == torch.int64 and batch.valid_sizes.dtype == torch.int32
        assert batch.mirrored.dtype == torch.bool
        for place, row in enumerate(batch.row_ids.tolist()):
            image, size = preprocess.apply(decode_image(index.image_path(row).read_bytes(), max_pixels=10**6))
            mirrored = bool(batch.mirrored[place])
            assert torch.equal(batch.images[place], image.flip(-1) if mirrored else image)
            assert tuple(batch.valid_sizes[place].tolist()) == size
            record = index.record(row)
            names = {*record.tags, f"rating:{record.rating}"}
            if mirrored:
                swap = {"arrow left": "arrow right", "arrow right": "arrow left"}
                names = {swap.get(name, name) for name in names}
            found = batch.tag_lists()[place]
            assert found == tuple(sorted(vocabulary.index(name) for name in names))


def test_positions_travel_as_json(root: Path) -> None:
    train, validation, _ = loaders(root)
    for loader in (train, validation):
        for _, position in epoch_of(loader):
            assert json.loads(json.dumps(position)) == position


@pytest.mark.parametrize("num_threads", [1, 2, 7])
def test_the_same_seed_and_epoch_give_the_same_bytes(root: Path, num_threads: int) -> None:
    reference, _, _ = loaders(root)
    other, _, _ = loaders(root, data__num_threads=num_threads, data__prefetch_batches=2)
    for epoch in (0, 3):
        assert_same(epoch_of(other, epoch), epoch_of(reference, epoch))


def test_epochs_and_seeds_differ(root: Path) -> None:
    train, _, _ = loaders(root)
    other, _, _ = loaders(root, training__seed=6)
    orders = [tuple(rows_of(epoch_of(train, epoch))) for epoch in range(4)]
    assert len(set(orders)) == 4
    assert tuple(rows_of(epoch_of(other, 0))) not in orders
    assert tuple(rows_of(epoch_of(train, 2))) == orders[2]


def test_an_epoch_serves_each_training_row_at_most_once_and_no_validation_row(root: Path) -> None:
    train, validation, _ = loaders(root)
    held_out = rows_of(epoch_of(validation))
    assert held_out == sorted(held_out) and len(held_out) == validation.num_rows
    for epoch in range(3):
        served = rows_of(epoch_of(train, epoch))
        assert len(served) == len(set(served)) == train.num_rows // 8 * 8
        assert not set(served) & set(held_out)
    assert train.num_rows + validation.num_rows == NUM_IMAGES


def test_a_held_out_row_cannot_be_served(root: Path) -> None:
    train, validation, _ = loaders(root)
    source = train._source
    with pytest.raises(ValueError, match="1 of the 2 rows to serve are held out"):
        rows = np.array([train._source.sampler.rows[0], validation._source.sampler.rows[0]])
        DataLoader(train.dataset, rows, 2, train.options, split=train.split, seed=1)
    object.__setattr__(source.sampler, "rows", validation._source.sampler.rows)
    with pytest.raises(AssertionError, match="held out"):
        next(iter(train))


@pytest.mark.parametrize("consumed", [1, 3])
def test_resume_continues_bitwise(root: Path, consumed: int) -> None:
    train, _, _ = loaders(root)
    whole = epoch_of(train, 2)
    resumed, _, _ = loaders(root, data__num_threads=1)
    resumed.seek(whole[consumed - 1][1])
    assert resumed.batches_remaining == len(whole) - consumed
    assert_same(list(resumed), whole[consumed:])


def test_a_seek_stands_when_its_epoch_is_set_and_lasts_for_one_pass(root: Path) -> None:
    train, _, _ = loaders(root)
    whole = epoch_of(train, 2)
    resumed, _, _ = loaders(root)
    resumed.seek(whole[0][1])
    resumed.set_epoch(2)
    assert_same(list(resumed), whole[1:])
    assert_same(list(resumed), whole)
    resumed.seek(whole[0][1])
    assert_same(epoch_of(resumed, 3), epoch_of(train, 3))


def test_resume_at_another_batch_size_continues_with_the_next_sample(root: Path) -> None:
    train, _, _ = loaders(root)
    whole = epoch_of(train, 1)
    resumed, _, _ = loaders(root, training__batch_size=5)
    resumed.seek(whole[1][1])
    batches = list(resumed)
    order = train._source.sampler.rows_at(1, 0, train.num_rows).tolist()
    assert rows_of(batches) == order[16 : 16 + 5 * len(batches)]
    assert all(len(batch) == 5 for batch, _ in batches)
    assert batches[-1][1]["samples"] == 16 + 5 * len(batches)


def test_the_end_of_an_epoch_is_a_position_too(root: Path) -> None:
    train, _, _ = loaders(root)
    train.seek(epoch_of(train, 1)[-1][1])
    assert train.batches_remaining == 0
    assert list(train) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 6}, r"training\.seed 6 there, 5 here"),
        ({"rows": 7}, "number of images 7 there"),
        ({"rows_hash": 1}, r"images or split \(hash\) 1 there"),
        ({"samples": 1000}, "samples=1000"),
        ({"samples": -1}, "samples=-1"),
        ({"epoch": -1}, "epoch=-1"),
        ({"epoch": "1"}, "not a position"),
        ({"step": 1}, "not a position"),
    ],
)
def test_a_position_of_another_order_is_refused_by_name(root: Path, change: dict[str, int], message: str) -> None:
    train, _, _ = loaders(root)
    position = next(iter(train))[1]
    with pytest.raises(PositionError, match=message):
        train.seek(position | change)


def test_training_leaves_out_its_last_incomplete_batch_and_validation_keeps_it(root: Path) -> None:
    train, validation, _ = loaders(root, data__val_fraction=0.3, training__batch_size=7, validation__batch_size=4)
    assert train.num_rows % 7 and validation.num_rows % 4
    sizes = [len(batch) for batch, _ in epoch_of(train)]
    assert sizes == [7] * (train.num_rows // 7) and len(train) == len(sizes)
    sizes = [len(batch) for batch, _ in epoch_of(validation)]
    assert sum(sizes) == validation.num_rows and sizes[-1] == validation.num_rows % 4 and len(validation) == len(sizes)


def test_fewer_rows_than_a_batch_are_one_batch(root: Path) -> None:
    train, _, _ = loaders(root, training__batch_size=500)
    ((batch, position),) = epoch_of(train)
    assert len(batch) == train.num_rows == position["samples"] and len(train) == 1
    assert sorted(batch.row_ids.tolist()) == train._source.sampler.rows.tolist()
    train.seek(position)
    assert train.batches_remaining == 0


def test_a_batch_that_is_kept_does_not_change(root: Path) -> None:
    train, _, _ = loaders(root)
    kept: list[torch.Tensor] = []
    copies: list[torch.Tensor] = []
    for epoch in range(3):
        for batch, _ in epoch_of(train, epoch):
            kept.append(batch.images)
            copies.append(batch.images.clone())
    assert all(torch.equal(image, copy) for image, copy in zip(kept, copies, strict=True))


def test_leaving_the_loop_leaves_no_thread(root: Path) -> None:
    train, _, _ = loaders(root)
    for _ in train:
        break
    iterator = iter(train)
    next(iterator)
    del iterator, _
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loader-")]


def test_the_wait_for_data_is_measured(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, _, _ = loaders(root)

    def slow(path: Path, *args: object) -> tuple[bytes, FileFacts]:
        time.sleep(0.005)
        return read_with_facts(path, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(image_reader, "read_with_facts", slow)
    assert train.wait_seconds == 0
    epoch_of(train)
    assert 0 < train.wait_seconds < 10


# Refused images


def break_files(loader: DataLoader, count: int) -> set[int]:
    rows = loader._source.sampler.rows[:count].tolist()
    for place, row in enumerate(rows):
        path = path_of(loader, row)
        if place % 2:
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:100])
    return set(rows)


def test_a_refused_image_is_replaced_recorded_and_never_zeros(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    train, _, _ = loaders(root, orientation__mirror_probability=0)
    expected = {
        row: batch.images[i].clone() for batch, _ in epoch_of(train) for i, row in enumerate(batch.row_ids.tolist())
    }
    planned = rows_of(epoch_of(train))
    broken = break_files(train, 8) & set(planned)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        batches = epoch_of(train)
    served = rows_of(batches)
    assert len(served) == len(planned)
    for before, after in zip(planned, served, strict=True):
        assert after not in broken
        assert before == after or before in broken
    for batch, _ in batches:
        assert len(set(batch.row_ids.tolist())) == len(batch)
        for place, row in enumerate(batch.row_ids.tolist()):
            if row in expected:
                assert torch.equal(batch.images[place], expected[row])
    assert train.refused == len(train.refusals) >= len(broken)
    assert {refusal.reason for refusal in train.refusals} <= {"truncated", "missing", "damaged WebP", "damaged JPEG"}
    said = [record.message for record in caplog.records if record.message.startswith("left out of training: ")]
    assert len(said) == train.refused
    assert "images left out of training or used in part, so far: " in caplog.text


def test_stand_ins_are_the_same_for_any_threads_and_after_resume(root: Path) -> None:
    train, _, _ = loaders(root)
    other, _, _ = loaders(root, data__num_threads=1)
    broken = break_files(train, 12)
    whole = epoch_of(train, 1)
    assert not set(rows_of(whole)) & broken
    other.seek(whole[1][1])
    assert_same(list(other), whole[2:])


def test_validation_leaves_a_refused_image_out(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, validation, _ = loaders(root, validation__batch_size=3)
    rows = rows_of(epoch_of(validation))
    broken = break_files(validation, 4)  # the whole first batch, and one image of the second
    batches = epoch_of(validation)
    assert rows_of(batches) == [row for row in rows if row not in broken]
    assert len(batches[0][0]) == 2
    assert len(batches) == len(validation) - 1
    for batch, _ in batches:
        assert len(batch.images) == len(batch.tag_offsets) - 1 == len(batch.valid_sizes) == len(batch)
    assert validation.refused == 4
    assert caplog.text.count("left out of validation: ") == 4


def test_a_folder_of_broken_images_stops_with_reasons_and_paths(root: Path) -> None:
    train, _, _ = loaders(root)
    for path in root.rglob("*.*"):
        if path.suffix != ".json":
            path.write_bytes(b"not a picture")
    with pytest.raises(DataFailureError, match=r"50 images in a row were refused: not an image.*img0") as caught:
        epoch_of(train)
    assert str(caught.value).count(str(root)) == 5


def test_the_budget_of_a_loader_stops_it(root: Path) -> None:
    train, _, _ = loaders(root)
    source = train._source
    break_files(train, 3)
    budget = FailureBudget(60, min_seen=1, max_fraction=0.02)
    strict = DataLoader(train.dataset, source.sampler.rows, 8, train.options, seed=1, budget=budget)
    with pytest.raises(DataFailureError, match=r"of \d+ images were refused"):
        epoch_of(strict)


def test_transient_errors_are_waited_out_and_blamed_on_nobody(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, _, _ = loaders(root)
    expected = epoch_of(train)
    lock, failures, calls = threading.Lock(), 0, 0

    def flaky(path: Path, *args: Any) -> tuple[bytes, FileFacts]:
        nonlocal failures, calls
        with lock:
            calls += 1
            fail = calls % 5 == 0
            failures += fail
        if fail:
            raise OSError((errno.EIO, errno.ESTALE, errno.EMFILE)[failures % 3], "injected")
        return read_with_facts(path, *args)

    monkeypatch.setattr(image_reader, "read_with_facts", flaky)
    assert_same(epoch_of(train), expected)
    assert failures > 5
    assert train.refused == 0


# Other sources and bad input


def test_an_annotation_file_gives_the_same_batches_as_sidecars(root: Path, tmp_path: Path) -> None:
    train, _, vocabulary = loaders(root, data__extra_fields=[])
    entries = []
    for path in sorted(root.rglob("*.json")):
        entry = json.loads(path.read_text())
        entry["filename"] = str((path.parent / entry["filename"]).relative_to(root))
        entries.append({key: entry[key] for key in ("filename", "tags", "rating")})
        path.unlink()
    annotations = tmp_path / "tags.jsonl"
    annotations.write_text("\n".join(map(json.dumps, entries)))
    config = configure(root, data__annotations=str(annotations), data__extra_fields=[])
    other, _ = create_dataloaders(config, vocabulary)
    assert_same(epoch_of(other), epoch_of(train))


def test_the_datasets_open_their_own_index(root: Path, tmp_path: Path) -> None:
    train, _, vocabulary = loaders(root, data__extra_fields=[])
    sidecars = SidecarJsonDataset([root], vocabulary, index_dir=tmp_path / "other")
    assert len(sidecars) == NUM_IMAGES
    annotations = tmp_path / "tags.json"
    annotations.write_text(json.dumps({"even/img000.jpg": ["circle", "nowhere in the vocabulary"]}))
    listed = DatasetLoader(annotations, root, vocabulary, index_dir=tmp_path / "other")
    assert len(listed) == 1
    loader = DataLoader(listed, np.arange(1), 4, LoadOptions(Preprocess(image_size=32)))
    ((batch, _),) = list(loader)
    assert batch.tag_lists() == ((vocabulary.index("circle"),),)
    assert len(train) > 0


def test_a_validation_list_is_followed_whatever_the_seed(root: Path, tmp_path: Path) -> None:
    val_list = tmp_path / "val.txt"
    val_list.write_text("img003\neven/img010\nodd/img012\n")
    for seed in (1, 2):
        _, validation, _ = loaders(root, data__val_list=str(val_list), training__seed=seed)
        assert [path_of(validation, row).stem for row in rows_of(epoch_of(validation))] == ["img010", "img003"]


@pytest.mark.parametrize("grouped", [False, True])
def test_calibration_and_test_images_are_served_to_neither_loader(root: Path, grouped: bool) -> None:
    settings = {"data__calib_fraction": 0.2, "data__test_fraction": 0.2, "data__group_near_duplicates": grouped}
    train, validation, _ = loaders(root, training__batch_size=4, **settings)
    split = split_dataset(configure(root, **settings).data, train.dataset.index)
    served = set(rows_of(epoch_of(train))) | set(rows_of(epoch_of(train, 1)))
    assert served == set(split.training_rows.tolist())
    assert rows_of(epoch_of(validation)) == split.validation_rows.tolist()
    held_out = np.concatenate([split.rows(Part.CALIB), split.rows(Part.TEST)])
    assert len(held_out) > 10 and not served & set(held_out.tolist())
    with pytest.raises(ValueError, match="held out"):
        DataLoader(train.dataset, held_out, 4, train.options, split=split)
    with pytest.raises(ValueError, match="held out"):
        DataLoader(train.dataset, split.validation_rows, 4, train.options, split=split, seed=1)


def test_an_empty_side_says_what_to_change(root: Path) -> None:
    with pytest.raises(SplitError, match=r"data\.val_fraction=1e-06 .*raise data\.val_fraction"):
        loaders(root, data__val_fraction=1e-6)


def test_no_rows_are_refused(root: Path) -> None:
    train, _, _ = loaders(root)
    with pytest.raises(ValueError, match="0 rows"):
        DataLoader(train.dataset, np.arange(0), 4, train.options)


INTERRUPTED = """
import signal, sys, threading, time
from pathlib import Path
import numpy as np
from dataset_loader import DataLoader, LoadOptions, SidecarJsonDataset
from tagger.preprocess import Preprocess
from vocabulary import TagVocabulary

dataset = SidecarJsonDataset([sys.argv[1]], TagVocabulary(["circle"], [1], ["general"]), index_dir=sys.argv[2])
loader = DataLoader(dataset, np.arange(len(dataset)), 2, LoadOptions(Preprocess(image_size=32)), seed=1)
batches = iter(loader)
next(batches)
if sys.argv[3] == "exit":
    sys.exit(0)
threading.Timer(0.3, lambda: signal.raise_signal(signal.SIGINT)).start()
try:
    while True:
        for _ in loader:
            time.sleep(0.01)
except KeyboardInterrupt:
    del batches
    print(sum(thread.name.startswith("loader-") for thread in threading.enumerate()))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("how", "printed"), [("ctrl-c", "0"), ("exit", "")])
def test_ctrl_c_and_exit_end_the_process_cleanly(root: Path, tmp_path: Path, how: str, printed: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [sys.executable, "-c", INTERRUPTED, str(root), str(tmp_path / "index"), how]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (run.returncode, run.stdout.strip(), run.stderr) == (0, printed, "")


def test_every_part_has_a_loader_of_its_own_rows_alone(drawn: Path) -> None:
    train, validation, _ = loaders(drawn, data__calib_fraction=0.2, data__test_fraction=0.15)
    split = validation.split
    assert split is not None and train.split is split and (train.part, validation.part) == (Part.TRAIN, Part.VAL)
    served = {Part.VAL: sorted(rows_of(epoch_of(validation)))}
    for part in (Part.CALIB, Part.TEST, Part.TRAIN):
        loader = create_part_loader(validation, part)
        assert loader.part == part and loader.split is split
        served[part] = rows_of(epoch_of(loader))
        assert served[part] == sorted(served[part]) == split.rows(part).tolist()
    assert sorted(row for rows in served.values() for row in rows) == list(range(NUM_IMAGES))


@pytest.mark.parametrize("part", [Part.CALIB, Part.TEST])
def test_a_row_of_another_part_is_refused_by_a_part_loader(drawn: Path, part: Part) -> None:
    _, validation, _ = loaders(drawn, data__calib_fraction=0.2, data__test_fraction=0.15)
    split = validation.split
    assert split is not None
    for other in Part:
        if other not in {part, Part.UNUSED}:  # nobody is unused here
            planted = np.append(split.rows(part), split.rows(other)[0])
            with pytest.raises(ValueError, match=r"1 of the .* rows to serve are held out"):
                DataLoader(validation.dataset, planted, 4, validation.options, split=split)


def test_a_part_that_was_not_set_aside_says_what_to_set(drawn: Path) -> None:
    _, validation, _ = loaders(drawn)
    with pytest.raises(SplitError, match=r"no image is held out for calibration; set data\.calib_fraction"):
        create_part_loader(validation, Part.CALIB)
