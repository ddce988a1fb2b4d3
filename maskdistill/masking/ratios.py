"""How much to hide: a number, a schedule, or a number drawn for each image."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Number
from typing import Any, TypeAlias, overload

import torch
from torch import Tensor

from maskdistill.masking.schedules import (
    Scalar,
    Schedule,
    constructor_repr,
    moments,
    scalar_at,
)

# 0.29 * 50 is a little below 14.5 in floating point, but is meant to be 14.5.
_SLACK = 1e-6

Rand: TypeAlias = Callable[..., Tensor]
"""``rand(*shape)`` draws uniform numbers in [0, 1) from the caller's generator, on its device."""


class PerImage(ABC):
    """A number drawn anew for each image of a batch, between ``low`` and ``high``.

    Both ends may be schedules.
    """

    low: Scalar
    high: Scalar

    @abstractmethod
    def sample(self, batch: int, rand: Rand, progress: float = 0.0) -> Tensor:
        """Draw one number per image: ``(batch,)`` floats."""

    def __repr__(self) -> str:
        return constructor_repr(self)


@dataclass(frozen=True, repr=False)
class Uniform(PerImage):
    """One independent uniform draw per image, as iBOT draws its ratio (Zhou et al., 2022).

    >>> Uniform(0.1, 0.5)
    Uniform(0.1, 0.5)
    """

    low: Scalar
    high: Scalar

    def __post_init__(self) -> None:
        _check_range(self)

    def sample(self, batch: int, rand: Rand, progress: float = 0.0) -> Tensor:
        """Draw one number per image: ``(batch,)`` floats."""
        low, high = scalar_at(self.low, progress), scalar_at(self.high, progress)
        return low + (high - low) * rand(batch)


@dataclass(frozen=True, repr=False)
class Stratified(PerImage):
    """One uniform draw per image, exactly one from each of B equal strata, in random order.

    >>> Stratified(0.1, 0.5)
    Stratified(0.1, 0.5)

    Args:
        low: least ratio, a number or a schedule.
        high: greatest ratio.
        share: share of the batch that gets a ratio; the strata are as many as these images,
            rounded down, and the others get 0. So a batch of one image gets none if it is below 1.
        jitter: draw within each stratum; ``False`` takes its upper end.

    The batch's mean hardly varies, which is why DINOv2 draws its ratios so, with share=0.5 (Oquab
    et al., 2023). DINOv3 takes the upper ends (Siméoni et al., 2025).
    """

    low: Scalar
    high: Scalar
    share: float = 1.0
    jitter: bool = True

    def __post_init__(self) -> None:
        _check_range(self)
        check_ratio("Stratified", "share", self.share, per_image=False, schedules=False)

    def sample(self, batch: int, rand: Rand, progress: float = 0.0) -> Tensor:
        """Draw one number per image: ``(batch,)`` floats."""
        low, high = scalar_at(self.low, progress), scalar_at(self.high, progress)
        strata = rounded_down(batch * self.share)
        stratum = rand(batch).argsort()
        place = rand(batch) if self.jitter else 1
        ratio = low + (high - low) * ((stratum + place) / max(strata, 1))
        return torch.where(stratum < strata, ratio, 0.0)


Ratio: TypeAlias = float | Schedule | PerImage
"""A number, a schedule, or one number per image."""


def bounds(value: Ratio) -> tuple[float, float]:
    """Return the least and the greatest number that ``value`` can ever be."""
    ends: tuple[float, ...]
    if isinstance(value, PerImage):
        none = (0.0,) if getattr(value, "share", 1.0) < 1 else ()
        ends = (*bounds(value.low), *bounds(value.high), *none)
    elif isinstance(value, Schedule):
        ends = value.bounds()
    else:
        ends = (value, value)
    return min(ends), max(ends)


def check_ratio(
    owner: str, name: str, value: object, *, per_image: bool = True, schedules: bool = True
) -> None:
    """Refuse anything but a number in [0, 1] or what yields such numbers."""
    kinds: tuple[type, ...] = (int, float)
    forms = "a number in [0, 1]"
    if schedules:
        kinds, forms = (*kinds, Schedule), forms + ", a schedule such as Linear"
    if per_image:
        kinds, forms = (*kinds, PerImage), forms + ", Uniform or Stratified"
    if isinstance(value, bool) or not isinstance(value, kinds):
        number = isinstance(value, Number) and not isinstance(value, bool)
        fix = f" Write float({value!r})." if number else ""
        if per_image and isinstance(value, (tuple, list)) and len(value) == 2:
            fix = f" Write Uniform({value[0]!r}, {value[1]!r}) for one number per image."
        raise ValueError(f"{owner}: {name} must be {forms}; got {value!r}.{fix}")
    low, high = bounds(value)  # type: ignore[arg-type]
    if not (low >= 0.0 and high <= 1.0):
        hint = (
            f" If you meant a percentage, write {high / 100:g}."
            if name == "ratio" and 1 < high <= 100 and low >= 0
            else ""
        )
        raise ValueError(f"{owner}: {name} must lie in [0, 1]; got {value!r}.{hint}")


@overload
def rounded_down(number: float) -> int: ...
@overload
def rounded_down(number: Tensor) -> Tensor: ...
def rounded_down(number: float | Tensor) -> int | Tensor:
    """Round down, but not by a whole one for an error of floating point."""
    number = number + _SLACK
    return number.long() if isinstance(number, Tensor) else int(number)


def hidden_count(ratio: float, patches: int) -> int:
    """Return round(ratio * patches), half away from zero: the library's one rounding rule.

    >>> hidden_count(0.3, 196), hidden_count(0.5, 49)
    (59, 25)
    """
    return math.floor(ratio * patches + 0.5 + _SLACK)


def hidden_counts(ratios: Tensor, patches: int) -> Tensor:
    """Apply the rounding rule to a tensor of ratios; returns int64 of the same shape."""
    return torch.floor(ratios * patches + 0.5).long()


def _check_range(value: Uniform | Stratified) -> None:
    name = type(value).__name__
    for end in (value.low, value.high):
        if isinstance(end, bool) or not isinstance(end, (int, float, Schedule)):
            raise ValueError(f"{name}: low and high must be numbers or schedules; got {end!r}.")
    for progress in moments(value.low, value.high):
        low, high = scalar_at(value.low, progress), scalar_at(value.high, progress)
        if not low <= high:
            raise ValueError(
                f"{name}: low must not exceed high, but at progress {progress:g} low is {low!r} "
                f"and high is {high!r}."
            )


def check_pair(owner: str, name: str, value: object, kind: type = float) -> tuple[Any, Any]:
    """Return two numbers as a tuple, whatever sequence they came in, or refuse what is none."""
    numbers = (int,) if kind is int else (int, float)
    if not isinstance(value, (tuple, list)) or len(value) != 2 or not all(
        isinstance(end, numbers) and not isinstance(end, bool) for end in value
    ):  # fmt: skip
        what = "ints" if kind is int else "numbers"
        raise ValueError(f"{owner}: {name} must be two {what}, (a, b); got {value!r}.")
    return kind(value[0]), kind(value[1])
