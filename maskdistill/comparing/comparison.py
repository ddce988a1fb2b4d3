"""A study from its file to its report."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from maskdistill.comparing.report import write_report
from maskdistill.comparing.results import Results, gather
from maskdistill.comparing.running import (
    Outcome,
    StudyInterrupted,
    devices_at_hand,
    run_grid,
)
from maskdistill.comparing.study import Cell, Study


def compare(
    study: Study,
    out: Path | str,
    *,
    study_file: Path | None = None,
    jobs: int | None = None,
    devices: Sequence[str] = (),
    ended: Callable[[Cell, Outcome], None] = lambda cell, outcome: None,
    progress: Callable[[float], None] = lambda done: None,
) -> Results:
    """Run what is not done of a study, and write its report.

    >>> results = compare(read_study("study.toml"), "studies/first")  # doctest: +SKIP
    >>> [claim.verdict for claim in results.claims]  # doctest: +SKIP
    ['not distinguishable', 'better']

    Called again it goes on where it stopped, skips what is done, and does what was added to the
    study. Each run is a process of its own, with its folder in ``out/runs``. Then ``out`` has
    ``report.html``, ``results.json``, ``runs.csv`` and ``differences.csv``; also when a signal
    stopped it or a run failed, of the runs that are done.

    Args:
        study: to run.
        out: its folder.
        study_file: the Python file that defines classes of the study, if any.
        jobs: runs at a time; None is one on each GPU, and on a CPU one per core, at most 4.
        devices: to use, such as ``["cuda:0", "cuda:1"]``; none are all GPUs, or the CPU.
        ended: called when a run has ended, or was done before.
        progress: called twice a second with the number of runs that are done, parts included.

    Raises:
        ValueError: runs in ``out`` were begun with other settings, or torchrun started this;
            nothing has been run.
        StudyInterrupted: SIGINT or SIGTERM came; all runs are saved.
        FileNotFoundError: the data are not there.
        OSError: a folder that cannot be written.
    """
    out = Path(out)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "a study starts its runs itself, one on each device: start it without torchrun. On "
            "several machines that share the folder, run the same command on each."
        )
    data = study.settings.get("data")
    if data is not None and not Path(data).exists():
        raise FileNotFoundError(
            f"the study's data are not in {data}. A path in a study file is relative to that file."
        )
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out} is a file, and a study needs a folder. Choose another.")
    slots = devices_at_hand(jobs, devices)
    try:
        outcomes = run_grid(
            study, out, study_file=study_file, devices=slots, ended=ended, progress=progress
        )
    except StudyInterrupted:
        report(gather(study, out))
        raise
    results = gather(study, out, outcomes)
    report(results)
    return results


def report(results: Results) -> None:
    """Write what there is of a study: nothing where no run is done."""
    if results.done:
        results.write()
        write_report(results)
