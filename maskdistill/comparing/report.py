"""The report of a study: one page that needs no network, no script and no other file."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from maskdistill import presets
from maskdistill.comparing.results import (
    PairedDifference,
    Results,
    RunResult,
    gather,
    mean_interval,
    p_shown,
    sentences,
    shown,
    shown_difference,
    versions,
)
from maskdistill.comparing.running import Outcome, StudyInterrupted, devices_at_hand, run_grid
from maskdistill.comparing.study import Cell, Study
from maskdistill.data import derive_seed, normalize
from maskdistill.data.crops import MultiCrop
from maskdistill.data.writing import write_durably
from maskdistill.evaluation import load_backbone, reinitialised
from maskdistill.evaluation.judge import JobImages, Judge
from maskdistill.evaluation.measures import MEASURES
from maskdistill.models import MaskedViT
from maskdistill.plotting import (
    attention_pixels,
    masked_pixels,
    plot_intervals,
    plot_occlusion,
    plot_training_bands,
    style,
)
from maskdistill.plotting.masks import view_name
from maskdistill.policies import ViewMasks, ViewPolicy
from maskdistill.training.job import JobConfig, objective_note, open_images, saved_config

_THUMB = 192  # pixels, twice those on the page
_DRAWS, _AT_ONCE = 2000, 100
_SHOWN = 8  # images whose attention is shown
_LOCAL = 3  # local views that are shown


@dataclass(frozen=True)
class Plot:
    """A plot for light pages and for dark ones.

    Attributes:
        light: ``data:`` URL.
        dark: the same plot, for a dark page.
        title: what it shows.
    """

    light: str
    dark: str
    title: str = ""


class SheetRow(NamedTuple):
    """A row of pictures.

    Attributes:
        title: of the row.
        images: ``data:`` URLs; None is a view that is not seen.
    """

    title: str
    images: tuple[str | None, ...]


# --- Plots


def plot_twice(plot: Callable[[], Any], title: str) -> Plot:
    """Return a figure as SVG, once for light pages and once for dark ones."""
    found = []
    for page in (style.light, style.dark):
        with page():
            written = io.BytesIO()
            plot().savefig(written, format="svg")
            found.append(_data_url(written.getvalue(), "image/svg+xml"))
    return Plot(found[0], found[1], title)


def training_plots(results: Results) -> list[Plot]:
    """Return k-NN accuracy and loss over training, with bands over seeds."""
    order = list(results.study.policies)
    pixels = [run.summary["knn_raw_pixels"] for run in results.done]
    floors = {"raw pixels": sum(pixels) / len(pixels)}
    accuracy = {name: list(map(_with_start, runs)) for name in order if (runs := results.of(name))}
    plots = [
        plot_twice(
            partial(plot_training_bands, accuracy, "knn", floors=floors, order=order),
            "20-NN accuracy over training",
        )
    ]
    # A run of very few steps, or of no finite loss, has no line of it.
    losses = _per_policy(
        results, lambda run: run.metrics if any("loss" in m for m in run.metrics) else None
    )
    if losses:
        plot = partial(plot_training_bands, losses, "loss", order=order)
        plots.append(plot_twice(plot, "Loss over training"))
    return plots


def robustness_plots(results: Results) -> list[Plot]:
    """Return accuracy under each kind of occlusion that was measured."""
    kinds = {
        "random": "random patches",
        "salient": "patches of the object first",
        "background": "patches of the background first",
    }
    plots = []
    for kind, words in kinds.items():
        name = f"occlusion_{kind}"
        curves = _per_policy(results, lambda run: run.measured and run.measured.curves.get(name))  # noqa: B023
        if curves:
            plot = partial(
                plot_occlusion,
                curves,
                label="20-NN accuracy (%)",
                order=list(results.study.policies),
            )
            plots.append(plot_twice(plot, f"Occlusion of {words}"))
    return plots


def _per_policy(results: Results, of: Callable[[RunResult], Any]) -> dict[str, list[Any]]:
    """Return something of the runs of each policy that have it, by policy."""
    found = {
        policy: [value for run in results.of(policy) if (value := of(run))]
        for policy in results.study.policies
    }
    return {policy: values for policy, values in found.items() if values}


def _with_start(run: RunResult) -> list[dict[str, Any]]:
    """Return the k-NN accuracies of a run, from its random weights on."""
    start = {"step": 0, "knn": run.summary["knn_random_init"]}
    return [start, *(dict(line) for line in run.metrics if "knn" in line)]


def forest_plot(results: Results) -> Plot | None:
    """Return the differences to the baseline in the tested measures, with their intervals."""
    if not results.claims:
        return None
    differences: dict[str, dict[str, Sequence[float]]] = {}
    intervals: dict[str, dict[str, tuple[float | None, float | None]]] = {}
    # Those in per cent share an axis, so they come first.
    for claim in sorted(results.claims, key=lambda c: MEASURES[c.measure].unit != "%"):
        _, low, high = claim.interval
        differences.setdefault(claim.policy, {})[claim.measure] = claim.values
        intervals.setdefault(claim.policy, {})[claim.measure] = (low, high)
    of = {name: MEASURES[name] for name in results.study.tested}
    plot = partial(
        plot_intervals, differences, intervals,
        baseline=str(results.study.baseline),
        titles={name: measure.title for name, measure in of.items()},
        units={name: measure.unit for name, measure in of.items()},
        better={name: measure.better for name, measure in of.items()},
        order=list(results.study.policies),
    )  # fmt: skip
    return plot_twice(plot, "Differences to the baseline")


# --- Pictures of attention and masks


class ReportImages:
    """The backbones and images that pictures are made of, of one seed.

    Args:
        results: of the study.
        images: its data.

    Attributes:
        seed: the first with the most policies done.
        runs: of that seed, by policy.
    """

    def __init__(self, results: Results, images: JobImages) -> None:
        counts = {
            seed: sum(run.cell.seed == seed for run in results.done) for seed in results.study.seeds
        }
        self.seed = max(counts, key=lambda seed: counts[seed])  # the first of those
        self.runs = {r.cell.policy: r for r in results.done if r.cell.seed == self.seed}
        self.results = results
        self.images = images
        self.config: JobConfig = saved_config(next(iter(self.runs.values())).folder)
        self.judge = Judge(images, self.config.image_size, knn_train=1, knn_val=self.config.knn_val)

    def backbone(self, policy: str) -> MaskedViT:
        """Return the trained backbone of a policy, on the CPU."""
        return load_backbone(self.runs[policy].folder).eval()

    def picture(self, pixels: Any) -> str:
        """Return the URL of a picture: exact for small images, in WebP for photographs."""
        if self.config.image_size <= 64:
            return _picture_url(pixels, format="PNG", optimize=True)
        return _picture_url(pixels, format="WEBP", quality=88, method=6)

    def attention(self) -> tuple[list[SheetRow], bool] | None:
        """Return rows of attention, and whether objects are outlined; None without attention."""
        shown = self.judge.shown[:_SHOWN]
        pixels = self.judge.pixels(shown)
        masks = self.images.val_masks
        outlines = None if masks is None else torch.from_numpy(masks[shown])
        backbones = {policy: self.backbone(policy) for policy in self.runs}
        first = self.backbone(next(iter(self.runs)))
        rows = [
            SheetRow(
                "image",
                tuple(
                    self.picture(masked_pixels(image, None, (1, 1), size=_THUMB))
                    for image in pixels
                ),
            )
        ]
        for name, vit in {"random weights": reinitialised(first, self.seed), **backbones}.items():
            try:
                with torch.no_grad():
                    maps = vit.eval().attention(normalize(pixels)).mean(dim=1)
            except ValueError:  # a model without a class token
                return None
            grid = vit.grid(self.config.image_size, self.config.image_size)
            pictures = [
                attention_pixels(
                    pixels[i], maps[i], grid, size=_THUMB,
                    outline=None if outlines is None else outlines[i],
                )
                for i in range(len(shown))
            ]  # fmt: skip
            rows.append(SheetRow(name, tuple(map(self.picture, pictures))))
        return rows, outlines is not None

    def masks(self, name: str) -> tuple[list[str], list[SheetRow]]:
        """Return titles of columns, and rows of what each role sees of an image's views."""
        c = self.config
        assert c.local_size is not None
        cut = MultiCrop(c.image_size, c.local_size, c.local_crops, c.global_scale, c.local_scale)
        image = self.images.val[self.judge.shown[0]][0]
        crops, boxes, flipped = cut.cut(
            [image], torch.tensor([derive_seed(self.seed, "report views")])
        )
        policy, vit = self.results.study.policy(name), self.backbone(name)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "report masks"))

        def draw(count: int) -> ViewMasks:
            """Draw masks for so many copies of the views."""

            def copies(tensor: Tensor) -> Tensor:
                return tensor.expand(count, *tensor.shape[1:])

            signals: dict[str, Any] = {}
            if "attention" in policy.needs:
                with torch.no_grad():
                    signals["attention"] = [
                        copies(vit.attention(normalize(crop)).mean(dim=1))
                        for crop in crops[: policy.global_crops]
                    ]
            return policy(
                list(map(copies, crops)),
                vit.patch_size,
                generator=generator,
                progress=1.0,  # schedules have come to their end
                boxes=copies(boxes),
                flipped=copies(flipped),
                **signals,
            )

        one = draw(1)
        # Some maskers compare all patches of all images, so the draws come in parts.
        many = [draw(_AT_ONCE) for _ in range(_DRAWS // _AT_ONCE)]
        views = min(len(crops), policy.global_crops + _LOCAL)
        rows = []
        for role in ("student", "teacher"):
            seen: list[str | None] = [None] * views
            for view, mask in enumerate(getattr(one, role)[:views]):
                crop = crops[view]
                seen[view] = self.picture(
                    masked_pixels(
                        crop[0], None if mask is None else mask[0], vit.grid(*crop.shape[-2:]),
                        size=_THUMB,
                    )
                )  # fmt: skip
            hidden = [getattr(masks, role)[0] for masks in many]
            probability = None
            if hidden[0] is not None:
                chance = torch.cat(hidden).float().mean(dim=0)
                grid = vit.grid(*crops[0].shape[-2:])
                probability = self.picture(
                    attention_pixels(None, chance, grid, scale=1.0, size=_THUMB)
                )
            rows.append(SheetRow(role, (*seen, probability)))
        return [*(view_name(i, policy.global_crops) for i in range(views)), "how often"], rows


def colour_scale() -> str:
    """Return a bar of the colours of attention, from none to most."""
    bar = attention_pixels(None, torch.arange(256) / 255, (1, 256), look="map", size=(8, 256))
    return _picture_url(bar, format="PNG")


def _picture_url(pixels: Any, **options: Any) -> str:
    written = io.BytesIO()
    Image.fromarray(np.asarray(pixels)).save(written, **options)
    return _data_url(written.getvalue(), f"image/{options['format'].lower()}")


def _data_url(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


# --- The page

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
        "scenes": not study.real,
        "confidence": f"{100 * study.confidence:.3g} %",
        "level": f"{1 - study.confidence:.2g}",
        "tests": results.tests,
        "seeds": ", ".join(map(str, study.seeds)) if 1 < len(study.seeds) <= _LISTED else "",
        "baseline": study.baseline,
        "policies": [name for name in study.policies if results.of(name)],
        "colours": {name: f"var(--line-{i})" for i, name in enumerate(study.policies)},
        "random": any(run.random is not None for run in results.done),
        "line_colours": _line_colours(results),
        "table": _table(results),
        "skipped": _skipped(results),
        "differences": [_difference(claim) for claim in results.claims],
        "forest": forest_plot(results),
        "curves": training_plots(results),
        "alone": len(study.policies) == 1,
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
        "runs": [
            {
                "name": run.cell.name,
                "note": "" if run.measured is not None else run.outcome.state,
                "config": json.dumps(_public(run.config), indent=1),
            }
            for run in results.runs
        ],
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
        config = results.study.config(cell.policy, cell.seed)
        images, _ = open_images(config, config.image_size)
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


def _difference(claim: PairedDifference) -> dict[str, str]:
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
                "text": ViewPolicy.__str__(results.study.policy(name)),
                "note": _objective_note(*results.study.recipe(name, results.study.seeds[0])),
                "columns": columns,
                "rows": rows,
            }
        )
    return {"policies": policies, "scale": colour_scale(), "draws": "2,000"}


def _objective_note(config: JobConfig, policy: ViewPolicy) -> str:
    if not isinstance(policy, presets.Preset):
        return f"Objective: {config.objective or 'dino'}."
    asked = config.objective or policy.trainable
    return f"Objective: {asked}. {objective_note(policy, config)}".strip()


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
    return [
        (name, json.dumps(value))
        for name, value in _public(runs[0].config).items()
        if all(run.config.get(name) == value for run in runs)
    ]


def _public(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in _LEFT_OUT}


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


# --- From a study to its report


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
