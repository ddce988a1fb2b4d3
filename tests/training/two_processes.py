"""Two processes of a run end alike; run in a fresh interpreter by test_interruption.py."""

from __future__ import annotations

import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from maskdistill.training import NonFiniteLossError, Trainer, TrainingConfig
from maskdistill.training.checkpoint import CheckpointError, hold_folder
from maskdistill.training.distributed import Processes
from maskdistill.training.interruption import TrainingInterrupted
from tests.training.conftest import TINY, Noise, assert_same
from tests.training.forking import in_two
from tests.training.test_interruption import (
    CHANGES,
    RANDOM,
    fit,
    lines,
    saved,
    terminate,
    within_step,
)


def pair(processes: Processes, **changes: Any) -> Trainer:
    config = TrainingConfig(**{**TINY, **CHANGES, "batch_size": 2, "max_steps": 8, **changes})
    return Trainer(config, Noise(), RANDOM, processes=processes)


def test_all_processes_stop_at_the_same_step(tmp_path: Path) -> None:
    """Whichever of them hears the signal; and go on as if nothing had been."""

    def whole(processes: Processes) -> None:
        fit(pair(processes), tmp_path / "whole")

    def stopped(processes: Processes) -> None:
        for rank, step, expected in ((1, 2, 3), (0, 5, 6)):
            event = terminate if processes.rank == rank else int
            with within_step(step, event), pytest.raises(TrainingInterrupted) as caught:
                fit(pair(processes), tmp_path / "run", resume=step > 2)
            assert caught.value.step == expected, "one step for the others to hear of it"
            assert caught.value.is_main == processes.is_main
            assert caught.value.signum == signal.SIGTERM
        fit(pair(processes), tmp_path / "run", resume=True)

    assert in_two(whole, tmp_path / "store1") == [0, 0]
    assert in_two(stopped, tmp_path / "store2") == [0, 0]
    assert_same(saved(tmp_path / "run"), saved(tmp_path / "whole"))
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")


def test_all_processes_meet_the_same_error(tmp_path: Path) -> None:
    """A loss that is not finite in one, a folder that only the first writes to, a held folder."""

    def work(processes: Processes) -> None:
        trainer = pair(processes)
        real = trainer._run_step

        def diverging(crops: Any) -> Any:
            metrics = real(crops)
            bad = processes.rank == 1 and trainer.step == 4
            return metrics._replace(loss=torch.tensor(math.nan)) if bad else metrics

        trainer._run_step = diverging  # type: ignore[method-assign]
        with pytest.raises(NonFiniteLossError, match="loss became nan at step 5 in process 1 of 2"):
            fit(trainer, tmp_path / "a")
        with pytest.raises(FileExistsError, match="holds a run already"):
            fit(pair(processes), tmp_path / "a")
        with pytest.raises(ValueError, match="number of processes was 1 and is 2"):
            fit(pair(processes), tmp_path / "one", resume=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "save", full)
            with pytest.raises(CheckpointError, match="step 0 could not be written"):
                fit(pair(processes), tmp_path / "b")
        with pytest.raises(BlockingIOError, match="is in use"):
            fit(pair(processes), tmp_path / "held")

    def full(content: object, file: object) -> None:
        raise OSError(28, "No space left on device")

    config = TrainingConfig(**{**TINY, **CHANGES, "batch_size": 2, "max_steps": 2})
    fit(Trainer(config, Noise(), RANDOM), tmp_path / "one")
    with hold_folder(tmp_path / "held"):
        assert in_two(work, tmp_path / "store") == [0, 0]
