"""The algebra: maskers made of maskers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from maskdistill.masking._engine import top_k
from maskdistill.masking.base import Masker, hidden_if_fixed
from maskdistill.masking.context import MaskContext
from maskdistill.masking.ratios import Ratio, check_ratio
from maskdistill.masking.schedules import Scalar, moments, scalar_at


@dataclass(frozen=True, repr=False)
class _Pair(Masker):
    """Two maskers, each drawn afresh, joined patch by patch."""

    left: Masker
    right: Masker
    _symbol: ClassVar[str]

    @property
    def needs(self) -> frozenset[str]:
        """What either side needs."""
        return self.left.needs | self.right.needs

    @final
    def _draw(self, context: MaskContext) -> Tensor:
        return self._join(self.left._draw(context), self.right._draw(context))

    @abstractmethod
    def _join(self, left: Tensor, right: Tensor) -> Tensor: ...

    def __repr__(self) -> str:
        return f"{_operand(self.left)} {self._symbol} {_operand(self.right)}"


class Union(_Pair):
    """Hides what either masker hides: ``a | b``."""

    _symbol = "|"

    def _join(self, left: Tensor, right: Tensor) -> Tensor:
        return left | right


class Intersection(_Pair):
    """Hides what both maskers hide: ``a & b``."""

    _symbol = "&"

    def _join(self, left: Tensor, right: Tensor) -> Tensor:
        return left & right


class Difference(_Pair):
    """Hides what the first masker hides and the second does not: ``a - b``."""

    _symbol = "-"

    def _join(self, left: Tensor, right: Tensor) -> Tensor:
        return left & ~right


class _Wrapped(Masker):
    """A masker made from one other masker, whose needs it passes on."""

    masker: Masker

    @property
    def needs(self) -> frozenset[str]:
        """What the wrapped masker needs."""
        return self.masker.needs


class _Moved(_Wrapped):
    """A masker whose rows hide as many patches as those of another, elsewhere or again."""

    @property
    def exact(self) -> bool:
        """Whether the other masker is."""
        return self.masker.exact

    def fixed_count(self, grid: tuple[int, int], progress: float = 0.0) -> int | None:
        """Return the count of the other masker."""
        return self.masker.fixed_count(grid, progress)


@dataclass(frozen=True, repr=False)
class Complement(_Wrapped):
    """Hides what a masker shows: ``~a``."""

    masker: Masker

    def fixed_count(self, grid: tuple[int, int], progress: float = 0.0) -> int | None:
        """Return the patches that the wrapped masker shows, if that is fixed."""
        shown = self.masker.fixed_count(grid, progress)
        return None if shown is None else grid[0] * grid[1] - shown

    def _draw(self, context: MaskContext) -> Tensor:
        return ~self.masker._draw(context)

    def __repr__(self) -> str:
        return f"~{_operand(self.masker)}"


@dataclass(frozen=True, repr=False)
class Exactly(_Wrapped):
    """Trims or tops up each row at random to exactly round(ratio * N): ``a.exactly(ratio)``.

    Topping up is how DINOv3 completes its block masks (Siméoni et al., 2025).
    """

    masker: Masker
    ratio: Ratio

    def __post_init__(self) -> None:
        check_ratio("exactly", "ratio", self.ratio)

    @property
    def exact(self) -> bool:
        """True: that is what it is for."""
        return True

    def fixed_count(self, grid: tuple[int, int], progress: float = 0.0) -> int | None:
        """Return the exact count, if the ratio does not vary by image."""
        return hidden_if_fixed(self.ratio, grid, progress)

    def _draw(self, context: MaskContext) -> Tensor:
        return complete(self.masker._draw(context), context.count(self.ratio), context)

    def __repr__(self) -> str:
        return f"{_operand(self.masker)}.exactly({self.ratio!r})"


@dataclass(frozen=True, repr=False)
class Sometimes(_Wrapped):
    """Masks each image with probability ``p`` and leaves it whole otherwise: ``a.sometimes(p)``.

    Each view of an image tosses its own coin; around it, ``.same_in_views()`` makes them agree.

    iBOT and AttMask mask half of the images (Zhou et al., 2022; Kakogeorgiou et al., 2022).
    """

    masker: Masker
    p: Scalar

    def __post_init__(self) -> None:
        check_ratio("sometimes", "p", self.p, per_image=False)

    def _draw(self, context: MaskContext) -> Tensor:
        chosen = context.rand(context.batch, 1) < scalar_at(self.p, context.progress)
        return self.masker._draw(context) & chosen

    def __repr__(self) -> str:
        return f"{_operand(self.masker)}.sometimes({self.p!r})"


@dataclass(frozen=True, repr=False)
class Rolled(_Moved):
    """Shifts each mask around the grid's edges by a random offset: ``a.rolled()``.

    Rectangles that must lie inside the grid hide its centre far more often than its corners; after
    the shift every patch is hidden equally often, at the price that a rectangle may come apart into
    two or four at the edges. CAPI shifts its blocks so (Darcet et al., 2025), and DINOv3 offers it.

    >>> import maskdistill as md
    >>> md.BlockMasker(0.3).rolled()
    BlockMasker(0.3).rolled()
    """

    masker: Masker

    def _draw(self, context: MaskContext) -> Tensor:
        height, width = context.grid
        down, right = context.rand(2, context.batch, 1)
        rows = torch.arange(height, device=context.device) - (down * height).floor()
        columns = torch.arange(width, device=context.device) - (right * width).floor()
        source = (rows.long() % height * width)[:, :, None] + (columns.long() % width)[:, None, :]
        return self.masker._draw(context).gather(1, source.flatten(1))

    def __repr__(self) -> str:
        return f"{_operand(self.masker)}.rolled()"


@dataclass(frozen=True, repr=False)
class InUnits(_Wrapped):
    """Draws on a coarser grid of units, each hidden as a whole: ``a.in_units(size)``.

    >>> import maskdistill as md
    >>> md.RandomMasker(0.5).in_units(2)(1, (2, 4)).unflatten(1, (2, 4)).sum()
    tensor(4)

    A unit is ``size`` x ``size`` patches; units at the right and lower edge are cut where the grid
    ends. SimMIM hides units of 32 pixels (Xie et al., 2022).
    """

    masker: Masker
    size: int

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1:
            raise ValueError(f"in_units: size must be an int >= 1; got {self.size!r}.")
        if self.masker.needs:
            raise ValueError(
                f"in_units: {self.masker!r} needs the signal(s) {sorted(self.masker.needs)}, which "
                "are per patch, not per unit. Draw it on the coarser grid yourself, with a signal "
                "that is averaged over the units."
            )

    def fixed_count(self, grid: tuple[int, int], progress: float = 0.0) -> int | None:
        """Return the count, if it is fixed and the units fill the grid."""
        units = self._units(grid)
        count = self.masker.fixed_count(units, progress)
        if count is None:
            return None
        if count in (0, units[0] * units[1]):
            return grid[0] * grid[1] if count else 0
        whole = units[0] * self.size == grid[0] and units[1] * self.size == grid[1]
        return count * self.size**2 if whole else None

    def _units(self, grid: tuple[int, int]) -> tuple[int, int]:
        return -(-grid[0] // self.size), -(-grid[1] // self.size)

    def _draw(self, context: MaskContext) -> Tensor:
        units = self.masker._draw(context.replaced(grid=self._units(context.grid)))
        mask = units.unflatten(1, self._units(context.grid))
        mask = mask.repeat_interleave(self.size, 1).repeat_interleave(self.size, 2)
        cut: Tensor = mask[:, : context.grid[0], : context.grid[1]]
        return cut.flatten(1)

    def __repr__(self) -> str:
        return f"{_operand(self.masker)}.in_units({self.size!r})"


@dataclass(frozen=True, repr=False)
class Mixture(Masker):
    """Masks each image with one of several maskers, chosen by weight.

    Each view of an image chooses anew; around it, ``.same_in_views()`` makes them agree.

    >>> Mixture({RandomMasker(0.3): 0.5, NoMasker(): 0.5})  # doctest: +SKIP
    Mixture({RandomMasker(0.3): 0.5, NoMasker(): 0.5})

    Args:
        weights: probability of each masker, numbers or schedules, summing to 1.

    Raises:
        ValueError: no masker, a weight out of [0, 1], or weights that do not sum to 1.
    """

    weights: Mapping[Masker, Scalar]

    def __post_init__(self) -> None:
        if not isinstance(self.weights, Mapping) or not self.weights:
            raise ValueError(
                f"Mixture: weights must be a non-empty dict of masker: probability; "
                f"got {self.weights!r}."
            )
        for masker, weight in self.weights.items():
            if not isinstance(masker, Masker):
                raise ValueError(f"Mixture: every key must be a masker; got {masker!r}.")
            check_ratio("Mixture", f"the weight of {masker!r}", weight, per_image=False)
        for progress in moments(*self.weights.values()):
            total = sum(scalar_at(w, progress) for w in self.weights.values())
            if abs(total - 1.0) > 1e-6:
                raise ValueError(
                    f"Mixture: weights must sum to 1; at progress {progress:g} they sum to "
                    f"{total:g}. Equal maskers count once: a dict keeps the last of equal keys."
                )
        object.__setattr__(self, "weights", dict(self.weights))  # the caller may change his

    @property
    def needs(self) -> frozenset[str]:
        """What any of the maskers needs."""
        return frozenset().union(*(masker.needs for masker in self.weights))

    def fixed_count(self, grid: tuple[int, int], progress: float = 0.0) -> int | None:
        """Return the count that all maskers agree on, if they do."""
        counts = {masker.fixed_count(grid, progress) for masker in self.weights}
        return counts.pop() if len(counts) == 1 else None

    def _draw(self, context: MaskContext) -> Tensor:
        weights = [scalar_at(w, context.progress) for w in self.weights.values()]
        where = context.rand(context.batch, 1)
        mask = torch.zeros(context.batch, context.patches, dtype=torch.bool, device=context.device)
        low = 0.0
        for index, (masker, weight) in enumerate(zip(self.weights, weights, strict=True)):
            # The last interval is open-ended: rounding must leave no image without a masker.
            high = low + weight if index < len(weights) - 1 else 2.0
            mask = mask | (masker._draw(context) & (where >= low) & (where < high))
            low = high
        return mask

    def __hash__(self) -> int:
        return hash(frozenset(self.weights.items()))


def complete(mask: Tensor, count: int | Tensor, context: MaskContext) -> Tensor:
    """Trim or top up each row of ``mask`` at random until it hides exactly ``count``."""
    order = context.rand(*mask.shape)
    if not context.may_ask:
        return top_k(mask + order, count)
    rows = (mask.sum(dim=1) != count).nonzero().squeeze(1)  # leave alone what is exact already
    some = count[rows] if isinstance(count, Tensor) else count
    return mask.index_copy(0, rows, top_k(mask[rows] + order[rows], some))


def _operand(masker: Masker) -> str:
    return f"({masker!r})" if isinstance(masker, (_Pair, Complement)) else repr(masker)
