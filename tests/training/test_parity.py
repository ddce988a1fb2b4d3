"""Our loss curves follow facebookresearch/dino's and bytedance/ibot's own.

DINO's golden numbers were obtained by running that repository at commit
7c446df5b9f45747937fb0d72314eb9f7b66930a (its VisionTransformer, DINOHead, MultiCropWrapper,
DINOLoss, schedules, parameter groups, clip_gradients, cancel_gradients_last_layer and EMA, in the
order of train_one_epoch) on the weights and crops of parity.py, in float32 on a CPU, without drop
path, whose random numbers the two draw differently. iBOT's likewise, at commit
da316d82636a7a7356835ef224b13d5f3ace0489 (its VisionTransformer, iBOTHead with a shared head,
MultiCropWrapper, iBOTLoss and the rest, in the order of its train_one_epoch), with the masks of
parity.py.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

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

IBOT_CLASS = [
    5.8254747, 5.8676147, 5.8209891, 5.7960892, 5.9671926, 5.9801502, 6.0099349, 6.0375147,
    6.1600986, 6.1730719, 6.187016, 6.1993957, 6.210618, 6.2179418, 6.2247868, 6.2282591,
    6.2330046, 6.2358098, 6.2383556, 6.2413154,
]  # fmt: skip
IBOT_PATCH = [
    3.8054678, 3.8163238, 3.8241935, 3.8351526, 3.8964026, 3.8807859, 3.8671193, 3.8582692,
    3.8920069, 3.8868198, 3.8862956, 3.8861179, 3.8893282, 3.8901334, 3.8917627, 3.8935328,
    3.8951323, 3.8964927, 3.8978038, 3.8995614,
]  # fmt: skip
IBOT_CENTER_NORMS = 1.1668832302093506, 0.9867460131645203
IBOT_TEACHER_NORM, IBOT_STUDENT_NORM = 87.12430815174012, 87.0723714318223
IBOT_TOKEN_NORM = 0.02491777576506138


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


@dataclass(frozen=True, repr=False)
class Given(md.Masker):
    """Hides what parity.py says, step by step."""

    def draw(self, context: md.masking.MaskContext) -> Tensor:
        return parity.masks(round(context.progress * parity.EPOCHS * parity.PER_EPOCH))


@pytest.fixture(autouse=True)
def _original_interpolation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        timm.models.vision_transformer, "resample_abs_pos_embed", original_interpolation
    )


def build(policy: md.ViewPolicy, **changes: Any) -> Trainer:
    settings: dict[str, Any] = {
        "image_size": parity.IMAGE,
        "local_size": parity.LOCAL,
        "local_crops": parity.LOCALS,
        "patch_size": parity.PATCH,
        "depth": parity.DEPTH,
        "drop_path": 0.0,
        "epochs": parity.EPOCHS,
        "batch_size": parity.BATCH,
        "out_dim": parity.OUT_DIM,
        "hidden_dim": parity.HIDDEN,
        "norm_last_layer": False,
        "teacher_temp": parity.TEMP_END,
        "warmup_teacher_temp": parity.TEMP_START,
        "warmup_teacher_temp_epochs": parity.TEMP_EPOCHS,
        "lr": parity.LR,
        "min_lr": parity.MIN_LR,
        "warmup_epochs": parity.WARMUP_EPOCHS,
        "weight_decay": parity.WEIGHT_DECAY,
        "weight_decay_end": parity.WEIGHT_DECAY_END,
        "clip_grad": parity.CLIP,
        "freeze_last_layer": parity.FREEZE_EPOCHS,
        "momentum": parity.MOMENTUM,
        "device": "cpu",
        "precision": "float32",
    }
    trainer = Trainer(TrainingConfig(**{**settings, **changes}), Blank(), policy)
    student = trainer.state.student_net
    parity.fill_weights(student.backbone.backbone)
    parity.fill_weights(student.head)
    trainer.teacher.load_state_dict(student.state_dict())
    return trainer


def norm(module: nn.Module) -> float:
    weights = [p.detach().double().square().sum() for n, p in module.named_parameters()
               if "mask_token" not in n]  # fmt: skip
    return math.sqrt(float(sum(weights)))


def test_twenty_steps_of_the_original() -> None:
    trainer = build(md.ViewPolicy.none())
    assert trainer.total_steps == len(LOSSES) == 20
    losses = []
    for step in range(20):
        trainer.state.student.train()
        metrics = train_step(
            trainer.state, parity.crops(step), trainer.policy, trainer.settings(step)
        )
        losses.append(float(metrics.loss))
    np.testing.assert_allclose(losses, LOSSES, rtol=2e-6)

    # Not the loss alone: the centre, both networks and what the teacher makes of an image.
    loss, _ = trainer.state.objective.terms()["loss"]
    assert float(loss.center.norm()) == pytest.approx(CENTER_NORM, rel=1e-4)
    assert norm(trainer.teacher) == pytest.approx(TEACHER_NORM, rel=1e-6)
    assert norm(trainer.state.student) == pytest.approx(STUDENT_NORM, rel=1e-6)
    with torch.no_grad():
        features = trainer.teacher.backbone(parity.crops(99)[0])[0, :5]
    torch.testing.assert_close(features, torch.tensor(FEATURES), rtol=2e-3, atol=2e-3)


def test_the_curve_notices_a_missing_detail() -> None:
    """Had we clipped by the global norm, as most do, the curve would leave the original's."""
    trainer, losses = build(md.ViewPolicy.none()), []
    for step in range(20):
        settings = dataclasses.replace(trainer.settings(step), clip_mode="global")
        losses.append(
            float(train_step(trainer.state, parity.crops(step), trainer.policy, settings).loss)
        )
    assert max(abs(a / b - 1) for a, b in zip(losses, LOSSES, strict=True)) > 1e-4


def ibot_curves(
    changes: dict[str, Any], steps: int = 20
) -> tuple[Trainer, list[float], list[float]]:
    """Return both losses of each step of an iBOT run, some details of the losses changed."""
    trainer = build(
        md.AsymmetricMaskPolicy(Given()),
        objective="dino+ibot",
        patch_temp=parity.PATCH_TEMP_END,
        warmup_patch_temp=parity.PATCH_TEMP_START,
        warmup_patch_temp_epochs=parity.TEMP_EPOCHS,
    )
    patch_loss, _ = trainer.state.objective.terms()["ibot"]
    for name, value in changes.items():
        setattr(patch_loss, name, value)
    between, patches = [], []
    for step in range(steps):
        trainer.state.student.train()
        metrics = train_step(
            trainer.state, parity.crops(step), trainer.policy, trainer.settings(step)
        )
        assert float(metrics.loss) == pytest.approx(float(sum(metrics.terms.values())))
        between.append(float(metrics.terms["dino"]))
        patches.append(float(metrics.terms["ibot"]))
    return trainer, between, patches


def test_twenty_steps_of_ibot() -> None:
    trainer, between, patches = ibot_curves({})
    np.testing.assert_allclose(between, IBOT_CLASS, rtol=2e-6)
    np.testing.assert_allclose(patches, IBOT_PATCH, rtol=2e-6)
    centers = [float(loss.center.norm()) for loss, _ in trainer.state.objective.terms().values()]
    assert centers == pytest.approx(IBOT_CENTER_NORMS, rel=1e-5)
    assert norm(trainer.teacher) == pytest.approx(IBOT_TEACHER_NORM, rel=1e-6)
    assert norm(trainer.state.student) == pytest.approx(IBOT_STUDENT_NORM, rel=1e-6)
    token = trainer.state.student_net.backbone.mask_token
    assert token is not None
    assert float(token.detach().norm()) == pytest.approx(IBOT_TOKEN_NORM, rel=1e-3)


@pytest.mark.parametrize(
    "changes", [{"center_over": "hidden"}, {"center_momentum": 0.89}, {"student_temp": 0.101}]
)
def test_ibots_curve_notices_a_changed_detail(changes: dict[str, Any]) -> None:
    _, _, patches = ibot_curves(changes, steps=8)
    assert max(abs(a / b - 1) for a, b in zip(patches, IBOT_PATCH, strict=False)) > 1e-4
