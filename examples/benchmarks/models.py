"""What MaskedViT costs without a mask, and what dropping tokens saves.

python examples/benchmarks/models.py
python examples/benchmarks/models.py --models vit_base_patch16_224 --batch 64 --device cuda
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Literal

import timm
import torch
import tyro
from timing import by_turns, faster, machine, seconds, table
from torch import Tensor, nn

import maskdistill as md
from maskdistill.masking.mask import PatchMask

SIZE, RATIO = 224, 0.5


@dataclass(frozen=True)
class Settings:
    """What to time, and how."""

    models: tuple[str, ...] = ("vit_tiny_patch16_224", "vit_small_patch16_224")
    """timm's names."""
    batch: int = 4
    """Images of 224 pixels per forward."""
    rounds: int = 41
    """How often each of a pair is timed, by turns."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to run."""


@torch.no_grad()
def forward(
    vit: nn.Module, images: Tensor, device: str, apply: Literal["token", "drop"] | None = None
) -> float:
    """Time a forward of the bare model, or of the same one wrapped for this time alone."""
    if apply is None:
        return seconds(lambda: vit(images), device)
    wrapped = md.MaskedViT(vit, apply)
    taken = seconds(lambda: wrapped(images), device)
    wrapped.unwrap()
    return taken


def step(vit: nn.Module, images: Tensor, device: str, mask: PatchMask | None = None) -> float:
    """Time a forward and a backward, as of a student's global view."""

    def run() -> None:
        vit(images, mask).square().mean().backward()
        vit.zero_grad(set_to_none=True)

    return seconds(run, device)


def main(s: Settings) -> None:
    """Time every model."""
    torch.set_num_threads(1)
    images = torch.randn(s.batch, 3, SIZE, SIZE, device=s.device)
    rows = []
    for name in s.models:
        vit = timm.create_model(name, num_classes=0, dynamic_img_size=True).to(s.device)
        pairs = {
            f"plain timm, `{apply}` with no mask; forward": (
                partial(forward, vit, images, s.device),
                partial(forward, vit, images, s.device, apply),
            )
            for apply in ("token", "drop")
        }
        for what, (first, second) in pairs.items():
            taken = by_turns({"first": first, "second": second}, s.rounds, f"{name}: {what}")
            rows.append((name, what, taken))
        dropping = md.MaskedViT(vit, "drop")
        mask = md.RandomMasker(RATIO)(s.batch, dropping.grid(SIZE, SIZE), device=s.device)
        taken = by_turns(
            {
                "first": partial(step, dropping, images, s.device),
                "second": partial(
                    step, dropping, images, s.device, PatchMask(mask, int(mask[0].sum()))
                ),
            },
            s.rounds,
            f"{name}, dropping",
        )
        rows.append((name, "all tokens, half of them dropped; forward and backward", taken))
    print(machine(s.device), s, sep="\n", end="\n\n")
    head = ("model", "time of the second over the first", "ratio", "quartiles", "first, ms")
    cells = [
        (n, what, *faster(t["second"], t["first"]), f"{1000 * median(t['first']):.0f}")
        for n, what, t in rows
    ]
    print(*table(head, cells), sep="\n")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
