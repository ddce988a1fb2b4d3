"""Every masker, once: the generic tests run over this table. Add yours here, in one line."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import maskdistill as md


@dataclass(frozen=True)
class Entry:
    """A masker, and the constant ratio that its rows hide exactly, if they do."""

    masker: md.Masker
    ratio: float | None = None


_random, _block = md.RandomMasker(0.3), md.BlockMasker(0.4)

TABLE: dict[str, Entry] = {
    "none": Entry(md.NoMasker(), 0.0),
    "random": Entry(_random, 0.3),
    "random none": Entry(md.RandomMasker(0.0), 0.0),
    "random all": Entry(md.RandomMasker(1.0), 1.0),
    "random uniform": Entry(md.RandomMasker(md.Uniform(0.1, 0.5))),
    "random stratified": Entry(md.RandomMasker(md.Stratified(0.1, 0.5))),
    "random scheduled": Entry(md.RandomMasker(md.Linear(0.1, 0.5))),
    "block": Entry(_block, 0.4),
    "block short": Entry(md.BlockMasker(0.5, exact=False)),
    "block all": Entry(md.BlockMasker(1.0), 1.0),
    "block capped": Entry(md.BlockMasker(0.5, max_patches=8, aspect=(0.5, 2.0)), 0.5),
    "block uniform": Entry(md.BlockMasker(md.Uniform(0.1, 0.5))),
    "attention most": Entry(md.AttentionGuidedMasker(0.3), 0.3),
    "attention least": Entry(md.AttentionGuidedMasker(0.3, hide="least"), 0.3),
    "attention soft": Entry(md.AttentionGuidedMasker(0.5, temperature=1.0), 0.5),
    "attention loose": Entry(md.AttentionGuidedMasker(0.5, temperature=math.inf), 0.5),
    "attention cooling": Entry(md.AttentionGuidedMasker(0.5, temperature=md.Cosine(2.0, 0.0)), 0.5),
    "attention uniform": Entry(md.AttentionGuidedMasker(md.Uniform(0.1, 0.5))),
    "union": Entry(_random | _block),
    "intersection": Entry(_random & _block),
    "difference": Entry(_block - _random),
    "complement": Entry(~_block),
    "exactly": Entry((_random | _block).exactly(0.45), 0.45),
    "exactly uniform": Entry(_block.exactly(md.Uniform(0.2, 0.6))),
    "sometimes": Entry(_block.sometimes(0.5)),
    "sometimes scheduled": Entry(_random.sometimes(md.Linear(0.0, 1.0))),
    "mixture": Entry(md.Mixture({_random: 0.5, _block: 0.25, md.NoMasker(): 0.25})),
    "mixture scheduled": Entry(md.Mixture({_random: md.Linear(1, 0), _block: md.Linear(0, 1)})),
    "nested": Entry(~(md.AttentionGuidedMasker(0.2) | _random.sometimes(0.3)) - _block),
}


def signals(masker: md.Masker, batch: int, grid: tuple[int, int]) -> dict[str, Tensor]:
    """Make up what a masker needs."""
    generator = torch.Generator().manual_seed(7)
    logits = 2 * torch.randn(batch, 3, grid[0] * grid[1], generator=generator)
    known = {"attention": logits.softmax(dim=-1)}
    return {name: known[name] for name in masker.needs}
