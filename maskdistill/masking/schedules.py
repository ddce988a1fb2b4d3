"""Numbers that move with training progress: any parameter of a masker can be one."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, fields
from typing import Any, TypeAlias


def constructor_repr(value: object) -> str:
    """Return the call that builds a dataclass: required fields by position, others if changed.

    >>> constructor_repr(Linear(0.1, 0.5))
    'Linear(0.1, 0.5)'
    """
    arguments = []
    for f in fields(value):  # type: ignore[arg-type]
        now = getattr(value, f.name)
        if f.default is MISSING:
            arguments.append(_repr(now))
        elif now != f.default:
            arguments.append(f"{f.name}={_repr(now)}")
    return f"{type(value).__name__}({', '.join(arguments)})"


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
