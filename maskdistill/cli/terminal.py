"""What a terminal shows: warnings in plain lines, progress on stderr, an error in one sentence."""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

NEEDS_TRAIN = 'error: this needs the train extra: pip install "maskdistill[train]"'


def exit_code(
    command: Callable[[], object], *, before: str = "", interrupted: str = "interrupted"
) -> int:
    """Run a command; say in a sentence why it ended early, and return the exit code.

    Args:
        command: returns its exit code, or anything else for 0.
        before: what comes before the sentence, such as a line's end after a progress bar.
        interrupted: said when the user interrupts.
    """
    try:
        code = command()
    except BrokenPipeError:  # whoever read the output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ImportError) as error:
        print(f"{before}error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        from maskdistill.data import DamagedDataError

        if not isinstance(error, DamagedDataError):
            raise
        print(f"{before}stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{before}{interrupted}", file=sys.stderr)
        return 130
    return code if isinstance(code, int) else 0


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Write each warning as one line, above a progress bar if there is one."""

    def write(message: Warning | str, *_: Any, **__: Any) -> None:
        from tqdm import tqdm

        tqdm.write(f"warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = write
        yield


def print_table(rows: Sequence[Sequence[str]], *, right: bool = False) -> None:
    """Print rows in columns; ``right`` aligns all but the first to the right, as numbers are."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = [f"{first:<{widths[0]}}"]
        side = ">" if right else "<"
        cells += [f"{cell:{side}{w}}" for cell, w in zip(others, widths[1:], strict=True)]
        print("  ".join(cells).rstrip())


def progress_bar(**options: Any) -> Any:
    """Return a tqdm bar that shows on a terminal alone, and after two seconds."""
    from tqdm import tqdm

    return tqdm(delay=2, disable=None, dynamic_ncols=True, **options)


@contextmanager
def ticking(bar: Any) -> Iterator[None]:
    """Keep the clock of a bar going, from two seconds on, while nothing else moves it."""
    done = threading.Event()

    def tick() -> None:
        wait = 2.0
        while not done.wait(wait):
            bar.refresh()
            wait = 0.5

    clock = threading.Thread(target=tick, daemon=True)
    if not bar.disable:
        clock.start()
    try:
        yield
    finally:
        done.set()
        if clock.is_alive():
            clock.join()


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Say on a terminal what is being waited for, and how long, from two seconds on."""
    bar = progress_bar(desc=what, bar_format="{desc} [{elapsed}]", leave=False)
    with bar, ticking(bar):
        yield
