"""What a run leaves behind while it runs: JSON lines, TensorBoard events, and an alarm."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class RunRecord:
    """Appends metrics to ``metrics.jsonl`` and to TensorBoard events in the same folder.

    Args:
        folder: of the run; must exist.
        step: steps that are already done; later lines of an earlier attempt are dropped.
    """

    def __init__(self, folder: Path, step: int = 0) -> None:
        self.path = folder / "metrics.jsonl"
        kept = [line for line in read_metrics(self.path) if line["step"] <= step] if step else []
        # One write: an interruption leaves the old lines or the new ones.
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        temporary.replace(self.path)
        self._events = _summary_writer(folder, step)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Record the values of a step."""
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush the TensorBoard events."""
        if self._events is not None:
            self._events.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a ``metrics.jsonl``; a last line cut short by a crash is left out."""
    lines: list[dict[str, Any]] = []
    if not path.is_file():
        return lines
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def _summary_writer(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # without the train extra there are JSON lines alone
        return None
    return SummaryWriter(str(folder), purge_step=step or None)  # type: ignore[no-untyped-call]


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
