"""Compares policies over seeds: a grid of runs, what they found, and a report to read."""

from maskdistill.comparing.comparison import compare
from maskdistill.comparing.report import write_report
from maskdistill.comparing.results import Results, RunResult, gather
from maskdistill.comparing.running import Outcome, StudyInterrupted
from maskdistill.comparing.statistics import (
    Difference,
    Interval,
    holm,
    mean_interval,
    paired_p,
)
from maskdistill.comparing.study import Cell, Study
from maskdistill.comparing.study_files import read_study

__all__ = [
    "Cell",
    "Difference",
    "Interval",
    "Outcome",
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
