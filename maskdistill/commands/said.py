"""How commands speak: warnings in plain lines, progress on stderr, errors in a sentence."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")

NEEDS_TRAIN = 'error: this needs the train extra: pip install "maskdistill[train]"'


def plain_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Write a warning as one line, in the place of Python's ``warnings.showwarning``."""
    from tqdm import tqdm

    tqdm.write(f"warning: {message}", file=sys.stderr)  # above a progress bar, if there is one


def progress(items: Iterable[T], what: str, unit: str) -> Iterator[T]:
    """Show a bar on a terminal while items are worked on, if it takes more than two seconds."""
    from tqdm import tqdm

    return iter(tqdm(items, desc=what, unit=unit, delay=2, disable=None, dynamic_ncols=True))


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
    from tqdm import tqdm

    with (
        tqdm(desc=what, bar_format="{desc} [{elapsed}]", delay=2, disable=None, leave=False) as bar,
        ticking(bar),
    ):
        yield


def output_closed() -> None:
    """Let go of an output that nobody reads any more, such as that of a pipe into ``head``."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
