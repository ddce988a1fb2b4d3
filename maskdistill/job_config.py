"""The settings of the main job, and how a run finds its own again."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from maskdistill.training import TrainingConfig

PolicyName = Literal[
    "none", "asymmetric", "symmetric", "student-all-views", "local-only", "teacher-only"
]
DataFormat = Literal["auto", "ravi-csv", "vinyals-csv", "imagefolder", "pickle", "parquet", "pack"]


@dataclass(frozen=True)
class JobConfig(TrainingConfig):
    """Settings of the main job: data, policy and output, and all of the trainer's."""

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
    max_damaged: int = 10
    """Damaged images that are reported and skipped before the run stops."""
    scenes: int = 5000
    """Number of built-in scenes to train on, where there is no data."""
    out: Path | None = None
    """Folder for everything the run writes; None is a new folder in runs/."""
    policy: PolicyName = "asymmetric"
    """Which views are masked, for whom."""
    masker: str = "RandomMasker(0.3)"
    """What is hidden, as in Python, for example "BlockMasker(0.4).sometimes(0.5)"."""
    preset: str | None = None
    """A published recipe with two global views by name, such as ibot, attmask_high or msn; it says
    policy, masker and apply, whatever --apply says."""
    resume: bool = False
    """Go on from the newest whole checkpoint in the output folder."""
    auto_resume: bool = False
    """Go on if the output folder holds a run, else start one: for a scheduler that runs the same
    command again."""
    evaluations: int = 5
    """Number of k-NN evaluations during training, at least 100 steps apart; one more at the end."""
    knn_train: int = 5000
    """Most training images that k-NN votes with."""
    knn_val: int = 2000
    """Most validation images that k-NN classifies."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("scenes", "knn_train", "knn_val"):
            self._require(name, getattr(self, name) >= 1, "must be an int >= 1")
        if self.data is not None and self.shards is not None:
            raise ValueError("data and shards are two sources of images; give one of them.")
        if self.val_shards is not None and self.shards is None:
            raise ValueError("val_shards go with shards, which were not given.")
        for name in ("evaluations", "max_damaged"):
            self._require(name, getattr(self, name) >= 0, "must be an int >= 0")


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
        values.pop("policy_used", None)  # for people, and of no use if no setting names it
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

MINI_IMAGENET = JobConfig(
    image_size=64,
    patch_size=8,
    local_crops=6,
)
"""Settings for mini-ImageNet at 64 pixels."""
