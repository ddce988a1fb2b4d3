"""Attention quality of backbones, next to random weights and a box in the middle.

    python examples/attention_quality.py runs/first                        # on the built-in scenes
    python examples/attention_quality.py runs/first --data VOCdevkit/VOC2012
    python examples/attention_quality.py vit_small_patch16_224.dino --pretrained --data FOLDER
    python examples/attention_quality.py a/step-1.pt a/step-2.pt --json scores.json

A backbone is a run, a file of weights, or a model of timm by name. Data are a folder with images/
and masks/, VOC's layout, or a pack with masks: docs/evaluation/attention.md.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from maskdistill.data import Scenes
from maskdistill.evaluation.attention_report import attention_quality
from maskdistill.evaluation.backbones import load_backbone
from maskdistill.evaluation.boxes import mask_boxes
from maskdistill.evaluation.mask_data import MaskData, open_masks


@dataclass(frozen=True)
class Settings:
    """What to measure, on what."""

    backbones: Annotated[tuple[str, ...], tyro.conf.Positional] = ("vit_tiny_patch16_224",)
    """Runs, files of weights, or names of timm models."""
    pretrained: bool = False
    """Take timm's weights of named models, which may download them; else they are random."""
    data: Path | None = None
    """Images with masks; None is the built-in scenes."""
    image_size: int = 64
    """Pixels of a side of what the model sees."""
    patch_size: int | None = None
    """Pixels of a side of a patch; None is the model's own."""
    resize: Literal["squeeze", "crop"] = "squeeze"
    """Squeeze the whole image into the square, or cut out its centre."""
    limit: int = 1000
    """Most images."""
    mass: float = 0.6
    """Share of the attention that counts as the object."""
    tolerance: float = 0
    """Pixels by which the point of greatest attention may miss the object."""
    seeds: tuple[int, ...] = (0, 1)
    """Of the copies with random weights."""
    json: Path | None = None
    """Write all scores there."""


def scenes(settings: Settings) -> MaskData:
    """Return the built-in scenes as images with masks."""
    pictures = Scenes(min(settings.limit, 500), size=settings.image_size, split="val")
    masks = torch.from_numpy(pictures.masks)
    return MaskData(
        torch.from_numpy(pictures.images).permute(0, 3, 1, 2).contiguous(),
        masks,
        None,
        list(mask_boxes(masks).float()[:, None]),
        tuple(map(str, range(len(pictures)))),
        {},
        f"{len(pictures)} built-in scenes.",
    )


def main(settings: Settings) -> None:
    """Measure each backbone and print its table."""
    start = time.perf_counter()
    if settings.data is None:
        data = scenes(settings)
    else:
        data = open_masks(
            settings.data,
            image_size=settings.image_size,
            resize=settings.resize,
            limit=settings.limit,
        )
    print(f"{data.note} Read in {time.perf_counter() - start:.0f} s.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {}
    for source in settings.backbones:
        vit = load_backbone(
            source,
            image_size=settings.image_size,
            patch_size=settings.patch_size,
            pretrained=settings.pretrained,
        ).to(device)
        start = time.perf_counter()
        quality = attention_quality(
            vit,
            data.images,
            data.masks,
            boxes=data.boxes,
            ignore=data.ignore,
            seeds=settings.seeds,
            mass=settings.mass,
            tolerance=settings.tolerance,
        )
        print(f"\n{source} ({time.perf_counter() - start:.0f} s)\n{quality}")
        found[source] = dataclasses.asdict(quality)
    if settings.json is not None:
        settings.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings, description=__doc__))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
