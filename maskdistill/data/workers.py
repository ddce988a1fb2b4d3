"""What a loader's worker does first: compute on one thread, and outlast signals for a while."""

from __future__ import annotations

import os
import signal
import threading
import time

import torch

GRACE = 60.0
"""Seconds that a worker goes on after SIGTERM."""


def prepare_worker(worker: int) -> None:
    """Set a loader's worker up; its ``worker_init_fn``.

    Ctrl-C goes to all processes in the terminal, ``torchrun`` passes SIGTERM on to the group of
    each process, and a scheduler may signal every process of a job. The main process, which
    finishes its step and saves, needs its workers until then. So only SIGTERM ends one, and not
    before ``GRACE``, since nobody can tell who sent it: a loader sends it to workers that hang.
    """
    # Workers that each use all cores for one small image only get in each other's way.
    torch.set_num_threads(1)
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    # A handler in Python waits for the main thread, which may hang; its wake-up call does not.
    signal.signal(signal.SIGTERM, _note)
    heard, call = os.pipe()
    os.set_blocking(call, False)
    signal.set_wakeup_fd(call, warn_on_full_buffer=False)
    threading.Thread(target=_end_after_grace, args=(heard,), daemon=True).start()


def _note(number: int, frame: object) -> None:
    """Do nothing: the thread has heard it."""


def _end_after_grace(heard: int) -> None:
    os.read(heard, 1)
    time.sleep(GRACE)
    os._exit(0)
