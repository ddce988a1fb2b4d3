"""The main job: train under a policy, judge the result, draw it, write it all down."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset

import maskdistill
from maskdistill import plotting
from maskdistill.data import (
    DataSplits,
    MultiCrop,
    Scenes,
    derive_seed,
    normalize,
    open_data,
    resize_for_evaluation,
)
from maskdistill.evaluation import (
    AttentionJaccard,
    attention_jaccard,
    balanced_indices,
    extract_features,
    knn_accuracy,
    raw_pixels,
)
from maskdistill.masking import parse_masker
from maskdistill.models import MaskedViT, backbone_arguments
from maskdistill.training import Trainer, TrainingConfig
from maskdistill.training.distributed import start_processes
from maskdistill.training.records import read_metrics
from maskdistill.training.trainer import CHECKPOINT
from maskdistill.views import POLICIES, ViewPolicy

_SHOWN = 10
"""Images in attention.png."""

PolicyName = Literal[
    "none", "asymmetric", "symmetric", "student-all-views", "local-only", "teacher-only"
]
DataFormat = Literal["auto", "ravi-csv", "vinyals-csv", "imagefolder", "pickle", "parquet", "pack"]


@dataclass(frozen=True)
class JobConfig(TrainingConfig):
    """Settings of the main job: data, policy and output, and all of the trainer's."""

    data: Path | None = None
    """Folder or file with mini-ImageNet or other images; None uses the built-in scenes."""
    data_format: DataFormat = "auto"
    """Form of the data; auto finds out."""
    allow_pickle: bool = False
    """Read pickle caches, with an unpickler that runs no code."""
    max_damaged: int = 10
    """Damaged images that are reported and skipped before the run stops."""
    scenes: int = 5000
    """Number of built-in scenes to train on, where there is no data."""
    out: Path | None = None
    """Folder for everything the run writes; None is a new folder in runs/."""
    policy: PolicyName = "asymmetric"
    """Which views are masked, for whom."""
    masker: str = "RandomMasker(0.3)"
    """What is hidden, as in Python, for example "BlockMasker(0.4).sometimes(0.5)"."""
    resume: bool = False
    """Go on from the checkpoint in the output folder."""
    evaluations: int = 5
    """Number of k-NN evaluations during training, evenly spread; one more at the end."""
    knn_train: int = 5000
    """Most training images that k-NN votes with."""
    knn_val: int = 2000
    """Most validation images that k-NN classifies."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("scenes", "knn_train", "knn_val"):
            self._require(name, getattr(self, name) >= 1, "must be an int >= 1")
        for name in ("evaluations", "max_damaged"):
            self._require(name, getattr(self, name) >= 0, "must be an int >= 0")


@dataclass(frozen=True)
class _Images:
    """The job's images, and the object masks of the validation images where there are any."""

    train: Dataset[tuple[Image.Image, int]]
    val: Dataset[tuple[Image.Image, int]]
    train_labels: NDArray[np.int64]
    val_labels: NDArray[np.int64]
    val_masks: NDArray[np.bool_] | None
    note: str


def run_job(config: JobConfig) -> dict[str, Any]:
    """Train, evaluate before, during and after, and write everything into one folder.

    >>> summary = run_job(JobConfig(image_size=48, patch_size=8, epochs=1))  # doctest: +SKIP
    >>> summary["knn"] > summary["knn_random_init"]  # doctest: +SKIP
    True

    Everything is checked before anything is written. The folder then holds ``config.json``,
    ``metrics.jsonl``, TensorBoard events, ``checkpoint.pt``, ``backbone.safetensors``,
    ``masks.png``, ``attention.png``, ``curves.png`` and ``summary.json``.

    Returns:
        The content of ``summary.json``.

    Raises:
        ValueError: settings that cannot work, data that cannot be read.
        OSError: a folder that cannot be written, a file that is not there.
    """
    policy = POLICIES[config.policy](parse_masker(config.masker))
    out = _output_folder(config)
    images = _open_images(config)
    processes = start_processes(config.device)
    trainer = Trainer(config, images.train, policy, processes=processes)
    judge = _Judge(config, images)
    say = print if processes.is_main else _say_nothing

    say(images.note)
    say(f"\n{policy}\n")
    say(
        f"{config.model}, {config.image_size} px in patches of {config.patch_size}, masks by "
        f"{config.apply}; {trainer.total_steps} steps of {config.batch_size} images on "
        f"{processes.device}; writing to {out}"
    )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"the output folder {out} cannot be made: {error}. Choose --out."
        ) from None

    start: dict[str, Any] = {}
    before: Tensor | None = None
    if processes.is_main:
        _write_json(out / "config.json", _plain(dataclasses.asdict(trainer.config)))
        start, before = judge.start(trainer.teacher.backbone)
        say(
            f"before training: k-NN {start['knn_random_init']:.1%} with random weights, "
            f"{start['knn_raw_pixels']:.1%} with raw pixels"
        )
        figure = _masks_figure(trainer, images, policy)
        figure.savefig(out / "masks.png")

    every = max(trainer.total_steps // (config.evaluations + 1), 1)
    report = trainer.fit(
        out,
        resume=config.resume,
        evaluate=lambda vit: {"knn": judge.knn(vit)},
        evaluate_every=every if config.evaluations else None,
    )
    if not processes.is_main:
        return {}

    vit = trainer.teacher.backbone
    end, after = judge.end(vit)
    summary: dict[str, Any] = {
        **start,
        **end,
        "steps": report.steps,
        "images_per_second": report.images_per_second,
        "training_seconds": report.seconds,
        "policy": config.policy,
        "masker": config.masker,
        "apply": config.apply,
        "model": config.model,
        "data": "built-in scenes" if config.data is None else str(config.data),
        "knn_train_images": len(judge.train_indices),
        "knn_val_images": len(judge.val_indices),
        "seed": config.seed,
        "device": str(processes.device),
        "processes": processes.world,
        "versions": {
            "maskdistill": maskdistill.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    _save_backbone(vit, trainer.config, out / "backbone.safetensors")
    _append_last(out / "metrics.jsonl", report.steps, {"knn": summary["knn"]})
    _draw(out, trainer, judge, before, after, summary)
    _write_json(out / "summary.json", summary)
    say(_verdict(summary, out))
    return summary


class _Judge:
    """Evaluates a backbone on a fixed choice of images."""

    def __init__(self, config: JobConfig, images: _Images) -> None:
        self.size = config.image_size
        self.images = images
        self.train_indices = balanced_indices(
            torch.from_numpy(images.train_labels), config.knn_train
        )
        self.val_indices = balanced_indices(torch.from_numpy(images.val_labels), config.knn_val)
        self.shown = self._distinct_images()

    def knn(self, vit: MaskedViT) -> float:
        train = extract_features(vit, self.images.train, self.size, indices=self.train_indices)
        val = extract_features(vit, self.images.val, self.size, indices=self.val_indices)
        return knn_accuracy(*train, *val)

    def start(self, vit: MaskedViT) -> tuple[dict[str, Any], Tensor | None]:
        """Return what training has to beat, and the attention to the shown images."""
        pixels = (
            *raw_pixels(self.images.train, self.train_indices),
            *raw_pixels(self.images.val, self.val_indices),
        )
        values: dict[str, Any] = {
            "knn_random_init": self.knn(vit),
            "knn_raw_pixels": knn_accuracy(*pixels),
        }
        jaccard = self.jaccard(vit)
        if jaccard is not None:
            values["attention_jaccard_random_init"] = jaccard._asdict()
        return values, self.attention(vit)

    def end(self, vit: MaskedViT) -> tuple[dict[str, Any], Tensor | None]:
        """Return what training achieved, and the attention to the shown images."""
        values: dict[str, Any] = {"knn": self.knn(vit)}
        jaccard = self.jaccard(vit)
        if jaccard is not None:
            values["attention_jaccard"] = jaccard._asdict()
        return values, self.attention(vit)

    def jaccard(self, vit: MaskedViT) -> AttentionJaccard | None:
        """Compare the attention with the object masks, where the images have them."""
        if self.images.val_masks is None:
            return None
        try:
            maps = [
                vit.attention(self._inputs(part, vit))
                for part in torch.tensor(self.val_indices).split(256)
            ]
        except ValueError:  # a model without a class token
            return None
        masks = torch.from_numpy(self.images.val_masks[self.val_indices])
        grid = vit.grid(self.size, self.size)
        return attention_jaccard(torch.cat(maps).cpu(), masks, grid)

    def attention(self, vit: MaskedViT) -> Tensor | None:
        """Return the attention to the shown images, ``(n, heads, N)``, if the model has any."""
        try:
            return vit.attention(self._inputs(self.shown, vit)).cpu()
        except ValueError:
            return None

    def _inputs(self, indices: Sequence[int] | Tensor, vit: MaskedViT) -> Tensor:
        # The whole image, not its centre: the object masks are of the whole image.
        vit.eval()
        pixels = self.pixels(indices)
        return normalize(pixels.to(next(vit.parameters()).device))

    def pixels(self, indices: Sequence[int] | Tensor) -> Tensor:
        """Return whole images, ``(n, 3, size, size)`` uint8."""
        return torch.stack(
            [
                resize_for_evaluation(self.images.val[int(i)][0], self.size, crop=False)
                for i in indices
            ]
        )

    def _distinct_images(self) -> list[int]:
        """Choose the shown images, one of each of as many classes as are shown."""
        first: dict[int, int] = {}
        for index in self.val_indices:
            first.setdefault(int(self.images.val_labels[index]), index)
        chosen = list(first.values())
        chosen += [index for index in self.val_indices if index not in chosen]
        return chosen[:_SHOWN]


def _open_images(config: JobConfig) -> _Images:
    if config.data is None:
        train = Scenes(config.scenes, config.image_size, split="train", seed=0)
        val = Scenes(max(config.scenes // 5, 1), config.image_size, split="val", seed=0)
        note = (
            f"No --data was given, so this run uses built-in scenes: {len(train)} generated images "
            f"of {len(train.classes)} kinds of object, and {len(val)} for evaluation. They show "
            "that everything works and are no substitute for real images. Pass real data with "
            "--data PATH: mini-ImageNet as CSV lists, class folders, parquet files, pickle caches "
            "or a pack."
        )
        return _Images(train, val, train.labels, val.labels, val.masks, note)
    data: DataSplits = open_data(
        config.data,
        config.data_format,
        allow_pickle=config.allow_pickle,
        max_damaged=config.max_damaged,
    )
    note = (
        f"{data.path}: read as {data.format}; {len(data.train)} training and {len(data.val)} "
        f"validation images of {len(data.classes)} classes. {data.note}"
    )
    return _Images(data.train, data.val, data.train.labels, data.val.labels, None, note)


def _output_folder(config: JobConfig) -> Path:
    """Return the folder to write to, or refuse one that cannot be written or holds a run."""
    if config.out is None:
        if config.resume:
            raise ValueError("--resume needs --out: the folder of the run to go on with.")
        name = f"dino-{config.policy}-seed{config.seed}"
        folder, number = Path("runs") / name, 2
        while folder.exists():
            folder, number = Path("runs") / f"{name}-{number}", number + 1
    else:
        folder = config.out
    if (folder / CHECKPOINT).exists() and not config.resume:
        raise FileExistsError(
            f"{folder} holds a run already. Go on with it by --resume, or choose another --out."
        )
    if config.resume and not (folder / CHECKPOINT).exists():
        raise FileNotFoundError(f"there is no {CHECKPOINT} in {folder} to resume from.")
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "is no folder" if not there.is_dir() else "is not writable"
        raise ValueError(f"cannot write to {folder}: {there} {why}. Choose another --out.")
    return folder


def _masks_figure(trainer: Trainer, images: _Images, policy: ViewPolicy) -> Any:
    """Draw the views of the first training image as the policy's first step would mask them."""
    config = trainer.config
    assert config.local_size is not None
    image = images.train[0][0]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(config.seed, "picture"))
        crops = [
            crop[None]
            for crop in MultiCrop(
                config.image_size,
                config.local_size,
                config.local_crops,
                config.global_scale,
                config.local_scale,
            )(image).images
        ]
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
        generator=torch.Generator().manual_seed(derive_seed(config.seed, "picture masks")),
        **signals,
    )
    whole = resize_for_evaluation(image, config.image_size, crop=False)
    return plotting.plot_view_masks(whole, crops, masks, policy, config.patch_size)


def _draw(
    out: Path,
    trainer: Trainer,
    judge: _Judge,
    before: Tensor | None,
    after: Tensor | None,
    summary: dict[str, Any],
) -> None:
    if before is not None and after is not None:
        masks = judge.images.val_masks
        figure = plotting.plot_attention(
            judge.pixels(judge.shown),
            {"before": before, "after": after},
            trainer.teacher.backbone.grid(judge.size, judge.size),
            None if masks is None else torch.from_numpy(masks[judge.shown]),
        )
        figure.savefig(out / "attention.png")
    floors = {
        "random weights": summary["knn_random_init"],
        "raw pixels": summary["knn_raw_pixels"],
    }
    metrics = [{"step": 0, "knn": summary["knn_random_init"]}]
    metrics += read_metrics(out / "metrics.jsonl")
    uniform = float(np.log(trainer.config.out_dim or 1))
    plotting.plot_curves(metrics, floors, uniform).savefig(out / "curves.png")


def _append_last(path: Path, step: int, values: dict[str, float]) -> None:
    with path.open("a") as file:
        file.write(json.dumps({"step": step, **values}) + "\n")


def _save_backbone(vit: MaskedViT, config: TrainingConfig, path: Path) -> None:
    """Write the teacher's backbone in timm's own layout."""
    arguments = backbone_arguments(config.model, config.image_size, config.patch_size, config.depth)
    state = {name: tensor.contiguous().cpu() for name, tensor in vit.backbone.state_dict().items()}
    save_file(state, str(path), metadata={"timm.create_model": json.dumps(arguments)})


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
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(values, indent=2) + "\n")
    temporary.replace(path)


def _say_nothing(*values: object) -> None:
    """Stand in for print in all processes but the first."""
