"""Means over seeds, differences pair by pair, and what may be claimed of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

Verdict = Literal["better", "worse", "not distinguishable", "cannot be said"]


class Interval(NamedTuple):
    """A mean with its confidence interval.

    Attributes:
        mean: of the values.
        low: lower end; None with fewer than two values.
        high: upper end; None likewise.
    """

    mean: float
    low: float | None
    high: float | None

    @property
    def half(self) -> float | None:
        """Half its width."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Return the mean of independent runs and Student's t interval around it.

    >>> mean_interval([0.61, 0.63, 0.65])
    Interval(mean=0.63, low=0.5803..., high=0.6796...)

    Args:
        values: one per seed.
        confidence: of the interval, in (0, 1).

    Raises:
        ValueError: no values, or NaN among them.
    """
    from scipy import stats

    found = _checked(values)
    mean = float(found.mean())
    if len(found) < 2:
        return Interval(mean, None, None)
    error = float(found.std(ddof=1)) / math.sqrt(len(found))
    half = float(stats.t.ppf((1 + confidence) / 2, len(found) - 1)) * error
    return Interval(mean, mean - half, mean + half)


def paired_p(differences: Sequence[float]) -> float | None:
    """Return the two-sided p of a paired t test: could the mean difference be zero?

    >>> round(paired_p([0.02, 0.03, 0.01]), 4)
    0.0742

    Args:
        differences: of the two runs of each seed.

    Returns:
        None where the test has nothing to go by: fewer than two pairs, or differences that are
        all the same, whose spread it would take for zero.

    Raises:
        ValueError: no differences, or NaN among them.
    """
    from scipy import stats

    found = _checked(differences)
    # Equal to rounding: accuracies are multiples of 1 / images, and so are their differences.
    if len(found) < 2 or float(np.ptp(found)) <= 1e-9 * max(1.0, float(np.abs(found).max())):
        return None
    return float(stats.ttest_1samp(found, 0.0).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p values of several tests, so that one false claim among all is as rare as of one.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]

    Holm, 1979: the smallest is multiplied by the number of tests, the next by one less, and so on;
    none falls below one before it. It assumes nothing of how the tests depend on each other.

    Args:
        p_values: in [0, 1].

    Returns:
        The corrected ones, in the same order.
    """
    corrected = [0.0] * len(p_values)
    least = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = least
    return corrected


@dataclass(frozen=True)
class Difference:
    """A policy against the baseline in one measure.

    Attributes:
        policy: its name.
        measure: its name.
        values: of each seed that both have, policy minus baseline.
        seeds: those seeds.
        interval: of their mean.
        p: of the paired t test; None where it has nothing to go by.
        corrected: p after Holm's correction over all claims of the study; None where the measure is
            not among them.
        verdict: of a claim; None where nothing is claimed.
    """

    policy: str
    measure: str
    values: tuple[float, ...]
    seeds: tuple[int, ...]
    interval: Interval
    p: float | None
    corrected: float | None = None
    verdict: Verdict | None = None


def judge(p: float | None, mean: float, *, higher_is_better: bool, level: float) -> Verdict:
    """Return what may be said: a difference that a test does not confirm is not claimed.

    >>> judge(0.01, -0.2, higher_is_better=True, level=0.05)
    'worse'
    """
    if p is None or p > level or mean == 0:
        return "not distinguishable"
    return "better" if (mean > 0) == higher_is_better else "worse"


def _checked(values: Sequence[float]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    found = np.asarray(values, dtype=np.float64)
    if not len(found):
        raise ValueError("a mean needs at least one value; got none.")
    if not np.isfinite(found).all():
        raise ValueError(f"values must be finite; got {list(values)}.")
    return found
