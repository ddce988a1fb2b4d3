"""The process's place among others, as ``torchrun`` tells it; one process needs nothing."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

# Torch's own switch. By default the processes meet in the store of torchrun's agents.
_OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"


@dataclass(frozen=True)
class Processes:
    """This process and its peers.

    Attributes:
        rank: number of this process, from 0.
        world: number of processes.
        device: where this process computes.
    """

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0


def start_processes(device: str = "auto") -> Processes:
    """Find the device and, under ``torchrun``, join the other processes.

    Args:
        device: ``"auto"`` takes a GPU where there is one; or ``cpu``, ``cuda``, ``cuda:1``.

    Raises:
        ValueError: a device that is not there.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    chosen = _device(device, int(os.environ.get("LOCAL_RANK", 0)))
    if world > 1 and not dist.is_initialized():
        _join("nccl" if chosen.type == "cuda" else "gloo")
    return Processes(rank, world, chosen)


def _join(backend: str) -> None:
    store, rank, world = next(rendezvous("env://"))
    if not _store_of_its_own():
        if _nodes() > 1 and rank == 0 and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
            warnings.warn(
                f"several nodes find each other again after a restart only if {_OWN_STORE}=1 was "
                "set for torchrun on each of them.",
                UserWarning,
                stacklevel=3,
            )
        # After a restart, torchrun's store still has the keys of those who died.
        attempt = f"attempt {restarts()}"
        store = dist.PrefixStore(attempt, store)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)


def restarts() -> int:
    """Return how often ``torchrun --max-restarts`` started this process anew.

    Each node counts by itself: one whose processes were stopped because another node's had died
    does not call that a restart.
    """
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def _store_of_its_own() -> bool:
    """Say whether the processes of each attempt meet in a store that is new."""
    return os.environ.get(_OWN_STORE) == "1"


def _nodes() -> int:
    return int(os.environ.get("GROUP_WORLD_SIZE", 1))


def _device(name: str, local_rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N; got {name!r}.") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device {name!r} was asked for, but there is no CUDA device here.")
        device = torch.device("cuda", local_rank if device.index is None else device.index)
        torch.cuda.set_device(device)
    return device
