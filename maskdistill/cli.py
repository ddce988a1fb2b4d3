"""A thin face over the library: arguments in, exit codes and plain sentences out."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from maskdistill.data import DamagedDataError
from maskdistill.job import JobConfig, run_job
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
    import tyro

    arguments = list(sys.argv[1:] if argv is None else argv)
    has_data = any(a == "--data" or a.startswith("--data=") for a in arguments)
    try:
        config = tyro.cli(
            JobConfig,
            description=description,
            default=real if has_data else scenes,
            args=arguments,
        )
        run_job(config)
    except (NonFiniteLossError, DamagedDataError) as error:
        print(f"\nstopped: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; go on from the last checkpoint with --resume", file=sys.stderr)
        return 130
    return 0
