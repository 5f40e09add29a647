"""Every setting of the suite: its type, default, range and meaning; loading, validation and printing.

Imports no torch. `configs/unified_config.yaml` is this file written out with comments; a test holds the two together.
Refuses unknown settings, wrong types and impossible combinations with one line that says what to do.
"""

import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from tagger.command import command
from tagger.config_checks import (
    BELOW_ONE,
    FRACTION,
    MEMBERS,
    NOT_NEGATIVE,
    PART,
    POSITIVE,
    SHARE,
    Section,
    check_strength,
    existing_files,
    existing_folder,
    phase_settings,
    require,
    setting,
    split_settings,
    threshold_goal,
    whole_patches,
)
from tagger.config_io import (
    Loaded,
    compose,
    describe,
    environment_layer,
    flat_values,
    override_layer,
    read_recipe,
)
from tagger.options import Parser
from tagger.output import reader_may_leave

ENVIRONMENT_PREFIX = "TAGGER_"
PRESET_PATCH_SIZE = 16  # of every preset; the model's own table is held against it by a test


@dataclass
class RunSection(Section):
    """Where a run lives: `<output_dir>/<name>/`."""

    output_dir: str = "runs"
    name: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.output_dir), "run.output_dir is empty", "name a folder, e.g. runs")
        if self.name is not None:
            bad = not self.name or self.name in {".", ".."} or any(c in self.name for c in '/\\:*?"<>|')
            require(not bad, f"run.name={self.name!r} is not a folder name", "use letters, digits, '-' and '_'")

    @property
    def folder(self) -> Path:
        """The run's folder; `load_config` has given every run its name."""
        assert self.name is not None
        return Path(self.output_dir) / self.name


@dataclass
class DataSection(Section):
    """Images, their sidecars and how they are prepared."""

    roots: list[str] = field(default_factory=list)
    annotations: str | None = None
    corrections_file: str | None = None
    extra_fields: list[str] = field(default_factory=list)
    index_dir: str = ".tagsmith/index"
    cache_dir: str | None = None
    val_list: str | None = None
    split_key: Literal["name", "path"] = "name"
    val_fraction: float = setting(0.05, SHARE.with_remedy("try 0.05"))
    calib_fraction: float = 0.0
    test_fraction: float = 0.0
    group_near_duplicates: bool = False
    near_duplicate_bits: int = 3
    stratified_split: bool = False
    image_size: int = setting(224, POSITIVE)
    fit: Literal["letterbox", "buckets"] = "letterbox"
    background: list[int] = field(default_factory=lambda: [255, 255, 255])
    max_megapixels: float = setting(200.0, POSITIVE)
    decode_scaling: Literal["safe", "tight", "off"] = "safe"
    partial_images: bool = False
    max_refused_fraction: float = setting(0.001, FRACTION)
    num_processes: int | None = setting(None, NOT_NEGATIVE)
    num_threads: int | None = setting(None, POSITIVE)
    prefetch_batches: int = setting(4, POSITIVE)
    sampling: Literal["uniform", "weighted", "class_aware"] = "uniform"
    sampling_power: float = setting(0.5, NOT_NEGATIVE)
    sampling_cap: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        cap = self.sampling_cap
        require(1 <= cap < math.inf, f"data.sampling_cap={cap} is below 1 or not finite", "10: at most 10 times")
        split_settings(
            self.val_fraction,
            self.calib_fraction,
            self.test_fraction,
            listed=self.val_list is not None,
            grouped=self.group_near_duplicates,
            stratified=self.stratified_split,
        )
        require(
            self.annotations is None or len(self.roots) <= 1,
            f"data.annotations={self.annotations} describes one image folder and data.roots names {len(self.roots)}",
            "give one folder, or set data.annotations=null to read sidecars",
        )
        bits = self.near_duplicate_bits
        require(
            0 <= bits <= 8, f"data.near_duplicate_bits={bits} is not 0 to 8", "3 finds resized and recompressed copies"
        )
        require(
            len(self.background) == 3 and all(0 <= c <= 255 for c in self.background),
            f"data.background={self.background} is not three numbers 0..255",
            "white is [255, 255, 255]",
        )


@dataclass
class VocabularySection(Section):
    """Which tags the model learns."""

    file: str | None = None
    min_frequency: int = setting(50, POSITIVE)
    ignore_file: str | None = None
    categories_file: str | None = None
    ontology_file: str | None = None
    ratings: Literal["tags", "ignore"] = "tags"


@dataclass
class OrientationSection(Section):
    """When an image may be mirrored, and how its tags follow."""

    mirror_probability: float = setting(0.5, FRACTION)
    map_path: str | None = "configs/orientation_map.json"
    mode: Literal["conservative", "balanced", "permissive"] = "conservative"
    never_flip_file: str | None = None
    force_flip_file: str | None = None


@dataclass
class AugmentOperation:
    """How often an operation acts (per image) and how strongly (its unit is the operation's)."""

    probability: float
    strength: float


@dataclass
class AugmentSection:
    """Operations on the uint8 batch on the device; null turns one off."""

    rotation: AugmentOperation | None = None
    shift: AugmentOperation | None = None
    scale: AugmentOperation | None = None
    brightness: AugmentOperation | None = None
    contrast: AugmentOperation | None = None
    saturation: AugmentOperation | None = None
    blur: AugmentOperation | None = None
    erasing: AugmentOperation | None = None
    mixup: AugmentOperation | None = None

    def __post_init__(self) -> None:
        for name, operation in vars(self).items():
            if operation is not None:
                FRACTION.check(f"augment.{name}.probability", operation.probability)
                NOT_NEGATIVE.check(f"augment.{name}.strength", operation.strength)
                check_strength(name, operation.strength)


@dataclass
class ModelSection(Section):
    """The network: a preset, and what differs from it (null keeps the preset's value)."""

    name: Literal["vit"] = "vit"
    preset: Literal["vit_tiny", "vit_small", "vit_base", "vit_large"] = "vit_small"
    patch_size: int | None = setting(None, POSITIVE)
    embed_dim: int | None = setting(None, POSITIVE)
    depth: int | None = setting(None, POSITIVE)
    num_heads: int | None = setting(None, POSITIVE)
    mlp_ratio: float | None = setting(None, POSITIVE)
    stem: Literal["patch", "conv"] = "patch"
    pooling: Literal["mean", "class_token", "grid"] = "mean"
    pooling_grid: int = setting(3, POSITIVE)
    qk_norm: bool = False
    layer_scale_init: float | None = setting(None, POSITIVE)
    drop_path: float = setting(0.0, BELOW_ONE)
    dropout: float = setting(0.0, BELOW_ONE)
    head_dropout: float = setting(0.0, BELOW_ONE)
    patch_dropout: float = setting(0.0, BELOW_ONE)
    head_bias: Literal["log_prior", "zero"] = "log_prior"
    positions: Literal["learned", "rotary"] = "learned"
    register_tokens: int = setting(0, NOT_NEGATIVE)
    mask_padding: bool = False
    num_members: int = setting(1, MEMBERS)

    @property
    def resolved_patch_size(self) -> int:
        """Pixels a token covers, each way."""
        return self.patch_size or PRESET_PATCH_SIZE


@dataclass
class LossSection(Section):
    """What is minimised: a sum over tags, averaged over images."""

    name: Literal["asymmetric_focal", "focal", "binary_cross_entropy", "hill", "splc"] = "asymmetric_focal"
    gamma_neg: float = setting(4.0, NOT_NEGATIVE)
    gamma_pos: float = setting(0.0, NOT_NEGATIVE)
    clip: float = 0.05
    correct_above: float = setting(0.6, SHARE)
    rating_weight: float | None = setting(None, NOT_NEGATIVE)
    tag_weight_power: float = setting(0.0, NOT_NEGATIVE)
    ignored_tags: list[str] = field(default_factory=list)
    chunk_tags: int | None = setting(None, POSITIVE)

    def __post_init__(self) -> None:
        super().__post_init__()
        good = self.clip == 0 or 1e-30 <= self.clip < 1
        require(good, f"loss.clip={self.clip} is not 0 or 1e-30..1", "0 turns the margin off, 0.05 is usual")


@dataclass
class OptimizerSection(Section):
    """How weights move. `muon`: Muon for the blocks' matrices and the stem's kernels, AdamW for the rest."""

    name: Literal["adamw", "adafactor", "muon"] = "adamw"
    learning_rate: float = setting(1e-3, POSITIVE)
    muon_learning_rate: float = setting(0.02, POSITIVE)
    base_batch_size: int | None = setting(None, POSITIVE)
    layer_decay: float | None = setting(None, SHARE.with_remedy("0.75 is usual, null turns it off"))
    weight_decay: float = setting(0.05, NOT_NEGATIVE)
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = setting(1e-8, POSITIVE)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas),
            f"optimizer.betas={self.betas} is not two numbers in 0 <= x < 1",
            "try [0.9, 0.999]",
        )


@dataclass
class SchedulerSection(Section):
    """Learning rate as a function of the step; shares are of all steps of the run (or of a cycle)."""

    name: Literal["linear_warmup_cosine", "cosine_restarts"] = "linear_warmup_cosine"
    warmup_fraction: float = setting(0.05, BELOW_ONE.with_remedy("try 0.05"))
    min_lr_ratio: float = setting(0.01, FRACTION)
    num_cycles: int = setting(3, POSITIVE)
    cycle_multiplier: float = setting(1.0, POSITIVE)
    cycle_decay: float = setting(1.0, FRACTION)


@dataclass
class PhaseSection(Section):
    """A part of the run at an image size of its own; null: as the recipe has it, but batches of as many tokens."""

    is_top_level: ClassVar[bool] = False

    image_size: int = field(metadata={"range": POSITIVE})
    share: float | None = setting(None, PART)
    batch_size: int | None = setting(None, POSITIVE)
    learning_rate_factor: float = setting(1.0, POSITIVE)
    patch_dropout: float | None = setting(None, BELOW_ONE)
    augment: AugmentSection | None = None


@dataclass
class TrainingSection(Section):
    """The loop."""

    num_epochs: int = setting(30, POSITIVE)
    batch_size: int = setting(64, POSITIVE)
    accumulation_steps: int = setting(1, POSITIVE)
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    parallel: Literal["ddp", "fsdp"] = "ddp"
    seed: int = setting(42, NOT_NEGATIVE)
    mixed_precision: Literal["auto", "bf16", "fp16", "off"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    clip_grad_norm: float | None = setting(1.0, POSITIVE)
    ema_decay: float | None = setting(0.999, SHARE.with_remedy("try 0.999, or null to turn it off"))
    early_stopping_patience: int | None = setting(None, POSITIVE)
    early_stopping_min_delta: float = setting(0.0, NOT_NEGATIVE)
    phases: list[PhaseSection] = field(default_factory=list)


@dataclass
class ValidationSection(Section):
    """The held-out check after epochs."""

    every_epochs: int = setting(1, POSITIVE)
    batch_size: int | None = setting(None, POSITIVE)
    threshold: float = setting(0.5, SHARE.with_remedy("try 0.5"))
    threshold_objective: Literal["f1", "equal", "precision", "tags_per_image"] = "f1"
    threshold_precision: float = 0.9
    threshold_tags_per_image: float | None = setting(None, POSITIVE)
    online_weights: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        threshold_goal(self.threshold_objective, self.threshold_precision, self.threshold_tags_per_image)


@dataclass
class CheckpointSection(Section):
    """What is kept of a run and where it starts."""

    every_steps: int = setting(1000, POSITIVE)
    every_minutes: float | None = setting(15.0, POSITIVE)
    keep_last: int = setting(3, POSITIVE)
    keep_every: int | None = setting(None, POSITIVE)
    best_metric: Literal["val/mAP", "val/f1_macro", "val/f1_micro", "val/loss"] = "val/mAP"
    resume: str = "none"
    init_from: str | None = None
    on_schedule_change: Literal["error", "rescale", "keep"] = "rescale"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.resume), "checkpoint.resume is empty", "use latest, best, auto, none or a checkpoint's path")


@dataclass
class MonitorSection(Section):
    """Where numbers go."""

    log_every_steps: int = setting(20, POSITIVE)
    tensorboard: bool = True
    sample_images: int = setting(8, NOT_NEGATIVE)
    wandb: bool = False
    wandb_project: str = "tagsmith"
    wandb_mode: Literal["online", "offline"] = "offline"


@dataclass
class FullConfig:
    """The whole tree, validated."""

    run: RunSection = field(default_factory=RunSection)
    data: DataSection = field(default_factory=DataSection)
    vocabulary: VocabularySection = field(default_factory=VocabularySection)
    orientation: OrientationSection = field(default_factory=OrientationSection)
    augment: AugmentSection = field(default_factory=AugmentSection)
    model: ModelSection = field(default_factory=ModelSection)
    loss: LossSection = field(default_factory=LossSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    scheduler: SchedulerSection = field(default_factory=SchedulerSection)
    training: TrainingSection = field(default_factory=TrainingSection)
    validation: ValidationSection = field(default_factory=ValidationSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    monitor: MonitorSection = field(default_factory=MonitorSection)

    def __post_init__(self) -> None:
        whole_patches(self.data.image_size, self.model.resolved_patch_size, buckets=self.data.fit == "buckets")
        require(
            self.loss.rating_weight is None or self.vocabulary.ratings == "tags",
            f"loss.rating_weight={self.loss.rating_weight} needs ratings, but vocabulary.ratings is "
            f"'{self.vocabulary.ratings}'",
            "set vocabulary.ratings=tags or loss.rating_weight=null",
        )
        require(
            self.training.early_stopping_patience is None
            or self.training.early_stopping_patience * self.validation.every_epochs < self.training.num_epochs,
            f"training.early_stopping_patience={self.training.early_stopping_patience} never acts within "
            f"training.num_epochs={self.training.num_epochs}",
            "lower it, or set it to null",
        )
        phase_settings(
            [(phase.image_size, phase.share) for phase in self.training.phases],
            self.data.image_size,
            self.model.resolved_patch_size,
            buckets=self.data.fit == "buckets",
        )


def load_config(
    path: str | Path, overrides: Iterable[str] = (), environment: Mapping[str, str] | None = None
) -> FullConfig:
    """The validated configuration of a recipe; raises ConfigError with one line that says what to do.

    Precedence: defaults < file (and the recipes that it names in `defaults`) < environment < `overrides`
    ("section.key=value" words). `environment` is the process's own where it is None.
    """
    return load_with_origin(path, overrides, environment).tree


def load_with_origin(
    path: str | Path, overrides: Iterable[str] = (), environment: Mapping[str, str] | None = None
) -> Loaded[FullConfig]:
    """As `load_config`, with the source that set each value."""
    environment = os.environ if environment is None else environment
    layers = [
        *read_recipe(Path(path)),
        environment_layer(ENVIRONMENT_PREFIX, environment),
        override_layer(overrides),
    ]
    loaded = compose(FullConfig, layers)
    if loaded.tree.run.name is None:
        loaded.tree.run.name = Path(path).stem
        loaded.origin["run.name"] = "name of the file"
    return loaded


def check_paths(config: FullConfig) -> None:
    """Raises ConfigError for the first file or folder that the configuration names and that is not there."""
    require(bool(config.data.roots), "data.roots is empty", "name at least one folder, e.g. data.roots=[/my/images]")
    for root in config.data.roots:
        existing_folder("data.roots", root, "give the folder that holds the images and their sidecars")
    make_it = "make it with `python -m scripts.build_cache`, or set it to null"
    existing_folder("data.cache_dir", config.data.cache_dir, make_it)
    existing_files(
        data__annotations=config.data.annotations,
        data__corrections_file=config.data.corrections_file,
        data__val_list=config.data.val_list,
        vocabulary__file=config.vocabulary.file,
        vocabulary__ignore_file=config.vocabulary.ignore_file,
        vocabulary__categories_file=config.vocabulary.categories_file,
        orientation__map_path=config.orientation.map_path,
        orientation__never_flip_file=config.orientation.never_flip_file,
        orientation__force_flip_file=config.orientation.force_flip_file,
    )


def changed_settings(saved: Path, config: FullConfig) -> list[str]:
    """What differs from a run's saved configuration, as "section.key: old -> new", names and resume aside."""
    if not saved.exists():
        return []
    before, now = flat_values(load_config(saved, environment={})), flat_values(config)
    keys = [key for key in {**before, **now} if key not in ("checkpoint.resume", "run.name", "run.output_dir")]
    return [f"{k}: {before.get(k)} -> {now.get(k)}" for k in keys if before.get(k) != now.get(k)]


def split_changes(saved: Path, config: FullConfig) -> list[str]:
    """Of `changed_settings` those that give images another part: what was trained on would be held out now."""
    names = ("val_list", "val_fraction", "calib_fraction", "test_fraction", "stratified_split", "group_near_duplicates")
    moving = {f"data.{name}" for name in (*names, "near_duplicate_bits", "split_key")}
    return [change for change in changed_settings(saved, config) if change.partition(":")[0] in moving]


@command()
def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 0 when the configuration is good, 2 with one line on stderr when it is not."""
    parser = Parser(
        description="Check a configuration, or print every setting with its value and where it came from.",
        epilog="example: python Configuration_System.py show configs/demo.yaml training.num_epochs=3",
    )
    parser.add_argument("action", choices=("validate", "show"))
    parser.add_argument("file", type=Path, help="a recipe, e.g. configs/demo.yaml")
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value")
    options = parser.parse_args(arguments)
    loaded = load_with_origin(options.file, options.overrides)
    if options.action == "validate":
        check_paths(loaded.tree)
    with reader_may_leave():
        valid = f"{options.file}: {len(loaded.origin)} settings, all valid"
        print(describe(loaded) if options.action == "show" else valid)
    return 0


if __name__ == "__main__":
    sys.exit(main())
