"""Wherever crops come from, a run is the same and goes on where it stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import maskdistill as md
from maskdistill.data import open_shards, pack_shards
from maskdistill.data.resident import DoesNotFitError
from maskdistill.job import JobConfig, run_job
from maskdistill.training import Trainer, TrainingConfig, TrainingInterrupted
from maskdistill.training import feeding as feeding_module
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


def test_what_does_not_fit_comes_from_workers(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise DoesNotFitError("18 images take more than they may")

    monkeypatch.setattr(feeding_module, "ResidentImages", full)
    with pytest.raises(ValueError, match="more than they may"):
        fit(build(views="device", max_steps=2), tmp_path / "a")
    trainer = build(views="auto", max_steps=2)
    # As on a GPU, where auto tries the device first.
    object.__setattr__(trainer.feed.processes, "device", torch.device("cuda"))
    assert trainer.feed._resident_images() is None


def of_shards(folder: Path, **changes: Any) -> Trainer:
    settings = {**TINY, "batch_size": 2, "epochs": 2, **changes}
    policy = md.AsymmetricMaskPolicy(md.RandomMasker(0.5))
    return Trainer(TrainingConfig(**settings), open_shards(folder), policy)


def test_shards_stream_and_resume(shards: Path, tmp_path: Path) -> None:
    whole = fit(of_shards(shards, workers=0), tmp_path / "whole")
    assert whole.total_steps == 2 * whole.feed.steps_per_epoch == 32
    assert_same(weights(fit(of_shards(shards, workers=2), tmp_path / "two")), weights(whole))
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


def test_processes_share_the_cores(monkeypatch: pytest.MonkeyPatch, build: Build) -> None:
    monkeypatch.setattr(feeding_module.os, "cpu_count", lambda: 64)
    feed = build(workers=None).feed
    assert feed.workers == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert feed.workers == 3
    assert len(Noise()) == feed.count
