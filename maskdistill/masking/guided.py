"""Maskers that follow a signal: the teacher's attention, a loss per patch, any score."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor

from maskdistill.masking import constraints
from maskdistill.masking.base import ExactMasker, Masker, complete, hidden_if_fixed
from maskdistill.masking.context import MaskContext, top_k
from maskdistill.masking.ratios import (
    PerImage,
    Quadratic,
    Ratio,
    Scalar,
    bounds,
    hidden_count,
    rounded_down,
    scalar_at,
)


class _GuidedMasker(ExactMasker):
    """Hides the patches where a signal is highest or lowest, more or less strictly."""

    hide: Literal["most", "least"]
    temperature: Scalar
    share: Scalar

    constraints = {
        "hide": constraints.one_of("most", "least"),
        "temperature": constraints.scalar(least=0.0),
        "share": constraints.share,
    }

    @abstractmethod
    def _logits(self, context: MaskContext) -> Tensor:
        """Return the signal on a scale where differences are log odds: ``(B, N)``."""

    @final
    def choose(self, context: MaskContext, count: int | Tensor) -> Tensor:
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

    constraints = {"signal": constraints.signal}

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

    constraints = {
        "ratio": constraints.ratio,
        "hint": constraints.ratio,
        "pool": constraints.fixed_share,
    }

    @property
    def needs(self) -> frozenset[str]:
        """The class token's attention to the patches."""
        return frozenset({"attention"})

    def fixed_count(self, grid: tuple[int, int], progress: float = 0.0) -> int | None:
        """Return the count, if it is exact and the ratio does not vary by image."""
        return hidden_if_fixed(self.ratio, grid, progress) if self.exact else None

    def draw(self, context: MaskContext) -> Tensor:
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

    constraints = {
        "ratio": constraints.ratio,
        "anchors": constraints.fixed_share,
        "least": constraints.optional(constraints.fixed_share),
        "signal": constraints.signal,
    }

    def check_parameters(self) -> None:
        if not self.exact:  # one threshold for the batch cannot serve a ratio for each image
            constraints.share("ClusterMasker", "ratio", self.ratio)
        elif self.least is not None:
            raise ValueError(
                f"ClusterMasker: least={self.least!r} says nothing where every row hides exactly "
                "the ratio; leave it out, or pass exact=False."
            )

    @property
    def needs(self) -> frozenset[str]:
        """What the patches are compared by."""
        return frozenset({self.signal})

    def fixed_count(self, grid: tuple[int, int], progress: float = 0.0) -> int | None:
        """Return the count, if it is exact and the ratio does not vary by image."""
        return hidden_if_fixed(self.ratio, grid, progress) if self.exact else None

    def draw(self, context: MaskContext) -> Tensor:
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

    constraints = {
        "width": constraints.scalar(least=1e-6),
        "signal": constraints.signal,
    }

    @property
    def needs(self) -> frozenset[str]:
        """What the patches are compared by."""
        return frozenset({self.signal})

    def choose(self, context: MaskContext, count: int | Tensor) -> Tensor:
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

    constraints = {"parts": constraints.whole(1), "whole": constraints.share}

    @property
    def needs(self) -> frozenset[str]:
        """The part that each patch belongs to."""
        return frozenset({"parts"})

    def choose(self, context: MaskContext, count: int | Tensor) -> Tensor:
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
        if context.can_look and part.numel():
            low, high = int(part.min()), int(part.max())
            if low < 0 or high >= self.parts:
                raise ValueError(
                    f"parts must lie in [0, {self.parts}), for {self!r} has {self.parts} parts; "
                    f"got {low} to {high}."
                )
        return part.clamp(0, self.parts - 1)


@dataclass(frozen=True, repr=False)
class LearnedMasker(ExactMasker):
    """Hides the patches to which a network gives the highest scores.

    >>> def brightness(images):                       # stands for a network
    ...     return images.mean(dim=1, keepdim=True)
    >>> images = torch.rand(8, 3, 56, 56)
    >>> LearnedMasker(0.3, brightness)(8, (7, 7), images=images).sum(dim=1).unique()
    tensor([15])

    Args:
        ratio: share of patches to hide, in [0, 1]; a number, a schedule, or one per image.
        network: a function of images ``(B, C, h, w)`` that returns scores ``(B, N)``, or a map
            ``(B, 1, h', w')``, which is averaged over each patch. Train it where you like: the
            masker runs it without gradients, and as it is, train or eval mode.
        temperature: 0 hides the highest scores; above, scores over the temperature are the log odds
            of a draw without replacement. A number or a schedule.

    Two of these are equal if they hold the same network; the repr names it, but cannot rebuild it.

    Raises:
        ValueError: an argument out of range, or a network whose scores have another shape.

    ADIOS (Shi et al., 2022) and CL-MAE (Madan et al., 2024) train such a network against the
    encoder; ``examples/adios_scenes.py`` does it.
    """

    network: Callable[[Tensor], Tensor]
    temperature: Scalar = 0.0

    constraints = {"temperature": constraints.scalar(least=0.0)}

    def check_parameters(self) -> None:
        if not callable(self.network):
            raise ValueError(
                "LearnedMasker: network must be a function of images (B, C, h, w), such as a "
                f"module; got {self.network!r}."
            )

    @property
    def needs(self) -> frozenset[str]:
        """The images, which a policy supplies."""
        return frozenset({"images"})

    def choose(self, context: MaskContext, count: int | Tensor) -> Tensor:
        with torch.no_grad():
            scores = self.network(context.signals["images"]).to(context.device, torch.float32)
        if scores.ndim == 4 and scores.shape[:2] == (context.batch, 1):
            scores = F.adaptive_avg_pool2d(scores, context.grid).flatten(1)
        if scores.shape != (context.batch, context.patches):
            raise ValueError(
                f"{self!r}: the network must return scores (B, N) = "
                f"({context.batch}, {context.patches}) or a map (B, 1, h, w); "
                f"got {tuple(scores.shape)}."
            )
        heat = scalar_at(self.temperature, context.progress)
        if heat > 0:
            scores = scores / heat - (-context.rand(*scores.shape).log()).log()
        return context.highest(scores, count, ties=heat == 0)
