"""The parity run's inputs: the same for the original implementation and for ours.

Everything comes from NumPy's frozen legacy generator, so the numbers are the same for ever.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor, nn

BATCH, EPOCHS, PER_EPOCH = 8, 5, 4
IMAGE, LOCAL, PATCH, DEPTH, LOCALS = 64, 32, 8, 4, 4
OUT_DIM, HIDDEN = 512, 256
LR, MIN_LR, WARMUP_EPOCHS = 0.016, 1e-6, 2  # 0.016 for a batch of 256: a peak of 5e-4
WEIGHT_DECAY, WEIGHT_DECAY_END = 0.04, 0.4
MOMENTUM, CLIP, FREEZE_EPOCHS = 0.9, 0.15, 1
TEMP_START, TEMP_END, TEMP_EPOCHS = 0.04, 0.07, 3
PATCH_TEMP_START, PATCH_TEMP_END = 0.05, 0.09


def fill_weights(model: nn.Module) -> None:
    """Give every parameter values that depend on its name alone, at the scale of a fresh model."""
    for name, parameter in model.named_parameters():
        if name.endswith("weight_g"):
            parameter.data.fill_(1.0)
            continue
        random = np.random.RandomState(zlib.crc32(name.encode()))
        values = torch.from_numpy(random.standard_normal(tuple(parameter.shape))).float()
        is_norm = "norm" in name and name.endswith("weight")
        parameter.data.copy_(1 + 0.02 * values if is_norm else 0.05 * values)


def crops(step: int) -> list[Tensor]:
    """Return the views of one step: smooth random images, global crops first."""
    random = np.random.RandomState(1000 + step)
    views = []
    for view in range(2 + LOCALS):
        size = IMAGE if view < 2 else LOCAL
        coarse = torch.from_numpy(random.standard_normal((BATCH, 3, 8, 8))).float()
        image = nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
        noise = torch.from_numpy(random.standard_normal((BATCH, 3, size, size))).float()
        views.append(image + 0.3 * noise)
    return views


def masks(step: int) -> Tensor:
    """Return which patches of the two global views are hidden, ``(2 * BATCH, N)`` bool.

    Every third view has no hidden patch, and the others have different numbers of them.
    """
    random = np.random.RandomState(2000 + step)
    patches = (IMAGE // PATCH) ** 2
    hidden = np.zeros((2 * BATCH, patches), dtype=bool)
    for row in range(2 * BATCH):
        if row % 3:
            hidden[row, random.permutation(patches)[: random.randint(6, 33)]] = True
    return torch.from_numpy(hidden)
