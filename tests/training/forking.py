"""Work in a forked process, which may be killed: a start costs milliseconds, not an import."""

from __future__ import annotations

import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from maskdistill.training.distributed import Processes

KILLED = -int(signal.SIGKILL)


def fork(work: Callable[[], object]) -> int:
    """Start ``work`` in a child and return its process id; it exits with 0, or 1 on an error."""
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():  # Python 3.12 warns of forks beside threads
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait(child: int) -> int:
    """Return how a child ended: its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def in_fork(work: Callable[[], object]) -> int:
    """Do ``work`` in a child, and return how it ended."""
    return wait(fork(work))


def in_two(work: Callable[[Processes], object], store: Path) -> list[int]:
    """Do ``work`` in two processes that know each other, and return how they ended."""

    def joined(rank: int) -> None:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
        work(Processes(rank, 2, torch.device("cpu")))
        dist.destroy_process_group()

    return [wait(child) for child in [fork(partial(joined, rank)) for rank in (0, 1)]]


def die(*args: object, **kwargs: object) -> None:
    """End this process as a power cut would."""
    os.kill(os.getpid(), signal.SIGKILL)
