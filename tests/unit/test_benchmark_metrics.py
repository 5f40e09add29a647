"""The benchmark of metrics measures what it says, on a set small enough for a test."""

import importlib.util

from evaluation_metrics import MetricComputer
from scripts import benchmark_metrics
from tagger.metrics.store import histogram_bytes


def test_a_missing_library_is_said_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert benchmark_metrics.main([]) == 2
    assert capsys.readouterr().err == (
        "error: torchmetrics is not installed; for this benchmark: pip install torchmetrics\n"
    )


def test_batches_differ_from_round_to_round_and_hold_the_same_targets_in_both_forms():
    batches = benchmark_metrics.make_batches(16, 500)
    computers = [MetricComputer(500), MetricComputer(500)]
    benchmark_metrics.ours(batches, computers[0], 0, 4)
    for number in range(4):
        computers[1].update(batches.logits_of(number), batches.dense[number])
    assert computers[0].compute()["mAP"] == computers[1].compute()["mAP"] > 0.1
    assert not bool((batches.logits_of(0) == batches.logits_of(4)).all())


def test_memory_by_formula_is_mostly_the_counts_and_bounded_by_stored_keys():
    large = benchmark_metrics.large_bytes(300_000, 20_000, 36)
    assert large["counts"] == histogram_bytes(20_000) > sum(large.values()) / 2
    assert benchmark_metrics.large_bytes(1000, 20_000, 36)["counts"] == 1000 * 20_000 * 2


def test_small_sets_can_be_measured():
    assert all(value > 0 for value in benchmark_metrics.measure_large(4096, 3))
    mean, largest = benchmark_metrics.rounding_difference(400, 20)
    assert 0 < mean < largest < 0.05
