"""The process's place among others, as ``torchrun`` tells it; one process needs nothing."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous


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
    # After a restart, torchrun's store still has the keys of those who died.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    own = dist.PrefixStore(f"attempt {attempt}", store)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=own, rank=rank, world_size=world)


def _device(name: str, local_rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(
            f"device must be auto, cpu, cuda or cuda:N; got {name!r} ({error})."
        ) from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device {name!r} was asked for, but there is no CUDA device here.")
        device = torch.device("cuda", local_rank if device.index is None else device.index)
        torch.cuda.set_device(device)
    return device
