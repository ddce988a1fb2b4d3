"""What a forward is asked for: its mask, and masks that wait for forwards to come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from maskdistill.masking.mask import PatchMask, with_count


class Request:
    """What the hooks read: the mask of the forward that is running, if any.

    An object of its own, so that torch.compile sees one thing from both sides; through a method
    bound to the wrapper, torch 2.6 reads a mask that is out of date.
    """

    def __init__(self) -> None:
        self.mask: Tensor | None = None
        self.keep: Tensor | None = None
        self.grid = (0, 0)
        self.tokens = 0  # of patches, before any is dropped
        self.class_only = False  # whether the class token is all that is wanted
        self.recorders: list[Any] = []  # of the attention, while they are recording
        # For recording: images, patches that are seen of each, and tokens in a patch of the mask.
        self.batch = self.patches = 0
        self.per_patch = (1, 1)

    def clear(self) -> None:
        """Forget the mask."""
        self.mask = self.keep = None
        if self.recorders:
            self.batch = self.patches = 0


class Tie(torch.autograd.Function):
    """Hands tokens on, and a gradient of zero to the mask token that none of them used.

    Data-parallel training expects a gradient of every parameter in every step, also in one that
    masks nothing. A copy rather than a view, since models may add to it in place.
    """

    @staticmethod
    def forward(tokens: Tensor, mask_token: Tensor) -> Tensor:
        """Return the tokens."""
        return tokens.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        """Remember the mask token's shape, not its value, which an optimiser may change."""
        token = inputs[1]
        ctx.shape, ctx.kind = token.shape, {"dtype": token.dtype, "device": token.device}

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens' gradient, and zeros."""
        return grads[0], torch.zeros(ctx.shape, **ctx.kind)


def tied(tokens: Tensor, mask_token: Tensor) -> Tensor:
    """Return the tokens, and see to it that the mask token gets a gradient, of zero.

    Where nothing else learns, that would only make the whole network keep its activations.
    """
    if not tokens.requires_grad:
        return tokens
    copy: Tensor = Tie.apply(tokens, mask_token)
    return copy


class Waiting:
    """Masks of crops to come, handed out forward by forward.

    Args:
        masks: one per crop, ``(B, N)`` bool, ``PatchMask`` or None.
    """

    def __init__(self, masks: Sequence[Tensor | PatchMask | None]) -> None:
        if isinstance(masks, Tensor) or not isinstance(masks, Sequence):
            raise ValueError(
                "masking() takes a list with one mask or None per crop, as policy(...).student is; "
                f"got {type(masks).__name__}. For a single mask, pass it to the call: vit(images, "
                "mask)."
            )
        for mask in masks:
            bare = mask.mask if isinstance(mask, PatchMask) else mask
            if bare is not None and (not isinstance(bare, Tensor) or bare.ndim != 2):
                came = tuple(bare.shape) if isinstance(bare, Tensor) else type(bare).__name__
                raise ValueError(
                    "each entry must be a (B, N) bool tensor, or None where a crop is clean; got "
                    f"{came}."
                )
        self.masks = [None if mask is None else with_count(mask) for mask in masks]
        self._batches = {len(mask) for mask in self.masks if mask is not None}
        if len(self._batches) > 1 or 0 in self._batches:
            raise ValueError(
                "the masks of all crops must be for one batch size of at least 1; got "
                f"{sorted(self._batches)}."
            )
        self.next = 0

    def take(self, rows: int) -> PatchMask | None:
        """Return the mask of a forward with this many images.

        Raises:
            ValueError: a number of images that is no whole number of crops, or more crops than
                masks are left.
        """
        if not self._batches:  # all clean
            return None
        (batch,) = self._batches
        left = len(self.masks) - self.next
        if rows % batch or not rows or rows // batch > left:
            raise ValueError(
                f"a forward with {rows} images came inside masking(), but masks are left for "
                f"{left} crops of {batch} images each. Run the crops in the order of the masks, "
                "each once; crops in one forward are joined along the batch."
            )
        crops = slice(self.next, self.next + rows // batch)
        self.next = crops.stop
        return _joined(self.masks[crops])

    def check_done(self) -> None:
        """Refuse masks that no forward took.

        Raises:
            RuntimeError: crops left over.
        """
        if self._batches and self.next < len(self.masks):
            raise RuntimeError(
                f"masking() was given masks for {len(self.masks)} crops, but the forwards inside "
                f"took only {self.next}. Give it the masks of just the crops that run inside."
            )


def _joined(masks: list[PatchMask | None]) -> PatchMask | None:
    """Join the masks of crops in one forward; clean ones among masked ones hide nothing."""
    given = [mask for mask in masks if mask is not None]
    if not given:
        return None
    if len({mask.mask.shape for mask in given}) > 1:
        raise ValueError(
            "crops of one forward must have one patch grid, but their masks are "
            f"{[tuple(mask.mask.shape) for mask in given]}. Run the crops in the order of the "
            "masks."
        )
    clean = PatchMask(torch.zeros_like(given[0].mask), count=0)
    whole = [clean if mask is None else mask for mask in masks]
    counts = {mask.count for mask in whole}
    return PatchMask(torch.cat([m.mask for m in whole]), counts.pop() if len(counts) == 1 else None)
