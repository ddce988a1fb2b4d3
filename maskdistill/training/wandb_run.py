"""A run of Weights & Biases beside the lines of metrics, where one is asked for."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any

from maskdistill.training.checkpoint import write_durably

KEPT = "wandb.json"
"""The file in a run's folder that says which run of Weights & Biases is its own."""


def wandb_project(setting: str | None) -> str | None:
    """Return the project to log to: the setting, else that of the variable WANDB_PROJECT.

    >>> wandb_project("masks"), wandb_project("")
    ('masks', None)

    Args:
        setting: of the configuration; an empty one asks for no project whatever the variable says.
    """
    return (os.environ.get("WANDB_PROJECT") if setting is None else setting) or None


def import_wandb(project: str) -> Any:
    """Return the module.

    Args:
        project: that was asked for, by name.

    Raises:
        ImportError: it is not installed.
    """
    try:
        module = importlib.import_module("wandb")
    except ImportError as error:
        raise _not_installed(project) from error
    if not hasattr(module, "init"):  # a folder of that name, as its own runs leave one
        raise _not_installed(project)
    return module


def open_wandb(folder: Path, project: str, settings: dict[str, Any]) -> Any:
    """Begin a run of Weights & Biases, or go on with the one that the folder's run had begun.

    What is logged has ``step`` as its axis, so that the lines that a resumed run writes again are
    not refused for coming late.

    Args:
        folder: of the run, where its id is kept in ``wandb.json`` and its files in ``wandb/``.
        project: to log to.
        settings: shown as the run's configuration.

    Raises:
        ImportError: it is not installed.
        ConnectionError: it cannot begin, such as without a login.
    """
    wandb = import_wandb(project)
    kept = folder / KEPT
    known = _read(kept)
    known = known if known.get("project") == project else {}
    plain = {key: str(v) if isinstance(v, Path) else v for key, v in settings.items()}
    try:
        run = wandb.init(
            project=project,
            id=known.get("id"),
            resume="allow" if known else None,
            name=folder.absolute().name,
            dir=str(folder),
            config=plain,
        )
    except wandb.Error as error:
        raise ConnectionError(
            f"Weights & Biases cannot begin a run of the project {project!r}: {error} Log in by "
            "`wandb login`, keep it on this machine by WANDB_MODE=offline, or leave out wandb."
        ) from error
    write_durably(json.dumps({"project": project, "id": run.id}) + "\n", kept)
    run.define_metric("step", hidden=True)
    run.define_metric("*", step_metric="step")
    return run


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _not_installed(project: str) -> ImportError:
    return ImportError(
        f"the project {project!r} of Weights & Biases was asked for (by the setting wandb or the "
        "variable WANDB_PROJECT), but the package is not installed: pip install wandb. The setting "
        'wandb="" leaves it out.'
    )
