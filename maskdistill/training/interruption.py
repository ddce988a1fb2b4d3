"""A scheduler's or the user's wish to stop: noted at once, obeyed between two steps."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

# Ctrl-C, the end of a job's time, and Slurm's `--signal=USR1@120`, which says so beforehand.
SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)
)


class TrainingInterrupted(KeyboardInterrupt):
    """A signal stopped training after a whole step, and the run is saved.

    It is a ``KeyboardInterrupt``, so that ``except Exception`` does not take it for a failure and
    no code after ``fit`` runs by mistake with half-trained weights.

    Attributes:
        signum: the signal.
        step: steps done.
        checkpoint: where they are saved.
        is_main: whether this is the process that writes; all raise this together.
    """

    def __init__(
        self, signum: int, step: int, total_steps: int, checkpoint: Path, is_main: bool = True
    ) -> None:
        super().__init__(
            f"{signal.Signals(signum).name} stopped the run after step {step} of {total_steps}. "
            f"It is saved in {checkpoint} and goes on with --resume, or fit(..., resume=True)."
        )
        self.signum, self.step, self.checkpoint, self.is_main = signum, step, checkpoint, is_main

    @property
    def exit_code(self) -> int:
        """What a shell calls this end: 130 after SIGINT, 143 after SIGTERM."""
        return 128 + self.signum


class StopRequest(BaseException):
    """Raised by a signal inside `SignalWatch.interruptible`."""


class SignalWatch:
    """Notes the first SIGINT, SIGTERM or SIGUSR1 while its context lasts.

    >>> with SignalWatch(say=False) as watch:
    ...     signal.raise_signal(signal.SIGTERM)
    ...     watch.received == signal.SIGTERM
    True

    A second SIGINT raises ``KeyboardInterrupt`` at once. Signals that are ignored, or that the
    program handles itself, are left alone; so are all of them outside the main thread, where
    Python allows no handlers. The handlers from before return when the context ends.

    Args:
        say: tell the user on stderr that the signal was noted.

    Attributes:
        received: the signal's number; 0 while there is none.
    """

    def __init__(self, *, say: bool = True) -> None:
        self.received = 0
        self._say = say
        self._process = os.getpid()
        self._previous: dict[int, Any] = {}
        self._interruptible = False
        self._deferred: Callable[[int, FrameType | None], Any] | None = None
        self._main_thread = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> SignalWatch:
        for number in SIGNALS if self._main_thread else ():
            handler = signal.getsignal(number)
            if handler in (signal.SIG_DFL, signal.default_int_handler):
                self._previous[number] = handler
                signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a loader's worker, which stops when its parent does
            return
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received:
            return
        self.received = number
        if self._say:  # not by print: the signal may have come in the middle of one
            name, again = signal.Signals(number).name, "; Ctrl-C stops at once"
            with contextlib.suppress(OSError):
                os.write(2, f"\n{name}: stopping after this step, and saving{again}\n".encode())
        if self._interruptible:
            raise StopRequest

    @contextlib.contextmanager
    def interruptible(self, on: bool = True) -> Iterator[None]:
        """Inside, a signal does not wait: it raises `StopRequest`, as does one noted before.

        Args:
            on: False makes this do nothing.
        """
        self._interruptible = on
        try:
            if on and self.received:
                raise StopRequest
            yield
        finally:
            self._interruptible = False

    @contextlib.contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Inside, the death of a loader's worker raises nothing; see `raise_deferred`.

        torch raises it from a handler of SIGCHLD, which may come in the middle of a step and would
        leave the networks half updated.
        """
        number: Any = getattr(signal, "SIGCHLD", None)  # not on Windows
        handler = signal.getsignal(number) if number and self._main_thread else None
        if not callable(handler):
            yield
            return

        def note(number: int, frame: FrameType | None) -> None:
            self._deferred = handler

        signal.signal(number, note)
        try:
            yield
        finally:
            signal.signal(number, handler)

    def raise_deferred(self) -> None:
        """Raise what a worker's death would have raised inside `undisturbed`, if one died.

        Raises:
            RuntimeError: torch's, naming the worker and the signal that ended it.
        """
        handler, self._deferred = self._deferred, None
        if handler is not None:
            handler(signal.SIGCHLD, None)
