"""Everything a masker may look at: the one place where new signals come in."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, MutableMapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maskdistill.masking.ratios import PerImage, Ratio, hidden_count, hidden_counts, scalar_at


def top_k(scores: Tensor, k: int | Tensor) -> Tensor:
    """Mark the ``k`` highest scores of each row: ``(B, N)`` floats to ``(B, N)`` bools.

    ``k`` is one number for all rows, or ``(B,)`` int64 with a number per row. Ties never make a
    row hide more or fewer than ``k``.
    """
    mask = torch.zeros_like(scores, dtype=torch.bool)
    if isinstance(k, int):
        return mask.scatter_(1, scores.topk(k, dim=1, sorted=False).indices, True)
    order = scores.argsort(dim=1, descending=True)
    rank = torch.arange(scores.shape[1], device=scores.device)
    return mask.scatter_(1, order, rank < k[:, None])


@dataclass(frozen=True)
class MaskContext:
    """Everything a masker may look at when it draws.

    Attributes:
        batch: number of rows to draw, B.
        grid: patch rows and columns, (H, W); N = H * W patches, row-major.
        device: where the mask is wanted.
        generator: the only source of randomness; None is torch's global generator.
        progress: how far training has come, in [0, 1].
        signals: named tensors that guide the draw, such as ``attention``; one row each per row.
        views: views per image that the batch holds, view by view: rows 0 to B / views - 1 are the
            first view of each image.
        memory: what was drawn for other views of the same images, or None.
    """

    batch: int
    grid: tuple[int, int]
    device: torch.device
    generator: torch.Generator | None
    progress: float
    signals: Mapping[str, Tensor]
    views: int = 1
    memory: MutableMapping[Hashable, Tensor] | None = None

    @property
    def patches(self) -> int:
        """Number of patches, N."""
        return self.grid[0] * self.grid[1]

    @property
    def can_look(self) -> bool:
        """Whether the host can look at tensors: without waiting for a device, and uncompiled."""
        return self.device.type == "cpu" and not torch.compiler.is_compiling()

    @property
    def images(self) -> int:
        """Number of images that the rows are views of."""
        return self.batch // self.views

    def first_view(self) -> MaskContext:
        """Return the context of the first view of each image alone, signals too."""
        rows = self.images
        signals = {name: signal[:rows] for name, signal in self.signals.items()}
        return self.replaced(batch=rows, signals=signals, views=1)

    def replaced(
        self,
        *,
        batch: int | None = None,
        grid: tuple[int, int] | None = None,
        signals: Mapping[str, Tensor] | None = None,
        views: int | None = None,
    ) -> MaskContext:
        """Return the same context with another batch, grid, signals or views."""
        return MaskContext(
            self.batch if batch is None else batch,
            self.grid if grid is None else grid,
            self.device,
            self.generator,
            self.progress,
            self.signals if signals is None else signals,
            self.views if views is None else views,
            self.memory,
        )

    def once(self, key: Hashable, draw: Callable[[], Tensor]) -> Tensor:
        """Return what ``key`` drew before for these images, or draw and remember it."""
        if self.memory is None:
            return draw()
        if key not in self.memory:
            self.memory[key] = draw()
        return self.memory[key]

    def rand(self, *shape: int) -> Tensor:
        """Draw float32 numbers, uniform in [0, 1), on the context's device.

        A generator on another device is honoured: the numbers are drawn there and moved, so a CPU
        generator gives the same masks on a GPU.
        """
        if self.generator is None:
            return torch.rand(shape, device=self.device, dtype=torch.float32)
        drawn = torch.rand(
            shape, generator=self.generator, device=self.generator.device, dtype=torch.float32
        )
        # From an accelerator to the CPU one has to wait, or would read what is not there yet.
        return drawn.to(self.device, non_blocking=self.device.type != "cpu")

    def highest(self, scores: Tensor, k: int | Tensor, ties: bool = True) -> Tensor:
        """Mark the ``k`` highest scores of each row, ties at random: ``(B, N)`` bools.

        Scores that follow a signal have ties: attention that is still uniform, flat ground, binary
        maps. Without this the order of the patches would decide, the same way each time. One
        random order per call serves all rows. ``ties=False`` says that there are none, for the
        scores are random themselves.
        """
        if not ties:
            if self.can_look:
                _refuse_nan(scores)
            return top_k(scores, k)
        order = self.rand(scores.shape[1]).argsort()
        if isinstance(k, Tensor) or not k or not self.can_look:
            if self.can_look:
                _refuse_nan(scores)
            return top_k(scores[:, order], k)[:, order.argsort()]
        # The same, but only those rows are put into that order that have to choose between equals.
        value, index = scores.topk(k, dim=1, sorted=False)
        mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, index, True)
        lowest = value.amin(dim=1, keepdim=True)
        _refuse_nan(lowest)  # NaN counts as highest, so it is here if it is anywhere
        rows = ((scores >= lowest).sum(dim=1) > k).nonzero().squeeze(1)
        if len(rows):
            mask[rows] = top_k(scores[rows][:, order], k)[:, order.argsort()]
        return mask

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

    def vectors(self, name: str) -> Tensor:
        """Return a signal as one vector per patch, ``(B, N, D)`` float32.

        Images ``(B, C, h, w)`` are cut into patches: D = C * h * w / N pixel values.
        """
        signal = self.signals[name]
        shape, (rows, columns) = tuple(signal.shape), self.grid
        if len(shape) == 4 and shape[0] == self.batch and not (
            shape[2] % rows or shape[3] % columns
        ):  # fmt: skip
            patches = signal.to(self.device, torch.float32).reshape(
                self.batch, shape[1], rows, shape[2] // rows, columns, shape[3] // columns
            )
            return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        if len(shape) != 3 or shape[:2] != (self.batch, self.patches):
            raise ValueError(
                f"signal {name!r} must be images (B, C, h, w) whose sides the grid {rows}x{columns}"
                f" divides, or vectors (B, N, D), with B={self.batch} and N={self.patches}; "
                f"got {shape}."
            )
        return signal.to(self.device, torch.float32)


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Suspend autocast: what is hidden must not depend on the precision of a network."""
    if device.type == "meta":  # has no autocast; torch 2.6 could not trace the question
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def _refuse_nan(scores: Tensor) -> None:
    if scores.isnan().any():
        raise ValueError(
            "the signal has values that are no numbers (NaN), so it cannot say which patches to "
            "hide. Has the network that gave it diverged?"
        )
