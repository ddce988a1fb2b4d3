"""The trainer's settings: facebookresearch/dino's, except where a small data set needs others."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from maskdistill.models.tokens import Application
from maskdistill.objectives import Centering
from maskdistill.training.distributed import Sharding
from maskdistill.training.step import ClipMode


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


Precision = Literal["auto", "float32", "bfloat16"]
Views = Literal["auto", "workers", "device"]


_KINDS: dict[str, tuple[type, ...]] = {
    "int": (int,), "float": (int, float), "bool": (bool,), "str": (str,),
}  # fmt: skip


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    return value.item() if isinstance(value, np.generic) else value


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of one training run.

    ``None`` means "scaled with the data": ``resolved()`` says what that is. Everything else
    defaults to facebookresearch/dino's value for ViT-Ti and ViT-S.

    >>> config = TrainingConfig(epochs=300).resolved(images=50_000)
    >>> config.out_dim, config.momentum
    (4096, 0.996)
    """

    model: str = "vit_tiny_patch16_224"
    """A ViT by its name in timm, of the VisionTransformer or Eva family."""
    image_size: int = 224
    """Pixels of a side of the global crops, and of evaluation images."""
    patch_size: int = 16
    """Pixels of a side of a patch."""
    depth: int | None = None
    """Number of blocks; None is the model's own."""
    apply: Application = "token"
    """How masks are applied: token, drop or pixel."""
    drop_path: float = 0.1
    """Stochastic depth of the student; the teacher has none."""

    local_crops: int = 8
    """Number of local crops per image."""
    local_size: int | None = None
    """Pixels of a side of the local crops; None is 3/7 of image_size (96 at 224)."""
    global_scale: tuple[float, float] = (0.4, 1.0)
    """Least and greatest share of the image's area in a global crop."""
    local_scale: tuple[float, float] = (0.05, 0.4)
    """Least and greatest share of the image's area in a local crop."""

    epochs: int = 100
    """Passes over the data."""
    max_steps: int | None = None
    """Ends training, and all schedules, after so many steps, if that is sooner."""
    batch_size: int = 64
    """Images per step and process."""
    accumulate: int = 1
    """Parts of the batch that go through the networks one after the other, to save memory."""
    seed: int = 0
    """Of weights, data order, crops and masks."""

    out_dim: int | None = None
    """Number of prototypes; None scales with the data, to 65536 on ImageNet."""
    hidden_dim: int = 2048
    """Width of the head's hidden layers."""
    bottleneck_dim: int = 256
    """Width of the head before the prototypes."""
    norm_last_layer: bool = True
    """Keep the prototypes at unit length."""
    student_temp: float = 0.1
    """The student's softmax temperature."""
    teacher_temp: float = 0.04
    """The teacher's softmax temperature after its warm-up."""
    warmup_teacher_temp: float = 0.04
    """The teacher's softmax temperature at the start."""
    warmup_teacher_temp_epochs: int = 0
    """Epochs of the temperature's linear warm-up."""
    centering: Centering = "center"
    """How the teacher is kept from collapse: center (the original) or sinkhorn_knopp."""
    center_momentum: float = 0.9
    """Of the centre's running mean."""

    lr: float = 5e-4
    """Peak learning rate for a batch of 256; scaled linearly with the batch over all processes."""
    min_lr: float = 1e-6
    """Final learning rate."""
    warmup_epochs: float | None = None
    """Epochs of the learning rate's linear warm-up; None is a tenth of the run (10 of 100)."""
    weight_decay: float = 0.04
    """Weight decay at the start."""
    weight_decay_end: float = 0.4
    """Weight decay at the end of a cosine."""
    decay_tokens: bool = True
    """Decay the position embedding and the class and mask tokens too, as the original does."""
    clip_grad: float = 3.0
    """Greatest gradient norm; 0 clips nothing."""
    clip_mode: ClipMode = "per_parameter"
    """Clip each tensor by its own norm (the original) or all by the global one."""
    freeze_last_layer: float = 1.0
    """Epochs in which the prototypes stay as they are."""
    momentum: float | None = None
    """The teacher's momentum at the start, rising to 1; None scales with the length of the run."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Precision = "auto"
    """auto is bfloat16 autocast on a GPU that has it, else float32."""
    compile: bool = False
    """Compile the blocks of student and teacher: slower to start, faster to run on a GPU."""
    sharding: Sharding = "ddp"
    """With several processes: ddp has all weights on each, fsdp spreads them over all (FSDP2)."""
    workers: int | None = None
    """Loader processes; None is the process's share of the cores but one, at most 8."""
    views: Views = "auto"
    """Where crops are cut: by loader workers, or on the device, where all images then lie decoded;
    auto is the device if it is a GPU and they fit in a quarter of its free memory."""
    log_every: int = 10
    """Steps between two lines of metrics; the only times the host waits for an accelerator."""
    health_every: int = 100
    """Steps between two lines of metrics with signs of the representation's health, rounded up to
    the next line; 0 is never. A look takes about 0.6 of a step."""
    checkpoint_every: int = 500
    """Steps between two checkpoints."""
    keep_checkpoints: int = 3
    """Number of checkpoints to keep; older ones are removed when a new one is in place."""
    milestone_every: int | None = None
    """Steps between checkpoints that are kept for good; a multiple of checkpoint_every."""
    wandb: str | None = None
    """Project of Weights & Biases to log to as well, if it is installed; None is that of the
    variable WANDB_PROJECT, if it is set."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            # NumPy's numbers, as np.logspace gives them: a checkpoint may not hold their classes.
            plain = _plain(getattr(self, field.name))
            object.__setattr__(self, field.name, plain)
            wanted = str(field.type)
            kinds = _KINDS.get(wanted.removesuffix(" | None"))
            missing = plain is None and wanted.endswith("None")
            if (
                kinds
                and not missing
                and (
                    not isinstance(plain, kinds) or (isinstance(plain, bool) and bool not in kinds)
                )
            ):
                raise TypeError(f"{field.name} must be of type {wanted}; got {plain!r}.")
        for name in ("image_size", "patch_size", "epochs", "batch_size", "accumulate", "log_every",
                     "checkpoint_every", "keep_checkpoints", "hidden_dim",
                     "bottleneck_dim"):  # fmt: skip
            self._require(name, getattr(self, name) >= 1, "must be an int >= 1")
        for name in ("depth", "local_size", "max_steps", "out_dim", "milestone_every"):
            value = getattr(self, name)
            self._require(name, value is None or value >= 1, "must be None or an int >= 1")
        for name in ("student_temp", "teacher_temp", "warmup_teacher_temp", "lr"):
            self._require(name, 0 < getattr(self, name) < math.inf, "must be a number > 0")
        for name in ("local_crops", "min_lr", "weight_decay", "weight_decay_end", "clip_grad",
                     "freeze_last_layer", "warmup_teacher_temp_epochs",
                     "health_every"):  # fmt: skip
            self._require(name, getattr(self, name) >= 0, "must be a number >= 0")
        for name in ("workers", "warmup_epochs"):
            value = getattr(self, name)
            self._require(name, value is None or value >= 0, "must be None or a number >= 0")
        self._require("drop_path", 0 <= self.drop_path < 1, "must lie in [0, 1)")
        self._require("center_momentum", 0 <= self.center_momentum < 1, "must lie in [0, 1)")
        self._require(
            "momentum", self.momentum is None or 0 <= self.momentum <= 1, "must lie in [0, 1]"
        )
        for name in ("global_scale", "local_scale"):
            low, high = getattr(self, name)
            self._require(name, 0 < low <= high <= 1, "must be (low, high), 0 < low <= high <= 1")
        for name in ("image_size", "local_size"):
            value = getattr(self, name)
            if value is not None and value % self.patch_size:
                raise ValueError(
                    f"{name} must be a multiple of patch_size ({self.patch_size}), so that "
                    f"patches divide the image; got {value}."
                )

        if self.milestone_every is not None and self.milestone_every % self.checkpoint_every:
            raise ValueError(
                f"milestone_every must be a multiple of checkpoint_every "
                f"({self.checkpoint_every}), since only checkpoints can be kept; got "
                f"{self.milestone_every}."
            )
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size must be a multiple of accumulate ({self.accumulate}), so that its "
                f"parts are equal; got {self.batch_size}."
            )
        for name, choices in (
            ("sharding", ("ddp", "fsdp")),
            ("views", ("auto", "workers", "device")),
            ("precision", ("auto", "float32", "bfloat16")),
        ):
            self._require(name, getattr(self, name) in choices, f"must be one of {choices}")

    def _require(self, name: str, holds: bool, wanted: str) -> None:
        if not holds:
            raise ValueError(f"{name} {wanted}; got {getattr(self, name)!r}.")

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
        - ``warmup_epochs``: a tenth of the run.

        Args:
            images: in the training data.
            world: number of processes.
        """
        per_epoch = max(images // (self.batch_size * world), 1)
        steps = self.total_steps(per_epoch)
        changes: dict[str, object] = {}
        if self.out_dim is None:
            power = math.ceil(math.log2(max(images / 16, 1)))
            changes["out_dim"] = min(max(2**power, 256), 65536)
        if self.momentum is None:
            changes["momentum"] = min(0.996, max(0.98, 1 - 50 / steps))
        if self.local_size is None:
            patches = max(round(self.image_size * 3 / 7 / self.patch_size), 1)
            changes["local_size"] = patches * self.patch_size
        if self.warmup_epochs is None:
            changes["warmup_epochs"] = 0.1 * steps / per_epoch
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]
