"""The parts of DINO's optimiser that are easily missed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from maskdistill.training.sharding import local, norms_of_all

ClipMode: TypeAlias = Literal["per_parameter", "global"]

_TOKENS = ("pos_embed", "cls_token", "reg_token", "mask_token")


def parameter_groups(model: nn.Module, *, decay_tokens: bool = True) -> list[dict[str, Any]]:
    """Split the trainable parameters into decayed ones and those that are never decayed.

    Biases and one-dimensional parameters (norms) are not decayed. The position embedding and the
    class, register and mask tokens are, as in facebookresearch/dino, where only the number of
    dimensions counts.

    Args:
        model: whose parameters are to be optimised.
        decay_tokens: False also spares the position embedding and the tokens.

    Returns:
        Two groups for ``torch.optim.AdamW``; the second has ``weight_decay=0``.
    """
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        token = not decay_tokens and name.rsplit(".", 1)[-1] in _TOKENS
        is_spared = name.endswith(".bias") or parameter.ndim == 1 or token
        (spared if is_spared else decayed).append(parameter)
    return [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]


@torch.no_grad()
def clip_gradients(gradients: list[Tensor], limit: float, mode: ClipMode) -> Tensor:
    """Scale gradients down in place to an L2 norm of at most ``limit``, without a host sync.

    Args:
        gradients: to clip; of sharded parameters, each process's part.
        limit: greatest norm; 0 clips nothing.
        mode: ``"per_parameter"`` clips each tensor by its own norm, as facebookresearch/dino does;
            ``"global"`` clips by the norm of all together, as most others do.

    Returns:
        The global norm before clipping, a scalar tensor.
    """
    norms = norms_of_all(gradients)
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    if limit > 0:
        limits = [total] * len(norms) if mode == "global" else norms
        scales = [(limit / (norm + 1e-6)).clamp(max=1.0) for norm in limits]
        torch._foreach_mul_(local(gradients), scales)
    return total


def freeze_gradients(model: nn.Module, part: str) -> None:
    """Take away the gradients of parameters whose name contains ``part``.

    AdamW skips a parameter without a gradient altogether: no update, no decay, no moments.
    """
    for name, parameter in model.named_parameters():
        if part in name:
            parameter.grad = None


@torch.no_grad()
def update_average(average: Iterable[Tensor], current: Iterable[Tensor], momentum: float) -> None:
    """Move an exponential moving average in place: average * m + current * (1 - m)."""
    torch._foreach_lerp_(local(average), local(current), 1 - momentum)
