"""A job's images: from a folder or file, from shards, or the built-in scenes."""

# ruff: noqa: D102  (the settings are documented where they stand)

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np

from maskdistill.data import DataSplits, Scenes, open_data, open_shards
from maskdistill.judge import JobImages


class Source(Protocol):
    """The settings that say where images come from; ``JobConfig`` has them."""

    @property
    def data(self) -> Path | None: ...
    @property
    def data_format(self) -> str: ...
    @property
    def allow_pickle(self) -> bool: ...
    @property
    def shards(self) -> str | None: ...
    @property
    def val_shards(self) -> str | None: ...
    @property
    def max_damaged(self) -> int: ...
    @property
    def scenes(self) -> int: ...
    @property
    def image_size(self) -> int: ...
    @property
    def knn_train(self) -> int: ...
    @property
    def knn_val(self) -> int: ...


def open_images(source: Source) -> tuple[JobImages, Any]:
    """Return the images to judge with, and what the trainer takes: the same, or shards.

    Raises:
        ValueError: data that cannot be read, shards without classes.
        OSError: a file that is not there.
    """
    if source.shards is not None:
        return _shards(source, source.shards)
    images = _scenes(source) if source.data is None else _data(source, source.data)
    return images, images.train


def _scenes(source: Source) -> JobImages:
    train = Scenes(source.scenes, source.image_size, split="train", seed=0)
    val = Scenes(max(source.scenes // 5, 1), source.image_size, split="val", seed=0)
    note = (
        f"No --data was given, so this run uses built-in scenes: {len(train)} generated images "
        f"of {len(train.classes)} kinds of object, and {len(val)} for evaluation. They show "
        "that everything works and are no substitute for real images. Pass real data with "
        "--data PATH: mini-ImageNet as CSV lists, class folders, parquet files, pickle caches "
        "or a pack."
    )
    return JobImages(train, val, train.labels, val.labels, val.masks, note)


def _data(source: Source, path: Path) -> JobImages:
    data: DataSplits = open_data(
        path,
        source.data_format,
        allow_pickle=source.allow_pickle,
        max_damaged=source.max_damaged,
    )
    note = (
        f"{data.path}: read as {data.format}; {len(data.train)} training and {len(data.val)} "
        f"validation images of {len(data.classes)} classes. {data.note}"
    )
    return JobImages(data.train, data.val, data.train.labels, data.val.labels, None, note)


def _shards(source: Source, where: str) -> tuple[JobImages, Any]:
    training = open_shards(where, max_damaged=source.max_damaged)
    held_out = source.val_shards
    if held_out is None and not Path(where).expanduser().is_dir():
        raise ValueError(
            f"{where} names shards to train on, but none to evaluate with. Give them by "
            "--val-shards, or the folder that maskdistill pack --shards made."
        )
    validation = open_shards(held_out or where, split="val", max_damaged=source.max_damaged)
    # What k-NN votes with must be at hand in any order: the first images are kept, encoded.
    train, val = training.load(source.knn_train), validation.load(source.knn_val)
    for images, of in ((train, where), (val, held_out or where)):
        if np.any(images.labels < 0):
            raise ValueError(
                f"shards in {of} hold images without a class (.cls), which k-NN needs. Train on "
                "them by the Trainer in Python, with an evaluation of your own or none."
            )
    note = (
        f"{where}: {len(training):,} training images in {len(training.urls)} shards, which stream; "
        f"{len(train)} of them and {len(val)} validation images are kept for k-NN."
    )
    return JobImages(train, val, train.labels, val.labels, None, note), training
