"""The process's place among others, as ``torchrun`` tells it; one process needs nothing."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from maskdistill.models import MultiCropWrapper

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


Sharding: TypeAlias = Literal["ddp", "fsdp"]
"""``ddp``: every process holds all weights, and gradients are averaged. ``fsdp``: weights, moments
and the teacher's average are spread over the processes (FSDP2, ``fully_shard``)."""


def replicate(student: nn.Module, device: torch.device) -> nn.Module:
    """Wrap a student so that its gradients are averaged over the processes."""
    return DistributedDataParallel(
        student,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,  # saves a copy of all gradients
    )


def shard(network: MultiCropWrapper) -> None:
    """Spread a network's weights over all processes, in place, block by block.

    Its parameters are then ``DTensor``; state-dict keys stay. The backbone can be called alone once
    the whole network has been.

    Raises:
        ValueError: on a CPU, where torch is too old for that (2.6).
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    vit = network.backbone
    kind = next(network.parameters()).device.type
    if kind == "cpu" and not can_shard_on_cpu():
        raise ValueError(
            f"torch {torch.__version__} cannot spread weights (sharding='fsdp') on CPUs. Take a "
            "newer torch, GPUs, or sharding='ddp'."
        )
    # FSDP2 warns of an output that is a view, as the class token of all tokens is.
    vit.register_forward_hook(lambda module, inputs, output: output.clone())
    mesh = init_device_mesh(kind, (dist.get_world_size(),))  # by default, of the GPUs if any
    for part in (*getattr(vit.backbone, "blocks", ()), vit, network):
        # Not the default, which leaves the teacher's weights whole after its forward: no backward
        # comes to spread them again, and the moving average needs them spread like the student's.
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    register_fsdp_forward_method(vit, "forward_features")
    for method in ("score_patches", "mean_patch_scores"):
        register_fsdp_forward_method(network, method)


def can_shard_on_cpu() -> bool:
    """Say whether this torch has FSDP2 for CPUs."""
    return hasattr(torch.cpu.Stream, "record_event")


@contextmanager
def gradients_later(student: Any, later: bool) -> Iterator[None]:
    """Leave the gradients of a backward inside on their process, to be averaged with the next.

    Args:
        student: bare, or wrapped by DDP or FSDP2.
        later: False changes nothing.
    """
    delay = getattr(student, "set_requires_gradient_sync", None)
    if delay is not None:  # FSDP2
        delay(not later)
    no_sync = getattr(student, "no_sync", nullcontext)  # DDP
    with no_sync() if later else nullcontext():
        yield


def is_sharded(parameters: Iterable[Tensor]) -> bool:
    """Say whether tensors are spread over processes."""
    return any(hasattr(parameter, "to_local") for parameter in parameters)


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return this process's part of each tensor; of plain ones all."""
    return [
        tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[no-untyped-call]
        for tensor in tensors
    ]


def norms_of_all(tensors: list[Tensor]) -> list[Tensor]:
    """Return the L2 norm of each tensor, over all processes that hold a part of it."""
    norms = list(torch._foreach_norm(local(tensors)))
    if not is_sharded(tensors):
        return norms
    squares = torch.stack(norms).square()
    dist.all_reduce(squares)  # one for all tensors
    return list(squares.sqrt().unbind())


def gathered(state: Any) -> Any:
    """Return a state dict, of networks or optimisers, with every sharded tensor made whole.

    To be called in all processes, which gather tensor by tensor; the first one keeps them, on the
    CPU, and the others get None in their place: a network that is spread for want of memory must
    not be gathered into it. The result is what one process would have, so a run can go on sharded
    otherwise.
    """
    if isinstance(state, dict):
        return {key: gathered(value) for key, value in state.items()}
    if isinstance(state, list):
        return [gathered(value) for value in state]
    if not hasattr(state, "full_tensor"):
        return state
    whole = state.full_tensor()
    return whole.cpu() if dist.get_rank() == 0 else None


def load_gathered(network: nn.Module, state: dict[str, Any]) -> None:
    """Load a whole state dict into a network, which may be sharded."""
    mine = network.state_dict()
    network.load_state_dict({k: _spread(v, mine[k]) if k in mine else v for k, v in state.items()})


def load_moments(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a whole state dict into an optimiser, whose parameters may be sharded."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states = {
        index: {k: _spread(v, parameters[index]) for k, v in moments.items()}
        for index, moments in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": states})


def _spread(value: Any, like: Tensor) -> Any:
    """Return this process's part of a whole tensor, as the other tensor is spread."""
    if not hasattr(like, "to_local") or not isinstance(value, Tensor) or value.shape != like.shape:
        return value  # a step count, for example
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)  # type: ignore[attr-defined]


T = TypeVar("T")


class Agreement:
    """Small decisions among the processes of a run; one process decides alone, at no cost.

    They go over a group of their own on the CPU, beside the gradients. Every method must be called
    by all processes.

    >>> Agreement(Processes(0, 1, torch.device("cpu"))).by_main(lambda: "runs/first")
    'runs/first'

    Args:
        processes: of the run, joined already.
    """

    def __init__(self, processes: Processes) -> None:
        self._world, self._is_main = processes.world, processes.is_main
        self._rank = processes.rank
        self._group: Any = dist.new_group(backend="gloo") if self._world > 1 else None
        self._flag = torch.zeros(1, dtype=torch.int64)
        self._work: Any = None

    def by_main(self, decide: Callable[[], T]) -> T:
        """Return what ``decide`` returns in the main process, or raise what it raises there."""
        if self._group is None:
            return decide()
        answer: list[Any] = [None, None]
        if self._is_main:
            try:
                answer[0] = decide()
            except Exception as error:
                answer[1] = error
        dist.broadcast_object_list(answer, src=0, group=self._group)
        if answer[1] is not None:
            raise answer[1]
        result: T = answer[0]
        return result

    def highest(self, flag: int) -> int:
        """Return the highest flag that any process raised before its previous call.

        The answer to one call is fetched in the next, so that no step waits for it, and is the
        same in all processes at the same step.

        Args:
            flag: >= 0; with one process it is the answer.
        """
        if self._group is None:
            return flag
        answer = self.settle()
        self._flag = torch.tensor([flag])
        self._work = dist.all_reduce(self._flag, dist.ReduceOp.MAX, self._group, async_op=True)
        return answer

    def settle(self) -> int:
        """Wait for the answer that is under way, return it and ask nothing new; 0 if none is."""
        if self._work is None:
            return 0
        self._work.wait()
        self._work = None
        return int(self._flag)

    def share(self, items: Sequence[T]) -> list[T]:
        """Return this process's share of some work, of the same length in all processes.

        Every process must make the same number of forwards where weights are sharded, so the last
        item comes again where the work does not divide.
        """
        mine = list(items[self._rank :: self._world])
        length = -(-len(items) // self._world)
        return mine + list(items[-1:]) * (length - len(mine))

    def join(self, rows: Tensor, count: int) -> Tensor:
        """Return the rows that all processes made of their shares, in the order of the work.

        Args:
            rows: one per item of this process's ``share``, on the CPU.
            count: items of all.
        """
        if self._group is None:
            return rows
        everyones = [torch.empty_like(rows) for _ in range(self._world)]
        dist.all_gather(everyones, rows.contiguous(), group=self._group)
        return torch.stack(everyones, dim=1).flatten(0, 1)[:count]

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """Return the values of each process, in the order of their ranks."""
        mine = torch.tensor(values, dtype=torch.float64)
        if self._group is None:
            return [mine.tolist()]
        everyones = [torch.empty_like(mine) for _ in range(self._world)]
        dist.all_gather(everyones, mine, group=self._group)
        return [theirs.tolist() for theirs in everyones]
