"""Published methods as values: each function returns a policy that knows its paper.

>>> import torch
>>> import maskdistill as md
>>> preset = md.presets.ibot()
>>> preset.apply, preset.objectives
('token', ('dino', 'ibot'))
>>> crops = [torch.zeros(4, 3, 224, 224)] * 2 + [torch.zeros(4, 3, 96, 96)] * 8
>>> masks = preset(crops, patch_size=16)

A preset draws masks; it contains no loss and no network. Of the objectives that are named, this
library has DINO's, ``DINOLoss``. The settings of each paper are in ``.defaults``, what differs from
the authors' code on purpose in ``.differences``, and both on its card in the docs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from maskdistill.presets.attention import attmask_high, attmask_hint, attmask_low, milan, mst
from maskdistill.presets.distillation import asymmetric, dino, dinov2, dinov3, ibot, msn
from maskdistill.presets.informed import adios, cl_mae, dppmask, hpm, semmae
from maskdistill.presets.latent import capi, cluster, data2vec2, ijepa
from maskdistill.presets.pixels import beit, colormae, mae, mae_grid, simmim, um_mae
from maskdistill.presets.preset import Paper, Preset

ALL: Mapping[str, Callable[..., Preset]] = {
    factory.__name__: factory
    for factory in (
        dino, asymmetric, ibot, dinov2, dinov3, attmask_high, attmask_hint, attmask_low, mst, msn,
        adios, capi, ijepa, data2vec2, milan, cluster, beit, mae, mae_grid, simmim, um_mae,
        colormae, hpm, semmae, cl_mae, dppmask,
    )
}  # fmt: skip
"""Every preset's function by its name: self-distillation, then latent targets, then pixels."""

NAMES: tuple[str, ...] = tuple(ALL)
"""The names in the same order."""

__all__ = ["ALL", "NAMES", "Paper", "Preset", *NAMES]
