"""A tiny run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

import maskdistill as md
from maskdistill.training import Trainer, TrainingConfig

TINY: dict[str, Any] = {
    "image_size": 16,
    "patch_size": 4,
    "local_size": 8,
    "local_crops": 2,
    "depth": 2,
    "epochs": 3,
    "batch_size": 4,
    "out_dim": 32,
    "hidden_dim": 32,
    "bottleneck_dim": 16,
    "workers": 0,
    "log_every": 2,
    "checkpoint_every": 4,
    "device": "cpu",
}


class Noise(Dataset[tuple[Image.Image, int]]):
    """A few images of noise on a slope."""

    def __init__(self, count: int = 18) -> None:
        random = np.random.RandomState(0)
        slope = np.linspace(0, 120, 24, dtype=np.uint8)[None, :, None]
        self.pixels = random.randint(0, 120, (count, 24, 24, 3)).astype(np.uint8) + slope

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index]), index % 3


@pytest.fixture
def images() -> Noise:
    return Noise()


@pytest.fixture
def build(images: Noise) -> Callable[..., Trainer]:
    def build(policy: md.ViewPolicy | None = None, data: Any = None, **changes: Any) -> Trainer:
        policy = policy or md.AsymmetricMaskPolicy(md.RandomMasker(0.5))
        config = TrainingConfig(**{**TINY, **changes})
        return Trainer(config, data or images, policy)

    return build


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Everything that a run leaves in tensors."""
    return {
        **{f"student.{k}": v for k, v in trainer.state.student_net.state_dict().items()},
        **{f"teacher.{k}": v for k, v in trainer.teacher.state_dict().items()},
        **dict(trainer.state.objective.state_dict()),
    }


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, different
