"""Means, paired tests and their correction, against SciPy and against definitions."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from maskdistill.comparing.results import holm, judge, mean_interval, paired_p

SHARES = st.floats(0, 1)
P_VALUES = st.lists(st.floats(0, 1), max_size=12)


@given(st.lists(st.tuples(SHARES, SHARES), min_size=3, max_size=8))
def test_the_paired_test_is_scipys(pairs: list[tuple[float, float]]) -> None:
    ours, theirs = zip(*pairs, strict=True)
    found = paired_p([a - b for a, b in pairs])
    if found is None:
        differences = [a - b for a, b in pairs]
        assert max(differences) - min(differences) < 1e-8
    else:
        assert math.isclose(
            found, stats.ttest_rel(ours, theirs).pvalue, rel_tol=1e-6, abs_tol=1e-12
        )


def test_an_interval_by_hand() -> None:
    # t of 2 degrees of freedom at 97.5 %: 4.302653; standard error: 2 / sqrt(3).
    interval = mean_interval([1.0, 3.0, 5.0])
    assert interval.mean == 3.0
    assert interval.half == pytest.approx(4.302653 * 2 / math.sqrt(3), rel=1e-6)
    assert mean_interval([1.0, 3.0, 5.0], 0.5).half < interval.half  # type: ignore[operator]


def test_one_seed_has_no_interval_and_no_test() -> None:
    assert mean_interval([0.5]) == (0.5, None, None)
    assert mean_interval([0.5]).half is None
    assert paired_p([0.1]) is None


def test_equal_differences_are_no_certainty() -> None:
    # A t test would take their spread for zero, and p with it.
    assert paired_p([0.02, 0.02, 0.02]) is None
    assert paired_p([0.5 - 0.48, 0.7 - 0.68, 0.62 - 0.6]) is None  # equal to rounding
    assert paired_p([0.0, 0.0]) is None


@pytest.mark.parametrize("values", [[], [0.1, float("nan")], [float("inf")]])
def test_what_cannot_be_averaged_is_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="at least one|finite"):
        mean_interval(values)
    with pytest.raises(ValueError, match="at least one|finite"):
        paired_p(values)


@given(P_VALUES, st.floats(0.001, 0.2))
def test_holm_rejects_what_its_definition_rejects(p_values: list[float], level: float) -> None:
    # Step down: reject while the smallest of those left is at most level / (how many are left).
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    rejected = set()
    for rank, index in enumerate(order):
        if p_values[index] * (len(p_values) - rank) > level:
            break
        rejected.add(index)
    corrected = holm(p_values)
    assert {i for i, p in enumerate(corrected) if p <= level} == rejected


@given(P_VALUES)
def test_holm_lies_between_no_correction_and_bonferronis(p_values: list[float]) -> None:
    for before, after in zip(p_values, holm(p_values), strict=True):
        assert before <= after <= min(1.0, len(p_values) * before) + 1e-12


def test_verdicts() -> None:
    def verdict(p: float | None, mean: float, higher: bool = True) -> str:
        return judge(p, mean, higher_is_better=higher, level=0.05)

    assert verdict(0.01, 0.1) == "better"
    assert verdict(0.01, -0.1) == "worse"
    assert verdict(0.01, -0.1, higher=False) == "better"
    assert verdict(0.06, 0.1) == "not distinguishable"
    assert verdict(None, 0.1) == "not distinguishable"


def test_chance_alone_rarely_makes_a_claim() -> None:
    # 400 studies of 6 tests without any difference: one false claim in at most 5 % of them.
    generator = stats.norm(0, 1)
    draws = generator.rvs(size=(400, 6, 3), random_state=0)
    false = 0
    for study in draws:
        p_values = [paired_p(list(test)) for test in study]
        false += min(holm([1.0 if p is None else p for p in p_values])) <= 0.05
    assert false / 400 < 0.08
    uncorrected = sum(min(paired_p(list(t)) or 1.0 for t in study) <= 0.05 for study in draws)
    assert uncorrected / 400 > 0.15  # what the correction is for
