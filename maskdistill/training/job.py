"""The main job: train under a policy, judge the result, plot it, write it all down."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import errno
import inspect
import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

import maskdistill
from maskdistill import plotting, presets
from maskdistill.data import (
    DataSplits,
    Scenes,
    derive_seed,
    normalize,
    open_data,
    open_shards,
    resize_for_evaluation,
)
from maskdistill.data.writing import write_durably
from maskdistill.evaluation.judge import (
    JobImages,
    Judge,
    forget_attention,
    read_attention,
    save_attention,
)
from maskdistill.masking.parsing import parse_cell
from maskdistill.models import MaskedViT
from maskdistill.models.backbones import backbone_arguments
from maskdistill.objectives import parse_objective
from maskdistill.policies import POLICIES, ViewPolicy
from maskdistill.training.checkpoint import (
    CheckpointError,
    FoundCheckpoint,
    choose_folder,
    hold_folder,
)
from maskdistill.training.config import (
    MINI_IMAGENET,
    SCENES,
    DataSettings,
    JobConfig,
    TrainingConfig,
    saved_config,
)
from maskdistill.training.distributed import Agreement, gathered, restarts, start_processes
from maskdistill.training.logging import read_metrics, warnings_kept
from maskdistill.training.trainer import Trainer

__all__ = ["MINI_IMAGENET", "SCENES", "JobConfig", "open_images", "run_job", "saved_config"]


def open_images(settings: DataSettings, image_size: int) -> tuple[JobImages, Any]:
    """Return the images to judge with, and what the trainer takes: the same, or shards.

    Args:
        settings: where images come from.
        image_size: pixels of a side of built-in scenes, if it is those.

    Raises:
        ValueError: data that cannot be read, shards without classes.
        OSError: a file that is not there.
    """
    if settings.shards is not None:
        return _shards(settings, settings.shards)
    if settings.data is not None:
        images = _data(settings, settings.data)
    else:
        images = _scenes(settings.scenes, image_size)
    return images, images.train


def _scenes(count: int, size: int) -> JobImages:
    train = Scenes(count, size, split="train", seed=0)
    val = Scenes(max(count // 5, 1), size, split="val", seed=0)
    note = (
        f"No --data was given, so this run uses built-in scenes: {len(train)} generated images "
        f"of {len(train.classes)} kinds of object, and {len(val)} for evaluation. They show "
        "that everything works and are no substitute for real images. Pass real data with "
        "--data PATH: mini-ImageNet as CSV lists, class folders, parquet files, pickle caches "
        "or a pack."
    )
    return JobImages(train, val, train.labels, val.labels, val.masks, note)


def _data(settings: DataSettings, path: Path) -> JobImages:
    data: DataSplits = open_data(
        path,
        settings.data_format,
        allow_pickle=settings.allow_pickle,
        max_damaged=settings.max_damaged,
    )
    note = (
        f"{data.path}: read as {data.format}; {len(data.train)} training and {len(data.val)} "
        f"validation images of {len(data.classes)} classes. {data.note}"
    )
    return JobImages(data.train, data.val, data.train.labels, data.val.labels, None, note)


def _shards(settings: DataSettings, where: str) -> tuple[JobImages, Any]:
    training = open_shards(where, max_damaged=settings.max_damaged)
    held_out = settings.val_shards
    if held_out is None and not Path(where).expanduser().is_dir():
        raise ValueError(
            f"{where} names shards to train on, but none to evaluate with. Give them by "
            "--val-shards, or the folder that maskdistill pack --shards made."
        )
    validation = open_shards(held_out or where, split="val", max_damaged=settings.max_damaged)
    # What k-NN votes with must be at hand in any order: the first images are kept, encoded.
    train, val = training.load(settings.knn_train), validation.load(settings.knn_val)
    for images, place in ((train, where), (val, held_out or where)):
        if np.any(images.labels < 0):
            raise ValueError(
                f"shards in {place} hold images without a class (.cls), which k-NN needs. Train on "
                "them by the Trainer in Python, with an evaluation of your own or none."
            )
    note = (
        f"{where}: {len(training):,} training images in {len(training.urls)} shards, which stream; "
        f"{len(train)} of them and {len(val)} validation images are kept for k-NN."
    )
    return JobImages(train, val, train.labels, val.labels, None, note), training


def run_job(config: JobConfig, policy: ViewPolicy | None = None) -> dict[str, Any]:
    """Train, evaluate before, during and after, and write everything into one folder.

    >>> summary = run_job(JobConfig(image_size=48, patch_size=8, epochs=1))  # doctest: +SKIP
    >>> summary["knn"] > summary["knn_random_init"]  # doctest: +SKIP
    True

    Everything is checked before anything is written, but whether Weights & Biases, where it is
    asked for, lets a run begin: that shows with the first step. The folder then holds
    ``config.json``, ``metrics.jsonl``, TensorBoard events, ``checkpoints/``, ``attention/``,
    ``backbone.safetensors``, ``masks.png``, ``attention.png``, ``attention_strip.png``,
    ``curves.png`` and ``summary.json``. Started again by ``torchrun --max-restarts``, it goes on
    with the run that it had begun.

    Args:
        config: all settings.
        policy: in the place of the one that ``config.policy``, ``masker`` or ``preset`` name.

    Returns:
        The content of ``summary.json``; nothing in other processes than the first.

    Raises:
        ValueError: settings that cannot work, data that cannot be read.
        OSError: a folder that cannot be written or is in use, a file that is not there.
        ImportError: matplotlib is missing, which plots the pictures.
        TrainingInterrupted: a signal stopped it, and the run is saved.
    """
    _check_plotting()
    if policy is None:
        config, policy = recipe(config)
    processes = start_processes(config.device)
    agreement = Agreement(processes)
    restart = any(count for (count,) in agreement.gather([restarts()]))
    out, resuming = agreement.by_main(
        lambda: choose_folder(
            config.out,
            f"dino-{config.preset or config.policy}-seed{config.seed}",
            resume=config.resume,
            auto_resume=config.auto_resume,
            restart=restart,
        )
    )
    images, training = open_images(config, config.image_size)
    trainer = Trainer(config, training, policy, processes=processes)
    found = trainer.check_resumable(out) if resuming else None
    judge = Judge(
        images,
        config.image_size,
        knn_train=config.knn_train,
        knn_val=config.knn_val,
        agreement=agreement,
    )
    say = print if processes.is_main else _say_nothing

    say(images.note)
    say(f"\n{policy}\n")
    if isinstance(policy, presets.Preset) and (note := objective_note(policy, trainer.config)):
        say(f"{note}\n")
    say(
        f"{config.model}, {config.image_size} px in patches of {config.patch_size}, masks by "
        f"{config.apply}; objective {trainer.config.objective}; {trainer.total_steps} steps of "
        f"{config.batch_size} images on {processes.device}; writing to {out}"
    )
    if found:
        say(found.describe(trainer.total_steps))
    with contextlib.ExitStack() as stack:
        agreement.by_main(lambda: stack.enter_context(hold_folder(out)))
        stack.enter_context(warnings_kept(out))
        stack.enter_context(_room_needed(out))
        return _train_and_judge(config, policy, images, trainer, judge, out, found)


def objective_note(preset: presets.Preset, config: TrainingConfig) -> str:
    """Return a sentence where the objective of a run is not the preset's own, else nothing."""
    asked = config.objective or preset.trainable
    if parse_objective(asked) != parse_objective(preset.trainable):
        return (
            f"{preset.title}'s own objective is {' + '.join(preset.objectives)}; this is {asked}."
        )
    if preset.untrained:
        return (
            f"{preset.title}'s objective has {' and '.join(preset.untrained)} besides, which this "
            "library has not."
        )
    return ""


def _train_and_judge(
    config: JobConfig,
    policy: ViewPolicy,
    images: JobImages,
    trainer: Trainer,
    judge: Judge,
    out: Path,
    found: FoundCheckpoint | None,
) -> dict[str, Any]:
    processes = trainer.processes
    say = print if processes.is_main else _say_nothing
    settings = _plain(dataclasses.asdict(trainer.config))
    if config.data is not None:  # so that the run can be resumed from another folder
        settings["data"] = str(config.data.absolute())
    settings["policy_used"] = repr(policy)  # which may be none that the settings can name
    trainer.agreement.by_main(lambda: _write_json(out / "config.json", settings))
    # In all processes: each embeds its share, and sharded weights need all of them.
    start, before = judge.start(trainer.teacher.backbone)
    say(
        f"before training: k-NN {start['knn_random_init']:.1%} with random weights, "
        f"{start['knn_raw_pixels']:.1%} with raw pixels"
    )
    figure = _masks_figure(trainer, images, policy)
    if processes.is_main:
        figure.savefig(out / "masks.png")
        forget_attention(out, found.step if found else None)
    shown = judge.pixels(judge.shown)
    by_main = trainer.agreement.by_main
    if before is not None:
        by_main(lambda: save_attention(out, 0, before, shown))

    def evaluate(vit: MaskedViT) -> dict[str, float]:
        values, attention = judge.evaluate(vit), judge.attention(vit)
        if attention is not None:
            by_main(lambda: save_attention(out, trainer.step, attention, shown))
        return values

    # A very short run is no place for many evaluations, which take longer than its training.
    every = max(trainer.total_steps // (config.evaluations + 1), 100)
    report = trainer.fit(
        out,
        resume=found or False,
        evaluate=evaluate,
        evaluate_every=every if config.evaluations else None,
    )
    vit = trainer.teacher.backbone
    assert report.evaluation is not None
    end, after = judge.end(vit)
    weights = gathered(vit.backbone.state_dict())
    if not processes.is_main:
        return {}

    summary: dict[str, Any] = {
        **start,
        **end,
        **report.evaluation,
        "knn_20": report.evaluation["knn"],
        "steps": report.steps,
        "images_per_second": report.images_per_second,
        "training_seconds": report.seconds,
        "preset": config.preset,
        "policy": _policy_name(config, policy),
        "masker": "NoMasker()" if policy == ViewPolicy.none() else _maskers(policy),
        "apply": config.apply,
        "objective": trainer.config.objective,
        "model": config.model,
        "data": str(config.data or config.shards or "built-in scenes"),
        "knn_train_images": len(judge.rows["train"]),
        "knn_val_images": len(judge.rows["val"]),
        "seed": config.seed,
        "device": str(processes.device),
        "processes": processes.world,
        "versions": {
            "maskdistill": maskdistill.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    _save_backbone(weights, trainer.config, out / "backbone.safetensors")
    _plot_results(out, trainer, judge, before, after, summary)
    _write_json(out / "summary.json", summary)
    say(_verdict(summary, out))
    return summary


@contextlib.contextmanager
def _room_needed(out: Path) -> Iterator[None]:
    """Say of a full disk which folder is meant, and what to do."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if not full or isinstance(error, CheckpointError):
            raise
        raise OSError(
            error.errno,
            f"no room left while writing into {out} ({error.strerror}). Make room, then run the "
            "same command with --auto-resume",
        ) from error


def _check_plotting() -> None:
    """Raise what the first picture would, before there is anything that it could spoil."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"the main job plots pictures by matplotlib, which cannot be imported ({error}): "
            'pip install "maskdistill[train]".'
        ) from error


def recipe(config: JobConfig) -> tuple[JobConfig, ViewPolicy]:
    """Return the policy that the settings name, and the settings with its application.

    Raises:
        ValueError: an unknown preset, or one that this trainer cannot run.
    """
    if config.preset is None:
        return config, POLICIES[config.policy](parse_cell(config.masker))
    build = presets.ALL.get(config.preset)
    if build is None:
        close = difflib.get_close_matches(config.preset, presets.NAMES, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ValueError(
            f"unknown preset {config.preset!r}.{hint} Known: {', '.join(presets.NAMES)}."
        )
    wanted = [p.name for p in inspect.signature(build).parameters.values() if p.default is p.empty]
    if wanted:
        raise ValueError(
            f"the preset {config.preset} needs a {wanted[0]}, which a command line cannot give: "
            f"call presets.{config.preset}({wanted[0]}) in Python."
        )
    preset = build()
    if preset.global_crops != 2:
        raise ValueError(
            f"{preset.title} has one view of an image, and DINO two global ones. Take its masks "
            f'alone: --policy asymmetric --masker "{_maskers(preset)}" --apply {preset.apply}.'
        )
    plain = {field.name: field.default for field in dataclasses.fields(JobConfig)}
    for name, own in (("policy", None), ("masker", None), ("apply", preset.apply)):
        if getattr(config, name) not in (plain[name], own):
            raise ValueError(
                f"--preset {config.preset} says policy, masker and apply itself; leave out "
                f"--{name}, or the preset."
            )
    return dataclasses.replace(config, apply=preset.apply), preset


def _policy_name(config: JobConfig, policy: ViewPolicy) -> str:
    """Return the name that the settings have for a policy, or all of one that they do not name."""
    if config.preset is not None:
        return "preset"
    named = POLICIES[config.policy](parse_cell(config.masker))
    return config.policy if policy == named else repr(policy)


def _maskers(policy: ViewPolicy) -> str:
    return ", ".join(map(repr, policy.maskers))


def _masks_figure(trainer: Trainer, images: JobImages, policy: ViewPolicy) -> Any:
    """Plot the views of the first training image as the policy's first step would mask them."""
    image = images.train[0][0]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(trainer.config.seed, "picture 1"))
        views = trainer.transform(image)
    crops = [crop[None] for crop in views.images]
    signals: dict[str, Any] = {}
    vit = trainer.teacher.backbone
    if "attention" in policy.needs:
        device = trainer.processes.device
        signals["attention"] = [
            vit.attention(normalize(crop.to(device))).cpu() for crop in crops[: policy.global_crops]
        ]
    masks = policy(
        crops,
        vit.patch_size,
        generator=torch.Generator().manual_seed(derive_seed(trainer.config.seed, "picture masks")),
        boxes=views.boxes[None],
        flipped=views.flipped[None],
        **signals,
    )
    whole = resize_for_evaluation(image, trainer.config.image_size, crop=False)
    return plotting.plot_view_masks(
        whole, crops, masks, policy, trainer.config.patch_size, boxes=views.boxes[None]
    )


def _plot_results(
    out: Path,
    trainer: Trainer,
    judge: Judge,
    before: Tensor | None,
    after: Tensor | None,
    summary: dict[str, Any],
) -> None:
    if before is not None and after is not None:
        masks = judge.images.val_masks
        objects = None if masks is None else torch.from_numpy(masks[judge.shown])
        grid = trainer.teacher.backbone.grid(judge.size, judge.size)
        plotting.plot_attention(
            judge.pixels(judge.shown), {"before": before, "after": after}, grid, objects
        ).savefig(out / "attention.png")
        plotting.plot_attention_strip(*read_attention(out), grid, objects).savefig(
            out / "attention_strip.png"
        )
    floors = {
        "random weights": summary["knn_random_init"],
        "raw pixels": summary["knn_raw_pixels"],
    }
    metrics = [{"step": 0, "knn": summary["knn_random_init"]}]
    metrics += read_metrics(out / "metrics.jsonl")
    uniform = float(np.log(trainer.config.out_dim or 1))
    plotting.plot_curves(metrics, floors, uniform).savefig(out / "curves.png")


def _save_backbone(weights: dict[str, Tensor], config: TrainingConfig, path: Path) -> None:
    """Write the teacher's backbone in timm's own layout."""
    arguments = backbone_arguments(
        config.model, config.image_size, config.patch_size, config.depth, config.local_size
    )
    state = {name: tensor.contiguous().cpu() for name, tensor in weights.items()}
    write_durably(save(state, metadata={"timm.create_model": json.dumps(arguments)}), path)


def _verdict(summary: dict[str, Any], out: Path) -> str:
    lines = [
        f"k-NN accuracy {summary['knn']:.1%} after {summary['steps']} steps "
        f"(random weights {summary['knn_random_init']:.1%}, raw pixels "
        f"{summary['knn_raw_pixels']:.1%})"
    ]
    if "attention_jaccard" in summary:
        lines.append(
            f"attention on the object (Jaccard, best head) "
            f"{summary['attention_jaccard']['best_head']:.3f} "
            f"(random weights {summary['attention_jaccard_random_init']['best_head']:.3f})"
        )
    lines.append(f"{summary['images_per_second']:.0f} images/s; all of it is in {out}")
    return "\n".join(lines)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {name: str(v) if isinstance(v, Path) else v for name, v in values.items()}


def _write_json(path: Path, values: dict[str, Any]) -> None:
    write_durably(json.dumps(values, indent=2) + "\n", path)


def _say_nothing(*values: object) -> None:
    """Stand in for print in all processes but the first."""
