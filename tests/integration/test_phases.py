"""Phases of a run: what each of them serves and trains with, what is logged, and how a changed recipe goes on."""

import dataclasses
from pathlib import Path

import orjson
import pytest
import torch
from torch import Tensor

import start_up
import train_direct
import training_phases
from Configuration_System import AugmentOperation, AugmentSection, FullConfig, PhaseSection, load_config
from tagger.artifact import load_artifact
from tagger.config_io import ConfigError, save_yaml
from tagger.data.phases import PhasePlan
from tagger.data.windows import Feed, Window, accumulation_windows
from tagger.preprocess import Preprocess
from tests.tiny_dataset import assert_same, epoch_of, loaders

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "configs" / "unified_config.yaml"
# 45 training images.
SMALL = (
    "data.image_size=32",
    "data.val_fraction=0.2",
    "data.num_threads=1",
    "vocabulary.min_frequency=1",
    "model.preset=vit_tiny",
    "model.patch_size=8",
    "model.embed_dim=16",
    "model.depth=1",
    "model.num_heads=2",
    "training.device=cpu",
    "training.batch_size=4",
    "training.num_epochs=3",
    "monitor.log_every_steps=1",
    "monitor.tensorboard=false",
)
LAST = "{image_size: 32, learning_rate_factor: 0.5}"
FIRST = "{image_size: 16, share: 0.5, patch_dropout: 0.5, augment: {brightness: {probability: 1, strength: 0.2}}}"


def phases_of(*words: str) -> tuple[training_phases.Phase, ...]:
    return training_phases.resolve_phases(load_config(RECIPE, words, environment={}))


def test_without_phases_a_run_has_one_that_is_the_recipe() -> None:
    (phase,) = phases_of("training.batch_size=24", "data.image_size=96", "model.patch_dropout=0.25")
    assert phase == training_phases.Phase(96, 1.0, 24, 1.0, 0.25, AugmentSection())
    assert phases_of("training.phases=null") == phases_of("training.phases=[]") == phases_of()


def test_what_a_phase_leaves_open_comes_from_the_recipe_and_its_batches_have_as_many_patches() -> None:
    blur = "augment: {blur: {probability: 0.5, strength: 2}}"
    first, second = phases_of(
        f"training.phases=[{{image_size: 112, share: 0.8, patch_dropout: 0, {blur}}}, {{image_size: 224}}]",
        "training.batch_size=10",
        "model.patch_dropout=0.25",
        "augment.rotation={probability: 1, strength: 5}",
    )
    assert (first.batch_size, first.patch_dropout) == (40, 0.0)
    assert first.augment == AugmentSection(blur=AugmentOperation(0.5, 2.0))
    assert (second.batch_size, second.patch_dropout) == (10, 0.25)
    assert second.share == pytest.approx(0.2)
    assert second.augment == AugmentSection(rotation=AugmentOperation(1.0, 5.0))


def test_the_rule_of_learning_rates_by_batch_size_holds_in_every_phase() -> None:
    words = (
        "training.phases=[{image_size: 112, share: 0.5}, {image_size: 224, learning_rate_factor: 3}]",
        "training.batch_size=16",
    )
    assert [phase.learning_rate_factor for phase in phases_of(*words)] == [1.0, 3.0]
    assert [p.learning_rate_factor for p in phases_of(*words, "optimizer.base_batch_size=64")] == [2.0, 3.0]


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ("[{image_size: 100, share: 0.5}, {image_size: 224}]", "phase 1=100 is not a multiple of model.patch_size=16"),
        ("[{image_size: 112, share: 0.5}, {image_size: 208}]", "phase 2=208 is not data.image_size=224; the last"),
        ("[{image_size: 448, share: 0.5}, {image_size: 224}]", "phase 1=448 is above data.image_size=224; the last"),
        ("[{image_size: 112}, {image_size: 224}]", "phase 1 of 2 has no share of the images; give it one"),
        ("[{image_size: 112, share: 0.5}, {image_size: 224, share: 0.4}]", "the shares are 0.9 together; lower them"),
        ("[{image_size: 112, share: 0.6}, {image_size: 112, share: 0.4}, {image_size: 224}]", "shares are 1 together"),
        ("[{image_size: 112, share: 1.5}, {image_size: 224}]", "training.phases, item 1: share=1.5 is not above 0 and"),
        ("[{image_size: 112, share: 0.5}, {image_size: 224, batch_size: 0}]", "item 2: batch_size=0 is not"),
        ("[{image_size: 224, augment: {blur: {probability: 2, strength: 1}}}]", "item 1: augment.blur.probability=2"),
        ("[{image_size: 224, augment: {blur: {probability: 1}}}]", "blur.strength must be set too"),
        ("[{image_size: 112, share: 1.0}, {image_size: 224}]", "the shares are 1 together"),
        ("[{share: 0.5}, {image_size: 224}]", "training.phases, item 1 has no image_size; write it as in image_size:"),
        ("[{image_sice: 112}]", "training.phases, item 1: unknown setting 'image_sice'; did you mean 'image_size'?"),
        ("[{image_size: 224, augment: {blurr: null}}]", "unknown setting 'augment.blurr'; did you mean 'augment.blur'"),
        ("[224]", "is not a list of groups of settings; write it as training.phases=[{image_size: ..., share: ..."),
        ("224", "is not a list of groups of settings; write it as training.phases=[{image_size: ..., share: ..."),
        ("[{image_size: 112, share: half}, {image_size: 224}]", "item 1: share=half is not a number or null; write"),
    ],
)  # fmt: skip
def test_phases_that_make_no_run_are_refused_with_what_to_do(phases: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(RECIPE, [f"training.phases={phases}"], environment={})
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_single_phase_may_say_that_it_has_all_images() -> None:
    assert phases_of("training.phases=[{image_size: 224, share: 1.0}]") == phases_of()


def test_a_phase_too_small_for_buckets_is_refused() -> None:
    words = ["data.fit=buckets", "training.phases=[{image_size: 32, share: 0.5}, {image_size: 224}]"]
    with pytest.raises(ConfigError, match=r"at least 3 patches a side; .*phase 1=32 has 2"):
        load_config(RECIPE, words, environment={})


@pytest.mark.parametrize(
    ("fit", "num_processes"), [("letterbox", 0), ("buckets", 0), pytest.param("letterbox", 1, marks=pytest.mark.slow)]
)
def test_a_resized_loader_serves_the_same_images_as_one_made_at_that_size(
    drawn: Path, fit: str, num_processes: int
) -> None:
    options = {"data__fit": fit, "data__num_processes": num_processes, "model__patch_size": 8}
    train, _, _ = loaders(drawn, **options)
    small, _, _ = loaders(drawn, data__image_size=24, training__batch_size=6, **options)
    resized = train.resized(Preprocess.create(24, fit, 8), 6)  # type: ignore[arg-type]
    try:
        whole = epoch_of(resized, 1)
        assert_same(whole, epoch_of(small, 1))
        # Positions of either are positions of the other, and the loader it came from is as it was.
        train.seek(whole[1][1])
        assert (train.preprocess.image_size, train.batches_remaining) == (32, len(train.order.rest(1, whole[1][1])))
        assert len(resized) == len(whole) != len(train)
    finally:
        for loader in (train, small, resized):
            loader.close()


@pytest.mark.slow
def test_processes_of_a_phase_that_ends_inside_an_epoch_end_with_it(drawn: Path) -> None:
    served = []
    for num_processes in (0, 1):
        train, _, _ = loaders(drawn, data__num_processes=num_processes, training__batch_size=4)
        small = train.resized(Preprocess.create(16, "letterbox", 8), 8)
        feed = Feed([small, train], PhasePlan.create([0.3, 0.7], 1, [small.order, train.order]), 1)
        rings = []
        windows = []
        for window in accumulation_windows(feed, None, 0):
            windows.append((window.phase, window.position, [batch.images.clone() for batch in window.batches]))
            rings.append((small._ring is not None, train._ring is not None))
        assert {phase for phase, *_ in windows} == {0, 1}
        of_processes = [(phase == 0, phase == 1) for phase, *_ in windows]
        assert rings == (of_processes if num_processes else [(False, False)] * len(windows))
        feed.close()
        served.append(windows)
    for (_, position, images), (_, other_position, others) in zip(*served, strict=True):
        assert position == other_position
        assert all(torch.equal(mine, other) for mine, other in zip(images, others, strict=True))


def arguments(images: Path, runs: Path, name: str, *more: str) -> list[str]:
    words = [f"data.roots=[{images}]", f"data.index_dir={images.parent / 'index'}", f"run.output_dir={runs}"]
    return ["--config", str(RECIPE), *SMALL, *words, f"run.name={name}", *more]


@dataclasses.dataclass(frozen=True)
class Update:
    """What an update was made with."""

    shapes: list[tuple[int, ...]]
    patch_dropout: float
    learning_rate: float
    rows: list[int]


def recorded(patch: pytest.MonkeyPatch) -> list[Update]:
    """The updates of the runs that follow."""
    updates: list[Update] = []
    inner = train_direct.train_step

    def step(parts: start_up.Parts, window: Window) -> tuple[Tensor, Tensor, Tensor]:
        result = inner(parts, window)
        shapes = [tuple(batch.images.shape) for batch in window.batches]
        rows = [row for batch in window.batches for row in batch.row_ids.tolist()]
        rate = float(parts.state.optimizer.param_groups[0]["lr"]) / parts.schedule.factor(parts.state.step)
        updates.append(Update(shapes, parts.model.patch_dropout, rate, rows))
        return result

    patch.setattr(train_direct, "train_step", step)
    return updates


def test_each_phase_trains_as_it_says_and_the_model_is_of_the_last_size(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    updates = recorded(monkeypatch)
    assert train_direct.main(arguments(images, tmp_path, "run", f"training.phases=[{FIRST}, {LAST}]")) == 0
    first = [u for u in updates if u.shapes[0][2:] == (16, 16)]
    second = updates[len(first) :]
    assert {(u.shapes[0], u.patch_dropout) for u in first} == {((16, 3, 16, 16), 0.5)}
    assert {(u.shapes[0], u.patch_dropout) for u in second} == {((4, 3, 32, 32), 0.0)}
    assert [u.learning_rate for u in first] == pytest.approx([1e-3] * len(first))
    assert [u.learning_rate for u in second] == pytest.approx([5e-4] * len(second))
    # The second epoch changes its size on the way, and no image comes twice in it.
    assert (len(first), len(second)) == (4, 3 + 11)
    seen = [row for u in updates[2:7] for row in u.rows]
    assert len(seen) == len(set(seen)) == 44
    lines = [orjson.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_bytes().splitlines()]
    logged = [line["train/image_size"] for line in lines if "train/loss" in line]
    assert logged == [16] * len(first) + [32] * len(second)
    artifact = load_artifact(tmp_path / "run" / "model")
    assert artifact.preprocess.image_size == 32


def test_a_changed_recipe_goes_on_by_its_own_plan_and_says_what_moved(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    words = [f"training.phases=[{FIRST}, {LAST}]", "checkpoint.every_steps=1"]
    updates = recorded(monkeypatch)
    assert train_direct.main(arguments(images, tmp_path, "run", *words, "training.num_epochs=2")) == 0
    before = len(updates)
    assert updates[-1].shapes[0][2] == 32
    caplog.clear()
    more = arguments(images, tmp_path, "run", *words, "training.num_epochs=8", "--resume", "latest")
    assert train_direct.main(more) == 0
    text = caplog.text
    assert "this place in the run was in the phase of 32 px and is in that of 16 px now" in text
    assert "phase 1 of 2: 16 px in batches of 16, from 0 epochs on; 4 updates to come" in text
    assert "phase 2 of 2: 32 px in batches of 4, from 4 epochs on; 44 updates to come" in text
    assert [u.shapes[0][2] for u in updates[before:]] == [16] * 4 + [32] * 44


def test_a_resume_with_the_same_recipe_is_silent_about_phases(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = [f"training.phases=[{FIRST}, {LAST}]", "training.num_epochs=2"]
    assert train_direct.main(arguments(images, tmp_path, "run", *words)) == 0
    caplog.clear()
    assert train_direct.main(arguments(images, tmp_path, "run", *words, "--resume", "latest")) == 0
    assert "this place in the run" not in caplog.text and "changed since" not in caplog.text


def test_saved_phases_are_read_back(tmp_path: Path) -> None:
    config = load_config(RECIPE, [f"training.phases=[{FIRST}, {LAST}]", "data.image_size=32"], environment={})
    assert config.training.phases[0] == PhaseSection(
        16, 0.5, None, 1.0, 0.5, AugmentSection(brightness=AugmentOperation(1.0, 0.2))
    )
    save_yaml(config, tmp_path / "config.yaml")
    again: FullConfig = load_config(tmp_path / "config.yaml", environment={})
    assert again == config


def learning_rates(folder: Path) -> dict[int, float]:
    lines = [orjson.loads(line) for line in (folder / "metrics.jsonl").read_bytes().splitlines()]
    return {int(line["step"]): line["train/learning_rate"] for line in lines if "train/loss" in line}


@pytest.mark.parametrize(
    ("changed", "same_place"),
    # Two updates of phase 1 make an epoch, with the smaller batches five.
    [("training.batch_size=2", 3 * 5 + 2), ("training.num_epochs=6", 3 * 2 + 1)],
)
def test_an_end_that_moves_leaves_the_learning_rate_where_a_run_of_the_new_plan_would_have_it(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str, same_place: int
) -> None:
    # Four of five epochs are at the small size, and make eight of nineteen updates.
    phases = "training.phases=[{image_size: 16, share: 0.8}, {image_size: 32}]"
    words = [phases, "training.num_epochs=5", "scheduler.warmup_fraction=0"]
    inner = train_direct.train_step

    def stopping(parts: start_up.Parts, window: Window) -> tuple[Tensor, Tensor, Tensor]:
        if parts.state.step == 6:
            parts.folder.stop_path.touch()
            parts.stop._looked_at = 0.0
        return inner(parts, window)

    with monkeypatch.context() as patch:
        patch.setattr(train_direct, "train_step", stopping)
        assert train_direct.main(arguments(images, tmp_path, "run", *words)) == 0
    assert max(learning_rates(tmp_path / "run")) == 7
    assert train_direct.main(arguments(images, tmp_path, "run", *words, changed, "--resume", "latest")) == 0
    assert train_direct.main(arguments(images, tmp_path, "straight", *words, changed)) == 0
    rates, straight = learning_rates(tmp_path / "run"), learning_rates(tmp_path / "straight")
    assert [rates[step] for step in range(8, max(rates) + 1)] == pytest.approx(
        [straight[step] for step in range(same_place + 1, max(straight) + 1)], rel=1e-9
    )


BUCKETS = ("data.fit=buckets", "data.image_size=32", "model.patch_size=8")


def buckets_of(first: float) -> tuple[str, ...]:
    """45 images, whose buckets have one window an epoch: phases begin where epochs do."""
    return (*BUCKETS, f"training.phases=[{{image_size: 24, share: {first}}}, {{image_size: 32}}]")


@pytest.mark.parametrize(
    ("words", "item", "place"),
    [
        ((*buckets_of(0.9), "training.num_epochs=3"), "item 2 of 2", "from 2.7 to 3 of 3 epochs and goes from 3 to 3"),
        ((*buckets_of(0.1), "training.num_epochs=3"), "item 1 of 2", "from 0 to 0.3 of 3 epochs and goes from 0 to 0"),
        (
            ("training.phases=[{image_size: 16, share: 0.99}, {image_size: 32}]",),
            "item 2 of 2",
            "from 2.97 to 3 of 3 epochs",
        ),
    ],
)
def test_a_phase_without_an_update_is_refused(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], item: str, place: str
) -> None:
    assert train_direct.main(arguments(images, tmp_path, "run", *words)) == 2
    (line,) = [each for each in capsys.readouterr().err.splitlines() if each.startswith("error: ")]
    assert f"training.phases, {item}: no update is left" in line and place in line and "fewer phases" in line
    assert not (tmp_path / "run").exists()


def test_a_phase_that_begins_far_from_its_place_is_told_and_one_that_is_over_is_not(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = buckets_of(0.4)
    assert train_direct.main(arguments(images, tmp_path, "run", *words, "training.num_epochs=3")) == 0
    assert "item 2 of 2 begins at 1 epochs and not at 1.2, as the shares say" in caplog.text
    caplog.clear()
    # Of four epochs phase 2 would begin after 2 and not 1.6, which is behind the run.
    more = (*words, "training.num_epochs=4", "--resume", "latest")
    assert train_direct.main(arguments(images, tmp_path, "run", *more)) == 0
    assert "as the shares say" not in caplog.text
