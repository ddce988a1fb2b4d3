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
from typing import Any

import torch

import maskdistill
from maskdistill.comparing.one_run import read_measured
from maskdistill.comparing.running import Outcome, folder_of
from maskdistill.comparing.statistics import (
    Difference,
    Interval,
    holm,
    judge,
    mean_interval,
    paired_p,
)
from maskdistill.comparing.study import Cell, Study
from maskdistill.measures import MEASURES, Measured
from maskdistill.training.checkpoint import write_durably
from maskdistill.training.records import read_metrics


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
        return _finite(found, measure)

    def random_values(self, measure: str) -> dict[int, float]:
        """Return what the models with random weights have of a measure, by seed."""
        found = {run.cell.seed: run.random for run in self.done if run.random is not None}
        return _finite(found, measure)

    @cached_property
    def measures(self) -> tuple[str, ...]:
        """The measures that any run has: those of the claims first, then in their usual order."""
        there = {name for run in self.done if run.measured for name in run.measured.values}
        claimed = [name for name in self.study.claims if name in there]
        return (*claimed, *(name for name in MEASURES if name in there and name not in claimed))

    def interval(self, policy: str, measure: str) -> Interval | None:
        """Return a policy's mean over seeds and its interval; None where nothing was measured."""
        values = list(self.values(policy, measure).values())
        return mean_interval(values, self.study.confidence) if values else None

    @cached_property
    def differences(self) -> tuple[Difference, ...]:
        """Every policy against the baseline in every measure; claims have a verdict."""
        found = [
            difference
            for measure in self.measures
            for policy in self.study.policies
            if policy != self.study.baseline
            and (difference := self._difference(policy, measure)) is not None
        ]
        tested = [d for d in found if d.measure in self.study.claims]
        # What cannot be tested counts as a test all the same: it was to be one.
        corrected = holm([1.0 if d.p is None else d.p for d in tested])
        by_claim = {id(d): p for d, p in zip(tested, corrected, strict=True)}
        return tuple(
            dataclasses.replace(
                d,
                corrected=by_claim[id(d)],
                verdict=judge(
                    None if d.p is None else by_claim[id(d)],
                    d.interval.mean,
                    higher_is_better=MEASURES[d.measure].better == "higher",
                    level=1 - self.study.confidence,
                ),
            )
            if id(d) in by_claim
            else d
            for d in found
        )

    @property
    def claims(self) -> tuple[Difference, ...]:
        """The differences that are tested."""
        return tuple(d for d in self.differences if d.verdict is not None)

    def _difference(self, policy: str, measure: str) -> Difference | None:
        ours, theirs = self.values(policy, measure), self.values(str(self.study.baseline), measure)
        seeds = tuple(seed for seed in ours if seed in theirs)
        if not seeds:
            return None
        values = tuple(ours[seed] - theirs[seed] for seed in seeds)
        interval = mean_interval(values, self.study.confidence)
        return Difference(policy, measure, values, seeds, interval, paired_p(values))

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
            "sentences": [claim_sentence(self, d) for d in self.claims],
        }  # fmt: skip

    def write(self) -> None:
        """Write ``results.json``, ``runs.csv`` and ``differences.csv`` into the study's folder."""
        write_durably(json.dumps(self.plain(), indent=1) + "\n", self.out / "results.json")
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
    """
    return Results(study, out, tuple(_read(study, out, c, outcomes or {}) for c in study.cells()))


def _read(study: Study, out: Path, cell: Cell, outcomes: Mapping[Cell, Outcome]) -> RunResult:
    folder = folder_of(out, cell)
    measured = read_measured(folder)
    summary = _json(folder / "summary.json")
    groups = set(study.measures)
    there = bool(summary) and groups <= set(measured.get("protocol", {}).get("groups", ()))
    outcome = Outcome("done") if there else Outcome("missing", "not run")
    return RunResult(
        cell,
        folder,
        outcomes.get(cell, outcome),
        _only(Measured.from_json(measured["policy"]), groups) if there else None,
        _only(Measured.from_json(measured["random"]), groups)
        if there and "random" in measured
        else None,
        summary,
        _json(folder / "config.json"),
        read_metrics(folder / "metrics.jsonl"),
    )


def _only(measured: Measured, groups: set[str]) -> Measured:
    """Leave out the groups that an earlier version of the study had measured too."""
    return dataclasses.replace(
        measured,
        values={n: v for n, v in measured.values.items() if MEASURES[n].group in groups},
    )


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
    text = of.shown(value).replace("-", "\u2212")  # the sign that is as wide as the plus
    if signed and value > 0:
        text = f"+{text}"
    return f"{text} {of.unit}".rstrip() if unit else text


def claim_sentence(results: Results, claim: Difference) -> str:
    """Say in a sentence what a claim's test found."""
    verdict, rest, numbers = claim_words(results, claim)
    return f"{verdict}{rest} {numbers}"


def claim_words(results: Results, claim: Difference) -> tuple[str, str, str]:
    """Return what a claim's test found: the verdict, of what, and the numbers."""
    study, n = results.study, len(claim.seeds)
    of = f": {claim.policy} against {study.baseline} in {MEASURES[claim.measure].title}."
    mean = shown_difference(claim.interval.mean, claim.measure)
    low, high = claim.interval.low, claim.interval.high
    if low is None or high is None:
        return (
            "Cannot be said", of,
            f"{mean} with one seed, which says nothing about chance; two are the least.",
        )  # fmt: skip
    ends = " to ".join(shown(end, claim.measure, signed=True, unit=False) for end in (low, high))
    numbers = f"{mean} on average over {n} seeds, {100 * study.confidence:.3g} % interval {ends}"
    if claim.p is None or claim.corrected is None:
        return (
            f"Not distinguishable with {n} seeds", of,
            f"{numbers}. All seeds differ alike, so a t test has nothing to go by.",
        )  # fmt: skip
    numbers += f"; p = {p_shown(claim.p)}"
    if len(results.claims) > 1:
        numbers += f", corrected {p_shown(claim.corrected)}"
    if claim.verdict != "not distinguishable":
        return str(claim.verdict).capitalize(), of, f"{numbers}."
    edge = shown_difference(max(abs(low), abs(high)), claim.measure, signed=False)
    return (
        f"Not distinguishable with {n} seeds", of,
        f"{numbers}. A true difference of up to {edge} remains possible.",
    )  # fmt: skip


def shown_difference(value: float, measure: str, *, signed: bool = True) -> str:
    """Write a difference: of shares, in points."""
    text = shown(value, measure, signed=signed, unit=False)
    unit = "points" if MEASURES[measure].unit == "%" else MEASURES[measure].unit
    return f"{text} {unit}".rstrip()


def p_shown(p: float) -> str:
    """Write a p value as people read it."""
    return "< 0.001" if p < 0.001 else f"{p:.2g}" if p < 0.1 else f"{p:.2f}"


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
        "measured": None if run.measured is None else run.measured.to_json(),
        "random": None if run.random is None else run.random.to_json(),
        **{name: run.summary.get(name) for name in speed},
        "config": dict(run.config),
    }


def _finite(found: Mapping[int, Measured | None], measure: str) -> dict[int, float]:
    values = {s: m.values.get(measure, math.nan) for s, m in found.items() if m is not None}
    return {seed: value for seed, value in values.items() if math.isfinite(value)}


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _csv(rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
