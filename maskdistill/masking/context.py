"""Everything a masker may look at: the one place where new signals come in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from maskdistill.masking.ratios import PerImage, Ratio, hidden_count, hidden_counts, scalar_at


@dataclass(frozen=True)
class MaskContext:
    """Everything a masker may look at when it draws.

    Attributes:
        batch: number of images, B.
        grid: patch rows and columns, (H, W); N = H * W patches, row-major.
        device: where the mask is wanted.
        generator: the only source of randomness; None is torch's global generator.
        progress: how far training has come, in [0, 1].
        signals: named tensors that guide the draw, such as ``attention``.
    """

    batch: int
    grid: tuple[int, int]
    device: torch.device
    generator: torch.Generator | None
    progress: float
    signals: Mapping[str, Tensor]

    @property
    def patches(self) -> int:
        """Number of patches, N."""
        return self.grid[0] * self.grid[1]

    def rand(self, *shape: int) -> Tensor:
        """Draw float32 numbers, uniform in [0, 1), on the context's device.

        A generator on another device is honoured: the numbers are drawn there and moved, so a CPU
        generator gives the same masks on a GPU.
        """
        if self.generator is None:
            return torch.rand(shape, device=self.device)
        drawn = torch.rand(shape, generator=self.generator, device=self.generator.device)
        return drawn.to(self.device, non_blocking=True)

    def count(self, ratio: Ratio) -> int | Tensor:
        """Turn a ratio into hidden patches: one int for all rows, or ``(B,)`` int64."""
        if isinstance(ratio, PerImage):
            drawn = ratio.sample(self.batch, self.rand, self.progress)
            return hidden_counts(drawn, self.patches)
        return hidden_count(scalar_at(ratio, self.progress), self.patches)

    def per_patch(self, name: str) -> Tensor:
        """Return a signal as ``(B, N)`` float32, averaged over heads where it is ``(B, h, N)``."""
        signal = self.signals[name]
        shape = tuple(signal.shape)
        if len(shape) not in (2, 3) or (shape[0], shape[-1]) != (self.batch, self.patches):
            raise ValueError(
                f"signal {name!r} must be (B, N) or (B, heads, N) with B={self.batch} and "
                f"N={self.patches} (grid {self.grid[0]}x{self.grid[1]}, prefix tokens left out); "
                f"got {shape}."
            )
        signal = signal.to(self.device, torch.float32)
        return signal.mean(dim=1) if signal.ndim == 3 else signal
