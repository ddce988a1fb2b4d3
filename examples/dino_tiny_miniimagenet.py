"""DINO with masks on the student's global views, on mini-ImageNet or on built-in scenes."""

from __future__ import annotations

import sys

from maskdistill import cli
from maskdistill.job import JobConfig

DESCRIPTION = """Train DINO under a masking policy.

Without --data it trains on built-in scenes, in minutes on 2 CPU cores; with --data PATH on
mini-ImageNet in whichever form you have it."""

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
)

MINI_IMAGENET = JobConfig(
    image_size=64,
    patch_size=8,
    local_crops=6,
)

if __name__ == "__main__":
    sys.exit(cli.train(SCENES, MINI_IMAGENET, description=DESCRIPTION))
