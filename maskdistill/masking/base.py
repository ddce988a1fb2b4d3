"""What a masker is: one call, one hook, and the algebra that makes maskers out of maskers.

From top to bottom: ``Masker``; maskers that hide an exact number (``ExactMasker``,
``ScoreMasker``); two maskers joined (``a | b``); one masker changed (``~a``, ``a.exactly(...)``);
one of several (``Mixture``); and maskers that relate the views of an image.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, MutableMapping
from dataclasses import dataclass, is_dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from maskdistill.masking import constraints
from maskdistill.masking.constraints import Constraint
from maskdistill.masking.context import MaskContext, full_precision, top_k
from maskdistill.masking.ratios import (
    PerImage,
    Ratio,
    Scalar,
    arguments_repr,
    check_ratio,
    constructor_repr,
    hidden_count,
    moments,
    scalar_at,
)


class Masker(ABC):
    """A distribution over sets of patches: call it to draw one set per image.

    A masker is an immutable value: it compares, hashes and pickles, and its repr is the call that
    builds it. It knows the grid, the batch, optional signals and a generator, never a model.
    Maskers combine into maskers: ``a | b``, ``a & b``, ``a - b``, ``~a``, the methods below, and
    ``Mixture``. **Each mention is a fresh draw**, so ``a & ~a`` is not empty when ``a`` is random.

    A subclass is a frozen dataclass with ``repr=False`` that fills one hook, ``draw``. It declares
    what its parameters may be in ``constraints``; rules between parameters go into
    ``check_parameters``.

    >>> import maskdistill as md
    >>> mask = md.RandomMasker(0.3)(batch=8, grid=(14, 14))
    >>> mask.shape, mask.dtype, mask.sum(dim=1).unique()
    (torch.Size([8, 196]), torch.bool, tensor([59]))

    Attributes:
        constraints: what each parameter may be, by name; those of the base classes hold as well.
    """

    constraints: ClassVar[Mapping[str, Constraint]] = {}
    _name: ClassVar[str]
    """What errors call the masker: its class, or the method that makes it."""

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        inherited = [base.constraints for base in reversed(cls.__mro__) if issubclass(base, Masker)]
        cls.constraints = {name: check for each in inherited for name, check in each.items()}
        cls._name = vars(cls).get("_name", cls.__name__)

    def __post_init__(self) -> None:
        for name, constraint in self.constraints.items():
            object.__setattr__(self, name, constraint(self._name, name, getattr(self, name)))
        self.check_parameters()

    def check_parameters(self) -> None:  # noqa: B027  # most have no such rule  # most maskers have no such rule
        """Refuse parameters that do not go together, each being admissible by itself."""

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
        rows, columns = _checked_grid(self, batch, grid, progress, views)
        _check_sources(self, generator, signals)
        if device is None:
            device = _device_of(signals, generator)
        where = torch.device(device)
        context = MaskContext(
            batch, (rows, columns), where, generator, progress, signals, views, memory
        )
        with full_precision(where):
            mask = self.draw(context)
        if mask.dtype != torch.bool or mask.shape != (batch, rows * columns):
            raise ValueError(
                f"{type(self).__name__}.draw must return a bool tensor (B, N) = "
                f"({batch}, {rows * columns}), True = hidden; it returned {tuple(mask.shape)} "
                f"{mask.dtype}."
            )
        return mask

    @abstractmethod
    def draw(self, context: MaskContext) -> Tensor:
        """Return the ``(B, N)`` bool mask; arguments are checked, signals are present."""

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
        >>> md.masking.SquaresMasker(0.8, inverse=True).several(16, batch=4, grid=(14, 14)).shape
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

    # --- The algebra

    def exactly(self, ratio: Ratio) -> Masker:
        """Trim or top up each row at random until it hides exactly round(ratio * N) patches."""
        return Exactly(self, ratio)

    def sometimes(self, p: Scalar) -> Masker:
        """Mask each image with probability ``p`` (a number or a schedule), else not at all."""
        return Sometimes(self, p)

    def rolled(self) -> Masker:
        """Shift each mask around the grid's edges by a random offset: no place is preferred."""
        return Rolled(self)

    def in_units(self, size: int) -> Masker:
        """Draw on a grid of units, each ``size`` x ``size`` patches that are hidden together."""
        return InUnits(self, size)

    def shared(self) -> Masker:
        """Draw one mask for the whole batch."""
        return Shared(self)

    def same_in_views(self) -> Masker:
        """Draw one mask per image, the same in all its views of one size, whoever sees them."""
        return SameInViews(self)

    def complementary_views(self) -> Masker:
        """Draw one mask per image; every second view hides what the others show."""
        return ComplementaryViews(self)

    def total(self, ratio: Ratio) -> Masker:
        """Trim or top up at random until an image's views together hide exactly ``ratio``."""
        return Total(self, ratio)

    def __or__(self, other: Masker) -> Masker:
        return Union(self, other) if isinstance(other, Masker) else NotImplemented

    def __and__(self, other: Masker) -> Masker:
        return Intersection(self, other) if isinstance(other, Masker) else NotImplemented

    def __sub__(self, other: Masker) -> Masker:
        return Difference(self, other) if isinstance(other, Masker) else NotImplemented

    def __invert__(self) -> Masker:
        return Complement(self)

    def __repr__(self) -> str:
        if not is_dataclass(self):  # a masker of somebody's own without settings
            return f"{type(self).__name__}()"
        return constructor_repr(self)


# --- Maskers that hide exactly as much as they are told


@dataclass(frozen=True, repr=False)
class ExactMasker(Masker):
    """Hides exactly round(ratio * N) patches in every row; a subclass says which.

    A subclass fills ``choose``, or, if scores say it all, is a ``ScoreMasker``.

    Args:
        ratio: share of patches to hide, in [0, 1]; a number, a schedule, or one per image.

    Raises:
        ValueError: ratio out of range.
    """

    ratio: Ratio

    constraints = {"ratio": constraints.ratio}

    @property
    @final
    def exact(self) -> bool:
        """True: every row hides exactly round(ratio * N)."""
        return True

    @final
    def fixed_count(self, grid: tuple[int, int], progress: float = 0.0) -> int | None:
        """Return the count, if the ratio does not vary by image."""
        return hidden_if_fixed(self.ratio, grid, progress)

    @final
    def draw(self, context: MaskContext) -> Tensor:
        return self.choose(context, context.count(self.ratio))

    @abstractmethod
    def choose(self, context: MaskContext, count: int | Tensor) -> Tensor:
        """Return the ``(B, N)`` mask that hides ``count`` patches: one int, or ``(B,)`` int64."""


@dataclass(frozen=True, repr=False)
class ScoreMasker(ExactMasker):
    """Hides the patches with the highest scores; a subclass says what the scores are.

    >>> import torch
    >>> @dataclass(frozen=True, repr=False)
    ... class BottomMasker(ScoreMasker):
    ...     def scores(self, context):
    ...         rows, columns = context.grid
    ...         row = torch.arange(rows).repeat_interleave(columns)
    ...         return row + context.rand(context.batch, context.patches)
    >>> BottomMasker(0.5)(1, (2, 3))
    tensor([[False, False, False,  True,  True,  True]])

    Args:
        ratio: share of patches to hide, in [0, 1]; a number, a schedule, or one per image.

    Raises:
        ValueError: ratio out of range.
    """

    @final
    def choose(self, context: MaskContext, count: int | Tensor) -> Tensor:
        """Hide the ``count`` highest scores."""
        return top_k(self.scores(context), count)

    @abstractmethod
    def scores(self, context: MaskContext) -> Tensor:
        """Return ``(B, N)`` floats on the context's device, random ones from ``context.rand``."""


def hidden_if_fixed(ratio: Ratio, grid: tuple[int, int], progress: float) -> int | None:
    """Return the hidden patches that a ratio asks of every row, or None if it varies by image."""
    if isinstance(ratio, PerImage):
        return None
    return hidden_count(scalar_at(ratio, progress), grid[0] * grid[1])


def complete(mask: Tensor, count: int | Tensor, context: MaskContext) -> Tensor:
    """Trim or top up each row of ``mask`` at random until it hides exactly ``count``."""
    order = context.rand(*mask.shape)
    if not context.can_look:
        return top_k(mask + order, count)
    rows = (mask.sum(dim=1) != count).nonzero().squeeze(1)  # leave alone what is exact already
    some = count[rows] if isinstance(count, Tensor) else count
    return mask.index_copy(0, rows, top_k(mask[rows] + order[rows], some))


# --- Two maskers joined


@dataclass(frozen=True, repr=False)
class _Joined(Masker):
    """Two maskers, each drawn afresh, joined patch by patch."""

    left: Masker
    right: Masker

    symbol: ClassVar[str]

    @property
    def needs(self) -> frozenset[str]:
        """What either side needs."""
        return self.left.needs | self.right.needs

    def __repr__(self) -> str:
        return f"{_operand(self.left)} {self.symbol} {_operand(self.right)}"


class Union(_Joined):
    """Hides what either masker hides: ``a | b``."""

    symbol = "|"

    def draw(self, context: MaskContext) -> Tensor:
        return self.left.draw(context) | self.right.draw(context)


class Intersection(_Joined):
    """Hides what both maskers hide: ``a & b``."""

    symbol = "&"

    def draw(self, context: MaskContext) -> Tensor:
        return self.left.draw(context) & self.right.draw(context)


class Difference(_Joined):
    """Hides what the first masker hides and the second does not: ``a - b``."""

    symbol = "-"

    def draw(self, context: MaskContext) -> Tensor:
        return self.left.draw(context) & ~self.right.draw(context)


def _operand(masker: Masker) -> str:
    return f"({masker!r})" if isinstance(masker, (_Joined, Complement)) else repr(masker)


# --- One masker changed


@dataclass(frozen=True, repr=False)
class Combinator(Masker):
    """A masker made of one other masker, which its ``draw`` draws by ``self.masker.draw(context)``.

    What the other masker needs is passed on. A subclass says what becomes of its count; where
    rows go on hiding as many patches as before, it is a ``SameCount``.
    """

    masker: Masker

    @property
    def needs(self) -> frozenset[str]:
        """What the other masker needs."""
        return self.masker.needs

    def __repr__(self) -> str:
        return f"{_operand(self.masker)}.{self._name}{arguments_repr(self, skip=1)}"


@dataclass(frozen=True, repr=False)
class SameCount(Combinator):
    """A combinator that leaves the number of hidden patches in each row as it is."""

    @property
    def exact(self) -> bool:
        """Whether the other masker is."""
        return self.masker.exact

    def fixed_count(self, grid: tuple[int, int], progress: float = 0.0) -> int | None:
        """Return the count of the other masker."""
        return self.masker.fixed_count(grid, progress)


@dataclass(frozen=True, repr=False)
class Complement(Combinator):
    """Hides what a masker shows: ``~a``."""

    def fixed_count(self, grid: tuple[int, int], progress: float = 0.0) -> int | None:
        """Return the patches that the other masker shows, if that is fixed."""
        shown = self.masker.fixed_count(grid, progress)
        return None if shown is None else grid[0] * grid[1] - shown

    def draw(self, context: MaskContext) -> Tensor:
        return ~self.masker.draw(context)

    def __repr__(self) -> str:
        return f"~{_operand(self.masker)}"


@dataclass(frozen=True, repr=False)
class Exactly(Combinator):
    """Trims or tops up each row at random to exactly round(ratio * N): ``a.exactly(ratio)``.

    Topping up is how DINOv3 completes its block masks (Siméoni et al., 2025).
    """

    ratio: Ratio

    _name = "exactly"
    constraints = {"ratio": constraints.ratio}

    @property
    def exact(self) -> bool:
        """True: that is what it is for."""
        return True

    def fixed_count(self, grid: tuple[int, int], progress: float = 0.0) -> int | None:
        """Return the exact count, if the ratio does not vary by image."""
        return hidden_if_fixed(self.ratio, grid, progress)

    def draw(self, context: MaskContext) -> Tensor:
        return complete(self.masker.draw(context), context.count(self.ratio), context)


@dataclass(frozen=True, repr=False)
class Sometimes(Combinator):
    """Masks each image with probability ``p`` and leaves it whole otherwise: ``a.sometimes(p)``.

    Each view of an image tosses its own coin; around it, ``.same_in_views()`` makes them agree.

    iBOT and AttMask mask half of the images (Zhou et al., 2022; Kakogeorgiou et al., 2022).
    """

    p: Scalar

    _name = "sometimes"
    constraints = {"p": constraints.share}

    def draw(self, context: MaskContext) -> Tensor:
        chosen = context.rand(context.batch, 1) < scalar_at(self.p, context.progress)
        return self.masker.draw(context) & chosen


@dataclass(frozen=True, repr=False)
class Rolled(SameCount):
    """Shifts each mask around the grid's edges by a random offset: ``a.rolled()``.

    Rectangles that must lie inside the grid hide its centre far more often than its corners; after
    the shift every patch is hidden equally often, at the price that a rectangle may come apart into
    two or four at the edges. CAPI shifts its blocks so (Darcet et al., 2025), and DINOv3 offers it.

    >>> import maskdistill as md
    >>> md.BlockMasker(0.3).rolled()
    BlockMasker(0.3).rolled()
    """

    _name = "rolled"

    def draw(self, context: MaskContext) -> Tensor:
        height, width = context.grid
        down, right = context.rand(2, context.batch, 1)
        rows = torch.arange(height, device=context.device) - (down * height).floor()
        columns = torch.arange(width, device=context.device) - (right * width).floor()
        source = (rows.long() % height * width)[:, :, None] + (columns.long() % width)[:, None, :]
        return self.masker.draw(context).gather(1, source.flatten(1))


@dataclass(frozen=True, repr=False)
class InUnits(Combinator):
    """Draws on a coarser grid of units, each hidden as a whole: ``a.in_units(size)``.

    >>> import maskdistill as md
    >>> md.RandomMasker(0.5).in_units(2)(1, (2, 4)).unflatten(1, (2, 4)).sum()
    tensor(4)

    A unit is ``size`` x ``size`` patches; units at the right and lower edge are cut where the grid
    ends. SimMIM hides units of 32 pixels (Xie et al., 2022).
    """

    size: int

    _name = "in_units"
    constraints = {"size": constraints.whole(1)}

    def check_parameters(self) -> None:
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

    def draw(self, context: MaskContext) -> Tensor:
        units = self.masker.draw(context.replaced(grid=self._units(context.grid)))
        mask = units.unflatten(1, self._units(context.grid))
        mask = mask.repeat_interleave(self.size, 1).repeat_interleave(self.size, 2)
        cut: Tensor = mask[:, : context.grid[0], : context.grid[1]]
        return cut.flatten(1)


# --- One of several


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

    def check_parameters(self) -> None:
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

    def draw(self, context: MaskContext) -> Tensor:
        weights = [scalar_at(w, context.progress) for w in self.weights.values()]
        where = context.rand(context.batch, 1)
        mask = torch.zeros(context.batch, context.patches, dtype=torch.bool, device=context.device)
        low = 0.0
        for index, (masker, weight) in enumerate(zip(self.weights, weights, strict=True)):
            # The last interval is open-ended: rounding must leave no image without a masker.
            high = low + weight if index < len(weights) - 1 else 2.0
            mask = mask | (masker.draw(context) & (where >= low) & (where < high))
            low = high
        return mask

    def __hash__(self) -> int:
        return hash(frozenset(self.weights.items()))


# --- Relations between the images of a batch, or the views of an image


@dataclass(frozen=True, repr=False)
class Shared(SameCount):
    """Draws one mask for the whole batch: ``a.shared()``.

    >>> import maskdistill as md
    >>> mask = md.RandomMasker(0.5).shared()(8, (7, 7))
    >>> bool((mask == mask[0]).all())
    True

    As MSN does (Assran et al., 2022). All views that are drawn together have it, too.

    Raises:
        ValueError: a masker that follows a signal of each image.
    """

    _name = "shared"

    def check_parameters(self) -> None:
        if self.masker.needs:
            raise ValueError(
                f"shared: {self.masker!r} follows {sorted(self.masker.needs)} of each image, so "
                "one mask cannot serve the whole batch."
            )

    def draw(self, context: MaskContext) -> Tensor:
        row = self.masker.draw(context.replaced(batch=1, signals={}, views=1))
        return row.expand(context.batch, -1).clone()


@dataclass(frozen=True, repr=False)
class SameInViews(SameCount):
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

    _name = "same_in_views"

    def draw(self, context: MaskContext) -> Tensor:
        return _once_per_image(self, context).repeat(context.views, 1)


@dataclass(frozen=True, repr=False)
class ComplementaryViews(Combinator):
    """Draws one mask per image; every second view hides the rest: ``a.complementary_views()``.

    >>> import maskdistill as md
    >>> masker = md.RandomMasker(0.5).complementary_views()
    >>> first, second = masker(8, (14, 14), views=2).chunk(2)
    >>> bool((first ^ second).all())
    True

    The views agree patch by patch, wherever their crops lie in the image; ``SceneMasker`` relates
    them by place. Within one step of a policy all mentions are one draw, as in ``same_in_views``.
    """

    _name = "complementary_views"

    def fixed_count(self, grid: tuple[int, int], progress: float = 0.0) -> int | None:
        """Return the count, if it is half of the patches; else views differ."""
        count = self.masker.fixed_count(grid, progress)
        return count if count is not None and 2 * count == grid[0] * grid[1] else None

    def draw(self, context: MaskContext) -> Tensor:
        mask = _once_per_image(self, context)
        return torch.cat([mask if view % 2 == 0 else ~mask for view in range(context.views)])


@dataclass(frozen=True, repr=False)
class Total(Combinator):
    """Makes an image's views together hide exactly round(ratio * V * N): ``a.total(ratio)``.

    >>> import maskdistill as md
    >>> masker = md.RandomMasker(md.Uniform(0.1, 0.9)).total(0.5)
    >>> first, second = masker(8, (14, 14), views=2).chunk(2)
    >>> (first.sum(dim=1) + second.sum(dim=1)).unique()
    tensor([196])

    Trims or tops up at random, over all V views of one size at once, so a view that hides more is
    paid for by another that hides less.
    """

    ratio: Ratio

    _name = "total"
    constraints = {"ratio": constraints.ratio}

    def draw(self, context: MaskContext) -> Tensor:
        height, width = context.grid
        views, images = context.views, context.images
        joined = context.replaced(batch=images, grid=(views * height, width), views=1)
        mask = self.masker.draw(context).view(views, images, context.patches)
        mask = mask.transpose(0, 1).flatten(1)
        mask = complete(mask, joined.count(self.ratio), joined)
        return mask.view(images, views, context.patches).transpose(0, 1).flatten(0, 1)


def _once_per_image(combinator: Combinator, context: MaskContext) -> Tensor:
    """Draw for the first views alone, or find what was drawn for this grid before."""
    return context.once(
        (combinator, context.grid, context.images),
        lambda: combinator.masker.draw(context.first_view()),
    )


# --- Checking a call


def _checked_grid(
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


def _check_sources(masker: Masker, generator: object, signals: Mapping[str, object]) -> None:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(
            f"{masker!r}: generator must be a torch.Generator or None; got {_brief(generator)}. "
            "Make one with torch.Generator().manual_seed(seed)."
        )
    for name, signal in signals.items():
        if not isinstance(signal, Tensor):
            raise ValueError(
                f"{masker!r}: {name}={_brief(signal)} is no argument of a masker and no signal, "
                "for a signal is a tensor with one row per row of the mask."
            )
    missing = [name for name in masker.needs if name not in signals]
    if missing:
        given = f"only {sorted(signals)}" if signals else "none"
        raise ValueError(
            f"{masker!r} needs the signal(s) {sorted(missing)}, but {given} came. "
            f"Pass {min(missing)}=... to the call."
        )


def _brief(value: object) -> str:
    """Show a wrong argument, but not all numbers of a tensor."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return repr(value)


def _device_of(signals: Mapping[str, Tensor], generator: torch.Generator | None) -> torch.device:
    for signal in signals.values():
        return signal.device
    # An empty tensor knows the default device, and can be traced; get_default_device() cannot.
    return generator.device if generator is not None else torch.empty(0).device
