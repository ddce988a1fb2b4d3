"""``maskdistill evaluate`` and ``attention``: what backbones are worth, next to random weights."""

from __future__ import annotations

import csv
import dataclasses
import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from maskdistill.cli.show import read_picture, save_figure
from maskdistill.cli.terminal import print_table, progress_bar, ticking, waiting

if TYPE_CHECKING:
    from maskdistill.evaluation import MaskData
    from maskdistill.evaluation.judge import JobImages
    from maskdistill.evaluation.measures import Measure, Measured
    from maskdistill.models import MaskedViT
    from maskdistill.training.config import DataSettings, JobConfig

_SCENES = 500
_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


# --- evaluate


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
        classifier: of occluded and shuffled images: 20 nearest neighbours, or logistic
            regression.
        fill: what takes the place of occluded patches.
        seed: of random weights, episodes, occlusion and noise.
        device: such as cuda:1. Without it: an accelerator, if there is one.
        threads: on the CPU. Without it: torch's own number.
        cache: a folder for features, which are then computed once.
        json: print all numbers and curves as JSON instead.
        out: also write them there: .json (with the curves), or .csv (a line per backbone).
    """
    from maskdistill.evaluation.measures import DEFAULT_GROUPS, measures_named
    from maskdistill.training.job import open_images

    if swallowed := [name for name in measures if Path(name).expanduser().exists()]:
        raise ValueError(
            f"{swallowed[0]} is no measure but a path: backbones go before the options, as in "
            f"`maskdistill evaluate {swallowed[0]} --measures knn`."
        )
    chosen = measures_named(measures or DEFAULT_GROUPS)
    if out is not None and out.suffix not in (".json", ".csv"):
        raise ValueError(f"--out must end in .json or .csv; got {out}.")
    if threads is not None:
        torch.set_num_threads(threads)
    opened = open_backbones(
        backbones, image_size=image_size, patch_size=patch_size, model=model,
        pretrained=pretrained, apply="drop" if fill == "drop" else None, seed=seed, device=device,
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
        images, _ = open_images(source, size)
    settings = {
        "train_limit": train_limit, "val_limit": val_limit, "classifier": classifier,
        "fill": fill, "seed": seed,
    }  # fmt: skip
    groups = tuple(dict.fromkeys(one.group for one in chosen))
    columns = _measured(
        _with_baselines(opened, baseline), images, size, seed,
        {"groups": groups, "guide": leader, "cache": cache, **settings},
    )  # fmt: skip
    note = images.note
    if source.data is None and source.shards is None:  # the note is for those who train
        note = f"{len(images.train_labels):,} built-in scenes, and {len(images.val_labels):,} more."
    found = {
        "data": note,
        "image_size": size,
        "settings": {**settings, "guide": guide is not None},
        "backbones": {column.name: column.plain(chosen) for column in columns},
    }
    if out is not None:
        text = _csv_text(columns, chosen) if out.suffix == ".csv" else dumps(found, indent=1) + "\n"
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    if json:
        print(dumps(found, indent=1))
        return
    _print_scores(columns, chosen, note, size)
    if out is not None:
        print(f"\n{out}")


def _source(
    backbones: Sequence[Backbone],
    data: Path | None,
    data_format: str,
    allow_pickle: bool,
    size: int,
    train_limit: int,
    val_limit: int,
) -> DataSettings:
    """Say where images come from: where they are told to, else as the runs say, else scenes."""
    from maskdistill.training.config import DataSettings, group_of

    if train_limit < 1 or val_limit < 1:
        raise ValueError(
            f"--train-limit and --val-limit must be >= 1; got {train_limit} and {val_limit}."
        )
    runs = [one for one in backbones if one.settings is not None]
    if data is not None or not runs:
        most = 5000 if size <= 96 else 1100  # large ones take long to draw
        scenes = min(most, max(train_limit, 5 * val_limit))  # a fifth as many are for validation
        return DataSettings(
            data=data, data_format=data_format,  # type: ignore[arg-type]  # it refuses others
            allow_pickle=allow_pickle, scenes=scenes, knn_train=train_limit, knn_val=val_limit,
        )  # fmt: skip
    found: dict[DataSettings, str] = {}
    for one in reversed(runs):
        own = one.settings
        assert own is not None
        source = dataclasses.replace(
            group_of(own, DataSettings), allow_pickle=own.allow_pickle or allow_pickle,
            knn_train=train_limit, knn_val=val_limit,
        )  # fmt: skip
        found[source] = one.name
    if len(found) > 1:
        raise ValueError(
            f"{' and '.join(sorted(found.values()))} were trained on different images; say which "
            "to measure on, with --data."
        )
    return next(iter(found))


def _with_baselines(
    backbones: Sequence[Backbone], baseline: bool
) -> list[tuple[str, Backbone, bool]]:
    """Return name, backbone, and whether to draw its weights anew: one of each form, at the end."""
    wanted = [(one.name, one, False) for one in backbones]
    if not baseline:
        return wanted
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
        wanted.append((name, one, True))
    return wanted


@dataclass(frozen=True)
class _Column:
    """What was found of a backbone, or of the same model with random weights."""

    name: str
    source: str
    baseline: bool
    random: bool
    measured: Measured

    def plain(self, chosen: Sequence[Measure]) -> dict[str, Any]:
        """Return all of it as JSON knows it, with the chosen values alone."""
        found = self.measured.to_json()
        values = found.pop("values")
        values = {one.name: values[one.name] for one in chosen if one.name in values}
        return {"source": self.source, "random_weights": self.random, "values": values, **found}


def _measured(
    wanted: Sequence[tuple[str, Backbone, bool]],
    images: JobImages,
    size: int,
    seed: int,
    options: dict[str, Any],
) -> list[_Column]:
    """Measure one after the other, under a bar over their groups."""
    from maskdistill.evaluation import reinitialised
    from maskdistill.evaluation.measures import measure

    columns = []
    bar = progress_bar(unit="group", leave=False)
    with bar, ticking(bar):
        for name, one, baseline in wanted:

            def progress(group: str, done: int, total: int, name: str = name) -> None:
                bar.total = len(wanted) * total
                bar.update(min(done, 1))
                bar.set_description_str(f"{name}: {group}", refresh=False)

            vit = reinitialised(one.vit, seed) if baseline else one.vit
            measured = measure(vit, images, size, progress=progress, **options)
            random = baseline or not one.trained
            columns.append(_Column(name, one.source, baseline, random, measured))
    return columns


def _csv_text(columns: Sequence[_Column], chosen: Sequence[Measure]) -> str:
    file = io.StringIO()
    lines = csv.writer(file, lineterminator="\n")
    lines.writerow(["backbone", "source", "random_weights", *(one.name for one in chosen)])
    for column in columns:
        values = (column.measured.values.get(one.name, "") for one in chosen)
        lines.writerow([column.name, column.source, int(column.random), *values])
    return file.getvalue()


def _print_scores(
    columns: Sequence[_Column], chosen: Sequence[Measure], note: str, size: int
) -> None:
    images = columns[0].measured.images
    print(note)
    counts = f"{images['val']:,} validation and {images['train']:,} training images"
    print(f"Measured on {counts} at {size} pixels.\n")
    rows = [["", *(column.name for column in columns)]]
    for one in chosen:
        values = [column.measured.values.get(one.name) for column in columns]
        if any(value is not None for value in values):
            unit = f" ({one.unit})" if one.unit else ""
            shown = ("" if value is None else one.shown(value) for value in values)
            rows.append([f"{one.title}{unit}", *shown])
    print_table(rows, right=True)
    for column in columns:
        if column.random and not column.baseline:
            print(f"\n{column.name} has random weights; --pretrained takes timm's.")
    left_out: dict[tuple[str, str], str] = {}
    for column in columns:
        for reason in column.measured.skipped.items():
            left_out.setdefault(reason, column.name)
    for (name, why), of in left_out.items():
        print(f"\nleft out: {name}, of {of}: {why}")


# --- attention


def attention(
    backbones: tuple[str, ...],
    /,
    data: Path | None = None,
    image_size: int | None = None,
    patch_size: int | None = None,
    model: str | None = None,
    pretrained: bool = False,
    resize: Literal["squeeze", "crop"] = "squeeze",
    split: str = "val",
    void: int | None = None,
    limit: int = 1000,
    mass: float = 0.6,
    tolerance: float = 0,
    seeds: tuple[int, ...] = (0, 1),
    discovery: bool = True,
    out: Path | None = None,
    heads: bool = False,
    style: Literal["overlay", "map"] = "overlay",
    images: int = 8,
    device: str | None = None,
    threads: int | None = None,
    json: bool = False,
) -> None:
    """Compare the attention of backbones with object masks, next to random weights; and draw it.

    maskdistill attention runs/first --data VOCdevkit/VOC2012 --out attention.png

    A backbone is a run's folder, a file of weights (also of DINO, iBOT, DINOv2), or a timm model's
    name. Each has a table, next to the same model with random weights and a box in the middle. A
    plain folder of images has no masks to compare with, but --out draws them.

    Args:
        backbones: runs, files of weights, or names of timm models.
        data: a folder with images/ and masks/, VOC's layout, or a pack with masks; or any folder of
            images. Without it: built-in scenes.
        image_size: pixels of a side. Without it: the backbones' own.
        patch_size: pixels of a patch's side. Without it: the backbones' own.
        model: timm's name of what a file from elsewhere holds, where the file does not tell.
        pretrained: take timm's weights of named models, which may download them; else random ones.
        resize: squeeze the whole image into the square, or cut out its centre.
        split: of VOC's layout: the list in ImageSets/Segmentation.
        void: masks hold labels, of which this one is void (-1: none is); VOC's are read so anyway.
        limit: most images.
        mass: share of the attention that counts as the object.
        tolerance: pixels by which the point of greatest attention may miss the object.
        seeds: of the copies with random weights.
        discovery: also run LOST and TokenCut.
        out: a sheet to draw, .png, .pdf or .svg: all backbones over the same images.
        heads: draw each head of one backbone instead.
        style: attention over the darkened image, or its colours alone.
        images: number of images on the sheet.
        device: such as cuda:1. Without it: an accelerator, if there is one.
        threads: on the CPU. Without it: torch's own number.
        json: print the scores as JSON instead.
    """
    _check(backbones, out, heads, images, limit)
    if threads is not None:
        torch.set_num_threads(threads)
    opened = open_backbones(
        backbones, image_size=image_size, patch_size=patch_size, model=model,
        pretrained=pretrained, device=device,
    )  # fmt: skip
    size = common_size(opened, image_size)
    plain = _plain_files(data)
    found = {}
    if plain:
        if out is None:
            raise ValueError(
                f"{data} has images and no masks to compare with; draw them with --out."
            )
        squeeze = resize == "squeeze"
        read = [read_picture(file, size, size, squeeze=squeeze) for file in plain[:images]]
        pictures, masks = torch.stack(read), None
    else:
        with waiting("reading images"):
            masked = _open_masks(data, size, resize, split, void, limit)
        if not json:
            print(masked.note)
        options = {"mass": mass, "tolerance": tolerance, "discovery": discovery}
        found = _compared(opened, masked, seeds, options, quiet=json)
        rows = torch.linspace(0, len(masked) - 1, min(images, len(masked))).round().long()
        pictures, masks = masked.images[rows], masked.masks[rows]
    if out is not None:
        _plot(opened, pictures, masks, heads, style, out)
    if json:
        print(dumps(found, indent=1))
    elif out is not None:
        print(f"\n{out}" if found else out)


def _check(
    backbones: Sequence[str], out: Path | None, heads: bool, images: int, limit: int
) -> None:
    if heads and len(backbones) != 1:
        raise ValueError(f"--heads draws one backbone's; got {len(backbones)} backbones.")
    if heads and out is None:
        raise ValueError("--heads draws each head; say where with --out.")
    for name, value in (("--images", images), ("--limit", limit)):
        if value < 1:
            raise ValueError(f"{name} must be an int >= 1; got {value}.")
    if out is not None and out.suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"--out must end in .png, .pdf or .svg; got {out}.")


def _plain_files(path: Path | None) -> list[Path]:
    """Return the images of a folder that is in none of the forms that have masks."""
    if path is None or any((path / name).is_dir() for name in ("JPEGImages", "masks")):
        return []
    files = (file for file in sorted(path.rglob("*")) if file.suffix.lower() in _ENDINGS)
    return [file for file in files if not file.name.startswith(".")]


def _open_masks(
    path: Path | None,
    size: int,
    resize: Literal["squeeze", "crop"],
    split: str,
    void: int | None,
    limit: int,
) -> MaskData:
    """Read images with masks, or take the built-in scenes."""
    from maskdistill.data import Scenes
    from maskdistill.evaluation import MaskData, mask_boxes, open_masks

    if path is not None:
        return open_masks(path, image_size=size, resize=resize, split=split, void=void, limit=limit)
    scenes = Scenes(min(limit, _SCENES), size=size, split="val")
    masks = torch.from_numpy(scenes.masks)
    return MaskData(
        torch.from_numpy(scenes.images).permute(0, 3, 1, 2).contiguous(),
        masks,
        None,
        list(mask_boxes(masks).float()[:, None]),
        tuple(map(str, range(len(scenes)))),
        {},
        f"{len(scenes)} built-in scenes.",
    )


def _compared(
    backbones: Sequence[Backbone],
    data: MaskData,
    seeds: Sequence[int],
    options: dict[str, Any],
    quiet: bool,
) -> dict[str, Any]:
    """Measure and print each backbone; those of one form share their random weights."""
    from maskdistill.evaluation import AttentionQuality, attention_quality

    baselines: dict[object, AttentionQuality] = {}
    found = {}
    for one in backbones:
        form = one.form
        passes = 1 if form in baselines else 1 + len(seeds)
        with _counting(one.vit, one.name, passes * len(data)):
            quality = attention_quality(
                one.vit, data.images, data.masks, boxes=data.boxes, ignore=data.ignore,
                baseline=baselines.get(form, "random init"), seeds=seeds, **options,
            )  # fmt: skip
        baselines[form] = quality
        found[one.name] = {"source": one.source, **dataclasses.asdict(quality)}
        if not quiet:
            print(f"\n{one.name}\n{quality}")
    return found


@contextmanager
def _counting(vit: MaskedViT, name: str, total: int) -> Iterator[None]:
    """Show a bar on a terminal over the images that go through a model and its copies."""
    with progress_bar(total=total, desc=name, unit="image", leave=False) as bar:

        def count(_: object, inputs: tuple[Tensor, ...]) -> None:
            bar.update(len(inputs[0]))

        # A copy of the model has a copy of its hooks, so its images count as well.
        hook = vit.register_forward_pre_hook(count)
        try:
            yield
        finally:
            hook.remove()


def _plot(
    backbones: Sequence[Backbone],
    images: Tensor,
    masks: Tensor | None,
    heads: bool,
    style: Literal["overlay", "map"],
    out: Path,
) -> None:
    from maskdistill import plotting
    from maskdistill.data import normalize
    from maskdistill.evaluation import evaluating

    maps, grids = {}, {}
    for one in backbones:
        with evaluating(one.vit):
            inputs = normalize(images.to(next(one.vit.parameters()).device))
            maps[one.name] = one.vit.attention(inputs).cpu()
        grids[one.name] = one.vit.grid(images.shape[2], images.shape[3])
    finest = max(grids.values())
    if heads:
        own = maps[backbones[0].name]
        figure = plotting.plot_attention_heads(images, own, finest, masks, style=style)
    else:
        maps = {name: _enlarged(maps[name], grids[name], finest, name) for name in maps}
        figure = plotting.plot_attention(images, maps, finest, masks, style=style)
    save_figure(figure, out)


def _enlarged(
    attention: Tensor, grid: tuple[int, int], finest: tuple[int, int], name: str
) -> Tensor:
    """Repeat the patches of a coarser grid, so that models of several share a sheet.

    Raises:
        ValueError: a grid that does not divide the finest.
    """
    rows, columns = finest[0] // grid[0], finest[1] // grid[1]
    if (rows * grid[0], columns * grid[1]) != finest:
        raise ValueError(
            f"{name} has {grid[0]}x{grid[1]} patches, which do not fit into another backbone's "
            f"{finest[0]}x{finest[1]}; draw them on sheets of their own."
        )
    maps = attention.unflatten(-1, grid)
    finer: Tensor = maps.repeat_interleave(rows, -2).repeat_interleave(columns, -1).flatten(-2)
    return finer


# --- Backbones


@dataclass(frozen=True)
class Backbone:
    """A backbone that was asked for.

    Attributes:
        name: what it is called in tables, as short as the others allow.
        source: as it was given.
        vit: the model.
        trained: False where its weights are random.
        settings: of the run that it comes from, if it does.
    """

    name: str
    source: str
    vit: MaskedViT
    trained: bool
    settings: JobConfig | None

    @property
    def form(self) -> object:
        """What two models share whose random weights are the same."""
        weights = self.vit.backbone.state_dict().items()
        return repr(self.vit), tuple((name, tuple(weight.shape)) for name, weight in weights)

    @property
    def own_size(self) -> int:
        """Pixels of a side of the images that it was made for."""
        if self.settings is not None:
            return self.settings.image_size
        stem = getattr(self.vit.backbone, "patch_embed", None)
        size = getattr(stem, "img_size", None) or getattr(
            self.vit.backbone, "pretrained_cfg", {}
        ).get("input_size", (3, 224, 224))
        return int(size[-1] if isinstance(size, Sequence) else size)


def open_backbones(
    sources: Sequence[str],
    *,
    image_size: int | None = None,
    patch_size: int | None = None,
    model: str | None = None,
    pretrained: bool = False,
    apply: Literal["drop"] | None = None,
    seed: int = 0,
    device: str | None = None,
) -> list[Backbone]:
    """Load all backbones before anything is measured, so that a wrong one is told at once.

    Args:
        sources: runs, files of weights, or names of timm models.
        image_size: pixels of a side; None is each one's own.
        patch_size: pixels of a patch's side; None is each one's own.
        model: timm's name of what files from elsewhere hold; None finds out.
        pretrained: take timm's weights of named models.
        apply: how masks are applied; None is as in the run.
        seed: of random weights.
        device: where they go; None is an accelerator, if there is one.

    Raises:
        ValueError: no or twice the same source, and what `load_backbone` refuses.
        OSError: likewise.
    """
    from maskdistill.evaluation import load_backbone

    if not sources:
        raise ValueError(
            "give at least one backbone: a run's folder, a file of weights, or a timm model's name."
        )
    if twice := sorted({source for source in sources if sources.count(source) > 1}):
        raise ValueError(f"{twice[0]} is given twice.")
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {where} cannot be used: {reason}") from error
    found = []
    for name, source in zip(_short(sources), sources, strict=True):
        path = Path(source).expanduser()
        named = not path.exists()
        try:
            vit = load_backbone(
                source, image_size=image_size, patch_size=patch_size,
                model=None if named else model, pretrained=pretrained and named, apply=apply,
                seed=seed,
            )  # fmt: skip
        except RuntimeError as error:
            if not named or "pretrained tag" not in str(error):
                raise
            raise ValueError(_no_tag(source)) from None
        trained = pretrained or not named
        found.append(Backbone(name, source, vit.to(where), trained, _settings_of(path)))
    return found


def _no_tag(source: str) -> str:
    import timm

    name, _, tag = source.partition(".")
    known = [full.partition(".")[2] for full in timm.list_models(f"{name}.*", pretrained=True)]
    return f"timm has no weights {tag!r} of {name}; it has {', '.join(known) or 'none'}."


def common_size(backbones: Sequence[Backbone], image_size: int | None) -> int:
    """Return the size of image that all are measured at.

    Raises:
        ValueError: none was given, and they were made for several.
    """
    if image_size is not None:
        return image_size
    sizes = {one.own_size: one.name for one in reversed(backbones)}
    if len(sizes) > 1:
        own = ", ".join(f"{name} for {size}" for size, name in sorted(sizes.items()))
        raise ValueError(
            f"the backbones were made for images of several sizes ({own} pixels); say at which to "
            "compare them, with --image-size."
        )
    return next(iter(sizes))


def _settings_of(path: Path) -> JobConfig | None:
    """Return the settings of the run that a folder or file belongs to, if it belongs to one."""
    from maskdistill.training.config import saved_config

    for folder in (path, path.parent, path.parent.parent):
        files = folder == path or path.is_file()  # only a file is looked for further up
        if files and (folder / "config.json").is_file() and _is_run(folder):
            return saved_config(folder)
    return None


def _is_run(folder: Path) -> bool:
    return (folder / "backbone.safetensors").is_file() or (folder / "checkpoints").is_dir()


def _short(sources: Sequence[str]) -> Iterator[str]:
    """Yield the last part of each path, and as many before it as tell them apart."""
    parts = [os.fspath(source).rstrip("/").split("/") for source in sources]
    for own in parts:
        count = 1
        while count < len(own) and sum(p[-count:] == own[-count:] for p in parts) > 1:
            count += 1
        yield "/".join(own[-count:])
