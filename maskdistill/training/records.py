"""What a run leaves behind while it runs: JSON lines, TensorBoard events, and an alarm."""

from __future__ import annotations

import json
import math
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
