"""Stored keys and histograms of them give the same numbers to the last bit, in any order and from any process."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import evaluation_metrics
from evaluation_metrics import MetricComputer, predicted_tags
from tagger.errors import DivergedError
from tagger.metrics import store
from tagger.metrics.keys import MAX_KEY, from_keys, lowest_keys, round_logits, to_keys
from tagger.metrics.reference import reference_average_precision

FORMS = ("keys", "histograms")


def random_case(rows: int, tags: int, seed: int, step: float = 0.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.rand(rows, tags, generator=generator) < torch.rand(tags, generator=generator) * 0.6
    logits = torch.randn(rows, tags, generator=generator) * 3 - 2 + 2 * targets
    return ((logits / step).round() * step if step else logits), targets


def computer_of(logits: Tensor, targets: Tensor, form: str = "auto", batch: int = 7, **rest) -> MetricComputer:
    computer = MetricComputer(logits.shape[1], form=form, **rest)
    for start in range(0, len(logits), batch):
        ids = torch.arange(start, min(start + batch, len(logits)))
        computer.update(logits[ids], targets[ids], image_ids=ids)
    return computer


def everything(computer: MetricComputer) -> dict[str, object]:
    """All that is computed, in a form that compares bit for bit."""
    result = {k: v for k, v in computer.compute().items() if k != "average_precision"}
    exact = {k: np.float64(v).tobytes() for k, v in result.items()}
    exact["average_precision"] = computer.compute()["average_precision"].numpy().tobytes()
    for curve in [*computer.curves(), computer.micro_curve()]:
        arrays = (curve.logits, curve.predicted, curve.hits)
        exact[f"curve {curve.tag}"] = (*(a.tobytes() for a in arrays), curve.num_images, curve.num_positives)
    order = np.argsort(computer.per_image("image_ids"), kind="stable")
    for name in ("image_ids", "hits", "predicted", "present"):
        exact[name] = computer.per_image(name)[order].tolist()
    return exact


def test_every_finite_half_has_a_key_of_its_own_in_its_order():
    halves = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.float16)
    finite = halves[halves.isfinite()]
    keys = to_keys(finite).numpy()
    assert (from_keys(keys) == finite.float().numpy()).all()
    assert np.array_equal(np.argsort(keys, kind="stable"), np.argsort(finite.numpy(), kind="stable"))
    assert len(np.unique(keys)) == len(finite) - 1  # -0 is +0
    assert (keys.min(), keys.max()) == (-MAX_KEY, MAX_KEY)


def test_keys_round_as_numpy_does_and_stay_finite():
    logits = torch.tensor([1e6, -1e6, torch.inf, -torch.inf, 65519.9, -0.0, 1e-9, 2.0003])
    expected = np.float32([65504, -65504, 65504, -65504, 65504, 0, 0, np.float16(2.0003)])
    assert round_logits(logits).numpy().tobytes() == expected.tobytes()
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        values = torch.linspace(-30, 30, 999).to(dtype)
        assert np.array_equal(round_logits(values).numpy(), values.float().numpy().astype(np.float16))


@pytest.mark.parametrize("shape", [(3,), (2, 2), (2, 2, 2)])
def test_nan_has_no_key_and_logits_are_left_as_they_were(shape):
    logits = torch.full(shape, -1.0, dtype=torch.float16)
    to_keys(logits)
    assert bool((logits == -1).all())
    logits.view(-1)[-1] = torch.nan
    with pytest.raises(DivergedError, match="logits hold NaN, first at"):
        to_keys(logits)


def test_lowest_key_is_the_first_at_or_above_a_threshold():
    found = lowest_keys([-np.inf, -1e9, 0.0, 1e-12, 1.0, 65504.0, 65504.1, np.inf])
    assert found.tolist() == [-MAX_KEY, -MAX_KEY, 0, 1, int(to_keys(torch.ones(1))), MAX_KEY, MAX_KEY + 1, MAX_KEY + 1]
    with pytest.raises(ValueError, match="NaN"):
        lowest_keys([np.nan])


@given(
    rows=st.integers(1, 40),
    tags=st.integers(1, 6),
    seed=st.integers(0, 2**31),
    step=st.sampled_from([0.0, 0.5, 4.0]),
    sort_below=st.sampled_from([0, 20, 10**9]),
)
@settings(max_examples=40, deadline=None)
def test_both_forms_and_both_ways_of_counting_are_equal_bit_for_bit(rows, tags, seed, step, sort_below):
    logits, targets = random_case(rows, tags, seed, step)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "_SORTED_BELOW", sort_below)
        found = [everything(computer_of(logits, targets, form)) for form in FORMS]
    assert found[0] == found[1]


@given(seed=st.integers(0, 2**31), cuts=st.tuples(st.integers(0, 30), st.integers(0, 30)), order=st.permutations("abc"))
@settings(max_examples=12, deadline=None)
def test_merging_is_associative_and_in_any_order(seed, cuts, order):
    logits, targets = random_case(30, 4, seed, 0.5)
    low, high = sorted(cuts)
    spans = {"a": slice(0, low), "b": slice(low, high), "c": slice(high, 30)}
    whole = everything(computer_of(logits, targets))

    def part(name: str, form: str) -> MetricComputer:
        computer = MetricComputer(4, form=form)
        span = spans[name]
        computer.update(logits[span], targets[span], image_ids=torch.arange(30)[span])
        return computer

    for forms in (("keys", "keys", "keys"), ("keys", "histograms", "keys"), ("histograms", "keys", "histograms")):
        first, second, third = (part(name, form) for name, form in zip(order, forms, strict=True))
        first.merge(second)
        first.merge(third)
        assert everything(first) == whole
        first, second, third = (part(name, form) for name, form in zip(order, forms, strict=True))
        second.merge(third)
        first.merge(second)
        assert everything(first) == whole


@pytest.mark.parametrize("form", FORMS)
def test_two_ranks_give_the_same_as_one_from_plain_arrays(form):
    logits, targets = random_case(100, 9, 3, 0.25)
    ranks = []
    for rank in range(2):
        computer = MetricComputer(9, form=form)
        for start in range(0, 100, 10):
            ids = torch.arange(start, start + 10)[rank::2]
            computer.update(logits[ids], targets[ids], image_ids=ids)
        file = io.BytesIO()
        np.savez(file, **computer.arrays())
        ranks.append(np.load(io.BytesIO(file.getvalue()), allow_pickle=False))
    gathered = MetricComputer(9, form=form)
    for arrays in ranks:
        gathered.add_arrays(arrays)
    assert gathered.num_images == 100
    assert everything(gathered) == everything(computer_of(logits, targets, form))


def test_more_may_follow_what_was_merged():
    logits, targets = random_case(60, 5, 4)
    first, second = computer_of(logits[:20], targets[:20]), MetricComputer(5)
    second.update(logits[20:40], targets[20:40], image_ids=torch.arange(20, 40))
    first.merge(second)
    for computer in (first, second):
        computer.update(logits[40:], targets[40:], image_ids=torch.arange(40, 60))
    assert second.num_images == 40
    assert everything(first) == everything(computer_of(logits, targets))


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_full_blocks_and_cut_batches_change_nothing(monkeypatch, batch):
    logits, targets = random_case(64, 5, 5)
    expected = everything(computer_of(logits, targets))
    for name in ("_BLOCK_BYTES", "_MIN_BLOCK_ROWS"):
        monkeypatch.setattr(store, name, 10)
    monkeypatch.setattr(store, "_KEYS_AT_A_TIME", 100)
    monkeypatch.setattr(evaluation_metrics, "_LOGITS_AT_A_TIME", 12)
    for form in FORMS:
        assert everything(computer_of(logits, targets, form, batch)) == expected


def test_stored_keys_become_histograms_when_those_are_smaller():
    count = store.histogram_bytes(2) // store.stored_bytes(1, 2)
    assert count == 131_072
    logits, targets = random_case(count + 1, 2, 6)
    computer = MetricComputer(2)
    computer.update(logits[:-1], targets[:-1])
    before = everything(computer)
    assert computer.store.form == "keys"
    computer.update(logits[-1:], targets[-1:])
    assert computer.store.form == "histograms"
    assert computer.num_images == computer.store.num_images == count + 1
    whole = MetricComputer(2, expected_images=count + 1)
    assert whole.store.form == "histograms"
    whole.update(logits[:-1], targets[:-1])
    assert everything(whole) == before
    whole.update(logits[-1:], targets[-1:])
    assert everything(computer) == everything(whole)
    sample, tags = computer.store.sample(), np.arange(2)
    assert len(sample.places) == store.SAMPLE_SIZE
    assert np.array_equal(sample.places, whole.store.sample().places)
    assert np.array_equal(sample.columns(tags), to_keys(logits[sample.places]).numpy().T)
    assert MetricComputer(2, expected_images=count).store.form == "keys"


@pytest.mark.parametrize("form", FORMS)
def test_scores_above_the_stated_memory_lie_in_files_that_go(tmp_path, form):
    logits, targets = random_case(30, 3, 7)
    expected = everything(computer_of(logits, targets, form))
    computer = computer_of(logits, targets, form, memory_bytes=1000, folder=tmp_path)
    assert len(list(tmp_path.glob("scores-*/*.bin"))) == 1
    assert everything(computer) == expected
    computer.reset()
    assert list(tmp_path.iterdir()) == []
    computer.update(logits, targets)
    assert len(list(tmp_path.iterdir())) == 1
    del computer
    assert list(tmp_path.iterdir()) == []


def test_the_sample_is_of_the_same_images_in_any_order_and_form():
    logits, targets = random_case(200, 3, 8)
    orders = (torch.arange(200), torch.randperm(200, generator=torch.Generator().manual_seed(1)))
    found = []
    for form in FORMS:
        for order in orders:
            computer = MetricComputer(3, form=form)
            computer.store._sample.size = 20
            for ids in order.split(16):
                computer.update(logits[ids], targets[ids], image_ids=ids)
            sample = computer.store.sample(20)
            ids = computer.per_image("image_ids")[sample.places]
            assert np.array_equal(sample.columns(np.array([2, 0])), to_keys(logits[ids]).numpy().T[[2, 0]])
            found.append(sorted(ids.tolist()))
    assert len(found[0]) == 20
    assert all(ids == found[0] for ids in found)


def test_tags_of_an_image_are_counted_alike_by_numpy_and_torch():
    keys = to_keys(random_case(9, 5, 9)[0])
    lowest = torch.tensor([0, -5000, 15000, MAX_KEY + 1, -MAX_KEY], dtype=torch.int16)
    assert predicted_tags(keys, lowest).tolist() == (keys >= lowest).sum(dim=1).tolist()
    assert predicted_tags(keys, lowest).dtype == torch.int32


def test_counting_as_on_a_device_equals_counting_by_blocks():
    keys = to_keys(random_case(50, 4, 10, 0.5)[0])
    by_blocks, on_device = (store.KeyHistograms(4, store.HostMemory(), torch.device("cpu")) for _ in range(2))
    by_blocks.add(keys)
    for part in keys.split(9):
        on_device._add_on_device(part)
    assert torch.equal(by_blocks.tables(), on_device.tables())


def test_difference_to_float32_scores_is_small():
    logits, targets = random_case(2000, 20, 11)
    exact = reference_average_precision(logits.numpy(), *np.nonzero(targets.numpy()))
    found = computer_of(logits, targets, batch=500).compute()["average_precision"].numpy()
    rounded = reference_average_precision(round_logits(logits).numpy(), *np.nonzero(targets.numpy()))
    np.testing.assert_allclose(found, rounded, rtol=1e-12)
    difference = np.abs(found - exact)
    print(f"AP of 16-bit against float32 scores: mean {difference.mean():.1e}, largest {difference.max():.1e}")
    assert 0 < difference.max() < 5e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("form", FORMS)
def test_a_device_gives_the_same_numbers_and_no_batch_waits_for_it(form):
    """Measures that counting on a device equals counting on the CPU bit for bit, and counts its host syncs: none."""
    logits, targets = random_case(500, 40, 12)
    expected = everything(computer_of(logits, targets, form, 50))
    on_device, computer = logits.cuda(), MetricComputer(40, form=form)
    computer.update(on_device[:50], targets[:50])  # the first batch may allocate
    try:
        torch.cuda.set_sync_debug_mode("error")
        for start in range(50, 500, 50):
            computer.update(on_device[start : start + 50], targets[start : start + 50])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert everything(computer) == expected
    computer.update(on_device * torch.nan, targets)
    with pytest.raises(DivergedError, match="NaN"):
        computer.compute()
