"""Compares policies over seeds: a grid of runs, what they found, and a report to read."""

from maskdistill.comparing.report import compare, write_report
from maskdistill.comparing.results import (
    Interval,
    PairedDifference,
    Results,
    RunResult,
    gather,
    holm,
    mean_interval,
    paired_p,
)
from maskdistill.comparing.running import Outcome, StudyInterrupted
from maskdistill.comparing.study import Cell, Study, read_study

__all__ = [
    "Cell",
    "Interval",
    "Outcome",
    "PairedDifference",
    "Results",
    "RunResult",
    "Study",
    "StudyInterrupted",
    "compare",
    "gather",
    "holm",
    "mean_interval",
    "paired_p",
    "read_study",
    "write_report",
]
