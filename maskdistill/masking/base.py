"""What a masker is, and the algebra that makes maskers out of maskers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from maskdistill.masking._engine import top_k
from maskdistill.masking.context import MaskContext
from maskdistill.masking.ratios import (
    PerImage,
    Ratio,
    Scalar,
    check_ratio,
    constructor_repr,
    hidden_count,
    scalar_at,
)


class Masker(ABC):
    """A distribution over sets of patches: call it to draw one set per image.

    A masker is an immutable value: it compares, hashes and pickles, and its repr is the call that
    builds it. It knows the grid, the batch, optional signals and a generator, never a model.
    Maskers combine into maskers: ``a | b``, ``a & b``, ``a - b``, ``~a``, ``a.exactly(ratio)``,
    ``a.sometimes(p)`` and ``Mixture``. **Each mention is a fresh draw**, so ``a & ~a`` is not empty
    when ``a`` is random.

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
        **signals: Tensor,
    ) -> Tensor:
        """Draw a mask for each image of a batch.

        Args:
            batch: number of images, B >= 0.
            grid: patch rows and columns, (H, W), each >= 1; N = H * W.
            generator: source of every random number; None is torch's global generator, which is
                also the only one that ``torch.compile`` can trace.
            device: where the mask is wanted; by default where the signals are, else the
                generator, else torch's default device.
            progress: how far training has come, in [0, 1]; moves the schedules.
            **signals: what guided maskers look at, e.g. ``attention`` as ``(B, N)`` or
                ``(B, heads, N)``. Signals that nobody needs are ignored.

        Returns:
            ``(B, N)`` bool, True where a patch is hidden, row-major over the grid. Prefix tokens
            (class token, registers) are never counted.

        Raises:
            ValueError: an argument is out of range, or a signal is missing or misshapen.
        """
        rows, columns = _check_request(self, batch, grid, progress)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise ValueError(
                f"{self!r}: generator must be a torch.Generator or None; got {_brief(generator)}. "
                "Make one with torch.Generator().manual_seed(seed)."
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
        mask = self._draw(
            MaskContext(batch, (rows, columns), torch.device(device), generator, progress, signals)
        )
        assert mask.shape == (batch, rows * columns), f"{self!r} drew {tuple(mask.shape)}"
        assert mask.dtype == torch.bool, f"{self!r} drew {mask.dtype}"
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

    def fixed_count(self, patches: int, progress: float = 0.0) -> int | None:
        """Return how many of ``patches`` every row hides, or None where that is not fixed.

        Known before drawing, so that tokens can be dropped without asking the device.
        """
        return None

    def exactly(self, ratio: Ratio) -> Masker:
        """Trim or top up each row at random until it hides exactly round(ratio * N) patches."""
        return Exactly(self, ratio)

    def sometimes(self, p: Scalar) -> Masker:
        """Mask each image with probability ``p`` (a number or a schedule), else not at all."""
        return Sometimes(self, p)

    def __or__(self, other: Masker) -> Masker:
        return Union(self, other) if isinstance(other, Masker) else NotImplemented

    def __and__(self, other: Masker) -> Masker:
        return Intersection(self, other) if isinstance(other, Masker) else NotImplemented

    def __sub__(self, other: Masker) -> Masker:
        return Difference(self, other) if isinstance(other, Masker) else NotImplemented

    def __invert__(self) -> Masker:
        return Complement(self)

    def __repr__(self) -> str:
        return constructor_repr(self)


def hidden_if_fixed(ratio: Ratio, patches: int, progress: float) -> int | None:
    """Return the hidden patches that a ratio asks of every row, or None if it varies by image."""
    if isinstance(ratio, PerImage):
        return None
    return hidden_count(scalar_at(ratio, progress), patches)


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


@dataclass(frozen=True, repr=False)
class Complement(_Wrapped):
    """Hides what a masker shows: ``~a``."""

    masker: Masker

    def fixed_count(self, patches: int, progress: float = 0.0) -> int | None:
        """Return the patches that the wrapped masker shows, if that is fixed."""
        shown = self.masker.fixed_count(patches, progress)
        return None if shown is None else patches - shown

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

    def fixed_count(self, patches: int, progress: float = 0.0) -> int | None:
        """Return the exact count, if the ratio does not vary by image."""
        return hidden_if_fixed(self.ratio, patches, progress)

    def _draw(self, context: MaskContext) -> Tensor:
        return complete(self.masker._draw(context), context.count(self.ratio), context)

    def __repr__(self) -> str:
        return f"{_operand(self.masker)}.exactly({self.ratio!r})"


@dataclass(frozen=True, repr=False)
class Sometimes(_Wrapped):
    """Masks each image with probability ``p`` and leaves it whole otherwise: ``a.sometimes(p)``.

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
class Mixture(Masker):
    """Masks each image with one of several maskers, chosen by weight.

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
        for progress in (0.0, 1.0):
            total = sum(scalar_at(w, progress) for w in self.weights.values())
            if abs(total - 1.0) > 1e-6:
                raise ValueError(
                    f"Mixture: weights must sum to 1; at progress {progress:g} they sum to "
                    f"{total:g}. Equal maskers count once: a dict keeps the last of equal keys."
                )
        object.__setattr__(self, "weights", dict(self.weights))  # nobody else can change it

    @property
    def needs(self) -> frozenset[str]:
        """What any of the maskers needs."""
        return frozenset().union(*(masker.needs for masker in self.weights))

    def fixed_count(self, patches: int, progress: float = 0.0) -> int | None:
        """Return the count that all maskers agree on, if they do."""
        counts = {masker.fixed_count(patches, progress) for masker in self.weights}
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
    return top_k(mask + context.rand(*mask.shape), count)


def _brief(value: object) -> str:
    """Show a wrong argument, but not all numbers of a tensor."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return repr(value)


def _operand(masker: Masker) -> str:
    return f"({masker!r})" if isinstance(masker, (_Pair, Complement)) else repr(masker)


def _check_request(
    masker: Masker, batch: int, grid: tuple[int, int], progress: float
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
    return grid[0], grid[1]


def _device_of(signals: Mapping[str, Tensor], generator: torch.Generator | None) -> torch.device:
    for signal in signals.values():
        return signal.device
    # An empty tensor knows the default device, and can be traced; get_default_device() cannot.
    return generator.device if generator is not None else torch.empty(0).device
