"""What a run leaves behind while it runs: JSON lines, TensorBoard events, and an alarm."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskdistill.training.checkpoint import write_durably

_OF_TRAINING = "images_per_second"  # lines of metrics have it, those of evaluations do not


@contextmanager
def warnings_kept(out: Path) -> Iterator[None]:
    """Write each warning inside to ``out/warnings.log`` too: of damaged images, a collapse.

    Those of forked workers are among them.

    Args:
        out: folder of the run.
    """
    show = warnings.showwarning

    def keep(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        with contextlib.suppress(OSError), (out / "warnings.log").open("a") as log:
            now = datetime.now().astimezone().isoformat(timespec="seconds")
            log.write(f"{now} {category.__name__}: {message}\n")
        show(message, category, *where, **more)

    warnings.showwarning = keep
    try:
        yield
    finally:
        warnings.showwarning = show


class RunRecord:
    """Appends metrics to ``metrics.jsonl`` and to TensorBoard events in the same folder.

    Args:
        folder: of the run; must exist.
        step: steps that a resumed run has done, whose later lines are dropped; None is a new run.
        wandb: a run of Weights & Biases to log to as well, which is finished at the end. If it
            fails, that is warned of, and the record goes on without it.
    """

    def __init__(self, folder: Path, step: int | None = None, wandb: Any = None) -> None:
        self._wandb = wandb
        self.path = folder / "metrics.jsonl"
        there = [] if step is None else _read_lines(self.path)
        self._kept = [line for line in there if line["step"] <= (step or 0)]
        write_durably("".join(map(_line, self._kept)), self.path)
        self._events = _summary_writer(folder, step)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Record the values of a step; in the lines, one that is not finite is null."""
        with self.path.open("a") as file:
            file.write(_line({"step": step, **values}))
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)
        self._tell_wandb(lambda run: run.log({"step": step, **values}))

    def _tell_wandb(self, tell: Callable[[Any], object]) -> None:
        """Let no failure of Weights & Biases stop training, or hide why it stopped."""
        if self._wandb is None:
            return
        try:
            tell(self._wandb)
        except Exception as error:
            self._wandb = None
            warnings.warn(
                f"Weights & Biases failed ({type(error).__name__}: {error}) and gets no more of "
                f"this run; {self.path} has every line.",
                UserWarning,
                stacklevel=3,
            )

    def evaluation_at(self, step: int) -> dict[str, float] | None:
        """Return what an earlier attempt found when it evaluated at a step, if it came to that."""
        for line in self._kept:
            if line["step"] == step and _OF_TRAINING not in line:
                found = {name: value for name, value in line.items() if name != "step"}
                return {name: math.nan if v is None else v for name, v in found.items()}
        return None

    def sync(self) -> None:
        """Flush the lines to the disk, so that a checkpoint's are there when it is."""
        with self.path.open("rb+") as file:
            os.fsync(file.fileno())
        if self._events is not None:
            self._events.flush()

    def close(self, *, failed: bool = False) -> None:
        """Flush the TensorBoard events, and finish the run of Weights & Biases.

        Args:
            failed: the run did not come to its end.
        """
        if self._events is not None:
            self._events.close()
        self._tell_wandb(lambda run: run.finish(exit_code=int(failed)))


class MetricsWindow:
    """The metrics of the steps since the last line, and their mean.

    They are averaged over the processes row by row, so that it changes no bit of the mean whether
    a checkpoint came between.

    >>> window = MetricsWindow(world=1)
    >>> window.add((torch.tensor(2.0), torch.tensor(0.5)))
    >>> window.add((torch.tensor(4.0), torch.tensor(0.5)))
    >>> window.mean()
    [3.0, 0.5]

    Args:
        world: number of processes; all must call ``rows`` and ``mean`` at the same steps.
        rows: ``(n, metrics)``, what a checkpoint kept of an unfinished window.
    """

    def __init__(self, world: int, rows: Tensor | None = None) -> None:
        self._world = world
        self._done = [] if rows is None else list(rows)
        self._pending: list[Tensor] = []

    def add(self, metrics: Sequence[Tensor]) -> None:
        """Take the metrics of a step, scalars on the device, without waiting for them."""
        self._pending.append(torch.stack(tuple(metrics)))

    def rows(self) -> Tensor:
        """Return ``(n, metrics)`` on the CPU, means over the processes; this waits for them."""
        if self._pending:
            rows = mean_over_processes(torch.stack(self._pending), self._world)
            self._done += list(rows.cpu())
            self._pending.clear()
        return torch.stack(self._done) if self._done else torch.empty(0)

    def mean(self) -> list[float]:
        """Return the means over the steps and begin another window."""
        means: list[float] = self.rows().mean(dim=0).tolist()
        self._done.clear()
        return means


def mean_over_processes(values: Tensor, world: int) -> Tensor:
    """Return the means of what all processes have, which must all call this."""
    if world > 1:
        torch.distributed.all_reduce(values)
        values /= world
    return values


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a ``metrics.jsonl``; one that a crash cut short is left out.

    So are values that were not finite, which the file has as null.
    """
    return [{k: v for k, v in line.items() if v is not None} for line in _read_lines(path)]


def _line(values: dict[str, Any]) -> str:
    """Write values as a line of JSON, which knows neither NaN nor infinity."""
    unknown = [k for k, v in values.items() if isinstance(v, float) and not math.isfinite(v)]
    return json.dumps({**values, **dict.fromkeys(unknown)}, allow_nan=False) + "\n"


def _read_lines(path: Path) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    if not path.is_file():
        return lines
    for text in path.read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def _summary_writer(folder: Path, step: int | None) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # without the train extra there are JSON lines alone
        return None
    # Events of the purged step and of later ones are hidden; what is at the checkpoint's stays.
    purge = None if step is None else step + 1
    return SummaryWriter(str(folder), purge_step=purge)  # type: ignore[no-untyped-call]


class Pace:
    """Measures how fast training goes, leaving out what is not training.

    Args:
        images_per_step: over all processes.
        steps: done before, in a run that is resumed.
        seconds: that those took.
    """

    def __init__(self, images_per_step: int, steps: int = 0, seconds: float = 0.0) -> None:
        self._images_per_step = images_per_step
        self._steps, self._lap_steps = steps, 0
        self._lap_start = time.perf_counter()
        self._start = self._lap_start - seconds

    def step(self) -> None:
        """Count a step."""
        self._steps += 1
        self._lap_steps += 1

    def lap(self) -> float:
        """Return images per second since the last lap, and begin another."""
        now = time.perf_counter()
        rate = self._lap_steps * self._images_per_step / max(now - self._lap_start, 1e-9)
        self._lap_start, self._lap_steps = now, 0
        return rate

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave out the time inside the context."""
        begin = time.perf_counter()
        yield
        paused = time.perf_counter() - begin
        self._start += paused
        self._lap_start += paused

    @property
    def seconds(self) -> float:
        """Seconds of training."""
        return time.perf_counter() - self._start

    @property
    def images_per_second(self) -> float:
        """Images per second of all steps."""
        return self._steps * self._images_per_step / max(self.seconds, 1e-9)


class CollapseAlarm:
    """Says in words, once each, when training has collapsed in one of DINO's two ways.

    Uniform collapse pins the loss at ln(out_dim): teacher and student say "all prototypes alike".
    The other maps every image to one point. Either must last, since both pass early in training.

    Args:
        out_dim: number of prototypes, K.
        patience: consecutive observations that make an alarm.
    """

    def __init__(self, out_dim: int, patience: int = 20) -> None:
        self._uniform = math.log(out_dim)
        self._patience = patience
        self._pinned = 0
        self._narrow = 0

    @property
    def counts(self) -> list[int]:
        """How often in a row each sign has been seen; a checkpoint keeps and sets it."""
        return [self._pinned, self._narrow]

    @counts.setter
    def counts(self, counts: Sequence[int]) -> None:
        self._pinned, self._narrow = counts

    def observe(self, loss: float, feature_spread: float) -> str | None:
        """Return a warning, or None.

        Args:
            loss: mean of the last steps.
            feature_spread: of the teacher's embeddings, in [0, 1].
        """
        self._pinned = self._pinned + 1 if abs(loss / self._uniform - 1) < 0.002 else 0
        self._narrow = self._narrow + 1 if feature_spread < 0.02 else 0
        if self._pinned == self._patience:
            return (
                f"the loss has stayed at ln(out_dim) = {self._uniform:.3f}: teacher and student "
                "have collapsed to the uniform distribution and learn nothing. Try a lower "
                "teacher temperature (0.02 to 0.04), fewer prototypes (out_dim), a higher "
                "learning rate, or a lower momentum."
            )
        if self._narrow == self._patience:
            return (
                f"the teacher maps all images almost to one point (feature spread "
                f"{feature_spread:.4f}): the features have collapsed. Try centring with "
                "sinkhorn_knopp, a higher teacher temperature, or a lower learning rate."
            )
        return None
