"""``maskdistill train``: the main job, from the command line."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from maskdistill.cli.terminal import NEEDS_TRAIN, exit_code, plain_warnings

if TYPE_CHECKING:
    from maskdistill.training.config import JobConfig

DESCRIPTION = """Train DINO under a masking policy, evaluate, and draw.

Without --data it trains on built-in scenes, in minutes on 2 CPU cores; with --data PATH on
mini-ImageNet in whichever form you have it. The defaults of the two differ:
--help --data PATH shows those of real data."""


def train(
    scenes: JobConfig | None = None,
    real: JobConfig | None = None,
    *,
    description: str = DESCRIPTION,
    argv: Sequence[str] | None = None,
    prog: str | None = None,
) -> int:
    """Run the main job from the command line, and return the exit code.

    Args:
        scenes: defaults of a run on the built-in scenes; None is ``SCENES`` of the job.
        real: defaults of a run with ``--data``; None is ``MINI_IMAGENET``.
        description: shown by ``--help``.
        argv: arguments; None is the command line's.
        prog: the command, as it is called; None is that of the command line.

    Returns:
        0; 1 where training had to stop; 2 where the settings or the data cannot work; 128 and the
        signal's number where a signal stopped it, as shells count: 130 and 143.
    """
    try:
        import tyro
    except ImportError:
        print(NEEDS_TRAIN, file=sys.stderr)
        return 2
    from maskdistill.training.config import MINI_IMAGENET, SCENES, JobGroups

    arguments = list(sys.argv[1:] if argv is None else argv)

    def run() -> int:
        groups = tyro.cli(
            tyro.conf.OmitArgPrefixes[JobGroups],
            prog=prog,
            description=description,
            default=JobGroups.of(_defaults(arguments, scenes or SCENES, real or MINI_IMAGENET)),
            args=arguments,
        )
        return _run(groups.config(), prog)

    return exit_code(
        run,
        before="\n",
        interrupted="interrupted; the same command goes on from its last checkpoint, if there is "
        "one, with --auto-resume --out FOLDER",
    )


def _run(config: JobConfig, prog: str | None) -> int:
    """Run the job; say what stopped it, and how to go on."""
    from maskdistill.data.loading import LoaderError
    from maskdistill.training import CheckpointError, NonFiniteLossError, TrainingInterrupted
    from maskdistill.training.job import run_job

    try:
        with plain_warnings():
            run_job(config)
    except (NonFiniteLossError, LoaderError, CheckpointError) as error:
        print(f"\nstopped: {error}", file=sys.stderr)
        return 1
    except TrainingInterrupted as error:
        if error.is_main:
            print(f"\nstopped: {error}", file=sys.stderr)
            print(f"go on with: {_again(error.checkpoint.parent.parent, prog)}", file=sys.stderr)
        return error.exit_code
    except RuntimeError as error:
        if not _lost_a_peer(error):
            raise
        print(
            "\nstopped: another process of this run has died; its own message says why. "
            "torchrun --max-restarts N starts all of them again.",
            file=sys.stderr,
        )
        return 1
    return 0


def _lost_a_peer(error: RuntimeError) -> bool:
    """Say whether an error is gloo's or NCCL's about a process that is no longer there."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return False
    signs = "Connection closed by peer|Connection reset by peer|Broken pipe|remote process"
    return re.search(signs, str(error)) is not None


def _again(out: Path, prog: str | None = None) -> str:
    """Return the command that goes on with a run in the same way."""
    launcher, script = shlex.quote(os.path.basename(sys.executable)), shlex.quote(sys.argv[0])
    if prog is not None:
        launcher, script = "", prog
    if os.environ.get("WORLD_SIZE", "1") != "1":
        launcher = f"torchrun --nproc-per-node {os.environ.get('LOCAL_WORLD_SIZE', '?')}"
        if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
            launcher += " (and the other options that torchrun had, on every node)"
        script = script if prog is None else f"-m {prog}"
    return f"{launcher} {script} --resume --out {shlex.quote(str(out))}".strip()


def _defaults(arguments: Sequence[str], scenes: JobConfig, real: JobConfig) -> JobConfig:
    """Return what holds where the command line is silent.

    A resumed run keeps its own settings, so that ``--resume --out DIR`` says it all.
    """
    from maskdistill.training.checkpoint import checkpoint_files
    from maskdistill.training.config import saved_config

    out = _value(arguments, "--out")
    if "--resume" in arguments and out is not None:
        lost = not (Path(out) / "config.json").exists() and checkpoint_files(Path(out))
        if not lost:  # else all settings must be given again; the checkpoints will compare them
            return saved_config(Path(out))
    return scenes if _value(arguments, "--data") is _value(arguments, "--shards") is None else real


def _value(arguments: Sequence[str], name: str) -> str | None:
    for i, argument in enumerate(arguments):
        if argument == name:
            return arguments[i + 1] if i + 1 < len(arguments) else ""
        if argument.startswith(f"{name}="):
            return argument.partition("=")[2]
    return None
