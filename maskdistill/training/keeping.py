"""What a run keeps while it lasts: metrics, checkpoints and the time that training took."""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from maskdistill.training.agreement import Agreement
from maskdistill.training.checkpoint import (
    FoundCheckpoint,
    checkpoint_files,
    not_written,
    remove_unfinished,
    save_checkpoint,
)
from maskdistill.training.config import TrainingConfig
from maskdistill.training.distributed import Processes
from maskdistill.training.health_signs import PREFIX
from maskdistill.training.interruption import TrainingInterrupted
from maskdistill.training.records import (
    CollapseAlarm,
    MetricsWindow,
    Pace,
    RunRecord,
    mean_over_processes,
)
from maskdistill.training.step import StepMetrics
from maskdistill.training.wandb_run import open_wandb, wandb_project
from maskdistill.views import ViewPolicy

LINES_EVERY = 30.0
"""Seconds between two lines about the progress where there is no terminal to show a bar on."""


class NonFiniteLossError(RuntimeError):
    """The loss or the gradient became NaN or infinite, so training was stopped."""


class CollapseWarning(UserWarning):
    """Training goes on but has collapsed."""


class RunKeeper:
    """Writes what a run leaves in its folder; only the main process writes, but all must call.

    Args:
        out: folder of the run, which the main process holds already.
        config: of the run, resolved.
        processes: of the run.
        agreement: among them.
        policy: of masks, as Weights & Biases shows it.
        found: the checkpoint that the run goes on from; None starts anew.
        steps: of the whole run.
        show: a progress bar.
    """

    def __init__(
        self,
        out: Path,
        config: TrainingConfig,
        processes: Processes,
        agreement: Agreement,
        policy: ViewPolicy,
        found: FoundCheckpoint | None,
        *,
        steps: int,
        show: bool = True,
    ) -> None:
        self.out, self.saved = out, found.path if found else None
        self._saved_step = found.step if found else -1
        self._keep, self._milestones = config.keep_checkpoints, config.milestone_every
        self._agreement, self._is_main = agreement, processes.is_main
        self._world = processes.world
        content: dict[str, Any] = found.content if found else {}
        step = content.get("step", 0)
        self._record: RunRecord | None = None
        settings = {**dataclasses.asdict(config), "policy_used": repr(policy)}
        agreement.by_main(lambda: self._open(found.step if found else None, settings))
        self.pace = Pace(config.batch_size * processes.world, step, content.get("seconds", 0.0))
        self._window = MetricsWindow(processes.world, content.get("window"))
        self._alarm = CollapseAlarm(config.out_dim or 0)
        self._alarm.counts = content.get("alarm", [0, 0])
        self._bar = tqdm(
            total=steps,
            initial=step,
            unit="step",
            desc="training",
            # None shows it on a terminal alone: a file would get a line without an end.
            disable=None if self._is_main and show else True,
            dynamic_ncols=True,
        )
        self._lines = self._is_main and show and self._bar.disable
        self._total, self._said = steps, time.monotonic()

    def _open(self, step: int | None, settings: dict[str, Any]) -> None:
        remove_unfinished(self.out)
        project = wandb_project(settings["wandb"])
        run = open_wandb(self.out, project, settings) if project else None
        self._record = RunRecord(self.out, step, run)

    def __enter__(self) -> RunKeeper:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()
        if self._record:
            stopped = kind is not None and issubclass(kind, TrainingInterrupted)
            self._record.close(failed=kind is not None and not stopped)

    def add(self, metrics: StepMetrics) -> None:
        """Take the metrics of a step that is done; waits for nothing."""
        self._window.add(metrics)
        self.pace.step()
        self._bar.update()

    def check_finite(self, metrics: StepMetrics, step: int) -> None:
        """Stop all processes alike if the loss or the gradient of any is no number.

        An infinite gradient spoils the weights before the loss shows it.

        Raises:
            NonFiniteLossError: names the step, the process and the last good checkpoint.
        """
        values = self._agreement.gather([float(metrics.loss), float(metrics.grad_norm)])
        for rank, pair in enumerate(values):
            for name, value in zip(("loss", "gradient norm"), pair, strict=True):
                if math.isfinite(value):
                    continue
                where = f" in process {rank} of {len(values)}" if len(values) > 1 else ""
                there = checkpoint_files(self.out)
                kept = (
                    f"The last good checkpoint is {there[0]}"
                    if there
                    else "No checkpoint had been written yet"
                )
                raise NonFiniteLossError(
                    f"the {name} became {value} at step {step}{where}; training was stopped. "
                    f"{kept}. Try a lower learning rate (--lr), a longer warm-up, or --precision "
                    "float32."
                )

    def log(
        self,
        step: int,
        before: dict[str, float],
        after: dict[str, float],
        signs: dict[str, Tensor] | None = None,
    ) -> None:
        """Write a line of metrics: the means since the last line, between other values.

        Args:
            step: steps done.
            before: values that come first in the line.
            after: values that come after the means.
            signs: of health at this step, scalar tensors; their means over the processes come last.

        Raises:
            CheckpointError: in all processes, if it could not be written.
        """
        means = self._window.mean()
        values = {**before, **dict(zip(StepMetrics._fields, means, strict=True)), **after}
        values["images_per_second"] = self.pace.lap()
        if signs:
            means = mean_over_processes(torch.stack(list(signs.values())), self._world).tolist()
            values |= {PREFIX + name: mean for name, mean in zip(signs, means, strict=True)}
        self._bar.set_postfix_str(
            f"loss {values['loss']:.3f}, {values['images_per_second']:.0f} images/s"
        )
        if self._lines and (step == self._total or time.monotonic() - self._said >= LINES_EVERY):
            self._said = time.monotonic()
            print(
                f"step {step} of {self._total}: loss {values['loss']:.3f}, "
                f"{values['images_per_second']:.0f} images/s",
                flush=True,
            )
        self._agreement.by_main(lambda: self._write_line(step, values))
        warning = self._alarm.observe(values["loss"], values["feature_spread"])
        if warning and self._is_main:
            warnings.warn(f"step {step}: {warning}", CollapseWarning, stacklevel=3)

    def save(self, content: dict[str, Any]) -> Path:
        """Write a checkpoint, unless there is one of this step, and return where it is.

        Raises:
            CheckpointError: in all processes, if it could not be written.
        """
        content["seconds"] = self.pace.seconds
        content["window"], content["alarm"] = self._window.rows(), self._alarm.counts
        if self.saved is None or content["step"] != self._saved_step:
            with self.pace.pause():
                self.saved = self._agreement.by_main(lambda: self._write(content))
            self._saved_step = content["step"]
        return self.saved

    def _write(self, content: dict[str, Any]) -> Path:
        if self._record:
            self._record.sync()
        return save_checkpoint(content, self.out, keep=self._keep, milestone_every=self._milestones)

    def evaluation_at(self, step: int) -> dict[str, float] | None:
        """Return the evaluation that the run made at this step before it was resumed, if any."""
        return self._record.evaluation_at(step) if self._record else None

    def write_evaluation(self, step: int, values: dict[str, float]) -> None:
        """Write a line with what an evaluation found, the main process's numbers.

        Raises:
            CheckpointError: in all processes, if it could not be written.
        """
        self._agreement.by_main(lambda: self._write_line(step, values))

    def _write_line(self, step: int, values: dict[str, float]) -> None:
        assert self._record, "only the main process writes"
        try:
            self._record.write(step, values)
        except OSError as error:  # lines come oftener, and meet a full disk first
            raise not_written(error, f"the metrics of step {step}", self.out) from error
