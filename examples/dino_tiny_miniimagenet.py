"""DINO with masks on the student's global views, on mini-ImageNet or on built-in scenes."""

from __future__ import annotations

import sys

from maskdistill import cli
from maskdistill.job import JobConfig

DESCRIPTION = """Train DINO under a masking policy.

Without --data it trains on built-in scenes, in minutes on 2 CPU cores; with --data PATH on
mini-ImageNet in whichever form you have it."""

SCENES = JobConfig(
    image_size=48,
    patch_size=8,
    depth=4,
    local_crops=4,
    epochs=10,
    batch_size=64,
    hidden_dim=512,
)

MINI_IMAGENET = JobConfig(
    image_size=64,
    patch_size=8,
    local_crops=6,
)

if __name__ == "__main__":
    sys.exit(cli.train(SCENES, MINI_IMAGENET, description=DESCRIPTION))
