"""What the parameters of a masker may be: declared beside its fields, checked by the base class.

A constraint is called with the masker's name, the parameter's name and its value; it returns the
value as it is kept, or raises a ValueError that says what was wanted and what came.
"""

from __future__ import annotations

import keyword
import math
from collections.abc import Callable
from typing import Any, TypeAlias

from maskdistill.masking.ratios import check_ratio, check_scalar

Constraint: TypeAlias = Callable[[str, str, Any], Any]


def ratio(owner: str, name: str, value: Any) -> Any:
    """A share in [0, 1]: a number, a schedule, or one drawn per image."""
    check_ratio(owner, name, value)
    return value


def share(owner: str, name: str, value: Any) -> Any:
    """A share in [0, 1]: a number or a schedule."""
    check_ratio(owner, name, value, per_image=False)
    return value


def fixed_share(owner: str, name: str, value: Any) -> Any:
    """A share in [0, 1] that is one number."""
    check_ratio(owner, name, value, per_image=False, schedules=False)
    return value


def scalar(least: float) -> Constraint:
    """Return the constraint of a number, or a schedule of numbers, from ``least`` on."""

    def check(owner: str, name: str, value: Any) -> Any:
        check_scalar(owner, name, value, least)
        return value

    return check


def number(owner: str, name: str, value: Any) -> Any:
    """One number, no schedule."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{owner}: {name} must be a number; got {value!r}.")
    return value


def whole(least: int) -> Constraint:
    """Return the constraint of an int from ``least`` on."""

    def check(owner: str, name: str, value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{owner}: {name} must be an int >= {least}; got {value!r}.")
        return value

    return check


def one_of(*choices: str) -> Constraint:
    """Return the constraint of one of some words."""

    def check(owner: str, name: str, value: Any) -> Any:
        if value not in choices:
            words = ", ".join(map(repr, choices[:-1])) + f" or {choices[-1]!r}"
            raise ValueError(f"{owner}: {name} must be {words}; got {value!r}.")
        return value

    return check


def interval(most: float = math.inf) -> Constraint:
    """Return the constraint of two finite numbers (low, high), 0 < low <= high <= ``most``."""

    def check(owner: str, name: str, value: Any) -> Any:
        low, high = pair(owner, name, value)
        if not 0 < low <= high <= most or math.isinf(high):
            end = f" <= {most:g}" if most < math.inf else ""
            raise ValueError(
                f"{owner}: {name} must be (low, high) with 0 < low <= high{end}; got {value!r}."
            )
        return low, high

    return check


def sides(owner: str, name: str, value: Any) -> tuple[int, int]:
    """Rows and columns, two ints from 1 on."""
    rows, columns = pair(owner, name, value, int)
    if min(rows, columns) < 1:
        raise ValueError(f"{owner}: {name} must be two ints >= 1; got {value!r}.")
    return rows, columns


def pair(owner: str, name: str, value: Any, kind: type = float) -> tuple[Any, Any]:
    """Two numbers, in whatever sequence they came."""
    numbers = (int,) if kind is int else (int, float)
    if not isinstance(value, (tuple, list)) or len(value) != 2 or not all(
        isinstance(end, numbers) and not isinstance(end, bool) for end in value
    ):  # fmt: skip
        what = "ints" if kind is int else "numbers"
        raise ValueError(f"{owner}: {name} must be two {what}, (a, b); got {value!r}.")
    return kind(value[0]), kind(value[1])


def optional(constraint: Constraint) -> Constraint:
    """Return the constraint of None, or of what another one admits."""

    def check(owner: str, name: str, value: Any) -> Any:
        try:
            return None if value is None else constraint(owner, name, value)
        except ValueError as error:
            raise ValueError(str(error).replace(" must be ", " must be None or ", 1)) from None

    return check


_TAKEN = {
    "self", "batch", "grid", "generator", "device", "progress", "views", "memory", "masks", "crops",
    "patch_size", "boxes", "flipped",
}  # fmt: skip


def signal(owner: str, name: str, value: Any) -> Any:
    """The name under which a call gets a signal."""
    if not isinstance(value, str) or not value.isidentifier() or keyword.iskeyword(value):
        raise ValueError(f"{owner}: {name} must be the name of a keyword; got {value!r}.")
    if value in _TAKEN:
        raise ValueError(
            f"{owner}: {name} cannot be called {value!r}, for that is an argument of maskers or "
            "policies already; choose another name."
        )
    return value
