"""The runs of a study's grid: what each is to do, where, and whether it was begun otherwise."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from maskdistill.comparing.one_run import Order, read_json
from maskdistill.comparing.study import Cell, Study
from maskdistill.job_images import open_images
from maskdistill.training.checkpoint import checkpoint_files

RUNS = "runs"
CELL = "cell.json"
# These change where and how fast a run computes, and its result by rounding alone.
_FREE = {
    "out", "resume", "auto_resume", "device", "workers", "views", "log_every", "checkpoint_every",
    "keep_checkpoints", "milestone_every", "accumulate", "compile", "sharding", "data", "shards",
    "val_shards", "health_every", "max_damaged", "knn_train", "knn_val", "evaluations", "wandb",
}  # fmt: skip


def folder_of(out: Path, cell: Cell) -> Path:
    """Return the folder of a run of a study in ``out``."""
    return out / RUNS / cell.name


def orders(study: Study, images: str = "") -> dict[Cell, Order]:
    """Return what is to be done for each run of a study.

    Args:
        study: whose runs.
        images: what tells its data from others, as `data_identity` does.
    """
    return {
        cell: Order(
            *study.recipe(cell.policy, cell.seed),
            tuple(study.measures),
            random_weights=cell.policy == study.baseline,
            images=images,
        )
        for cell in study.cells()
    }


def data_identity(study: Study) -> str:
    """Return what tells a study's images from others, wherever they lie: their classes, in order.

    Raises:
        ValueError: data that cannot be read.
        OSError: a file that is not there.
    """
    if not study.real:
        return ""  # the scenes are all in the settings
    cell = study.cells()[0]
    images, _ = open_images(study.config(cell.policy, cell.seed))
    hashed = hashlib.sha256()
    for labels in (images.train_labels, images.val_labels):
        hashed.update(f"{len(labels)} ".encode() + np.asarray(labels, dtype="<i8").tobytes())
    return hashed.hexdigest()[:16]


def check_unchanged(study: Study, out: Path, images: str | None = None) -> None:
    """Refuse a study whose runs in ``out`` were begun with other settings.

    A run that ended before it had a checkpoint was not begun.

    Args:
        study: whose runs.
        out: its folder.
        images: what tells its data from others; None does not compare that.

    Raises:
        ValueError: names what was different, of the first such run.
    """
    for cell, order in orders(study, images or "").items():
        folder = folder_of(out, cell)
        path = folder / CELL
        begun = checkpoint_files(folder) or (folder / "summary.json").exists()
        if not path.is_file() or not begun:
            continue
        was, now = read_json(path), identity(order)
        if not was:
            raise ValueError(f"{path} is damaged. Remove {folder} to do it anew.")
        if images is None:
            now.pop("images")
        changed = [
            f"{name} was {was.get(name)!r} and is {now[name]!r}"
            for name in now
            if was.get(name) != now[name]
        ]
        if changed:
            raise ValueError(
                f"the run in {folder} was begun with other settings: {'; '.join(changed)}. Choose "
                "another folder by --out, or remove that one to do it anew."
            )


def identity(order: Order) -> dict[str, Any]:
    """Return what a run must agree on with an earlier one in its folder, as JSON knows it."""
    values = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(order.config).items()
        if name not in _FREE
    }
    # The policy is what is drawn, however the settings put it; data may be moved.
    for name in ("policy", "masker", "preset"):
        values.pop(name)
    return {**values, "policy": repr(order.policy), "images": order.images}
