"""What a loader's worker does first: it computes on one thread, and only its parent may end it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading

import torch


def prepare_worker(worker: int) -> None:
    """Set a loader's worker up; its ``worker_init_fn``.

    Ctrl-C goes to all processes in the terminal, ``torchrun`` passes SIGTERM on to the group of
    each process, and a scheduler may signal every process of a job. The main process, which
    finishes its step and saves, needs its workers until then.
    """
    # Workers that each use all cores for one small image only get in each other's way.
    torch.set_num_threads(1)
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    # Not os.getppid(), which is the server's where workers are forked from one.
    if hasattr(signal, "sigwaitinfo") and parent is not None and parent.pid is not None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey, args=(parent.pid,), daemon=True).start()


def _obey(parent: int) -> None:
    """End this process when its parent asks for it, as a loader does that shuts down."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
