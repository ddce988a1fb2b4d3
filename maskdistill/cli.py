"""A thin face over the library: arguments in, exit codes and plain sentences out."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from maskdistill.data import DamagedDataError
from maskdistill.job import JobConfig, run_job, saved_config
from maskdistill.training import NonFiniteLossError


def train(
    scenes: JobConfig, real: JobConfig, *, description: str, argv: Sequence[str] | None = None
) -> int:
    """Run the main job from the command line, and return the exit code.

    Args:
        scenes: defaults of a run on the built-in scenes.
        real: defaults of a run with ``--data``.
        description: shown by ``--help``.
        argv: arguments; None is the command line's.

    Returns:
        0; 1 where training had to stop; 2 where the settings or the data cannot work.
    """
    try:
        import tyro
    except ImportError:
        print(
            'error: this needs the train extra: pip install "maskdistill[train]"', file=sys.stderr
        )
        return 2

    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        config = tyro.cli(
            JobConfig,
            description=description,
            default=_defaults(arguments, scenes, real),
            args=arguments,
        )
        run_job(config)
    except (NonFiniteLossError, DamagedDataError) as error:
        print(f"\nstopped: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # whoever read the output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "\ninterrupted; from its last checkpoint, if it had written one, the run goes on with "
            "--resume --out FOLDER",
            file=sys.stderr,
        )
        return 130
    return 0


def _defaults(arguments: Sequence[str], scenes: JobConfig, real: JobConfig) -> JobConfig:
    """Return what holds where the command line is silent.

    A resumed run keeps its own settings, so that ``--resume --out DIR`` says it all.
    """
    out = _value(arguments, "--out")
    if "--resume" in arguments and out is not None:
        return saved_config(Path(out))
    return scenes if _value(arguments, "--data") is None else real


def _value(arguments: Sequence[str], name: str) -> str | None:
    for i, argument in enumerate(arguments):
        if argument == name:
            return arguments[i + 1] if i + 1 < len(arguments) else ""
        if argument.startswith(f"{name}="):
            return argument.partition("=")[2]
    return None
