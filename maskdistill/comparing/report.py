"""The report of a study: one page that needs no network, no script and no other file."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from maskdistill import presets
from maskdistill.comparing.pictures import (
    ReportImages,
    colour_scale,
    forest_plot,
    robustness_plots,
    training_plots,
)
from maskdistill.comparing.results import (
    Results,
    RunResult,
    p_shown,
    sentences,
    shown,
    shown_difference,
    versions,
)
from maskdistill.comparing.statistics import Difference, mean_interval
from maskdistill.job_images import open_images
from maskdistill.measures import MEASURES
from maskdistill.plotting import style
from maskdistill.training.checkpoint import write_durably
from maskdistill.views import ViewPolicy

_NOTHING = "\u2013"  # in a cell of a table
_LISTED = 6  # seeds
_TEMPLATE = Path(__file__).with_name("report.html.jinja")
# What says where a run lay or how it was fed is nobody's business, and differs by machine.
_LEFT_OUT = ("out", "resume", "auto_resume", "workers", "views", "data", "shards", "val_shards",
             "device", "wandb")  # fmt: skip


def write_report(results: Results, path: Path | None = None) -> Path:
    """Write the page and return where it is.

    Args:
        results: of the study; at least one run must be done.
        path: of the page; None is ``report.html`` in the study's folder.

    Raises:
        ValueError: no run is done.
    """
    path = results.out / "report.html" if path is None else path
    write_durably(page(results), path)
    return path


def page(results: Results) -> str:
    """Return the report as HTML.

    Raises:
        ValueError: no run is done.
    """
    from jinja2 import Environment, StrictUndefined

    if not results.done:
        raise ValueError("no run of the study is done, so there is nothing to report.")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=False, keep_trailing_newline=True
    )
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(_content(results))


def _content(results: Results) -> dict[str, Any]:
    study = results.study
    pictures, why = _pictures(results)
    attention = None if pictures is None else pictures.attention()
    content: dict[str, Any] = {
        "question": study.question,
        "versions": versions(),
        "facts": _facts(results),
        "no_pictures": why,
        "missing": [
            (run.cell.name, run.outcome.message or run.outcome.state)
            for run in results.runs
            if run.measured is None
        ],
        "claims": _claims(results),
        "how_tested": _how_tested(results),
        "no_claims": _no_claims(results),
        "scenes": not study.real,
        "confidence": f"{100 * study.confidence:.3g} %",
        "level": f"{1 - study.confidence:.2g}",
        "tests": results.tests,
        "seeds": ", ".join(map(str, study.seeds)) if 1 < len(study.seeds) <= _LISTED else "",
        "baseline": study.baseline,
        "policies": [_policy(results, name) for name in study.policies if results.of(name)],
        "random": any(run.random is not None for run in results.done),
        "line_colours": _line_colours(results),
        "table": _table(results),
        "skipped": _skipped(results),
        "differences": [_difference(claim) for claim in results.claims],
        "forest": forest_plot(results),
        "curves": training_plots(results),
        "losses": len(study.policies) > 1,
        "robustness": robustness_plots(results),
        "attention": pictures and attention and {
            "seed": pictures.seed,
            "rows": attention[0],
            "outlined": attention[1],
            "scale": colour_scale(),
        },
        "gallery": pictures and _gallery(results, pictures),
        "costs": _costs(results),
        "cost_note": _cost_note(results),
        "study_toml": study_toml(results),
        "in_python": any(isinstance(own, ViewPolicy) for own in study.policies.values()),
        "shared_settings": _shared_settings(results.done),
        "runs": [_run(run) for run in results.runs],
    }  # fmt: skip
    titles = {
        "answer": "In short", "table": "All measures", "differences": "Differences",
        "curves": "Training", "robustness": "Robustness", "attention": "Attention",
        "gallery": "Masks", "costs": "Costs", "runs": "Configuration",
    }  # fmt: skip
    anchors = {"gallery": "masks", "runs": "configuration"}
    content["sections"] = [
        (anchors.get(name, name), title)
        for name, title in titles.items()
        if content.get(name, True)
    ] + [("method", "How to read this")]
    return content


def _pictures(results: Results) -> tuple[ReportImages | None, str]:
    """Return what pictures of images are made of, or why there are none."""
    cell = results.done[0].cell
    try:
        images, _ = open_images(results.study.config(cell.policy, cell.seed))
        return ReportImages(results, images), ""
    except (ValueError, OSError) as error:
        return None, f"The images could not be opened where this page was written: {error}"


def _facts(results: Results) -> list[tuple[str, str]]:
    study = results.study
    first = results.done[0]
    config = study.config(first.cell.policy, first.cell.seed)
    assert first.measured is not None
    steps = sorted({run.summary["steps"] for run in results.done})
    source = config.data or config.shards
    data = "built-in scenes" if source is None else str(source).rstrip("/").rpartition("/")[2]
    budget = f"{steps[0]:,} steps" if len(steps) == 1 else f"{steps[0]:,} to {steps[-1]:,} steps"
    devices = sorted({str(run.summary["device"]).partition(":")[0] for run in results.done})
    images = first.measured.images
    return [
        ("policies", str(len(study.policies))),
        ("seeds of each", str(len(study.seeds))),
        ("budget of a run", f"{budget} of {config.batch_size} images"),
        ("data", data),
        ("images that vote", f"{images.get('train', 0):,}"),
        ("images to judge by", f"{images.get('val', 0):,}"),
        ("model", config.model),
        ("image and patch", f"{config.image_size} and {config.patch_size} px"),
        ("device", " and ".join(devices)),
    ]


def _claims(results: Results) -> list[dict[str, str]]:
    kinds = {"Better:": "better", "Worse:": "worse"}
    return [
        {"kind": kinds.get(verdict, "open"), "verdict": verdict, "rest": of, "numbers": numbers}
        for verdict, of, numbers in sentences(results)
    ]


def _how_tested(results: Results) -> str:
    tests, seeds = results.tests, len(results.study.seeds)
    text = "Each sentence is a paired t test over seeds"
    if tests > 1:
        text += f", corrected by Holm's method for all {tests} that the study planned"
    if 1 < seeds < 5:
        text += f". {seeds} seeds can tell large differences alone; five or more are better"
    return f"{text}."


def _no_claims(results: Results) -> str:
    if len(results.study.policies) == 1:
        return "There is one policy, so there is nothing to compare it with."
    return "The study names no claims, so nothing was tested."


def _policy(results: Results, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "colour": _colour(results, name),
        "baseline": name == results.study.baseline,
    }


def _colour(results: Results, name: str) -> str:
    return f"var(--line-{list(results.study.policies).index(name)})"


def _line_colours(results: Results) -> list[tuple[str, str]]:
    """Return the colour of each policy's line in plots, on light pages and on dark ones."""
    with style.light():
        light = [style.series(i)["color"] for i in range(len(results.study.policies))]
    with style.dark():
        dark = [style.series(i)["color"] for i in range(len(results.study.policies))]
    return list(zip(light, dark, strict=True))


def _table(results: Results) -> list[dict[str, Any]]:
    rows = []
    policies = [name for name in results.study.policies if results.of(name)]
    for name in results.measures:
        measure = MEASURES[name]
        columns = [results.values(policy, name) for policy in policies]
        if any(run.random is not None for run in results.done):
            columns.append(results.random_values(name))
        unit = {"%": " (%)", "px": " (px)"}.get(measure.unit, "")
        rows.append(
            {
                "title": measure.title + unit,
                "tested": name in results.study.tested,
                "better": measure.better,
                "href": None,
                "cells": [_cell(results, values, name) for values in columns],
            }
        )
    return rows


def _cell(results: Results, found: Mapping[int, float], name: str) -> dict[str, str]:
    if not found:
        return {"mean": _NOTHING, "seeds": ""}
    interval = mean_interval(list(found.values()), results.study.confidence)
    mean = shown(interval.mean, name, unit=False)
    seeds = results.study.seeds
    each = [shown(found[s], name, unit=False) if s in found else _NOTHING for s in seeds]
    # More would make the table too wide; runs.csv has them.
    listed = ", ".join(each) if 1 < len(seeds) <= _LISTED else ""
    if interval.half is None:
        return {"mean": mean, "seeds": listed}
    digits = len(mean.partition(".")[2])
    half = 100 * interval.half if MEASURES[name].unit == "%" else interval.half
    return {"mean": f"{mean} ± {half:.{digits}f}", "seeds": listed}


def _skipped(results: Results) -> str:
    found: dict[str, str] = {}
    for run in results.done:
        assert run.measured is not None
        found.update(run.measured.skipped)
    return "; ".join(f"{name}: {why}" for name, why in found.items())


def _difference(claim: Difference) -> dict[str, str]:
    low, high = claim.interval.low, claim.interval.high
    mean = shown_difference(claim.interval.mean, claim.measure)
    interval = _NOTHING
    if low is not None and high is not None and claim.p is not None:
        ends = [shown(end, claim.measure, signed=True, unit=False) for end in (low, high)]
        interval = f"{ends[0]} to {ends[1]}"
    return {
        "title": MEASURES[claim.measure].title,
        "policy": claim.policy,
        "mean": mean,
        "interval": interval,
        "p": _NOTHING if claim.p is None else p_shown(claim.p),
        "corrected": _NOTHING if claim.p is None or claim.corrected is None
        else p_shown(claim.corrected),
        "verdict": str(claim.verdict),
    }  # fmt: skip


def _gallery(results: Results, pictures: ReportImages) -> dict[str, Any]:
    policies = []
    for name in pictures.runs:
        columns, rows = pictures.masks(name)
        policies.append(
            {
                "name": name,
                "colour": _colour(results, name),
                "text": ViewPolicy.__str__(results.study.policy(name)),
                "note": _objective_note(results.study.policy(name)),
                "columns": columns,
                "rows": rows,
            }
        )
    return {"policies": policies, "scale": colour_scale(), "draws": "2,000"}


def _objective_note(policy: ViewPolicy) -> str:
    if isinstance(policy, presets.Preset) and policy.objectives != ("dino",):
        return (
            f"{policy.title} has another objective; here its masks were trained with DINO's loss "
            "between class tokens alone."
        )
    return ""


def _costs(results: Results) -> list[dict[str, str]]:
    def speed(policy: str) -> float:
        return float(
            statistics.median(run.summary["images_per_second"] for run in results.of(policy))
        )

    rows = []
    there = [policy for policy in results.study.policies if results.of(policy)]
    baseline = str(results.study.baseline)
    for policy in there:
        seconds = [run.summary["training_seconds"] for run in results.of(policy)]
        # Of a minute or less, other work on the machine decides.
        long = statistics.median(seconds) >= 60
        relative = speed(policy) / speed(baseline) if baseline in there and long else None
        rows.append(
            {
                "policy": policy,
                "speed": f"{speed(policy):,.0f}",
                "relative": _NOTHING if relative is None else f"{relative:.2f}",
                "minutes": f"{statistics.median(seconds) / 60:,.1f}",
                "runs": str(len(seconds)),
            }
        )
    return rows


def _cost_note(results: Results) -> str:
    hours = sum(run.summary["training_seconds"] for run in results.done) / 3600
    total = f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.0f} minutes"
    return (
        f"Medians over seeds; evaluation is left out. Training took {total} in all, summed over "
        "runs. Runs that share a machine slow each other, so take the ratios for rough."
    )


def _shared_settings(runs: Sequence[RunResult]) -> list[tuple[str, str]]:
    """Return the settings that all runs have in common, as they were written down."""
    first, rest = runs[0].config, runs[1:]
    return [
        (name, json.dumps(value))
        for name, value in first.items()
        if name not in _LEFT_OUT and all(run.config.get(name) == value for run in rest)
    ]


def _run(run: RunResult) -> dict[str, str]:
    config = {name: value for name, value in run.config.items() if name not in _LEFT_OUT}
    note = "" if run.measured is not None else run.outcome.state
    return {"name": run.cell.name, "note": note, "config": json.dumps(config, indent=1)}


def study_toml(results: Results) -> str:
    """Return the study as TOML: as it was, but for the place of its data and objects of Python."""
    plain = results.study.plain()
    names = ("question", "baseline", "seeds", "claims", "measures", "confidence")
    lines = [f"{name} = {_toml(plain[name])}" for name in names]
    lines += ["", "[settings]", *_table_lines(plain["settings"])]
    for policy, own in plain["policies"].items():
        lines += ["", f"[policies.{_key(policy)}]"]
        lines += [f"# an object of Python: {own}"] if isinstance(own, str) else _table_lines(own)
    return "\n".join(lines)


def _table_lines(table: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, value in table.items():
        if name in ("data", "shards", "val_shards") and value is not None:
            value = str(value).rstrip("/").rpartition("/")[2]
        if value is not None:  # which TOML cannot say
            lines.append(f"{name} = {_toml(value)}")
    return lines


def _toml(value: Any) -> str:
    # JSON's strings, numbers, booleans and lists are TOML's.
    return json.dumps(value, ensure_ascii=False)


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name, ensure_ascii=False)
