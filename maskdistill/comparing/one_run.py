"""One run of a study in a process of its own: ``python -m maskdistill.comparing.one_run``."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskdistill.comparing.study import load_study_module
from maskdistill.data.writing import write_durably
from maskdistill.evaluation import load_backbone
from maskdistill.evaluation.measures import MEASURES, Measured, measure
from maskdistill.policies import ViewPolicy
from maskdistill.training import Trainer
from maskdistill.training.checkpoint import hold_folder
from maskdistill.training.distributed import start_processes
from maskdistill.training.interruption import TrainingInterrupted
from maskdistill.training.job import JobConfig, open_images, run_job

MEASURED = "measured.json"


@dataclass(frozen=True)
class Order:
    """What a process is to do.

    Attributes:
        config: settings of the run, its folder and device among them.
        policy: that it trains under.
        groups: of measures to take of the backbone.
        random_weights: measure the weights that the run begins with as well.
        images: what tells the data from others (`cells.data_identity`).
    """

    config: JobConfig
    policy: ViewPolicy
    groups: tuple[str, ...]
    random_weights: bool
    images: str = ""

    def protocol(self) -> dict[str, Any]:
        """Return what measures depend on besides the backbone."""
        return {
            "groups": sorted(self.groups),
            "train_images": self.config.knn_train,
            "val_images": self.config.knn_val,
            "random_weights": "initial" if self.random_weights else "",
        }


def carry_out(order: Order) -> None:
    """Train if that is not done, measure, and write both into the run's folder."""
    config = order.config
    assert config.out is not None
    with hold_folder(config.out):  # while it is measured, too
        if not read_json(config.out / "summary.json"):
            run_job(config, order.policy)
        images, training = open_images(config, config.image_size)
        device = start_processes(config.device).device
        vit = load_backbone(config.out).to(device)
        options: dict[str, Any] = {
            "groups": order.groups, "train_limit": config.knn_train, "val_limit": config.knn_val,
        }  # fmt: skip
        found = {"policy": measure(vit, images, config.image_size, **options).to_json()}
        if order.random_weights:
            # The run's own start: the weights that all policies of this seed begin with.
            start = Trainer(config, training, order.policy).teacher.backbone
            found["random"] = measure(start, images, config.image_size, **options).to_json()
        content = {"protocol": order.protocol(), **found}
        write_durably(json.dumps(content, indent=1) + "\n", config.out / MEASURED)


def is_done(out: Path, order: Order) -> bool:
    """Say whether a folder has all that an order asks for, measured as it asks."""
    protocol = read_measured(out).get("protocol", {})
    if not protocol or not read_json(out / "summary.json"):
        return False
    wanted = order.protocol()
    same = all(protocol.get(name) == wanted[name] for name in ("train_images", "val_images"))
    more = set(protocol["groups"]) >= set(wanted["groups"])
    return same and more and wanted["random_weights"] in ("", protocol.get("random_weights"))


def read_measured(out: Path) -> dict[str, Any]:
    """Return what was measured in a run's folder; nothing where that is missing or damaged."""
    found = read_json(out / MEASURED)
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


def main(argv: Sequence[str] | None = None) -> int:
    """Read an order from the standard input and carry it out.

    Args:
        argv: the study's Python file, if it is one; None is the command line's.

    Returns:
        0; 1 where it failed, with a sentence in the log's last line; 128 and the signal's number
        where a signal stopped it.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    _end_with_parent()
    try:
        if arguments:  # the order may hold classes that the study defines
            load_study_module(Path(arguments[0]))
        order: Order = pickle.loads(sys.stdin.buffer.read())
        carry_out(order)
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
        return 1
    return 0


def _end_with_parent() -> None:
    """Save this run and end it when the process that started it is gone, however it went."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def with_folder(order: Order, out: Path, device: str) -> Order:
    """Return an order with its run's folder and device."""
    config = dataclasses.replace(order.config, out=out, device=device, auto_resume=True)
    return dataclasses.replace(order, config=config)


if __name__ == "__main__":
    sys.exit(main())
