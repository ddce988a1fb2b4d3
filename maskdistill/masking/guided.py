"""Maskers that follow a signal: the teacher's attention, a loss per patch, any score."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from maskdistill.masking._engine import top_k
from maskdistill.masking.algebra import complete
from maskdistill.masking.base import Masker, hidden_if_fixed
from maskdistill.masking.context import MaskContext, check_signal
from maskdistill.masking.ratios import PerImage, Ratio, check_ratio, rounded_down
from maskdistill.masking.schedules import Scalar, check_scalar, scalar_at
from maskdistill.masking.scores import ExactMasker


class _GuidedMasker(ExactMasker):
    """Hides the patches where a signal is highest or lowest, more or less strictly."""

    hide: Literal["most", "least"]
    temperature: Scalar
    share: Scalar

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if self.hide not in ("most", "least"):
            raise ValueError(f"{name}: hide must be 'most' or 'least'; got {self.hide!r}.")
        check_scalar(name, "temperature", self.temperature, least=0.0)
        check_ratio(name, "share", self.share, per_image=False)

    @abstractmethod
    def _logits(self, context: MaskContext) -> Tensor:
        """Return the signal on a scale where differences are log odds: ``(B, N)``."""

    @final
    def _hide(self, context: MaskContext, count: int | Tensor) -> Tensor:
        score = self._logits(context)
        if self.hide == "least":
            score = -score
        heat = scalar_at(self.temperature, context.progress)
        if heat > 0:
            gumbel = -(-context.rand(*score.shape).log()).log()
            score = gumbel if math.isinf(heat) else score + heat * gumbel
        part = scalar_at(self.share, context.progress)
        if part == 1:
            return context.highest(score, count, ties=heat == 0)
        follow = rounded_down(part * count)
        # These come first, the rest of the count is drawn among all others.
        return complete(context.highest(score, follow, ties=heat == 0), count, context)


@dataclass(frozen=True, repr=False)
class SignalMasker(_GuidedMasker):
    """Hides the patches where a signal of your own is highest, or lowest.

    >>> loss = torch.tensor([[0.1, 0.4, -0.2, 0.3]])
    >>> SignalMasker(0.5, "loss")(1, (2, 2), loss=loss)
    tensor([[False,  True, False,  True]])

    Args:
        ratio: share of patches to hide, in [0, 1]; a number, a schedule, or one per image.
        signal: name under which the call gets the signal: ``(B, N)`` floats, or ``(B, heads, N)``,
            which is averaged over heads. A loss, a gradient's norm, a saliency: any score.
        hide: ``"most"`` hides where it is highest, ``"least"`` where it is lowest.
        temperature: 0 is a hard top-k; above, the signal over the temperature is a patch's log odds
            in sampling without replacement (Gumbel top-k, Kool et al., 2019); ``math.inf`` is
            uniform. A number or a schedule.
        share: share of the hidden patches that follow the signal; the others are drawn at random
            from the rest. A number or a schedule.

    Raises:
        ValueError: an argument out of range, or a signal that is missing or misshapen.

    HPM (Wang et al., 2023) hides where a network predicts the highest loss, with a share that grows
    from 0 to one half: ``SignalMasker(0.75, "loss", share=Linear(0, 0.5))``. Hiding all of the
    hardest patches was worse than random there.
    """

    signal: str
    hide: Literal["most", "least"] = "most"
    temperature: Scalar = 0.0
    share: Scalar = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_signal("SignalMasker", self.signal)

    @property
    def needs(self) -> frozenset[str]:
        """The signal."""
        return frozenset({self.signal})

    def _logits(self, context: MaskContext) -> Tensor:
        return context.per_patch(self.signal)


@dataclass(frozen=True, repr=False)
class AttentionGuidedMasker(_GuidedMasker):
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
        temperature: from 0, a hard top-k in which chance decides between equals alone, over 1,
            sampling without replacement in proportion to the attention (its inverse for
            ``"least"``), to ``math.inf``, uniform. Gumbel top-k (Kool et al., 2019): patches are
            drawn in proportion to attention ** (1 / temperature). A number or a schedule.
        share: share of the hidden patches that follow the attention; the others are drawn at
            random from the rest. A number or a schedule.

    The signal is ``attention``: non-negative, ``(B, N)`` or ``(B, heads, N)`` (averaged over
    heads), prefix tokens left out, as ``MaskedViT.attention`` gives it.

    Raises:
        ValueError: an argument out of range, or a signal that is missing or misshapen.

    AttMask (Kakogeorgiou et al., 2022), which uses the hard form. One difference: there the ratio
    is drawn once per batch; here a ``Uniform`` ratio is drawn per image.
    """

    hide: Literal["most", "least"] = "most"
    temperature: Scalar = 0.0
    share: Scalar = 1.0

    @property
    def needs(self) -> frozenset[str]:
        """The class token's attention to the patches."""
        return frozenset({"attention"})

    def _logits(self, context: MaskContext) -> Tensor:
        attention = context.per_patch("attention")
        if scalar_at(self.temperature, context.progress) == 0:
            return attention  # the order is all that counts
        return attention.clamp_min(torch.finfo(attention.dtype).tiny).log()


@dataclass(frozen=True, repr=False)
class AttentionHintMasker(Masker):
    """Hides the patches that the teacher attends to most, but shows a few of the very foremost.

    >>> attention = torch.rand(8, 196)
    >>> AttentionHintMasker(0.3)(8, (14, 14), attention=attention).sum(dim=1).unique()
    tensor([59])

    Args:
        ratio: share of patches to hide, in [0, 1]; a number, a schedule, or one per image.
        hint: share of the foremost patches that are shown, in [0, 1]; a number, a schedule, or one
            per image.
        pool: share of the grid that counts as foremost; the hints are drawn from it at random.
        exact: hide the next most attended patches instead of the hints, so that every row hides
            exactly round(ratio * N). With ``False`` a hint just reduces what is hidden, as in the
            paper.

    The signal is ``attention``, as for ``AttentionGuidedMasker``.

    Raises:
        ValueError: an argument out of range, or a signal that is missing or misshapen.

    AttMask-Hint (Kakogeorgiou et al., 2022). There the share of hints is a second draw of the
    ratio, once per batch; here it is drawn per image.
    """

    ratio: Ratio
    hint: Ratio = 0.3
    pool: float = 0.1
    exact: bool = True  # type: ignore[assignment]  # a field here, a property elsewhere

    def __post_init__(self) -> None:
        check_ratio("AttentionHintMasker", "ratio", self.ratio)
        check_ratio("AttentionHintMasker", "hint", self.hint)
        check_ratio("AttentionHintMasker", "pool", self.pool, per_image=False, schedules=False)

    @property
    def needs(self) -> frozenset[str]:
        """The class token's attention to the patches."""
        return frozenset({"attention"})

    def fixed_count(self, grid: tuple[int, int], progress: float = 0.0) -> int | None:
        """Return the count, if it is exact and the ratio does not vary by image."""
        return hidden_if_fixed(self.ratio, grid, progress) if self.exact else None

    def _draw(self, context: MaskContext) -> Tensor:
        attention = context.per_patch("attention")
        count = context.count(self.ratio)
        foremost = context.highest(attention, rounded_down(context.patches * self.pool))
        shown = top_k(foremost + context.rand(*attention.shape), self._hints(context)) & foremost
        if not self.exact:
            return context.highest(attention, count) & ~shown
        # Below all others, but never so far that a ratio near 1 could not be reached.
        return context.highest(torch.where(shown, -torch.inf, attention), count)

    def _hints(self, context: MaskContext) -> int | Tensor:
        """Count the hints as the original does: rounded down, of the pool's unrounded size."""
        pool = context.patches * self.pool
        if isinstance(self.hint, PerImage):
            share = self.hint.sample(context.batch, context.rand, context.progress)
            return rounded_down(pool * share)
        return rounded_down(pool * scalar_at(self.hint, context.progress))
