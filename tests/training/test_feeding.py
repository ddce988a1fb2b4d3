"""Wherever crops come from, a run is the same and goes on where it stopped."""

from __future__ import annotations

import os
import shutil
import signal
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import maskdistill as md
from maskdistill.data import DamagedDataError, DamagedImageWarning, open_shards, pack_shards
from maskdistill.data.loading import DoesNotFitError, ResidentImages
from maskdistill.training import Trainer, TrainingConfig, TrainingInterrupted
from maskdistill.training import trainer as feeding_module
from maskdistill.training.distributed import Processes
from maskdistill.training.job import JobConfig, open_images, run_job
from tests.training.conftest import TINY, Noise, assert_same, weights
from tests.training.test_interruption import terminate, within_step

Build = Callable[..., Trainer]


def fit(trainer: Trainer, out: Path, **kwargs: Any) -> Trainer:
    trainer.fit(out, progress_bar=False, **kwargs)
    return trainer


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty small images of two classes, in five shards and one for validation."""
    folder = tmp_path_factory.mktemp("shards")
    random = np.random.RandomState(0)
    for i in range(48):
        path = folder / "images" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.randint(0, 255, (20, 20, 3)).astype(np.uint8)).save(path)
    pack_shards(folder / "images", folder / "packed", 5, workers=0)
    return folder / "packed"


def test_views_from_memory_are_those_of_workers(build: Build, tmp_path: Path) -> None:
    a = fit(build(views="workers", workers=2, max_steps=5), tmp_path / "a")
    b = fit(build(views="device", max_steps=5), tmp_path / "b")
    assert_same(weights(a), weights(b))


def test_what_was_asked_for_and_does_not_fit_is_refused(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise DoesNotFitError("18 images take more than they may")

    with monkeypatch.context() as patch:
        patch.setattr(feeding_module, "ResidentImages", full)
        with pytest.raises(ValueError, match="more than they may"):
            fit(build(views="device", max_steps=2), tmp_path)
    fit(build(views="workers", max_steps=2), tmp_path, resume=True)


def on_a_gpu(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch, free: int, others: int
) -> ResidentImages | None:
    """What the feed keeps there, if so many bytes are free on it and on another process's."""
    feed = trainer.feed

    def resident(images: Any, device: torch.device, **options: Any) -> ResidentImages:
        assert device.type == "cuda"
        return ResidentImages(images, "cpu", **options)

    def gather(values: list[float]) -> list[list[float]]:
        return [values, [others]]

    with monkeypatch.context() as patch:
        patch.setattr(feeding_module, "ResidentImages", resident)
        patch.setattr(feeding_module, "free_memory", lambda device: free)
        patch.setattr(feed._agreement, "gather", gather)
        patch.setattr(feed, "processes", Processes(0, 2, torch.device("cuda")))
        return feed._resident_images()


def test_auto_takes_a_quarter_of_the_fullest_device(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = len(Noise()) * 24 * 24 * 3
    for mine, others, fits in ((4, 4, True), (4, 3.99, False), (3.99, 4, False), (9, 5, True)):
        free = [round(share * size) for share in (mine, others)]
        kept = on_a_gpu(build(views="auto"), monkeypatch, *free)
        assert (kept is not None) == fits, (mine, others)
    # What is asked for may take half of what is free, as ResidentImages says.
    assert on_a_gpu(build(views="device"), monkeypatch, 0, 0) is not None
    assert on_a_gpu(build(views="workers"), monkeypatch, 9 * size, 9 * size) is None


class Counted(Noise):
    """Counts how often an image is read; may interrupt its reader."""

    def __init__(self, interrupted_at: int = -1) -> None:
        super().__init__()
        self.read, self.interrupted_at = 0, interrupted_at

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        self.read += 1
        if self.read == self.interrupted_at:
            signal.raise_signal(signal.SIGINT)
        return super().__getitem__(index)


def test_nothing_is_decoded_before_the_first_step_or_for_none(build: Build, tmp_path: Path) -> None:
    images = Counted()
    trainer = build(data=images, views="device", max_steps=2)
    for _ in trainer.feed.batches(trainer.transform, 2, 2):
        pass
    batches = trainer.feed.batches(trainer.transform, 0, 2)
    assert images.read == 0
    next(batches)
    assert images.read >= len(images)
    whole = fit(trainer, tmp_path)
    again = Counted()
    resumed = build(data=again, views="device", max_steps=2)
    assert_same(weights(fit(resumed, tmp_path, resume=True)), weights(whole))
    assert again.read == 0, "the run was finished"


def test_a_signal_stops_decoding(build: Build, tmp_path: Path) -> None:
    count = len(Noise())
    images = Counted(interrupted_at=count + 5)  # it looks at all of so few beforehand
    trainer = build(data=images, views="device", max_steps=2)
    with pytest.raises(TrainingInterrupted, match="after step 0 of 2"):
        fit(trainer, tmp_path)
    assert images.read == count + 5
    resumed = fit(build(views="workers", max_steps=2), tmp_path, resume=True)
    assert_same(weights(resumed), weights(fit(build(max_steps=2), tmp_path / "whole")))


def of_shards(folder: Path, **changes: Any) -> Trainer:
    settings = {**TINY, "batch_size": 2, "epochs": 2, **changes}
    policy = md.AsymmetricMaskPolicy(md.RandomMasker(0.5))
    return Trainer(TrainingConfig(**settings), open_shards(folder), policy)


def test_shards_stream_and_resume(shards: Path, tmp_path: Path) -> None:
    whole = fit(of_shards(shards, workers=0), tmp_path / "whole")
    assert whole.total_steps == 2 * whole.feed.steps_per_epoch == 32
    with within_step(19, terminate), pytest.raises(TrainingInterrupted):
        fit(of_shards(shards, workers=2), tmp_path / "halves")
    resumed = fit(of_shards(shards, workers=0), tmp_path / "halves", resume=True)
    assert_same(weights(resumed), weights(whole))


def test_shards_and_what_does_not_go_with_them(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shards stream"):
        of_shards(shards, views="device")
    with pytest.raises(ValueError, match="do not fill one batch"):
        of_shards(shards, batch_size=32)
    fit(of_shards(shards, max_steps=1), tmp_path)
    others = open_shards(shards, split="val")
    config = TrainingConfig(**{**TINY, "batch_size": 1, "max_steps": 1})
    trainer = Trainer(config, others, md.AsymmetricMaskPolicy(md.RandomMasker(0.5)))
    with pytest.raises(ValueError, match="images was 40 and is 8"):
        fit(trainer, tmp_path, resume=True)


def test_the_job_takes_shards(shards: Path, tmp_path: Path) -> None:
    settings = {**TINY, "batch_size": 2, "max_steps": 3, "evaluations": 0}
    summary = run_job(JobConfig(**settings, shards=str(shards), out=tmp_path / "run"))
    assert summary["data"] == str(shards)
    assert (summary["knn_train_images"], summary["knn_val_images"]) == (40, 8)
    pattern = str(shards / "train-{000000..000004}.tar")
    with pytest.raises(ValueError, match="none to evaluate with"):
        run_job(JobConfig(**settings, shards=pattern, out=tmp_path / "other"))
    with pytest.raises(ValueError, match="two sources"):
        JobConfig(shards=pattern, data=tmp_path)
    with pytest.raises(ValueError, match="go with shards"):
        JobConfig(val_shards=pattern)


def test_the_job_does_without_a_lost_image(shards: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(shards, tmp_path / "copy")
    shard = copy / "train-000001.tar"
    with tarfile.open(shard) as archive:
        last = archive.getmembers()[-1]
    shard.write_bytes(shard.read_bytes()[: last.offset_data + 100])
    with pytest.warns(DamagedImageWarning, match="train-000001.tar, image 7 .*left out; 1 of"):
        images, _ = open_images(JobConfig(shards=str(copy)), 32)
    assert len(images.train_labels) == len(images.train) == 39  # type: ignore[arg-type]
    assert sorted(set(images.train_labels)) == [0, 1]
    with pytest.raises(DamagedDataError, match="more than max_damaged=0"):
        open_images(JobConfig(shards=str(copy), max_damaged=0), 32)


def test_the_job_needs_classes(shards: Path, tmp_path: Path) -> None:
    for path in shards.glob("*.tar"):
        with tarfile.open(path) as whole, tarfile.open(tmp_path / path.name, "w") as part:
            for member in whole:
                if not member.name.endswith(".cls"):
                    part.addfile(member, whole.extractfile(member))
    for path in shards.glob("*.json"):
        shutil.copy(path, tmp_path)
    with pytest.raises(ValueError, match="hold images without a class"):
        open_images(JobConfig(shards=str(tmp_path)), 32)


def test_processes_share_the_cores(monkeypatch: pytest.MonkeyPatch, build: Build) -> None:
    def allow(cores: int) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)

    allow(64)
    feed = build(workers=None).feed
    assert feed.workers == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert feed.workers == 3
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    allow(2)
    assert feed.workers == 1, "the machine's other cores are not ours"
    assert len(Noise()) == feed.count
