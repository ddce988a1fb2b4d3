"""Maskers that hide exactly as much as they are told: one engine, one hook."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import final

from torch import Tensor

from maskdistill.masking._engine import top_k
from maskdistill.masking.base import Masker, hidden_if_fixed
from maskdistill.masking.context import MaskContext
from maskdistill.masking.ratios import Ratio, check_ratio


@dataclass(frozen=True, repr=False)
class ExactMasker(Masker):
    """Hides exactly round(ratio * N) patches in every row; a subclass says which.

    A subclass fills ``_hide``, or, if scores say it all, is a ``ScoreMasker``.

    Args:
        ratio: share of patches to hide, in [0, 1]; a number, a schedule, or one per image.

    Raises:
        ValueError: ratio out of range.
    """

    ratio: Ratio

    def __post_init__(self) -> None:
        check_ratio(type(self).__name__, "ratio", self.ratio)

    @property
    @final
    def exact(self) -> bool:
        """True: every row hides exactly round(ratio * N)."""
        return True

    @final
    def fixed_count(self, grid: tuple[int, int], progress: float = 0.0) -> int | None:
        """Return the count, if the ratio does not vary by image."""
        return hidden_if_fixed(self.ratio, grid, progress)

    @final
    def _draw(self, context: MaskContext) -> Tensor:
        return self._hide(context, context.count(self.ratio))

    @abstractmethod
    def _hide(self, context: MaskContext, count: int | Tensor) -> Tensor:
        """Return the ``(B, N)`` mask that hides ``count`` patches: one int, or ``(B,)`` int64."""


@dataclass(frozen=True, repr=False)
class ScoreMasker(ExactMasker):
    """Hides the patches with the highest scores; a subclass says what the scores are.

    >>> import torch
    >>> @dataclass(frozen=True, repr=False)
    ... class BottomMasker(ScoreMasker):
    ...     def _scores(self, context):
    ...         rows, columns = context.grid
    ...         row = torch.arange(rows).repeat_interleave(columns)
    ...         return row + context.rand(context.batch, context.patches)
    >>> BottomMasker(0.5)(1, (2, 3))
    tensor([[False, False, False,  True,  True,  True]])

    Args:
        ratio: share of patches to hide, in [0, 1]; a number, a schedule, or one per image.

    Raises:
        ValueError: ratio out of range.
    """

    @final
    def _hide(self, context: MaskContext, count: int | Tensor) -> Tensor:
        return top_k(self._scores(context), count)

    @abstractmethod
    def _scores(self, context: MaskContext) -> Tensor:
        """Return ``(B, N)`` floats on the context's device, random ones from ``context.rand``."""
