"""The report of a study: one page that needs no network, no script and no other file."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
    claim_words,
    p_shown,
    shown,
    shown_difference,
    versions,
)
from maskdistill.comparing.statistics import Difference
from maskdistill.job_images import open_images
from maskdistill.measures import MEASURES
from maskdistill.plotting import style
from maskdistill.training.checkpoint import write_durably

_NOTHING = "\u2013"  # in a cell of a table
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
    pictures = ReportImages(results, open_images(pictures_config(results))[0])
    attention = pictures.attention()
    content: dict[str, Any] = {
        "question": study.question,
        "versions": versions(),
        "facts": _facts(results, pictures),
        "missing": [
            (run.cell.name, run.outcome.message or run.outcome.state)
            for run in results.runs
            if run.measured is None
        ],
        "claims": [_claim(results, claim) for claim in results.claims],
        "how_tested": _how_tested(results),
        "no_claims": _no_claims(results),
        "scenes": pictures.config.data is None and pictures.config.shards is None,
        "confidence": f"{100 * study.confidence:.3g} %",
        "level": f"{1 - study.confidence:.2g}",
        "tests": len(results.claims),
        "seeds": ", ".join(map(str, study.seeds)),
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
        "attention": attention and {
            "seed": pictures.seed,
            "rows": attention[0],
            "outlined": attention[1],
            "scale": colour_scale(),
        },
        "gallery": _gallery(results, pictures),
        "costs": _costs(results),
        "cost_note": _cost_note(results),
        "study_toml": study_toml(results),
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


def pictures_config(results: Results) -> Any:
    """Return the settings whose images the report shows."""
    cell = results.done[0].cell
    return results.study.config(cell.policy, cell.seed)


def _facts(results: Results, pictures: ReportImages) -> list[tuple[str, str]]:
    study, config = results.study, pictures.config
    first = results.done[0]
    steps = sorted({run.summary["steps"] for run in results.done})
    data = "built-in scenes" if config.data is None else Path(config.data).name
    if config.shards is not None:
        data = Path(config.shards).name
    budget = f"{steps[0]:,} steps" if len(steps) == 1 else f"{steps[0]:,} to {steps[-1]:,} steps"
    return [
        ("policies", str(len(study.policies))),
        ("seeds of each", str(len(study.seeds))),
        ("budget of a run", f"{budget} of {config.batch_size} images"),
        ("data", data),
        ("images to train on", f"{len(pictures.images.train_labels):,}"),
        ("images to judge by", f"{first.summary['knn_val_images']:,}"),
        ("model", config.model),
        ("image and patch", f"{config.image_size} and {config.patch_size} px"),
        ("device", str(first.summary["device"])),
    ]


def _claim(results: Results, claim: Difference) -> dict[str, str]:
    verdict, rest, numbers = claim_words(results, claim)
    kind = claim.verdict if claim.verdict in ("better", "worse") else "open"
    return {"kind": str(kind), "verdict": verdict, "rest": rest, "numbers": numbers}


def _how_tested(results: Results) -> str:
    tests, seeds = len(results.claims), len(results.study.seeds)
    text = "Each sentence is a paired t test over seeds"
    if tests > 1:
        text += f", corrected by Holm's method for all {tests} of them"
    if 1 < seeds < 5:
        text += f". {seeds} seeds can tell large differences alone; five or more are better"
    return f"{text}."


def _no_claims(results: Results) -> str:
    if len(results.study.policies) == 1:
        return "There is one policy, so there is nothing to compare it with."
    if not results.study.claims:
        return "The study names no claims, so nothing was tested."
    return "No seed is done with both the baseline and another policy, so nothing can be tested."


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
                "tested": name in results.study.claims,
                "better": measure.better,
                "href": None,
                "cells": [_cell(results, list(values.values()), name) for values in columns],
            }
        )
    return rows


def _cell(results: Results, values: list[float], name: str) -> dict[str, str]:
    from maskdistill.comparing.statistics import mean_interval

    if not values:
        return {"mean": _NOTHING, "seeds": ""}
    interval = mean_interval(values, results.study.confidence)
    mean = shown(interval.mean, name, unit=False)
    if interval.half is None:
        return {"mean": mean, "seeds": ""}
    digits = len(mean.partition(".")[2])
    half = 100 * interval.half if MEASURES[name].unit == "%" else interval.half
    return {
        "mean": f"{mean} ± {half:.{digits}f}",
        "seeds": ", ".join(shown(value, name, unit=False) for value in values),
    }


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
    if low is not None and high is not None:
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
                "text": str(results.study.policy(name)),
                "columns": columns,
                "rows": rows,
            }
        )
    return {"policies": policies, "scale": colour_scale(), "draws": "2,000"}


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
        relative = speed(policy) / speed(baseline) if baseline in there else None
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
    """Return the study as TOML that reads back as the same, but for the place of its data."""
    plain = results.study.plain()
    lines = [
        f"{name} = {_toml(plain[name])}"
        for name in ("question", "baseline", "seeds", "claims", "measures", "confidence")
    ]
    settings = {n: v for n, v in plain["settings"].items() if n not in ("shards", "val_shards")}
    if "data" in settings:
        settings["data"] = Path(settings["data"]).name
    lines += ["", "[settings]"] + [f"{name} = {_toml(value)}" for name, value in settings.items()]
    for policy, own in plain["policies"].items():
        lines += ["", f"[policies.{_key(policy)}]"]
        if isinstance(own, str):
            lines.append(f"# in Python: {own}")
        else:
            lines += [f"{name} = {_toml(value)}" for name, value in own.items()]
    return "\n".join(lines)


def _toml(value: Any) -> str:
    # JSON's strings, numbers, booleans and lists are TOML's, but for characters beyond the BMP.
    return json.dumps(value, ensure_ascii=False)


def _key(name: str) -> str:
    return name if name.replace("-", "").replace("_", "").isalnum() else json.dumps(name)
