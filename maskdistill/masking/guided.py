"""Maskers that follow a signal of the model itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Literal

import torch
from torch import Tensor

from maskdistill.masking.context import MaskContext
from maskdistill.masking.ratios import Scalar, Schedule, bounds, scalar_at
from maskdistill.masking.scores import ScoreMasker


@dataclass(frozen=True, repr=False)
class AttentionGuidedMasker(ScoreMasker):
    """Hides the patches that the teacher attends to most, or least.

    >>> attention = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    >>> AttentionGuidedMasker(0.5)(1, (2, 2), attention=attention)
    tensor([[False,  True, False,  True]])
    >>> AttentionGuidedMasker(0.5, hide="least")(1, (2, 2), attention=attention)
    tensor([[ True, False,  True, False]])

    Args:
        ratio: share of patches to hide, in [0, 1]; a number, a schedule, or one per image.
        hide: ``"most"`` hides the most attended patches (AttMask-High), ``"least"`` the least
            attended (AttMask-Low).
        temperature: from 0, a hard top-k that is deterministic given the attention, over 1,
            sampling without replacement in proportion to the attention (its inverse for
            ``"least"``), to ``math.inf``, uniform. Gumbel top-k (Kool et al., 2019): patches are
            drawn in proportion to attention ** (1 / temperature). A number or a schedule.

    The signal is ``attention``: non-negative, ``(B, N)`` or ``(B, heads, N)`` (averaged over
    heads), prefix tokens left out, as ``MaskedViT.attention`` gives it.

    Raises:
        ValueError: an argument out of range, or a signal that is missing or misshapen.

    AttMask (Kakogeorgiou et al., 2022), which uses the hard form. One difference: there the ratio
    is drawn once per batch; here a ``Uniform`` ratio is drawn per image.
    """

    hide: Literal["most", "least"] = "most"
    temperature: Scalar = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hide not in ("most", "least"):
            raise ValueError(
                f"AttentionGuidedMasker: hide must be 'most' or 'least'; got {self.hide!r}."
            )
        number = isinstance(self.temperature, (Real, Schedule))
        if not number or isinstance(self.temperature, bool) or not bounds(self.temperature)[0] >= 0:
            raise ValueError(
                "AttentionGuidedMasker: temperature must be a number >= 0, Linear or Cosine; "
                f"got {self.temperature!r}."
            )

    @property
    def needs(self) -> frozenset[str]:
        """The class token's attention to the patches."""
        return frozenset({"attention"})

    def _scores(self, context: MaskContext) -> Tensor:
        attention = context.per_patch("attention")
        temperature = scalar_at(self.temperature, context.progress)
        score = attention.clamp_min(torch.finfo(attention.dtype).tiny).log()
        if self.hide == "least":
            score = -score
        if temperature == 0:
            return score
        gumbel = -(-context.rand(*score.shape).log()).log()
        return gumbel if math.isinf(temperature) else score + temperature * gumbel
