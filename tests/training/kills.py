"""Kills a short run at random moments, and lets it go on, until so many kills are done.

    python -m tests.training.kills FOLDER --kills 20 --seed 0 [--workers 2]

Half of the kills come after a random time, the others in the middle of writing a checkpoint. Each
run is killed up to four times and then ends in peace; its weights are compared with those of the
run that nobody kills. Prints one line of JSON with what was seen, and fails where a run ends
otherwise or has lost more than its last interval. One warm process forks the runs, so that a start
costs milliseconds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import mmap
import os
import random
import shutil
import signal
import struct
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter  # noqa: F401  # imported once, before the forks

import maskdistill as md
from maskdistill.training import Trainer, TrainingConfig, checkpoint
from maskdistill.training.checkpoint import checkpoint_files, latest_checkpoint
from maskdistill.training.logging import read_metrics
from tests.training.conftest import TINY, Noise
from tests.training.forking import KILLED, die, fork, in_fork, wait

EVERY = 3
CHANGES = {"epochs": 3, "checkpoint_every": EVERY, "drop_path": 0.3, "log_every": 4, "depth": 1}
MASKS = md.AsymmetricMaskPolicy(md.RandomMasker(md.Uniform(0.1, 0.7)).sometimes(0.5))


class Runs:
    """The runs of one session, and the number of finished steps that a running one reports."""

    def __init__(self, folder: Path, workers: int) -> None:
        torch.set_num_threads(1)
        self.folder, self._steps = folder, mmap.mmap(-1, 8)
        config = TrainingConfig(**{**TINY, **CHANGES, "workers": workers})
        self._trainer = Trainer(config, Noise(), MASKS)  # each child has a fresh copy

    @property
    def steps(self) -> int:
        """Steps that the run had finished when it was killed."""
        return int(struct.unpack("q", self._steps[:8])[0])

    def train(self, out: Path, sabotage: Callable[[], None] | None = None) -> None:
        """Train or go on, in a child."""
        trainer = self._trainer
        real = trainer._run_step

        def reporting(crops: Any) -> Any:
            self._steps[:8] = struct.pack("q", trainer.step)
            return real(crops)

        trainer._run_step = reporting  # type: ignore[method-assign]
        if sabotage:
            sabotage()
        trainer.fit(out, resume=bool(checkpoint_files(out)), progress_bar=False)


def die_while_writing(which: int, size: int) -> None:
    """Be killed within the next but ``which`` checkpoint, when ``size`` bytes of it are written.

    If it has fewer, that is between writing and renaming it.
    """
    real, saves = checkpoint.torch.save, iter(range(which + 1))

    def dying(content: Any, file: Any) -> None:
        if next(saves) < which:
            real(content, file)
            return
        stop, write = size, file.write

        def limited(data: Any) -> int:
            nonlocal stop
            data = bytes(data)
            if len(data) > stop:
                write(data[:stop])
                file._file.flush()
                die()
            stop -= len(data)
            return int(write(data))

        file.write = limited
        real(content, file)
        die()

    checkpoint.torch.save = dying


def outcome(out: Path) -> tuple[str, list[dict[str, Any]]]:
    """Return a digest of all tensors of the last checkpoint, and the metrics but for times."""
    found = latest_checkpoint(out)
    assert not found.skipped, found.skipped
    digest = hashlib.sha256()
    for role in ("student", "teacher", "objective"):
        for name, value in sorted(found.content[role].items()):
            digest.update(name.encode() + value.contiguous().numpy().tobytes())
    for state in found.content["optimizer"]["state"].values():
        for name in ("exp_avg", "exp_avg_sq"):
            digest.update(state[name].contiguous().numpy().tobytes())
    lines = read_metrics(out / "metrics.jsonl")
    for line in lines:
        line.pop("images_per_second")
    return digest.hexdigest(), lines


def kill_runs(folder: Path, kills: int, seed: int, workers: int) -> dict[str, Any]:
    """Kill so many times, and return what was seen."""
    runs, draw = Runs(folder, workers), random.Random(seed)
    whole = folder / "whole"
    begin = time.monotonic()
    assert in_fork(lambda: runs.train(whole)) == 0
    duration = time.monotonic() - begin
    expected, total = outcome(whole), latest_checkpoint(whole).step
    seen: dict[str, Any] = {
        "kills": 0,
        "writing": 0,
        "runs": 0,
        "lost": 0,
        "none": 0,
        "total": total,
    }
    size = latest_checkpoint(whole).path.stat().st_size
    while seen["kills"] < kills:
        out, seen["runs"] = folder / str(seen["runs"]), seen["runs"] + 1
        train = partial(runs.train, out)
        for _ in range(min(draw.randint(1, 4), kills - seen["kills"])):
            runs._steps[:8] = struct.pack("q", 0)
            if draw.random() < 0.5:
                where = draw.randrange(3), int(draw.uniform(0, 1.2) * size)
                end = in_fork(partial(train, partial(die_while_writing, *where)))
                seen["writing"] += end == KILLED
            else:
                child = fork(train)
                time.sleep(draw.uniform(0, 1.05 * duration))
                os.kill(child, signal.SIGKILL)
                end = wait(child)
            if end == 0:  # it was faster
                break
            assert end == KILLED, f"the run failed by itself: {end}"
            seen["kills"] += 1
            if not checkpoint_files(out):  # killed before the first one, and nothing was done
                assert runs.steps == 0
                seen["none"] += 1
                continue
            found = latest_checkpoint(out)
            assert not found.skipped, found.skipped
            seen["lost"] = max(seen["lost"], runs.steps - found.step)
            assert runs.steps - found.step <= EVERY, (runs.steps, found.step)
        assert in_fork(train) == 0
        assert outcome(out) == expected, f"run {seen['runs']} ended otherwise"
        assert not list(out.rglob("*.tmp"))
        shutil.rmtree(out)
    return seen


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0)
    chosen = parser.parse_args()
    begin = time.monotonic()
    result = kill_runs(chosen.folder, chosen.kills, chosen.seed, chosen.workers)
    print(json.dumps({**result, "seconds": round(time.monotonic() - begin, 1)}))
