"""The reference DINO trainer: configuration, one pure step, the loop, checkpoints."""

from maskdistill.training.checkpoint import (
    CheckpointError,
    FoundCheckpoint,
    latest_checkpoint,
)
from maskdistill.training.config import TrainingConfig
from maskdistill.training.interruption import TrainingInterrupted
from maskdistill.training.step import (
    StepMetrics,
    StepSettings,
    TrainState,
    make_teacher,
    train_step,
)
from maskdistill.training.trainer import (
    CollapseWarning,
    DamagedCheckpointWarning,
    NonFiniteLossError,
    Trainer,
    TrainReport,
)

__all__ = [
    "CheckpointError",
    "CollapseWarning",
    "DamagedCheckpointWarning",
    "FoundCheckpoint",
    "NonFiniteLossError",
    "StepMetrics",
    "StepSettings",
    "TrainReport",
    "TrainState",
    "Trainer",
    "TrainingConfig",
    "TrainingInterrupted",
    "latest_checkpoint",
    "make_teacher",
    "train_step",
]
