"""What a checkpoint holds, and whether a run may go on from it."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from maskdistill.training.agreement import Agreement
from maskdistill.training.checkpoint import FoundCheckpoint, latest_checkpoint, read_checkpoint
from maskdistill.training.config import TrainingConfig
from maskdistill.training.sharding import gathered, load_gathered, load_moments
from maskdistill.training.step import TrainState
from maskdistill.views import ViewPolicy

# What may differ between a run and its resumption without changing the result.
_FREE = {
    "device", "workers", "views", "log_every", "checkpoint_every", "keep_checkpoints",
    "milestone_every", "health_every", "wandb",
    # These to rounding, and but for what drop path draws: see docs/distributed.md.
    "accumulate", "compile", "sharding",
}  # fmt: skip


def state_content(state: TrainState) -> dict[str, Any]:
    """Return the tensors of a run; all processes call it, for some states are spread over them."""
    return {
        "student": gathered(state.student_net.state_dict()),
        "teacher": gathered(state.teacher.state_dict()),
        "objective": state.objective.state_dict(),
        "optimizer": gathered(state.optimizer.state_dict()),
    }


def restore_state(state: TrainState, content: dict[str, Any]) -> None:
    """Put the tensors of `state_content` back; all processes call it.

    They are taken out of ``content``, so that the memory does not hold everything twice.
    """
    load_gathered(state.student_net, content.pop("student"))
    load_gathered(state.teacher, content.pop("teacher"))
    state.objective.load_state_dict(content.pop("objective"))
    load_moments(state.optimizer, content.pop("optimizer"))


def identity(
    config: TrainingConfig,
    policy: ViewPolicy,
    images: Any,
    count: int,
    world: int,
    precision: str,
) -> dict[str, Any]:
    """Return what a checkpoint must agree on with the run that resumes it.

    Args:
        config: of the run, resolved.
        policy: that it trains under.
        images: to train on.
        count: of them.
        world: number of processes.
        precision: of the run; what "auto" means depends on the device.
    """
    fields = {field.name for field in dataclasses.fields(TrainingConfig)}
    return {
        "config": {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(config).items()
            if name in fields
        },
        "policy": repr(policy),
        "images": count,
        "fingerprint": fingerprint(images),
        "world": world,
        "precision": precision,
    }


def fingerprint(images: Any) -> str | None:
    """Return what tells a data set from another, wherever it lies; None where nothing does.

    It is the data set's own ``fingerprint``, a string, where it has one, and else a hash of its
    ``labels`` in their order, which costs next to nothing.
    """
    own = getattr(images, "fingerprint", None)
    if isinstance(own, str):
        return own
    labels = getattr(images, "labels", None)
    if labels is None:
        return None
    # Not of the bytes in memory alone: machines differ in the width and order of integers.
    array = np.asarray(labels)
    if array.dtype.kind in "biu":
        content = np.ascontiguousarray(array, dtype="<i8").tobytes()
    elif array.dtype.kind in "fUS":
        content = repr(array.tolist()).encode()
    else:  # a method of that name, or objects whose text may differ from run to run
        return None
    return hashlib.sha256(content).hexdigest()[:16]


def check_same(was: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to go on with a run whose identity was another.

    Raises:
        ValueError: names each setting that was different.
    """
    changed = [
        f"{name} was {was['config'].get(name)!r} and is {value!r}"
        for name, value in now["config"].items()
        if name not in _FREE and was["config"].get(name) != value
    ]
    names = {"policy": "policy", "images": "images", "world": "the number of processes"}
    if was["config"].get("precision") == now["config"]["precision"]:  # else it was said above
        names["precision"] = f"the precision, {now['config']['precision']} on this device,"
    changed += [
        f"{words} was {was[name]!r} and is {now[name]!r}"
        for name, words in names.items()
        if name in was and was[name] != now[name]
    ]
    if was["images"] == now["images"] and was["fingerprint"] != now["fingerprint"]:
        changed.append(
            f"the data are as many images, but not the same or in another order (fingerprint was "
            f"{was['fingerprint']} and is {now['fingerprint']})"
        )
    if changed:
        raise ValueError(
            "the checkpoint belongs to other settings, with which the run cannot be resumed "
            f"exactly: {'; '.join(changed)}. Resume with the same settings, or start anew."
        )


def find_checkpoint(out: Path, agreement: Agreement) -> FoundCheckpoint:
    """Return the newest usable checkpoint, the same one in all processes.

    Raises:
        FileNotFoundError: there is none.
        ValueError: none can be used.
    """
    found: list[FoundCheckpoint] = []

    def look() -> tuple[Path, tuple[str, ...]]:
        found.append(latest_checkpoint(out))
        return found[0].path, found[0].skipped

    path, skipped = agreement.by_main(look)
    return found[0] if found else FoundCheckpoint(path, read_checkpoint(path), skipped)
