"""Crops of several sizes, through one masked backbone and its heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from maskdistill.masking.mask import PatchMask, with_count
from maskdistill.models.masked_vit import MaskedViT
from maskdistill.objectives import mean_scores


class MultiCropOutput(NamedTuple):
    """What a role makes of its views, in the order of the crops.

    Attributes:
        logits: ``(V * B, K)`` prototype scores of the head.
        features: ``(V * B, D)`` embeddings of the backbone.
        patches: ``(G * B, N, D)``, patch tokens of the first G crops; None where none were asked.
    """

    logits: Tensor
    features: Tensor
    patches: Tensor | None = None


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
        patch_head: likewise, of patch tokens; None shares ``head`` with them.
    """

    def __init__(
        self, backbone: MaskedViT, head: nn.Module, patch_head: nn.Module | None = None
    ) -> None:
        super().__init__()
        if not isinstance(backbone, MaskedViT):
            raise ValueError(
                f"backbone must be a MaskedViT; got {type(backbone).__name__}. Wrap it: "
                "MaskedViT(backbone)."
            )
        self.backbone = backbone
        self.head = head
        self.patch_head = patch_head

    def score_patches(self, tokens: Tensor) -> Tensor:
        """Return the scores ``(n, K)`` of patch tokens ``(n, D)``, by their own head or both's."""
        scores: Tensor = (self.patch_head or self.head)(tokens)
        return scores

    def mean_patch_scores(self, tokens: Tensor) -> Tensor:
        """Return the mean of the scores ``(1, K)`` of all patch tokens ``(B, N, D)``."""
        return mean_scores(self.patch_head or self.head, tokens.flatten(0, 1))

    def forward(
        self,
        crops: Sequence[Tensor],
        masks: Sequence[Tensor | PatchMask | None] | None = None,
        *,
        patches: int = 0,
    ) -> MultiCropOutput:
        """Return logits and features of all crops, in their order.

        Args:
            crops: ``(B, C, H, W)`` each.
            masks: one per crop, ``(B, N)`` bool, ``PatchMask`` or None; None masks nothing.
            patches: of so many first crops, all of one size, the patch tokens as well.
        """
        masks = [None] * len(crops) if masks is None else masks
        if not isinstance(masks, Sequence) or len(masks) != len(crops):
            came = f"{len(masks)}" if isinstance(masks, Sequence) else type(masks).__name__
            raise ValueError(
                f"masks must be a list with one entry per crop, {len(crops)}, as .student of what "
                f"a policy draws; got {came}."
            )
        counted = [None if mask is None else with_count(mask) for mask in masks]
        groups: dict[tuple[torch.Size, bool, int | None], list[int]] = {}
        for i, (crop, mask) in enumerate(zip(crops, counted, strict=True)):
            key = (crop.shape[1:], mask is None, mask.count if mask is not None else 0)
            groups.setdefault(key, []).append(i)
        features: list[Tensor | None] = [None] * len(crops)
        tokens: dict[int, Tensor] = {}
        for (_, clean, count), group in groups.items():
            images = torch.cat([crops[i] for i in group])
            given = [m.mask for i in group if (m := counted[i]) is not None]
            mask = None if clean else PatchMask(torch.cat(given), count)
            sizes = [crops[i].shape[0] for i in group]
            if min(group) < patches:
                out, _, found, *_ = self.backbone.tokens(images, mask)
                tokens.update(zip(group, found.split(sizes), strict=True))
            else:
                out = self.backbone.embed(images, mask, class_only=True)
            for i, part in zip(group, out.split(sizes), strict=True):
                features[i] = part
        joined = torch.cat([f for f in features if f is not None])
        asked = torch.cat([tokens[i] for i in range(patches)]) if patches else None
        return MultiCropOutput(self.head(joined), joined, asked)
