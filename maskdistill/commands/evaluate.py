"""``maskdistill evaluate``: what backbones are worth, next to random weights."""

from __future__ import annotations

import csv
import io
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from maskdistill.commands.backbones import Backbone, common_size, open_backbones
from maskdistill.commands.said import plain_warning, ticking, waiting

if TYPE_CHECKING:
    from maskdistill.evaluation.judge import JobImages
    from maskdistill.evaluation.measures import Measure, Measured


def evaluate(
    backbones: tuple[str, ...],
    /,
    measures: tuple[str, ...] = (),
    data: Path | None = None,
    data_format: str = "auto",
    allow_pickle: bool = False,
    image_size: int | None = None,
    patch_size: int | None = None,
    model: str | None = None,
    pretrained: bool = False,
    train_limit: int = 5000,
    val_limit: int = 2000,
    baseline: bool = True,
    guide: str | None = None,
    classifier: Literal["knn", "linear"] = "knn",
    fill: Literal["black", "mean", "noise", "drop"] = "black",
    seed: int = 0,
    device: str | None = None,
    threads: int | None = None,
    cache: Path | None = None,
    json: bool = False,
    out: Path | None = None,
) -> None:
    """Measure backbones on labelled images, next to the same models with random weights.

    maskdistill evaluate runs/first runs/second --measures knn attention --out scores.csv

    A backbone is a run's folder, a file of weights (also of DINO, iBOT, DINOv2), or a timm model's
    name. Classifiers are fitted on training images, which also choose their settings.

    Args:
        backbones: runs, files of weights, or names of timm models.
        measures: groups of knn, linear, logistic, few_shot, attention, discovery, occlusion,
            shuffling, stability, health; or all; or single ones, such as knn_20.
            Without it: knn linear attention occlusion stability health.
        data: images in any form that train takes. Without it: those of the run, else scenes.
        data_format: auto, or the form of the data by name.
        allow_pickle: read pickle caches, with an unpickler that runs no code.
        image_size: pixels of a side. Without it: the backbones' own.
        patch_size: pixels of a patch's side. Without it: the backbones' own.
        model: timm's name of what a file from elsewhere holds, where the file does not tell.
        pretrained: take timm's weights of named models, which may download them; else random ones.
        train_limit: most training images, evenly over the classes.
        val_limit: most validation images.
        baseline: measure the same models with random weights as well.
        guide: backbone whose attention says which patches are salient; without it the object masks
            say, where the images have any.
        classifier: of occluded and shuffled images: 20 nearest neighbours, or logistic regression.
        fill: what takes the place of occluded patches.
        seed: of random weights, episodes, occlusion and noise.
        device: such as cuda:1. Without it: an accelerator, if there is one.
        threads: on the CPU. Without it: torch's own number.
        cache: a folder for features, which are then computed once.
        json: print all numbers and curves as JSON instead.
        out: also write them there: .json (with the curves), or .csv (a line per backbone).
    """
    import torch

    from maskdistill.evaluation.measures import DEFAULT_GROUPS, measures_named
    from maskdistill.training.job import open_images

    _check_order(measures)
    chosen = measures_named(measures or DEFAULT_GROUPS)
    writer = _writer(out)
    if threads is not None:
        torch.set_num_threads(threads)
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = plain_warning
        opened = open_backbones(
            backbones, image_size=image_size, patch_size=patch_size, model=model,
            pretrained=pretrained, apply="drop" if fill == "drop" else None, seed=seed,
            device=device,
        )  # fmt: skip
        size = common_size(opened, image_size)
        source = _source(opened, data, data_format, allow_pickle, size, train_limit, val_limit)
        leader = None
        if guide is not None:
            (named,) = open_backbones(
                [guide], image_size=size, patch_size=patch_size, pretrained=pretrained, seed=seed,
                device=device,
            )  # fmt: skip
            leader = named.vit
        with waiting("reading images"):
            images, _ = open_images(source)
        options: dict[str, Any] = {
            "groups": tuple(dict.fromkeys(one.group for one in chosen)),
            "train_limit": train_limit, "val_limit": val_limit, "guide": leader,
            "classifier": classifier, "fill": fill, "seed": seed, "cache": cache,
        }  # fmt: skip
        columns = _columns(opened, baseline)
        _measure(columns, images, size, seed, options)
    note = images.note
    if source.data is None and source.shards is None:  # the note is for those who train
        note = f"{len(images.train_labels):,} built-in scenes, and {len(images.val_labels):,} more."
    written = _as_dict(columns, chosen, note, size, options)
    if writer is not None and out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(writer(columns, chosen, written), encoding="utf-8")
    if json:
        print(_json_text(written))
        return
    _print_table(columns, chosen, note, size)
    if out is not None:
        print(f"\n{out}")


def _check_order(measures: Sequence[str]) -> None:
    """Say what happened where a list of measures has swallowed the backbones after it."""
    if swallowed := [name for name in measures if Path(name).expanduser().exists()]:
        raise ValueError(
            f"{swallowed[0]} is no measure but a path: backbones go before the options, as in "
            f"`maskdistill evaluate {swallowed[0]} --measures knn`."
        )


# --- What to measure, and on what


@dataclass(frozen=True)
class _Column:
    """A backbone, or the same model with random weights, and what was found."""

    name: str
    of: Backbone
    random: bool
    found: list[Measured]

    @property
    def measured(self) -> Measured:
        return self.found[0]


def _columns(backbones: Sequence[Backbone], baseline: bool) -> list[_Column]:
    """Put one model with random weights of each form after all backbones."""
    columns = [_Column(one.name, one, False, []) for one in backbones]
    if not baseline:
        return columns
    of_form: dict[object, Backbone] = {}
    for one in backbones:
        if one.trained:
            of_form.setdefault(one.form, one)
    taken = {one.name for one in backbones}
    for one in of_form.values():
        name = "random weights" if len(of_form) == 1 else f"random weights of {one.name}"
        while name in taken:  # a run may be called anything
            name += " (untrained)"
        taken.add(name)
        columns.append(_Column(name, one, True, []))
    return columns


@dataclass(frozen=True)
class _Source:
    """Where images come from, as `open_images` wants to know it."""

    data: Path | None
    data_format: str
    allow_pickle: bool
    shards: str | None
    val_shards: str | None
    max_damaged: int
    scenes: int
    image_size: int
    knn_train: int
    knn_val: int


def _source(
    backbones: Sequence[Backbone],
    data: Path | None,
    data_format: str,
    allow_pickle: bool,
    size: int,
    train_limit: int,
    val_limit: int,
) -> _Source:
    """Say where images come from: where they are told to, else as the runs say, else scenes."""
    if train_limit < 1 or val_limit < 1:
        raise ValueError(
            f"--train-limit and --val-limit must be >= 1; got {train_limit} and {val_limit}."
        )
    runs = [one for one in backbones if one.settings is not None]
    if data is not None or not runs:
        most = 5000 if size <= 96 else 1100  # large ones take long to draw
        scenes = min(most, max(train_limit, 5 * val_limit))  # a fifth as many are for validation
        limits = (size, train_limit, val_limit)
        return _Source(data, data_format, allow_pickle, None, None, 10, scenes, *limits)
    found: dict[_Source, str] = {}
    for one in reversed(runs):
        own = one.settings
        assert own is not None
        source = _Source(
            own.data, own.data_format, own.allow_pickle or allow_pickle, own.shards, own.val_shards,
            own.max_damaged, own.scenes, size, train_limit, val_limit,
        )  # fmt: skip
        found[source] = one.name
    if len(found) > 1:
        raise ValueError(
            f"{' and '.join(sorted(found.values()))} were trained on different images; say which "
            "to measure on, with --data."
        )
    return next(iter(found))


def _measure(
    columns: Sequence[_Column], images: JobImages, size: int, seed: int, options: dict[str, Any]
) -> None:
    """Measure all columns, under a bar over their groups."""
    from tqdm import tqdm

    from maskdistill.evaluation import reinitialised
    from maskdistill.evaluation.measures import measure

    bar = tqdm(unit="group", delay=2, disable=None, dynamic_ncols=True, leave=False)
    with bar, ticking(bar):
        for column in columns:

            def progress(group: str, done: int, total: int, name: str = column.name) -> None:
                bar.total = len(columns) * total
                bar.update(min(done, 1))
                bar.set_description_str(f"{name}: {group}", refresh=False)

            vit = reinitialised(column.of.vit, seed) if column.random else column.of.vit
            column.found.append(measure(vit, images, size, progress=progress, **options))


# --- What is said and written


def _as_dict(
    columns: Sequence[_Column],
    chosen: Sequence[Measure],
    note: str,
    size: int,
    options: dict[str, Any],
) -> dict[str, Any]:
    names = [one.name for one in chosen]
    backbones = {}
    for column in columns:
        found = column.measured.to_json()
        values = found.pop("values")
        backbones[column.name] = {
            "source": column.of.source,
            "random_weights": column.random or not column.of.trained,
            "values": {name: values[name] for name in names if name in values},
            **found,
        }
    plain = ("train_limit", "val_limit", "classifier", "fill", "seed")
    settings = {name: options[name] for name in plain}
    return {
        "data": note,
        "image_size": size,
        "settings": {**settings, "guide": options["guide"] is not None},
        "backbones": backbones,
    }


def _json_text(written: dict[str, Any]) -> str:
    return json.dumps(written, indent=1)


def _csv_text(columns: Sequence[_Column], chosen: Sequence[Measure]) -> str:
    file = io.StringIO()
    lines = csv.writer(file, lineterminator="\n")
    lines.writerow(["backbone", "source", "random_weights", *(one.name for one in chosen)])
    for column in columns:
        values = (column.measured.values.get(one.name, "") for one in chosen)
        random = column.random or not column.of.trained
        lines.writerow([column.name, column.of.source, int(random), *values])
    return file.getvalue()


_Writer = Any


def _writer(out: Path | None) -> _Writer:
    """Return what makes the text of a file of this name, before anything is measured.

    Raises:
        ValueError: a name that says no form that is known.
    """
    if out is None:
        return None
    if out.suffix == ".json":
        return lambda columns, chosen, written: _json_text(written) + "\n"
    if out.suffix == ".csv":
        return lambda columns, chosen, written: _csv_text(columns, chosen)
    raise ValueError(f"--out must end in .json or .csv; got {out}.")


def _print_table(
    columns: Sequence[_Column], chosen: Sequence[Measure], note: str, size: int
) -> None:
    first = columns[0].measured
    print(note)
    counts = f"{first.images['val']:,} validation and {first.images['train']:,} training images"
    print(f"Measured on {counts} at {size} pixels.\n")
    rows = [["", *(column.name for column in columns)]]
    for one in chosen:
        values = [column.measured.values.get(one.name) for column in columns]
        if any(value is not None for value in values):
            unit = f" ({one.unit})" if one.unit else ""
            shown = ("" if value is None else one.shown(value) for value in values)
            rows.append([f"{one.title}{unit}", *shown])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        title, *cells = row
        right = (f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
        print("  ".join([f"{title:<{widths[0]}}", *right]).rstrip())
    for column in columns:
        if not column.random and not column.of.trained:
            print(f"\n{column.name} has random weights; --pretrained takes timm's.")
    left_out: dict[tuple[str, str], str] = {}
    for column in columns:
        for name, reason in column.measured.skipped.items():
            left_out.setdefault((name, reason), column.name)
    for name, reason in left_out:
        print(f"\nleft out: {name}, of {left_out[name, reason]}: {reason}")
