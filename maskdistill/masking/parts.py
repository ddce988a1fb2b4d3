"""Maskers that know the parts of an object: first a share of every part, later whole parts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from maskdistill.masking.algebra import complete
from maskdistill.masking.context import MaskContext
from maskdistill.masking.ratios import check_ratio
from maskdistill.masking.schedules import Quadratic, Scalar, scalar_at
from maskdistill.masking.scores import ExactMasker

_LATER = Quadratic(0.0, 1.0)


@dataclass(frozen=True, repr=False)
class PartMasker(ExactMasker):
    """Hides the same share of every part of the image at first, and whole parts at the end.

    >>> parts = torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2, 2]])
    >>> PartMasker(2 / 3, parts=3, whole=0.0)(1, (3, 3), parts=parts).view(3, 3).sum(dim=1)
    tensor([2, 2, 2])
    >>> mask = PartMasker(2 / 3, parts=3, whole=1.0)(1, (3, 3), parts=parts)
    >>> sorted(mask.view(3, 3).sum(dim=1).tolist())
    [0, 3, 3]

    Args:
        ratio: share of patches to hide, in [0, 1]; a number, a schedule, or one per image.
        parts: number of parts.
        whole: from 0, within parts, to 1, whole parts in random order until the ratio is reached;
            between, every part's number lies between the two. A number or a schedule.

    The signal is ``parts``: ``(B, N)`` integers in [0, parts), the part that each patch belongs to.

    Raises:
        ValueError: an argument out of range, or a signal that is missing or misshapen.

    SemMAE (Li et al., 2022), with 7 parts from a part learner of its own and ``Quadratic(0, 1)``.
    """

    parts: int = 7
    whole: Scalar = _LATER

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.parts, bool) or not isinstance(self.parts, int) or self.parts < 1:
            raise ValueError(f"PartMasker: parts must be an int >= 1; got {self.parts!r}.")
        check_ratio("PartMasker", "whole", self.whole, per_image=False)

    @property
    def needs(self) -> frozenset[str]:
        """The part that each patch belongs to."""
        return frozenset({"parts"})

    def _hide(self, context: MaskContext, count: int | Tensor) -> Tensor:
        part = self._part(context)
        ones = torch.ones(part.shape, dtype=torch.float32, device=context.device)
        size = ones.new_zeros(context.batch, self.parts).scatter_add_(1, part, ones)
        wanted = torch.zeros(context.batch, 1, dtype=torch.float32, device=context.device)
        wanted = wanted + (count[:, None] if isinstance(count, Tensor) else count)
        within = wanted / context.patches * size
        # Whole parts in random order, until what came before leaves nothing to hide.
        order = context.rand(context.batch, self.parts)
        before = ((order[:, None, :] < order[:, :, None]) * size[:, None, :]).sum(dim=2)
        entire = torch.minimum((wanted - before).clamp_min(0), size)
        whole = scalar_at(self.whole, context.progress)
        number = ((1 - whole) * within.round() + whole * entire).round()
        # Rank the patches of each part at random: sorted by part, then by a random number.
        key = part + context.rand(context.batch, context.patches)
        place = torch.empty_like(part).scatter_(
            1, key.argsort(dim=1), torch.arange(context.patches, device=part.device).expand_as(part)
        )
        first = size.cumsum(dim=1) - size
        hidden = place < (first + number).gather(1, part)
        return complete(hidden, count, context)

    def _part(self, context: MaskContext) -> Tensor:
        part = context.signals["parts"]
        if part.is_floating_point() or tuple(part.shape) != (context.batch, context.patches):
            raise ValueError(
                f"parts must be (B, N) integers with B={context.batch} and N={context.patches}; "
                f"got {tuple(part.shape)} {part.dtype}."
            )
        part = part.to(context.device, torch.int64)
        if context.may_ask and part.numel():
            low, high = int(part.min()), int(part.max())
            if low < 0 or high >= self.parts:
                raise ValueError(
                    f"parts must lie in [0, {self.parts}), for {self!r} has {self.parts} parts; "
                    f"got {low} to {high}."
                )
        return part.clamp(0, self.parts - 1)
