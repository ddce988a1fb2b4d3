"""A thin face over the library: arguments in, exit codes and plain sentences out."""

from __future__ import annotations

import os
import re
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

# A command imports what it needs when it is chosen, so that --help and the others do not wait.
if TYPE_CHECKING:
    from maskdistill.job import JobConfig

_DESCRIPTION = """Masking strategies for self-distillation of Vision Transformers."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command of ``maskdistill`` or ``python -m maskdistill``, and return the exit code.

    Example:
        >>> main(["pack", "mini-imagenet", "mini.npz"])  # doctest: +SKIP
        mini.npz: 60,000 images of 100 classes, 286 MiB.
        0

    Args:
        argv: arguments; None is the command line's.

    Returns:
        0; 1 where data is too damaged; 2 where the arguments or the data cannot work; 130 where the
        user interrupted.
    """
    tyro = _tyro()
    if tyro is None:
        return 2
    # A dict of one command would be that command without its name.
    commands = tyro.extras.SubcommandApp()
    for name, command in _COMMANDS.items():
        commands.command(name=name)(command)
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        commands.cli(prog="maskdistill", description=_DESCRIPTION, args=arguments)
    except BrokenPipeError:  # whoever read the output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        from maskdistill.data.damage import DamagedDataError

        if not isinstance(error, DamagedDataError):
            raise
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _pack(
    source: Path,
    out: Path,
    /,
    shards: int | None = None,
    format: str = "auto",
    allow_pickle: bool = False,
    size: int | None = None,
    quality: int | None = None,
    max_damaged: int = 10,
    workers: int | None = None,
    overwrite: bool = False,
) -> None:
    """Turn a data set into one file that opens by memory map, or into shards that stream.

    The pack has the images, the classes and the split of its source. Encoded images are copied as
    they are; each is decoded once to check it. docs/data.md describes forms, packs and shards.

    Args:
        source: folder or file of images, in any form that --data takes.
        out: the file to write, NAME.npz; with --shards, the folder.
        shards: write WebDataset shards instead: so many for training, their share for validation.
        format: auto, or the form of the source by name.
        allow_pickle: permit reading pickles (by an unpickler that can only build arrays).
        size: pixels to which the shorter side of larger images is reduced.
        quality: of JPEG, to which all images are then encoded; without it, at 95 what was reduced.
        max_damaged: how many images that do not decode may be left out.
        workers: processes that decode; without it, one per core.
        overwrite: replace OUT if it exists.
    """
    from maskdistill.data.packing import Packed, pack, pack_shards

    options: dict[str, Any] = {
        "format": format, "allow_pickle": allow_pickle, "size": size, "quality": quality,
        "max_damaged": max_damaged, "workers": workers, "overwrite": overwrite,
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = _plain_warning
        packed: Packed = (
            pack(source, out, **options)
            if shards is None
            else pack_shards(source, out, shards, **options)
        )
    print(
        f"{packed.path}: {packed.images:,} images of {packed.classes} classes, "
        f"{packed.bytes / 2**20:,.1f} MiB; {packed.note}"
    )
    if packed.damaged:
        print(f"{len(packed.damaged)} damaged images were left out.")


_COMMANDS = {"pack": _pack}


def _plain_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    from tqdm import tqdm

    tqdm.write(f"warning: {message}", file=sys.stderr)  # above a progress bar, if there is one


def _lost_a_peer(error: RuntimeError) -> bool:
    """Say whether an error is gloo's or NCCL's about a process that is no longer there."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return False
    signs = "Connection closed by peer|Connection reset by peer|Broken pipe|remote process"
    return re.search(signs, str(error)) is not None


def _again(out: Path) -> str:
    """Return the command that goes on with a run in the same way."""
    launcher = shlex.quote(os.path.basename(sys.executable))
    if os.environ.get("WORLD_SIZE", "1") != "1":
        launcher = f"torchrun --nproc-per-node {os.environ.get('LOCAL_WORLD_SIZE', '?')}"
        if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
            launcher += " (and the other options that torchrun had, on every node)"
    return f"{launcher} {shlex.quote(sys.argv[0])} --resume --out {shlex.quote(str(out))}"


def _tyro() -> Any:
    try:
        import tyro
    except ImportError:
        print(
            'error: this needs the train extra: pip install "maskdistill[train]"', file=sys.stderr
        )
        return None
    return tyro


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
        0; 1 where training had to stop; 2 where the settings or the data cannot work; 128 and the
        signal's number where a signal stopped it, as shells count: 130 and 143.
    """
    from maskdistill.data import DamagedDataError
    from maskdistill.data.loading import LoaderError
    from maskdistill.job import JobConfig, run_job
    from maskdistill.training import NonFiniteLossError
    from maskdistill.training.checkpoint import CheckpointError
    from maskdistill.training.interruption import TrainingInterrupted

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
        with warnings.catch_warnings():
            warnings.showwarning = _plain_warning
            run_job(config)
    except (NonFiniteLossError, DamagedDataError, LoaderError, CheckpointError) as error:
        print(f"\nstopped: {error}", file=sys.stderr)
        return 1
    except TrainingInterrupted as error:
        if error.is_main:
            print(f"\nstopped: {error}", file=sys.stderr)
            print(f"go on with: {_again(error.checkpoint.parent.parent)}", file=sys.stderr)
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
    except BrokenPipeError:  # whoever read the output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, ImportError) as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "\ninterrupted; the same command goes on from its last checkpoint, if there is one, "
            "with --auto-resume --out FOLDER",
            file=sys.stderr,
        )
        return 130
    return 0


def _defaults(arguments: Sequence[str], scenes: JobConfig, real: JobConfig) -> JobConfig:
    """Return what holds where the command line is silent.

    A resumed run keeps its own settings, so that ``--resume --out DIR`` says it all.
    """
    from maskdistill.job_config import saved_config
    from maskdistill.training.checkpoint import checkpoint_files

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
