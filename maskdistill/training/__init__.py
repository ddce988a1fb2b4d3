"""The reference DINO trainer: configuration, one pure step, the loop, checkpoints."""

from maskdistill.training.config import TrainingConfig
from maskdistill.training.step import (
    StepMetrics,
    StepSettings,
    TrainState,
    make_teacher,
    train_step,
)
from maskdistill.training.trainer import (
    CollapseWarning,
    NonFiniteLossError,
    Trainer,
    TrainReport,
)

__all__ = [
    "CollapseWarning",
    "NonFiniteLossError",
    "StepMetrics",
    "StepSettings",
    "TrainReport",
    "TrainState",
    "Trainer",
    "TrainingConfig",
    "make_teacher",
    "train_step",
]
