"""Every masker, once: the generic tests run over this table. Add yours here, in one line."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import maskdistill as md


@dataclass(frozen=True)
class Entry:
    """A masker, and the constant ratio that its rows hide exactly, if they do.

    ``still``: draws the same whatever the seed. ``text``: its repr can be read back.
    """

    masker: md.Masker
    ratio: float | None = None
    still: bool = False
    text: bool = True


class Brightness(torch.nn.Module):
    """Stands for a mask network: a map of scores, a quarter of the image's size."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(images.mean(1, keepdim=True), 2)


_random, _block = md.RandomMasker(0.3), md.BlockMasker(0.4)

_half = md.RandomMasker(0.5)

TABLE: dict[str, Entry] = {
    "none": Entry(md.NoMasker(), 0.0, still=True),
    "random": Entry(_random, 0.3),
    "random none": Entry(md.RandomMasker(0.0), 0.0, still=True),
    "random all": Entry(md.RandomMasker(1.0), 1.0, still=True),
    "random uniform": Entry(md.RandomMasker(md.Uniform(0.1, 0.5))),
    "random stratified": Entry(md.RandomMasker(md.Stratified(0.1, 0.5))),
    "random half stratified": Entry(md.RandomMasker(md.Stratified(0.1, 0.5, 0.5, jitter=False))),
    "random scheduled": Entry(md.RandomMasker(md.Linear(0.1, 0.5))),
    "random quadratic": Entry(md.RandomMasker(md.masking.Quadratic(0.1, 0.5))),
    "random steps": Entry(md.RandomMasker(md.masking.Steps((0.2, 0.5), (0.3,)))),
    "random warm-up": Entry(
        md.RandomMasker(md.masking.WarmUp(md.masking.Cosine(0.5, 0.3), 0.1, start=0.2))
    ),
    "bernoulli": Entry(md.masking.BernoulliMasker(0.4)),
    "bernoulli uniform": Entry(md.masking.BernoulliMasker(md.Uniform(0.1, 0.5))),
    "grid": Entry(md.masking.GridMasker(), still=True),
    "grid of three": Entry(md.masking.GridMasker(3, visible=4, random=True)),
    "one per cell": Entry(md.masking.GridMasker(2, random=True)),
    "checkerboard": Entry(md.masking.CheckerboardMasker()),
    "checkerboard of two": Entry(md.masking.CheckerboardMasker(2, random=False), still=True),
    "units": Entry(md.RandomMasker(0.6).in_units(2)),
    "block": Entry(_block, 0.4),
    "block short": Entry(md.BlockMasker(0.5, exact=False)),
    "block all": Entry(md.BlockMasker(1.0), 1.0, still=True),
    "block capped": Entry(md.BlockMasker(0.5, max_patches=8, aspect=(0.5, 2.0)), 0.5),
    "block of ibot": Entry(md.BlockMasker(0.5, min_patches=None, exact=False)),
    "block uniform": Entry(md.BlockMasker(md.Uniform(0.1, 0.5))),
    "block rolled": Entry(_block.rolled(), 0.4),
    "single block": Entry(md.masking.SingleBlockMasker(0.4), 0.4),
    "single block long": Entry(md.masking.SingleBlockMasker(0.3, aspect=(5.0, 9.0)), 0.3),
    "single block around": Entry(md.masking.SingleBlockMasker(0.65, inverse=True).rolled(), 0.65),
    "single block uniform": Entry(md.masking.SingleBlockMasker(md.Uniform(0.1, 0.5), inverse=True)),
    "squares": Entry(md.masking.SquaresMasker(0.4), 0.4),
    "squares around": Entry(md.masking.SquaresMasker(0.8, inverse=True), 0.8),
    "squares even": Entry(md.masking.SquaresMasker(0.5, size=4, adjust=0.2), 0.5),
    "squares uniform": Entry(md.masking.SquaresMasker(md.Stratified(0.5, 0.9), inverse=True)),
    "multi-block": Entry(md.masking.MultiBlockMasker()),
    "multi-block small": Entry(md.masking.MultiBlockMasker(2, (0.1, 0.3), (0.5, 2.0), (0.5, 0.7))),
    "noise red": Entry(md.masking.ColorNoiseMasker(0.6, "red"), 0.6),
    "noise green": Entry(md.masking.ColorNoiseMasker(0.75), 0.75),
    "noise blue": Entry(md.masking.ColorNoiseMasker(0.5, "blue", fine=0.8), 0.5),
    "noise purple": Entry(md.masking.ColorNoiseMasker(md.Uniform(0.1, 0.5), "purple", coarse=3.0)),
    "attention most": Entry(md.AttentionGuidedMasker(0.3), 0.3, still=True),
    "attention least": Entry(md.AttentionGuidedMasker(0.3, hide="least"), 0.3, still=True),
    "attention soft": Entry(md.AttentionGuidedMasker(0.5, temperature=1.0), 0.5),
    "attention loose": Entry(md.AttentionGuidedMasker(0.5, temperature=math.inf), 0.5),
    "attention cooling": Entry(
        md.AttentionGuidedMasker(0.5, temperature=md.masking.Cosine(2.0, 0.0)), 0.5
    ),
    "attention uniform": Entry(md.AttentionGuidedMasker(md.Uniform(0.1, 0.5))),
    "attention shared": Entry(md.AttentionGuidedMasker(0.5, share=0.3), 0.5),
    "attention hint": Entry(md.masking.AttentionHintMasker(0.3), 0.3),
    "attention hint short": Entry(
        md.masking.AttentionHintMasker(0.5, md.Uniform(0.1, 0.9), exact=False)
    ),
    "attention hint uniform": Entry(
        md.masking.AttentionHintMasker(md.Uniform(0.1, 0.5), md.Linear(0, 1))
    ),
    "signal": Entry(md.SignalMasker(0.4, "loss"), 0.4, still=True),
    "signal growing": Entry(md.SignalMasker(0.75, "loss", share=md.Linear(0.0, 0.5)), 0.75),
    "signal uniform": Entry(md.SignalMasker(md.Uniform(0.1, 0.5), "loss", "least", share=0.5)),
    "signal soft": Entry(md.SignalMasker(0.5, "loss", temperature=0.5), 0.5),
    "parts": Entry(md.masking.PartMasker(0.75), 0.75),
    "parts whole": Entry(md.masking.PartMasker(0.5, whole=1.0), 0.5),
    "parts uniform": Entry(md.masking.PartMasker(md.Uniform(0.1, 0.5), whole=0.5)),
    "cluster": Entry(md.masking.ClusterMasker(0.5), 0.5),
    "cluster uniform": Entry(md.masking.ClusterMasker(md.Uniform(0.1, 0.5), signal="features")),
    "cluster free": Entry(md.masking.ClusterMasker(0.5, exact=False)),
    "dpp": Entry(md.masking.DPPMasker(0.6), 0.6),
    "dpp uniform": Entry(md.masking.DPPMasker(md.Uniform(0.3, 0.9), signal="features")),
    "learned": Entry(md.masking.LearnedMasker(0.3, Brightness()), 0.3, still=True, text=False),
    "learned soft": Entry(
        md.masking.LearnedMasker(0.3, Brightness(), temperature=0.1), 0.3, text=False
    ),
    "scene": Entry(md.SceneMasker(_block)),
    "scene apart": Entry(md.SceneMasker(_half, (5, 7), cover=1.0, views="complementary")),
    "union": Entry(_random | _block),
    "intersection": Entry(_random & _block),
    "difference": Entry(_block - _random),
    "complement": Entry(~_block),
    "exactly": Entry((_random | _block).exactly(0.45), 0.45),
    "exactly uniform": Entry(_block.exactly(md.Uniform(0.2, 0.6))),
    "sometimes": Entry(_block.sometimes(0.5)),
    "sometimes scheduled": Entry(_random.sometimes(md.Linear(0.0, 1.0)), still=True),
    "mixture": Entry(md.Mixture({_random: 0.5, _block: 0.25, md.NoMasker(): 0.25})),
    "mixture scheduled": Entry(md.Mixture({_random: md.Linear(1, 0), _block: md.Linear(0, 1)})),
    "shared": Entry(_random.shared(), 0.3),
    "same in views": Entry(_random.same_in_views(), 0.3),
    "complementary views": Entry(_half.complementary_views()),
    "total": Entry(md.RandomMasker(md.Uniform(0.1, 0.9)).total(0.5), 0.5),
    "nested": Entry(~(md.AttentionGuidedMasker(0.2) | _random.sometimes(0.3)) - _block),
}


def signals(masker: md.Masker, batch: int, grid: tuple[int, int]) -> dict[str, Tensor]:
    """Make up what a masker needs."""
    generator = torch.Generator().manual_seed(7)
    rows, columns = grid
    patches = rows * columns
    logits = 2 * torch.randn(batch, 3, patches, generator=generator)
    left, top = 0.5 * torch.rand(2, batch, generator=generator)
    width, height = 0.2 + 0.3 * torch.rand(2, batch, generator=generator)
    known = {
        "attention": logits.softmax(dim=-1),
        "loss": torch.randn(batch, patches, generator=generator),
        "parts": torch.randint(7, (batch, patches), generator=generator),
        "images": torch.randn(batch, 3, 4 * rows, 4 * columns, generator=generator),
        "features": torch.randn(batch, patches, 5, generator=generator),
        "boxes": torch.stack([left, top, left + width, top + height], dim=1),
        "flipped": torch.rand(batch, generator=generator) < 0.5,
    }
    return {name: known[name] for name in masker.needs}
