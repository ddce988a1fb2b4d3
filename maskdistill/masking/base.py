"""What a masker is: one call, one hook, and the operations that make maskers out of maskers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, MutableMapping
from dataclasses import is_dataclass
from typing import Any, final

import torch
from torch import Tensor

from maskdistill.masking.context import MaskContext, full_precision
from maskdistill.masking.ratios import PerImage, Ratio, hidden_count
from maskdistill.masking.schedules import Scalar, constructor_repr, scalar_at


class Masker(ABC):
    """A distribution over sets of patches: call it to draw one set per image.

    A masker is an immutable value: it compares, hashes and pickles, and its repr is the call that
    builds it. It knows the grid, the batch, optional signals and a generator, never a model.
    Maskers combine into maskers: ``a | b``, ``a & b``, ``a - b``, ``~a``, the methods below, and
    ``Mixture``. **Each mention is a fresh draw**, so ``a & ~a`` is not empty when ``a`` is random.

    A subclass is a frozen dataclass with ``repr=False`` that fills one hook, ``_draw``.

    >>> import maskdistill as md
    >>> mask = md.RandomMasker(0.3)(batch=8, grid=(14, 14))
    >>> mask.shape, mask.dtype, mask.sum(dim=1).unique()
    (torch.Size([8, 196]), torch.bool, tensor([59]))
    """

    @final
    def __call__(
        self,
        batch: int,
        grid: tuple[int, int],
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        progress: float = 0.0,
        views: int = 1,
        memory: MutableMapping[Hashable, Tensor] | None = None,
        **signals: Tensor,
    ) -> Tensor:
        """Draw a mask for each image of a batch.

        Args:
            batch: number of rows to draw, B >= 0: one per image, or one per image and view.
            grid: patch rows and columns, (H, W), each >= 1; N = H * W.
            generator: source of every random number; None is torch's global generator, which is
                also the only one that ``torch.compile`` can trace.
            device: where the mask is wanted; by default where the signals are, else the
                generator, else torch's default device.
            progress: how far training has come, in [0, 1]; moves the schedules.
            views: how many views of each image the rows are, view by view: all first views, then
                all second ones. Only maskers that relate views look at it.
            memory: a dict to share between calls for the same images, so that maskers which relate
                views of different sizes or roles find what they drew before. A policy does that.
            **signals: what guided maskers look at, e.g. ``attention`` as ``(B, N)`` or
                ``(B, heads, N)``. Signals that nobody needs are ignored.

        Returns:
            ``(B, N)`` bool, True where a patch is hidden, row-major over the grid. Prefix tokens
            (class token, registers) are never counted.

        Raises:
            ValueError: an argument is out of range, or a signal is missing or misshapen.
        """
        rows, columns = _check_request(self, batch, grid, progress, views)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise ValueError(
                f"{self!r}: generator must be a torch.Generator or None; got {_brief(generator)}. "
                "Make one with torch.Generator().manual_seed(seed)."
            )
        for name, signal in signals.items():
            if not isinstance(signal, Tensor):
                raise ValueError(
                    f"{self!r}: {name}={_brief(signal)} is no argument of a masker and no signal, "
                    "for a signal is a tensor with one row per row of the mask."
                )
        missing = [name for name in self.needs if name not in signals]
        if missing:
            given = f"only {sorted(signals)}" if signals else "none"
            raise ValueError(
                f"{self!r} needs the signal(s) {sorted(missing)}, but {given} came. "
                f"Pass {min(missing)}=... to the call."
            )
        if device is None:
            device = _device_of(signals, generator)
        where = torch.device(device)
        context = MaskContext(
            batch, (rows, columns), where, generator, progress, signals, views, memory
        )
        with full_precision(where):
            mask = self._draw(context)
        if mask.dtype != torch.bool or mask.shape != (batch, rows * columns):
            raise ValueError(
                f"{type(self).__name__}._draw must return a bool tensor (B, N) = "
                f"({batch}, {rows * columns}), True = hidden; it returned {tuple(mask.shape)} "
                f"{mask.dtype}."
            )
        return mask

    @abstractmethod
    def _draw(self, context: MaskContext) -> Tensor:
        """Draw the ``(B, N)`` bool mask; arguments are checked, signals are present."""

    @property
    def needs(self) -> frozenset[str]:
        """Names of the signals without which this masker cannot draw."""
        return frozenset()

    @property
    def exact(self) -> bool:
        """Whether every row hides exactly round(ratio * N) patches, half away from zero."""
        return False

    def fixed_count(self, grid: tuple[int, int], progress: float = 0.0) -> int | None:
        """Return how many patches of a grid every row hides, or None where that is not fixed.

        Known before drawing, so that tokens can be dropped without asking the device.
        """
        return None

    @final
    def several(
        self,
        masks: int,
        batch: int,
        grid: tuple[int, int],
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        progress: float = 0.0,
        **signals: Tensor,
    ) -> Tensor:
        """Draw several masks for each image: ``(B, masks, N)`` bool.

        >>> import maskdistill as md
        >>> md.SquaresMasker(0.8, inverse=True).several(16, batch=4, grid=(14, 14)).shape
        torch.Size([4, 16, 196])

        As in data2vec 2.0 (Baevski et al., 2023), where one pass of the teacher serves many masked
        passes of the student: ``images.repeat_interleave(masks, dim=0)`` goes with
        ``mask.flatten(0, 1)``. The other arguments are those of the call.
        """
        if not isinstance(masks, int) or masks < 1:
            raise ValueError(f"{self!r}: masks must be an int >= 1; got {masks!r}.")
        repeated: dict[str, Any] = {
            name: signal.repeat_interleave(masks, 0) for name, signal in signals.items()
        }
        drawn = self(
            batch * masks,
            grid,
            generator=generator,
            device=device,
            progress=progress,
            **repeated,
        )
        return drawn.view(batch, masks, drawn.shape[1])

    # --- The algebra. It is built of maskers, so its classes cannot be imported before this one.

    def exactly(self, ratio: Ratio) -> Masker:
        """Trim or top up each row at random until it hides exactly round(ratio * N) patches."""
        from maskdistill.masking.algebra import Exactly

        return Exactly(self, ratio)

    def sometimes(self, p: Scalar) -> Masker:
        """Mask each image with probability ``p`` (a number or a schedule), else not at all."""
        from maskdistill.masking.algebra import Sometimes

        return Sometimes(self, p)

    def rolled(self) -> Masker:
        """Shift each mask around the grid's edges by a random offset: no place is preferred."""
        from maskdistill.masking.algebra import Rolled

        return Rolled(self)

    def in_units(self, size: int) -> Masker:
        """Draw on a grid of units, each ``size`` x ``size`` patches that are hidden together."""
        from maskdistill.masking.algebra import InUnits

        return InUnits(self, size)

    def shared(self) -> Masker:
        """Draw one mask for the whole batch."""
        from maskdistill.masking.relations import Shared

        return Shared(self)

    def same_in_views(self) -> Masker:
        """Draw one mask per image, the same in all its views of one size, whoever sees them."""
        from maskdistill.masking.relations import SameInViews

        return SameInViews(self)

    def complementary_views(self) -> Masker:
        """Draw one mask per image; every second view hides what the others show."""
        from maskdistill.masking.relations import ComplementaryViews

        return ComplementaryViews(self)

    def total(self, ratio: Ratio) -> Masker:
        """Trim or top up at random until an image's views together hide exactly ``ratio``."""
        from maskdistill.masking.relations import Total

        return Total(self, ratio)

    def __or__(self, other: Masker) -> Masker:
        from maskdistill.masking.algebra import Union

        return Union(self, other) if isinstance(other, Masker) else NotImplemented

    def __and__(self, other: Masker) -> Masker:
        from maskdistill.masking.algebra import Intersection

        return Intersection(self, other) if isinstance(other, Masker) else NotImplemented

    def __sub__(self, other: Masker) -> Masker:
        from maskdistill.masking.algebra import Difference

        return Difference(self, other) if isinstance(other, Masker) else NotImplemented

    def __invert__(self) -> Masker:
        from maskdistill.masking.algebra import Complement

        return Complement(self)

    def __repr__(self) -> str:
        if not is_dataclass(self):  # a masker of somebody's own without settings
            return f"{type(self).__name__}()"
        return constructor_repr(self)


def hidden_if_fixed(ratio: Ratio, grid: tuple[int, int], progress: float) -> int | None:
    """Return the hidden patches that a ratio asks of every row, or None if it varies by image."""
    if isinstance(ratio, PerImage):
        return None
    return hidden_count(scalar_at(ratio, progress), grid[0] * grid[1])


def _brief(value: object) -> str:
    """Show a wrong argument, but not all numbers of a tensor."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return repr(value)


def _check_request(
    masker: Masker, batch: int, grid: tuple[int, int], progress: float, views: int
) -> tuple[int, int]:
    if not isinstance(batch, int) or batch < 0:
        raise ValueError(f"{masker!r}: batch must be an int >= 0; got {_brief(batch)}.")
    if (
        not isinstance(grid, (tuple, list))
        or len(grid) != 2
        or not all(isinstance(side, int) and side >= 1 for side in grid)
    ):
        raise ValueError(
            f"{masker!r}: grid must be (rows, columns), two ints >= 1; got {_brief(grid)}."
        )
    if not 0.0 <= progress <= 1.0:
        raise ValueError(
            f"{masker!r}: progress must lie in [0, 1]; got {progress!r}. "
            "It is the share of training that is done, not a step or an epoch."
        )
    if not isinstance(views, int) or views < 1 or batch % views:
        raise ValueError(
            f"{masker!r}: views must be an int >= 1 that divides the batch ({batch}), for the rows "
            f"are views of the same images, view by view; got {views!r}."
        )
    return grid[0], grid[1]


def _device_of(signals: Mapping[str, Tensor], generator: torch.Generator | None) -> torch.device:
    for signal in signals.values():
        return signal.device
    # An empty tensor knows the default device, and can be traced; get_default_device() cannot.
    return generator.device if generator is not None else torch.empty(0).device
