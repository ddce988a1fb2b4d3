"""Our loss curve follows facebookresearch/dino's own.

The golden numbers were obtained by running that repository at commit
7c446df5b9f45747937fb0d72314eb9f7b66930a (its VisionTransformer, DINOHead, MultiCropWrapper,
DINOLoss, schedules, parameter groups, clip_gradients, cancel_gradients_last_layer and EMA, in the
order of train_one_epoch) on the weights and crops of parity.py, in float32 on a CPU, without drop
path, whose random numbers the two draw differently.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

import maskdistill as md
from maskdistill.training import Trainer, TrainingConfig, train_step
from tests.training import parity

LOSSES = [
    5.8218651, 5.8633528, 5.8167019, 5.7814107, 5.9549456, 5.9569507, 5.9742074, 5.9962502,
    6.1511388, 6.1661882, 6.1833696, 6.1977491, 6.2100744, 6.220048, 6.2282062, 6.2340612,
    6.2409682, 6.2459049, 6.2513256, 6.256917,
]  # fmt: skip
CENTER_NORM = 1.2676318883895874
TEACHER_NORM = 87.1267245292322
STUDENT_NORM = 87.08015939113064
FEATURES = [0.27829722, 0.29956913, 1.31459200, 1.27504778, 0.05044945]


def original_interpolation(
    pos_embed: Tensor, new_size: tuple[int, int], old_size: tuple[int, int], **_: object
) -> Tensor:
    """The original's bicubic interpolation, which shifts the scale by 0.1 and has no antialias."""
    if tuple(new_size) == tuple(old_size):
        return pos_embed
    prefix, grid = pos_embed[:, :1], pos_embed[:, 1:]
    grid = grid.reshape(1, *old_size, -1).permute(0, 3, 1, 2)
    scale = tuple((new + 0.1) / old for new, old in zip(new_size, old_size, strict=True))
    grid = nn.functional.interpolate(grid, scale_factor=scale, mode="bicubic")
    assert grid.shape[2:] == tuple(new_size)
    return torch.cat([prefix, grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


class Blank(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return parity.BATCH * parity.PER_EPOCH

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        raise AssertionError("the parity run brings its own crops")


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Trainer:
    monkeypatch.setattr(
        timm.models.vision_transformer, "resample_abs_pos_embed", original_interpolation
    )
    config = TrainingConfig(
        image_size=parity.IMAGE,
        local_size=parity.LOCAL,
        local_crops=parity.LOCALS,
        patch_size=parity.PATCH,
        depth=parity.DEPTH,
        drop_path=0.0,
        epochs=parity.EPOCHS,
        batch_size=parity.BATCH,
        out_dim=parity.OUT_DIM,
        hidden_dim=parity.HIDDEN,
        norm_last_layer=False,
        teacher_temp=parity.TEMP_END,
        warmup_teacher_temp=parity.TEMP_START,
        warmup_teacher_temp_epochs=parity.TEMP_EPOCHS,
        lr=parity.LR,
        min_lr=parity.MIN_LR,
        warmup_epochs=parity.WARMUP_EPOCHS,
        weight_decay=parity.WEIGHT_DECAY,
        weight_decay_end=parity.WEIGHT_DECAY_END,
        clip_grad=parity.CLIP,
        freeze_last_layer=parity.FREEZE_EPOCHS,
        momentum=parity.MOMENTUM,
        device="cpu",
        precision="float32",
    )
    trainer = Trainer(config, Blank(), md.ViewPolicy.none())
    student = trainer.state.student_net
    parity.fill_weights(student.backbone.backbone)
    parity.fill_weights(student.head)
    trainer.teacher.load_state_dict(student.state_dict())
    return trainer


def test_twenty_steps_of_the_original(trainer: Trainer) -> None:
    assert trainer.total_steps == len(LOSSES) == 20
    losses = []
    for step in range(20):
        trainer.state.student.train()
        metrics = train_step(
            trainer.state, parity.crops(step), trainer.policy, trainer.settings(step)
        )
        losses.append(float(metrics.loss))
    np.testing.assert_allclose(losses, LOSSES, rtol=1e-4)

    def norm(module: nn.Module) -> float:
        weights = [p.detach().double().square().sum() for n, p in module.named_parameters()
                   if "mask_token" not in n]  # fmt: skip
        return math.sqrt(float(sum(weights)))

    # Not the loss alone: the centre, both networks and what the teacher makes of an image.
    assert float(trainer.state.objective.center.norm()) == pytest.approx(CENTER_NORM, rel=1e-4)
    assert norm(trainer.teacher) == pytest.approx(TEACHER_NORM, rel=1e-6)
    assert norm(trainer.state.student) == pytest.approx(STUDENT_NORM, rel=1e-6)
    with torch.no_grad():
        features = trainer.teacher.backbone(parity.crops(99)[0])[0, :5]
    torch.testing.assert_close(features, torch.tensor(FEATURES), rtol=2e-3, atol=2e-3)


def test_the_curve_notices_a_missing_detail(trainer: Trainer) -> None:
    """Had we clipped by the global norm, as most do, the curve would leave the original's."""
    import dataclasses

    losses = []
    for step in range(20):
        settings = dataclasses.replace(trainer.settings(step), clip_mode="global")
        losses.append(
            float(train_step(trainer.state, parity.crops(step), trainer.policy, settings).loss)
        )
    assert max(abs(a / b - 1) for a, b in zip(losses, LOSSES, strict=True)) > 1e-4
