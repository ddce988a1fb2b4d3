"""Several processes with one student: whole on each (DDP), or its weights spread over all (FSDP2).

Nothing here is a distributed engine: torch's are called, and what they leave open is decided.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from maskdistill.models import MultiCropWrapper

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
