"""How much to hide: numbers, numbers per image, and schedules of training progress."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from numbers import Real
from typing import TypeAlias

import torch
from torch import Tensor

Rand: TypeAlias = Callable[..., Tensor]
"""``rand(*shape)`` draws uniform numbers in [0, 1) from the caller's generator, on its device."""


def constructor_repr(value: object) -> str:
    """Return the call that builds a dataclass: required fields by position, others if changed.

    >>> constructor_repr(Uniform(0.1, 0.5))
    'Uniform(0.1, 0.5)'
    """
    arguments = []
    for f in fields(value):  # type: ignore[arg-type]
        now = getattr(value, f.name)
        if f.default is MISSING:
            arguments.append(repr(now))
        elif now != f.default:
            arguments.append(f"{f.name}={now!r}")
    return f"{type(value).__name__}({', '.join(arguments)})"


class Schedule(ABC):
    """A number that moves with training progress, from 0 at the start to 1 at the end.

    A schedule is a function of progress alone, so resuming a run changes nothing.
    """

    start: float
    end: float

    def at(self, progress: float) -> float:
        """Return the value at ``progress`` in [0, 1]."""
        return self.start + (self.end - self.start) * self._shape(progress)

    @abstractmethod
    def _shape(self, progress: float) -> float:
        """Map [0, 1] to [0, 1], monotonically, from 0 to 1."""

    def __repr__(self) -> str:
        return constructor_repr(self)


@dataclass(frozen=True, repr=False)
class Linear(Schedule):
    """Moves in a straight line.

    >>> Linear(0.1, 0.5).at(0.25)
    0.2
    """

    start: float
    end: float

    def __post_init__(self) -> None:
        _check_numbers(self)

    def _shape(self, progress: float) -> float:
        return progress


@dataclass(frozen=True, repr=False)
class Cosine(Schedule):
    """Moves along half a cosine: slowly at both ends, fastest in the middle.

    >>> round(Cosine(0.0, 1.0).at(0.5), 6)
    0.5
    """

    start: float
    end: float

    def __post_init__(self) -> None:
        _check_numbers(self)

    def _shape(self, progress: float) -> float:
        return 0.5 - 0.5 * math.cos(math.pi * progress)


class PerImage(ABC):
    """A number drawn anew for each image of a batch, between ``low`` and ``high``.

    Both ends may be schedules.
    """

    low: Scalar
    high: Scalar

    def sample(self, batch: int, rand: Rand, progress: float = 0.0) -> Tensor:
        """Draw one number per image: ``(batch,)`` floats."""
        low, high = scalar_at(self.low, progress), scalar_at(self.high, progress)
        return low + (high - low) * self._unit(batch, rand)

    @abstractmethod
    def _unit(self, batch: int, rand: Rand) -> Tensor:
        """Draw ``(batch,)`` numbers in [0, 1)."""

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

    def _unit(self, batch: int, rand: Rand) -> Tensor:
        return rand(batch)


@dataclass(frozen=True, repr=False)
class Stratified(PerImage):
    """One uniform draw per image, exactly one from each of B equal strata, in random order.

    The batch's mean hardly varies, which is why DINOv2 draws its ratios so (Oquab et al., 2023).

    >>> Stratified(0.1, 0.5)
    Stratified(0.1, 0.5)
    """

    low: Scalar
    high: Scalar

    def __post_init__(self) -> None:
        _check_range(self)

    def _unit(self, batch: int, rand: Rand) -> Tensor:
        stratum = rand(batch).argsort()
        return (stratum + rand(batch)) / max(batch, 1)


Scalar: TypeAlias = float | Schedule
"""One number at a given progress."""
Ratio: TypeAlias = float | Schedule | PerImage
"""A number, a schedule, or one number per image."""


def scalar_at(value: Scalar, progress: float) -> float:
    """Return the number that ``value`` is at ``progress``."""
    return value.at(progress) if isinstance(value, Schedule) else value


def bounds(value: Ratio) -> tuple[float, float]:
    """Return the least and the greatest number that ``value`` can ever be."""
    ends: tuple[float, ...]
    if isinstance(value, PerImage):
        ends = (*bounds(value.low), *bounds(value.high))
    elif isinstance(value, Schedule):
        ends = (value.start, value.end)
    else:
        ends = (value, value)
    return min(ends), max(ends)


def check_ratio(owner: str, name: str, value: object, *, per_image: bool = True) -> None:
    """Refuse anything but a number in [0, 1] or what yields such numbers."""
    kinds: tuple[type, ...] = (Real, Schedule, PerImage) if per_image else (Real, Schedule)
    if isinstance(value, bool) or not isinstance(value, kinds):
        forms = "a number in [0, 1], Linear or Cosine" + (
            ", Uniform or Stratified" if per_image else ""
        )
        raise ValueError(f"{owner}: {name} must be {forms}; got {value!r}.")
    low, high = bounds(value)  # type: ignore[arg-type]
    if not (low >= 0.0 and high <= 1.0):
        hint = (
            f" If you meant a percentage, write {high / 100:g}."
            if name == "ratio" and 1 < high <= 100 and low >= 0
            else ""
        )
        raise ValueError(f"{owner}: {name} must lie in [0, 1]; got {value!r}.{hint}")


def hidden_count(ratio: float, patches: int) -> int:
    """Return round(ratio * patches), half away from zero: the library's one rounding rule.

    >>> hidden_count(0.3, 196), hidden_count(0.5, 49)
    (59, 25)
    """
    return math.floor(ratio * patches + 0.5)


def hidden_counts(ratios: Tensor, patches: int) -> Tensor:
    """Apply the rounding rule to a tensor of ratios; returns int64 of the same shape."""
    return torch.floor(ratios * patches + 0.5).long()


def _check_numbers(schedule: Linear | Cosine) -> None:
    for name in ("start", "end"):
        value = getattr(schedule, name)
        if isinstance(value, bool) or not isinstance(value, Real) or math.isnan(value):
            raise ValueError(f"{type(schedule).__name__}: {name} must be a number; got {value!r}.")


def _check_range(value: Uniform | Stratified) -> None:
    name = type(value).__name__
    for end in (value.low, value.high):
        if isinstance(end, bool) or not isinstance(end, (Real, Schedule)):
            raise ValueError(
                f"{name}: low and high must be numbers, Linear or Cosine; got {end!r}."
            )
    for progress in (0.0, 1.0):
        low, high = scalar_at(value.low, progress), scalar_at(value.high, progress)
        if not low <= high:
            raise ValueError(
                f"{name}: low must not exceed high, but at progress {progress:g} low is {low!r} "
                f"and high is {high!r}."
            )
