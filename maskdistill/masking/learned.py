"""Maskers that ask a network which patches to hide."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from maskdistill.masking.context import MaskContext
from maskdistill.masking.schedules import Scalar, check_scalar, scalar_at
from maskdistill.masking.scores import ExactMasker


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

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.network):
            raise ValueError(
                "LearnedMasker: network must be a function of images (B, C, h, w), such as a "
                f"module; got {self.network!r}."
            )
        check_scalar("LearnedMasker", "temperature", self.temperature, least=0.0)

    @property
    def needs(self) -> frozenset[str]:
        """The images, which a policy supplies."""
        return frozenset({"images"})

    def _hide(self, context: MaskContext, count: int | Tensor) -> Tensor:
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
