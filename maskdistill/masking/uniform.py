"""Maskers that know nothing of the image: every patch is as likely to be hidden as any other."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from maskdistill.masking._engine import top_k
from maskdistill.masking.base import MaskContext, Masker, hidden_if_fixed
from maskdistill.masking.ratios import Ratio, check_ratio


@dataclass(frozen=True, repr=False)
class RandomMasker(Masker):
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

    ratio: Ratio

    def __post_init__(self) -> None:
        check_ratio("RandomMasker", "ratio", self.ratio)

    @property
    def exact(self) -> bool:
        """True: every row hides exactly round(ratio * N)."""
        return True

    def fixed_count(self, patches: int, progress: float = 0.0) -> int | None:
        """Return the count, if the ratio does not vary by image."""
        return hidden_if_fixed(self.ratio, patches, progress)

    def _draw(self, context: MaskContext) -> Tensor:
        count = context.count(self.ratio)
        return top_k(context.rand(context.batch, context.patches), count)
