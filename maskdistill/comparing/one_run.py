"""One run of a study: its folder, what it must agree on, and the process that carries it out.

A process is started as ``python -m maskdistill.comparing.one_run [STUDY.py]`` and reads a pickled
`RunRequest` from its standard input. It ends with 0 when all is done, with `HELD` when another
process works on the run, with 128 and the signal's number when a signal stopped it, and else with 1
and a sentence in the last line of its output.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from maskdistill.comparing.study import Cell, Study, load_study_module
from maskdistill.data.writing import write_durably
from maskdistill.evaluation import load_backbone
from maskdistill.evaluation.measures import MEASURES, Measured, measure
from maskdistill.training import Trainer
from maskdistill.training.checkpoint import checkpoint_files, hold_folder
from maskdistill.training.distributed import start_processes
from maskdistill.training.interruption import TrainingInterrupted
from maskdistill.training.job import JobConfig, open_images, run_job

HELD = 75
"""Exit code where another process works on the run; what sysexits.h calls a temporary failure."""
# These change where and how fast a run computes, and its result by rounding alone.
_WITHOUT_EFFECT = {
    "out", "resume", "auto_resume", "device", "workers", "views", "log_every", "checkpoint_every",
    "keep_checkpoints", "milestone_every", "accumulate", "compile", "sharding", "data", "shards",
    "val_shards", "health_every", "max_damaged", "knn_train", "knn_val", "evaluations", "wandb",
}  # fmt: skip


class RunRequest(NamedTuple):
    """What a process is to run, and where.

    Attributes:
        study: of the run.
        cell: which run.
        folder: its own.
        device: of the run.
        workers: of its loader, where the study does not say; None is as many as there are cores.
    """

    study: Study
    cell: Cell
    folder: Path
    device: str
    workers: int | None = None


# --- The folder of a run


def folder_of(out: Path, cell: Cell) -> Path:
    """Return the folder of a run of a study in ``out``."""
    return out / "runs" / cell.name


def is_done(study: Study, cell: Cell, folder: Path) -> bool:
    """Say whether a folder has all that a study asks of a run, measured as it asks."""
    there = read_measured(folder).get("protocol", {})
    if not there or not read_json(folder / "summary.json"):
        return False
    wanted = _protocol(study, cell)
    same = all(there.get(name) == wanted[name] for name in ("train_images", "val_images"))
    more = set(there["groups"]) >= set(wanted["groups"])
    return same and more and wanted["random_weights"] in ("", there.get("random_weights"))


def _protocol(study: Study, cell: Cell) -> dict[str, Any]:
    """Return what the measures of a run depend on besides its backbone."""
    config = study.config(cell.policy, cell.seed)
    return {
        "groups": sorted(study.measures),
        "train_images": config.knn_train,
        "val_images": config.knn_val,
        "random_weights": "initial" if cell.policy == study.baseline else "",
    }


def read_measured(folder: Path) -> dict[str, Any]:
    """Return what was measured in a run's folder; nothing where that is missing or damaged."""
    found = read_json(folder / "measured.json")
    try:
        whole = isinstance(found["protocol"]["groups"], list)
        for name in ("policy", *(["random"] if "random" in found else [])):
            whole = whole and set(Measured.from_json(found[name]).values) <= MEASURES.keys()
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}
    return found if whole else {}


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; nothing where that is missing or damaged."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


# --- What a run must agree on with an earlier one in its folder


def data_identity(study: Study) -> str:
    """Return what tells a study's images from others, wherever they lie: their classes, in order.

    Raises:
        ValueError: data that cannot be read.
        OSError: a file that is not there.
    """
    if not study.real:
        return ""  # the scenes are all in the settings
    cell = study.cells()[0]
    config = study.config(cell.policy, cell.seed)
    images, _ = open_images(config, config.image_size)
    hashed = hashlib.sha256()
    for labels in (images.train_labels, images.val_labels):
        hashed.update(f"{len(labels)} ".encode() + np.asarray(labels, dtype="<i8").tobytes())
    return hashed.hexdigest()[:16]


def identity(study: Study, cell: Cell, images: str) -> dict[str, Any]:
    """Return the settings, policy and images that make the result of a run, as JSON knows them."""
    config, policy = study.recipe(cell.policy, cell.seed)
    values = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(config).items()
        if name not in _WITHOUT_EFFECT
    }
    # The policy is what is drawn, however the settings put it; data may be moved.
    for name in ("policy", "masker", "preset"):
        values.pop(name)
    return {**values, "policy": repr(policy), "images": images}


def write_identity(study: Study, cell: Cell, images: str, folder: Path) -> None:
    """Make a run's folder, and write down what the run is."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(identity(study, cell, images), indent=1)
    write_durably(text + "\n", folder / "cell.json")


def check_unchanged(study: Study, out: Path, images: str | None = None) -> None:
    """Refuse a study whose runs in ``out`` were begun with other settings.

    A run that ended before it had a checkpoint was not begun.

    Args:
        study: whose runs.
        out: its folder.
        images: what tells its data from others; None does not compare that.

    Raises:
        ValueError: names what was different, of the first such run.
    """
    for cell in study.cells():
        folder = folder_of(out, cell)
        path = folder / "cell.json"
        begun = checkpoint_files(folder) or (folder / "summary.json").exists()
        if not path.is_file() or not begun:
            continue
        was, now = read_json(path), identity(study, cell, images or "")
        if not was:
            raise ValueError(f"{path} is damaged. Remove {folder} to do it anew.")
        if images is None:
            now.pop("images")
        changed = [
            f"{name} was {was.get(name)!r} and is {value!r}"
            for name, value in now.items()
            if was.get(name) != value
        ]
        if changed:
            raise ValueError(
                f"the run in {folder} was begun with other settings: {'; '.join(changed)}. Choose "
                "another folder by --out, or remove that one to do it anew."
            )


# --- The process of a run


def carry_out(request: RunRequest) -> None:
    """Train if that is not done, measure, and write both into the run's folder."""
    study, cell, folder, device, workers = request
    config, policy = study.recipe(cell.policy, cell.seed)
    config = dataclasses.replace(
        config, out=folder, device=device, auto_resume=True,
        workers=workers if config.workers is None else config.workers,
    )  # fmt: skip
    with hold_folder(folder):  # while it is measured, too
        if not read_json(folder / "summary.json"):
            run_job(config, policy)
        images, training = open_images(config, config.image_size)

        def measured(backbone: Any) -> dict[str, Any]:
            return measure(
                backbone, images, config.image_size, groups=study.measures,
                train_limit=config.knn_train, val_limit=config.knn_val,
            ).to_json()  # fmt: skip

        vit = load_backbone(folder).to(start_processes(config.device).device)
        content = {"protocol": _protocol(study, cell), "policy": measured(vit)}
        if content["protocol"]["random_weights"]:
            # The run's own start: the weights that all policies of this seed begin with.
            content["random"] = measured(Trainer(config, training, policy).teacher.backbone)
        write_durably(json.dumps(content, indent=1) + "\n", folder / "measured.json")


def part_done(folder: Path, config: JobConfig) -> float:
    """Return the share of a run's training that its log of metrics shows."""
    try:
        with (folder / "metrics.jsonl").open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(file.tell() - 4096, 0))
            last = json.loads(file.read().splitlines()[-1])
    except (OSError, ValueError, IndexError):
        return 0.0
    shares = [last.get("epoch", 0.0) / config.epochs]
    if config.max_steps:
        shares.append(last.get("step", 0) / config.max_steps)
    return float(min(max(shares), 0.99))


def main(arguments: list[str]) -> int:
    """Read a request from the standard input, carry it out, and return the exit code."""
    _end_with_parent()
    try:
        if arguments:  # the request may hold classes that the study's file defines
            load_study_module(Path(arguments[0]))
        carry_out(pickle.loads(sys.stdin.buffer.read()))
    except TrainingInterrupted as error:
        print(f"stopped: {error}", flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped: interrupted", flush=True)
        return 130
    except Exception as error:
        if not isinstance(error, (ValueError, OSError, ImportError)):
            traceback.print_exc(file=sys.stdout)
        kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
        print(f"error: {kind}{error}".replace("\n", " "), flush=True)
        return HELD if isinstance(error, BlockingIOError) else 1
    return 0


def _end_with_parent() -> None:
    """Save this run and end it when the process that started it is gone, however it went."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
