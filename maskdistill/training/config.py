"""The settings of a run in seven groups, and the schedules of the step.

They are facebookresearch/dino's, except where a small data set needs others. ``TrainingConfig`` has
those of the trainer and ``JobConfig`` those of the main job, all by their plain names; a function
that needs one group alone takes that group's class. Importing this module imports no timm,
torchvision or Pillow, so that a command's help comes fast.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from maskdistill.models.tokens import Application
from maskdistill.objectives import Centering, parse_objective
from maskdistill.training.distributed import Sharding
from maskdistill.training.step import ClipMode

DataFormat = Literal["auto", "ravi-csv", "vinyals-csv", "imagefolder", "pickle", "parquet", "pack"]
PolicyName = Literal[
    "none", "asymmetric", "symmetric", "student-all-views", "local-only", "teacher-only"
]
Precision = Literal["auto", "float32", "bfloat16"]
Views = Literal["auto", "workers", "device"]

# --- How a setting says what it may be


def _limited(default: Any, words: str, holds: Callable[[Any], bool]) -> Any:
    return dataclasses.field(default=default, metadata={"words": words, "holds": holds})


def _at_least(low: int, default: Any) -> Any:
    return _limited(default, f">= {low}", lambda value: value >= low)


def _positive(default: float) -> Any:
    return _limited(default, "a finite number > 0", lambda value: 0 < value < math.inf)


def _below_1(default: float) -> Any:
    return _limited(default, "in [0, 1)", lambda value: 0 <= value < 1)


def _range(low: float, high: float) -> Any:
    words = "(low, high), 0 < low <= high <= 1"
    return _limited((low, high), words, lambda value: 0 < value[0] <= value[1] <= 1)


@dataclass(frozen=True)
class Settings:
    """Base of a group: its values are plain, of the declared types and within declared limits.

    Raises:
        TypeError: a value of another type.
        ValueError: a value beyond its limits, or one that is none of those to choose from.
    """

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            # NumPy's numbers, as np.logspace gives them: a checkpoint may not hold their classes.
            value = _plain(getattr(self, field.name))
            object.__setattr__(self, field.name, value)
            hint = hints[field.name]
            if not _is_of(value, hint):
                raise TypeError(f"{field.name} must be of type {field.type}; got {value!r}.")
            if typing.get_origin(hint) is Literal and value not in typing.get_args(hint):
                choices = typing.get_args(hint)
                raise ValueError(f"{field.name} must be one of {choices}; got {value!r}.")
            holds = field.metadata.get("holds")
            optional = type(None) in typing.get_args(hint)
            if holds is None or (value is None and optional) or holds(value):
                continue
            words = ("None or " if optional else "") + field.metadata["words"]
            raise ValueError(f"{field.name} must be {words}; got {value!r}.")


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    return value.item() if isinstance(value, np.generic) else value


def _is_of(value: Any, hint: Any) -> bool:
    """Say whether a value has one of the hint's plain types; other hints are not looked at."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if not set(kinds) <= {int, float, bool, str, type(None)}:
        return True
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, (*kinds, int) if float in kinds else kinds)


# --- The groups


@dataclass(frozen=True)
class DataSettings(Settings):
    """Where images come from, and how many of them judge a backbone."""

    data: Path | None = None
    """Folder or file with mini-ImageNet or other images; None uses the built-in scenes."""
    data_format: DataFormat = "auto"
    """Form of the data; auto finds out."""
    allow_pickle: bool = False
    """Read pickle caches, with an unpickler that runs no code."""
    shards: str | None = None
    """In the place of data: folder, index, pattern or URL of WebDataset shards, which stream."""
    val_shards: str | None = None
    """Shards of validation images; None is those of the split val in the folder of shards."""
    max_damaged: int = _at_least(0, 10)
    """Damaged images that are reported and skipped before the run stops."""
    scenes: int = _at_least(1, 5000)
    """Number of built-in scenes to train on, where there is no data."""
    knn_train: int = _at_least(1, 5000)
    """Most training images that k-NN votes with."""
    knn_val: int = _at_least(1, 2000)
    """Most validation images that k-NN classifies."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data is not None and self.shards is not None:
            raise ValueError("data and shards are two sources of images; give one of them.")
        if self.val_shards is not None and self.shards is None:
            raise ValueError("val_shards go with shards, which were not given.")


@dataclass(frozen=True)
class ViewSettings(Settings):
    """The crops of an image."""

    image_size: int = _at_least(1, 224)
    """Pixels of a side of the global crops, and of evaluation images."""
    local_crops: int = _at_least(0, 8)
    """Number of local crops per image."""
    local_size: int | None = _at_least(1, None)
    """Pixels of a side of the local crops; None is 3/7 of image_size (96 at 224)."""
    global_scale: tuple[float, float] = _range(0.4, 1.0)
    """Least and greatest share of the image's area in a global crop."""
    local_scale: tuple[float, float] = _range(0.05, 0.4)
    """Least and greatest share of the image's area in a local crop."""


@dataclass(frozen=True)
class ModelSettings(Settings):
    """The backbone, and how masks reach it."""

    model: str = "vit_tiny_patch16_224"
    """A ViT by its name in timm, of the VisionTransformer or Eva family."""
    patch_size: int = _at_least(1, 16)
    """Pixels of a side of a patch."""
    depth: int | None = _at_least(1, None)
    """Number of blocks; None is the model's own."""
    apply: Application = "token"
    """How masks are applied: token, drop or pixel."""
    drop_path: float = _below_1(0.1)
    """Stochastic depth of the student; the teacher has none."""


@dataclass(frozen=True)
class HeadSettings(Settings):
    """The projection head, and the targets that the teacher's makes."""

    objective: str | None = None
    """Losses joined by +, each with its usual weight or one before it: dino, ibot, koleo, msn, such
    as dino+ibot+0.1*koleo; None is the preset's own, else dino."""
    out_dim: int | None = _at_least(1, None)
    """Number of prototypes; None scales with the data, to 65536 on ImageNet."""
    hidden_dim: int = _at_least(1, 2048)
    """Width of the head's hidden layers."""
    bottleneck_dim: int = _at_least(1, 256)
    """Width of the head before the prototypes."""
    norm_last_layer: bool = True
    """Keep the prototypes at unit length."""
    student_temp: float = _positive(0.1)
    """The student's softmax temperature."""
    teacher_temp: float = _positive(0.04)
    """The teacher's softmax temperature after its warm-up."""
    warmup_teacher_temp: float = _positive(0.04)
    """The teacher's softmax temperature at the start."""
    warmup_teacher_temp_epochs: int = _at_least(0, 0)
    """Epochs of the temperature's linear warm-up."""
    patch_temp: float = _positive(0.07)
    """The teacher's temperature for patches, where ibot is in the objective, after its warm-up."""
    warmup_patch_temp: float = _positive(0.04)
    """The same at the start."""
    warmup_patch_temp_epochs: int | None = _at_least(0, None)
    """Epochs of its linear warm-up; None is three tenths of the run (30 of 100)."""
    patch_head: Literal["shared", "own"] = "shared"
    """Whether patches share the class tokens' head, or have one of their own."""
    centering: Centering = "center"
    """How the teacher is kept from collapse: center (the original) or sinkhorn_knopp."""
    center_momentum: float = _below_1(0.9)
    """Momentum of the centre, a running mean of the teacher's logits."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.objective is not None:
            parse_objective(self.objective)


@dataclass(frozen=True)
class OptimiserSettings(Settings):
    """AdamW, its schedules, and the teacher's average."""

    lr: float = _positive(5e-4)
    """Peak learning rate for a batch of 256; scaled linearly with the batch over all processes."""
    min_lr: float = _at_least(0, 1e-6)
    """Final learning rate."""
    warmup_epochs: float | None = _at_least(0, None)
    """Epochs of the learning rate's linear warm-up; None is a tenth of the run (10 of 100)."""
    weight_decay: float = _at_least(0, 0.04)
    """Weight decay at the start."""
    weight_decay_end: float = _at_least(0, 0.4)
    """Weight decay at the end of a cosine."""
    decay_tokens: bool = True
    """Decay the position embedding and the class and mask tokens too, as the original does."""
    clip_grad: float = _at_least(0, 3.0)
    """Greatest gradient norm; 0 clips nothing."""
    clip_mode: ClipMode = "per_parameter"
    """Clip each tensor by its own norm (the original) or all by the global one."""
    freeze_last_layer: float = _at_least(0, 1.0)
    """Epochs in which the prototypes stay as they are."""
    momentum: float | None = _limited(None, "in [0, 1]", lambda value: 0 <= value <= 1)
    """The teacher's momentum at the start, rising to 1; None scales with the length of the run."""


@dataclass(frozen=True)
class RunSettings(Settings):
    """How long a run is, and what it computes on."""

    epochs: int = _at_least(1, 100)
    """Passes over the data."""
    max_steps: int | None = _at_least(1, None)
    """Ends training, and all schedules, after so many steps, if that is sooner."""
    batch_size: int = _at_least(1, 64)
    """Images per step and process."""
    accumulate: int = _at_least(1, 1)
    """Parts of the batch that go through the networks one after the other, to save memory."""
    seed: int = 0
    """Seed of weights, data order, crops and masks."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Precision = "auto"
    """auto is bfloat16 autocast on a GPU that has it, else float32."""
    compile: bool = False
    """Compile the blocks of student and teacher: slower to start, faster to run on a GPU."""
    sharding: Sharding = "ddp"
    """With several processes: ddp has all weights on each, fsdp spreads them over all (FSDP2)."""
    workers: int | None = _at_least(0, None)
    """Loader processes; None is the process's share of the cores but one, at most 8."""
    views: Views = "auto"
    """Where crops are cut: by loader workers, or on the device, where all images then lie decoded;
    auto is the device if it is a GPU and they fit in a quarter of its free memory."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size must be a multiple of accumulate ({self.accumulate}), so that its "
                f"parts are equal; got {self.batch_size}."
            )


@dataclass(frozen=True)
class OutputSettings(Settings):
    """What a run writes, and how often."""

    log_every: int = _at_least(1, 10)
    """Steps between two lines of metrics; the only times the host waits for an accelerator."""
    health_every: int = _at_least(0, 100)
    """Steps between two lines of metrics with signs of the representation's health, rounded up to
    the next line; 0 is never. A look takes about 0.6 of a step."""
    checkpoint_every: int = _at_least(1, 500)
    """Steps between two checkpoints."""
    keep_checkpoints: int = _at_least(1, 3)
    """Number of checkpoints to keep; older ones are removed when a new one is in place."""
    milestone_every: int | None = _at_least(1, None)
    """Steps between checkpoints that are kept for good; a multiple of checkpoint_every."""
    wandb: str | None = None
    """Project of Weights & Biases to log to as well, if it is installed; None is that of the
    variable WANDB_PROJECT, if it is set."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.milestone_every is not None and self.milestone_every % self.checkpoint_every:
            raise ValueError(
                f"milestone_every must be a multiple of checkpoint_every "
                f"({self.checkpoint_every}), since only checkpoints can be kept; got "
                f"{self.milestone_every}."
            )


# --- The trainer's settings


@dataclass(frozen=True)
class TrainingConfig(
    ViewSettings, ModelSettings, HeadSettings, OptimiserSettings, RunSettings, OutputSettings
):
    """Settings of the trainer.

    ``None`` means "scaled with the data": ``resolved()`` says what that is. Everything else
    defaults to facebookresearch/dino's value for ViT-Ti and ViT-S.

    >>> config = TrainingConfig(epochs=300).resolved(images=50_000)
    >>> config.out_dim, config.momentum
    (4096, 0.996)
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("image_size", "local_size"):
            value = getattr(self, name)
            if value is not None and value % self.patch_size:
                raise ValueError(
                    f"{name} must be a multiple of patch_size ({self.patch_size}), so that "
                    f"patches divide the image; got {value}."
                )

    def total_steps(self, steps_per_epoch: int) -> int:
        """Return the length of the run in steps."""
        steps = self.epochs * steps_per_epoch
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def resolved(self, images: int, world: int = 1) -> TrainingConfig:
        """Return the settings with every ``None`` that depends on the data replaced.

        - ``out_dim``: the power of two next above images / 16, from 256 to 65536, so that
          prototypes are about as many per image as on ImageNet;
        - ``momentum``: 0.996, but averaging over at most a 50th of the run, and at least 0.98;
        - ``local_size``: 3/7 of the image size, as 96 to 224, rounded to whole patches;
        - ``warmup_epochs``: a tenth of the run, and ``warmup_patch_temp_epochs`` three tenths.

        Args:
            images: in the training data.
            world: number of processes.
        """
        per_epoch = max(images // (self.batch_size * world), 1)
        steps = self.total_steps(per_epoch)
        changes: dict[str, Any] = {}
        if self.out_dim is None:
            power = math.ceil(math.log2(max(images / 16, 1)))
            changes["out_dim"] = min(max(2**power, 256), 65536)
        if self.momentum is None:
            changes["momentum"] = min(0.996, max(0.98, 1 - 50 / steps))
        if self.local_size is None:
            patches = max(round(self.image_size * 3 / 7 / self.patch_size), 1)
            changes["local_size"] = patches * self.patch_size
        if self.warmup_patch_temp_epochs is None:
            changes["warmup_patch_temp_epochs"] = round(0.3 * steps / per_epoch)
        if self.warmup_epochs is None:
            changes["warmup_epochs"] = 0.1 * steps / per_epoch
        return dataclasses.replace(self, **changes)


# --- The main job's settings


@dataclass(frozen=True)
class JobViewSettings(ViewSettings):
    """The crops of an image, and which of them are masked."""

    policy: PolicyName = "asymmetric"
    """Which views are masked, for whom."""
    masker: str = "RandomMasker(0.3)"
    """What is hidden, as in Python, for example "BlockMasker(0.4).sometimes(0.5)"."""
    preset: str | None = None
    """A published recipe with two global views by name, such as ibot, attmask_high or msn; it says
    policy, masker and apply, whatever --apply says."""


@dataclass(frozen=True)
class JobOutputSettings(OutputSettings):
    """Where a job writes, what and how often; and whether it goes on with what is there."""

    out: Path | None = None
    """Folder for everything the run writes; None is a new folder in runs/."""
    resume: bool = False
    """Go on from the newest whole checkpoint in the output folder."""
    auto_resume: bool = False
    """Go on if the output folder holds a run, else start one: for a scheduler that runs the same
    command again."""
    evaluations: int = _at_least(0, 5)
    """Number of k-NN evaluations during training, at least 100 steps apart; one more at the end."""


@dataclass(frozen=True)
class JobConfig(TrainingConfig, DataSettings, JobViewSettings, JobOutputSettings):
    """Settings of the main job: data, policy and output, and all of the trainer's."""


@dataclass(frozen=True)
class JobGroups:
    """The settings of the main job in seven groups, as a command line shows them.

    >>> JobGroups.of(JobConfig(epochs=3)).run.epochs
    3
    >>> JobGroups.of(JobConfig(epochs=3)).config() == JobConfig(epochs=3)
    True
    """

    data: DataSettings
    views: JobViewSettings
    model: ModelSettings
    head: HeadSettings
    optimiser: OptimiserSettings
    run: RunSettings
    output: JobOutputSettings

    @classmethod
    def of(cls, config: JobConfig) -> JobGroups:
        """Return the settings of a job, sorted into the groups."""
        groups = typing.get_type_hints(cls)
        return cls(**{name: group_of(config, group) for name, group in groups.items()})

    def config(self) -> JobConfig:
        """Return all settings in one, which also checks those that depend on other groups."""
        groups = (getattr(self, field.name) for field in dataclasses.fields(self))
        return JobConfig(**{n: v for group in groups for n, v in vars(group).items()})


G = TypeVar("G", bound=Settings)


def group_of(config: Settings, group: type[G]) -> G:
    """Return the part of a run's settings that belongs to one group."""
    return group(**{field.name: getattr(config, field.name) for field in dataclasses.fields(group)})


# Found in about a dozen short runs: docs/trainer.md says what each is good for.
SCENES = JobConfig(
    image_size=32,
    patch_size=8,
    depth=3,
    local_crops=4,
    local_scale=(0.15, 0.5),
    epochs=3,
    batch_size=32,
    out_dim=256,
    hidden_dim=512,
    teacher_temp=0.03,
    warmup_teacher_temp=0.03,
    lr=8e-3,
    momentum=0.99,
    checkpoint_every=100,
)
"""Settings for the built-in scenes: a first result in minutes on 2 CPU cores."""

MINI_IMAGENET = JobConfig(image_size=64, patch_size=8, local_crops=6)
"""Settings for mini-ImageNet at 64 pixels."""


def saved_config(out: Path) -> JobConfig:
    """Return the settings that a run wrote into its folder, ready to resume it.

    Raises:
        FileNotFoundError: there is no ``config.json``.
        ValueError: it is damaged, or of another version.
    """
    path = out / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"there is no run in {out} to resume: it has no config.json.")
    try:
        values = json.loads(path.read_text())
        del values["policy_used"]  # for people, and of no use if no setting names it
        for name in ("data", "out"):
            values[name] = None if values[name] is None else Path(values[name])
        for name in ("global_scale", "local_scale"):
            values[name] = tuple(values[name])
        return JobConfig(**values)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} cannot be read as the settings of a run ({error}). Remove it and give all "
            "settings again, with --resume; the checkpoints have their own copy to compare."
        ) from error


# --- Schedules


def cosine_with_warmup(
    step: int, total: int, peak: float, final: float, warmup: int = 0, start: float = 0.0
) -> float:
    """Return the value at ``step``: linear from start to peak, then half a cosine to final.

    >>> [round(cosine_with_warmup(step, 6, 1.0, 0.0, warmup=3), 2) for step in range(6)]
    [0.0, 0.5, 1.0, 1.0, 0.75, 0.25]

    The warm-up reaches its peak at its last step, and the cosine begins there anew, as in
    facebookresearch/dino; so the final value lies one step behind the end.

    Args:
        step: from 0.
        total: steps in all.
        peak: value after the warm-up.
        final: value that the cosine tends to.
        warmup: steps of the linear rise, at most ``total``.
        start: value at step 0 of a warm-up.
    """
    if step < warmup:
        return start + (peak - start) * step / max(warmup - 1, 1) if warmup > 1 else start
    done = (step - warmup) / max(total - warmup, 1)
    return final + 0.5 * (peak - final) * (1 + math.cos(math.pi * done))


def linear_by_epoch(epoch: int, warmup_epochs: int, start: float, end: float) -> float:
    """Return the value in ``epoch``: evenly from start to end over the warm-up, then end.

    >>> [round(linear_by_epoch(epoch, 3, 0.04, 0.07), 3) for epoch in range(4)]
    [0.04, 0.055, 0.07, 0.07]
    """
    if epoch >= warmup_epochs:
        return end
    return start + (end - start) * epoch / (warmup_epochs - 1) if warmup_epochs > 1 else start
