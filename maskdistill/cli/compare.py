"""``maskdistill compare``: policies x seeds on one data set, and a report to read."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from maskdistill.comparing import Cell, Outcome, Results, Study


def compare(
    study: Path | None = None,
    /,
    out: Path | None = None,
    jobs: int | None = None,
    devices: tuple[str, ...] = (),
    report_only: bool = False,
    dry_run: bool = False,
    template: bool = False,
    json: bool = False,
) -> int:
    """Run a study, policies x seeds on one data set, and write a report that reads by itself.

    maskdistill compare study.toml --out studies/first

    Without a file it runs the study on the built-in scenes: three policies, three seeds. Called
    again it goes on where it stopped, skips what is done, and adds what was added. The folder then
    holds report.html, results.json, runs.csv, differences.csv, and each run in runs/.

    Args:
        study: a .toml file, or a .py file that assigns study = Study(...); before the options.
        out: folder of the study. Without it: studies/NAME, after the file.
        jobs: runs at a time. Without it: one on each GPU; on a CPU one per core, at most 4.
        devices: to use, such as cuda:0 cuda:1. Without it: all GPUs, or the CPU.
        report_only: run nothing; write the report of what is there.
        dry_run: check the study and say what would run.
        template: print a study to start from, and do nothing else.
        json: print the results as JSON in the end.

    Returns:
        0; 1 where a run failed or is not done; 130 or 143 where a signal stopped it.
    """
    from maskdistill.comparing import StudyInterrupted
    from maskdistill.comparing.study import TEMPLATE, read_study

    if template:
        print(TEMPLATE.read_text(encoding="utf-8"), end="")
        return 0
    path = TEMPLATE if study is None else study
    for name in devices:
        if not re.fullmatch(r"cpu|(cuda|xpu|mps)(:\d+)?", name):
            raise ValueError(
                f"{name} is no device, such as cuda:0 or cpu. The study's file goes before the "
                "options."
            )
    read = read_study(path)
    out = Path("studies") / path.stem if out is None else out
    if dry_run:
        return _plan(read, out)
    try:
        results = _report(read, out) if report_only else _run(read, out, path, jobs, devices)
    except StudyInterrupted as error:
        print(f"\nstopped: {error} Go on with the same command.", file=sys.stderr)
        return error.exit_code
    _say(results, json)
    return 0 if len(results.done) == len(results.runs) else 1


def _plan(study: Study, out: Path) -> int:
    """Check a study and say what would run."""
    from maskdistill.comparing.one_run import check_unchanged, data_identity, folder_of, is_done
    from maskdistill.policies import ViewPolicy

    check_unchanged(study, out, data_identity(study))
    for name in study.policies:
        print(f"{name}\n{ViewPolicy.__str__(study.policy(name))}\n")
    for cell in study.cells():
        done = is_done(study, cell, folder_of(out, cell))
        print(f"{'done' if done else 'to run':6}  {cell.name}")
    return 0


def _report(study: Study, out: Path) -> Results:
    """Write the report of the runs that are done."""
    from maskdistill.comparing import gather
    from maskdistill.comparing.report import report

    results = gather(study, out)
    if not results.done:
        raise ValueError(f"no run of the study is done in {out}, so there is no report yet.")
    report(results)
    return results


def _run(
    study: Study, out: Path, path: Path, jobs: int | None, devices: tuple[str, ...]
) -> Results:
    """Run a study under a bar over its runs."""
    from tqdm import tqdm

    from maskdistill import comparing

    cells = study.cells()
    print(f"{study.question}\n{len(cells)} runs in {out}", file=sys.stderr)
    with tqdm(
        total=len(cells), unit="run", disable=None, dynamic_ncols=True,
        bar_format="{l_bar}{bar}| {n:.1f}/{total} runs [{elapsed}<{remaining}]",
    ) as bar:  # fmt: skip

        def ended(cell: Cell, outcome: Outcome) -> None:
            seconds = outcome.seconds
            took = f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
            took = f" in {took}" if seconds else ""
            why = f": {outcome.message}" if outcome.message else ""
            tqdm.write(f"{cell.name}: {outcome.state}{took}{why}", file=sys.stderr)

        def progress(done: float) -> None:
            bar.n = done
            bar.refresh()

        return comparing.compare(
            study,
            out,
            study_file=path if path.suffix == ".py" else None,
            jobs=jobs,
            devices=devices,
            ended=ended,
            progress=progress,
        )


def _say(results: Results, as_json: bool) -> None:
    """Print what was found, and what failed."""
    for run in results.runs:
        if run.measured is None:
            print(f"{run.cell.name} is not done: {run.outcome.message}", file=sys.stderr)
    if not results.done:
        print("no run is done, so there is no report.", file=sys.stderr)
        return
    found = results.plain()
    if as_json:
        print(json.dumps(found, allow_nan=False))
        return
    for sentence in found["sentences"]:
        print(sentence)
    print(f"\nreport: {results.out / 'report.html'}")
