"""Many crops through one backbone: grouped by size, one head for all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from maskdistill.models.adapter import MaskedViT


class MultiCropOutput(NamedTuple):
    """What a role makes of its views, in the order of the crops.

    Attributes:
        logits: ``(V * B, K)`` prototype scores of the head.
        features: ``(V * B, D)`` embeddings of the backbone.
    """

    logits: Tensor
    features: Tensor


class MultiCropWrapper(nn.Module):
    """Runs crops of several sizes through a masked backbone and one projection head.

    Crops of one size go through the backbone in one forward, whatever their order; the head runs
    once, on all of them (Caron et al., 2021; there only consecutive, square crops are grouped).

    >>> net = MultiCropWrapper(vit, head)  # doctest: +SKIP
    >>> net(crops, masks.student).logits.shape  # doctest: +SKIP
    torch.Size([320, 4096])

    Args:
        backbone: a ``MaskedViT``, of any model; its ``embed`` gives ``(B, D)``.
        head: ``(B, D)`` to ``(B, K)``.
    """

    def __init__(self, backbone: MaskedViT, head: nn.Module) -> None:
        super().__init__()
        if not isinstance(backbone, MaskedViT):
            raise ValueError(
                f"backbone must be a MaskedViT; got {type(backbone).__name__}. Wrap it: "
                "MaskedViT(backbone)."
            )
        self.backbone = backbone
        self.head = head

    def forward(
        self,
        crops: Sequence[Tensor],
        masks: Sequence[Tensor | None] | None = None,
        counts: Sequence[int | None] | None = None,
    ) -> MultiCropOutput:
        """Return logits and features of all crops, in their order.

        Args:
            crops: ``(B, C, H, W)`` each.
            masks: one per crop, ``(B, N)`` bool or None; None masks nothing.
            counts: the hidden patches of every row per crop, where known: ``ViewMasks`` has them.
        """
        masks = [None] * len(crops) if masks is None else masks
        counts = [None] * len(crops) if counts is None else counts
        for name, given in (("masks", masks), ("counts", counts)):
            if not isinstance(given, Sequence) or len(given) != len(crops):
                came = f"{len(given)}" if isinstance(given, Sequence) else type(given).__name__
                raise ValueError(
                    f"{name} must be a list with one entry per crop, {len(crops)}, as .student of "
                    f"what a policy draws; got {came}."
                )
        groups: dict[tuple[torch.Size, bool, int | None], list[int]] = {}
        for i, (crop, mask) in enumerate(zip(crops, masks, strict=True)):
            groups.setdefault((crop.shape[1:], mask is None, counts[i]), []).append(i)
        features: list[Tensor | None] = [None] * len(crops)
        for (_, clean, count), group in groups.items():
            images = torch.cat([crops[i] for i in group])
            mask = None if clean else torch.cat([m for i in group if (m := masks[i]) is not None])
            visible = mask.shape[1] - count if mask is not None and count is not None else None
            out = self.backbone.embed(images, mask, visible=visible, class_only=True)
            for i, part in zip(group, out.split([crops[i].shape[0] for i in group]), strict=True):
                features[i] = part
        joined = torch.cat([f for f in features if f is not None])
        return MultiCropOutput(self.head(joined), joined)
