"""What the recipes for other people's code share: a masker as code, and a diff applied by git."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import maskdistill as md


def as_code(masker: md.Masker) -> str:
    """Return the call that builds a masker, its names read from ``md``.

    >>> as_code(md.RandomMasker(0.3) | md.masking.GridMasker())
    'md.RandomMasker(0.3) | md.masking.GridMasker()'
    """

    def named(match: re.Match[str]) -> str:
        return f"md.{'' if match[1] in md.__all__ else 'masking.'}{match[1]}("

    return re.sub(r"(?<![\w.])([A-Z]\w*)\(", named, repr(masker))


def apply_diff(diff: str, folder: Path, commit: str, *, check: bool = False) -> None:
    """Apply a unified diff to the files in a folder, wherever their lines now stand.

    Args:
        diff: as ``git apply`` takes it.
        folder: of a clone, or of a copy of it.
        commit: of the repository that the diff was made for, for the error's remedy.
        check: only see whether it fits.

    Raises:
        ValueError: lines that the files do not have.
    """
    # A copy inside another repository is no part of that one.
    alone = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.resolve().parent)}
    command = ["git", "apply", *["--check"] * check, "-"]
    done = subprocess.run(
        command, input=diff, cwd=folder, env=alone, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ValueError(
            f"the diff does not fit the files in {folder}: {done.stderr.strip()}. They are of "
            f"another version than the one that it was made for: check out commit {commit[:7]}, or "
            f"put the lines in by hand:\n{diff}"
        )
