"""How much to hide: a number, a schedule, or a number drawn for each image."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, fields
from numbers import Number
from typing import Any, TypeAlias, overload

import torch
from torch import Tensor


def constructor_repr(value: object) -> str:
    """Return the call that builds a dataclass: required fields by position, others if changed.

    >>> constructor_repr(Linear(0.1, 0.5))
    'Linear(0.1, 0.5)'
    """
    return f"{type(value).__name__}{arguments_repr(value)}"


def arguments_repr(value: object, skip: int = 0) -> str:
    """Return the arguments of the call that builds a dataclass, without the first ``skip``."""
    arguments = []
    for f in fields(value)[skip:]:  # type: ignore[arg-type]
        now = getattr(value, f.name)
        if f.default is MISSING:
            arguments.append(_repr(now))
        elif now != f.default:
            arguments.append(f"{f.name}={_repr(now)}")
    return f"({', '.join(arguments)})"


def _repr(value: object) -> str:
    """Show a field: NumPy's floats as floats, and a function or module by its name alone."""
    if isinstance(value, float):
        return repr(float(value))
    if callable(value) and not type(value).__module__.startswith("maskdistill.masking"):
        return f"<{getattr(value, '__qualname__', type(value).__qualname__)}>"
    return repr(value)


class Schedule(ABC):
    """A number that moves with training progress, from 0 at the start to 1 at the end.

    A schedule is a function of progress alone, so resuming a run changes nothing.
    """

    @abstractmethod
    def at(self, progress: float) -> float:
        """Return the value at ``progress`` in [0, 1]."""

    @abstractmethod
    def bounds(self) -> tuple[float, float]:
        """Return the least and the greatest value over all progress, or an interval around them."""

    def knots(self) -> tuple[float, ...]:
        """Return the points of progress between which the schedule is smooth, ascending."""
        return (0.0, 1.0)

    def __repr__(self) -> str:
        return constructor_repr(self)


class _Ramp(Schedule):
    """Moves monotonically from ``start`` to ``end``."""

    start: float
    end: float

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            _check_number(type(self).__name__, name, getattr(self, name), finite=True)

    def at(self, progress: float) -> float:
        """Return the value at ``progress`` in [0, 1]."""
        return self.start + (self.end - self.start) * self._shape(progress)

    def bounds(self) -> tuple[float, float]:
        """Return the smaller and the greater end."""
        return min(self.start, self.end), max(self.start, self.end)

    @abstractmethod
    def _shape(self, progress: float) -> float:
        """Map [0, 1] to [0, 1], monotonically, from 0 to 1."""


@dataclass(frozen=True, repr=False)
class Linear(_Ramp):
    """Moves in a straight line.

    >>> Linear(0.1, 0.5).at(0.25)
    0.2
    """

    start: float
    end: float

    def _shape(self, progress: float) -> float:
        return progress


@dataclass(frozen=True, repr=False)
class Cosine(_Ramp):
    """Moves along half a cosine: slowly at both ends, fastest in the middle.

    >>> round(Cosine(0.0, 1.0).at(0.5), 6)
    0.5
    """

    start: float
    end: float

    def _shape(self, progress: float) -> float:
        return 0.5 - 0.5 * math.cos(math.pi * progress)


@dataclass(frozen=True, repr=False)
class Quadratic(_Ramp):
    """Moves with the square of progress: slowly first, fastest at the end.

    >>> Quadratic(0.0, 1.0).at(0.5)
    0.25

    SemMAE's curriculum from parts to wholes (Li et al., 2022) moves so.
    """

    start: float
    end: float

    def _shape(self, progress: float) -> float:
        return progress * progress


@dataclass(frozen=True, repr=False)
class Steps(Schedule):
    """Holds one value after another.

    >>> steps = Steps((0.0, 0.3, 0.5), (0.1, 0.8))
    >>> steps.at(0.05), steps.at(0.1), steps.at(0.79), steps.at(1.0)
    (0.0, 0.3, 0.3, 0.5)

    Args:
        values: the values, in order.
        starts: the progress at which each value but the first begins, ascending in (0, 1).

    Raises:
        ValueError: not one value more than there are starts, or starts out of order.
    """

    values: tuple[float, ...]
    starts: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("values", "starts"):
            object.__setattr__(self, name, _numbers("Steps", name, getattr(self, name)))
        if len(self.values) != len(self.starts) + 1:
            raise ValueError(
                f"Steps: values must be one more than starts, for the first holds from 0; got "
                f"{len(self.values)} values and {len(self.starts)} starts."
            )
        if list(self.starts) != sorted(set(self.starts)) or not all(0 < s < 1 for s in self.starts):
            raise ValueError(f"Steps: starts must ascend within (0, 1); got {self.starts!r}.")

    def at(self, progress: float) -> float:
        """Return the value that holds at ``progress`` in [0, 1]."""
        return self.values[sum(progress >= start for start in self.starts)]

    def bounds(self) -> tuple[float, float]:
        """Return the least and the greatest value."""
        return min(self.values), max(self.values)

    def knots(self) -> tuple[float, ...]:
        """Return the start of each value, and the end."""
        return (0.0, *self.starts, 1.0)


@dataclass(frozen=True, repr=False)
class WarmUp(Schedule):
    """Rises from ``start`` in a straight line, and follows ``value`` from ``until`` on.

    >>> warm = WarmUp(0.5, until=0.2)
    >>> warm.at(0.0), warm.at(0.1), warm.at(0.2), warm.at(1.0)
    (0.0, 0.25, 0.5, 0.5)

    Args:
        value: a number, or a schedule of the whole progress.
        until: progress at which the warm-up ends, in (0, 1].
        start: value at the beginning.
    """

    value: Scalar
    until: float
    start: float = 0.0

    def __post_init__(self) -> None:
        check_scalar("WarmUp", "value", self.value)
        _check_number("WarmUp", "start", self.start, finite=True)
        _check_number("WarmUp", "until", self.until)
        if not isinstance(self.value, Schedule):
            _check_number("WarmUp", "value", self.value, finite=True)
        if not 0 < self.until <= 1:
            raise ValueError(f"WarmUp: until must lie in (0, 1]; got {self.until!r}.")

    def at(self, progress: float) -> float:
        """Return the value at ``progress`` in [0, 1]."""
        goal = scalar_at(self.value, progress)
        return self.start + (goal - self.start) * min(progress / self.until, 1.0)

    def bounds(self) -> tuple[float, float]:
        """Return an interval around the start and all that the value can be."""
        low, high = (
            self.value.bounds() if isinstance(self.value, Schedule) else (self.value, self.value)
        )
        return min(low, self.start), max(high, self.start)

    def knots(self) -> tuple[float, ...]:
        """Return the end of the warm-up among the value's own knots."""
        inner = self.value.knots() if isinstance(self.value, Schedule) else (0.0, 1.0)
        return tuple(sorted({*inner, self.until}))


Scalar: TypeAlias = float | Schedule
"""One number at a given progress."""


def scalar_at(value: Scalar, progress: float) -> float:
    """Return the number that ``value`` is at ``progress``."""
    return value.at(progress) if isinstance(value, Schedule) else value


def check_scalar(owner: str, name: str, value: object, least: float = -math.inf) -> None:
    """Refuse anything but a number, or a schedule of numbers, from ``least`` on."""
    fine = isinstance(value, (int, float, Schedule)) and not isinstance(value, bool)
    low = value.bounds()[0] if isinstance(value, Schedule) else value
    if not fine or not low >= least:  # type: ignore[operator]  # NaN is refused too
        wanted = "a number" if least == -math.inf else f"a number >= {least:g}"
        raise ValueError(f"{owner}: {name} must be {wanted}, or a schedule; got {value!r}.")


def moments(*values: object) -> list[float]:
    """Return the points of progress at which to check what holds for schedules together."""
    ends = sorted({0.0, 1.0} | {k for v in values if isinstance(v, Schedule) for k in v.knots()})
    return sorted(ends + [(a + b) / 2 for a, b in itertools.pairwise(ends)])


def _check_number(owner: str, name: str, value: object, finite: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
        raise ValueError(f"{owner}: {name} must be a number; got {value!r}.")
    if finite and math.isinf(value):
        raise ValueError(
            f"{owner}: {name} must be finite, for nothing lies between a number and infinity; got "
            f"{value!r}. Steps can jump from one to the other."
        )


def _numbers(owner: str, name: str, values: Any) -> tuple[float, ...]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ValueError(f"{owner}: {name} must be a sequence of numbers; got {values!r}.")
    numbers = tuple(values)
    for value in numbers:
        _check_number(owner, f"each of the {name}", value)
    return numbers


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
