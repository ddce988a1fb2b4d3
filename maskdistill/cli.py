"""A thin face over the library: arguments in, exit codes and plain sentences out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from maskdistill.commands.attention import attention
from maskdistill.commands.compare import compare
from maskdistill.commands.evaluate import evaluate
from maskdistill.commands.models import models
from maskdistill.commands.pack import pack
from maskdistill.commands.said import NEEDS_TRAIN, output_closed
from maskdistill.commands.show import show

_DESCRIPTION = """Masking strategies for self-distillation of Vision Transformers.

  maskdistill show "BlockMasker(0.4)"     what a masker hides
  maskdistill train                       a first run, on built-in scenes
  maskdistill train --data PATH           on images of your own
  maskdistill evaluate runs/first         what it learned, next to random weights
  maskdistill compare study.toml          policies x seeds, and a report
  maskdistill COMMAND --help              all about one command
  maskdistill --version
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command of ``maskdistill`` or ``python -m maskdistill``, and return the exit code.

    Example:
        >>> main(["pack", "mini-imagenet", "mini.npz"])  # doctest: +SKIP
        mini.npz: 60,000 images of 100 classes, 286 MiB.
        0

    Args:
        argv: arguments; None is the command line's.

    Returns:
        0; 1 where data is too damaged or training had to stop; 2 where the arguments or the data
        cannot work; 130 where the user interrupted, 143 where a scheduler did.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["--version"]:
        import maskdistill

        print(f"maskdistill {maskdistill.__version__}")
        return 0
    if arguments[:1] == ["train"]:  # its defaults depend on its arguments
        from maskdistill.commands.train import train  # with timm and torchvision

        return train(argv=arguments[1:], prog="maskdistill train")
    try:
        import tyro
    except ImportError:
        print(NEEDS_TRAIN, file=sys.stderr)
        return 2
    # A dict of one command would be that command without its name.
    commands = tyro.extras.SubcommandApp()
    for name, command in _COMMANDS.items():
        commands.command(name=name)(command)
    try:
        code = commands.cli(
            prog="maskdistill",
            description=_DESCRIPTION,
            args=arguments,
            config=(tyro.conf.FlagCreatePairsOff,),  # --json alone, without a --no-json
        )
    except BrokenPipeError:  # whoever read the output, such as `head`, has seen enough
        output_closed()
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        from maskdistill.data.sources import DamagedDataError

        if not isinstance(error, DamagedDataError):
            raise
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return code if isinstance(code, int) else 0


def _train() -> None:
    """Train DINO under a masking policy, evaluate, and draw; "train --help" says more."""


_COMMANDS: dict[str, Callable[..., Any]] = {
    "train": _train,
    "evaluate": evaluate,
    "attention": attention,
    "compare": compare,
    "show": show,
    "models": models,
    "pack": pack,
}
