"""Checkpoints that appear whole or not at all, and that run no code when read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

FORMAT = 1


def save_atomically(content: dict[str, Any], path: Path) -> None:
    """Write a checkpoint under a temporary name, flush it to disk, then rename it.

    Whatever happens meanwhile, ``path`` holds the old checkpoint or the new one.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            torch.save({"format": FORMAT, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint: tensors and plain values only (``weights_only=True``), on the CPU.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is truncated, damaged or no checkpoint of ours.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no checkpoint {path} to resume from; start without --resume."
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"the checkpoint {path} cannot be read ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no reason given'}). It is truncated "
            "or damaged; remove it to start anew, or put back a copy."
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise ValueError(
            f"{path} is no maskdistill checkpoint of format {FORMAT}; found {found!r}."
        )
    return content
