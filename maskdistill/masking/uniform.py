"""Maskers that know nothing of the image: every patch is as likely to be hidden as any other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from maskdistill.masking.base import Masker
from maskdistill.masking.context import MaskContext
from maskdistill.masking.ratios import PerImage, Ratio, check_ratio
from maskdistill.masking.schedules import scalar_at
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


@dataclass(frozen=True, repr=False)
class BernoulliMasker(Masker):
    """Hides each patch by a coin toss of its own, so that rows hide different numbers.

    >>> BernoulliMasker(0.5)(4, (7, 7)).shape
    torch.Size([4, 49])

    Args:
        p: probability that a patch is hidden, in [0, 1]; a number, a schedule, or one per image.

    Raises:
        ValueError: p out of range.
    """

    p: Ratio

    def __post_init__(self) -> None:
        check_ratio("BernoulliMasker", "p", self.p)

    def _draw(self, context: MaskContext) -> Tensor:
        p: float | Tensor
        if isinstance(self.p, PerImage):
            p = self.p.sample(context.batch, context.rand, context.progress)[:, None]
        else:
            p = scalar_at(self.p, context.progress)
        return context.rand(context.batch, context.patches) < p


@dataclass(frozen=True, repr=False)
class NoMasker(Masker):
    """Hides nothing: the neutral element of ``|``, useful in a ``Mixture``.

    >>> NoMasker()(2, (1, 3))
    tensor([[False, False, False],
            [False, False, False]])
    """

    @property
    def exact(self) -> bool:
        """True: every row hides 0 patches."""
        return True

    def fixed_count(self, grid: tuple[int, int], progress: float = 0.0) -> int:
        """Return 0."""
        return 0

    def _draw(self, context: MaskContext) -> Tensor:
        return torch.zeros(context.batch, context.patches, dtype=torch.bool, device=context.device)
