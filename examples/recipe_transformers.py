"""DINO on a vision transformer of Hugging Face's transformers, with masks: five lines of it.

    pip install "transformers>=4.57"
    python examples/recipe_transformers.py
    python examples/recipe_transformers.py --model vit --apply drop
    python examples/recipe_transformers.py --model dinov3_vit --masker "BlockMasker(0.4)"
    python examples/recipe_transformers.py --model PATH

Trains a small model with random weights for 60 steps on built-in scenes, in about a minute on 2
CPU cores: long enough to see that all parts work together, and far too short to learn. ``PATH`` is
a folder that ``save_pretrained`` wrote, or a name on the hub. The five lines, and what the loop was
without them: docs/recipes/transformers.md.
"""

from __future__ import annotations

import argparse
import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate

import maskdistill as md
from maskdistill.data import MultiCrop, Scenes, normalize
from maskdistill.objectives import DINOHead, DINOLoss

KINDS = ("vit", "dinov2", "dinov2_with_registers", "dinov3_vit")
OUT_DIM, TEACHER_TEMP, MOMENTUM = 256, 0.04, 0.98


class Network(nn.Module):
    """A model of transformers, and DINO's head on its class token.

    Args:
        backbone: has ``last_hidden_state`` in its output, the class token first.
        width: of its tokens.
        options: for each call of it.
    """

    def __init__(self, backbone: nn.Module, width: int, options: dict[str, bool]) -> None:
        super().__init__()
        self.backbone, self.options = backbone, options
        self.head = DINOHead(width, OUT_DIM, hidden_dim=256, bottleneck_dim=64)

    def forward(self, images: Tensor) -> Tensor:
        """Return prototype scores, ``(B, OUT_DIM)``."""
        tokens: Tensor = self.backbone(images, **self.options).last_hidden_state
        scores: Tensor = self.head(tokens[:, 0])
        return scores


def build(model: str) -> Any:
    """Return a small model of one of ``KINDS`` with random weights, or a saved one."""
    from transformers import AutoConfig, AutoModel

    if model not in KINDS:
        return AutoModel.from_pretrained(model)
    config = AutoConfig.for_model(
        model, image_size=64, patch_size=8, hidden_size=96, num_hidden_layers=3,
        num_attention_heads=3, intermediate_size=384,
    )  # fmt: skip
    return AutoModel.from_config(config)


def first_layer(model: nn.Module) -> str:
    """Return the path of the first transformer layer, whose place differs by model and release."""
    ends = ("layer.0", "layers.0")
    path: str = next(name for name, _ in model.named_modules() if name.endswith(ends))
    return path


class Crops(Dataset[list[Tensor]]):
    """Images to two global and four local crops, as floats.

    Args:
        images: of (RGB image, label) pairs; labels are ignored.
        size: pixels of the global crops' sides; local ones have half.
    """

    def __init__(self, images: Scenes, size: int) -> None:
        self.images, self.transform = images, MultiCrop(size, size // 2, local_crops=4)

    def __getitem__(self, index: int) -> list[Tensor]:
        return [normalize(crop) for crop in self.transform(self.images[index][0]).images]

    def __len__(self) -> int:
        return len(self.images)


def main() -> None:
    """Train, and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="dinov2", help=f"{', '.join(KINDS)}, or a saved one")
    parser.add_argument("--apply", default="token", choices=("token", "drop", "pixel"))
    parser.add_argument("--masker", default="RandomMasker(0.3)")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    backbone = build(args.model)
    patch, width = backbone.config.patch_size, backbone.config.hidden_size
    named = inspect.signature(backbone.forward).parameters
    options = {name: True for name in named if name == "interpolate_pos_encoding"}
    backbone = md.MaskedViT(backbone, args.apply, first_block=first_layer(backbone))
    policy = md.AsymmetricMaskPolicy(md.parse_masker(args.masker))

    student: Any = Network(backbone, width, options)
    teacher = copy.deepcopy(student).requires_grad_(False).eval()
    criterion = DINOLoss(OUT_DIM)
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-4, weight_decay=0.04)
    crops_of_scenes = Crops(Scenes(args.steps * args.batch_size, 8 * patch), 8 * patch)
    loader = DataLoader(crops_of_scenes, args.batch_size, shuffle=True, collate_fn=default_collate)

    for step, crops in enumerate(loader):
        targets = torch.cat([teacher(crop) for crop in crops[:2]])
        with student.backbone.masking(policy(crops, patch).student):
            scores = torch.cat([student(crop) for crop in crops])
        loss = criterion(scores, criterion.targets(targets, TEACHER_TEMP), views=len(crops))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 3.0)
        optimizer.step()
        criterion.update_center(targets)
        with torch.no_grad():
            for average, p in zip(teacher.parameters(), student.parameters(), strict=True):
                average.lerp_(p, 1 - MOMENTUM)
        if step % 10 == 0 or step == args.steps - 1:
            print(f"step {step:4d}  loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    main()
