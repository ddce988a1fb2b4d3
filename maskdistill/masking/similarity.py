"""Maskers that compare the patches of an image: hide what is alike, or show what differs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from maskdistill.masking._engine import top_k
from maskdistill.masking.algebra import complete
from maskdistill.masking.base import Masker, hidden_if_fixed
from maskdistill.masking.context import MaskContext, check_signal
from maskdistill.masking.ratios import Ratio, bounds, check_ratio, hidden_count, rounded_down
from maskdistill.masking.schedules import Scalar, check_scalar, scalar_at
from maskdistill.masking.scores import ExactMasker

_HALVINGS = 16
"""Of the interval in which the threshold of similarity is sought: to 2 / 2**16."""


@dataclass(frozen=True, repr=False)
class ClusterMasker(Masker):
    """Hides the patches most like a few random anchors: whole regions of one look.

    >>> images = torch.rand(8, 3, 112, 112)
    >>> ClusterMasker(0.5)(8, (14, 14), images=images).sum(dim=1).unique()
    tensor([98])

    Patches are compared by the cosine of their values, each patch normalised to mean 0 and variance
    1. Anchors hide themselves.

    Args:
        ratio: share of patches to hide, in [0, 1]; a number, a schedule, or one per image.
        anchors: share of patches that are anchors, at least one.
        least: with ``exact=False``, the least share that every row hides, 0.3 if None; random
            patches make up for what is not like any anchor.
        exact: hide in each image the round(ratio * N) patches most like an anchor. With ``False``
            one threshold of similarity holds for the whole batch, chosen so that the batch hides
            the ratio on average, so that uniform images hide more, as in the paper.
        signal: what to compare: ``"images"`` ``(B, C, h, w)``, which a policy supplies, cut into
            patches; or the name of a signal ``(B, N, D)``, such as embeddings.

    Raises:
        ValueError: an argument out of range, or a signal that is missing or misshapen.

    Cluster masking (Wei et al., 2024), made for CLIP. There the threshold is found once, before
    training.
    """

    ratio: Ratio
    anchors: float = 0.03
    least: float | None = None
    exact: bool = True  # type: ignore[assignment]  # a field here, a property elsewhere
    signal: str = "images"

    def __post_init__(self) -> None:
        # One threshold for the batch cannot serve a ratio for each image.
        check_ratio("ClusterMasker", "ratio", self.ratio, per_image=self.exact)
        check_ratio("ClusterMasker", "anchors", self.anchors, per_image=False, schedules=False)
        if self.least is not None:
            check_ratio("ClusterMasker", "least", self.least, per_image=False, schedules=False)
            if self.exact:
                raise ValueError(
                    f"ClusterMasker: least={self.least!r} says nothing where every row hides "
                    "exactly the ratio; leave it out, or pass exact=False."
                )
        check_signal("ClusterMasker", self.signal)

    @property
    def needs(self) -> frozenset[str]:
        """What the patches are compared by."""
        return frozenset({self.signal})

    def fixed_count(self, grid: tuple[int, int], progress: float = 0.0) -> int | None:
        """Return the count, if it is exact and the ratio does not vary by image."""
        return hidden_if_fixed(self.ratio, grid, progress) if self.exact else None

    def _draw(self, context: MaskContext) -> Tensor:
        count = context.count(self.ratio)
        likeness = self._likeness(context)
        if self.exact:
            return context.highest(likeness, count)
        assert isinstance(count, int)
        least = 0.3 if self.least is None else self.least
        # Never more than the ratio asks for.
        floor = min(context.patches - rounded_down(context.patches * (1 - least)), count)
        low = likeness.new_full((), -1.0)
        high = likeness.new_full((), 1.0)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            hidden = (likeness > middle).sum(dim=1).clamp_min(floor).float().mean()
            low = torch.where(hidden > count, middle, low)
            high = torch.where(hidden > count, high, middle)
        mask = likeness > high
        number = mask.sum(dim=1).clamp_min(floor)
        return complete(mask, number if count else number * 0, context)

    def _likeness(self, context: MaskContext) -> Tensor:
        """Return each patch's greatest cosine with an anchor: ``(B, N)`` in [-1, 1]."""
        values = context.vectors(self.signal)
        values = values - values.mean(dim=2, keepdim=True)
        length = values.norm(dim=2).clamp_min(1e-12)
        number = max(context.patches - int(context.patches * (1 - self.anchors)), 1)
        chosen = context.rand(context.batch, context.patches).topk(number, dim=1).indices
        anchors = values.gather(1, chosen[:, :, None].expand(-1, -1, values.shape[2]))
        # Dividing the products, not the values, saves a copy of all pixels.
        cosine = values @ anchors.transpose(1, 2) / length.gather(1, chosen)[:, None, :]
        likeness: Tensor = cosine.amax(dim=2) / length
        # An anchor is like itself, even if it has no contrast whose cosine could say so.
        return likeness.clamp(-1, 1).scatter(1, chosen, 2.0)


@dataclass(frozen=True, repr=False)
class DPPMasker(ExactMasker):
    """Shows patches that differ from each other, and hides the rest.

    >>> images = torch.rand(8, 3, 112, 112)
    >>> DPPMasker(0.75)(8, (14, 14), images=images).sum(dim=1).unique()
    tensor([147])

    The visible patches are chosen one after the other, each with a probability in proportion to
    what the patches chosen before leave unexplained of it: its variance given them, under the
    kernel exp(-|x - y|^2 / (width * mean |x - y|^2)) of their values. This samples a determinantal
    point process of fixed size approximately; it would be exact if the kernel were a projection.

    Args:
        ratio: share of patches to hide, in [0, 1]; a number, a schedule, or one per image.
        width: width of the kernel, relative to the image's mean squared distance between patches.
            Smaller is closer to random, for then no patch explains another. A number or a schedule.
        signal: what to compare, as in ``ClusterMasker``.

    Raises:
        ValueError: an argument out of range, or a signal that is missing or misshapen.

    DPPMask (Xu et al., 2023); its kernel's width and its approximation are not reproduced. The cost
    grows with N * V^2 for V visible patches, one step for each.
    """

    width: Scalar = 0.5
    signal: str = "images"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_scalar("DPPMasker", "width", self.width, least=1e-6)
        check_signal("DPPMasker", self.signal)

    @property
    def needs(self) -> frozenset[str]:
        """What the patches are compared by."""
        return frozenset({self.signal})

    def _hide(self, context: MaskContext, count: int | Tensor) -> Tensor:
        width = scalar_at(self.width, context.progress)
        kernel = self._kernel(context.vectors(self.signal), width)
        most = context.patches - hidden_count(bounds(self.ratio)[0], context.patches)
        if isinstance(count, int):
            most = context.patches - count
        unexplained = kernel.new_ones(context.batch, context.patches)
        # The order of choice, as a score: the later, the higher; those never chosen come on top.
        score = torch.full_like(unexplained, float(context.patches))
        factors = kernel.new_zeros(context.batch, context.patches, most)
        for step in range(most):
            # A race of exponential clocks: the first to ring is a draw in proportion to the rates.
            clock = -context.rand(*score.shape).log() / unexplained.clamp_min(1e-6)
            chosen = clock.masked_fill(score < step, torch.inf).argmin(dim=1, keepdim=True)
            score = score.scatter(1, chosen, float(step))
            row = kernel.gather(1, chosen[:, :, None].expand(-1, -1, context.patches)).squeeze(1)
            if step:
                own = chosen[:, :, None].expand(-1, -1, step)
                known = factors[:, :, :step]
                row = row - (known @ known.gather(1, own).transpose(1, 2)).squeeze(2)
            left = unexplained.gather(1, chosen).clamp_min(1e-6)
            factor = row / left.sqrt()
            factors[:, :, step] = factor
            unexplained = (unexplained - factor.square()).clamp_min(0)
        return top_k(score, count)

    def _kernel(self, values: Tensor, width: float) -> Tensor:
        distance = torch.cdist(values, values).square()
        mean = distance.mean(dim=(1, 2), keepdim=True)
        return torch.exp(-distance / (width * mean).clamp_min(1e-12))
