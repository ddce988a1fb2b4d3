"""Maskers that relate the masks of several images, or of several views of one image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from maskdistill.masking.algebra import _Moved, _operand, _Wrapped, complete
from maskdistill.masking.base import Masker
from maskdistill.masking.context import MaskContext
from maskdistill.masking.ratios import Ratio, check_ratio


@dataclass(frozen=True, repr=False)
class Shared(_Moved):
    """Draws one mask for the whole batch: ``a.shared()``.

    >>> import maskdistill as md
    >>> mask = md.RandomMasker(0.5).shared()(8, (7, 7))
    >>> bool((mask == mask[0]).all())
    True

    As MSN does (Assran et al., 2022). All views that are drawn together have it, too.

    Raises:
        ValueError: a masker that follows a signal of each image.
    """

    masker: Masker

    def __post_init__(self) -> None:
        if self.masker.needs:
            raise ValueError(
                f"shared: {self.masker!r} follows {sorted(self.masker.needs)} of each image, so "
                "one mask cannot serve the whole batch."
            )

    def _draw(self, context: MaskContext) -> Tensor:
        row = self.masker._draw(context.replaced(batch=1, signals={}, views=1))
        return row.expand(context.batch, -1).clone()

    def __repr__(self) -> str:
        return f"{_operand(self.masker)}.shared()"


@dataclass(frozen=True, repr=False)
class SameInViews(_Moved):
    """Draws one mask per image, the same in all its views of one size: ``a.same_in_views()``.

    >>> import maskdistill as md
    >>> policy = md.ViewPolicy.symmetric(md.RandomMasker(0.5).same_in_views())
    >>> masks = policy([torch.zeros(4, 3, 32, 32)] * 2, patch_size=8)
    >>> bool(torch.equal(masks.student[0], masks.student[1]))
    True
    >>> bool(torch.equal(masks.student[0], masks.teacher[0]))
    True

    Within one step of a policy **all mentions are one draw**, in both roles: so the teacher sees
    what the student does not where one has ``a.same_in_views()`` and the other
    ``~a.same_in_views()``. A guided masker follows the signal of the first view.
    """

    masker: Masker

    def _draw(self, context: MaskContext) -> Tensor:
        return _once_per_image(self, self.masker, context).repeat(context.views, 1)

    def __repr__(self) -> str:
        return f"{_operand(self.masker)}.same_in_views()"


@dataclass(frozen=True, repr=False)
class ComplementaryViews(_Wrapped):
    """Draws one mask per image; every second view hides the rest: ``a.complementary_views()``.

    >>> import maskdistill as md
    >>> masker = md.RandomMasker(0.5).complementary_views()
    >>> first, second = masker(8, (14, 14), views=2).chunk(2)
    >>> bool((first ^ second).all())
    True

    The views agree patch by patch, wherever their crops lie in the image; ``SceneMasker`` relates
    them by place. Within one step of a policy all mentions are one draw, as in ``same_in_views``.
    """

    masker: Masker

    def fixed_count(self, grid: tuple[int, int], progress: float = 0.0) -> int | None:
        """Return the count, if it is half of the patches; else views differ."""
        count = self.masker.fixed_count(grid, progress)
        return count if count is not None and 2 * count == grid[0] * grid[1] else None

    def _draw(self, context: MaskContext) -> Tensor:
        mask = _once_per_image(self, self.masker, context)
        return torch.cat([mask if view % 2 == 0 else ~mask for view in range(context.views)])

    def __repr__(self) -> str:
        return f"{_operand(self.masker)}.complementary_views()"


@dataclass(frozen=True, repr=False)
class Total(_Wrapped):
    """Makes an image's views together hide exactly round(ratio * V * N): ``a.total(ratio)``.

    >>> import maskdistill as md
    >>> masker = md.RandomMasker(md.Uniform(0.1, 0.9)).total(0.5)
    >>> first, second = masker(8, (14, 14), views=2).chunk(2)
    >>> (first.sum(dim=1) + second.sum(dim=1)).unique()
    tensor([196])

    Trims or tops up at random, over all V views of one size at once, so a view that hides more is
    paid for by another that hides less.
    """

    masker: Masker
    ratio: Ratio

    def __post_init__(self) -> None:
        check_ratio("total", "ratio", self.ratio)

    def _draw(self, context: MaskContext) -> Tensor:
        height, width = context.grid
        views, images = context.views, context.images
        joined = context.replaced(batch=images, grid=(views * height, width), views=1)
        mask = self.masker._draw(context).view(views, images, context.patches)
        mask = mask.transpose(0, 1).flatten(1)
        mask = complete(mask, joined.count(self.ratio), joined)
        return mask.view(images, views, context.patches).transpose(0, 1).flatten(0, 1)

    def __repr__(self) -> str:
        return f"{_operand(self.masker)}.total({self.ratio!r})"


def _once_per_image(key: Masker, masker: Masker, context: MaskContext) -> Tensor:
    """Draw for the first views alone, or find what was drawn for this grid before."""
    return context.once(
        (key, context.grid, context.images), lambda: masker._draw(context.first_view())
    )
