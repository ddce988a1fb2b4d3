"""Maskers that know nothing of the image: every patch is as likely to be hidden as any other."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from maskdistill.masking.context import MaskContext
from maskdistill.masking.scores import ScoreMasker


@dataclass(frozen=True, repr=False)
class RandomMasker(ScoreMasker):
    """Hides patches chosen uniformly without replacement.

    >>> RandomMasker(0.5)(4, (7, 7)).sum(dim=1)
    tensor([25, 25, 25, 25])

    Args:
        ratio: share of patches to hide, in [0, 1]; a number, a schedule, or one per image.

    Raises:
        ValueError: ratio out of range.

    The random masking of MAE (He et al., 2022), drawn per image, and of the asymmetric recipe
    (arXiv 2506.10582).
    """

    def _scores(self, context: MaskContext) -> Tensor:
        return context.rand(context.batch, context.patches)
