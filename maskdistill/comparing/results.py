"""What the runs of a study found: values, differences and claims; as objects, JSON and CSV."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

import maskdistill
from maskdistill.comparing.one_run import (
    check_unchanged,
    folder_of,
    is_done,
    read_json,
    read_measured,
)
from maskdistill.comparing.running import Outcome
from maskdistill.comparing.study import Cell, Study
from maskdistill.data.writing import write_durably
from maskdistill.evaluation.measures import MEASURES, Measured
from maskdistill.training.logging import read_metrics

# --- Means, tests and verdicts

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

    found = _finite_array(values)
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

    found = _finite_array(differences)
    # Equal to rounding: accuracies are multiples of 1 / images, and so are their differences.
    if len(found) < 2 or float(np.ptp(found)) <= 1e-9 * max(1.0, float(np.abs(found).max())):
        return None
    return float(stats.ttest_1samp(found, 0.0).pvalue)


def _finite_array(values: Sequence[float]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    found = np.asarray(values, dtype=np.float64)
    if not len(found):
        raise ValueError("a mean needs at least one value; got none.")
    if not np.isfinite(found).all():
        raise ValueError(f"values must be finite; got {list(values)}.")
    return found


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
class PairedDifference:
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


# --- The results of a study


@dataclass(frozen=True)
class RunResult:
    """What one run found.

    Attributes:
        cell: which run.
        folder: its own.
        outcome: how it ended.
        measured: of its backbone; None where it is not done.
        random: of the same model with random weights, where that was measured.
        summary: content of its ``summary.json``, empty where it is not done.
        config: its settings, as it wrote them.
        metrics: lines of its ``metrics.jsonl``.
    """

    cell: Cell
    folder: Path
    outcome: Outcome
    measured: Measured | None
    random: Measured | None
    summary: Mapping[str, Any]
    config: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Results:
    """What the runs of a study found.

    Attributes:
        study: that was run.
        out: its folder.
        runs: one for each cell, in the study's order.
    """

    study: Study
    out: Path
    runs: tuple[RunResult, ...]

    @property
    def done(self) -> tuple[RunResult, ...]:
        """The runs that are done."""
        return tuple(run for run in self.runs if run.measured is not None)

    def of(self, policy: str) -> tuple[RunResult, ...]:
        """Return the runs of a policy that are done, by seed."""
        return tuple(run for run in self.done if run.cell.policy == policy)

    def values(self, policy: str, measure: str) -> dict[int, float]:
        """Return what the runs of a policy have of a measure, by seed."""
        found = {run.cell.seed: run.measured for run in self.of(policy)}
        return _by_seed(found, measure)

    def random_values(self, measure: str) -> dict[int, float]:
        """Return what the models with random weights have of a measure, by seed."""
        found = {run.cell.seed: run.random for run in self.done if run.random is not None}
        return _by_seed(found, measure)

    @cached_property
    def measures(self) -> tuple[str, ...]:
        """The measures that any run has: those of the claims first, then in their usual order."""
        there = {name for run in self.done if run.measured for name in run.measured.values}
        claimed = [name for name in self.study.tested if name in there]
        return (*claimed, *(name for name in MEASURES if name in there and name not in claimed))

    def interval(self, policy: str, measure: str) -> Interval | None:
        """Return a policy's mean over seeds and its interval; None where nothing was measured."""
        values = list(self.values(policy, measure).values())
        return mean_interval(values, self.study.confidence) if values else None

    @cached_property
    def differences(self) -> tuple[PairedDifference, ...]:
        """Every policy against the baseline in every measure; claims have a verdict."""
        found = [
            difference
            for measure in self.measures
            for policy in self.study.policies
            if policy != self.study.baseline
            and (difference := self._difference(policy, measure)) is not None
        ]
        tested = [d for d in found if d.measure in self.study.tested]
        # All planned tests count: what cannot be tested must not make the others' claims easier.
        p_values = [1.0 if d.p is None else d.p for d in tested]
        corrected = holm([*p_values, *[1.0] * (self.tests - len(tested))])
        claims = {
            (d.policy, d.measure): dataclasses.replace(d, corrected=p, verdict=self._verdict(d, p))
            for d, p in zip(tested, corrected, strict=False)
        }
        return tuple(claims.get((d.policy, d.measure), d) for d in found)

    def _verdict(self, difference: PairedDifference, corrected: float) -> Verdict:
        if len(difference.seeds) < 2:
            return "cannot be said"
        return judge(
            None if difference.p is None else corrected,
            difference.interval.mean,
            higher_is_better=MEASURES[difference.measure].better == "higher",
            level=1 - self.study.confidence,
        )

    @property
    def tests(self) -> int:
        """The number of tests that the study planned, for which p values are corrected."""
        return len(self.study.tested) * (len(self.study.policies) - 1)

    @property
    def unanswered(self) -> tuple[tuple[str, str, str], ...]:
        """Policy, measure and reason of each claim that no pair of runs could answer."""
        answered = {(claim.policy, claim.measure) for claim in self.claims}
        return tuple(
            (policy, measure, self._why_not(policy, measure))
            for measure in self.study.tested
            for policy in self.study.policies
            if policy != self.study.baseline and (policy, measure) not in answered
        )

    def _why_not(self, policy: str, measure: str) -> str:
        for name in (policy, str(self.study.baseline)):
            if not self.of(name):
                return f"no run of {name} is done."
            for run in self.of(name):
                skipped = {} if run.measured is None else run.measured.skipped
                if why := skipped.get(measure, skipped.get(MEASURES[measure].group)):
                    return why
        return "no seed has it of both."

    @property
    def claims(self) -> tuple[PairedDifference, ...]:
        """The differences that are tested."""
        return tuple(d for d in self.differences if d.verdict is not None)

    def _difference(self, policy: str, measure: str) -> PairedDifference | None:
        ours, theirs = self.values(policy, measure), self.values(str(self.study.baseline), measure)
        seeds = tuple(seed for seed in ours if seed in theirs)
        if not seeds:
            return None
        values = tuple(ours[seed] - theirs[seed] for seed in seeds)
        interval = mean_interval(values, self.study.confidence)
        return PairedDifference(policy, measure, values, seeds, interval, paired_p(values))

    def plain(self) -> dict[str, Any]:
        """Return all of it as JSON knows it."""
        return {
            "study": self.study.plain(),
            "versions": versions(),
            "policies": {name: repr(self.study.policy(name)) for name in self.study.policies},
            "runs": [_plain_run(run) for run in self.runs],
            "means": {
                policy: {
                    measure: None if (found := self.interval(policy, measure)) is None
                    else found._asdict()
                    for measure in self.measures
                }
                for policy in self.study.policies
            },
            "differences": [
                {**dataclasses.asdict(d), "interval": d.interval._asdict()}
                for d in self.differences
            ],
            "sentences": [" ".join(words) for words in sentences(self)],
        }  # fmt: skip

    def write(self) -> None:
        """Write ``results.json``, ``runs.csv`` and ``differences.csv`` into the study's folder."""
        text = json.dumps(self.plain(), indent=1, allow_nan=False)
        write_durably(text + "\n", self.out / "results.json")
        runs: list[list[Any]] = [
            ["policy", "seed", "state", "images_per_second", "training_seconds", *self.measures]
        ]
        for run in self.runs:
            values = {} if run.measured is None else run.measured.values
            speed = [run.summary.get(n, "") for n in ("images_per_second", "training_seconds")]
            runs.append(
                [run.cell.policy, run.cell.seed, run.outcome.state, *speed,
                 *(values.get(name, "") for name in self.measures)]
            )  # fmt: skip
        write_durably(_csv(runs), self.out / "runs.csv")
        head = ["policy", "baseline", "measure", "mean", "low", "high", "p", "corrected_p",
                "verdict", "seeds"]  # fmt: skip
        rows = [
            [d.policy, self.study.baseline, d.measure, *d.interval, d.p, d.corrected, d.verdict,
             " ".join(map(str, d.seeds))]
            for d in self.differences
        ]  # fmt: skip
        write_durably(_csv([head, *rows]), self.out / "differences.csv")


def gather(study: Study, out: Path, outcomes: Mapping[Cell, Outcome] | None = None) -> Results:
    """Read what the runs of a study wrote.

    Args:
        study: whose runs to read.
        out: its folder.
        outcomes: how they ended; None says so of those that are there.

    Raises:
        ValueError: runs in ``out`` were made with other settings.
    """
    check_unchanged(study, out)
    runs = [
        _run_result(study, cell, folder_of(out, cell), outcomes or {}) for cell in study.cells()
    ]
    return Results(study, out, tuple(runs))


def _run_result(
    study: Study, cell: Cell, folder: Path, outcomes: Mapping[Cell, Outcome]
) -> RunResult:
    done = is_done(study, cell, folder)
    there = Outcome("done") if done else Outcome("missing", "not run to its end")
    found = read_measured(folder) if done else {}

    def measured(name: str) -> Measured | None:
        """Return what the study asks for, without groups that were measured beyond."""
        if name not in found:
            return None
        of = Measured.from_json(found[name])
        asked = {n: v for n, v in of.values.items() if MEASURES[n].group in study.measures}
        return dataclasses.replace(of, values=asked)

    return RunResult(
        cell,
        folder,
        outcomes.get(cell, there),
        measured("policy"),
        measured("random"),
        read_json(folder / "summary.json") if done else {},
        read_json(folder / "config.json"),
        read_metrics(folder / "metrics.jsonl"),
    )


# --- Words and numbers for people


def shown(value: float, measure: str, *, signed: bool = False, unit: bool = True) -> str:
    """Write a value of a measure as people read it: shares in per cent.

    >>> shown(0.634, "knn_20"), shown(-0.012, "knn_20", signed=True)
    ('63.4 %', '−1.2 %')

    Args:
        value: of the measure, or a difference of two.
        measure: its name.
        signed: write a plus too.
        unit: write the unit.
    """
    of = MEASURES[measure]
    text = of.shown(value)
    if float(text) == 0:
        text = text.lstrip("-")
    elif signed and value > 0:
        text = f"+{text}"
    text = text.replace("-", "\u2212")  # the sign that is as wide as the plus
    return f"{text} {of.unit}".rstrip() if unit else text


def sentences(results: Results) -> list[tuple[str, str, str]]:
    """Return a sentence per claim, in three parts: the verdict, of what, and the numbers."""
    baseline = results.study.baseline
    return [claim_words(results, claim) for claim in results.claims] + [
        ("Cannot be said:", f"{policy} against {baseline} in {MEASURES[measure].title}.",
         f"{why[:1].upper()}{why[1:]}")
        for policy, measure, why in results.unanswered
    ]  # fmt: skip


def claim_words(results: Results, claim: PairedDifference) -> tuple[str, str, str]:
    """Return what a claim's test found: the verdict, of what, and the numbers."""
    study, n = results.study, len(claim.seeds)
    of = f"{claim.policy} against {study.baseline} in {MEASURES[claim.measure].title}."
    mean = shown_difference(claim.interval.mean, claim.measure)
    low, high = claim.interval.low, claim.interval.high
    if low is None or high is None:
        why = "with one seed, which says nothing about chance; two are the least."
        return "Cannot be said:", of, f"{mean} {why}"
    if claim.p is None or claim.corrected is None:
        why = "in all seeds alike, so a t test has nothing to go by."
        return f"Not distinguishable with {n} seeds:", of, f"{mean} {why}"
    ends = " to ".join(shown(end, claim.measure, signed=True, unit=False) for end in (low, high))
    numbers = f"{mean} on average over {n} seeds; p = {p_shown(claim.p)}"
    if results.tests > 1:
        numbers += f", and {p_shown(claim.corrected)} corrected for {results.tests} tests"
    numbers += f". {100 * study.confidence:.3g} % interval of this test alone: {ends}."
    if claim.verdict != "not distinguishable":
        return f"{str(claim.verdict).capitalize()}:", of, numbers
    edge = shown_difference(max(abs(low), abs(high)), claim.measure, signed=False)
    numbers += f" By that a true difference of up to {edge} remains possible."
    return f"Not distinguishable with {n} seeds:", of, numbers


def shown_difference(value: float, measure: str, *, signed: bool = True) -> str:
    """Write a difference: of shares, in points."""
    text = shown(value, measure, signed=signed, unit=False)
    unit = "points" if MEASURES[measure].unit == "%" else MEASURES[measure].unit
    return f"{text} {unit}".rstrip()


def p_shown(p: float) -> str:
    """Write a p value as people read it."""
    return "< 0.001" if p < 0.001 else f"{p:.2g}" if p < 0.1 else f"{p:.2f}"


# --- Forms on disk


def versions() -> dict[str, str]:
    """Return the versions that results depend on."""
    return {
        "maskdistill": maskdistill.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _plain_run(run: RunResult) -> dict[str, Any]:
    speed = ("images_per_second", "training_seconds", "steps", "device")
    return {
        "policy": run.cell.policy,
        "seed": run.cell.seed,
        "folder": run.folder.name,
        "state": run.outcome.state,
        "message": run.outcome.message,
        "measured": None if run.measured is None else _null_if_not_finite(run.measured.to_json()),
        "random": None if run.random is None else _null_if_not_finite(run.random.to_json()),
        **{name: run.summary.get(name) for name in speed},
        "config": dict(run.config),
    }


def _null_if_not_finite(found: Any) -> Any:
    """Put None, which JSON knows, in the place of numbers that are not finite."""
    if isinstance(found, dict):
        return {name: _null_if_not_finite(value) for name, value in found.items()}
    if isinstance(found, list):
        return [_null_if_not_finite(value) for value in found]
    return None if isinstance(found, float) and not math.isfinite(found) else found


def _by_seed(found: Mapping[int, Measured | None], measure: str) -> dict[int, float]:
    values = {s: m.values.get(measure, math.nan) for s, m in found.items() if m is not None}
    return {seed: value for seed, value in values.items() if math.isfinite(value)}


def _csv(rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
